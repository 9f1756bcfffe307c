//! What portals, engines and registers share.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam::utils::CachePadded;
use underpass::interrupt::Interrupts;
use underpass::model::Host;

use super::config_space::Functions;
use super::engine::Core;
use super::queue::WorkQueue;
use super::registers::Control;
use super::spec::{DeviceState, GenCtrl, IntCause, MsixPerm, SwErr, SwErrBatch};
use super::{DsaProfile, VECTORS};

/// No PASID is being aborted.
const NO_PASID: u32 = u32::MAX;

/// The device.
///
/// Locks are taken in this order: `control`, then one of `cores`, then `software_error`. An engine takes `control`
/// only while it holds no core.
pub(super) struct Device {
    pub(super) profile: DsaProfile,
    pub(super) queues: Box<[WorkQueue]>,
    /// What each engine is doing.
    pub(super) activity: Box<[CachePadded<Activity>]>,
    /// The engines' insides, filled by `start`.
    pub(super) cores: OnceLock<Box<[Arc<Mutex<Core>>]>>,
    control: Mutex<Control>,
    /// A command is active: engines look after it.
    pub(super) command_active: AtomicBool,
    /// DMA is allowed, and so on ([`Functions`]), a bit each.
    functions: AtomicU8,
    /// Bit n: descriptors of work queue n are dropped.
    aborting: AtomicU32,
    /// Descriptors of this PASID are dropped.
    aborting_pasid: AtomicU32,
    /// MSIXPERM.
    pub(super) msix_perm: [AtomicU32; VECTORS],
    /// GENCFG: descriptors without privilege may ask for interrupts.
    pub(super) user_interrupts: AtomicBool,
    /// Bit n: handle n was requested.
    pub(super) handles: AtomicU32,
    software_error: Mutex<[u64; 4]>,
    int_cause: AtomicU32,
    gen_ctrl: AtomicU32,
    /// GENSTS's state, for the engines.
    state: AtomicU8,
    interrupts: OnceLock<Interrupts>,
}

impl Device {
    pub(super) fn new(profile: DsaProfile) -> Self {
        Self {
            queues: (0..profile.wqs).map(|_| WorkQueue::new(profile.wq_entries.into())).collect(),
            activity: (0..profile.engines).map(|_| CachePadded::default()).collect(),
            cores: OnceLock::new(),
            control: Mutex::new(Control::new(&profile)),
            command_active: AtomicBool::default(),
            functions: AtomicU8::default(),
            aborting: AtomicU32::default(),
            aborting_pasid: AtomicU32::new(NO_PASID),
            msix_perm: Default::default(),
            user_interrupts: AtomicBool::default(),
            handles: AtomicU32::default(),
            software_error: Mutex::default(),
            int_cause: AtomicU32::default(),
            gen_ctrl: AtomicU32::default(),
            state: AtomicU8::default(),
            interrupts: OnceLock::new(),
            profile,
        }
    }

    pub(super) fn start(&self, host: &dyn Host) {
        // A second start would bring the same vectors.
        let _ = self.interrupts.set(host.interrupts());
    }

    pub(super) fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cores(&self) -> &[Arc<Mutex<Core>>] {
        self.cores.get().map_or(&[], |cores| cores)
    }

    pub(super) fn functions(&self) -> Functions {
        let bits = self.functions.load(Ordering::Acquire);
        Functions { bus_master: bits & 1 != 0, pasid: bits & 2 != 0, privileged: bits & 4 != 0 }
    }

    pub(super) fn set_functions(&self, functions: Functions) {
        let Functions { bus_master, pasid, privileged } = functions;
        let bits = u8::from(bus_master) | u8::from(pasid) << 1 | u8::from(privileged) << 2;
        self.functions.store(bits, Ordering::Release);
    }

    pub(super) fn state(&self) -> DeviceState {
        match self.state.load(Ordering::Acquire) {
            1 => DeviceState::Enabled,
            2 => DeviceState::Draining,
            _ => DeviceState::Disabled,
        }
    }

    pub(super) fn set_state(&self, state: DeviceState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Drops the descriptors of these work queues, and of this PASID, until [`end_abort`](Self::end_abort).
    pub(super) fn begin_abort(&self, queues: u32, pasid: Option<u32>) {
        self.aborting.store(queues, Ordering::Release);
        self.aborting_pasid.store(pasid.unwrap_or(NO_PASID), Ordering::Release);
    }

    pub(super) fn end_abort(&self) {
        self.begin_abort(0, None);
    }

    /// Whether a descriptor of this queue and PASID is to be dropped.
    #[inline]
    pub(super) fn is_aborted(&self, wq: usize, pasid: Option<u32>) -> bool {
        self.aborting.load(Ordering::Relaxed) & 1 << wq != 0
            || pasid.is_some_and(|pasid| self.aborting_pasid.load(Ordering::Relaxed) == pasid)
    }

    /// Whether anything is being aborted.
    pub(super) fn any_abort(&self) -> bool {
        self.aborting.load(Ordering::Relaxed) != 0 || self.aborting_pasid.load(Ordering::Relaxed) != NO_PASID
    }

    /// Stops all work at once, for a function-level reset: when this returns, no engine does DMA any more.
    pub(super) fn quiesce(&self) {
        self.queues.iter().for_each(WorkQueue::close);
        for core in self.cores() {
            // An engine works only while it holds its core.
            core.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        self.queues.iter().for_each(|queue| queue.entries().clear());
    }

    /// Records a software error: the first is kept, later ones only counted.
    pub(super) fn report(&self, report: SwErr, batch: SwErrBatch, address: u64) {
        {
            let mut words = self.software_error.lock().unwrap_or_else(PoisonError::into_inner);
            if SwErr::from_bits(words[0]).valid() {
                words[0] |= SwErr::new().with_overflow(true).into_bits();
            } else {
                *words = [report.with_valid(true).into_bits(), batch.into_bits(), address, 0];
            }
        }
        let interrupt = GenCtrl::from_bits(self.gen_ctrl.load(Ordering::Relaxed)).software_error_interrupt();
        self.cause(IntCause::new().with_software_error(true), interrupt);
    }

    pub(super) fn software_error(&self) -> [u64; 4] {
        *self.software_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SWERR's first word is written: `valid` gives up the error, `overflow` only its bit.
    pub(super) fn acknowledge_error(&self, written: SwErr) {
        let mut words = self.software_error.lock().unwrap_or_else(PoisonError::into_inner);
        if written.overflow() {
            words[0] &= !SwErr::new().with_overflow(true).into_bits();
        }
        if written.valid() {
            *words = [words[0] & SwErr::new().with_overflow(true).into_bits(), 0, 0, 0];
        }
    }

    /// Sets a cause in INTCAUSE and signals vector 0, if asked to.
    pub(super) fn cause(&self, cause: IntCause, interrupt: bool) {
        self.int_cause.fetch_or(cause.into_bits(), Ordering::AcqRel);
        if interrupt {
            self.interrupt(0);
        }
    }

    pub(super) fn int_cause(&self) -> u32 {
        self.int_cause.load(Ordering::Acquire)
    }

    pub(super) fn clear_causes(&self, causes: u32) {
        self.int_cause.fetch_and(!causes, Ordering::AcqRel);
    }

    pub(super) fn gen_ctrl(&self) -> u32 {
        self.gen_ctrl.load(Ordering::Relaxed)
    }

    pub(super) fn set_gen_ctrl(&self, value: u32) {
        self.gen_ctrl.store(value, Ordering::Relaxed);
    }

    /// Signals a vector.
    pub(super) fn interrupt(&self, vector: usize) {
        if let Some(interrupts) = self.interrupts.get() {
            interrupts.trigger(vector);
        }
    }

    /// Whether a descriptor with this PASID may signal `handle`.
    pub(super) fn may_interrupt(&self, handle: u16, pasid: Option<u32>) -> bool {
        let Some(perm) = self.msix_perm.get(usize::from(handle)) else { return false };
        let perm = MsixPerm::from_bits(perm.load(Ordering::Relaxed));
        let requested =
            !self.profile.interrupt_handles || self.handles.load(Ordering::Relaxed) & 1 << handle != 0;
        requested && perm.pasid_enable().then(|| perm.pasid()) == pasid
    }
}

/// What an engine is doing, for those who wait for it.
///
/// Bits 1:0 are 0 when it is idle, 1 while it works on a descriptor and 2 while it holds a drain descriptor; the
/// others count descriptors. So whoever finds the word changed knows that the descriptor of then is done.
#[derive(Debug, Default)]
pub(super) struct Activity(AtomicU64);

impl Activity {
    const WORKING: u64 = 1;
    const DRAINING: u64 = 2;
    const STATE: u64 = 3;

    /// The engine looks for a descriptor, or has one. Before it takes any: see [`WorkQueue::entries`].
    #[inline]
    pub(super) fn work(&self) {
        self.set(Self::WORKING);
    }

    /// The descriptor that it holds is a drain.
    pub(super) fn drain(&self) {
        self.set(Self::DRAINING);
    }

    /// The descriptor is done; the engine goes on to the next.
    #[inline]
    pub(super) fn done(&self) {
        let now = self.0.load(Ordering::Relaxed) & !Self::STATE;
        self.0.store(now.wrapping_add(4) | Self::WORKING, Ordering::Release);
    }

    /// The engine has no descriptor.
    #[inline]
    pub(super) fn idle(&self) {
        self.set(0);
    }

    /// Only the engine itself writes. Release: whoever sees a descriptor done also sees what it did.
    #[inline]
    fn set(&self, state: u64) {
        let now = self.0.load(Ordering::Relaxed) & !Self::STATE;
        self.0.store(now | state, Ordering::Release);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::Acquire))
    }

    /// Whether the descriptor of then, if there was one, is done.
    pub(super) fn is_past(&self, then: Snapshot) -> bool {
        then.0 & Self::STATE == 0 || self.snapshot().descriptor() != then.descriptor() || self.is_idle()
    }

    /// As [`is_past`](Self::is_past), but does not wait for an engine that holds a drain: two drains must not wait
    /// for each other.
    pub(super) fn is_past_or_drains(&self, then: Snapshot) -> bool {
        self.is_past(then) || self.snapshot().0 & Self::STATE == Self::DRAINING
    }

    fn is_idle(&self) -> bool {
        self.snapshot().0 & Self::STATE == 0
    }
}

/// An engine's [`Activity`] at one time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Snapshot(u64);

impl Snapshot {
    fn descriptor(self) -> u64 {
        self.0 & !Activity::STATE
    }
}
