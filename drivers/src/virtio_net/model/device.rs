//! What registers, engines and the owner's handle share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crossbeam::utils::CachePadded;
use underpass::interrupt::Interrupts;
use underpass::model::{Bus, Host};
use underpass::net::MacAddr;

use super::Profile;
use super::engine::Core;
use super::inbox::Inbox;
use super::registers::Registers;
use super::report::{Count, Signals, Violation};
use super::rules::{Flows, Rules};
use super::spec::pci::{NO_VECTOR, isr, status};
use super::spec::{Features, net};
use super::virtqueue::{Broken, Config, Virtqueue};

/// One engine's counts.
type Counts = [AtomicU64; Count::ALL.len()];

/// Bits of [`Device::link`]: who says that it is up.
const LINK_OWNER: u8 = 1;
const LINK_PEER: u8 = 2;

/// The device.
///
/// Locks are taken in this order: `registers`, then a core, then one of the others. Engine 0 also waits for the
/// other engines' cores while it holds its own; nobody who holds one of those waits for its.
pub(super) struct Device {
    pub(super) profile: Profile,
    /// The engines' insides, one a queue pair, filled by `start`. They go, and their peers with them, when the engines do.
    cores: OnceLock<Box<[Weak<Mutex<Core>>]>>,
    /// How many wait for a core: engines then let them go first.
    waiting: AtomicUsize,
    registers: Mutex<Registers>,
    status: AtomicU8,
    bus_master: AtomicBool,
    /// What was negotiated; none before.
    features: AtomicU64,
    /// The vector of each queue, then that of configuration changes.
    vectors: Box<[AtomicU16]>,
    isr: AtomicU8,
    interrupts: OnceLock<Interrupts>,
    link: AtomicU8,
    announce: AtomicBool,
    mac: Mutex<MacAddr>,
    /// The device-specific configuration changed since its generation did.
    config_changed: AtomicBool,
    rules: Mutex<Arc<Rules>>,
    /// Counts the changes of `rules`.
    rules_changed: AtomicU64,
    /// Bit n: receive queue n is there.
    receiving: AtomicU32,
    pub(super) flows: Flows,
    /// Frames that other engines received for each queue.
    pub(super) inboxes: Box<[Inbox]>,
    /// Notified queues, if the driver is asked to notify.
    notified: Box<[AtomicBool]>,
    violation: Mutex<Option<Violation>>,
    counts: Box<[CachePadded<Counts>]>,
    /// One a queue.
    pub(super) signals: Box<[Signals]>,
}

impl Device {
    pub(super) fn new(profile: Profile) -> Self {
        let pairs = usize::from(profile.queue_pairs);
        let queues = profile.queues();
        Self {
            cores: OnceLock::new(),
            waiting: AtomicUsize::new(0),
            registers: Mutex::new(Registers::new(&profile)),
            status: AtomicU8::new(0),
            bus_master: AtomicBool::new(false),
            features: AtomicU64::new(0),
            vectors: (0..=queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            interrupts: OnceLock::new(),
            link: AtomicU8::new(LINK_OWNER | LINK_PEER),
            announce: AtomicBool::new(false),
            mac: Mutex::new(profile.mac),
            config_changed: AtomicBool::new(false),
            rules: Mutex::new(Arc::new(Rules::new(&profile, Features::NONE))),
            rules_changed: AtomicU64::new(0),
            receiving: AtomicU32::new(0),
            flows: Flows::new(),
            inboxes: (0..pairs).map(|_| Inbox::new()).collect(),
            notified: (0..queues).map(|_| AtomicBool::new(false)).collect(),
            violation: Mutex::new(None),
            counts: (0..pairs).map(|_| CachePadded::default()).collect(),
            signals: (0..queues).map(|_| Signals::default()).collect(),
            profile,
        }
    }

    pub(super) fn start(&self, host: &dyn Host, cores: &[Arc<Mutex<Core>>]) {
        // A second start would bring the same ones.
        let _ = self.interrupts.set(host.interrupts());
        let _ = self.cores.set(cores.iter().map(Arc::downgrade).collect());
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    // Status

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Adds to the status.
    pub(super) fn set_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    /// Whether the queues are live.
    #[inline]
    pub(super) fn is_running(&self) -> bool {
        const WANTED: u8 = status::DRIVER_OK;
        const UNWANTED: u8 = status::DEVICE_NEEDS_RESET | status::FAILED;
        self.status() & (WANTED | UNWANTED) == WANTED && self.bus_master.load(Ordering::Relaxed)
    }

    /// Allows DMA, or not: when this returns there is none any more.
    pub(super) fn set_bus_master(&self, on: bool) {
        if self.bus_master.swap(on, Ordering::AcqRel) && !on {
            self.wait_for_others(None);
        }
    }

    pub(super) fn features(&self) -> Features {
        Features(self.features.load(Ordering::Acquire))
    }

    /// The driver's choice is accepted.
    pub(super) fn set_features(&self, features: Features) {
        self.features.store(features.0, Ordering::Release);
        self.set_rules(Rules::new(&self.profile, features));
    }

    /// The driver broke a rule: the device stops until it is reset.
    #[cold]
    pub(super) fn violated(&self, queue: Option<u16>, broken: Broken) {
        let violation = match broken {
            Broken::Rule(rule) => Violation { queue, rule, fault: None },
            Broken::Dma(fault) => Violation {
                queue,
                rule: "memory that the device was given can not be accessed",
                fault: Some(fault),
            },
        };
        let before = self.status.fetch_or(status::DEVICE_NEEDS_RESET, Ordering::AcqRel);
        if before & status::DEVICE_NEEDS_RESET != 0 {
            return;
        }
        tracing::warn!("the virtio-net device needs a reset: {violation}");
        *lock(&self.violation) = Some(violation);
        if before & status::DRIVER_OK != 0 {
            self.interrupt(self.vectors.len() - 1, isr::CONFIG);
        }
    }

    pub(super) fn violation(&self) -> Option<Violation> {
        *lock(&self.violation)
    }

    /// Everything as after power-on, but for the registers. When this returns no engine does DMA any more for work that was
    /// accepted before.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.receiving.store(0, Ordering::Release);
        for pair in 0..self.profile.queue_pairs {
            self.with_core(pair, Core::clear);
        }
        self.inboxes.iter().for_each(Inbox::clear);
        self.features.store(0, Ordering::Release);
        self.vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        self.isr.store(0, Ordering::Release);
        self.announce.store(false, Ordering::Release);
        *lock(&self.mac) = self.profile.mac;
        self.flows.clear();
        self.set_rules(Rules::new(&self.profile, Features::NONE));
        self.notified.iter().for_each(|notified| notified.store(false, Ordering::Release));
        // Once more: a step that was in progress may have found the driver wrong.
        self.status.store(0, Ordering::Release);
    }

    // Queues and engines

    /// Works with a core, between two of its steps.
    fn with_core<R>(&self, pair: u16, work: impl FnOnce(&mut Core) -> R) -> Option<R> {
        let core = self.cores.get()?.get(usize::from(pair))?.upgrade()?;
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let result = work(&mut lock(&core));
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        Some(result)
    }

    /// Whether somebody waits for a core. A lock alone would let an engine that has work always win.
    #[inline]
    pub(super) fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0
    }

    /// Returns when all engines but `own` have ended the steps that they are in.
    pub(super) fn wait_for_others(&self, own: Option<u16>) {
        for pair in (0..self.profile.queue_pairs).filter(|pair| Some(*pair) != own) {
            self.with_core(pair, |_| ());
        }
    }

    /// Queue pairs that there are, as negotiated.
    fn pairs(&self) -> u16 {
        let many = self.features().intersects(Features::MQ | Features::RSS);
        if many { self.profile.queue_pairs } else { 1 }
    }

    /// What queue `index` is for, as negotiated.
    pub(super) fn role(&self, index: u16) -> Option<Role> {
        let (pairs, pair) = (self.pairs(), index / 2);
        if pair < pairs {
            let receives = index == net::receive_queue(pair);
            return Some(if receives { Role::Receive(pair) } else { Role::Transmit(pair) });
        }
        let there = self.features().contains(Features::CTRL_VQ) && Some(index) == net::control_queue(pairs);
        there.then_some(Role::Control)
    }

    /// The queue that has this role.
    pub(super) fn index(&self, role: Role) -> u16 {
        match role {
            Role::Receive(pair) => net::receive_queue(pair),
            Role::Transmit(pair) => net::transmit_queue(pair),
            Role::Control => net::control_queue(self.pairs()).unwrap_or(u16::MAX),
        }
    }

    /// Makes a queue live.
    pub(super) fn install(&self, index: u16, config: Config) {
        let asks = self.profile.notified;
        let Some(role) = self.role(index) else {
            return self.violated(Some(index), Broken::Rule("a queue was enabled that was not negotiated"));
        };
        let installed = self.with_core(role.pair(), |core| {
            let queue = Virtqueue::new(config, &mut core.bus, asks)?;
            core.set_queue(role, Some(queue));
            Ok(())
        });
        match installed {
            Some(Ok(())) => self.set_receiving(role, true),
            Some(Err(broken)) => self.violated(Some(index), broken),
            None => {}
        }
        // What was made available before counts as notified.
        self.notify(index);
    }

    /// Takes a queue away; when this returns its memory is not accessed any more.
    pub(super) fn remove(&self, index: u16) {
        if let Some(role) = self.role(index) {
            self.set_receiving(role, false);
            self.with_core(role.pair(), |core| core.set_queue(role, None));
            if let Role::Receive(pair) = role {
                self.inboxes[usize::from(pair)].clear();
            }
        }
    }

    fn set_receiving(&self, role: Role, on: bool) {
        if let Role::Receive(pair) = role {
            if on {
                self.receiving.fetch_or(1 << pair, Ordering::AcqRel);
            } else {
                self.receiving.fetch_and(!(1 << pair), Ordering::AcqRel);
            }
        }
    }

    /// The receive queues that are there, a bit each.
    #[inline]
    pub(super) fn receiving(&self) -> u32 {
        self.receiving.load(Ordering::Relaxed)
    }

    /// The driver notified the device.
    pub(super) fn doorbell(&self, index: u16) {
        if let Some(signals) = self.signals.get(usize::from(index)) {
            signals.notifications.fetch_add(1, Ordering::Relaxed);
        }
        self.notify(index);
    }

    /// There may be something on this queue.
    pub(super) fn notify(&self, index: u16) {
        if let Some(notified) = self.notified.get(usize::from(index)) {
            // Release: pairs with the Acquire in `has_available`.
            notified.store(true, Ordering::Release);
        }
    }

    /// Whether there is something to take on queue `index`; if the driver is asked to notify, as far as it did.
    #[inline]
    pub(super) fn has_available(
        &self,
        bus: &mut Bus,
        queue: &mut Virtqueue,
        index: u16,
    ) -> Result<bool, Broken> {
        if !self.profile.notified {
            return queue.has_available(bus);
        }
        let notified = &self.notified[usize::from(index)];
        if !notified.load(Ordering::Relaxed) || !notified.swap(false, Ordering::AcqRel) {
            return Ok(false);
        }
        if !queue.has_available(bus)? {
            queue.ask(bus, true)?;
            if !queue.has_available(bus)? {
                return Ok(false);
            }
        }
        // There may be more the next time.
        self.notify(index);
        Ok(true)
    }

    // Rules

    pub(super) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&lock(&self.rules))
    }

    /// How often the rules have changed.
    #[inline]
    pub(super) fn rules_changed(&self) -> u64 {
        self.rules_changed.load(Ordering::Acquire)
    }

    pub(super) fn set_rules(&self, rules: Rules) {
        *lock(&self.rules) = Arc::new(rules);
        // Release: whoever sees the count sees the rules.
        self.rules_changed.fetch_add(1, Ordering::Release);
    }

    // Configuration

    pub(super) fn mac(&self) -> MacAddr {
        *lock(&self.mac)
    }

    /// The driver sets it, so it needs no telling.
    pub(super) fn set_mac(&self, mac: MacAddr) {
        *lock(&self.mac) = mac;
        self.config_changed.store(true, Ordering::Release);
    }

    #[inline]
    pub(super) fn link_is_up(&self) -> bool {
        self.link.load(Ordering::Relaxed) == LINK_OWNER | LINK_PEER
    }

    /// The owner's word on the link.
    pub(super) fn set_link(&self, up: bool) {
        self.change_link(LINK_OWNER, up);
    }

    /// The peer's.
    #[inline]
    pub(super) fn set_peer_link(&self, up: bool) {
        if up != (self.link.load(Ordering::Relaxed) & LINK_PEER != 0) {
            self.change_link(LINK_PEER, up);
        }
    }

    fn change_link(&self, bit: u8, up: bool) {
        let before = if up {
            self.link.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.link.fetch_and(!bit, Ordering::AcqRel)
        };
        if (before == LINK_OWNER | LINK_PEER) != self.link_is_up() {
            self.config_changed();
        }
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.announce.load(Ordering::Acquire)
    }

    /// Asks the driver for gratuitous packets, if it knows how to send them.
    pub(super) fn announce(&self) {
        if self.features().contains(Features::GUEST_ANNOUNCE) {
            self.announce.store(true, Ordering::Release);
            self.config_changed();
        }
    }

    pub(super) fn end_announce(&self) {
        self.announce.store(false, Ordering::Release);
        self.config_changed.store(true, Ordering::Release);
    }

    /// Whether the configuration has changed since the last call.
    pub(super) fn take_config_change(&self) -> bool {
        self.config_changed.swap(false, Ordering::AcqRel)
    }

    /// The configuration has changed: the driver is told.
    fn config_changed(&self) {
        self.config_changed.store(true, Ordering::Release);
        if self.status() & status::DRIVER_OK != 0 {
            self.interrupt(self.vectors.len() - 1, isr::CONFIG);
        }
    }

    // Interrupts

    /// The vector of queue `index`, or behind them that of configuration changes.
    pub(super) fn vector(&self, index: usize) -> &AtomicU16 {
        &self.vectors[index]
    }

    /// The queue has used buffers, and the driver wants to be interrupted.
    #[inline]
    pub(super) fn interrupt_queue(&self, index: u16) {
        self.signals[usize::from(index)].interrupts.fetch_add(1, Ordering::Relaxed);
        self.interrupt(index.into(), isr::QUEUE);
    }

    /// Signals the vector; where there is none the ISR status holds the cause.
    fn interrupt(&self, index: usize, cause: u8) {
        match self.vectors[index].load(Ordering::Acquire) {
            NO_VECTOR => {
                if self.isr.load(Ordering::Relaxed) & cause == 0 {
                    self.isr.fetch_or(cause, Ordering::AcqRel);
                }
            }
            vector => {
                if let Some(interrupts) = self.interrupts.get() {
                    interrupts.trigger(vector.into());
                }
            }
        }
    }

    /// Reading the ISR status clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    // Counts

    /// Only engine `pair` adds to its counts.
    #[inline]
    pub(super) fn add(&self, pair: u16, count: Count, delta: u64) {
        let place = &self.counts[usize::from(pair)][count as usize];
        place.store(place.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
    }

    /// Engine `pair`'s.
    pub(super) fn count_of(&self, pair: u16, count: Count) -> u64 {
        self.counts[usize::from(pair)][count as usize].load(Ordering::Relaxed)
    }

    /// The sum over all engines.
    pub(super) fn count(&self, count: Count) -> u64 {
        self.counts.iter().map(|counts| counts[count as usize].load(Ordering::Relaxed)).sum()
    }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

impl Role {
    /// Whose engine serves it.
    fn pair(self) -> u16 {
        match self {
            Self::Receive(pair) | Self::Transmit(pair) => pair,
            Self::Control => 0,
        }
    }
}

/// What panicked under the lock is gone with its engine; what it guards has no state in between.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
