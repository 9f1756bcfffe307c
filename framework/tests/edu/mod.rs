//! QEMU's teaching device (1234:11e8; QEMU's docs/specs/edu.rst): registers, one interrupt, and an engine that moves up to
//! 4096 bytes between memory and a buffer of its own. A transfer takes 100 ms.
#![allow(dead_code, reason = "each suite uses a part")]

use std::io::Write;
use std::thread::sleep;
use std::time::{Duration, Instant};

use underpass::Iova;
use underpass::bar::Bar;
use underpass::pci::{PciAddress, PciDevice};
use underpass::vfio;

pub(crate) const IDENTITY: u64 = 0x00;
pub(crate) const LIVENESS: u64 = 0x04;
pub(crate) const FACTORIAL: u64 = 0x08;
pub(crate) const STATUS: u64 = 0x20;
pub(crate) const IRQ_STATUS: u64 = 0x24;
pub(crate) const IRQ_RAISE: u64 = 0x60;
pub(crate) const IRQ_ACKNOWLEDGE: u64 = 0x64;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;
/// Where the engine's buffer is, for the engine.
const BUFFER: u64 = 0x40000;

pub(crate) struct Edu {
    pub(crate) device: PciDevice,
    pub(crate) registers: Bar,
}

impl Edu {
    /// The one whose address this variable has, bus mastering on.
    pub(crate) fn open(variable: &str) -> Self {
        let device = PciDevice::open(address(variable), &options()).unwrap();
        device.set_bus_master(true).unwrap();
        let registers = device.bar(0).unwrap();
        Self { device, registers }
    }

    /// Has the device fill its buffer from `at` on with `len` bytes of memory.
    pub(crate) fn fetch(&self, iova: Iova, at: u64, len: u64) {
        self.transfer(iova.get(), BUFFER + at, len, RUN);
    }

    /// Has the device write `len` bytes of its buffer from `at` on to memory.
    pub(crate) fn store(&self, at: u64, iova: Iova, len: u64) {
        self.transfer(BUFFER + at, iova.get(), len, RUN | TO_MEMORY);
    }

    fn transfer(&self, source: u64, destination: u64, len: u64, command: u64) {
        self.registers.write64(DMA_SOURCE, source);
        self.registers.write64(DMA_DESTINATION, destination);
        self.registers.write64(DMA_COUNT, len);
        self.registers.write64(DMA_COMMAND, command);
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.registers.read64(DMA_COMMAND) & RUN != 0 {
            assert!(Instant::now() < deadline, "the engine does not end");
            sleep(Duration::from_millis(2));
        }
    }
}

/// What an environment variable of the testbed has.
pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run this in ci/testbed"))
}

pub(crate) fn address(name: &str) -> PciAddress {
    variable(name).parse().unwrap()
}

pub(crate) fn row() -> String {
    variable("UNDERPASS_TESTBED")
}

/// Where nothing translates, only who takes responsibility opens a device.
pub(crate) fn options() -> vfio::Options {
    let unprotected = (row() == "noiommu").then(|| {
        // SAFETY: these tests hand a device no address but those of memory that they have mapped for it.
        unsafe { underpass::iommu::UnprotectedDma::new() }
    });
    vfio::Options { unprotected, ..vfio::Options::default() }
}

/// Tells the testbed why a test is left out. Past libtest, which keeps what is printed to itself.
pub(crate) fn not_here(reason: &str) {
    std::io::stderr().write_all(format!("testbed: not here: {reason}\n").as_bytes()).unwrap();
}
