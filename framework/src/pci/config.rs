//! Configuration space: as a driver sees it, and as a model provides it.
//!
//! Layout: PCI Express Base Specification 6.0, 7.5 (headers and capabilities), 7.6 (extended capabilities).

use std::fmt;
use std::iter;
use std::sync::Arc;

use super::{Registers, cap, command};
use crate::model::Width;

/// Bytes of a PCI Express function's configuration space.
pub const CONFIG_LEN: u16 = 4096;

const VENDOR_ID: u16 = 0x00;
const DEVICE_ID: u16 = 0x02;
pub(crate) const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const REVISION_AND_CLASS: u16 = 0x08;
const CAPABILITIES: u16 = 0x34;
const HEADER_END: u16 = 0x40;
const EXTENDED: u16 = 0x100;

/// A function's configuration space, for its driver.
///
/// Nothing that the device reports makes an access fail: what is past the end reads as all ones, as a register that
/// is not there does, and is not written.
///
/// Of the standard header only the command and status registers can be written, and memory decoding stays on
/// whatever is written there: BARs are in use as long as the device is open. For the same reason the function stays
/// awake, in power state D0. All of this is logged as the driver's bug. (A kernel that hands out a device answers an access
/// to the BARs of one that is off or asleep with SIGBUS.)
#[derive(Clone)]
pub struct Config {
    function: Arc<dyn Registers>,
    /// Where the power management control register is (PMCSR; 7.5.2.2), if there is one.
    power: Option<u16>,
}

impl Config {
    pub(crate) fn new(function: Arc<dyn Registers>) -> Self {
        let mut this = Self { function, power: None };
        this.power = this.capability(cap::POWER_MANAGEMENT).map(|at| at + 4);
        this
    }

    /// Reads 8 bits.
    pub fn read8(&self, offset: u16) -> u8 {
        self.read(offset, Width::Bits8) as u8
    }

    /// Reads 16 bits, little-endian.
    pub fn read16(&self, offset: u16) -> u16 {
        self.read(offset, Width::Bits16) as u16
    }

    /// Reads 32 bits, little-endian.
    pub fn read32(&self, offset: u16) -> u32 {
        self.read(offset, Width::Bits32)
    }

    /// Writes 8 bits.
    pub fn write8(&self, offset: u16, value: u8) {
        self.write(offset, Width::Bits8, value.into());
    }

    /// Writes 16 bits.
    pub fn write16(&self, offset: u16, value: u16) {
        self.write(offset, Width::Bits16, value.into());
    }

    /// Writes 32 bits.
    pub fn write32(&self, offset: u16, value: u32) {
        self.write(offset, Width::Bits32, value);
    }

    /// Who makes it.
    pub fn vendor_id(&self) -> u16 {
        self.read16(VENDOR_ID)
    }

    /// What it is, of that vendor.
    pub fn device_id(&self) -> u16 {
        self.read16(DEVICE_ID)
    }

    /// Class, subclass and programming interface: 24 bits.
    pub fn class(&self) -> u32 {
        self.read32(REVISION_AND_CLASS) >> 8
    }

    /// Whether the function answers. All ones is what reading nothing gives, and no command register is that; the
    /// ids of one that has left the bus are still there, as VFIO keeps a copy of them (`init_pci_cap_basic_perm` in
    /// `drivers/vfio/pci/vfio_pci_config.c`, Linux 7.3).
    pub(crate) fn answers(&self) -> bool {
        self.read16(COMMAND) != u16::MAX
    }

    /// Whether the function may do DMA.
    pub fn bus_master(&self) -> bool {
        self.read16(COMMAND) & command::BUS_MASTER != 0
    }

    pub(crate) fn set_bus_master(&self, on: bool) {
        let others = self.read16(COMMAND) & !command::BUS_MASTER;
        self.write16(COMMAND, if on { others | command::BUS_MASTER } else { others });
    }

    /// Switches memory decoding on: what is to be done before BARs are used.
    pub(crate) fn enable_memory(&self) {
        let now = self.read16(COMMAND);
        if now & command::MEMORY == 0 {
            self.write16(COMMAND, now | command::MEMORY);
        }
    }

    /// The capabilities, as (id, offset). Ends at a pointer that leads out of the space or back.
    pub fn capabilities(&self) -> impl Iterator<Item = (u8, u16)> {
        capabilities(|offset| self.read32(offset))
    }

    /// The extended capabilities, as (id, offset). Ends at a pointer that leads out of the space or back.
    pub fn extended_capabilities(&self) -> impl Iterator<Item = (u16, u16)> {
        extended_capabilities(|offset| self.read32(offset))
    }

    /// Where the first capability with this [id](super::cap) is.
    pub fn capability(&self, id: u8) -> Option<u16> {
        self.capabilities().find(|&(found, _)| found == id).map(|(_, offset)| offset)
    }

    /// Where the first extended capability with this [id](super::ext_cap) is.
    pub fn extended_capability(&self, id: u16) -> Option<u16> {
        self.extended_capabilities().find(|&(found, _)| found == id).map(|(_, offset)| offset)
    }

    fn read(&self, offset: u16, width: Width) -> u32 {
        if is_inside(offset, width) { self.function.read_config(offset, width) } else { u32::MAX }
    }

    fn write(&self, offset: u16, width: Width, value: u32) {
        let end = u32::from(offset) + width.bytes() as u32;
        let in_header = offset < HEADER_END;
        if !is_inside(offset, width) || in_header && (offset < COMMAND || end > REVISION_AND_CLASS.into()) {
            tracing::error!("configuration space at {offset:#x} can not be written; {value:#x} is dropped");
            return;
        }
        // The byte of the command register that has the bit is the first, so only a write that starts there has it.
        let memory = u32::from(command::MEMORY);
        if offset == COMMAND && value & memory == 0 {
            tracing::error!("memory decoding stays on while the device is open");
            return self.function.write_config(offset, width, value | memory);
        }
        // Where the power state's two bits are in the value.
        let state =
            self.power.and_then(|at| at.checked_sub(offset)).filter(|at| u64::from(*at) < width.bytes());
        let state = state.map_or(0, |at| 3 << (8 * at));
        if value & state != 0 {
            tracing::error!("the function stays in power state D0 while the device is open");
            return self.function.write_config(offset, width, value & !state);
        }
        self.function.write_config(offset, width, value);
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Config({:04x}:{:04x}, class {:06x})", self.vendor_id(), self.device_id(), self.class())
    }
}

fn is_inside(offset: u16, width: Width) -> bool {
    u32::from(offset) + width.bytes() as u32 <= CONFIG_LEN.into()
}

/// Walks the capability list, reading through `read` (32 bits at an aligned offset).
pub(super) fn capabilities(read: impl Fn(u16) -> u32) -> impl Iterator<Item = (u8, u16)> {
    let listed = read(COMMAND) >> 16 & u32::from(STATUS_CAPABILITIES) != 0;
    let mut next = if listed { read(CAPABILITIES) as u8 } else { 0 };
    // One bit for each place where a capability can be: a place seen before ends the walk.
    let mut seen = 0_u64;
    iter::from_fn(move || {
        // The two lowest bits are reserved: software masks them (7.5.1.1.11).
        let offset = u16::from(next & !3);
        let place = 1_u64 << (offset / 4);
        if offset < HEADER_END || seen & place != 0 {
            return None;
        }
        seen |= place;
        let [id, pointer, ..] = read(offset).to_le_bytes();
        next = pointer;
        // All ones: nothing answers there.
        (id != 0xff).then_some((id, offset))
    })
    .fuse()
}

/// Walks the extended capability list likewise.
pub(super) fn extended_capabilities(read: impl Fn(u16) -> u32) -> impl Iterator<Item = (u16, u16)> {
    let mut next = EXTENDED;
    let mut seen = [0_u64; CONFIG_LEN as usize / 4 / 64];
    iter::from_fn(move || {
        let offset = next & !3;
        let (word, place) = (usize::from(offset / 256), 1_u64 << (offset / 4 % 64));
        if offset < EXTENDED || seen[word] & place != 0 {
            return None;
        }
        seen[word] |= place;
        let header = read(offset);
        next = (header >> 20) as u16;
        // A header of zeros ends an empty list; all ones: nothing answers there (7.6.3).
        (header != 0 && header != u32::MAX).then_some((header as u16, offset))
    })
    .fuse()
}

/// A model's configuration space: 4096 bytes, and which of their bits can be written.
///
/// Built once by [`Model::config_space`](crate::model::Model::config_space). Capabilities are put one after the other
/// and linked in the order in which they are added.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_LEN as usize]>,
    writable: Box<[u8; CONFIG_LEN as usize]>,
    /// Where the next capability goes, and where the pointer to it does.
    next: u16,
    link: u16,
    /// The same for extended ones; the link is the header of the last.
    next_extended: u16,
    last_extended: Option<u16>,
}

impl ConfigSpace {
    /// A type 0 header with these ids and this class (24 bits: class, subclass, programming interface), and no
    /// capabilities. Of the command register, memory decoding and bus mastering can be written.
    pub fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut this = Self {
            bytes: Box::new([0; _]),
            writable: Box::new([0; _]),
            next: HEADER_END,
            link: CAPABILITIES,
            next_extended: EXTENDED,
            last_extended: None,
        };
        this.put(VENDOR_ID, &vendor.to_le_bytes());
        this.put(DEVICE_ID, &device.to_le_bytes());
        this.put(REVISION_AND_CLASS, &(class << 8).to_le_bytes());
        let command = (command::MEMORY | command::BUS_MASTER).to_le_bytes();
        this.writable[usize::from(COMMAND)..][..2].copy_from_slice(&command);
        this
    }

    /// With this revision; without it is 0.
    #[must_use]
    pub fn with_revision(mut self, revision: u8) -> Self {
        self.put(REVISION_AND_CLASS, &[revision]);
        self
    }

    /// Adds a capability: `body` is what follows its 2-byte header, and a bit of it can be written where `writable`,
    /// which may be shorter, has a one.
    ///
    /// # Panics
    /// If the first 256 bytes have no room for it, or `writable` is longer than `body`.
    #[must_use]
    pub fn with_capability(mut self, id: u8, body: &[u8], writable: &[u8]) -> Self {
        let at = self.next;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= EXTENDED.into(), "no room for capability {id:#x}");
        self.put(at, &[id, 0]);
        self.put_body(at + 2, body, writable);
        self.put(self.link, &[at as u8]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        (self.link, self.next) = (at + 1, end.next_multiple_of(4) as u16);
        self
    }

    /// Adds an extended capability: `body` is what follows its 4-byte header, and a bit of it can be written where
    /// `writable`, which may be shorter, has a one.
    ///
    /// # Panics
    /// If there is no room for it, or `writable` is longer than `body`.
    #[must_use]
    pub fn with_extended(mut self, id: u16, version: u8, body: &[u8], writable: &[u8]) -> Self {
        let at = self.next_extended;
        let end = usize::from(at) + 4 + body.len();
        assert!(end <= CONFIG_LEN.into(), "no room for extended capability {id:#x}");
        self.put(at, &(u32::from(id) | u32::from(version & 0xf) << 16).to_le_bytes());
        self.put_body(at + 4, body, writable);
        if let Some(last) = self.last_extended {
            let header = self.read(last, Width::Bits32) as u32 | u32::from(at) << 20;
            self.put(last, &header.to_le_bytes());
        }
        (self.last_extended, self.next_extended) = (Some(at), end.next_multiple_of(4) as u16);
        self
    }

    /// Reads `width` at `offset`, little-endian. What is past the end reads as all ones.
    pub fn read(&self, offset: u16, width: Width) -> u64 {
        let mut value = [0xff; 8];
        for (n, byte) in value.iter_mut().enumerate().take(width.bytes() as usize) {
            *byte = self.bytes.get(usize::from(offset) + n).copied().unwrap_or(0xff);
        }
        u64::from_le_bytes(value) & u64::MAX >> (64 - 8 * width.bytes())
    }

    /// Writes `width` at `offset`, little-endian: the bits that can be written. What is past the end is dropped.
    pub fn write(&mut self, offset: u16, width: Width, value: u64) {
        let places = self.bytes.iter_mut().zip(&*self.writable).skip(offset.into());
        for ((byte, mask), new) in places.zip(value.to_le_bytes()).take(width.bytes() as usize) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Whether the function may do DMA.
    pub fn bus_master(&self) -> bool {
        self.read(COMMAND, Width::Bits16) as u16 & command::BUS_MASTER != 0
    }

    /// Where the first capability with this [id](super::cap) is.
    pub fn find_capability(&self, id: u8) -> Option<u16> {
        capabilities(|offset| self.read(offset, Width::Bits32) as u32)
            .find(|&(found, _)| found == id)
            .map(|(_, offset)| offset)
    }

    /// Where the first extended capability with this [id](super::ext_cap) is.
    pub fn find_extended(&self, id: u16) -> Option<u16> {
        extended_capabilities(|offset| self.read(offset, Width::Bits32) as u32)
            .find(|&(found, _)| found == id)
            .map(|(_, offset)| offset)
    }

    /// What a host does before a driver sees the function: switches memory decoding on.
    pub(super) fn enable_memory(&mut self) {
        let value = self.read(COMMAND, Width::Bits16) | u64::from(command::MEMORY);
        self.write(COMMAND, Width::Bits16, value);
    }

    fn put_body(&mut self, at: u16, body: &[u8], writable: &[u8]) {
        assert!(writable.len() <= body.len(), "a mask longer than its capability");
        self.put(at, body);
        self.writable[usize::from(at)..][..writable.len()].copy_from_slice(writable);
    }

    fn put(&mut self, at: u16, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.read(VENDOR_ID, Width::Bits32);
        write!(f, "ConfigSpace({:04x}:{:04x})", ids & 0xffff, ids >> 16)
    }
}

#[cfg(test)]
mod tests;
