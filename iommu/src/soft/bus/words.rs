//! The words by which a device and its driver hand memory to each other: each access is one atomic of the word's width.
//!
//! Under SVA the kernel copies bytes instead, so that a word of which more than its lowest byte changes may be seen half
//! written: handshakes there rely on that byte alone, as those of DSA do.
//!
//! # Why this module is unsafe, and what makes it sound
//! It makes references to atomics out of translated addresses; they live inside one access (see the parent module), lie
//! in one translated place, and are aligned because the IOVA is, pages being congruent.

use std::sync::atomic::Ordering;

use super::{Bus, DmaFault, Place, missing_or_read_only, sva};
use crate::{Access, FaultReason, Iova, Pasid, Word};

impl Bus {
    /// Reads the aligned word at `iova`, with Acquire: what its writer wrote before it is seen.
    #[inline]
    pub fn load<W: Word>(&mut self, pasid: Option<Pasid>, iova: Iova) -> Result<W, DmaFault> {
        let mut value = W::default();
        self.words(pasid, iova, size_of::<W>(), Access::READ, |place| match place {
            Place::Host { at, .. } => {
                value = W::load(word_at::<W>(at, 0), Ordering::Acquire);
                true
            }
            Place::Process => {
                let mut bytes = [0; 8];
                let complete = sva::read(iova.get(), &mut bytes[..size_of::<W>()]) == size_of::<W>();
                value = W::from_bits(u64::from_le_bytes(bytes));
                complete
            }
        })?;
        Ok(value)
    }

    /// Writes the aligned word at `iova`, with Release: what was written before it is seen by whoever reads it. Under
    /// SVA the lowest byte is written last instead of all at once: the kernel copies bytes.
    #[inline]
    pub fn store<W: Word>(&mut self, pasid: Option<Pasid>, iova: Iova, value: W) -> Result<(), DmaFault> {
        self.publish(pasid, iova, &[value])
    }

    /// Writes a record whose first word is its handshake: that one last, with Release, as [`store`](Self::store) does.
    /// The record is aligned to its own size, a power of two.
    #[inline]
    pub fn publish<W: Word, const N: usize>(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        words: &[W; N],
    ) -> Result<(), DmaFault> {
        const { assert!(N.is_power_of_two() && N <= 8, "a record is one to eight words, aligned to its size") };
        self.words(pasid, iova, size_of_val(words), Access::WRITE, |place| match place {
            Place::Host { at, .. } => {
                for (n, word) in words.iter().enumerate().skip(1) {
                    // Relaxed: the handshake's Release publishes it.
                    W::store(word_at::<W>(at, n), *word, Ordering::Relaxed);
                }
                W::store(word_at::<W>(at, 0), words[0], Ordering::Release);
                true
            }
            Place::Process => {
                let size = size_of::<W>();
                let rest = words[1..].iter().enumerate().all(|(n, word)| {
                    let at = iova.get() + ((n + 1) * size) as u64;
                    sva::write(at, &word.to_bits().to_le_bytes()[..size]) == size
                });
                let first = words[0].to_bits().to_le_bytes();
                rest && sva::write(iova.get() + 1, &first[1..size]) == size - 1
                    && sva::write(iova.get(), &first[..1]) == 1
            }
        })
    }

    /// Reads the words from `iova` on, Relaxed: after the [`load`](Self::load) of the word that publishes them.
    #[inline]
    pub fn load_all<W: Word>(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        out: &mut [W],
    ) -> Result<(), DmaFault> {
        self.check_aligned::<W>(pasid, iova, Access::READ)?;
        self.pieces(pasid, iova, size_of_val(out) as u64, Access::READ, |place, address, done, len| {
            let size = size_of::<W>() as u64;
            let out = &mut out[(done / size) as usize..((done + len) / size) as usize];
            // A lease may end inside a word: then that word is missing.
            let whole = size_of_val(out) as u64;
            match place {
                Place::Host { at, .. } => {
                    for (n, value) in out.iter_mut().enumerate() {
                        *value = W::load(word_at::<W>(at, n), Ordering::Relaxed);
                    }
                    whole
                }
                Place::Process => {
                    let mut bytes = [0; 8];
                    for (n, value) in out.iter_mut().enumerate() {
                        let at = n as u64 * size;
                        if sva::read(address + at, &mut bytes[..size as usize]) as u64 != size {
                            return at;
                        }
                        *value = W::from_bits(u64::from_le_bytes(bytes));
                    }
                    whole
                }
            }
        })
    }

    /// Writes the words from `iova` on, Relaxed: before the [`store`](Self::store) of the word that publishes them.
    #[inline]
    pub fn store_all<W: Word>(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        words: &[W],
    ) -> Result<(), DmaFault> {
        self.check_aligned::<W>(pasid, iova, Access::WRITE)?;
        self.pieces(pasid, iova, size_of_val(words) as u64, Access::WRITE, |place, address, done, len| {
            let size = size_of::<W>() as u64;
            let words = &words[(done / size) as usize..((done + len) / size) as usize];
            // A lease may end inside a word: then that word is missing.
            let whole = size_of_val(words) as u64;
            match place {
                Place::Host { at, .. } => {
                    for (n, value) in words.iter().enumerate() {
                        W::store(word_at::<W>(at, n), *value, Ordering::Relaxed);
                    }
                    whole
                }
                Place::Process => {
                    for (n, value) in words.iter().enumerate() {
                        let at = n as u64 * size;
                        let bytes = value.to_bits().to_le_bytes();
                        if sva::write(address + at, &bytes[..size as usize]) as u64 != size {
                            return at;
                        }
                    }
                    whole
                }
            }
        })
    }

    #[inline]
    fn check_aligned<W: Word>(
        &self,
        pasid: Option<Pasid>,
        iova: Iova,
        access: Access,
    ) -> Result<(), DmaFault> {
        if iova.is_aligned_to(size_of::<W>() as u64) {
            return Ok(());
        }
        Err(self.refuse(pasid, iova.get(), access, FaultReason::Misaligned, 0))
    }

    /// Calls `each` with the place of `len` bytes of words, which are aligned to their size in all.
    #[inline]
    fn words(
        &mut self,
        pasid: Option<Pasid>,
        iova: Iova,
        len: usize,
        access: Access,
        each: impl FnOnce(Place) -> bool,
    ) -> Result<(), DmaFault> {
        let bytes = len as u64;
        if !iova.is_aligned_to(bytes) {
            return Err(self.refuse(pasid, iova.get(), access, FaultReason::Misaligned, 0));
        }
        self.slot.enter(&self.device.generation);
        // Aligned as they are they cross no page, so what is translated holds all of them; a lease may end inside.
        let result = match self.translate(pasid, iova.get(), bytes, access) {
            Ok(Place::Host { len, .. }) if len < bytes => Err(FaultReason::NotLeased),
            Ok(place) => {
                if each(place) {
                    Ok(())
                } else if access.allows(Access::WRITE) {
                    Err(missing_or_read_only(iova.get()))
                } else {
                    Err(FaultReason::NotMapped)
                }
            }
            Err(reason) => Err(reason),
        };
        self.slot.exit();
        result.map_err(|reason| self.refuse(pasid, iova.get(), access, reason, 0))
    }
}

/// Word `n` from `at` on: inside a translated place that is large enough, and aligned to the word's size.
#[inline]
fn word_at<'a, W: Word>(at: *mut u8, n: usize) -> &'a W::Atomic {
    // SAFETY: the caller translated this word and those before it in one piece.
    let word = unsafe { at.cast::<W::Atomic>().add(n) };
    // SAFETY: valid during this access, which the reference does not leave, and aligned (see above); atomics have their
    // words' size and alignment.
    unsafe { &*word }
}
