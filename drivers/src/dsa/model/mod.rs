//! The software twin of the device.
