//! A device's way to memory: translation through an IOTLB, and the copies themselves.
//!
//! # Why this module is unsafe, and what makes it sound
//! It reads and writes memory at addresses that a device chose. Three things make that sound. Translation: an
//! access touches only what some [`Mapping`](crate::Mapping) maps, with its rights, and a mapping keeps its region alive.
//! Time: each access lies between `enter` and `exit` of the bus's slot, and a mapping's memory is not given back
//! before every access that could have seen the translation is over (see `guard`); nothing translated is kept
//! beyond, and nothing is lent to the caller. Sharing: a region's bytes are reached by raw copies and atomics only;
//! where the CPU uses them at the same time, the driver's handshake orders the two, and that a device keeps to
//! the handshake is what `check=leases` checks. A `Bus` is a device, in other words: whoever holds one is trusted as far
//! as hardware is, and the safe types for DMA memory rely on it in the same way.

mod words;

use std::ptr;
use std::sync::Arc;

use super::guard::Slot;
use super::tlb::Tlb;
use super::{Context, SoftDevice, sva};
use crate::{Access, Fault, FaultReason, Iova, Pasid};

/// Bytes in a line of the CPU's caches.
const LINE: u64 = 64;

/// The most bytes that one access covers: unmapping waits for no more than that.
const MAX_ACCESS: u64 = 64 * 1024;

/// A refused access. `done` bytes of the operation were done before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaFault {
    /// The first address that could not be accessed.
    pub iova: Iova,
    /// What was tried.
    pub access: Access,
    /// Why it was refused.
    pub reason: FaultReason,
    /// Bytes of this operation that were done. For an overlapping copy to a higher address, which runs from the
    /// end, these are the last ones.
    pub done: u64,
}

/// One engine's way to memory. Each access names the PASID that it carries; `None` is the device's own (RID)
/// address space. A refused access is also recorded in the device's [fault queue](SoftDevice::faults).
///
/// There is no way to borrow memory through a bus: every access is over when its call returns. But it *is* a device's way
/// to memory: what it writes changes the bytes of whoever mapped them, also behind a Rust reference to them. Give it to
/// what plays the device, and test with `check=leases` that it keeps to what it was handed.
#[derive(Debug)]
pub struct Bus {
    device: Arc<SoftDevice>,
    slot: Arc<Slot>,
    tlb: Tlb,
    check_leases: bool,
    /// For copies under SVA.
    bounce: Vec<u8>,
}

/// Where an address is.
enum Place {
    /// So many bytes of this process's memory are there.
    Host { at: *mut u8, len: u64 },
    /// The process's own address space.
    Process,
}

impl Place {
    #[inline]
    fn host(address: u64, len: u64) -> Self {
        Self::Host { at: ptr::with_exposed_provenance_mut(address as usize), len }
    }
}

impl Bus {
    pub(super) fn new(device: Arc<SoftDevice>) -> Self {
        let slot = device.add_slot();
        let check_leases = device.check_leases();
        Self { device, slot, tlb: Tlb::new(), check_leases, bounce: Vec::new() }
    }

    /// The device that this bus belongs to.
    pub fn device(&self) -> &Arc<SoftDevice> {
        &self.device
    }

    /// Reads `out.len()` bytes.
    pub fn read(&mut self, pasid: Option<Pasid>, iova: Iova, out: &mut [u8]) -> Result<(), DmaFault> {
        self.pieces(pasid, iova, out.len() as u64, Access::READ, |place, address, done, len| {
            let part = &mut out[done as usize..(done + len) as usize];
            match place {
                // SAFETY: `at` is valid for len bytes during this access, and `part` is borrowed. They may overlap,
                // if the caller reads its own DMA memory.
                Place::Host { at, .. } => unsafe { ptr::copy(at, part.as_mut_ptr(), part.len()) },
                Place::Process => return sva::read(address, part) as u64,
            }
            len
        })
    }

    /// Writes `data`.
    pub fn write(&mut self, pasid: Option<Pasid>, iova: Iova, data: &[u8]) -> Result<(), DmaFault> {
        self.pieces(pasid, iova, data.len() as u64, Access::WRITE, |place, address, done, len| {
            let part = &data[done as usize..(done + len) as usize];
            match place {
                // SAFETY: `at` is valid for len bytes during this access, and `part` is borrowed. They may overlap,
                // if the caller writes from its own DMA memory.
                Place::Host { at, .. } => unsafe { ptr::copy(part.as_ptr(), at, part.len()) },
                Place::Process => return sva::write(address, part) as u64,
            }
            len
        })
    }

    /// Fills `len` bytes with `pattern`, its low byte first.
    pub fn fill(&mut self, pasid: Option<Pasid>, iova: Iova, len: u64, pattern: u64) -> Result<(), DmaFault> {
        let mut block = [0_u8; 4096];
        self.pieces(pasid, iova, len, Access::WRITE, |place, address, done, len| {
            let turned = pattern.rotate_right(8 * (done % 8) as u32).to_le_bytes();
            let (words, _) = block.as_chunks_mut::<8>();
            let needed = words.len().min(len.div_ceil(8) as usize);
            words[..needed].fill(turned);
            // The block's length is a multiple of the pattern's, so each block starts with the same byte.
            let mut at = 0;
            while at < len {
                let n = (len - at).min(block.len() as u64);
                match &place {
                    Place::Host { at: host, .. } => {
                        // SAFETY: at < len, for which `host` is valid.
                        let to = unsafe { host.add(at as usize) };
                        // SAFETY: `to` is valid for n bytes during this access; `block` is ours.
                        unsafe { ptr::copy_nonoverlapping(block.as_ptr(), to, n as usize) };
                    }
                    Place::Process => {
                        let written = sva::write(address + at, &block[..n as usize]) as u64;
                        if written < n {
                            return at + written;
                        }
                    }
                }
                at += n;
            }
            len
        })
    }

    /// Copies `len` bytes, also where the two places overlap in the device's addresses.
    pub fn copy(&mut self, pasid: Option<Pasid>, src: Iova, dst: Iova, len: u64) -> Result<(), DmaFault> {
        let (src, dst) = (src.get(), dst.get());
        let backward = dst > src && dst - src < len;
        let mut done = 0;
        while done < len {
            let (from, to, most) = if backward {
                // From the end, a page at a time, so that each piece starts where a page does or the copy does.
                let (src_end, dst_end) = (src.wrapping_add(len - done), dst.wrapping_add(len - done));
                let piece = in_last_page(src_end).min(in_last_page(dst_end)).min(len - done);
                (src_end.wrapping_sub(piece), dst_end.wrapping_sub(piece), piece)
            } else {
                (src.wrapping_add(done), dst.wrapping_add(done), (len - done).min(MAX_ACCESS))
            };
            match self.copy_piece(pasid, from, to, most, backward) {
                Ok(moved) => done += moved,
                Err((iova, access, reason)) => return Err(self.refuse(pasid, iova, access, reason, done)),
            }
        }
        Ok(())
    }

    /// Copies up to `most` bytes; returns how many. `whole`: all or none, as from the end nothing can be left out.
    #[inline]
    fn copy_piece(
        &mut self,
        pasid: Option<Pasid>,
        from: u64,
        to: u64,
        most: u64,
        whole: bool,
    ) -> Result<u64, (u64, Access, FaultReason)> {
        self.slot.enter(&self.device.generation);
        let source = self.translate(pasid, from, most, Access::READ);
        let target = self.translate(pasid, to, most, Access::WRITE);
        let moved = match (source, target) {
            // A piece from the end lies in one page, so only a lease can end inside it.
            (Ok(Place::Host { len, .. }), _) if whole && len < most => {
                Err((from + len, Access::READ, FaultReason::NotLeased))
            }
            (_, Ok(Place::Host { len, .. })) if whole && len < most => {
                Err((to + len, Access::WRITE, FaultReason::NotLeased))
            }
            (
                Ok(Place::Host { at: source, len: readable }),
                Ok(Place::Host { at: target, len: writable }),
            ) => {
                let len = readable.min(writable).min(most);
                // SAFETY: both are valid for len bytes during this access. `copy` allows overlap, which two
                // mappings of one region can bring about.
                unsafe { ptr::copy(source, target, len as usize) };
                Ok(len)
            }
            (Ok(Place::Process), Ok(Place::Process)) => self.copy_in_process(from, to, most),
            (Err(reason), _) => Err((from, Access::READ, reason)),
            (_, Err(reason)) => Err((to, Access::WRITE, reason)),
            // One PASID has one address space.
            _ => unreachable!("one access, two kinds of address space"),
        };
        self.slot.exit();
        moved
    }

    fn copy_in_process(&mut self, from: u64, to: u64, most: u64) -> Result<u64, (u64, Access, FaultReason)> {
        self.bounce.resize(MAX_ACCESS as usize, 0);
        let part = &mut self.bounce[..most as usize];
        let readable = sva::read(from, part);
        if readable == 0 {
            return Err((from, Access::READ, FaultReason::NotMapped));
        }
        let written = sva::write(to, &part[..readable]);
        if written == 0 {
            return Err((to, Access::WRITE, missing_or_read_only(to)));
        }
        Ok(written as u64)
    }

    /// Only translates: whether the device could access `len` bytes.
    pub fn probe(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        len: u64,
        access: Access,
    ) -> Result<(), DmaFault> {
        self.pieces(pasid, iova, len, access, |place, address, _, len| match place {
            Place::Host { .. } => len,
            Place::Process => sva::accessible(address, len, access),
        })
    }

    /// Writes the lines of `len` bytes back from the CPU's caches and drops them. Under SVA it only checks the
    /// addresses: the DMA of a software device is coherent, and a page that may vanish can not be flushed.
    pub fn flush(&mut self, pasid: Option<Pasid>, iova: Iova, len: u64) -> Result<(), DmaFault> {
        self.pieces(pasid, iova, len, Access::READ, |place, address, _, len| match place {
            Place::Host { at, .. } => {
                // From the start of the line that holds the first byte: lines are 64 bytes, and so are aligned alike here
                // and there.
                let lead = address % LINE;
                for line in (0..lead + len).step_by(LINE as usize) {
                    flush_line(at.wrapping_sub(lead as usize).wrapping_add(line as usize));
                }
                len
            }
            Place::Process => sva::accessible(address, len, Access::READ),
        })
    }

    /// Calls `each(place, address, done, len)` for one piece after another, each in an access of its own. It returns
    /// how many bytes it did; fewer than `len` is a page that went missing.
    #[inline]
    fn pieces(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        len: u64,
        access: Access,
        mut each: impl FnMut(Place, u64, u64, u64) -> u64,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let at = iova.get().wrapping_add(done);
            // No piece runs over the end of the 64-bit space.
            let most = (len - done).min(MAX_ACCESS).min(u64::MAX - at).max(1);
            self.slot.enter(&self.device.generation);
            let result = self.translate(pasid, at, most, access).map(|place| {
                let piece = if let Place::Host { len, .. } = place { len.min(most) } else { most };
                (piece, each(place, at, done, piece))
            });
            self.slot.exit();
            match result {
                Ok((piece, moved)) => {
                    done += moved;
                    if moved < piece {
                        let missing = at.wrapping_add(moved);
                        let reason = if access.allows(Access::WRITE) {
                            missing_or_read_only(missing)
                        } else {
                            FaultReason::NotMapped
                        };
                        return Err(self.refuse(pasid, missing, access, reason, done));
                    }
                }
                Err(reason) => return Err(self.refuse(pasid, at, access, reason, done)),
            }
        }
        Ok(())
    }

    /// Where `iova` is now, and how much of the `most` bytes is there in one piece. Only inside an access.
    #[inline]
    fn translate(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        most: u64,
        access: Access,
    ) -> Result<Place, FaultReason> {
        // Read inside the access: either it shows an unmap, or the unmap waits for this access.
        let generation = self.device.generation.now();
        match self.tlb.lookup(generation, pasid, iova, access) {
            Some((host, len)) if !self.check_leases => Ok(Place::host(host, len)),
            _ => self.translate_by_tables(pasid, iova, most, access, generation),
        }
    }

    #[cold]
    #[inline(never)]
    fn translate_by_tables(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        most: u64,
        access: Access,
        generation: u64,
    ) -> Result<Place, FaultReason> {
        // SAFETY: this is inside an access of this device's own slot, and the result does not leave it.
        let context = unsafe { self.device.context(pasid) };
        let domain = match context.ok_or(FaultReason::NotAttached)? {
            Context::Process => return Ok(Place::Process),
            Context::Domain(domain) => domain,
        };
        if iova >> self.device.address_width() != 0 {
            return Err(FaultReason::OutOfRange);
        }
        let mut run = domain.table.walk(iova).ok_or(FaultReason::NotMapped)?;
        if !run.allows(access) {
            return Err(FaultReason::Permission);
        }
        self.tlb.insert(generation, pasid, iova, run);
        if let Some(leases) = &domain.leases {
            let leased = leases.covered(iova, (run.end - iova).min(most), access);
            if leased == 0 {
                return Err(FaultReason::NotLeased);
            }
            run.end = iova + leased;
        }
        Ok(Place::host(run.host + (iova - run.start), run.end - iova))
    }

    #[cold]
    #[inline(never)]
    fn refuse(
        &self,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
        reason: FaultReason,
        done: u64,
    ) -> DmaFault {
        let iova = Iova::new(iova);
        self.device.faults.push(Fault { device: Arc::clone(&self.device.name), pasid, iova, access, reason });
        DmaFault { iova, access, reason, done }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        // A panic in the middle of an access must not make an unmap wait for ever.
        self.slot.exit();
        self.device.remove_slot(&self.slot);
    }
}

/// Bytes between the start of the page that holds the byte before `end`, and `end`.
fn in_last_page(end: u64) -> u64 {
    (end.wrapping_sub(1) & 0xfff) + 1
}

#[cold]
fn missing_or_read_only(address: u64) -> FaultReason {
    if sva::check(address, Access::READ) { FaultReason::Permission } else { FaultReason::NotMapped }
}

#[cfg(target_arch = "x86_64")]
fn flush_line(at: *mut u8) {
    // SAFETY: the line holds a byte that is valid during this access; SSE2, which has CLFLUSH, is part of x86-64.
    unsafe { std::arch::x86_64::_mm_clflush(at) };
}

#[cfg(not(target_arch = "x86_64"))]
fn flush_line(_at: *mut u8) {
    // DMA of a software device is coherent: there is nothing to write back.
}
