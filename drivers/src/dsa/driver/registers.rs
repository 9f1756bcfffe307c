//! The control plane: what the device says that it is, and the commands that it takes. Slow, behind a lock, and
//! distrustful: every value that places or sizes something is checked before it is used.

use std::hint;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use underpass::bar::Bar;
use underpass::pci::PciDevice;
use underpass::{Error, ErrorKind, Pasid, Result};

use crate::dsa::spec::{
    Cmd, CmdSts, Command, CommandError, DEVICE_IDS, DeviceState, EngCap, GRPCFG_ENGINES, GRPCFG_FLAGS,
    GRPCFG_STRIDE, GRPCFG_WQS, GenCap, GenCfg, GenSts, GrpCap, GrpFlags, MSIXPERM_STRIDE, MsixPerm, Offsets,
    PORTAL_BAR, PORTAL_STRIDE, REGISTER_BAR, Status, SubmissionError, SwErr, SwErrBatch, TABLE_UNIT,
    VENDOR_ID, WqCap, WqLimits, WqMode, WqSize, WqState, WqStatus, WqThreshold, reg, wq_operand, wqcfg,
};

/// A command that takes longer than this has failed. Real parts take milliseconds, a drain as long as its jobs.
const COMMAND_DEADLINE: Duration = Duration::from_secs(2);

/// Where the registers end that have a fixed place.
const FIXED_REGISTERS: u64 = 0x100;

/// The traffic class that the known parts need in both fields of a group.
const TRAFFIC_CLASS: u8 = 1;

/// What the device can do, checked.
#[derive(Debug, Clone)]
pub(super) struct Capabilities {
    pub general: GenCap,
    pub wq: WqCap,
    pub group: GrpCap,
    pub engines: usize,
    pub operations: [u64; 4],
    /// Interrupt handles are asked for by a command; without it they are the vectors' numbers.
    handles_by_command: bool,
}

/// One work queue's configuration.
#[derive(Debug, Clone)]
pub(super) struct WqConfig {
    pub entries: u16,
    pub dedicated: bool,
    pub pasid: Option<Pasid>,
    pub max_batch_shift: u32,
    /// The MSI-X vector that its descriptors may signal.
    pub vector: Option<u16>,
}

/// Why a command did not do its work.
pub(super) enum CommandFailure {
    /// The device refused it.
    Refused { command: Command, status: CmdSts },
    /// CMDSTS still says that it is active.
    Late { command: Command, status: CmdSts },
}

impl CommandFailure {
    /// The device refused it for one of these reasons.
    pub(super) fn is(&self, reasons: &[CommandError]) -> bool {
        matches!(self, Self::Refused { status, .. } if reasons.contains(&CommandError(status.error())))
    }
}

impl From<CommandFailure> for Error {
    fn from(failure: CommandFailure) -> Self {
        match failure {
            CommandFailure::Refused { command, status } => Self::new(
                ErrorKind::Device,
                format!("do command {command:?}"),
                format!("CMDSTS is {:#010x}: {}", status.into_bits(), CommandError(status.error()).text()),
            )
            .mend("open the device again, which resets it; if it refuses that, too, take another"),
            CommandFailure::Late { command, status } => Self::new(
                ErrorKind::Timeout,
                format!("do command {command:?}"),
                format!("CMDSTS is still {:#010x} after {COMMAND_DEADLINE:?}", status.into_bits()),
            )
            .mend("the device does not answer; reset it or take another"),
        }
    }
}

/// The registers and tables in BAR 0.
#[derive(Debug)]
pub(super) struct Registers {
    bar: Bar,
    grpcfg: Bar,
    wqcfg: Bar,
    wqcfg_stride: u64,
    msix_perm: Bar,
    capabilities: Capabilities,
    /// Interrupt handles that were asked for since the last reset, by vector.
    handles: Vec<(u16, u16)>,
    /// A software error that did not go away when it was acknowledged: nothing is reported until it does.
    stuck_error: Option<[u64; 3]>,
    halt_reported: bool,
}

/// The PCI ids of the devices that this driver knows, for people.
fn known_ids() -> String {
    DEVICE_IDS.map(|id| format!("{VENDOR_ID:04x}:{id:04x}")).join(", ")
}

/// The device's register makes no sense.
fn nonsense(register: &str, value: u64, why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Device, "use its registers", format!("{register} is {value:#x}: {why}"))
        .mend("the device is broken or not a DSA; take another")
}

/// The part of BAR 0 that the device says a table is in.
fn table(bar: &Bar, name: &str, unit: u16, len: u64) -> Result<Bar> {
    let offset = u64::from(unit) * TABLE_UNIT;
    if offset < FIXED_REGISTERS || offset + len > bar.len() {
        let why =
            format!("{name} of {len:#x} bytes at {offset:#x} is not inside BAR 0 of {:#x} bytes", bar.len());
        return Err(nonsense("OFFSETS", u64::from(unit), why));
    }
    bar.window(offset, len)
}

impl Registers {
    /// Reads what the device is.
    pub(super) fn discover(device: &PciDevice) -> Result<Self> {
        let (vendor, id) = (device.config().vendor_id(), device.config().device_id());
        if vendor != VENDOR_ID || !DEVICE_IDS.contains(&id) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "drive it as a DSA",
                format!("its PCI ids are {vendor:04x}:{id:04x}"),
            )
            .mend(format!("take one of these: {}", known_ids())));
        }
        let bar = device.bar(REGISTER_BAR)?;
        if bar.len() < FIXED_REGISTERS {
            return Err(nonsense("the length of BAR 0", bar.len(), "the registers do not fit"));
        }
        let capabilities = Capabilities::read(&bar)?;
        let offsets = Offsets::from_bits(bar.read64(reg::OFFSETS));
        let wqcfg_stride = capabilities.wq.wqcfg_stride();
        let vectors = u64::from(capabilities.wq.wqs()) + 1;
        let this = Self {
            grpcfg: table(
                &bar,
                "GRPCFG",
                offsets.grpcfg(),
                u64::from(capabilities.group.groups()) * GRPCFG_STRIDE,
            )?,
            wqcfg: table(&bar, "WQCFG", offsets.wqcfg(), u64::from(capabilities.wq.wqs()) * wqcfg_stride)?,
            wqcfg_stride,
            msix_perm: table(&bar, "MSIXPERM", offsets.msix_perm(), vectors * MSIXPERM_STRIDE)?,
            bar,
            capabilities,
            handles: Vec::new(),
            stuck_error: None,
            halt_reported: false,
        };
        let portals = device.bar(PORTAL_BAR)?.len();
        let wqs = this.capabilities.wq.wqs();
        if portals < u64::from(wqs) * PORTAL_STRIDE {
            let why = format!("the portals of {wqs} work queues do not fit");
            return Err(nonsense("the length of BAR 2", portals, why));
        }
        Ok(this)
    }

    pub(super) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Runs a command to its end.
    pub(super) fn command(&mut self, command: Command, operand: u32) -> Result<CmdSts, CommandFailure> {
        self.wait_idle(command)?;
        let word = Cmd::new().with_code(command as u8).with_operand(operand);
        self.bar.write32(reg::CMD, word.into_bits());
        let status = self.wait_idle(command)?;
        if status.error() != CommandError::NONE.0 {
            return Err(CommandFailure::Refused { command, status });
        }
        Ok(status)
    }

    /// Waits until no command is active.
    fn wait_idle(&self, command: Command) -> Result<CmdSts, CommandFailure> {
        let begun = Instant::now();
        for turn in 0_u32.. {
            let status = CmdSts::from_bits(self.bar.read32(reg::CMDSTS));
            if !status.active() {
                return Ok(status);
            }
            if begun.elapsed() >= COMMAND_DEADLINE {
                return Err(CommandFailure::Late { command, status });
            }
            if turn < 100 {
                hint::spin_loop();
            } else {
                thread::sleep(Duration::from_micros(20));
            }
        }
        unreachable!("the deadline comes before 2^32 turns of 20 us")
    }

    /// Stops the device and clears its configuration.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.command(Command::ResetDevice, 0)?;
        self.handles.clear();
        self.halt_reported = false;
        self.stuck_error = None;
        Ok(())
    }

    /// Configures a device that was just reset, queue n from `wqs[n]` (`None` leaves it off), and starts it.
    pub(super) fn start(&mut self, wqs: &[Option<WqConfig>]) -> Result<()> {
        let used = || wqs.iter().enumerate().filter_map(|(index, wq)| Some((index, wq.as_ref()?)));
        let mut mask = [0; 4];
        for (index, wq) in used() {
            mask[index / 64] |= 1 << (index % 64);
            self.write_wq(index, wq);
        }
        self.write_groups(mask);
        let user_interrupts = used().any(|(_, wq)| wq.vector.is_some());
        self.bar.write32(reg::GENCFG, GenCfg::new().with_user_interrupts(user_interrupts).into_bits());
        self.command(Command::EnableDevice, 0)?;
        used().try_for_each(|(index, _)| self.enable_wq(index))
    }

    /// Puts these queues and all engines into group 0, and nothing into the others.
    fn write_groups(&self, wqs: [u64; 4]) {
        for offset in (0..self.grpcfg.len()).step_by(8) {
            self.grpcfg.write64(offset, 0);
        }
        for (word, mask) in (0..).zip(wqs) {
            self.grpcfg.write64(GRPCFG_WQS + word * 8, mask);
        }
        self.grpcfg.write64(GRPCFG_ENGINES, low_bits(self.capabilities.engines));
        let mut flags = GrpFlags::new().with_tc_a(TRAFFIC_CLASS).with_tc_b(TRAFFIC_CLASS);
        if self.capabilities.group.read_buffer_control() {
            flags.set_read_buffers_allowed(self.capabilities.group.read_buffers());
        }
        self.grpcfg.write64(GRPCFG_FLAGS, flags.into_bits());
    }

    fn write_wq(&self, index: usize, wq: &WqConfig) {
        let base = index as u64 * self.wqcfg_stride;
        let mode = WqMode::new()
            .with_dedicated(wq.dedicated)
            .with_priority(1)
            .with_pasid(wq.pasid.map_or(0, Pasid::get))
            .with_pasid_enable(wq.pasid.is_some());
        let limits = WqLimits::new()
            .with_max_transfer_shift(self.capabilities.general.max_transfer_shift())
            .with_max_batch_shift(wq.max_batch_shift);
        let threshold = if wq.dedicated { 0 } else { wq.entries };
        for (word, value) in [
            (wqcfg::SIZE, WqSize::new().with_size(wq.entries).into_bits()),
            (wqcfg::THRESHOLD, WqThreshold::new().with_threshold(threshold).into_bits()),
            (wqcfg::MODE, mode.into_bits()),
            (wqcfg::LIMITS, limits.into_bits()),
        ] {
            self.wqcfg.write32(base + word, value);
        }
        if self.capabilities.wq.op_config() && self.wqcfg_stride >= 64 {
            for (word, operations) in (0..).zip(self.capabilities.operations) {
                self.wqcfg.write64(base + wqcfg::OP_CONFIG + word * 8, operations);
            }
        }
        if let Some(vector) = wq.vector {
            let permission = MsixPerm::new()
                .with_pasid_enable(wq.pasid.is_some())
                .with_pasid(wq.pasid.map_or(0, Pasid::get));
            self.msix_perm.write32(u64::from(vector) * MSIXPERM_STRIDE, permission.into_bits());
        }
    }

    fn enable_wq(&mut self, index: usize) -> Result<()> {
        self.command(Command::EnableWq, index as u32)?;
        let status = self.wq_status(index);
        if status.state() != WqState::Enabled {
            let why = "the work queue is not enabled, though the command to enable it succeeded";
            return Err(nonsense(
                &format!("WQCFG {index}, its status word,"),
                status.into_bits().into(),
                why,
            ));
        }
        Ok(())
    }

    fn wq_status(&self, index: usize) -> WqStatus {
        let base = index as u64 * self.wqcfg_stride;
        WqStatus::from_bits(self.wqcfg.read32(base + wqcfg::STATUS))
    }

    /// The handle by which a descriptor names this MSI-X vector, until the next reset.
    pub(super) fn interrupt_handle(&mut self, vector: u16) -> Result<u16> {
        if !self.capabilities.handles_by_command {
            return Ok(vector);
        }
        if let Some((_, handle)) = self.handles.iter().find(|(of, _)| *of == vector) {
            return Ok(*handle);
        }
        let handle = self.command(Command::RequestInterruptHandle, u32::from(vector))?.result();
        self.handles.push((vector, handle));
        Ok(handle)
    }

    /// Makes the queue drop what it has not begun and waits for the rest. When this returns without an error,
    /// the queue does no more DMA for anything submitted before.
    pub(super) fn quiesce_wq(&mut self, index: usize) -> Result<()> {
        self.off_is_fine(Command::AbortWq, index)
    }

    /// Switches a quiet queue off.
    pub(super) fn disable_wq(&mut self, index: usize) -> Result<()> {
        self.off_is_fine(Command::DisableWq, index)
    }

    /// A command that is done already where the queue is off.
    fn off_is_fine(&mut self, command: Command, index: usize) -> Result<()> {
        match self.command(command, wq_operand(index as u32)) {
            Ok(_) => Ok(()),
            Err(failure)
                if failure.is(&[
                    CommandError::WQ_NOT_ENABLED,
                    CommandError::DEVICE_DISABLED,
                    CommandError::DEVICE_NOT_ENABLED,
                ]) =>
            {
                Ok(())
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// Makes a quiet queue take descriptors again.
    pub(super) fn resume_wq(&mut self, index: usize, wq: &WqConfig) -> Result<()> {
        if self.wq_status(index).state() != WqState::Enabled {
            self.write_wq(index, wq);
            self.enable_wq(index)?;
        }
        Ok(())
    }

    pub(super) fn state(&self) -> DeviceState {
        GenSts::from_bits(self.bar.read32(reg::GENSTS)).state()
    }

    /// The next error that the device reports by itself.
    pub(super) fn next_error(&mut self) -> Option<DeviceError> {
        self.software_error().or_else(|| self.halt())
    }

    fn software_error(&mut self) -> Option<DeviceError> {
        let words = [0, 8, 16].map(|word| self.bar.read64(reg::SWERR + word));
        let error = SwErr::from_bits(words[0]);
        if !error.valid() {
            self.stuck_error = None;
            return None;
        }
        // Written back: the two flags that are cleared by ones.
        let flags = SwErr::new().with_valid(true).with_overflow(error.overflow());
        self.bar.write64(reg::SWERR, flags.into_bits());
        let is_stuck = SwErr::from_bits(self.bar.read64(reg::SWERR)).valid();
        let before = std::mem::replace(&mut self.stuck_error, is_stuck.then_some(words));
        // What is there after an acknowledge is the same error, or one that came right then. If it can be acknowledged
        // now, the words tell which; if not, there would be no end to what a broken register reports.
        if before.is_some_and(|before| is_stuck || before == words) {
            return None;
        }
        Some(DeviceError {
            error: Error::new(ErrorKind::Device, "go on after a software error", describe(words))
                .mend("reset the channel; its jobs come back"),
            stalls: if error.wq_valid() {
                usize::from(error.wq())..usize::from(error.wq()) + 1
            } else {
                0..0
            },
        })
    }

    fn halt(&mut self) -> Option<DeviceError> {
        let status = GenSts::from_bits(self.bar.read32(reg::GENSTS));
        if status.state() != DeviceState::Halted || std::mem::replace(&mut self.halt_reported, true) {
            return None;
        }
        let needs = ["a software reset", "a function-level reset", "a warm reset", "a cold reset"];
        let why = format!(
            "GENSTS is {:#010x}: the device halted and needs {}",
            status.into_bits(),
            needs[usize::from(status.reset_type() & 3)],
        );
        Some(DeviceError {
            error: Error::new(ErrorKind::Device, "go on", why)
                .mend("reset its channels; their jobs come back"),
            stalls: 0..usize::MAX,
        })
    }
}

/// What the words of SWERR say.
fn describe(words: [u64; 3]) -> String {
    let error = SwErr::from_bits(words[0]);
    let text = SubmissionError(error.error()).text().unwrap_or_else(|| Status(error.error()).text());
    let mut parts =
        vec![format!("SWERR is {:#018x} {:#018x} {:#018x}: {text}", words[0], words[1], words[2])];
    if error.wq_valid() {
        parts.push(format!("work queue {}", error.wq()));
    }
    if error.descriptor_valid() {
        parts.push(format!("opcode {:#04x}", error.opcode()));
        parts.push(format!("PASID {}", error.pasid()));
        if error.batch() {
            parts.push(format!("descriptor {} of a batch", SwErrBatch::from_bits(words[1]).index()));
        }
    }
    if error.overflow() {
        parts.push("and more errors were lost".to_owned());
    }
    parts.join(", ")
}

/// An error of the device's own.
pub(super) struct DeviceError {
    pub error: Error,
    /// The queues that it keeps from working.
    pub stalls: Range<usize>,
}

impl Capabilities {
    fn read(bar: &Bar) -> Result<Self> {
        let version = bar.read32(reg::VERSION);
        if !(1..=3).contains(&(version >> 8)) {
            return Err(nonsense("VERSION", version.into(), "this driver knows the versions 0x100 to 0x3ff"));
        }
        let general = GenCap::from_bits(bar.read64(reg::GENCAP));
        let wq = WqCap::from_bits(bar.read64(reg::WQCAP));
        let group = GrpCap::from_bits(bar.read64(reg::GRPCAP));
        let engines = EngCap::from_bits(bar.read64(reg::ENGCAP));
        let checks = [
            (wq.wqs() != 0, "WQCAP", wq.into_bits(), "it has no work queues"),
            (wq.total_size() != 0, "WQCAP", wq.into_bits(), "its work queues have no entries"),
            (wq.wqcfg_size() <= 7, "WQCAP", wq.into_bits(), "a WQCFG is larger than a page"),
            (group.groups() != 0, "GRPCAP", group.into_bits(), "it has no groups"),
            (
                (1..=64).contains(&engines.engines()),
                "ENGCAP",
                engines.into_bits(),
                "it does not have 1 to 64 engines",
            ),
        ];
        for (holds, register, value, why) in checks {
            if !holds {
                return Err(nonsense(register, value, why));
            }
        }
        if !general.configurable() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "configure it",
                format!("GENCAP is {:#x}: its configuration can not be written", general.into_bits()),
            )
            .mend("take a whole device; this is a part of one that its host has configured and keeps"));
        }
        let commands = if general.command_capabilities() { bar.read32(reg::CMDCAP) } else { 0 };
        Ok(Self {
            general,
            wq,
            group,
            engines: usize::from(engines.engines()),
            operations: [0, 8, 16, 24].map(|word| bar.read64(reg::OPCAP + word)),
            handles_by_command: commands & 1 << Command::RequestInterruptHandle as u32 != 0,
        })
    }

    /// Bytes in one transfer, at most: the descriptor's size field has 32 bits.
    pub(super) fn max_transfer(&self) -> u64 {
        1 << self.general.max_transfer_shift()
    }

    /// Descriptors in one batch, at most.
    pub(super) fn max_batch(&self) -> usize {
        1 << self.general.max_batch_shift()
    }
}

/// The lowest `count` bits, of at most 64.
fn low_bits(count: usize) -> u64 {
    u64::MAX.checked_shr(64 - count as u32).unwrap_or(0)
}
