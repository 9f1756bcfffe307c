//! VFIO's type1 interface (its second version): the kernel's IOMMUs where there is no iommufd.
//!
//! A group's devices share one address space, and there are no PASIDs: queues of a device are not isolated from one another.
//! The kernel charges mapped memory to the process's memlock limit, once for each group that it is mapped for, and
//! takes at most 65,535 mappings of a group unless told otherwise (`dma_entry_limit`).
//!
//! Dirty tracking is not offered: the interface has it (`VFIO_IOMMU_DIRTY_PAGES`), but reports all memory that a device
//! has mapped as written, as the IOMMU itself is not asked.
//!
//! Sources: Linux 7.3, include/uapi/linux/vfio.h, and `drivers/vfio/vfio_iommu_type1.c` for its limits.

mod info;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use self::info::Info;
use crate::group::{Group, Kind, SpaceId, calls};
use crate::memlock::{Limit, out_of_memory};
use crate::memory::Bytes;
use crate::{
    Access, Attachable, Attachment, AttachmentOps, Capabilities, Error, ErrorKind, Ioas, IoasOps,
    IommuBackend, Iova, IovaRange, Pasid, Region, Result, SvaToken, Vendor, group,
};

/// The backend. Its groups are the process's: every `Type1` opens the same ones.
#[derive(Debug, Clone, Copy)]
pub struct Type1(());

impl Type1 {
    /// Looks whether the kernel has it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Unsupported`] where it has not; [`ErrorKind::Permission`] where this user may
    /// not open `/dev/vfio/vfio`.
    pub fn open() -> Result<Self> {
        Kind::Type1.container().map(|_| Self(()))
    }

    /// The group with this number, opened if this process does not have it open yet.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if none of its devices is bound to VFIO; [`ErrorKind::Busy`] if another process
    /// has it, or it is not viable; [`ErrorKind::Permission`] if this user may not, or the IOMMU does not remap interrupts.
    pub fn group(&self, number: u32) -> Result<Arc<Group>> {
        Group::open(Kind::Type1, number)
    }
}

impl IommuBackend for Type1 {
    fn name(&self) -> &'static str {
        "type1"
    }

    fn alloc_ioas(&self) -> Result<Ioas> {
        Ok(Ioas::from_ops(Box::new(Space(Arc::new(Shared { id: SpaceId::new(), state: Mutex::default() })))))
    }

    fn attach_sva(&self, device: &dyn Attachable, _pasid: Pasid, _token: SvaToken) -> Result<Attachment> {
        Err(no_pasids("attach the device to the process's own address space")
            .of_kind(ErrorKind::Unsupported)
            .device(device.name().to_owned()))
    }
}

#[cold]
fn no_pasids(operation: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Exhausted, operation, "VFIO's groups have no PASIDs: max_pasids is 0").mend(
        "attach the device itself, without a PASID; or use iommufd: a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
    )
}

/// An address space: the containers of the groups that are attached to it, in which the same is mapped.
#[derive(Debug)]
struct Space(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    id: SpaceId,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    groups: Vec<(Arc<Group>, Info)>,
    mappings: BTreeMap<Iova, (Arc<Region>, Access)>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What all containers can use; before there is any, everything.
    fn usable(&self) -> Vec<IovaRange> {
        let all = vec![IovaRange { first: Iova::new(0), last: Iova::new(u64::MAX) }];
        self.groups.iter().fold(all, |usable, (_, info)| {
            let both = |one: &IovaRange| {
                info.usable.iter().filter_map(|two| one.intersection(two)).collect::<Vec<_>>()
            };
            usable.iter().flat_map(both).collect()
        })
    }

    /// Brings a group that is attached now to what the others have.
    fn add(&mut self, group: &Arc<Group>) -> Result<()> {
        let info = Info::parse(&calls::iommu_info(group.container()).map_err(|errno| {
            Error::os("ask the IOMMU what it can do", "the kernel refuses", errno)
                .mend("see the kernel's log: dmesg")
        })?);
        let mapped = self.mappings.iter().map(|(iova, (region, access))| (*iova, region, *access));
        map_all(
            mapped,
            |iova, region, access| {
                let range = IovaRange::sized(iova, region.len());
                if !range.is_some_and(|range| info.usable.iter().any(|usable| usable.contains(&range))) {
                    let why = format!(
                        "{region:?} is mapped at {iova} already, and the device can not use that address"
                    );
                    return Err(Error::new(ErrorKind::Busy, "attach the device", why)
                        .mend("attach all devices before mapping memory, or unmap it first"));
                }
                map(group, iova, region, access)
            },
            |iova, region| unmap(group, iova, region.len()),
        )?;
        self.groups.push((Arc::clone(group), info));
        Ok(())
    }

    /// Takes everything from a group whose last device is detached.
    fn remove(&mut self, group: &Arc<Group>) {
        self.groups.retain(|(other, _)| !Arc::ptr_eq(other, group));
        for (iova, (region, _)) in &self.mappings {
            if let Err(error) = unmap(group, *iova, region.len()) {
                region.leak();
                tracing::error!("{error}; {region:?} stays mapped for {group:?} and is leaked");
            }
        }
    }
}

/// Maps one after the other, or none: what was mapped before the first that fails is unmapped again.
fn map_all<'a, T: Copy>(
    all: impl Iterator<Item = (T, &'a Arc<Region>, Access)> + Clone,
    map: impl Fn(T, &Arc<Region>, Access) -> Result<()>,
    unmap: impl Fn(T, &Arc<Region>) -> Result<()>,
) -> Result<()> {
    for (done, (at, region, access)) in all.clone().enumerate() {
        let Err(error) = map(at, region, access) else { continue };
        for (at, region, _) in all.take(done) {
            if let Err(error) = unmap(at, region) {
                region.leak();
                tracing::error!("{error}; {region:?} stays mapped and is leaked");
            }
        }
        return Err(error);
    }
    Ok(())
}

impl IoasOps for Space {
    fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Box<dyn AttachmentOps>> {
        if let Some(pasid) = pasid {
            return Err(no_pasids(format!("attach PASID {pasid}")));
        }
        let group = group::of(device, Kind::Type1)?;
        let mut state = self.0.state();
        if group.adopt(self.0.id, device.name())?
            && let Err(error) = state.add(group)
        {
            group.leave(device.name());
            return Err(error);
        }
        let page_sizes = state.groups.iter().find(|(other, _)| Arc::ptr_eq(other, group));
        let page_sizes = page_sizes.map_or(crate::PageSizes(0), |(_, info)| info.page_sizes);
        let (space, group) = (Arc::clone(&self.0), Arc::clone(group));
        Ok(Box::new(Attached { space, group, device: device.name().to_owned(), page_sizes }))
    }

    fn usable_iovas(&self) -> Vec<IovaRange> {
        self.0.state().usable()
    }

    fn map(&self, iova: Iova, region: &Arc<Region>, access: Access) -> Result<()> {
        let mut state = self.0.state();
        let containers = state.groups.iter().map(|(group, _)| (group, region, access));
        map_all(
            containers,
            |group, region, access| map(group, iova, region, access),
            |group, region| unmap(group, iova, region.len()),
        )?;
        state.mappings.insert(iova, (Arc::clone(region), access));
        Ok(())
    }

    fn unmap(&self, iova: Iova, region: &Region) -> Result<()> {
        let mut state = self.0.state();
        state.mappings.remove(&iova);
        // All of them, whatever one says.
        state.groups.iter().map(|(group, _)| unmap(group, iova, region.len())).fold(Ok(()), Result::and)
    }
}

/// A device that is attached.
#[derive(Debug)]
struct Attached {
    space: Arc<Shared>,
    group: Arc<Group>,
    device: String,
    page_sizes: crate::PageSizes,
}

impl AttachmentOps for Attached {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_pasids: 0,
            page_sizes: self.page_sizes,
            fault_reporting: false,
            dirty_tracking: false,
            vendor: Vendor::Unknown,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Held throughout: nobody else attaches the group to this space before all is unmapped. To another one nobody can
        // before it left this one.
        let mut state = self.space.state();
        if self.group.is_last(&self.device) {
            state.remove(&self.group);
        }
        self.group.leave(&self.device);
    }
}

fn map(group: &Group, iova: Iova, region: &Region, access: Access) -> Result<()> {
    calls::map_dma(group.container(), iova, region, access)
        .map_err(|errno| map_error(group, iova, region, errno))
}

#[cold]
fn map_error(group: &Group, iova: Iova, region: &Region, errno: Errno) -> Error {
    let operation = format!("map {region:?} at {iova} for {group:?}");
    match errno {
        Errno::NOMEM => {
            // Nobody else's memory counts against this limit.
            let needed = locked_memory().saturating_add(region.len());
            out_of_memory(operation, &Limit::read().below(needed), needed, errno)
        }
        Errno::NOSPC => {
            let left =
                calls::iommu_info(group.container()).ok().and_then(|info| Info::parse(&info).mappings_left);
            let left = left.map_or_else(String::new, |left| format!(" ({left} are left)"));
            let why = format!("the group has as many mappings as VFIO allows{left}");
            Error::new(ErrorKind::Exhausted, operation, why).mend(
                "map fewer and larger regions; or raise the limit of 65535: \
                 echo 1000000 > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            )
        }
        Errno::EXIST => Error::os(operation, "something is mapped there already", errno)
            .mend("this is a bug, or an earlier unmap failed: see the log"),
        Errno::INVAL => Error::os(operation, "the IOMMU can not use this address", errno)
            .mend("attach all devices before mapping memory"),
        _ => Error::os(operation, "the kernel refuses", errno).mend("see the kernel's log: dmesg"),
    }
}

/// What the kernel charges this process for memory that is locked (`VmLck` in `proc_pid_status(5)`): what type1 adds to.
fn locked_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmLck:")?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

/// Unmaps exactly what one [`map`] mapped.
fn unmap(group: &Group, iova: Iova, len: u64) -> Result<()> {
    let operation = || format!("unmap {} at {iova} for {group:?}", Bytes(len));
    match calls::unmap_dma(group.container(), iova, len) {
        Ok(unmapped) if unmapped == len => Ok(()),
        Ok(unmapped) => {
            let why = format!("only {} of them were mapped", Bytes(unmapped));
            Err(Error::new(ErrorKind::InvalidInput, operation(), why).mend("unmap exactly what was mapped"))
        }
        Err(errno) => {
            Err(Error::os(operation(), "the kernel refuses", errno).mend("see the kernel's log: dmesg"))
        }
    }
}
