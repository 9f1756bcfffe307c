//! A device behind the software IOMMU: its tables of address spaces, and the slots of its buses.
//!
//! # Why this module is unsafe, and what makes it sound
//! A device reads its contexts without a lock while others detach. A context is published as the raw pointer of an
//! `Arc`; whoever takes it out of its cell waits for every access that could have seen it (`guard::wait_for`)
//! before the `Arc` is given back, and a reader keeps it no longer than its access.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::guard::{Generation, Slot, Waiting};
use super::{Bus, Context, SoftIommu};
use crate::{Attachable, AttachableKind, FaultQueue, Pasid};

const PASID_LEAF: usize = 1024;
const PASID_LEAVES: usize = 1024;

/// A cell that holds a context (an `Arc`, as a raw pointer) or null.
#[derive(Debug, Default)]
pub(super) struct ContextCell(pub(super) AtomicPtr<Context>);

/// A device behind the software IOMMU: one requester id, with its PASID table.
pub struct SoftDevice {
    pub(super) name: Arc<str>,
    pub(super) iommu: SoftIommu,
    pub(super) faults: FaultQueue,
    pub(super) generation: Generation,
    rid: ContextCell,
    /// By the upper ten bits of the PASID; a leaf, once made, stays until the device is dropped.
    pasids: [AtomicPtr<[ContextCell; PASID_LEAF]>; PASID_LEAVES],
    slots: Mutex<Vec<Arc<Slot>>>,
    /// Held while contexts are set or cleared.
    attach: Mutex<()>,
}

impl SoftDevice {
    pub(super) fn new(name: &str, iommu: SoftIommu) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            faults: FaultQueue::new(iommu.options.fault_records),
            iommu,
            generation: Generation::first(),
            rid: ContextCell::default(),
            pasids: [const { AtomicPtr::new(ptr::null_mut()) }; PASID_LEAVES],
            slots: Mutex::default(),
            attach: Mutex::default(),
        })
    }

    /// Its name, as messages show it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A new way to memory for one engine of this device. It is for what plays the device: see the trust that the
    /// documentation of [`Bus`] asks for.
    pub fn bus(self: &Arc<Self>) -> Bus {
        Bus::new(Arc::clone(self))
    }

    /// Accesses that were refused, the oldest first.
    pub fn faults(&self) -> &FaultQueue {
        &self.faults
    }

    pub(super) fn address_width(&self) -> u32 {
        self.iommu.options.address_width
    }

    pub(super) fn check_leases(&self) -> bool {
        self.iommu.options.check_leases
    }

    /// What `pasid` is attached to.
    ///
    /// # Safety
    /// The caller is inside an access (between `enter` and `exit` of a slot of this device) and uses the result
    /// only there: a detach waits for the access, and frees the context afterwards.
    #[inline]
    pub(super) unsafe fn context(&self, pasid: Option<Pasid>) -> Option<&Context> {
        let context = self.cell(pasid)?.0.load(Ordering::Acquire);
        // SAFETY: null, or an Arc's pointer that `SoftAttachment::drop` gives back only after this access.
        unsafe { context.as_ref() }
    }

    #[inline]
    fn cell(&self, pasid: Option<Pasid>) -> Option<&ContextCell> {
        let Some(pasid) = pasid else {
            return Some(&self.rid);
        };
        let number = pasid.get() as usize;
        // Acquire: pairs with the Release in `cell_or_new`, so that the leaf is seen filled in.
        let leaf = self.pasids[number / PASID_LEAF].load(Ordering::Acquire);
        // SAFETY: null, or a leaf that lives until the device is dropped.
        let leaf = unsafe { leaf.as_ref() }?;
        Some(&leaf[number % PASID_LEAF])
    }

    /// The cell, making its leaf if need be. With `attach` held.
    pub(super) fn cell_or_new(&self, pasid: Option<Pasid>) -> &ContextCell {
        if let Some(pasid) = pasid
            && self.cell(Some(pasid)).is_none()
        {
            let leaf = Box::new([const { ContextCell(AtomicPtr::new(ptr::null_mut())) }; PASID_LEAF]);
            self.pasids[pasid.get() as usize / PASID_LEAF].store(Box::into_raw(leaf), Ordering::Release);
        }
        self.cell(pasid).expect("the leaf was made just now, and leaves stay")
    }

    pub(super) fn attach_lock(&self) -> MutexGuard<'_, ()> {
        self.attach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_slot(&self) -> Arc<Slot> {
        let slot = Arc::new(Slot::new());
        self.slots().push(Arc::clone(&slot));
        slot
    }

    pub(super) fn remove_slot(&self, slot: &Arc<Slot>) {
        self.slots().retain(|other| !Arc::ptr_eq(other, slot));
    }

    /// Makes every cached translation void; returns what to wait for.
    pub(super) fn invalidate(&self) -> Waiting {
        (self.generation.begin_next(), self.slots().clone())
    }
}

impl Drop for SoftDevice {
    fn drop(&mut self) {
        // Every attachment and every bus holds the device, so nothing is attached and nobody looks.
        for leaf in &self.pasids {
            let leaf = leaf.load(Ordering::Relaxed);
            if !leaf.is_null() {
                // SAFETY: it came from Box::into_raw in `cell_or_new`, and nobody else has it.
                drop(unsafe { Box::from_raw(leaf) });
            }
        }
    }
}

impl fmt::Debug for SoftDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SoftDevice({})", self.name)
    }
}

impl Attachable for Arc<SoftDevice> {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Soft(self)
    }
}
