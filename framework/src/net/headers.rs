//! Packet headers.

mod mac;

pub use mac::{MacAddr, ParseMacError};
