//! The driver: brings the device up, lends out its queues and configures it while it runs. A packet's way is `rx` or
//! `tx` and then `virtqueue`; `transport`, `offer` and `control` are the control plane.
//!
//! All queues share one address space, the device's own: today's NICs have no PASID for each queue, so isolation is
//! between devices. [`Port::map`] decides which memory is in it.

mod control;
mod lease;
mod offer;
mod rx;
mod start;
mod transport;
mod tx;
pub mod virtqueue;

use std::fmt;
use std::mem;
use std::sync::Arc;

use underpass::dma::DmaSpace;
use underpass::iommu::{Attachment, RegionId};
use underpass::net::{Config, Counters, Info, Link, MacAddr, Port, Rss, Started};
use underpass::pci::PciDevice;
use underpass::{Access, Error, ErrorKind, Fault, Pool, Region, Result};

use self::offer::Offer;
use self::start::Running;
use self::transport::Transport;
use super::spec::control::Command;
use super::spec::net::{config, link};
use super::spec::{Features, pci::status};

/// A virtio-net device, over any [`PciDevice`] that is a modern one.
///
/// - Rings are packed if the device offers that, else split.
/// - [`RX_LARGE`](underpass::net::Offloads::RX_LARGE) is granted only together with `RX_CHECKSUM`, and with `RX_SCATTER`
///   or pools whose buffers hold 64 KiB.
/// - VLAN tags are taken out and put in by the driver, as the device has nothing for it; so is the IPv4 header's checksum.
/// - What a device without the respective feature does not filter is received: it is asked nothing then.
/// - VLAN filters are agreed on when the port starts. A port that was started without any VLAN id set receives all,
///   and takes the first id only once it is stopped; likewise it can not lose its last id while it runs.
pub struct VirtioNet {
    running: Option<Running>,
    filters: Filters,
    offer: Offer,
    counters: (Vec<Arc<Counters>>, Vec<Arc<Counters>>),
    failure_reported: bool,
    transport: Transport,
    /// The device did not stop: it is of no use any more.
    is_gone: bool,
    mapped: Vec<Arc<Region>>,
    // Given up in this order: detached, then unmapped, then closed.
    attachment: Arc<Attachment>,
    space: Arc<DmaSpace>,
    device: Arc<PciDevice>,
}

/// What is to be received, as set by the application; it outlives a restart.
#[derive(Debug, Clone, Default)]
struct Filters {
    mac: MacAddr,
    promiscuous: bool,
    all_multicast: bool,
    addresses: Vec<MacAddr>,
    vlans: Vec<u16>,
}

impl VirtioNet {
    /// Checks what the device is, resets it and asks what it can do.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is no virtio-net device, a legacy one, or one that goes past the IOMMU;
    /// [`ErrorKind::Device`] for registers that make no sense; [`ErrorKind::Timeout`] if it does not answer to a reset;
    /// the IOMMU's refusal to attach it.
    pub fn open(device: PciDevice) -> Result<Self> {
        let name = device.name().to_owned();
        Self::attach(device).map_err(|error| error.device(name))
    }

    fn attach(device: PciDevice) -> Result<Self> {
        let transport = Transport::discover(&device)?;
        transport.reset()?;
        let offer = Offer::read(&device, &transport)?;
        let ioas = device.iommu().alloc_ioas()?;
        let attachment = ioas.attach(&device, None)?;
        device.set_bus_master(true)?;
        Ok(Self {
            running: None,
            filters: Filters { mac: offer.mac, ..Filters::default() },
            offer,
            counters: (Vec::new(), Vec::new()),
            failure_reported: false,
            transport,
            is_gone: false,
            mapped: Vec::new(),
            attachment: Arc::new(attachment),
            space: Arc::new(DmaSpace::new(ioas)),
            device: Arc::new(device),
        })
    }

    /// The PCI device beneath.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }
}
