//! Packets and what is in them.

pub mod checksum;
pub mod headers;
pub mod toeplitz;

pub use headers::MacAddr;
