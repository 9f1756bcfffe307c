//! The words that the CPU and a device share.

use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// A word that the CPU and a device use at the same time: `u16`, `u32` or `u64`, each access of which is atomic. A place
/// in memory is a word of one width for both sides.
pub trait Word: Copy + Default + Eq + fmt::Debug + Send + 'static + sealed::Sealed {
    /// The atomic of this width.
    type Atomic: fmt::Debug + Send + Sync;

    /// Reads the word.
    fn load(word: &Self::Atomic, order: Ordering) -> Self;

    /// Writes the word.
    fn store(word: &Self::Atomic, value: Self, order: Ordering);

    /// Its bits, zero-extended.
    fn to_bits(self) -> u64;

    /// The lowest bits of `bits`.
    fn from_bits(bits: u64) -> Self;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! word {
    ($word:ty, $atomic:ty) => {
        impl sealed::Sealed for $word {}

        impl Word for $word {
            type Atomic = $atomic;

            #[inline]
            fn load(word: &$atomic, order: Ordering) -> Self {
                word.load(order)
            }

            #[inline]
            fn store(word: &$atomic, value: Self, order: Ordering) {
                word.store(value, order);
            }

            #[inline]
            fn to_bits(self) -> u64 {
                self.into()
            }

            #[inline]
            fn from_bits(bits: u64) -> Self {
                bits as Self
            }
        }

        // Ring memory is cast to atomics at addresses that are multiples of the word's size.
        const _: () = assert!(
            size_of::<$atomic>() == size_of::<$word>() && align_of::<$atomic>() == size_of::<$word>()
        );
    };
}

const _: () = assert!(cfg!(target_endian = "little"), "words are in the CPU's byte order, which is PCI's");

word!(u16, AtomicU16);
word!(u32, AtomicU32);
word!(u64, AtomicU64);
