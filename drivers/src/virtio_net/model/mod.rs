//! The software twin of the device.

pub mod peer;
