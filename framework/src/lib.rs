//! underpass: a poll-mode framework for driving PCI devices from user space.
//!
//! An application opens a device through `underpass_drivers`, gets queues (here: [`accel::Channel`]s), gives
//! each memory that it may use, and polls. See the README's thirty lines.
//!
//! What is where, from the application downwards:
//! - [`accel`]: the class of devices that do jobs on memory. A job owns its buffers until it comes back.
//! - [`net`]: the class of devices that move packets. A [`Packet`] is an owned buffer of a [`pool`].
//! - [`dma`]: buffers in DMA memory, and which of them one queue can address.
//! - [`ring`]: bounded queues between threads, without locks.
//! - [`worker`]: pinned threads that poll, their counters and how they idle.
//! - [`tap`]: an interface of the kernel's network stack, as frames.
//! - [`pci`], [`bar`], [`interrupt`]: what a driver needs of its device, over the kernel's VFIO ([`vfio`]) or a software
//!   model of it.
//! - [`model`]: what such a model implements.
//!
//! `unsafe` lives in [`bar`] (MMIO), [`vfio`] (requests to the kernel, and registers mapped), [`dma`] (memory that a device shares), [`ring`] (memory that threads share), [`pool`] and
//! `packet` (owned pointers into memory of pools), and [`tap`] (one system call); each of them starts with what makes it
//! sound.

pub mod accel;
pub mod bar;
mod burst;
pub mod dma;
pub mod interrupt;
pub mod model;
pub mod net;
mod packet;
pub mod pci;
pub mod pool;
pub mod ring;
pub mod tap;
pub mod vfio;
pub mod worker;

pub use burst::Burst;
pub use packet::{Checksum, Packet, Transport, TxOffload};
pub use pool::Pool;
pub use underpass_iommu as iommu;
pub use underpass_iommu::{Access, Error, ErrorKind, Fault, Iova, Pasid, Region, Result};
