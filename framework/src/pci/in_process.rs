//! A software device in this process: its registers behind a lock, its engines on threads or stepped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use underpass_iommu::soft::{Bus, SoftDevice};
use underpass_iommu::{Attachable, Error, ErrorKind, Result};

use super::{ConfigSpace, Function, Run};
use crate::bar::Bar;
use crate::interrupt::Interrupts;
use crate::model::{BarKind, BarSpec, Engine, Host, Model, Width};
use crate::worker::{Idle, Work, Worker, WorkerConfig, panic_message};

/// What a model gets of the device around it.
struct ModelHost {
    soft: Arc<SoftDevice>,
    interrupts: Interrupts,
}

impl Host for ModelHost {
    fn bus(&self) -> Bus {
        self.soft.bus()
    }

    fn interrupts(&self) -> Interrupts {
        self.interrupts.clone()
    }

    fn name(&self) -> &str {
        self.soft.name()
    }
}

/// The register side, shared by the device, its configuration space and its BARs.
pub(super) struct InProcess {
    name: String,
    registers: Mutex<Registers>,
    vectors: usize,
    interrupts: Interrupts,
    /// Those without threads, each behind a lock of its own; `None` after it panicked.
    stepped: Vec<Mutex<Option<Box<dyn Engine>>>>,
    /// Whether drivers lend them their own time.
    inline: bool,
    engine_failure: OnceLock<Error>,
}

struct Registers {
    model: Box<dyn Model>,
    config: ConfigSpace,
}

/// The threads of the engines that have some.
#[derive(Debug)]
pub(super) struct Engines(Vec<Worker>);

impl InProcess {
    /// Starts the model, and its engines as `run` says.
    pub(super) fn start(
        mut model: Box<dyn Model>,
        soft: &Arc<SoftDevice>,
        run: Run,
    ) -> Result<(Arc<Self>, Engines)> {
        let mut config = model.config_space();
        config.enable_memory();
        model.config_written(&config);
        let interrupts = Interrupts::default();
        let host = ModelHost { soft: Arc::clone(soft), interrupts: interrupts.clone() };
        let engines = model.start(Arc::new(host));
        let inline = run == Run::Inline;
        let (workers, stepped) = match run {
            Run::Stepped | Run::Inline => (Vec::new(), engines),
            Run::Threads { cores } => (spawn(soft.name(), engines, &cores)?, Vec::new()),
        };
        let function = Self {
            name: soft.name().to_owned(),
            vectors: model.vectors(),
            registers: Mutex::new(Registers { model, config }),
            interrupts,
            stepped: stepped.into_iter().map(|engine| Mutex::new(Some(engine))).collect(),
            inline,
            engine_failure: OnceLock::new(),
        };
        Ok((Arc::new(function), Engines(workers)))
    }

    pub(super) fn vectors(&self) -> usize {
        self.vectors
    }

    pub(super) fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    pub(super) fn engine_failure(&self) -> Option<Error> {
        self.engine_failure.get().cloned()
    }

    pub(super) fn reset(&self) {
        let Registers { model, config } = &mut *self.registers();
        model.reset();
        // What the host keeps over a reset, as the kernel does.
        model.config_written(config);
    }

    /// Steps each engine once, except those that another thread steps at this moment.
    pub(super) fn step(&self) -> bool {
        self.stepped.iter().fold(false, |worked, engine| self.step_one(engine) | worked)
    }

    /// Steps engine `n`, modulo their number, if drivers are to.
    #[inline]
    pub(super) fn lend(&self, n: usize) -> bool {
        let lent = self.inline && !self.stepped.is_empty();
        if lent {
            self.step_one(&self.stepped[n % self.stepped.len()]);
        }
        lent
    }

    fn step_one(&self, engine: &Mutex<Option<Box<dyn Engine>>>) -> bool {
        let mut place = match engine.try_lock() {
            Ok(place) => place,
            // An engine's destructor panicked in another thread.
            Err(TryLockError::Poisoned(place)) => place.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let Some(engine) = &mut *place else { return false };
        catch_unwind(AssertUnwindSafe(|| engine.step())).unwrap_or_else(|payload| {
            let error = self.engine_panicked(&panic_message(&*payload));
            tracing::error!("{error}");
            self.engine_failure.get_or_init(|| error);
            // An engine that panicked is gone, as its thread would be.
            *place = None;
            false
        })
    }

    /// Ends the stepped engines: waits for a step in progress, and there is no other.
    pub(super) fn stop(&self) {
        for engine in &self.stepped {
            drop(engine.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }

    fn engine_panicked(&self, message: &str) -> Error {
        Error::new(ErrorKind::Gone, "run an engine", format!("it panicked: {message}"))
            .device(self.name.clone())
            .mend("drop the device and open it again; the panic is a bug of its model")
    }

    /// A panic in the model went to whoever made that access; the next access still gets an answer.
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for InProcess {
    fn read(&self, bar: usize, offset: u64, width: Width) -> u64 {
        let value = self.registers().model.read(bar, offset, width);
        // After the lock is released: a reader that polls makes progress with engines that have no threads.
        self.step();
        value
    }

    fn write(&self, bar: usize, offset: u64, width: Width, value: u64) {
        self.registers().model.write(bar, offset, width, value);
    }

    fn read_config(&self, offset: u16, width: Width) -> u32 {
        self.registers().config.read(offset, width) as u32
    }

    fn write_config(&self, offset: u16, width: Width, value: u32) {
        let Registers { model, config } = &mut *self.registers();
        config.write(offset, width, value.into());
        model.config_written(config);
    }
}

impl Engines {
    pub(super) fn cores(&self) -> Vec<Option<usize>> {
        self.0.iter().map(Worker::core).collect()
    }

    /// The first panic of one of them. The worker's name says which device it was.
    pub(super) fn failure(&self) -> Option<Error> {
        self.0.iter().find_map(Worker::failure)
    }

    /// Stops all of them before joining any.
    pub(super) fn stop(&mut self) {
        self.0.iter().for_each(Worker::stop);
        self.0.clear();
    }
}

/// A thread for each engine.
fn spawn(device: &str, engines: Vec<Box<dyn Engine>>, cores: &[usize]) -> Result<Vec<Worker>> {
    let start = |(n, mut engine): (usize, Box<dyn Engine>)| {
        let config = WorkerConfig {
            name: format!("{device}/engine{n}"),
            core: (!cores.is_empty()).then(|| cores[n % cores.len()]),
            idle: Idle::Adaptive,
        };
        Worker::spawn(config, move |_| if engine.step() { Work::Busy } else { Work::Idle })
            .map_err(|error| error.device(device.to_owned()))
    };
    engines.into_iter().enumerate().map(start).collect()
}

/// The BAR that `spec` describes.
pub(super) fn bar(function: &Arc<InProcess>, spec: BarSpec) -> Result<Bar> {
    let BarSpec { index, len, kind } = spec;
    let wrong = |why: &'static str| {
        Err(Error::new(ErrorKind::InvalidInput, format!("make BAR {index} of the model"), why)
            .mend("correct the model's bars()"))
    };
    if index > 5 {
        return wrong("a function has BARs 0 to 5");
    }
    if !len.is_power_of_two() || len < 64 {
        return wrong("its length is no power of two from 64 up");
    }
    match kind {
        BarKind::Registers => Ok(Bar::registers(Arc::clone(function) as Arc<dyn Function>, index, len)),
        BarKind::Doorbells { page, targets } => {
            if !page.is_power_of_two() || page < 64 || targets.len() as u64 > len / page {
                return wrong("its doorbell pages are no power of two from 64 up, or do not fit");
            }
            Ok(Bar::doorbells(targets.into(), page, len))
        }
        BarKind::Memory(memory) => memory.window(0, len),
    }
}
