//! `underpass devices`: the PCI devices of this machine, and which of them can be driven.

use comfy_table::{Table, presets};
use serde::Serialize;
use underpass::pci::host::{Host, HostDevice};
use underpass_drivers::registry::PciDriver;

use crate::pci_names::PciNames;

/// List PCI devices: ids, names, kernel driver, IOMMU group, and the driver here that knows them
///
/// Without --all: those that a driver here knows, network devices, accelerators, and what is bound to VFIO.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// List all PCI devices
    #[arg(long)]
    all: bool,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    devices: Vec<Device>,
    /// Devices that are not listed.
    #[serde(skip)]
    others: usize,
}

/// A device. The keys up to `driver` are relied on by others: more may be added, none renamed.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_field_names, reason = "the keys are given")]
struct Device {
    address: String,
    /// Ids and class as `lspci -n` writes them, the class with its programming interface: "8086", "0b25", "088000".
    vendor: String,
    device: String,
    class: String,
    /// `None` where the system has no list of names.
    name: Option<String>,
    kernel_driver: Option<String>,
    iommu_group: Option<u32>,
    cdev: Option<String>,
    numa_node: Option<u32>,
    /// The driver here that knows it.
    driver: Option<&'static str>,
    class_name: Option<String>,
    /// Network interfaces that its kernel driver made of it.
    interfaces: Vec<String>,
    /// Whether it could be driven, and nobody uses it.
    #[serde(skip)]
    is_waiting: bool,
}

impl Device {
    fn new(device: &HostDevice, names: &PciNames) -> Self {
        let driver = driver_for(device);
        Self {
            address: device.address().to_string(),
            vendor: format!("{:04x}", device.vendor_id()),
            device: format!("{:04x}", device.device_id()),
            class: format!("{:06x}", device.class()),
            name: names.of(device),
            kernel_driver: device.kernel_driver().map(str::to_owned),
            iommu_group: device.iommu_group(),
            cdev: device.cdev().map(|path| path.display().to_string()),
            numa_node: device.numa_node(),
            driver: driver.map(|driver| driver.name),
            class_name: names.class(device.class()).map(str::to_owned),
            interfaces: device.interfaces(),
            is_waiting: driver.is_some() && is_free(device),
        }
    }
}

/// The driver here that knows the device.
pub(crate) fn driver_for(device: &HostDevice) -> Option<&'static PciDriver> {
    underpass_drivers::builtin().driver_for(device.vendor_id(), device.device_id())
}

/// Whether neither the kernel nor VFIO has a use for it.
pub(crate) fn is_free(device: &HostDevice) -> bool {
    !device.is_vfio() && device.uses().is_ok_and(|uses| uses.is_empty())
}

/// Whether people who look for a device to drive want to see it.
fn is_of_interest(device: &HostDevice) -> bool {
    let class = device.class() >> 16;
    driver_for(device).is_some() || device.is_vfio() || class == 0x02 || class == 0x12
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let host = Host::this();
    let report = report(&host, &PciNames::read(&host), args.all)?;
    if args.json {
        return crate::print(&format!("{}\n", serde_json::to_string(&report)?));
    }
    crate::print(&text(&report))
}

fn report(host: &Host, names: &PciNames, all: bool) -> anyhow::Result<Report> {
    let mut devices = host.devices()?;
    let count = devices.len();
    devices.retain(|device| all || is_of_interest(device));
    // Ours first; the order within stays that of the addresses.
    devices.sort_by_key(|device| driver_for(device).is_none());
    let others = count - devices.len();
    Ok(Report { devices: devices.iter().map(|device| Device::new(device, names)).collect(), others })
}

fn text(report: &Report) -> String {
    let list = if report.devices.is_empty() {
        "No PCI device that a driver here knows, no network device and no accelerator.\n".to_owned()
    } else {
        table(&report.devices)
    };
    let command = crate::command_name();
    let more = match report.others {
        0 => String::new(),
        count => format!("\n{count} more: {command} devices --all\n"),
    };
    let waiting = report.devices.iter().find(|device| device.is_waiting);
    let next = waiting
        .map(|device| format!("\nTo drive one from user space: {}\n", crate::bind::command(&device.address)));
    list + &more + &next.unwrap_or_default()
}

fn table(devices: &[Device]) -> String {
    let shown = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "address",
        "ids",
        "driver",
        "kernel driver",
        "group",
        "NUMA",
        "interface",
        "cdev",
        "name",
    ]);
    for device in devices {
        let name = device.name.clone().or_else(|| device.class_name.clone());
        table.add_row([
            device.address.clone(),
            format!("{}:{}", device.vendor, device.device),
            shown(device.driver.map(str::to_owned)),
            shown(device.kernel_driver.clone()),
            shown(device.iommu_group.map(|group| group.to_string())),
            shown(device.numa_node.map(|node| node.to_string())),
            shown((!device.interfaces.is_empty()).then(|| device.interfaces.join(","))),
            shown(device.cdev.as_deref().map(|path| path.rsplit('/').next().unwrap_or(path).to_owned())),
            shown(name),
        ]);
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}
