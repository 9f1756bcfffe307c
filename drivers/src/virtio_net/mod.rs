//! virtio-net, the network device of VIRTIO, over its modern PCI transport: [`spec`] holds the layouts, [`model`] is its
//! software twin.

pub mod model;
pub mod spec;
