//! The DSA model from the outside: registers by offset and descriptors by byte, written from the specification and
//! not from `spec.rs`, so that a slip there does not cancel itself out.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a rig that can not be built fails its test")]

use std::sync::Arc;

use underpass::bar::Bar;
use underpass::dma::DmaBuf;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::iommu::{Attachment, IommuBackend, Mapping};
use underpass::pci::{PciDevice, Run};
use underpass::{Access, Pasid, Region};
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};

pub(crate) const GENCFG: u64 = 0x80;
pub(crate) const GENCTRL: u64 = 0x88;
pub(crate) const GENSTS: u64 = 0x90;
pub(crate) const INTCAUSE: u64 = 0x98;
pub(crate) const CMD: u64 = 0xa0;
pub(crate) const CMDSTS: u64 = 0xa8;
pub(crate) const SWERR: u64 = 0xc0;
pub(crate) const GRPCFG: u64 = 0x300;

/// Where nothing is mapped.
pub(crate) const NOWHERE: u64 = 0x7abc_0000_0000;
/// A flag each: completion address valid and completion record requested.
pub(crate) const RECORD: u32 = 0b1100;

/// A descriptor as bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Raw(pub(crate) [u8; 64]);

impl Raw {
    pub(crate) fn new(opcode: u8, flags: u32) -> Self {
        Self([0; 64]).u32(4, flags | u32::from(opcode) << 24)
    }

    pub(crate) fn bytes(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, at: usize, value: u8) -> Self {
        self.bytes(at, &[value])
    }

    pub(crate) fn u16(self, at: usize, value: u16) -> Self {
        self.bytes(at, &value.to_le_bytes())
    }

    pub(crate) fn u32(self, at: usize, value: u32) -> Self {
        self.bytes(at, &value.to_le_bytes())
    }

    pub(crate) fn u64(self, at: usize, value: u64) -> Self {
        self.bytes(at, &value.to_le_bytes())
    }

    pub(crate) fn flags(self) -> u32 {
        u32::from_le_bytes([self.0[4], self.0[5], self.0[6], 0])
    }

    pub(crate) fn with_flags(self, flags: u32) -> Self {
        let opcode = self.0[7];
        self.u32(4, flags | u32::from(opcode) << 24)
    }
}

/// A completion record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) status: u8,
    pub(crate) result: u8,
    pub(crate) completed: u32,
    pub(crate) fault: u64,
    pub(crate) specific: [u64; 2],
}

/// A device with memory: work queue 0 is dedicated with a PASID, work queue 1 shared; all engines in group 0.
pub(crate) struct Rig {
    pub(crate) device: PciDevice,
    pub(crate) regs: Bar,
    pub(crate) portals: Bar,
    /// All of the memory that the device can write, and the IOVA of its first byte.
    pub(crate) memory: DmaBuf,
    pub(crate) base: u64,
    /// The IOVA of 64 KiB that the device can only read.
    pub(crate) read_only: u64,
    pub(crate) pasid: u32,
    wqcfg: u64,
    stride: u64,
    // Dropped after the device.
    _mappings: [Mapping; 2],
    _attachment: Attachment,
}

/// Where the rig's completion records are.
pub(crate) const RECORDS: usize = 0x1000;

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(DsaProfile { engines: 1, ..DsaProfile::default() })
    }

    /// An enabled device.
    pub(crate) fn with(profile: DsaProfile) -> Self {
        let rig = Self::disabled(profile);
        rig.configure();
        assert_eq!(rig.command(1, 0), 0, "enable device");
        assert_eq!(rig.command(6, 0), 0, "enable work queue 0");
        assert_eq!(rig.command(6, 1), 0, "enable work queue 1");
        rig
    }

    /// A device as it is after a reset.
    pub(crate) fn disabled(profile: DsaProfile) -> Self {
        Self::disabled_and_run_by(profile, Run::Stepped)
    }

    pub(crate) fn disabled_and_run_by(profile: DsaProfile, run: Run) -> Self {
        let iommu = SoftIommu::new(SoftOptions::default());
        let device =
            PciDevice::in_process("soft:dsa", Box::new(DsaModel::new(profile)), &iommu, run).unwrap();
        device.set_bus_master(true).unwrap();
        let pasid = Pasid::new(7).unwrap();
        let ioas = iommu.alloc_ioas().unwrap();
        let attachment = ioas.attach(&device, Some(pasid)).unwrap();
        // First, so that nothing is mapped behind the memory.
        let constant = Region::builder(64 << 10).build().unwrap();
        let readable = ioas.map(&constant, Access::READ).unwrap();
        let region = Region::builder(4 << 20).build().unwrap();
        let writable = ioas.map(&region, Access::READ_WRITE).unwrap();
        let regs = device.bar(0).unwrap();
        let offsets = regs.read64(0x60);
        let stride = 32 << (regs.read64(0x20) >> 24 & 0xf);
        Self {
            portals: device.bar(2).unwrap(),
            memory: DmaBuf::new(Arc::clone(&region)).unwrap(),
            base: writable.iova().get(),
            read_only: readable.iova().get(),
            pasid: pasid.get(),
            wqcfg: (offsets >> 16 & 0xffff) * 0x100,
            stride,
            _mappings: [writable, readable],
            _attachment: attachment,
            device,
            regs,
        }
    }

    pub(crate) fn wqcfg(&self, wq: u64, word: u64) -> u64 {
        self.wqcfg + wq * self.stride + 4 * word
    }

    /// Everything but the enabling commands.
    pub(crate) fn configure(&self) {
        let engines = self.regs.read64(0x38);
        self.regs.write64(GRPCFG, 0b11);
        self.regs.write64(GRPCFG + 32, (1 << engines) - 1);
        self.regs.write64(GRPCFG + 40, 0b001_001);
        self.regs.write32(GENCFG, 1 << 12);
        for (wq, dedicated) in [(0, 1), (1, 0)] {
            self.regs.write32(self.wqcfg(wq, 0), 16);
            self.regs.write32(self.wqcfg(wq, 1), 8);
            self.regs.write32(self.wqcfg(wq, 2), dedicated | 1 << 4 | self.pasid << 8 | 1 << 28);
            self.regs.write32(self.wqcfg(wq, 3), 0x15 | 5 << 5);
        }
        for vector in 0..9 {
            self.regs.write32(0x200 + 8 * vector, 1 << 3 | self.pasid << 12);
        }
    }

    /// Runs a command to its end and returns its error code.
    pub(crate) fn command(&self, code: u32, operand: u32) -> u8 {
        self.start(code, operand);
        self.command_ends()
    }

    pub(crate) fn start(&self, code: u32, operand: u32) {
        self.regs.write32(CMD, operand | code << 20);
    }

    pub(crate) fn command_ends(&self) -> u8 {
        for _ in 0..10_000 {
            let status = self.regs.read32(CMDSTS);
            if status >> 31 == 0 {
                return status as u8;
            }
        }
        panic!("the command does not end");
    }

    pub(crate) fn step_all(&self) {
        for _ in 0..100_000 {
            if !self.device.step() {
                return;
            }
        }
        panic!("the engines do not come to rest");
    }

    /// The IOVA of a byte of the memory.
    pub(crate) fn at(&self, offset: usize) -> u64 {
        self.base + offset as u64
    }

    pub(crate) fn record(&self, n: usize) -> Record {
        let bytes = &self.memory[RECORDS + 32 * n..][..32];
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(bytes[2..4], [0; 2], "reserved in version 1");
        Record {
            status: bytes[0],
            result: bytes[1],
            completed: (word(0) >> 32) as u32,
            fault: word(8),
            specific: [word(16), word(24)],
        }
    }

    /// The descriptor with completion record `n`, which is cleared.
    pub(crate) fn with_record(&mut self, raw: Raw, n: usize) -> Raw {
        self.memory[RECORDS + 32 * n..][..32].fill(0);
        raw.u64(8, self.at(RECORDS + 32 * n))
    }

    pub(crate) fn post(&self, wq: u64, raw: &Raw) {
        self.portals.post64(wq * 0x4000, &raw.0);
    }

    /// Submits to work queue 0 and returns the record; status 0 if there is none.
    pub(crate) fn run(&mut self, raw: Raw) -> Record {
        let raw = self.with_record(raw, 0);
        self.post(0, &raw);
        self.step_all();
        self.record(0)
    }

    pub(crate) fn swerr(&self) -> [u64; 4] {
        std::array::from_fn(|n| self.regs.read64(SWERR + 8 * n as u64))
    }

    /// The error code in SWERR, if there is one; acknowledges it.
    pub(crate) fn take_swerr(&self) -> Option<u8> {
        let first = self.swerr()[0];
        self.regs.write32(SWERR, 3);
        (first & 1 == 1).then_some((first >> 8) as u8)
    }
}
