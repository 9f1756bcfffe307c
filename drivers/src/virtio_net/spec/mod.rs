//! The layouts and constants of virtio-net over modern PCI, and nothing else: what the driver and the model agree on.
//!
//! Source: *Virtual I/O Device (VIRTIO) Version 1.2* and *1.3*, OASIS; sections are given by their titles, with 1.2's
//! number where that helps to find them. What only 1.3 has is marked. All of it is little-endian.
//!
//! # The words that driver and device share
//! Ring memory is accessed by atomics of one width a word, by both sides:
//!
//! | Word                                                       | Width | Written by | Order              |
//! |------------------------------------------------------------|-------|------------|--------------------|
//! | descriptor: each half                                      | 64    | driver     | Relaxed            |
//! | split: `avail.idx`                                         | 16    | driver     | Release, Acquire   |
//! | split: `avail.flags`, `avail.ring[n]`, `used_event`        | 16    | driver     | Relaxed            |
//! | split: `used.idx`                                          | 16    | device     | Release, Acquire   |
//! | split: `used.flags`, `avail_event`                         | 16    | device     | Relaxed            |
//! | split: `used.ring[n].id`, `used.ring[n].len`               | 32    | device     | Relaxed            |
//! | packed: descriptor `addr`                                  | 64    | driver     | Relaxed            |
//! | packed: descriptor `len`, `id` and `flags`, as one word    | 64    | both       | Release, Acquire   |
//! | packed: event suppression, as one word                     | 32    | its owner  | Relaxed            |
//!
//! The indices are words of their own although flags and index are neighbours: an available ring may start at any even
//! address, where a wider word would be misaligned; and a used ring's elements lie at odd multiples of 4, so their
//! halves are words. Between publishing buffers and reading whether the other side wants to be notified there is a
//! `SeqCst` fence on both sides ("Available Buffer Notification Suppression", 2.7.10): without it both may read the old
//! value and sleep.

pub mod control;
mod features;
pub mod net;
pub mod packed;
pub mod pci;
pub mod split;

pub use features::Features;

const _: () = assert!(cfg!(target_endian = "little"), "everything here is in the CPU's byte order");
