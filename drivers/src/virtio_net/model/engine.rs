//! Engines: one a queue pair; the first also has the control queue.

use std::sync::{Arc, Mutex};

use underpass::model::{Bus, Engine, Host};

use super::control;
use super::device::{Device, Role, lock};
use super::offload::Finisher;
use super::peer::{Peer, PeerCounters};
use super::receive::Receiver;
use super::report::Count;
use super::rules::Rules;
use super::transmit::Transmitter;
use super::virtqueue::{Broken, Virtqueue};

/// Frames that one step moves at most, each way.
pub(super) const BURST: usize = 64;
/// Bytes that one step moves at most, each way; the frame that passes it is still moved.
pub(super) const BURST_BYTES: usize = 256 * 1024;

/// The device's engines, one for each of `peers`.
pub(super) fn engines(
    device: &Arc<Device>,
    host: &dyn Host,
    peers: Vec<Box<dyn Peer>>,
) -> Vec<Box<dyn Engine>> {
    let core = |(pair, peer): (usize, Box<dyn Peer>)| {
        Arc::new(Mutex::new(Core::new(Arc::clone(device), pair as u16, host.bus(), peer)))
    };
    let cores: Box<[_]> = peers.into_iter().enumerate().map(core).collect();
    let engine = |core: &Arc<Mutex<Core>>| {
        Box::new(NetEngine { device: Arc::clone(device), core: Arc::clone(core) }) as Box<dyn Engine>
    };
    let engines = cores.iter().map(engine).collect();
    device.start(host, &cores);
    engines
}

struct NetEngine {
    device: Arc<Device>,
    core: Arc<Mutex<Core>>,
}

impl Engine for NetEngine {
    fn step(&mut self) -> bool {
        // Registers and commands go first.
        !self.device.is_waited_for() && lock(&self.core).step()
    }
}

/// The inside of an engine. Whoever holds its lock keeps it from doing DMA.
pub(super) struct Core {
    pub(super) device: Arc<Device>,
    pub(super) pair: u16,
    pub(super) bus: Bus,
    peer: Box<dyn Peer>,
    peer_counters: Arc<PeerCounters>,
    /// Of what the peer could not pass on, how many frames the device has counted.
    undelivered: u64,
    /// The rules, and how often they had changed when they were taken.
    rules: Arc<Rules>,
    rules_changed: u64,
    finisher: Finisher,
    transmitter: Transmitter,
    receiver: Receiver,
    control: Option<Virtqueue>,
}

/// What the two directions of a queue pair work with.
pub(super) struct Context<'a> {
    pub(super) device: &'a Device,
    pub(super) pair: u16,
    pub(super) bus: &'a mut Bus,
    pub(super) rules: &'a Rules,
    pub(super) finisher: &'a mut Finisher,
}

impl Core {
    fn new(device: Arc<Device>, pair: u16, bus: Bus, peer: Box<dyn Peer>) -> Self {
        Self {
            peer_counters: peer.counters(),
            undelivered: 0,
            rules: device.rules(),
            rules_changed: 0,
            device,
            pair,
            bus,
            peer,
            finisher: Finisher::new(),
            transmitter: Transmitter::new(),
            receiver: Receiver::new(),
            control: None,
        }
    }

    /// Forgets its queues and what it was doing.
    pub(super) fn clear(&mut self) {
        for role in [Role::Control, Role::Transmit(self.pair), Role::Receive(self.pair)] {
            self.set_queue(role, None);
        }
        self.device.add(self.pair, Count::RxReset, self.receiver.clear());
        self.count_undelivered();
    }

    pub(super) fn set_queue(&mut self, role: Role, queue: Option<Virtqueue>) {
        match role {
            Role::Receive(pair) => {
                let dropped = self.receiver.set_queue(queue, &self.device.inboxes[usize::from(pair)]);
                self.device.add(pair, Count::RxReset, dropped);
            }
            Role::Transmit(pair) => {
                let dropped = self.transmitter.set_queue(queue);
                self.device.add(pair, Count::TxFrames, dropped);
                self.device.add(pair, Count::TxReset, dropped);
            }
            Role::Control => self.control = queue,
        }
    }

    /// Moves a burst each way. Returns whether there was any work.
    fn step(&mut self) -> bool {
        if !self.device.is_running() {
            return false;
        }
        if self.pair == 0 {
            self.device.set_peer_link(self.peer.link_up());
        }
        self.count_undelivered();
        let mut worked = false;
        if let Some(queue) = &mut self.control {
            match control::serve(&self.device, &mut self.bus, queue) {
                Ok(served) => worked |= served,
                Err(broken) => return self.broke(Role::Control, broken),
            }
        }
        self.update_rules();
        let peer = &mut *self.peer;
        let mut context = Context {
            device: &self.device,
            pair: self.pair,
            bus: &mut self.bus,
            rules: &self.rules,
            finisher: &mut self.finisher,
        };
        match self.transmitter.step(&mut context, peer) {
            Ok(sent) => worked |= sent,
            Err(broken) => return self.broke(Role::Transmit(self.pair), broken),
        }
        match self.receiver.step(&mut context, peer) {
            Ok(received) => worked | received,
            Err(broken) => self.broke(Role::Receive(self.pair), broken),
        }
    }

    /// Counts what the peer could not pass on since the last call.
    #[inline]
    fn count_undelivered(&mut self) {
        let undelivered = self.peer_counters.undelivered.get();
        if undelivered != self.undelivered {
            self.device.add(self.pair, Count::TxUndelivered, undelivered - self.undelivered);
            self.undelivered = undelivered;
        }
    }

    #[inline]
    fn update_rules(&mut self) {
        let changed = self.device.rules_changed();
        if changed != self.rules_changed {
            // Rules that are newer than their count are taken once more.
            (self.rules, self.rules_changed) = (self.device.rules(), changed);
        }
    }

    /// The driver broke a rule on that queue.
    #[cold]
    fn broke(&self, role: Role, broken: Broken) -> bool {
        self.device.violated(Some(self.device.index(role)), broken);
        true
    }
}
