//! From an address that a user writes to an open device: the one place that knows both drivers and models.
//!
//! ```
//! # fn main() -> underpass::Result<()> {
//! let device = underpass_drivers::builtin().open("soft:dsa,wqs=2")?;
//! println!("{} is driven by {}", device.name(), device.driver());
//! # Ok(())
//! # }
//! ```

mod pci;
mod schemes;

use std::ops::RangeInclusive;
use std::str::FromStr;

use underpass::accel::Accelerator;
use underpass::iommu::UnprotectedDma;
use underpass::net::{MacAddr, Port};
use underpass::{Error, ErrorKind, Result, worker};

pub use pci::{OPTIONS as PCI_OPTIONS, PciDriver};

/// A kind of address and what opens it.
#[derive(Debug, Clone, Copy)]
pub struct Scheme {
    /// The address without its options: "soft:dsa".
    pub name: &'static str,
    /// What is behind it, in one line.
    pub what: &'static str,
    /// The class of what it opens.
    pub class: Class,
    /// The options that it takes.
    pub options: &'static [SchemeOption],
    /// Opens it. Options are known to be among `options`, each given once.
    pub open: fn(&Address<'_>) -> Result<Device>,
}

/// What a device is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// It does jobs on memory.
    Accelerator,
    /// It sends and receives packets.
    Port,
}

/// An open device, by its class.
#[derive(Debug)]
pub enum Device {
    /// One that does jobs on memory.
    Accelerator(Box<dyn Accelerator>),
    /// One that sends and receives packets.
    Port(Box<dyn Port>),
}

/// An option of a [`Scheme`].
#[derive(Debug, Clone, Copy)]
pub struct SchemeOption {
    /// What stands before the equals sign.
    pub name: &'static str,
    /// What stands after it, for people: "N", "dedicated|shared".
    pub values: &'static str,
    /// What it does, in one line.
    pub what: &'static str,
}

/// An address taken apart.
#[derive(Debug, Clone)]
pub struct Address<'a> {
    text: &'a str,
    name: &'a str,
    options: Vec<(&'a str, &'a str)>,
    core: Option<usize>,
    unprotected: Option<&'a UnprotectedDma>,
}

impl<'a> Address<'a> {
    fn parse(text: &'a str, core: Option<usize>, unprotected: Option<&'a UnprotectedDma>) -> Result<Self> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let options = parts
            .map(|part| {
                part.split_once('=').ok_or_else(|| {
                    invalid(text, format!("option {part:?} has no value")).mend("write it as name=value")
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { text, name, options, core, unprotected })
    }

    /// The whole address, as the user gave it.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// The value of an option, if it was given.
    pub fn option(&self, name: &str) -> Option<&'a str> {
        self.options.iter().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// The value of an option that is a number.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is not a number in `range`.
    pub fn number<N>(&self, name: &str, range: RangeInclusive<N>) -> Result<Option<N>>
    where
        N: FromStr + PartialOrd + std::fmt::Display,
    {
        let Some(value) = self.option(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(invalid(self.text, format!("{name}={value} is not a number it can have"))
                .mend(format!("{name} is a number from {} to {}", range.start(), range.end()))),
        }
    }

    /// The value of an option that is a MAC address of one station.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is none.
    pub fn mac(&self, name: &str) -> Result<Option<MacAddr>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        match value.parse::<MacAddr>() {
            Ok(mac) if !mac.is_multicast() => Ok(Some(mac)),
            _ => Err(invalid(self.text, format!("{name}={value} is not the address of one station"))
                .mend(format!("{name} is written as 02:00:00:00:00:01"))),
        }
    }

    /// The value of an option that is a UUID, its bytes as they are written.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is none.
    pub fn uuid(&self, name: &str) -> Result<Option<[u8; 16]>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        uuid(value).map(Some).ok_or_else(|| {
            invalid(self.text, format!("{name}={value} is no UUID"))
                .mend(format!("{name} is written as 3ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f59"))
        })
    }

    /// The opener's word for devices that no IOMMU holds back, if it has given that
    /// ([`Registry::with_unprotected_dma`]).
    pub fn unprotected_dma(&self) -> Option<&'a UnprotectedDma> {
        self.unprotected
    }

    /// The core that a software device's threads are to run on: that of the option `core`, else the opener's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is not a number; [`ErrorKind::NotFound`] for a core that this process does not
    /// have. The mend lists those that it has.
    pub fn core(&self) -> Result<Option<usize>> {
        let Some(value) = self.option("core") else { return Ok(self.core) };
        let Ok(core) = value.parse() else {
            let cores: Vec<_> = worker::cores().iter().map(ToString::to_string).collect();
            return Err(invalid(self.text, format!("core={value} is not a core"))
                .mend(format!("core can be: {}", cores.join(", "))));
        };
        worker::check_core(core).map_err(|error| error.device(self.text.to_owned()))?;
        Ok(Some(core))
    }

    /// The value of an option that has names for its values.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is none of them.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.option(name) else { return Ok(None) };
        match choices.iter().find(|(choice, _)| *choice == value) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => Err(invalid(self.text, format!("{name}={value} is not known"))
                .mend(format!("{name} can be: {}", listed(choices.iter().map(|(choice, _)| *choice))))),
        }
    }

    /// Refuses options that are not `known` of `what`, or that are given twice.
    fn check_options<'b>(
        &self,
        what: &str,
        known: impl Iterator<Item = &'b SchemeOption> + Clone,
    ) -> Result<()> {
        for (at, (name, _)) in self.options.iter().enumerate() {
            if !known.clone().any(|known| known.name == *name) {
                let known = listed(known.map(|option| option.name));
                return Err(invalid(self.text, format!("it has no option {name:?}"))
                    .mend(format!("options of {what}: {known}")));
            }
            if self.options[..at].iter().any(|(earlier, _)| earlier == name) {
                return Err(
                    invalid(self.text, format!("option {name:?} is given twice")).mend("give it once")
                );
            }
        }
        Ok(())
    }
}

fn invalid(address: &str, why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("open {address:?}"), why)
}

/// Five groups of hexadecimal digits (RFC 9562, section 4).
fn uuid(text: &str) -> Option<[u8; 16]> {
    let groups: Vec<_> = text.split('-').collect();
    let is_right = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|group| group.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let number = u128::from_str_radix(&groups.concat(), 16).ok()?;
    is_right.then_some(number.to_be_bytes())
}

/// The refusal of a device of this class where one of the other is wanted.
fn other_class(address: &str, class: Class) -> Error {
    let (why, mend) = match class {
        Class::Port => {
            ("it is a network port, not an accelerator", "try soft:dsa; for packets: underpass forward")
        }
        Class::Accelerator => (
            "it is an accelerator, not a network port",
            "try soft:virtio-net; for an accelerator: underpass copy",
        ),
    };
    invalid(address, why.to_owned()).mend(mend)
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The addresses that can be opened, and the drivers of PCI devices.
#[derive(Debug, Clone)]
pub struct Registry {
    schemes: Vec<&'static Scheme>,
    drivers: Vec<&'static PciDriver>,
    unprotected: Option<UnprotectedDma>,
}

/// The registry with all that this crate has.
pub fn builtin() -> Registry {
    Registry { schemes: schemes::ALL.to_vec(), drivers: pci::ALL.to_vec(), unprotected: None }
}

impl Registry {
    /// The registry with one more scheme. Of two with the same name, the later one is opened.
    #[must_use]
    pub fn with(mut self, scheme: &'static Scheme) -> Self {
        self.schemes.push(scheme);
        self
    }

    /// The registry with one more driver of PCI devices. Of two that know the same device, the later one drives it.
    #[must_use]
    pub fn with_driver(mut self, driver: &'static PciDriver) -> Self {
        self.drivers.push(driver);
        self
    }

    /// The driver for PCI devices with these ids, if there is one.
    pub fn driver_for(&self, vendor: u16, device: u16) -> Option<&'static PciDriver> {
        pci::driver_for(&self.drivers, vendor, device)
    }

    /// The registry, which also opens PCI devices that no IOMMU holds back. Without this they are refused.
    #[must_use]
    pub fn with_unprotected_dma(mut self, token: UnprotectedDma) -> Self {
        self.unprotected = Some(token);
        self
    }

    /// Opens the accelerator at `address`, as the user wrote it: a scheme's name, and its options after commas.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an address, option or value that is not known (the message lists those that
    /// are), and for a device of another class; [`ErrorKind::NotFound`] for a core that does not exist; what opening the
    /// device gives.
    pub fn open(&self, address: &str) -> Result<Box<dyn Accelerator>> {
        self.open_on(address, None)
    }

    /// [`open`](Self::open), with a `core` for a software device's threads where the address names none. The device
    /// keeps the name that the user gave it.
    pub fn open_on(&self, address: &str, core: Option<usize>) -> Result<Box<dyn Accelerator>> {
        match self.open_as(Some(Class::Accelerator), address, core)? {
            Device::Accelerator(device) => Ok(device),
            Device::Port(_) => Err(other_class(address, Class::Port)),
        }
    }

    /// Opens the network port at `address`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_port(&self, address: &str) -> Result<Box<dyn Port>> {
        match self.open_as(Some(Class::Port), address, None)? {
            Device::Port(port) => Ok(port),
            Device::Accelerator(_) => Err(other_class(address, Class::Accelerator)),
        }
    }

    /// Opens the device at `address`, whatever its class, with a `core` for a software device's threads where the address
    /// names none.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_device(&self, address: &str, core: Option<usize>) -> Result<Device> {
        self.open_as(None, address, core)
    }

    /// Opens a device, of one class if that is given: one of another is refused before anything is built.
    fn open_as(&self, class: Option<Class>, address: &str, core: Option<usize>) -> Result<Device> {
        let address = Address::parse(address, core, self.unprotected.as_ref())?;
        if let Some(scheme) = self.schemes.iter().rev().find(|scheme| scheme.name == address.name) {
            if class.is_some_and(|class| class != scheme.class) {
                return Err(other_class(address.text, scheme.class));
            }
            address.check_options(scheme.name, scheme.options.iter())?;
            return (scheme.open)(&address);
        }
        if let Ok(at) = address.name.parse() {
            return pci::open(&self.drivers, class, &address, at);
        }
        let known = listed(self.schemes.iter().map(|scheme| scheme.name));
        Err(invalid(address.text, "no such kind of device is known".to_owned())
            .mend(format!("known are: {known}, and PCI addresses such as 0000:3b:00.0")))
    }

    /// What can be opened, for help texts.
    pub fn known(&self) -> impl Iterator<Item = &'static Scheme> {
        self.schemes.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(address: &str) -> Error {
        builtin().open(address).map(|device| device.name().to_owned()).unwrap_err()
    }

    #[test]
    fn what_is_not_known_is_refused_with_a_list_of_what_is() {
        let error = refused("dsa");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(
            error.mend_text(),
            Some("known are: cpu, soft:dsa, soft:virtio-net, and PCI addresses such as 0000:3b:00.0")
        );
        assert_eq!(refused("").kind(), ErrorKind::InvalidInput);

        let error = refused("soft:dsa,wq=1");
        assert!(error.to_string().contains("no option \"wq\""), "{error}");
        assert_eq!(error.mend_text(), Some("options of soft:dsa: wqs, engines, mode, pasids, check, core"));
        assert_eq!(refused("cpu,core=1").mend_text(), Some("options of cpu: none"));
    }

    #[test]
    fn a_value_that_can_not_be_is_refused_with_those_that_can() {
        for (address, mend) in [
            ("soft:dsa,wqs=0", "wqs is a number from 1 to 32"),
            ("soft:dsa,wqs=33", "wqs is a number from 1 to 32"),
            ("soft:dsa,wqs=many", "wqs is a number from 1 to 32"),
            ("soft:dsa,wqs=-1", "wqs is a number from 1 to 32"),
            ("soft:dsa,wqs=", "wqs is a number from 1 to 32"),
            ("soft:dsa,engines=33", "engines is a number from 1 to 32"),
            ("soft:dsa,mode=open", "mode can be: dedicated, shared"),
            ("soft:dsa,check=all", "check can be: leases"),
            ("soft:dsa,check", "write it as name=value"),
            ("soft:dsa,", "write it as name=value"),
        ] {
            let error = refused(address);
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{address}");
            assert_eq!(error.mend_text(), Some(mend), "{address}");
        }
        let error = refused("soft:dsa,wqs=1,wqs=2");
        assert!(error.to_string().contains("given twice"), "{error}");
        assert_eq!(error.mend_text(), Some("give it once"));

        let error = refused("soft:dsa,core=100000");
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("100000"), "{error}");
        let last = worker::cores().last().unwrap().to_string();
        for address in ["soft:dsa,core=100000", "soft:dsa,core=first", "soft:dsa,core=-1"] {
            let error = refused(address);
            assert!(error.mend_text().unwrap().ends_with(&last), "{error}");
        }
    }

    #[test]
    fn a_pci_address_that_nothing_is_at_is_told_so() {
        // The domain is higher than any that firmware or a kernel hands out.
        for address in ["fffffff0:3b:00.0", "fffffff0:6a:01.0,vf-token=none"] {
            assert_eq!(refused(address).kind(), ErrorKind::NotFound, "{address}");
            let error = builtin().open_port(address).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{address}");
        }
        for address in ["0000:3b:00", "3b.0", "xyz:3b:00.0", "0000:3b:00.00", "0:0:0:0.0"] {
            assert_eq!(refused(address).kind(), ErrorKind::InvalidInput, "{address}");
        }
    }

    #[test]
    fn a_uuid_is_read_in_its_one_form() {
        let bytes =
            [0x3a, 0xc6, 0xd6, 0xc6, 0xc2, 0xb0, 0x47, 0xd5, 0xa6, 0xa4, 0x1f, 0x4e, 0x5c, 0x8f, 0x2f, 0x59];
        assert_eq!(uuid("3ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f59"), Some(bytes));
        assert_eq!(uuid("3AC6D6C6-C2B0-47D5-A6A4-1F4E5C8F2F59"), Some(bytes));
        for text in [
            "",
            "3ac6d6c6c2b047d5a6a41f4e5c8f2f59",
            "3ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f5",
            "3ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f5g",
            "+ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f59",
            "{3ac6d6c6-c2b0-47d5-a6a4-1f4e5c8f2f59}",
        ] {
            assert_eq!(uuid(text), None, "{text}");
        }
    }

    #[test]
    fn a_device_of_another_class_is_refused() {
        const BUILDS: Scheme = Scheme {
            name: "mine",
            what: "must not be built",
            class: Class::Accelerator,
            options: &[],
            open: |_| panic!("built"),
        };
        let error = builtin().with(&BUILDS).open_port("mine").map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let error = builtin().open_port("soft:dsa").map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("not a network port"), "{error}");
    }

    #[test]
    fn options_reach_the_device() {
        let device = builtin().open("soft:dsa,wqs=3,engines=2,check=leases,pasids=7").unwrap();
        assert_eq!(device.name(), "soft:dsa,wqs=3,engines=2,check=leases,pasids=7");
        assert_eq!(device.driver(), "dsa");
        assert_eq!(device.max_channels(), 3);
        assert_eq!(builtin().open("soft:dsa").unwrap().max_channels(), 8);
    }

    #[test]
    fn a_scheme_of_ones_own_can_be_added_and_wins() {
        const MINE: Scheme = Scheme {
            name: "cpu",
            what: "refuses",
            class: Class::Accelerator,
            options: &[SchemeOption { name: "why", values: "TEXT", what: "the reason" }],
            open: |address| Err(invalid(address.text(), address.option("why").unwrap_or("none").to_owned())),
        };
        let error = builtin().with(&MINE).open("cpu,why=because").map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
        assert_eq!(builtin().known().count(), schemes::ALL.len());
    }
}
