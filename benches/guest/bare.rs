//! What a program does that knows nothing but the kernel's interfaces and one device: the measure for our layers. It checks
//! little, and gives nothing back: that is left to the end of the process.
//!
//! Sources: `include/uapi/linux/{iommufd,vfio}.h` of Linux 7.3; virtio 1.3, sections 2.7 (split virtqueues), 4.1 (PCI) and
//! 5.1 (network device).
//!
//! # Why this module is unsafe, and what makes it sound
//! It calls ioctl(2), whose arguments no type knows, and reaches registers and a device's memory by raw pointers. Each ioctl
//! is passed the structure that the header names for it, with its size in its first word; memory is mapped for good, and all
//! accesses to it are volatile and lie inside.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;

use crate::first_packet::{BUFFERS, DEADLINE, REQUEST, RX_DEPTH, Steps};

const READ_WRITE_FIXED: u32 = iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
    | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
    | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;

/// An iommufd with one address space.
pub(crate) struct Iommufd {
    file: File,
    ioas: u32,
}

/// A VFIO device that is bound and attached.
pub(crate) struct Vfio {
    pub(crate) iommufd: Iommufd,
    file: File,
}

/// Does request `number` of iommufd or VFIO.
///
/// # Safety
/// `A` is the structure that this request of this file takes, with its size in it. Addresses in it are good for what the
/// kernel does there.
unsafe fn ioctl<A>(file: &File, number: u32, argument: &mut A) -> io::Result<()> {
    let request = u64::from(b';') << 8 | u64::from(number);
    let argument = std::ptr::from_mut(argument);
    // SAFETY: the caller's promise.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn size<A>() -> u32 {
    size_of::<A>() as u32
}

impl Iommufd {
    pub(crate) fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/iommu")?;
        let mut alloc =
            iommufd::iommu_ioas_alloc { size: size::<iommufd::iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: this is its structure, without addresses.
        unsafe { ioctl(&file, iommufd::IOMMUFD_CMD_IOAS_ALLOC, &mut alloc) }?;
        Ok(Self { file, ioas: alloc.out_ioas_id })
    }

    /// Maps the first `length` bytes of a memfd.
    pub(crate) fn map(&self, memfd: BorrowedFd<'_>, iova: u64, length: u64) -> io::Result<()> {
        let mut map = iommufd::iommu_ioas_map_file {
            size: size::<iommufd::iommu_ioas_map_file>(),
            flags: READ_WRITE_FIXED,
            ioas_id: self.ioas,
            fd: memfd.as_raw_fd(),
            length,
            iova,
            ..Default::default()
        };
        // SAFETY: this is its structure, without addresses of this process.
        unsafe { ioctl(&self.file, iommufd::IOMMUFD_CMD_IOAS_MAP_FILE, &mut map) }
    }

    pub(crate) fn unmap(&self, iova: u64, length: u64) -> io::Result<()> {
        let mut unmap = iommufd::iommu_ioas_unmap {
            size: size::<iommufd::iommu_ioas_unmap>(),
            ioas_id: self.ioas,
            iova,
            length,
        };
        // SAFETY: this is its structure, without addresses of this process.
        unsafe { ioctl(&self.file, iommufd::IOMMUFD_CMD_IOAS_UNMAP, &mut unmap) }
    }
}

impl Vfio {
    pub(crate) fn open(cdev: &Path, iommufd: Iommufd) -> io::Result<Self> {
        let this = Self::bind(cdev, iommufd)?;
        this.0.attach(this.1)?;
        Ok(this.0)
    }

    /// Opens the device; also returns its id.
    fn bind(cdev: &Path, iommufd: Iommufd) -> io::Result<(Self, u32)> {
        let file = File::options().read(true).write(true).open(cdev)?;
        let mut bind = vfio::vfio_device_bind_iommufd {
            argsz: size::<vfio::vfio_device_bind_iommufd>(),
            iommufd: iommufd.file.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: this is its structure, and it asks for no token.
        unsafe { ioctl(&file, vfio::VFIO_BASE + 18, &mut bind) }?;
        Ok((Self { iommufd, file }, bind.out_devid))
    }

    fn attach(&self, dev_id: u32) -> io::Result<()> {
        let Iommufd { file, ioas } = &self.iommufd;
        let mut info =
            iommufd::iommu_hw_info { size: size::<iommufd::iommu_hw_info>(), dev_id, ..Default::default() };
        // SAFETY: this is its structure, with room for no data.
        unsafe { ioctl(file, iommufd::IOMMUFD_CMD_GET_HW_INFO, &mut info) }?;
        let pasid = iommufd::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
        let mut table = iommufd::iommu_hwpt_alloc {
            size: size::<iommufd::iommu_hwpt_alloc>(),
            flags: if info.out_max_pasid_log2 == 0 { 0 } else { pasid },
            dev_id,
            pt_id: *ioas,
            ..Default::default()
        };
        // SAFETY: this is its structure, without data.
        unsafe { ioctl(file, iommufd::IOMMUFD_CMD_HWPT_ALLOC, &mut table) }?;
        let mut attach = vfio::vfio_device_attach_iommufd_pt {
            argsz: size::<vfio::vfio_device_attach_iommufd_pt>(),
            pt_id: table.out_hwpt_id,
            ..Default::default()
        };
        // SAFETY: this is its structure, without addresses.
        unsafe { ioctl(&self.file, vfio::VFIO_BASE + 19, &mut attach) }
    }

    /// Where a region is in the device's file, and how long it is.
    fn region(&self, index: u32) -> io::Result<(u64, u64)> {
        let mut info =
            vfio::vfio_region_info { argsz: size::<vfio::vfio_region_info>(), index, ..Default::default() };
        // SAFETY: this is its structure, with room for no capabilities.
        unsafe { ioctl(&self.file, vfio::VFIO_BASE + 8, &mut info) }?;
        Ok((info.offset, info.size))
    }
}

/// Memory that a device reaches too, or its registers; never unmapped.
#[derive(Clone, Copy)]
struct Shared {
    start: NonNull<u8>,
    len: usize,
}

impl Shared {
    fn map(file: &impl std::os::fd::AsRawFd, offset: u64, len: usize) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                access,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd,
                offset.cast_signed(),
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { start, len })
    }

    /// `len` bytes in a memfd, with the file.
    fn memory(len: usize, flags: libc::c_uint) -> io::Result<(File, Self)> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"bare".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is new, and nobody else's.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        let memory = Self::map(&file, 0, len)?;
        Ok((file, memory))
    }

    fn at<T>(self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.len, "inside");
        // SAFETY: inside of the mapping.
        unsafe { self.start.as_ptr().add(offset) }.cast()
    }

    fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: mapped for good, aligned as mappings start at a page, and made of integers.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    fn write<T>(self, offset: usize, value: T) {
        // SAFETY: mapped for good, aligned as mappings start at a page, and made of integers.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }
}

/// A part of a BAR that a virtio capability names.
#[derive(Clone, Copy)]
struct Window {
    bar: u8,
    offset: u32,
    /// What follows the capability: of the notifications', their multiplier.
    more: u32,
}

/// Fields of the common configuration structure (4.1.4.3).
mod common {
    pub(super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(super) const DRIVER_FEATURE: usize = 12;
    pub(super) const DEVICE_STATUS: usize = 20;
    pub(super) const QUEUE_SELECT: usize = 22;
    pub(super) const QUEUE_SIZE: usize = 24;
    pub(super) const QUEUE_ENABLE: usize = 28;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(super) const QUEUE_DESC: usize = 32;
    pub(super) const QUEUE_DRIVER: usize = 40;
    pub(super) const QUEUE_DEVICE: usize = 48;
}

/// Where the rings and the buffers are for the device.
const RINGS: u64 = 0x4000_0000;
const PACKETS: u64 = 0x8000_0000;

/// A queue's parts in the rings' memory: descriptors, what the driver offers, what the device has used.
const QUEUE: usize = 0x4000;
const AVAILABLE: usize = 0x2000;
const USED: usize = 0x3000;

const BUFFER: usize = 2048;
/// Of the header before each packet (5.1.6).
const HEADER: usize = 12;

/// Sends a packet and waits for one, through a virtio-net device, and tells how long it took.
pub(crate) fn first_packet(cdev: &Path) -> Result<(), Box<dyn Error>> {
    let mut steps = Steps::begin();
    let iommufd = Iommufd::open()?;
    steps.done("iommufd");
    let (device, id) = Vfio::bind(cdev, iommufd)?;
    steps.done("bind");
    device.attach(id)?;
    steps.done("attach");

    // As much memory as our program has: huge pages for the buffers, small ones for the rings.
    let huge = (BUFFERS * 2176).next_multiple_of(2 << 20);
    let (buffers_file, buffers) = Shared::memory(huge, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?;
    let (rings_file, rings) = Shared::memory(2 * QUEUE, 0)?;
    steps.done("memory");
    map(&device, &buffers_file, PACKETS, huge)?;
    map(&device, &rings_file, RINGS, 2 * QUEUE)?;
    steps.done("map");

    let (config, _) = device.region(vfio::VFIO_PCI_CONFIG_REGION_INDEX)?;
    // Memory decoding and bus mastering.
    device.file.write_all_at(&6_u16.to_le_bytes(), config + 4)?;
    let (common, notify) = (window(&device, config, 1)?, window(&device, config, 2)?);
    let (bar_offset, bar_len) = device.region(u32::from(common.bar))?;
    if common.bar != notify.bar {
        return Err("registers in two BARs".into());
    }
    let bar = Shared::map(&device.file, bar_offset, bar_len as usize)?;
    let common = common.offset as usize;
    bar.write(common + common::DEVICE_STATUS, 0_u8);
    while bar.read::<u8>(common + common::DEVICE_STATUS) != 0 {}
    // ACKNOWLEDGE, DRIVER; VERSION_1, ACCESS_PLATFORM; FEATURES_OK.
    bar.write(common + common::DEVICE_STATUS, 3_u8);
    for (half, features) in [(0_u32, 0_u32), (1, 3)] {
        bar.write(common + common::DRIVER_FEATURE_SELECT, half);
        bar.write(common + common::DRIVER_FEATURE, features);
    }
    bar.write(common + common::DEVICE_STATUS, 11_u8);
    if bar.read::<u8>(common + common::DEVICE_STATUS) != 11 {
        return Err("the device refuses the features".into());
    }
    let mut doorbells = [0; 2];
    for (queue, doorbell) in doorbells.iter_mut().enumerate() {
        let at = RINGS + (queue * QUEUE) as u64;
        bar.write(common + common::QUEUE_SELECT, queue as u16);
        bar.write(common + common::QUEUE_SIZE, RX_DEPTH as u16);
        for (field, part) in
            [(common::QUEUE_DESC, 0), (common::QUEUE_DRIVER, AVAILABLE), (common::QUEUE_DEVICE, USED)]
        {
            let at = at + part as u64;
            bar.write(common + field, at as u32);
            bar.write(common + field + 4, (at >> 32) as u32);
        }
        let number: u16 = bar.read(common + common::QUEUE_NOTIFY_OFF);
        *doorbell = notify.offset as usize + usize::from(number) * notify.more as usize;
        bar.write(common + common::QUEUE_ENABLE, 1_u16);
    }
    bar.write(common + common::DEVICE_STATUS, 15_u8);
    // All of the receive queue, for the device to write; behind that, the packet to send.
    for n in 0..RX_DEPTH {
        offer(rings, 0, n, PACKETS + (n * BUFFER) as u64, BUFFER as u32, 2);
    }
    publish(rings, 0, RX_DEPTH as u16);
    bar.write(doorbells[0], 0_u16);
    steps.done("start");

    let packet = RX_DEPTH * BUFFER;
    for (n, byte) in REQUEST.iter().enumerate() {
        buffers.write(packet + HEADER + n, *byte);
    }
    offer(rings, 1, 0, PACKETS + packet as u64, (HEADER + REQUEST.len()) as u32, 0);
    publish(rings, 1, 1);
    bar.write(doorbells[1], 1_u16);
    let sent = Instant::now();
    while rings.read::<u16>(USED + 2) == 0 {
        if sent.elapsed() > DEADLINE {
            return Err("no packet came".into());
        }
    }
    steps.done("packet");
    steps.tell();
    Ok(())
}

fn map(device: &Vfio, memfd: &File, iova: u64, len: usize) -> io::Result<()> {
    device.iommufd.map(std::os::fd::AsFd::as_fd(memfd), iova, len as u64)
}

/// The virtio capability of this type (4.1.4).
fn window(device: &Vfio, config: u64, kind: u8) -> Result<Window, Box<dyn Error>> {
    let read = |at: u8| {
        let mut bytes = [0; 20];
        device.file.read_exact_at(&mut bytes, config + u64::from(at)).map(|()| bytes)
    };
    let mut at = read(0x34)?[0];
    while at != 0 {
        let bytes = read(at)?;
        let word = |n: usize| u32::from_le_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
        if bytes[0] == 9 && bytes[3] == kind {
            return Ok(Window { bar: bytes[4], offset: word(8), more: word(16) });
        }
        at = bytes[1];
    }
    Err(format!("the device has no virtio capability of type {kind}").into())
}

/// Writes descriptor `n` of a queue (2.7.5) and puts it into the ring of offered ones (2.7.6).
fn offer(rings: Shared, queue: usize, n: usize, address: u64, len: u32, flags: u16) {
    let base = queue * QUEUE;
    let descriptor = base + n * 16;
    rings.write(descriptor, address);
    rings.write(descriptor + 8, len);
    rings.write(descriptor + 12, flags);
    rings.write(base + AVAILABLE + 4 + n * 2, n as u16);
}

/// Lets the device see that `count` descriptors are offered.
fn publish(rings: Shared, queue: usize, count: u16) {
    fence(Ordering::SeqCst);
    rings.write(queue * QUEUE + AVAILABLE + 2, count);
    fence(Ordering::SeqCst);
}
