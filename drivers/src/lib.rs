//! Device drivers for underpass, one folder a device: `spec` (layouts), the driver, and `model`, its software
//! twin. A driver sees its `spec`, PCI, BARs, DMA memory and one class trait, never its model; nothing in this crate
//! is unsafe.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod dsa;
mod ops;
pub mod registry;
mod shape;
pub mod virtio_net;

pub use registry::{Registry, builtin};

/// The README's program, run as a test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
