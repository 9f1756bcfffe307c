//! What PCI vendors, devices and classes are called, by the list that comes with pciutils and hwdata.

use std::fs;

use underpass::pci::host::{Host, HostDevice};

/// Where systems keep the list.
const FILES: [&str; 4] = [
    "/usr/share/misc/pci.ids",
    "/usr/share/hwdata/pci.ids",
    "/usr/share/pci.ids",
    "/var/lib/pciutils/pci.ids",
];

/// What the base classes are called where there is no list (PCI Code and ID Assignment Specification 1.15, section 1).
const CLASSES: [(u32, &str); 12] = [
    (0x01, "mass storage controller"),
    (0x02, "network controller"),
    (0x03, "display controller"),
    (0x04, "multimedia controller"),
    (0x05, "memory controller"),
    (0x06, "bridge"),
    (0x07, "communication controller"),
    (0x08, "system peripheral"),
    (0x0b, "processor"),
    (0x0c, "serial bus controller"),
    (0x10, "encryption controller"),
    (0x12, "processing accelerator"),
];

/// The list of names; empty where the system has none.
#[derive(Debug, Default)]
pub(crate) struct PciNames(String);

impl PciNames {
    pub(crate) fn read(host: &Host) -> Self {
        let bytes = FILES.iter().find_map(|file| fs::read(host.path(file)).ok()).unwrap_or_default();
        Self(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The names of a device and its vendor.
    pub(crate) fn device(&self, vendor: u16, device: u16) -> Option<String> {
        let (vendor, device) = self.pair(&format!("{vendor:04x}  "), &format!("\t{device:04x}  "))?;
        Some(device.map_or_else(|| vendor.to_owned(), |device| format!("{vendor} {device}")))
    }

    /// What a device of this class is.
    pub(crate) fn class(&self, class: u32) -> Option<&str> {
        let (base, sub) = (class >> 16, class >> 8 & 0xff);
        if let Some((base, sub)) = self.pair(&format!("C {base:02x}  "), &format!("\t{sub:02x}  ")) {
            return Some(sub.unwrap_or(base));
        }
        CLASSES.iter().find(|(known, _)| *known == base).map(|(_, name)| *name)
    }

    /// What a person calls the device, at best.
    pub(crate) fn of(&self, device: &HostDevice) -> Option<String> {
        self.device(device.vendor_id(), device.device_id())
    }

    /// What stands behind `first` at the start of a line, and behind `second` below it.
    fn pair(&self, first: &str, second: &str) -> Option<(&str, Option<&str>)> {
        let mut lines = self.0.lines();
        let upper = lines.by_ref().find_map(|line| line.strip_prefix(first))?;
        let below =
            lines.take_while(|line| line.starts_with('\t') || line.starts_with('#') || line.is_empty());
        let lower = below.into_iter().find_map(|line| line.strip_prefix(second));
        Some((upper.trim(), lower.map(str::trim)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# comment\n\n1af4  Red Hat, Inc.\n\t1000  Virtio network device\n\t\t01de fffb  not this one\n\
                        # between\n\t1041  Virtio 1.0 network device\n8086  Intel Corporation\n\
                        \t1000  82542 Gigabit Ethernet Controller\n\nC 02  Network controller\n\
                        \t00  Ethernet controller\n\t80  Network controller\nC 10  Encryption controller\n";

    #[test]
    fn names_are_found_below_their_vendor_and_class() {
        let names = PciNames(LIST.to_owned());
        let device = |vendor, device| names.device(vendor, device);
        assert_eq!(device(0x1af4, 0x1041).as_deref(), Some("Red Hat, Inc. Virtio 1.0 network device"));
        assert_eq!(
            device(0x8086, 0x1000).as_deref(),
            Some("Intel Corporation 82542 Gigabit Ethernet Controller")
        );
        assert_eq!(device(0x1af4, 0x01de).as_deref(), Some("Red Hat, Inc."), "a subsystem is no device");
        assert_eq!(device(0x8086, 0x1041).as_deref(), Some("Intel Corporation"), "of its own vendor only");
        assert_eq!(device(0x1b36, 0x0001), None);
        assert_eq!(names.class(0x02_0000), Some("Ethernet controller"));
        assert_eq!(names.class(0x10_8000), Some("Encryption controller"));
        assert_eq!(PciNames::default().class(0x12_0000), Some("processing accelerator"));
        assert_eq!(PciNames::default().device(0x8086, 0x1000), None);
    }
}
