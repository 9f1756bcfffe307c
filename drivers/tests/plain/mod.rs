//! A DSA without engines: registers that say what a real one's say, every command a success, portals that are plain
//! memory. A test completes submissions itself.

use std::sync::{Arc, Mutex};

use underpass::bar::Bar;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::model::{BarKind, BarSpec, Bus, Engine, Host, Model, Width};
use underpass::pci::{ConfigSpace, PciDevice, Run};
use underpass::{Iova, Pasid};
use underpass_drivers::dsa::spec::{
    self, Cmd, Command, DeviceState, GenSts, PORTAL_PAGE, PORTAL_STRIDE, Portal, REGISTER_BAR_LEN, WqState,
    WqStatus, reg,
};

/// Work queues, as the registers say.
const WQS: u64 = 8;
/// Where WQCFG is, as OFFSETS says.
const WQCFG: u64 = 0x400;
const WQCFG_STRIDE: u64 = 32;

struct PlainModel {
    registers: Vec<u8>,
    portals: Bar,
    bus: Arc<Mutex<Option<Bus>>>,
}

impl PlainModel {
    fn set(&mut self, offset: u64, value: u64) {
        self.registers[offset as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }
}

impl Model for PlainModel {
    fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(spec::VENDOR_ID, spec::DEVICE_IDS[0], spec::CLASS)
    }

    fn bars(&self) -> Vec<BarSpec> {
        vec![
            BarSpec { index: 0, len: REGISTER_BAR_LEN, kind: BarKind::Registers },
            BarSpec { index: 2, len: WQS * PORTAL_STRIDE, kind: BarKind::Memory(self.portals.clone()) },
        ]
    }

    fn vectors(&self) -> usize {
        0
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        *self.bus.lock().unwrap() = Some(host.bus());
        // As read from a machine with Sapphire Rapids.
        self.set(reg::VERSION, 0x100);
        self.set(reg::GENCAP, 0x0040_915f_0107);
        self.set(reg::WQCAP, 1 << 49 | 1 << 48 | WQS << 16 | 128);
        self.set(reg::GRPCAP, 96 << 8 | 4);
        self.set(reg::ENGCAP, 4);
        self.set(reg::OPCAP, 0x0000_0001_00bf_03ff);
        self.set(reg::OFFSETS, 0x0002_0004_0003);
        Vec::new()
    }

    fn read(&mut self, _bar: usize, offset: u64, width: Width) -> u64 {
        let mut word = [0; 8];
        let bytes = width.bytes() as usize;
        word[..bytes].copy_from_slice(&self.registers[offset as usize..][..bytes]);
        u64::from_le_bytes(word)
    }

    fn write(&mut self, _bar: usize, offset: u64, width: Width, value: u64) {
        let bytes = width.bytes() as usize;
        self.registers[offset as usize..][..bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        if offset != reg::CMD {
            return;
        }
        let cmd = Cmd::from_bits(value as u32);
        let state = match Command::from_code(cmd.code()) {
            Some(Command::EnableDevice) => DeviceState::Enabled,
            Some(Command::ResetDevice) => DeviceState::Disabled,
            Some(Command::EnableWq) => {
                let status = WqStatus::new().with_state(WqState::Enabled).into_bits();
                let at = WQCFG + u64::from(cmd.operand()) * WQCFG_STRIDE + spec::wqcfg::STATUS;
                self.set(at, u64::from(status));
                return;
            }
            _ => return,
        };
        self.set(reg::GENSTS, u64::from(GenSts::new().with_state(state).into_bits()));
    }

    fn config_written(&mut self, _config: &ConfigSpace) {}

    fn reset(&mut self) {}
}

/// The device's side, for the test to play.
pub(crate) struct Plain {
    portals: Bar,
    bus: Arc<Mutex<Option<Bus>>>,
    next: u64,
}

/// The device, and its other side.
pub(crate) fn device(options: SoftOptions) -> (PciDevice, Plain) {
    let portals = Bar::memory(WQS * PORTAL_STRIDE);
    let bus = Arc::new(Mutex::new(None));
    let model = PlainModel {
        registers: vec![0; REGISTER_BAR_LEN as usize],
        portals: portals.clone(),
        bus: Arc::clone(&bus),
    };
    let iommu = SoftIommu::new(options);
    let device = PciDevice::in_process("plain", Box::new(model), &iommu, Run::Stepped).unwrap();
    (device, Plain { portals, bus, next: 0 })
}

impl Plain {
    /// Completes the next `count` submissions to work queue 0 with success, all members of batches too.
    pub(crate) fn complete(&mut self, pasid: Option<Pasid>, count: usize) {
        let mut bus = self.bus.lock().unwrap();
        let bus = bus.as_mut().unwrap();
        for _ in 0..count {
            let at = Portal::UnlimitedMsix.offset(0) + self.next;
            self.next = (self.next + 64) % PORTAL_PAGE;
            let [operation, record, list, size] =
                [4, 8, 16, 32].map(|field| self.portals.read64(at + field / 8 * 8) >> (field % 8 * 8));
            if operation as u32 >> 24 == 1 {
                for member in 0..size & 0xffff_ffff {
                    let record = bus.load_u64(pasid, Iova::new(list + member * 64 + 8)).unwrap();
                    bus.store_u64(pasid, Iova::new(record), 1).unwrap();
                }
                bus.store_u64(pasid, Iova::new(record), (size & 0xffff_ffff) << 32 | 1).unwrap();
            } else {
                bus.store_u64(pasid, Iova::new(record), 1).unwrap();
            }
        }
    }
}
