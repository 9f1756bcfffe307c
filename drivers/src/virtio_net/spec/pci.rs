//! Modern virtio over PCI ("Virtio Over PCI Bus", 4.1).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::split::MAX_SIZE;

/// PCI vendor id ("PCI Device Discovery").
pub const VENDOR_ID: u16 = 0x1af4;
/// PCI device id: 0x1040 and the virtio device id.
pub const DEVICE_ID: u16 = 0x1041;
/// PCI device id of a transitional device, which has the modern interface too.
pub const TRANSITIONAL_DEVICE_ID: u16 = 0x1000;
/// Lowest PCI revision of a device that is not transitional.
pub const REVISION: u8 = 1;
/// PCI class: Ethernet controller.
pub const CLASS: u32 = 0x02_0000;

/// PCI capability id of all virtio capabilities: vendor-specific ("Virtio Structure PCI Capabilities", 4.1.4).
pub const CAP_ID: u8 = 0x09;

/// What a capability points to, [`Cap::cfg_type`].
pub mod cfg_type {
    /// Common configuration, [`common`](super::common).
    pub const COMMON: u8 = 1;
    /// Notifications, see [`NotifyCap`](super::NotifyCap).
    pub const NOTIFY: u8 = 2;
    /// ISR status, [`isr`](super::isr).
    pub const ISR: u8 = 3;
    /// What only this type of device has.
    pub const DEVICE: u8 = 4;
    /// A window to the BARs in configuration space, [`PciCfgCap`](super::PciCfgCap).
    pub const PCI: u8 = 5;
    /// Shared memory, a [`Cap64`](super::Cap64).
    pub const SHARED_MEMORY: u8 = 8;
    /// The vendor's own.
    pub const VENDOR: u8 = 9;
}

/// `struct virtio_pci_cap`: where in a BAR a structure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Cap {
    /// [`CAP_ID`].
    pub cap_vndr: u8,
    /// Offset of the next capability.
    pub cap_next: u8,
    /// Bytes of this one.
    pub cap_len: u8,
    /// One of [`cfg_type`].
    pub cfg_type: u8,
    /// Which BAR: 0 to 5, else the capability is ignored.
    pub bar: u8,
    /// Tells several of one type apart.
    pub id: u8,
    /// Zero.
    pub padding: [u8; 2],
    /// Where it starts in the BAR.
    pub offset: u32,
    /// Its bytes.
    pub length: u32,
}

const _: () = assert!(size_of::<Cap>() == 16);

/// `struct virtio_pci_cap64`: upper halves of offset and length ("Shared memory capability").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Cap64 {
    /// Lower halves, and the rest.
    pub cap: Cap,
    /// Bits 63:32 of the offset.
    pub offset_hi: u32,
    /// Bits 63:32 of the length.
    pub length_hi: u32,
}

const _: () = assert!(size_of::<Cap64>() == 24);

/// `struct virtio_pci_notify_cap` ("Notification structure layout", 4.1.4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NotifyCap {
    /// Where the notification area is.
    pub cap: Cap,
    /// Zero or an even power of two; see [`notify_offset`].
    pub notify_off_multiplier: u32,
}

const _: () = assert!(size_of::<NotifyCap>() == 20);

/// `struct virtio_pci_cfg_cap` ("PCI configuration access capability", 4.1.4.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PciCfgCap {
    /// Where to access, by 1, 2 or 4 bytes; the driver writes it.
    pub cap: Cap,
    /// Accessing this accesses the BAR.
    pub pci_cfg_data: [u8; 4],
}

const _: () = assert!(size_of::<PciCfgCap>() == 20);

/// Where in the BAR a queue is notified.
pub const fn notify_offset(cap: &NotifyCap, queue_notify_off: u16) -> u64 {
    cap.cap.offset as u64 + queue_notify_off as u64 * cap.notify_off_multiplier as u64
}

/// Offsets in the common configuration structure ("Common configuration structure layout", 4.1.4.3). Each is accessed
/// with its own width; those of 64 bits also as two of 32.
pub mod common {
    /// Which 32 bits [`DEVICE_FEATURE`] shows. 32 bits.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// Features that the device offers. 32 bits, read-only.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Which 32 bits [`DRIVER_FEATURE`] shows. 32 bits.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// Features that the driver accepts. 32 bits.
    pub const DRIVER_FEATURE: u64 = 12;
    /// MSI-X vector of configuration changes, or [`NO_VECTOR`](super::NO_VECTOR). 16 bits.
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    /// How many queues there are at most. 16 bits, read-only.
    pub const NUM_QUEUES: u64 = 18;
    /// [`status`](super::status); writing zero resets. 8 bits.
    pub const DEVICE_STATUS: u64 = 20;
    /// Changes whenever the device-specific configuration has changed. 8 bits, read-only.
    pub const CONFIG_GENERATION: u64 = 21;
    /// Which queue the registers below are of. 16 bits.
    pub const QUEUE_SELECT: u64 = 22;
    /// Entries: after reset the most that there can be, zero if there is no such queue. 16 bits.
    pub const QUEUE_SIZE: u64 = 24;
    /// MSI-X vector of the queue, or [`NO_VECTOR`](super::NO_VECTOR). 16 bits.
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    /// Writing one enables the queue. 16 bits.
    pub const QUEUE_ENABLE: u64 = 28;
    /// For [`notify_offset`](super::notify_offset). 16 bits, read-only.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// Address of the descriptor area. 64 bits.
    pub const QUEUE_DESC: u64 = 32;
    /// Address of the driver area: the available ring, or the driver's event suppression. 64 bits.
    pub const QUEUE_DRIVER: u64 = 40;
    /// Address of the device area: the used ring, or the device's event suppression. 64 bits.
    pub const QUEUE_DEVICE: u64 = 48;
    /// With `NOTIF_CONFIG_DATA`: what a notification carries instead of the queue's index (`queue_notify_data` in 1.2,
    /// `queue_notif_config_data` in 1.3). 16 bits, read-only.
    pub const QUEUE_NOTIFY_DATA: u64 = 56;
    /// With `RING_RESET`: writing one resets the queue; reads as one while that goes on. 16 bits.
    pub const QUEUE_RESET: u64 = 58;
    /// Bytes of the structure as far as 1.2 defines it.
    pub const LEN: u64 = 60;
}

/// No MSI-X vector; also what a vector register reads as when the device could not take the vector ("MSI-X Vector
/// Configuration", 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Device status bits ("Device Status Field", 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is set up; the device may use its queues.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device has failed and works again only after a reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 128;
}

/// Bits of the ISR status, one byte, which reading clears ("ISR status capability", 4.1.4.5).
pub mod isr {
    /// A queue has used buffers.
    pub const QUEUE: u8 = 1;
    /// The configuration has changed.
    pub const CONFIG: u8 = 2;
}

/// The value of an available buffer notification with `NOTIFICATION_DATA`, 32 bits ("Driver Notifications", 2.9). Without
/// it the value is the queue's index, 16 bits.
///
/// `queue` is the queue's index, or with `NOTIF_CONFIG_DATA` the queue's notify data. `position` says where the next
/// buffer will be: for a split ring the available index; for a packed one the offset in bits 14:0 and the wrap counter in
/// bit 15.
pub const fn notification(queue: u16, position: u16) -> u32 {
    queue as u32 | (position as u32) << 16
}

/// Most queues that a device can have: the queue's index has 16 bits.
pub const MAX_QUEUES: u32 = 1 << 16;

/// Whether a queue can have this size: for split rings a power of two up to [`MAX_SIZE`]; packed ones need no power of two.
pub const fn queue_size_is_valid(size: u16, packed: bool) -> bool {
    size != 0 && size <= MAX_SIZE && (packed || size.is_power_of_two())
}
