//! The register file in BAR 0: which bits can be written, and when.

use std::sync::atomic::Ordering;

use underpass::model::Width;

use super::command::{self, Pending};
use super::device::Device;
use super::spec::{
    self, Cmd, CmdSts, DeviceState, EngCap, GRPCFG_ENGINES, GRPCFG_FLAGS, GRPCFG_STRIDE, GRPCFG_WQS, GenCap,
    GenCfg, GenCtrl, GenSts, GrpCap, GrpFlags, MSIX_PBA, MSIX_TABLE, MSIXPERM_STRIDE, MsixPerm, Offsets,
    PerfmonOffset, SwErr, TABLE_UNIT, WqCap, WqLimits, WqMode, WqSize, WqState, WqStatus, WqThreshold, reg,
    wqcfg,
};
use super::{DsaProfile, VECTORS};

/// Where the tables are, as OFFSETS says.
const MSIX_PERM: u64 = 0x200;
const GRPCFG: u64 = 0x300;
const PERFMON: u64 = 0x1000;

/// Read buffers of the device.
const READ_BUFFERS: u8 = 96;
/// Which bits can be written of the 32-bit words at the start of a WQCFG: size, threshold, mode, limits.
const WQCFG_MASKS: [u32; 4] = [0xffff, 0xffff, 0x3fff_ffff, 0x01ff];
/// Bits of GRPFLAGS that can be written.
const GRPFLAGS_MASK: u64 = 0x0ff0_ffbf;

/// One group's GRPCFG.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Group {
    pub(super) wqs: [u64; 4],
    pub(super) engines: u64,
    pub(super) flags: GrpFlags,
}

/// One queue's WQCFG.
#[derive(Debug, Clone, Copy)]
pub(super) struct WqConfig {
    /// Bytes 0 to 15; the words after it are computed or reserved.
    words: [u32; 4],
    pub(super) op_config: [u64; 4],
    pub(super) state: WqState,
}

impl WqConfig {
    fn new(profile: &DsaProfile) -> Self {
        let mode = WqMode::new().with_dedicated(!profile.shared);
        Self { words: [0, 0, mode.into_bits(), 0], op_config: operations(profile), state: WqState::Disabled }
    }

    pub(super) fn size(&self) -> u16 {
        WqSize::from_bits(self.words[0]).size()
    }

    pub(super) fn threshold(&self) -> u16 {
        WqThreshold::from_bits(self.words[1]).threshold()
    }

    pub(super) fn mode(&self) -> WqMode {
        WqMode::from_bits(self.words[2])
    }

    pub(super) fn limits(&self) -> WqLimits {
        WqLimits::from_bits(self.words[3])
    }
}

/// OPCAP.
fn operations(profile: &DsaProfile) -> [u64; 4] {
    [profile.operations, 0, 0, 0]
}

/// The registers and the command that runs, behind one lock.
pub(super) struct Control {
    pub(super) groups: Vec<Group>,
    pub(super) wqs: Vec<WqConfig>,
    pub(super) gen_cfg: GenCfg,
    pub(super) status: CmdSts,
    last_command: u32,
    pub(super) pending: Option<Pending>,
    /// Storage only: the platform keeps the vectors of a software device.
    msix_table: [u32; VECTORS * 4],
}

impl Control {
    pub(super) fn new(profile: &DsaProfile) -> Self {
        let mut msix_table = [0; VECTORS * 4];
        // Vectors are masked after a reset (PCI Express 6.0, 7.7.2.9).
        msix_table.iter_mut().skip(3).step_by(4).for_each(|word| *word = 1);
        Self {
            groups: vec![Group::default(); profile.groups],
            wqs: vec![WqConfig::new(profile); profile.wqs],
            gen_cfg: GenCfg::new(),
            status: CmdSts::new(),
            last_command: 0,
            pending: None,
            msix_table,
        }
    }

    /// A function-level reset. The device is quiet.
    pub(super) fn reset(&mut self, device: &Device) {
        *self = Self::new(&device.profile);
        self.reset_configuration(device);
        device.command_active.store(false, Ordering::Release);
        device.end_abort();
        device.clear_causes(u32::MAX);
        device.acknowledge_error(SwErr::new().with_valid(true).with_overflow(true));
    }

    /// The configuration as it is after a reset; every queue is closed and empty.
    pub(super) fn reset_configuration(&mut self, device: &Device) {
        self.groups.fill(Group::default());
        self.wqs.fill(WqConfig::new(&device.profile));
        self.gen_cfg = GenCfg::new();
        device.set_gen_ctrl(0);
        device.user_interrupts.store(false, Ordering::Relaxed);
        device.handles.store(0, Ordering::Relaxed);
        device.msix_perm.iter().for_each(|perm| perm.store(0, Ordering::Relaxed));
        device.set_state(DeviceState::Disabled);
    }

    /// Puts one disabled queue's configuration back.
    pub(super) fn reset_wq(&mut self, device: &Device, wq: usize) {
        let size = self.wqs[wq].words[0];
        self.wqs[wq] = WqConfig::new(&device.profile);
        // The size belongs to the device's configuration: it can only change while the device is disabled.
        self.wqs[wq].words[0] = size;
    }

    /// A read of any width, naturally aligned.
    pub(super) fn read(&self, device: &Device, offset: u64, width: Width) -> u64 {
        let word = self.word(device, offset & !7) >> (8 * (offset & 7));
        word & u64::MAX >> (64 - 8 * width.bytes())
    }

    /// The 64 bits at `offset`, a multiple of 8.
    fn word(&self, device: &Device, offset: u64) -> u64 {
        let profile = &device.profile;
        match offset {
            reg::VERSION => profile.version.into(),
            reg::GENCAP => gen_cap(profile).into_bits(),
            reg::WQCAP => wq_cap(profile).into_bits(),
            reg::GRPCAP => GrpCap::new()
                .with_groups(profile.groups as u8)
                .with_read_buffers(READ_BUFFERS)
                .with_read_buffer_control(true)
                .with_read_buffer_limit(true)
                .into_bits(),
            reg::ENGCAP => EngCap::new().with_engines(profile.engines as u8).into_bits(),
            reg::OPCAP => profile.operations,
            reg::OFFSETS => Offsets::new()
                .with_grpcfg((GRPCFG / TABLE_UNIT) as u16)
                .with_wqcfg((wqcfg_offset(profile) / TABLE_UNIT) as u16)
                .with_msix_perm((MSIX_PERM / TABLE_UNIT) as u16)
                .into_bits(),
            0x68 => PerfmonOffset::new().with_perfmon((PERFMON / TABLE_UNIT) as u16).into_bits(),
            reg::GENCFG => self.gen_cfg.into_bits().into(),
            reg::GENCTRL => device.gen_ctrl().into(),
            reg::GENSTS => GenSts::new().with_state(device.state()).into_bits().into(),
            reg::INTCAUSE => device.int_cause().into(),
            reg::CMD => self.last_command.into(),
            reg::CMDSTS => self.status.into_bits().into(),
            reg::CMDCAP if profile.command_capabilities => command::supported(profile).into(),
            reg::SWERR..0xe0 => device.software_error()[((offset - reg::SWERR) / 8) as usize],
            MSIX_PERM..GRPCFG => {
                let perm = device.msix_perm.get(((offset - MSIX_PERM) / MSIXPERM_STRIDE) as usize);
                perm.map_or(0, |perm| perm.load(Ordering::Relaxed).into())
            }
            MSIX_TABLE..MSIX_PBA => {
                let at = ((offset - MSIX_TABLE) / 4) as usize;
                let half = |at| u64::from(self.msix_table.get(at).copied().unwrap_or(0));
                half(at) | half(at + 1) << 32
            }
            _ => self.table_word(device, offset),
        }
    }

    fn table_word(&self, device: &Device, offset: u64) -> u64 {
        if let Some((group, at)) = table_entry(offset, GRPCFG, GRPCFG_STRIDE, self.groups.len()) {
            let group = &self.groups[group];
            return match at {
                GRPCFG_WQS..GRPCFG_ENGINES => group.wqs[(at / 8) as usize],
                GRPCFG_ENGINES => group.engines,
                GRPCFG_FLAGS => group.flags.into_bits(),
                _ => 0,
            };
        }
        let stride = wq_cap(&device.profile).wqcfg_stride();
        let Some((wq, at)) = table_entry(offset, wqcfg_offset(&device.profile), stride, self.wqs.len())
        else {
            return 0;
        };
        let config = &self.wqs[wq];
        match at {
            0 => u64::from(config.words[0]) | u64::from(config.words[1]) << 32,
            wqcfg::MODE => u64::from(config.words[2]) | u64::from(config.words[3]) << 32,
            wqcfg::STATUS => WqStatus::new()
                .with_occupancy(device.queues[wq].entries().occupancy() as u16)
                .with_mode_support(device.profile.shared && device.profile.dedicated)
                .with_state(config.state)
                .into_bits()
                .into(),
            wqcfg::OP_CONFIG..64 => config.op_config[((at - wqcfg::OP_CONFIG) / 8) as usize],
            _ => 0,
        }
    }

    /// A write of 32 bits, aligned. What can not be written is ignored.
    pub(super) fn write(&mut self, device: &Device, offset: u64, value: u32) {
        let disabled = device.state() == DeviceState::Disabled;
        match offset {
            reg::GENCFG if disabled => {
                let value = GenCfg::from_bits(value);
                self.gen_cfg = GenCfg::new()
                    .with_read_buffer_limit(value.read_buffer_limit())
                    .with_user_interrupts(value.user_interrupts());
                device.user_interrupts.store(value.user_interrupts(), Ordering::Relaxed);
            }
            reg::GENCTRL => {
                let value = GenCtrl::from_bits(value);
                let kept = GenCtrl::new()
                    .with_software_error_interrupt(value.software_error_interrupt())
                    .with_halt_interrupt(value.halt_interrupt());
                device.set_gen_ctrl(kept.into_bits());
            }
            reg::INTCAUSE => device.clear_causes(value),
            reg::CMD if !self.status.active() => {
                let value = Cmd::from_bits(value);
                let kept = Cmd::new().with_operand(value.operand()).with_code(value.code());
                self.last_command = kept.with_request_interrupt(value.request_interrupt()).into_bits();
                command::begin(device, self, value);
            }
            reg::SWERR => device.acknowledge_error(SwErr::from_bits(value.into())),
            MSIX_PERM..GRPCFG => {
                let (vector, at) =
                    ((offset - MSIX_PERM) / MSIXPERM_STRIDE, (offset - MSIX_PERM) % MSIXPERM_STRIDE);
                if let (Some(perm), 0) = (device.msix_perm.get(vector as usize), at) {
                    let value = MsixPerm::from_bits(value);
                    let kept =
                        MsixPerm::new().with_pasid_enable(value.pasid_enable()).with_pasid(value.pasid());
                    perm.store(kept.into_bits(), Ordering::Relaxed);
                }
            }
            MSIX_TABLE..MSIX_PBA => {
                if let Some(word) = self.msix_table.get_mut(((offset - MSIX_TABLE) / 4) as usize) {
                    *word = value;
                }
            }
            _ => self.write_table(device, offset, value, disabled),
        }
    }

    fn write_table(&mut self, device: &Device, offset: u64, value: u32, disabled: bool) {
        if let Some((group, at)) = table_entry(offset, GRPCFG, GRPCFG_STRIDE, self.groups.len()) {
            let group = &mut self.groups[group];
            if disabled {
                match at {
                    GRPCFG_WQS..GRPCFG_ENGINES => set_half(&mut group.wqs[(at / 8) as usize], at, value),
                    GRPCFG_ENGINES..GRPCFG_FLAGS => set_half(&mut group.engines, at, value),
                    GRPCFG_FLAGS..48 => {
                        let mut flags = group.flags.into_bits();
                        set_half(&mut flags, at, value);
                        group.flags = GrpFlags::from_bits(flags & GRPFLAGS_MASK);
                    }
                    _ => {}
                }
            }
            return;
        }
        let profile = &device.profile;
        let stride = wq_cap(profile).wqcfg_stride();
        let Some((wq, at)) = table_entry(offset, wqcfg_offset(profile), stride, self.wqs.len()) else {
            return;
        };
        let config = &mut self.wqs[wq];
        let off = config.state == WqState::Disabled;
        match at {
            wqcfg::SIZE if !(off && disabled) => {}
            wqcfg::THRESHOLD => {
                // A threshold over the size of a working queue would let a limited portal overrun it.
                let threshold = WqThreshold::from_bits(value).threshold();
                if off || threshold <= config.size() {
                    config.words[1] = value & WQCFG_MASKS[1];
                    device.queues[wq].set_threshold(threshold);
                }
            }
            wqcfg::SIZE | wqcfg::MODE | wqcfg::LIMITS if off => {
                let word = (at / 4) as usize;
                config.words[word] = value & WQCFG_MASKS[word];
            }
            wqcfg::OP_CONFIG..64 if off => {
                let n = ((at - wqcfg::OP_CONFIG) / 8) as usize;
                set_half(&mut config.op_config[n], at, value);
                config.op_config[n] &= operations(profile)[n];
            }
            _ => {}
        }
    }
}

/// Writes the half of `word` that `offset` is in.
fn set_half(word: &mut u64, offset: u64, value: u32) {
    let shift = 8 * (offset & 4);
    *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// Which entry of a table `offset` is in, and where in it.
fn table_entry(offset: u64, table: u64, stride: u64, entries: usize) -> Option<(usize, u64)> {
    let at = offset.checked_sub(table)?;
    let entry = (at / stride) as usize;
    (entry < entries).then_some((entry, at % stride))
}

fn wqcfg_offset(profile: &DsaProfile) -> u64 {
    (GRPCFG + profile.groups as u64 * GRPCFG_STRIDE).next_multiple_of(TABLE_UNIT)
}

fn gen_cap(profile: &DsaProfile) -> GenCap {
    GenCap::new()
        .with_overlapping_copy(profile.overlapping_copy)
        .with_cache_control_memory(true)
        .with_cache_control_flush(true)
        .with_command_capabilities(profile.command_capabilities)
        .with_destination_readback(true)
        .with_max_transfer_shift(profile.max_transfer_shift)
        .with_max_batch_shift(profile.max_batch_shift)
        .with_configurable(true)
}

pub(super) fn wq_cap(profile: &DsaProfile) -> WqCap {
    WqCap::new()
        .with_total_size(profile.wq_entries)
        .with_wqs(profile.wqs as u8)
        .with_wqcfg_size(profile.op_config.into())
        .with_shared(profile.shared)
        .with_dedicated(profile.dedicated)
        .with_ats(true)
        .with_priority(true)
        .with_occupancy(true)
        .with_op_config(profile.op_config)
}

/// Whether the read buffers that the groups ask for are there.
pub(super) fn read_buffers_fit(control: &Control) -> bool {
    let reserved: u32 =
        control.groups.iter().map(|group| u32::from(group.flags.read_buffers_reserved())).sum();
    let allowed = |group: &Group| {
        let (reserved, allowed) = (group.flags.read_buffers_reserved(), group.flags.read_buffers_allowed());
        // Zero, the initial value, stands for all.
        allowed == 0 || (reserved..=READ_BUFFERS).contains(&allowed)
    };
    reserved <= READ_BUFFERS.into() && control.groups.iter().all(allowed)
}

/// Whether the limit that all groups share is there.
pub(super) fn configuration_is_valid(control: &Control) -> bool {
    control.gen_cfg.read_buffer_limit() <= READ_BUFFERS
}

const _: () = assert!(
    GRPCFG + DsaProfile::MAX_GROUPS as u64 * spec::GRPCFG_STRIDE + DsaProfile::MAX_WQS as u64 * 64 <= PERFMON,
    "the largest tables fit in front of the performance monitor"
);
