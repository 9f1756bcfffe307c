//! Which devices an IOMMU can not tell apart, and what that means for one of them.

use underpass_iommu::group::leaves_dma_alone;

use super::{HostDevice, VFIO_PCI, link_name, names};
use crate::pci::PciAddress;

/// A device of an IOMMU group.
#[derive(Debug, Clone)]
pub struct Member {
    name: String,
    driver: Option<String>,
    is_vfio: bool,
    is_bridge: bool,
}

impl Member {
    /// Its name in sysfs; for a PCI device its address.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address, if it is a PCI device.
    pub fn address(&self) -> Option<PciAddress> {
        self.name.parse().ok()
    }

    /// The kernel's driver that it is bound to.
    pub fn driver(&self) -> Option<&str> {
        self.driver.as_deref()
    }

    /// Whether no other device of its group can be given to user space while it keeps its driver.
    pub fn is_in_the_way(&self) -> bool {
        !self.is_vfio && self.driver().is_some_and(|driver| !leaves_dma_alone(driver))
    }

    /// Whether it can be given to user space at all.
    pub(super) fn can_be_bound(&self) -> bool {
        self.address().is_some() && !self.is_bridge
    }
}

/// The devices of a device's group, itself among them, in the order of their names.
pub(super) fn members(device: &HostDevice) -> Vec<Member> {
    let folder = device.folder().join("iommu_group/devices");
    let names = names(&folder).unwrap_or_default();
    let member = |name: String| {
        let folder = folder.join(&name);
        let driver = link_name(&folder.join("driver"));
        Member {
            is_vfio: folder.join("vfio-dev").exists() || driver.as_deref() == Some(VFIO_PCI),
            driver,
            is_bridge: super::text(&folder.join("class")).is_some_and(|class| class.starts_with("0x06")),
            name,
        }
    };
    names.into_iter().map(member).collect()
}
