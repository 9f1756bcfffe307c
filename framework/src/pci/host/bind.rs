//! Giving devices to vfio-pci, and back to the kernel's own drivers.
//!
//! A device is bound by name (`driver_override`), so that no other device with the same ids moves with it. Nothing is kept of
//! the driver that it had: without an override the kernel chooses for itself, as it did at boot.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::{Host, HostDevice, VFIO_PCI, group, process, text};
use crate::pci::PciAddress;
use crate::{Error, ErrorKind, Result};

const BIND: &str = "bind it to vfio-pci";
const UNBIND: &str = "give it back to the kernel";

/// How [`bind`] and [`unbind`] go about it. The default is the careful way.
#[derive(Debug, Clone, Copy, Default)]
pub struct BindOptions {
    /// Take all of a device's IOMMU group along.
    pub whole_group: bool,
    /// Take devices that are in use, whatever that cuts off.
    pub force: bool,
}

/// What became of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Which one.
    pub address: PciAddress,
    /// The driver that it had.
    pub before: Option<String>,
    /// The driver that it has now.
    pub after: Option<String>,
}

/// Binds the devices at `addresses` to vfio-pci. What is bound already stays as it is.
///
/// Before anything is changed, every device is looked at. When binding one of them fails, those bound before go back to
/// their drivers.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a device, or vfio-pci, that is not there; [`ErrorKind::Unsupported`] for bridges, devices on
/// vfio-pci's denylist and such that no IOMMU holds; [`ErrorKind::Busy`] for a device that is in use or whose IOMMU group
/// has members that keep the kernel's drivers; [`ErrorKind::Permission`] for anybody but root; the kernel's refusal.
pub fn bind(host: &Host, addresses: &[PciAddress], options: BindOptions) -> Result<Vec<Change>> {
    Binder { host, write: &write }.bind(addresses, options)
}

/// Takes the devices at `addresses` from vfio-pci, and lets the kernel choose a driver for each. One that is not bound to
/// VFIO stays as it is.
///
/// With `force`, a device that a process has open is asked for, and the call returns when it is given back.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a device that is not there; [`ErrorKind::Busy`] for one of a group that a process has open;
/// [`ErrorKind::Permission`] for anybody but root; the kernel's refusal.
pub fn unbind(host: &Host, addresses: &[PciAddress], options: BindOptions) -> Result<Vec<Change>> {
    Binder { host, write: &write }.unbind(addresses, options)
}

/// Writes an attribute of sysfs: in one system call, into a file that is there.
fn write(attribute: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).truncate(true).open(attribute)?.write_all(value.as_bytes())
}

pub(super) struct Binder<'a> {
    pub(super) host: &'a Host,
    /// How an attribute is written. Tests put a kernel behind it.
    pub(super) write: &'a dyn Fn(&Path, &str) -> io::Result<()>,
}

/// A device as it was.
struct Before {
    device: HostDevice,
    /// The driver that it was meant for, if it was.
    meant_for: Option<String>,
}

impl Binder<'_> {
    pub(super) fn bind(&self, addresses: &[PciAddress], options: BindOptions) -> Result<Vec<Change>> {
        let (devices, ours) = self.chosen(addresses, options)?;
        let to_bind: Vec<_> = devices.iter().filter(|device| !device.is_vfio()).collect();
        for device in &to_bind {
            self.check(device, options)?;
            check_group(device, &ours)?;
        }
        let mut changed: Vec<Before> = Vec::with_capacity(to_bind.len());
        for device in to_bind {
            let before = Before { device: device.clone(), meant_for: driver_override(device) };
            let claimed = self
                .set_override(device, Some(VFIO_PCI))
                .map_err(|error| refused(device, BIND, "its driver can not be chosen", error));
            if claimed.is_ok() {
                changed.push(before);
            }
            if let Err(error) = claimed.and_then(|()| self.to_vfio(device)) {
                self.put_back(&changed);
                return Err(error);
            }
        }
        self.changes(&devices)
    }

    pub(super) fn unbind(&self, addresses: &[PciAddress], options: BindOptions) -> Result<Vec<Change>> {
        let (devices, _) = self.chosen(addresses, options)?;
        let bound: Vec<_> = devices.iter().filter(|device| device.is_vfio()).collect();
        for device in &bound {
            self.check_users(device, options)?;
        }
        // All of them leave VFIO first: the kernel lets no driver of its own into a group that a process may still use.
        let mut left = Vec::with_capacity(bound.len());
        let mut result = Ok(());
        for device in bound {
            result = self.to_no_driver(device);
            if result.is_err() {
                break;
            }
            left.push(device);
        }
        for device in left {
            let probed =
                (self.write)(&self.host.path("/sys/bus/pci/drivers_probe"), &device.address.to_string());
            let probed = probed
                .map_err(|error| refused(device, UNBIND, "the kernel did not look for a driver", error));
            result = result.and(probed);
        }
        result?;
        self.changes(&devices)
    }

    /// The devices to change, each once, and their addresses.
    fn chosen(
        &self,
        addresses: &[PciAddress],
        options: BindOptions,
    ) -> Result<(Vec<HostDevice>, BTreeSet<PciAddress>)> {
        let mut chosen = BTreeSet::new();
        let mut devices = Vec::new();
        for address in addresses {
            let device = self.host.device(*address)?;
            let members = if options.whole_group { group::members(&device) } else { Vec::new() };
            if chosen.insert(*address) {
                devices.push(device);
            }
            for member in
                members.iter().filter(|member| member.can_be_bound()).filter_map(group::Member::address)
            {
                if chosen.insert(member) {
                    devices.push(self.host.device(member)?);
                }
            }
        }
        Ok((devices, chosen))
    }

    /// Refuses what the kernel, or a careful operator, would not give away.
    fn check(&self, device: &HostDevice, options: BindOptions) -> Result<()> {
        if device.is_bridge() {
            let why = "it is a bridge, and the devices behind it need its kernel driver";
            return Err(device.error(ErrorKind::Unsupported, BIND, why).mend("bind the devices behind it"));
        }
        if !options.force {
            let uses = device.uses()?;
            if !uses.is_empty() {
                return Err(device
                    .error(ErrorKind::Busy, BIND, format!("it is in use: {}", some_of(&uses)))
                    .mend(format!(
                        "end that use; or, whatever it cuts off, run: sudo underpass bind --force {}",
                        device.address
                    )));
            }
        }
        self.check_vfio(device)
    }

    /// Refuses what vfio-pci would not take.
    fn check_vfio(&self, device: &HostDevice) -> Result<()> {
        let host = self.host;
        let denied = device.is_denylisted() && !host.takes_denylisted();
        if !host.has_vfio_pci() {
            let options = if denied { " disable_denylist=1" } else { "" };
            return Err(device.error(ErrorKind::NotFound, BIND, "the kernel's vfio-pci is not loaded").mend(format!(
                "run: sudo modprobe vfio-pci{options} (a kernel without that module needs CONFIG_VFIO_PCI)"
            )));
        }
        if denied {
            let why = "vfio-pci has it on its denylist: user space could bring the machine down with it";
            let is_module = host.path("/sys/module/vfio_pci/initstate").exists();
            let mend = if is_module {
                "if you trust the program, run: sudo modprobe -r vfio-pci && sudo modprobe vfio-pci disable_denylist=1"
            } else {
                "if you trust the program, add vfio_pci.disable_denylist=1 to the kernel's command line and boot again"
            };
            return Err(device.error(ErrorKind::Unsupported, BIND, why).mend(mend));
        }
        if device.iommu_group.is_none() && !host.takes_unprotected() {
            return Err(device.error(ErrorKind::Unsupported, BIND, "no IOMMU holds it").mend(format!(
                "{}; without an IOMMU, at the risk of all memory, run: \
                 echo 1 | sudo tee /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
                host.how_to_enable_iommu()
            )));
        }
        Ok(())
    }

    /// Refuses to take from under a process what it has open.
    fn check_users(&self, device: &HostDevice, options: BindOptions) -> Result<()> {
        if options.force {
            return Ok(());
        }
        for address in device.group_members().into_iter().chain([device.address]) {
            // The kernel would wait for it, deaf to signals.
            let Ok(member) = self.host.device(address) else { continue };
            let users = process::users(self.host, &member);
            if !users.is_empty() {
                return Err(member.error(ErrorKind::Busy, UNBIND, some_of(&users)).mend(format!(
                    "end it; or, to wait until it gives the device back, run: sudo underpass unbind --force {}",
                    device.address
                )));
            }
        }
        Ok(())
    }

    /// From whatever driver it has to vfio-pci, which it is meant for.
    fn to_vfio(&self, device: &HostDevice) -> Result<()> {
        let address = device.address.to_string();
        if let Some(driver) = device.kernel_driver() {
            (self.write)(&self.driver(driver, "unbind"), &address)
                .map_err(|error| refused(device, BIND, format!("{driver} does not let it go"), error))?;
        }
        // Not drivers_probe, which does not say why a driver refused.
        (self.write)(&self.driver(VFIO_PCI, "bind"), &address)
            .map_err(|error| refused(device, BIND, "vfio-pci refused it", error))
    }

    /// From VFIO to no driver, and to be had by any.
    fn to_no_driver(&self, device: &HostDevice) -> Result<()> {
        let meant_for = driver_override(device);
        self.set_override(device, None)
            .map_err(|error| refused(device, UNBIND, "its driver can not be chosen", error))?;
        let driver = device.kernel_driver().unwrap_or(VFIO_PCI);
        (self.write)(&self.driver(driver, "unbind"), &device.address.to_string()).map_err(|error| {
            if let Err(error) = self.set_override(device, meant_for.as_deref()) {
                tracing::error!("{}: its driver_override is lost: {error}", device.address);
            }
            refused(device, UNBIND, format!("{driver} does not let it go"), error)
        })
    }

    /// Makes devices what they were, the last one first. What does not work is told.
    fn put_back(&self, changed: &[Before]) {
        for before in changed.iter().rev() {
            let device = &before.device;
            let address = device.address.to_string();
            let failed = |what: String, error: &io::Error| {
                tracing::error!(
                    "{address}: it could not be put back: {what}: {error}; run: sudo underpass unbind {address}"
                );
            };
            let now = self.host.device(device.address).ok();
            let now = now.as_ref().and_then(|now| now.kernel_driver());
            let is_home = now == device.kernel_driver();
            if let Some(driver) = now.filter(|_| !is_home)
                && let Err(error) = (self.write)(&self.driver(driver, "unbind"), &address)
            {
                failed(format!("{driver} does not let it go"), &error);
                continue;
            }
            if let Err(error) = self.set_override(device, before.meant_for.as_deref()) {
                failed("its driver can not be chosen".to_owned(), &error);
            }
            if let Some(driver) = device.kernel_driver().filter(|_| !is_home)
                && let Err(error) = (self.write)(&self.driver(driver, "bind"), &address)
            {
                failed(format!("{driver} does not take it"), &error);
            }
        }
    }

    fn set_override(&self, device: &HostDevice, driver: Option<&str>) -> io::Result<()> {
        // An empty line takes the override away; writing nothing would not call the kernel at all.
        (self.write)(&device.folder.join("driver_override"), &format!("{}\n", driver.unwrap_or_default()))
    }

    fn driver(&self, name: &str, attribute: &str) -> PathBuf {
        self.host.path("/sys/bus/pci/drivers").join(name).join(attribute)
    }

    fn changes(&self, devices: &[HostDevice]) -> Result<Vec<Change>> {
        let change = |before: &HostDevice| {
            let after = self.host.device(before.address)?;
            Ok(Change {
                address: before.address,
                before: before.kernel_driver.clone(),
                after: after.kernel_driver.clone(),
            })
        };
        devices.iter().map(change).collect()
    }
}

/// Refuses a device whose group has other members, not among `chosen`, that the kernel keeps for itself.
fn check_group(device: &HostDevice, chosen: &BTreeSet<PciAddress>) -> Result<()> {
    let Some(number) = device.iommu_group else { return Ok(()) };
    let is_chosen =
        |member: &group::Member| member.address().is_some_and(|address| chosen.contains(&address));
    let mut others = group::members(device);
    others.retain(|member| member.is_in_the_way() && !is_chosen(member));
    if others.is_empty() {
        return Ok(());
    }
    let shown: Vec<_> = others
        .iter()
        .map(|member| format!("{} ({})", member.name(), member.driver().unwrap_or("-")))
        .collect();
    let why = format!(
        "the IOMMU can not tell it from others that the kernel uses: group {number} also has {}",
        shown.join(", ")
    );
    let mend = if others.iter().all(group::Member::can_be_bound) {
        format!("to bind all of the group, run: sudo underpass bind --group {}", device.address)
    } else {
        "put the device into another slot, one with ACS in every bridge above it".to_owned()
    };
    Err(device.error(ErrorKind::Busy, BIND, why).mend(mend))
}

/// The driver that the device is meant for, if that was set.
fn driver_override(device: &HostDevice) -> Option<String> {
    text(&device.folder.join("driver_override")).filter(|name| !name.is_empty() && name != "(null)")
}

fn refused(
    device: &HostDevice,
    operation: &'static str,
    why: impl Into<std::borrow::Cow<'static, str>>,
    error: io::Error,
) -> Error {
    let command = if operation == BIND { "bind" } else { "unbind" };
    let mend = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            format!("only root may: run: sudo underpass {command} {}", device.address)
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            format!("in a container, run it on the host: sudo underpass {command} {}", device.address)
        }
        _ => "the kernel's log says more: sudo dmesg | tail".to_owned(),
    };
    Error::os(operation, why, error).device(device.address.to_string()).mend(mend)
}

/// The first few of a list that may be long.
fn some_of(lines: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = lines[..lines.len().min(SHOWN)].join(", ");
    if lines.len() > SHOWN { format!("{shown}, and {} more", lines.len() - SHOWN) } else { shown }
}
