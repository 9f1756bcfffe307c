//! The driver: brings the device up and gives out its work queues. A job's way is `queue` (submit and poll), with
//! `job` for its descriptor and its outcome; `registers` is the control plane.

mod job;
mod queue;
mod registers;

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use underpass::accel::{Accelerator, Channel, Config, Limits, State};
use underpass::dma::DmaSpace;
use underpass::iommu::{Attachment, OwnedPasid};
use underpass::pci::PciDevice;
use underpass::{Error, ErrorKind, Fault, Pasid, Result};

use self::queue::{Place, WorkQueue};
use self::registers::{Registers, WqConfig};
use crate::dsa::spec::{DeviceState, Opcode, PORTAL_BAR, PORTAL_PAGE, Portal};

/// A job that takes longer stalls its channel, where the application does not say.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(2);

/// Submissions that a channel holds where the application does not say, if the device has as many.
const DEFAULT_DEPTH: usize = 128;

/// How the device's work queues are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WqMode {
    /// One client, the driver, keeps count of what is in the queue and posts descriptors (MOVDIR64B).
    #[default]
    Dedicated,
    /// The queue may have other clients: it answers each descriptor with accepted or retry (ENQCMD), and each
    /// descriptor carries its PASID. Not on real hardware from user space: the PASID there comes from a register
    /// that only a kernel driver can load.
    Shared,
}

/// An Intel DSA, over any [`PciDevice`] that is one.
#[derive(Debug)]
pub struct Dsa {
    core: Arc<Core>,
    limits: Limits,
    mode: WqMode,
    taken: bool,
    engine_failure_reported: bool,
}

impl Dsa {
    /// Checks what the device is, and resets it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is not a DSA that this driver knows; [`ErrorKind::Device`] for a register
    /// that makes no sense; [`ErrorKind::Timeout`] if it does not answer to a reset.
    pub fn open(device: PciDevice) -> Result<Self> {
        let name = device.name().to_owned();
        let open = || {
            let mut registers = Registers::discover(&device)?;
            device.set_bus_master(true)?;
            registers.reset()?;
            Ok(registers)
        };
        let registers = open().map_err(|error: Error| error.device(name))?;
        let capabilities = registers.capabilities();
        let ops = job::supported(capabilities.operations, capabilities.general);
        let batches = capabilities.operations[0] & Opcode::Batch.bit() != 0;
        let limits = Limits {
            ops,
            max_bytes: capabilities.max_transfer(),
            max_batch: if batches { capabilities.max_batch() } else { 1 },
            depth: usize::from(capabilities.wq.total_size()),
        };
        let core = Arc::new(Core {
            control: Mutex::new(Control { registers, wqs: Vec::new() }),
            states: OnceLock::new(),
            device,
        });
        Ok(Self { core, limits, mode: WqMode::default(), taken: false, engine_failure_reported: false })
    }

    /// The same device, with its work queues used in this mode.
    #[must_use]
    pub fn with_mode(mut self, mode: WqMode) -> Self {
        self.mode = mode;
        self
    }

    /// The PCI device beneath.
    pub fn device(&self) -> &PciDevice {
        &self.core.device
    }

    /// Checks what was asked for against what there is, and fills in what was left open.
    fn plan(&self, config: &Config) -> Result<Plan> {
        let channels = config.channels.max(1);
        let most = |what: &str, asked: usize, most: usize| {
            if asked <= most {
                return Ok(());
            }
            Err(Error::new(
                ErrorKind::InvalidInput,
                "set up its channels",
                format!("{asked} {what} are asked for, and it has {most}"),
            )
            .mend(format!("ask for at most {most}")))
        };
        most("channels", channels, self.max_channels())?;
        let entries = self.limits.depth / channels;
        most("submissions outstanding at a time in a channel", config.depth, entries)?;
        let batch = config.batch.max(1);
        most("jobs in a batch", batch, self.limits.max_batch)?;

        let core = self.core.control();
        let wq = core.registers.capabilities().wq;
        let (there, what, other) = match self.mode {
            WqMode::Dedicated => (wq.dedicated(), "dedicated", "shared"),
            WqMode::Shared => (wq.shared(), "shared", "dedicated"),
        };
        if !there {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "set up its channels",
                format!("WQCAP is {:#x}: it has no {what} work queues", wq.into_bits()),
            )
            .mend(format!("use {other} work queues")));
        }
        Ok(Plan {
            channels,
            entries: entries as u16,
            limits: Limits {
                max_batch: batch,
                depth: if config.depth == 0 { entries.min(DEFAULT_DEPTH) } else { config.depth },
                ..self.limits
            },
            engines: core.registers.capabilities().engines,
            cache_control: core.registers.capabilities().general.cache_control_memory(),
        })
    }

    fn set_up(&self, config: &Config) -> Result<Vec<Box<dyn Channel>>> {
        let plan = self.plan(config)?;
        let core = &self.core;
        let device = &core.device;
        let spaces = self.attach(config, plan.channels)?;
        let interrupts = if config.interrupts {
            // Vector 0 is for the device's own causes, which this driver asks for instead.
            device.interrupts(1 + plan.channels)?.into_iter().skip(1).map(Some).collect()
        } else {
            std::iter::repeat_with(|| None).take(plan.channels).collect::<Vec<_>>()
        };
        let portals = device.bar(PORTAL_BAR)?;
        let dedicated = self.mode == WqMode::Dedicated;
        let states: Arc<[AtomicU8]> = (0..plan.channels).map(|_| AtomicU8::default()).collect();
        let _ = core.states.set(Arc::clone(&states));

        let mut queues = Vec::with_capacity(plan.channels);
        for (index, (space, interrupt)) in spaces.into_iter().zip(interrupts).enumerate() {
            let page = if dedicated { Portal::UnlimitedMsix } else { Portal::LimitedMsix };
            let portal = portals.window(page.offset(index as u64), PORTAL_PAGE)?;
            if dedicated {
                portal.can_post64()?;
            } else {
                // The queue is off: it answers "retry", and where there is no way to submit, that shows now.
                portal.enqueue64(0, &[0; 64])?;
            }
            let mut control = core.control();
            let vector = interrupt.as_ref().map(|_| index as u16 + 1);
            control.wqs.push(Some(WqConfig {
                entries: plan.entries,
                dedicated,
                pasid: space.pasid.as_ref().map(OwnedPasid::get),
                max_batch_shift: plan.limits.max_batch.next_power_of_two().ilog2(),
                vector,
            }));
            let interrupt_handle = match vector {
                Some(vector) => control.registers.interrupt_handle(vector)?,
                None => 0,
            };
            drop(control);
            queues.push(WorkQueue::new(
                Place {
                    core: Arc::clone(core),
                    index,
                    states: Arc::clone(&states),
                    portal,
                    dedicated,
                    interrupt,
                    interrupt_handle,
                    engines: plan.engines,
                    cache_control: plan.cache_control,
                    deadline: config.deadline.unwrap_or(DEFAULT_DEADLINE),
                },
                space,
                plan.limits,
            )?);
        }
        let mut control = core.control();
        let Control { registers, wqs } = &mut *control;
        registers.start(wqs)?;
        drop(control);
        Ok(queues.into_iter().map(|queue| Box::new(queue) as Box<dyn Channel>).collect())
    }

    /// An address space for each channel: a PASID's where the device and the IOMMU have them, else all share the
    /// device's own.
    fn attach(&self, config: &Config, channels: usize) -> Result<Vec<Space>> {
        let device = &self.core.device;
        let iommu = device.iommu();
        // Attached also where nothing is mapped in it: accesses without a PASID then have nowhere to go.
        let own = iommu.alloc_ioas()?;
        let attachment = Arc::new(own.attach(device, None)?);
        let pasids = attachment.capabilities().max_pasids;
        if pasids == 0 {
            let needs = match (config.sva.is_some(), self.mode) {
                (true, _) => "shared virtual addressing needs",
                (_, WqMode::Shared) => "shared work queues need",
                (false, WqMode::Dedicated) => {
                    let space = || Space {
                        attachments: vec![Arc::clone(&attachment)],
                        pasid: None,
                        dma: DmaSpace::new(own.clone()),
                    };
                    return Ok(std::iter::repeat_with(space).take(channels).collect());
                }
            };
            return Err(Error::new(
                ErrorKind::Unsupported,
                "set up its channels",
                format!("the device or its IOMMU has no PASIDs, which {needs}"),
            )
            .mend("use dedicated work queues without shared virtual addressing"));
        }
        let space = |_| {
            let pasid = Pasid::allocate_up_to(pasids)?;
            let (of_pasid, dma) = if let Some(token) = config.sva.clone() {
                (iommu.attach_sva(device, pasid.get(), token)?, DmaSpace::shared_virtual())
            } else {
                let ioas = iommu.alloc_ioas()?;
                (ioas.attach(device, Some(pasid.get()))?, DmaSpace::new(ioas))
            };
            let attachments = vec![Arc::new(of_pasid), Arc::clone(&attachment)];
            Ok(Space { attachments, pasid: Some(pasid), dma })
        };
        (0..channels).map(space).collect()
    }
}

/// What [`Dsa::channels`] sets up.
struct Plan {
    channels: usize,
    entries: u16,
    limits: Limits,
    engines: usize,
    cache_control: bool,
}

/// What one channel can address, in the order in which it is given up: detach, free the PASID, unmap.
#[derive(Debug)]
struct Space {
    attachments: Vec<Arc<Attachment>>,
    pasid: Option<OwnedPasid>,
    dma: DmaSpace,
}

impl Accelerator for Dsa {
    fn name(&self) -> &str {
        self.core.device.name()
    }

    fn driver(&self) -> &'static str {
        "dsa"
    }

    fn max_channels(&self) -> usize {
        let wqs = self.core.control().registers.capabilities().wq.wqs();
        usize::from(wqs).min(self.limits.depth)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn channels(&mut self, config: &Config) -> Result<Vec<Box<dyn Channel>>> {
        let named = |error: Error| error.device(self.core.device.name().to_owned());
        if self.taken {
            let error = Error::new(ErrorKind::Busy, "set up its channels", "they were taken before");
            return Err(named(error.mend("take all channels at once, or open the device again")));
        }
        self.plan(config).map_err(named)?;
        self.taken = true;
        self.set_up(config).map_err(|error| {
            // The queues made so far are gone, and each made sure that the device is quiet.
            let _ = self.core.control().registers.reset();
            named(error)
        })
    }

    fn next_error(&mut self) -> Option<Error> {
        let error = self.core.next_error().or_else(|| {
            let failure = self.core.device.failure()?;
            (!std::mem::replace(&mut self.engine_failure_reported, true)).then_some(failure)
        })?;
        Some(error.device(self.core.device.name().to_owned()))
    }

    fn next_fault(&mut self) -> Option<Fault> {
        self.core.device.next_fault()
    }
}

/// The device as its channels share it. It lives as long as one of them, or the [`Dsa`], does.
struct Core {
    control: Mutex<Control>,
    /// The state of each channel, a [`State`] as a number.
    states: OnceLock<Arc<[AtomicU8]>>,
    device: PciDevice,
}

struct Control {
    registers: Registers,
    /// The queues that are in use.
    wqs: Vec<Option<WqConfig>>,
}

/// The number of a state, for [`Core::states`].
const fn number(state: State) -> u8 {
    match state {
        State::Running => 0,
        State::Stalled => 1,
        State::Gone => 2,
    }
}

impl Core {
    fn control(&self) -> MutexGuard<'_, Control> {
        // What a panic could leave half done is in the device, and the next reset clears it.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_error(&self) -> Option<Error> {
        let error = self.control().registers.next_error()?;
        self.stall(|index| error.stalls.contains(&index));
        Some(error.error)
    }

    /// Marks running channels as stalled.
    fn stall(&self, which: impl Fn(usize) -> bool) {
        for (index, state) in self.states.get().iter().flat_map(|states| states.iter()).enumerate() {
            if which(index) {
                let (running, stalled) = (number(State::Running), number(State::Stalled));
                // Relaxed: the state guards no memory.
                let _ = state.compare_exchange(running, stalled, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }

    /// When this returns without an error, queue `index` does no more DMA for what was submitted before.
    fn quiesce(&self, index: usize) -> Result<()> {
        let mut control = self.control();
        if control.registers.state() == DeviceState::Halted {
            // Only a reset of the whole device helps. It takes the other channels' jobs with it.
            self.stall(|other| other != index);
            return control.registers.reset();
        }
        control.registers.quiesce_wq(index)
    }

    /// Lets queue `index` work again after [`quiesce`](Self::quiesce). Returns its interrupt handle: one that was asked
    /// for before a reset of the device is no longer valid.
    fn resume(&self, index: usize) -> Result<u16> {
        let Control { registers, wqs } = &mut *self.control();
        if registers.state() == DeviceState::Disabled {
            registers.start(wqs)?;
        }
        let Some(Some(wq)) = wqs.get(index) else { return Ok(0) };
        registers.resume_wq(index, wq)?;
        wq.vector.map_or(Ok(0), |vector| registers.interrupt_handle(vector))
    }

    /// Stops queue `index` for good.
    fn retire(&self, index: usize) -> Result<()> {
        self.quiesce(index)?;
        let mut control = self.control();
        if let Some(wq) = control.wqs.get_mut(index) {
            *wq = None;
        }
        control.registers.disable_wq(index)
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        let name = self.device.name();
        if let Err(error) = self.control().registers.reset() {
            tracing::error!("{}", error.device(name.to_owned()));
        }
        if let Err(error) = self.device.set_bus_master(false) {
            tracing::error!("{}", error.device(name.to_owned()));
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device.fmt(f)
    }
}
