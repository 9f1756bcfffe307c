//! Copying short runs of items.

use std::mem::MaybeUninit;
use std::ptr;

/// Moves `count` items to memory that does not overlap theirs.
///
/// In pieces of 16 bytes, in order. Between two cores that is up to twice as fast as the C library's `memcpy`, which takes
/// larger ones and the last of them first; and runs are often so short that calling it would take longer than copying.
///
/// # Safety
/// As for [`ptr::copy_nonoverlapping`].
#[inline]
pub(crate) unsafe fn copy<T>(from: *const T, to: *mut T, count: usize) {
    type Piece = MaybeUninit<[u8; 16]>;
    let bytes = count * size_of::<T>();
    let (mut from, mut to) = (from.cast::<Piece>(), to.cast::<Piece>());
    // Two a turn: if it were one, the compiler would see that this is a `memcpy` and call it.
    for _ in 0..bytes / 32 {
        for _ in 0..2 {
            // SAFETY: the piece is inside the run, which the caller may read. Any bytes are a `MaybeUninit`.
            let piece = unsafe { from.read_unaligned() };
            // SAFETY: the piece is inside the run, which the caller may write.
            unsafe { to.write_unaligned(piece) };
            // SAFETY: no further than the end of the run.
            from = unsafe { from.add(1) };
            // SAFETY: no further than the end of the run.
            to = unsafe { to.add(1) };
        }
    }
    let rest = bytes % 32;
    if rest > 0 {
        // SAFETY: what is left of both runs, which the caller may read and write, and which do not overlap.
        unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), rest) };
    }
}
