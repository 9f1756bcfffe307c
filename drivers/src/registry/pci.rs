//! PCI devices of this machine: which driver takes which, and how one is opened by its address.

use std::fmt::Write as _;

use underpass::pci::host::Host;
use underpass::pci::{PciAddress, PciDevice};
use underpass::{Error, ErrorKind, Result, vfio};

use super::{Address, Class, Device, SchemeOption, other_class};
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
    /// The options that it takes after a PCI address, besides [`PCI_OPTIONS`](super::PCI_OPTIONS).
    pub options: &'static [SchemeOption],
    /// Makes a device of the function. Options are known to be among `options` and [`PCI_OPTIONS`](super::PCI_OPTIONS), each given once.
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
}

/// The driver for devices with these ids: of several the last.
pub(super) fn driver_for(
    drivers: &[&'static PciDriver],
    vendor: u16,
    device: u16,
) -> Option<&'static PciDriver> {
    drivers.iter().rev().copied().find(|driver| driver.knows(vendor, device))
}

/// Opens the device at `at`, of one class if that is given. What can be refused before it is opened is, as opening resets it.
pub(super) fn open(
    drivers: &[&'static PciDriver],
    class: Option<Class>,
    address: &Address<'_>,
    at: PciAddress,
) -> Result<Device> {
    let host = Host::this().device(at)?;
    let (vendor, device) = (host.vendor_id(), host.device_id());
    let driver = driver_for(drivers, vendor, device)
        .ok_or_else(|| none_knows(drivers, address.text, vendor, device))?;
    if class.is_some_and(|class| class != driver.class) {
        return Err(other_class(address.text, driver.class));
    }
    address.check_options(&format!("a {} device", driver.name), OPTIONS.iter().chain(driver.options))?;
    let options =
        vfio::Options { vf_token: address.uuid("vf-token")?, unprotected: address.unprotected.cloned() };
    (driver.open)(PciDevice::open(at, &options)?, address)
}

/// The refusal of a device that no driver knows.
fn none_knows(drivers: &[&PciDriver], text: &str, vendor: u16, device: u16) -> Error {
    let mut known = String::new();
    for driver in drivers {
        let ids: Vec<_> =
            driver.ids.iter().map(|(vendor, device)| format!("{vendor:04x}:{device:04x}")).collect();
        let separator = if known.is_empty() { "" } else { "; " };
        let _ = write!(known, "{separator}{} {}", driver.name, ids.join(", "));
    }
    let why = format!("it is a {vendor:04x}:{device:04x}, and no driver knows that");
    Error::new(ErrorKind::Unsupported, format!("open {text:?}"), why)
        .mend(format!("take one that a driver knows ({known}): underpass devices lists them"))
}

#[cfg(test)]
mod tests {
    use crate::builtin;

    #[test]
    fn drivers_are_found_by_the_ids_of_their_devices() {
        let registry = builtin();
        let name = |vendor, device| registry.driver_for(vendor, device).map(|driver| driver.name);
        // Virtio 1.3, 4.1.2.1, and the kernel's idxd.
        for (vendor, device, driver) in [
            (0x1af4, 0x1041, Some("virtio-net")),
            (0x1af4, 0x1000, Some("virtio-net")),
            (0x1af4, 0x1042, None),
            (0x8086, 0x1041, None),
            (0x8086, 0x0b25, Some("dsa")),
            (0x8086, 0x11fb, Some("dsa")),
            (0x8086, 0x1212, Some("dsa")),
            (0x8086, 0x10d3, None),
        ] {
            assert_eq!(name(vendor, device), driver, "{vendor:04x}:{device:04x}");
        }
    }
}
