//! A model with taps: the test reads along, steps the engines, and bends what the driver sees.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use underpass::model::{BarSpec, Bus, Engine, Host, Model, Width};
use underpass::pci::ConfigSpace;
use underpass_drivers::virtio_net::spec::pci::{CAP_ID, cfg_type, common, status};

/// An access of the driver to a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    /// Of the common configuration structure, at this offset.
    Common(u64),
    /// Of the device's own configuration, at this offset.
    Device(u64),
    Other,
}

/// How registers read: from which it is and what the honest model says.
type ReadLie = Box<dyn FnMut(Register, u64) -> u64 + Send>;
/// What becomes of a write; `None` drops it.
type WriteLie = Box<dyn FnMut(Register, u64) -> Option<u64> + Send>;
/// What plays the device.
type Puppet = Box<dyn FnMut(&mut Bus) + Send>;
/// Engines that both the test and the device step.
type Engines = Vec<Arc<Mutex<Box<dyn Engine>>>>;

/// What the driver wrote of a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct QueueSetup {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    pub(crate) enabled: bool,
}

/// What a test holds of a tapped model.
#[derive(Clone, Default)]
pub(crate) struct Taps(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Nobody else gives the engines time.
    stepped: bool,
    engines: Mutex<Engines>,
    /// The honest engines do nothing.
    muted: AtomicBool,
    needs_reset: AtomicBool,
    read: Mutex<Option<ReadLie>>,
    write: Mutex<Option<WriteLie>>,
    puppet: Mutex<Option<Puppet>>,
    puppet_bus: Mutex<Option<Bus>>,
    /// The test's own.
    bus: Mutex<Option<Bus>>,
    queues: Mutex<Vec<QueueSetup>>,
}

impl Taps {
    pub(crate) fn new(stepped: bool) -> Self {
        Self(Arc::new(Shared { stepped, ..Shared::default() }))
    }

    /// Steps the engines where nobody else does.
    pub(crate) fn lend(&self) {
        if self.0.stepped {
            self.step();
        }
    }

    /// Steps each engine once, whoever else may step them; whether there was work.
    pub(crate) fn step(&self) -> bool {
        let engines = self.0.engines.lock().unwrap().clone();
        engines.iter().fold(false, |worked, engine| self.step_one(engine) | worked)
    }

    fn step_one(&self, engine: &Mutex<Box<dyn Engine>>) -> bool {
        if let Some(puppet) = &mut *self.0.puppet.lock().unwrap() {
            puppet(self.0.puppet_bus.lock().unwrap().as_mut().expect("the device was started"));
        }
        // The test and the device may want to step it at the same time.
        !self.0.muted.load(Ordering::Relaxed) && engine.try_lock().is_ok_and(|mut engine| engine.step())
    }

    /// The honest engines rest from now on: the test plays the device.
    pub(crate) fn mute(&self, muted: bool) {
        self.0.muted.store(muted, Ordering::Relaxed);
    }

    /// The device says that it needs a reset, until it gets one.
    pub(crate) fn break_device(&self) {
        self.0.needs_reset.store(true, Ordering::Relaxed);
    }

    pub(crate) fn lie_on_read(&self, lie: impl FnMut(Register, u64) -> u64 + Send + 'static) {
        *self.0.read.lock().unwrap() = Some(Box::new(lie));
    }

    pub(crate) fn lie_on_write(&self, lie: impl FnMut(Register, u64) -> Option<u64> + Send + 'static) {
        *self.0.write.lock().unwrap() = Some(Box::new(lie));
    }

    /// What runs whenever the device's engines do.
    pub(crate) fn play(&self, puppet: impl FnMut(&mut Bus) + Send + 'static) {
        *self.0.puppet.lock().unwrap() = Some(Box::new(puppet));
    }

    /// Neither registers lie nor does a puppet play; the honest engines work.
    pub(crate) fn be_honest(&self) {
        *self.0.read.lock().unwrap() = None;
        *self.0.write.lock().unwrap() = None;
        *self.0.puppet.lock().unwrap() = None;
        self.mute(false);
    }

    pub(crate) fn with_bus<T>(&self, use_it: impl FnOnce(&mut Bus) -> T) -> T {
        use_it(self.0.bus.lock().unwrap().as_mut().expect("the device was started"))
    }

    /// A queue as the driver set it up.
    pub(crate) fn queue(&self, index: u16) -> QueueSetup {
        self.queues().get(usize::from(index)).copied().unwrap_or_default()
    }

    fn queues(&self) -> MutexGuard<'_, Vec<QueueSetup>> {
        self.0.queues.lock().unwrap()
    }
}

impl fmt::Debug for Taps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taps").field("queues", &self.0.queues).finish_non_exhaustive()
    }
}

/// A model behind taps.
pub(crate) struct Tapped {
    model: Box<dyn Model>,
    taps: Taps,
    config: ConfigSpace,
    selected: usize,
    /// Where the common and the device's configuration are: BAR, offset, length.
    common: Option<(usize, u64, u64)>,
    device: Option<(usize, u64, u64)>,
}

impl Tapped {
    pub(crate) fn new(model: Box<dyn Model>, taps: &Taps) -> Self {
        let config = model.config_space();
        Self::with_config(model, taps, config)
    }

    /// With another configuration space than the model's own.
    pub(crate) fn with_config(model: Box<dyn Model>, taps: &Taps, config: ConfigSpace) -> Self {
        let honest = model.config_space();
        let (common, device) = (place(&honest, cfg_type::COMMON), place(&honest, cfg_type::DEVICE));
        Self { model, taps: taps.clone(), config, selected: 0, common, device }
    }

    fn register(&self, bar: usize, offset: u64) -> Register {
        let inside = |place: Option<(usize, u64, u64)>| {
            place.filter(|(in_bar, start, len)| *in_bar == bar && (*start..start + len).contains(&offset))
        };
        if let Some((_, start, _)) = inside(self.common) {
            Register::Common(offset - start)
        } else if let Some((_, start, _)) = inside(self.device) {
            Register::Device(offset - start)
        } else {
            Register::Other
        }
    }

    /// Notes what the driver sets up.
    fn note(&mut self, register: Register, width: Width, value: u64) {
        let Register::Common(offset) = register else { return };
        let mut queues = self.taps.queues();
        match offset {
            common::QUEUE_SELECT => {
                self.selected = value as usize;
                if queues.len() <= self.selected {
                    queues.resize(self.selected + 1, QueueSetup::default());
                }
                return;
            }
            common::DEVICE_STATUS if value == 0 => {
                queues.clear();
                self.taps.0.needs_reset.store(false, Ordering::Relaxed);
                return;
            }
            _ => {}
        }
        let Some(queue) = queues.get_mut(self.selected) else { return };
        let set = |address: &mut u64, from: u64| {
            let (shift, mask) = (8 * (offset - from), u64::MAX >> (64 - 8 * width.bytes()));
            *address = *address & !(mask << shift) | value << shift;
        };
        match offset {
            common::QUEUE_SIZE => queue.size = value as u16,
            common::QUEUE_ENABLE => queue.enabled = value == 1,
            common::QUEUE_DESC..common::QUEUE_DRIVER => set(&mut queue.desc, common::QUEUE_DESC),
            common::QUEUE_DRIVER..common::QUEUE_DEVICE => set(&mut queue.driver, common::QUEUE_DRIVER),
            common::QUEUE_DEVICE..common::QUEUE_NOTIFY_DATA => set(&mut queue.device, common::QUEUE_DEVICE),
            _ => {}
        }
    }
}

/// Where the first virtio structure of this type is.
fn place(config: &ConfigSpace, kind: u8) -> Option<(usize, u64, u64)> {
    let read = |at, width| config.read(at, width);
    let mut at = read(0x34, Width::Bits8) as u16;
    while at != 0 {
        let field = |offset, width| read(at + offset, width);
        if field(0, Width::Bits8) == u64::from(CAP_ID) && field(3, Width::Bits8) == u64::from(kind) {
            let bar = field(4, Width::Bits8) as usize;
            return Some((bar, field(8, Width::Bits32), field(12, Width::Bits32)));
        }
        at = field(1, Width::Bits8) as u16;
    }
    None
}

impl Model for Tapped {
    fn config_space(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.model.bars()
    }

    fn vectors(&self) -> usize {
        self.model.vectors()
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        *self.taps.0.bus.lock().unwrap() = Some(host.bus());
        *self.taps.0.puppet_bus.lock().unwrap() = Some(host.bus());
        let engines: Engines =
            self.model.start(host).into_iter().map(|engine| Arc::new(Mutex::new(engine))).collect();
        self.taps.0.engines.lock().unwrap().clone_from(&engines);
        let handle = |engine| Box::new(Handle { engine, taps: self.taps.clone() }) as Box<dyn Engine>;
        engines.into_iter().map(handle).collect()
    }

    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        let mut value = self.model.read(bar, offset, width);
        let register = self.register(bar, offset);
        if register == Register::Common(common::DEVICE_STATUS)
            && self.taps.0.needs_reset.load(Ordering::Relaxed)
        {
            value |= u64::from(status::DEVICE_NEEDS_RESET);
        }
        match &mut *self.taps.0.read.lock().unwrap() {
            Some(lie) => lie(register, value) & u64::MAX >> (64 - 8 * width.bytes()),
            None => value,
        }
    }

    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        let register = self.register(bar, offset);
        self.note(register, width, value);
        let value = match &mut *self.taps.0.write.lock().unwrap() {
            Some(lie) => lie(register, value),
            None => Some(value),
        };
        if let Some(value) = value {
            self.model.write(bar, offset, width, value);
        }
    }

    fn config_written(&mut self, config: &ConfigSpace) {
        self.model.config_written(config);
    }

    fn reset(&mut self) {
        self.taps.queues().clear();
        self.taps.0.needs_reset.store(false, Ordering::Relaxed);
        self.model.reset();
    }
}

/// What the device has in place of an engine.
struct Handle {
    engine: Arc<Mutex<Box<dyn Engine>>>,
    taps: Taps,
}

impl Engine for Handle {
    fn step(&mut self) -> bool {
        self.taps.step_one(&self.engine)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The device is gone: nobody steps it any more.
        if let Ok(mut engines) = self.taps.0.engines.lock() {
            engines.clear();
        }
    }
}
