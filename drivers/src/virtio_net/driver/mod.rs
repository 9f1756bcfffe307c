//! The driver.

pub mod virtqueue;
