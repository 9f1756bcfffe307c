//! A software device in this process: its registers behind a lock, its engines on threads or stepped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use underpass_iommu::soft::{Bus, SoftDevice, SoftIommu};
use underpass_iommu::{Attachable, AttachableKind, Error, ErrorKind, Fault, IommuBackend, Result};

use super::{ConfigSpace, Function, Registers, Run, too_few_vectors};
use crate::bar::Bar;
use crate::interrupt::{Interrupt, Interrupts};
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
pub(crate) struct InProcess {
    soft: Arc<SoftDevice>,
    iommu: SoftIommu,
    /// The threads of the engines that have some.
    engines: Mutex<Vec<Worker>>,
    state: Mutex<State>,
    vectors: usize,
    interrupts: Interrupts,
    /// Those without threads, each behind a lock of its own; `None` after it panicked.
    stepped: Vec<Mutex<Option<Box<dyn Engine>>>>,
    engine_failure: OnceLock<Error>,
}

struct State {
    model: Box<dyn Model>,
    config: ConfigSpace,
}

impl InProcess {
    /// Starts the model, and its engines as `run` says.
    pub(super) fn start(
        mut model: Box<dyn Model>,
        name: &str,
        iommu: &SoftIommu,
        run: Run,
    ) -> Result<Arc<Self>> {
        let soft = iommu.device(name);
        let mut config = model.config_space();
        config.enable_memory();
        model.config_written(&config);
        let interrupts = Interrupts::default();
        let host = ModelHost { soft: Arc::clone(&soft), interrupts: interrupts.clone() };
        let engines = model.start(Arc::new(host));
        let (workers, stepped) = match run {
            Run::Stepped | Run::Inline => (Vec::new(), engines),
            Run::Threads { cores } => (spawn(soft.name(), engines, &cores)?, Vec::new()),
        };
        Ok(Arc::new(Self {
            engines: Mutex::new(workers),
            iommu: iommu.clone(),
            soft,
            vectors: model.vectors(),
            state: Mutex::new(State { model, config }),
            interrupts,
            stepped: stepped.into_iter().map(|engine| Mutex::new(Some(engine))).collect(),
            engine_failure: OnceLock::new(),
        }))
    }

    /// Steps engine `n`, modulo their number, if there are any.
    #[inline]
    pub(super) fn lend(&self, n: usize) -> bool {
        let lent = !self.stepped.is_empty();
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

    fn workers(&self) -> MutexGuard<'_, Vec<Worker>> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn engine_panicked(&self, message: &str) -> Error {
        Error::new(ErrorKind::Gone, "run an engine", format!("it panicked: {message}"))
            .device(self.soft.name().to_owned())
            .mend("drop the device and open it again; the panic is a bug of its model")
    }

    /// A panic in the model went to whoever made that access; the next access still gets an answer.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers for InProcess {
    fn read(&self, bar: usize, offset: u64, width: Width) -> u64 {
        let value = self.state().model.read(bar, offset, width);
        // After the lock is released: a reader that polls makes progress with engines that have no threads.
        self.step();
        value
    }

    fn write(&self, bar: usize, offset: u64, width: Width, value: u64) {
        self.state().model.write(bar, offset, width, value);
    }

    fn read_config(&self, offset: u16, width: Width) -> u32 {
        self.state().config.read(offset, width) as u32
    }

    fn write_config(&self, offset: u16, width: Width, value: u32) {
        let State { model, config } = &mut *self.state();
        config.write(offset, width, value.into());
        model.config_written(config);
    }
}

impl Function for InProcess {
    fn name(&self) -> &str {
        self.soft.name()
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Soft(&self.soft)
    }

    fn iommu(&self) -> &dyn IommuBackend {
        &self.iommu
    }

    fn interrupts(&self, count: usize) -> Result<Vec<Interrupt>> {
        if count > self.vectors {
            return Err(too_few_vectors(count, self.vectors).device(self.name().to_owned()));
        }
        let interrupts = (0..count).map(|_| Interrupt::new()).collect::<Result<Vec<_>>>()?;
        self.interrupts.set(&interrupts);
        Ok(interrupts)
    }

    fn reset(&self) -> Result<()> {
        let State { model, config } = &mut *self.state();
        model.reset();
        // What the host keeps over a reset, as the kernel does.
        model.config_written(config);
        Ok(())
    }

    /// No engine does DMA when the model is dropped.
    fn stop(&self) {
        let mut workers = self.workers();
        // All of them before joining any.
        workers.iter().for_each(Worker::stop);
        workers.clear();
        for engine in &self.stepped {
            // Waits for a step in progress, and there is no other.
            drop(engine.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }

    fn next_fault(&self) -> Option<Fault> {
        self.soft.faults().pop()
    }

    fn engine_cores(&self) -> Vec<Option<usize>> {
        self.workers().iter().map(Worker::core).collect()
    }

    /// The first panic of one of them. A worker's name says which device it was.
    fn failure(&self) -> Option<Error> {
        let failure = self.workers().iter().find_map(Worker::failure);
        let failure = failure.or_else(|| self.engine_failure.get().cloned());
        failure.map(|error| error.device(self.name().to_owned()))
    }

    /// Steps each engine once, except those that another thread steps at this moment.
    fn step(&self) -> bool {
        self.stepped.iter().fold(false, |worked, engine| self.step_one(engine) | worked)
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
        BarKind::Registers => Ok(Bar::registers(Arc::clone(function) as Arc<dyn Registers>, index, len)),
        BarKind::Doorbells { page, targets } => {
            if !page.is_power_of_two() || page < 64 || targets.len() as u64 > len / page {
                return wrong("its doorbell pages are no power of two from 64 up, or do not fit");
            }
            Ok(Bar::doorbells(targets.into(), page, len))
        }
        BarKind::Memory(memory) => memory.window(0, len),
    }
}
