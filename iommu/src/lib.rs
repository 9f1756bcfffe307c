//! I/O address spaces, PASIDs, IOVAs and DMA memory, behind one IOMMU backend trait.
//!
//! The idea is the one that led to the kernel's iommufd: an address space (an [`Ioas`]) is owned by whoever
//! keeps the page tables, a device or one PASID of it is attached, and generic code never learns what the
//! tables look like. The order of work is *attach, ask, map*: what a device can do ([`Capabilities`]) and
//! which addresses it can use are known only once it is attached.
//!
//! ```
//! use underpass_iommu::{Access, IommuBackend, Pasid, Region, soft::SoftIommu};
//!
//! # fn main() -> underpass_iommu::Result<()> {
//! let iommu = SoftIommu::new(Default::default());
//! let device = iommu.device("soft:example");
//! let ioas = iommu.alloc_ioas()?;
//! let pasid = Pasid::allocate()?;
//! let attachment = ioas.attach(&device, Some(pasid.get()))?;
//! let region = Region::builder(64 * 1024).build()?;
//! let mapping = ioas.map(&region, Access::READ_WRITE)?;
//! println!("{} maps {:?} at {}", attachment.name(), region, mapping.iova());
//! # Ok(())
//! # }
//! ```
//!
//! `unsafe` lives in [`memory`](Region) (mmap and friends) and in [`soft`] (the software device's own way to
//! memory); each of those modules states the invariant that makes it sound.

mod address;
mod backend;
mod error;
mod fault;
pub mod group;
mod ioctl;
pub mod iommufd;
mod iova;
mod memlock;
mod memory;
pub mod noiommu;
mod pasid;
pub mod soft;
pub mod type1;
mod vendor;
mod word;

pub use address::{Access, Iova, PageSize, PageSizes};
pub use backend::{
    Attachable, AttachableKind, Attachment, AttachmentOps, Capabilities, Ioas, IoasOps, IommuBackend, Leases,
    Mapping, SvaToken, UnprotectedDma, Vendor,
};
pub use error::{Error, ErrorKind, Result};
pub use fault::{Fault, FaultQueue, FaultReason};
pub use iova::{IovaAllocator, IovaRange};
pub use memory::{Backing, Region, RegionBuilder, RegionId};
pub use pasid::{OwnedPasid, Pasid, PasidAllocator};
pub use word::Word;
