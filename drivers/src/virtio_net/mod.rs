//! virtio-net, the network device of VIRTIO, over its modern PCI transport: [`spec`] holds the layouts, [`driver`] and
//! [`model`], its software twin, share them.

pub mod driver;
pub mod model;
pub mod spec;
