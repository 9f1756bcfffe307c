//! Where a PCI function is: domain, bus, device, function.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind, Result};

/// The address of a PCI function, as Linux writes it: `0000:3b:00.0`.
///
/// The domain is what the ACPI tables call a segment. It has more than four digits where the kernel makes domains up
/// (those behind Intel's VMD, for one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// Puts it together; `None` unless the device is below 32 and the function below 8.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self { domain, bus, device, function }) } else { None }
    }

    /// The domain, or segment.
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// The bus in the domain.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device on the bus, below 32.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// The function of the device, below 8.
    pub const fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// Reads `0000:3b:00.0`, or `3b:00.0` in domain 0.
impl FromStr for PciAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                "read a PCI address",
                format!("{text:?} is not domain:bus:device.function in hexadecimal"),
            )
            .mend("write it as 0000:3b:00.0; to list the devices, run: underpass devices")
        })
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (slot, function) = text.rsplit_once('.')?;
    let numbers: Vec<_> = slot.split(':').collect();
    let (domain, bus, device) = match numbers[..] {
        [bus, device] => ("0000", bus, device),
        [domain, bus, device] => (domain, bus, device),
        _ => return None,
    };
    // The kernel takes no shorter forms, and an abbreviation could be another device than was meant.
    let domain = (4..=8).contains(&domain.len()).then(|| hex(domain))??;
    let number = |text: &str, digits| (text.len() == digits).then(|| hex(text)).flatten();
    PciAddress::new(domain, number(bus, 2)? as u8, number(device, 2)? as u8, number(function, 1)? as u8)
}

fn hex(text: &str) -> Option<u32> {
    // A sign in front would be taken.
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_linux_writes_them() {
        for (text, shown) in [
            ("0000:3b:00.0", "0000:3b:00.0"),
            ("3b:00.0", "0000:3b:00.0"),
            ("0001:FF:1f.7", "0001:ff:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("ffffffff:00:01.1", "ffffffff:00:01.1"),
        ] {
            let address: PciAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), shown);
        }
        let address: PciAddress = "0002:3b:1e.5".parse().unwrap();
        let parts = (address.domain(), address.bus(), address.device(), address.function());
        assert_eq!(parts, (2, 0x3b, 0x1e, 5));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_form_of_one() {
        for text in [
            "",
            ".",
            "0",
            "3b.0",
            "0000:3b:00",
            "0:3b:00.0",
            "000000000:3b:00.0",
            "3b:0.0",
            "3b:000.0",
            "3b:00.8",
            "3b:20.0",
            "3b:00.00",
            "3b:00.",
            "+b:00.0",
            "3b:+1.0",
            "+000:3b:00.0",
            "xyzw:3b:00.0",
            "0000:3b:00.0 ",
            "0000:3b:00.0/../x",
            "0:0:0:0.0",
            "é:00.0",
        ] {
            let error = text.parse::<PciAddress>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.mend_text().is_some_and(|mend| mend.contains("0000:3b:00.0")), "{error}");
        }
    }

    #[test]
    fn they_are_in_the_order_of_the_buses() {
        let mut addresses = ["0001:00:00.0", "0000:10:00.0", "0000:02:1f.0", "0000:02:03.1", "0000:02:03.0"]
            .map(|text| text.parse::<PciAddress>().unwrap());
        addresses.sort();
        let shown = addresses.map(|address| address.to_string());
        assert_eq!(shown, ["0000:02:03.0", "0000:02:03.1", "0000:02:1f.0", "0000:10:00.0", "0001:00:00.0"]);
    }
}
