//! `underpass bind` and `underpass unbind`: devices to vfio-pci, and back to the kernel's drivers.

mod owner;

use serde::Serialize;
use underpass::pci::PciAddress;
use underpass::pci::host::{self, BindOptions, Change, Host, HostDevice};
use underpass_drivers::registry::Class;

pub(crate) use self::owner::{CONTAINER, IOMMU};
use self::owner::{Granted, User};
use crate::devices::driver_for;
use crate::interrupt::Stop;

/// Give PCI devices to user space: bind them to vfio-pci
///
/// Refuses what would cut the machine off: a network interface with an address or a default route, a mounted disk or
/// one that is part of something in use, virtual functions of its own, and the other devices of its IOMMU group. It
/// needs root, and holds until `unbind` or the next boot. When it fails, all devices are as before.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BindArgs {
    /// PCI addresses: 0000:3b:00.0 or 3b:00.0
    #[arg(required = true, value_name = "ADDRESS", value_parser = address)]
    addresses: Vec<PciAddress>,
    /// Bind all of each device's IOMMU group, but for bridges
    #[arg(long)]
    group: bool,
    /// Bind devices that are in use too, whatever that cuts off
    #[arg(long)]
    force: bool,
    /// Let this user, a name or a number, drive the devices without root: gives it the devices' files, and /dev/iommu if
    /// that is root's
    #[arg(long, value_name = "USER")]
    owner: Option<String>,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

/// Give PCI devices back to the kernel, which chooses their drivers as it does at boot
///
/// A device that a process still drives is left with it. It needs root.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct UnbindArgs {
    /// PCI addresses: 0000:3b:00.0 or 3b:00.0
    #[arg(required = true, value_name = "ADDRESS", value_parser = address)]
    addresses: Vec<PciAddress>,
    /// Give back all of each device's IOMMU group
    #[arg(long)]
    group: bool,
    /// Ask a process that has the device open to give it back, and wait until it does
    #[arg(long)]
    force: bool,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

fn address(text: &str) -> Result<PciAddress, String> {
    text.parse().map_err(|_| "an address is domain:bus:device.function: 0000:3b:00.0".to_owned())
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Device>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<Granted>,
}

#[derive(Debug, Serialize)]
struct Device {
    address: String,
    /// The driver that it had, and has now.
    before: Option<String>,
    kernel_driver: Option<String>,
    iommu_group: Option<u32>,
    cdev: Option<String>,
    /// The driver here that knows it.
    driver: Option<&'static str>,
    /// What drives it from the command line.
    #[serde(skip)]
    command: Option<String>,
}

impl Device {
    fn new(change: &Change, device: &HostDevice) -> Self {
        let driver = driver_for(device);
        Self {
            address: device.address().to_string(),
            before: change.before.clone(),
            kernel_driver: change.after.clone(),
            iommu_group: device.iommu_group(),
            cdev: device.cdev().map(|path| path.display().to_string()),
            driver: driver.map(|driver| driver.name),
            command: driver.map(|driver| {
                let command = match driver.class {
                    Class::Port => "forward --port",
                    Class::Accelerator => "copy --device",
                };
                let trust = if device.is_unprotected() { " --allow-unsafe-noiommu" } else { "" };
                format!("{} {command} {}{trust}", crate::command_name(), device.address())
            }),
        }
    }

    fn line(&self) -> String {
        let name = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "no driver".to_owned());
        if self.before == self.kernel_driver {
            return format!("{}: already with {}", self.address, name(&self.before));
        }
        format!("{}: {} -> {}", self.address, name(&self.before), name(&self.kernel_driver))
    }
}

/// What lets this user drive the device at `address`.
pub(crate) fn command(address: &str) -> String {
    if rustix::process::geteuid().is_root() {
        return format!("{} bind {address}", crate::command_name());
    }
    format!("sudo {} bind --owner $USER {address}", crate::command_for_sudo())
}

/// Runs `underpass bind`.
pub(crate) fn bind(args: &BindArgs) -> anyhow::Result<()> {
    let host = Host::this();
    let user = args.owner.as_deref().map(|name| User::find(&host, name)).transpose()?;
    if let Some(user) = &user {
        user.check(&host)?;
    }
    // Nothing is left half done by Ctrl-C.
    Stop::install()?;
    let options = BindOptions { whole_group: args.group, force: args.force };
    let changes = host::bind(&host, &args.addresses, options)?;
    let devices = read(&host, &changes)?;
    let owner = match user.map(|user| user.grant(&host, &devices)).transpose() {
        Ok(owner) => owner,
        Err(error) => {
            let new = changes.iter().filter(|change| change.before != change.after);
            let new: Vec<_> = new.map(|change| change.address).collect();
            if let Err(error) = host::unbind(&host, &new, BindOptions::default()) {
                tracing::error!("{error}");
            }
            return Err(error);
        }
    };
    let report = Report::new(&changes, &devices, owner);
    report.print(args.json, |device| Some(format!("To drive it: {}", device.command.as_ref()?)))
}

/// Runs `underpass unbind`.
pub(crate) fn unbind(args: &UnbindArgs) -> anyhow::Result<()> {
    let host = Host::this();
    if !args.force {
        Stop::install()?;
    }
    let options = BindOptions { whole_group: args.group, force: args.force };
    let changes = host::unbind(&host, &args.addresses, options)?;
    let devices = read(&host, &changes)?;
    Report::new(&changes, &devices, None).print(args.json, |device| match device.kernel_driver.as_deref() {
        None => Some(format!(
            "No driver of the kernel took {address}. If one should, its module may not be loaded: sudo modprobe $(cat \
             /sys/bus/pci/devices/{address}/modalias)",
            address = device.address
        )),
        Some(host::VFIO_PCI) => Some(format!(
            "vfio-pci took {} again: it was given these ids (see /etc/modprobe.d and vfio-pci.ids= on the kernel's \
             command line)",
            device.address
        )),
        Some(_) => None,
    })
}

/// The devices as they are now.
fn read(host: &Host, changes: &[Change]) -> anyhow::Result<Vec<HostDevice>> {
    Ok(changes.iter().map(|change| host.device(change.address)).collect::<Result<_, _>>()?)
}

impl Report {
    fn new(changes: &[Change], devices: &[HostDevice], owner: Option<Granted>) -> Self {
        let devices = changes.iter().zip(devices).map(|(change, device)| Device::new(change, device));
        Self { devices: devices.collect(), owner }
    }

    /// `advice`: what there is to say of one device.
    fn print(&self, json: bool, advice: impl Fn(&Device) -> Option<String>) -> anyhow::Result<()> {
        if json {
            return crate::print(&format!("{}\n", serde_json::to_string(self)?));
        }
        let lines = self.devices.iter().map(Device::line);
        let owner = self.owner.iter().flat_map(Granted::lines);
        let advice = self.devices.iter().filter_map(advice);
        crate::print(&lines.chain(owner).chain(advice).map(|line| line + "\n").collect::<String>())
    }
}
