//! Intel's Data Streaming Accelerator (DSA): copies, comparisons, checksums and more on memory, by descriptors that are
//! written to work queues' portals. The driver ([`Dsa`]) and the [`model`] of the device share [`spec`].

mod driver;
pub mod model;
pub mod spec;

pub use driver::{Dsa, WqMode};
