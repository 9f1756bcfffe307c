//! PCI devices of this machine: which driver takes which, and how one is opened by its address.

use std::fmt::Write as _;

use underpass::pci::PciDevice;
use underpass::{Error, ErrorKind, Result};

use super::{Address, Class, Device, SchemeOption};
use crate::dsa::Dsa;
use crate::dsa::spec as dsa;
use crate::virtio_net::driver::VirtioNet;
use crate::virtio_net::spec::pci as virtio;

/// A driver of PCI devices.
#[derive(Debug, Clone, Copy)]
pub struct PciDriver {
    /// Its name, as the devices that it opens say it: "virtio-net".
    pub name: &'static str,
    /// What it drives, in one line.
    pub what: &'static str,
    /// The class of what it opens.
    pub class: Class,
    /// The devices that it knows: PCI vendor and device id.
    pub ids: &'static [(u16, u16)],
    /// The options that it takes after a PCI address, besides [`OPTIONS`].
    pub options: &'static [SchemeOption],
    /// Makes a device of the function. Options are known to be among `options` and [`OPTIONS`], each given once.
    pub open: fn(PciDevice, &Address<'_>) -> Result<Device>,
}

/// The options of every PCI address.
pub const OPTIONS: &[SchemeOption] = &[SchemeOption {
    name: "vf-token",
    values: "UUID",
    what: "the token that the owner of its physical function has set, for a virtual function",
}];

/// Every driver of this crate.
pub(super) const ALL: &[&PciDriver] = &[&VIRTIO_NET, &DSA];

const VIRTIO_NET: PciDriver = PciDriver {
    name: "virtio-net",
    what: "virtio network devices, modern or transitional",
    class: Class::Port,
    ids: &[(virtio::VENDOR_ID, virtio::DEVICE_ID), (virtio::VENDOR_ID, virtio::TRANSITIONAL_DEVICE_ID)],
    options: &[],
    open: |device, _| Ok(Device::Port(Box::new(VirtioNet::open(device)?))),
};

const DSA: PciDriver = PciDriver {
    name: "dsa",
    what: "Intel Data Streaming Accelerator",
    class: Class::Accelerator,
    ids: &[
        (dsa::VENDOR_ID, dsa::DEVICE_IDS[0]),
        (dsa::VENDOR_ID, dsa::DEVICE_IDS[1]),
        (dsa::VENDOR_ID, dsa::DEVICE_IDS[2]),
    ],
    options: &[],
    open: |device, _| Ok(Device::Accelerator(Box::new(Dsa::open(device)?))),
};

impl PciDriver {
    /// Whether it knows devices with these ids.
    pub fn knows(&self, vendor: u16, device: u16) -> bool {
        self.ids.contains(&(vendor, device))
    }

    /// The refusal of a device that none of `drivers` knows.
    pub(super) fn none_knows(drivers: &[&Self], text: &str, (vendor, device): (u16, u16)) -> Error {
        let mut known = String::new();
        for driver in drivers {
            let ids: Vec<_> =
                driver.ids.iter().map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")).collect();
            let separator = if known.is_empty() { "" } else { "; " };
            let _ = write!(known, "{separator}{}: {}", driver.name, ids.join(", "));
        }
        Error::new(
            ErrorKind::Unsupported,
            format!("open {text:?}"),
            format!("no driver here knows {vendor:04x}:{device:04x}"),
        )
        .mend(format!("take a device that one of them knows ({known})"))
    }
}
