//! virtio-net, the network device of VIRTIO, over its modern PCI transport: [`spec`] holds the layouts.

pub mod spec;
