//! The iommufd backend against the kernel's own mock of an IOMMU (`CONFIG_IOMMUFD_TEST`), which tells what page each
//! address is really translated to, and has PASIDs, page requests and dirty bits without any device that has them.
//!
//! The mock is the kernel's iommufd with another page table beneath: everything that iommufd itself does is real.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

mod addresses;
mod backend;
#[path = "../conformance/mod.rs"]
mod conformance;
mod dirty;
mod injected;
mod kernel;
mod mapping;
mod pasids;
mod requests;
mod rig;
