//! Bounded rings between threads, without locks: values go in at one end and come out of the other, in order.
//!
//! [`spsc`] makes a ring with one thread at each end, [`mpmc`] one whose ends any number of threads share. Values move one
//! at a time, in *bulk* (all or none) or in *bursts* (as many as fit, or as there are), the latter two from and to a
//! [`Burst`] as one piece of memory. What does not fit stays the caller's. No operation allocates or waits for a lock.
//! [`SharedRing`] is the same in memory that devices and other processes reach.
//!
//! ```
//! use underpass::{Burst, ring};
//!
//! let (mut tx, mut rx) = ring::spsc(4);
//! let mut burst = Burst::with_capacity(8);
//! burst.extend(["a", "b", "c", "d", "e", "f"].into_iter());
//!
//! assert_eq!(tx.push_burst(&mut burst), 4);
//! assert_eq!(burst[..], ["e", "f"]);
//! assert_eq!(tx.push("g"), Err("g"));
//!
//! assert_eq!(rx.pop(), Some("a"));
//! assert!(!rx.pop_bulk(&mut burst, 4), "there are three");
//! assert_eq!(rx.pop_burst(&mut burst), 3);
//! assert_eq!(burst[..], ["e", "f", "b", "c", "d"]);
//! ```
//!
//! # Why this module is unsafe, and what makes it sound
//! Several threads use one array of slots at the same time, through a shared reference, and move items in and out as memory.
//! The invariant: a slot is only touched by the thread that reserved it, between `reserve` and `publish` (module `index`);
//! and it holds an item exactly when it is between the consumers' and the producers' positions. In memory that others write
//! too (module `shared`) there is no such invariant: there, items are plain data, and all of it is reached as atomic words
//! alone.
//!
//! loom checks the invariant for `index`, on small rings that go round: for one thread at each end in all orders that it
//! knows of, for two producers or two consumers in those of up to three preemptions. What it runs has slots of its own
//! (module `modelled`), so that the copying in `slots` is not among what it checks; nor are the pauses of a
//! producer or consumer that is alone on its side, and how a shared ring gives up on who is dead.

mod copy;
mod heap;
mod index;
mod shared;
#[cfg(not(loom))]
mod slots;
#[cfg(loom)]
#[path = "modelled.rs"]
mod slots;

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::sync::Arc;

pub(crate) use self::copy::copy;
use self::heap::Heap;
use self::index::{Amount, Mode, Multi, Single};
pub use self::shared::{Plain, SharedConsumer, SharedProducer, SharedRing};
use crate::Burst;

/// A ring for one producer and one consumer, with room for `capacity` items.
pub fn spsc<T: Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    let ring = Arc::new(Heap::new(capacity));
    let (producer, consumer) = (ring.only_producer(), ring.only_consumer());
    (
        Producer { ring: Arc::clone(&ring), mode: producer, _not_sync: PhantomData },
        Consumer { ring, mode: consumer, _not_sync: PhantomData },
    )
}

/// A ring for any number of producers and consumers, with room for `capacity` items.
///
/// One thread waits for another only while that one is copying to or from the ring, on its own side and before it. If it
/// is interrupted there, those behind it give up their time slices to it.
pub fn mpmc<T: Send>(capacity: usize) -> (MpProducer<T>, MpConsumer<T>) {
    let ring = Arc::new(Heap::new(capacity));
    (MpProducer { ring: Arc::clone(&ring) }, MpConsumer { ring })
}

/// The end of an [`spsc`] ring that items go in at.
pub struct Producer<T> {
    ring: Arc<Heap<T>>,
    mode: Single,
    _not_sync: PhantomData<Cell<()>>,
}

/// The end of an [`spsc`] ring that items come out of.
pub struct Consumer<T> {
    ring: Arc<Heap<T>>,
    mode: Single,
    _not_sync: PhantomData<Cell<()>>,
}

/// An end of an [`mpmc`] ring that items go in at. Clones are ends of the same ring.
pub struct MpProducer<T> {
    ring: Arc<Heap<T>>,
}

/// An end of an [`mpmc`] ring that items come out of. Clones are ends of the same ring.
pub struct MpConsumer<T> {
    ring: Arc<Heap<T>>,
}

impl<T> Producer<T> {
    /// Puts an item in, or gives it back if the ring is full.
    #[inline]
    pub fn push(&mut self, item: T) -> Result<(), T> {
        // SAFETY: this is the ring's only producer.
        unsafe { push(&self.ring, &mut self.mode, item) }
    }

    /// Puts the first `count` items of `from` in and returns true, or none and returns false if there is no room for all.
    ///
    /// # Panics
    /// If `from` has fewer.
    #[inline]
    pub fn push_bulk(&mut self, from: &mut Burst<T>, count: usize) -> bool {
        // SAFETY: this is the ring's only producer.
        unsafe { push_from(&self.ring, &mut self.mode, from, Amount::exactly(count)) == count }
    }

    /// Puts copies of all `items` in and returns true, or of none and returns false if there is no room for all.
    #[inline]
    pub fn push_slice(&mut self, items: &[T]) -> bool
    where
        T: Copy,
    {
        // SAFETY: there are as many; they are Copy, so that they stay the caller's too.
        unsafe { self.ring.push(&mut self.mode, items.as_ptr(), Amount::exactly(items.len())) == items.len() }
    }

    /// Puts in as many of `from` as there is room for, the first ones; returns how many.
    #[inline]
    pub fn push_burst(&mut self, from: &mut Burst<T>) -> usize {
        let amount = Amount::up_to(from.len());
        // SAFETY: this is the ring's only producer.
        unsafe { push_from(&self.ring, &mut self.mode, from, amount) }
    }
}

impl<T> Consumer<T> {
    /// Takes the oldest item out.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        // SAFETY: this is the ring's only consumer.
        unsafe { pop(&self.ring, &mut self.mode) }
    }

    /// Appends the `count` oldest items to `to` and returns true, or none and returns false if there are fewer.
    ///
    /// # Panics
    /// If `to` has no room for as many.
    #[inline]
    pub fn pop_bulk(&mut self, to: &mut Burst<T>, count: usize) -> bool {
        // SAFETY: this is the ring's only consumer.
        unsafe { pop_to(&self.ring, &mut self.mode, to, Amount::exactly(count)) == count }
    }

    /// Appends the oldest items to `to`, as many as there are and it has room for; returns how many.
    #[inline]
    pub fn pop_burst(&mut self, to: &mut Burst<T>) -> usize {
        let amount = Amount::up_to(to.room());
        // SAFETY: this is the ring's only consumer.
        unsafe { pop_to(&self.ring, &mut self.mode, to, amount) }
    }
}

impl<T> MpProducer<T> {
    /// Puts an item in, or gives it back if the ring is full.
    #[inline]
    pub fn push(&self, item: T) -> Result<(), T> {
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { push(&self.ring, &mut Multi, item) }
    }

    /// Puts the first `count` items of `from` in and returns true, or none and returns false if there is no room for all.
    /// No other producer's come between them.
    ///
    /// # Panics
    /// If `from` has fewer.
    #[inline]
    pub fn push_bulk(&self, from: &mut Burst<T>, count: usize) -> bool {
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { push_from(&self.ring, &mut Multi, from, Amount::exactly(count)) == count }
    }

    /// Puts copies of all `items` in and returns true, or of none and returns false if there is no room for all.
    #[inline]
    pub fn push_slice(&self, items: &[T]) -> bool
    where
        T: Copy,
    {
        // SAFETY: there are as many; they are Copy, so that they stay the caller's too.
        unsafe { self.ring.push(&mut Multi, items.as_ptr(), Amount::exactly(items.len())) == items.len() }
    }

    /// Puts in as many of `from` as there is room for, the first ones; returns how many. No other producer's come between
    /// them.
    #[inline]
    pub fn push_burst(&self, from: &mut Burst<T>) -> usize {
        let amount = Amount::up_to(from.len());
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { push_from(&self.ring, &mut Multi, from, amount) }
    }
}

impl<T> MpConsumer<T> {
    /// Takes the oldest item out.
    #[inline]
    pub fn pop(&self) -> Option<T> {
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { pop(&self.ring, &mut Multi) }
    }

    /// Appends the `count` oldest items to `to` and returns true, or none and returns false if there are fewer.
    ///
    /// # Panics
    /// If `to` has no room for as many.
    #[inline]
    pub fn pop_bulk(&self, to: &mut Burst<T>, count: usize) -> bool {
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { pop_to(&self.ring, &mut Multi, to, Amount::exactly(count)) == count }
    }

    /// Appends the oldest items to `to`, as many as there are and it has room for; returns how many.
    #[inline]
    pub fn pop_burst(&self, to: &mut Burst<T>) -> usize {
        let amount = Amount::up_to(to.room());
        // SAFETY: any number of threads may be a `Multi`.
        unsafe { pop_to(&self.ring, &mut Multi, to, amount) }
    }
}

/// An [`mpmc`] ring as one value, for pools: any number of threads copy slices in and out.
pub(crate) struct Mpmc<T>(Heap<T>);

impl<T: Copy + Send> Mpmc<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self(Heap::new(capacity))
    }

    pub(crate) fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// How many items are in it: as [`MpConsumer::len`] says. All that was done before they were put there has happened.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts all `items` in, or none and returns false. The ring is not touched any more once others can take them.
    #[inline]
    pub(crate) fn push(&self, items: &[T]) -> bool {
        // SAFETY: they are as many, and Copy. Any number of threads may be a `Multi`.
        let pushed = unsafe { self.0.push(&mut Multi, items.as_ptr(), Amount::exactly(items.len())) };
        pushed == items.len()
    }

    /// Takes as many as there are and fit out, to the start of `out`; returns how many.
    #[inline]
    pub(crate) fn pop(&self, out: &mut [MaybeUninit<T>]) -> usize {
        // SAFETY: there is room for as many. Any number of threads may be a `Multi`.
        unsafe { self.0.pop(&mut Multi, out.as_mut_ptr().cast(), Amount::up_to(out.len())) }
    }
}

/// # Safety
/// With [`Single`], it is the ring's only producer.
#[inline]
unsafe fn push<T>(ring: &Heap<T>, mode: &mut impl Mode, item: T) -> Result<(), T> {
    let item = ManuallyDrop::new(item);
    // SAFETY: it points to one item, and this is not used any more if it was moved.
    let pushed = unsafe { ring.push(mode, &raw const *item, Amount::exactly(1)) };
    if pushed == 1 { Ok(()) } else { Err(ManuallyDrop::into_inner(item)) }
}

/// # Safety
/// As for [`push`].
///
/// # Panics
/// If `from` has fewer than `amount.most()` items.
#[inline]
unsafe fn push_from<T>(ring: &Heap<T>, mode: &mut impl Mode, from: &mut Burst<T>, amount: Amount) -> usize {
    let all = from.len();
    assert!(amount.most() <= all, "{} items of {all}", amount.most());
    let items = from.as_vec();
    // SAFETY: there are as many, and those moved are forgotten below.
    let pushed = unsafe { ring.push(mode, items.as_ptr(), amount) };
    // SAFETY: none of what is left in place is an item twice, if what comes next does not happen.
    unsafe { items.set_len(0) };
    if pushed < all {
        let start = items.as_mut_ptr();
        // SAFETY: `pushed` is less than there were.
        let rest = unsafe { start.add(pushed) };
        // SAFETY: the rest, moved to the front.
        unsafe { std::ptr::copy(rest, start, all - pushed) };
        // SAFETY: they are there now.
        unsafe { items.set_len(all - pushed) };
    }
    pushed
}

/// # Safety
/// With [`Single`], it is the ring's only consumer.
#[inline]
unsafe fn pop<T>(ring: &Heap<T>, mode: &mut impl Mode) -> Option<T> {
    let mut item = MaybeUninit::uninit();
    // SAFETY: there is room for one.
    let popped = unsafe { ring.pop(mode, item.as_mut_ptr(), Amount::exactly(1)) };
    // SAFETY: one was moved there.
    (popped == 1).then(|| unsafe { item.assume_init() })
}

/// # Safety
/// As for [`pop`].
///
/// # Panics
/// If `to` has room for fewer than `amount.most()` items.
#[inline]
unsafe fn pop_to<T>(ring: &Heap<T>, mode: &mut impl Mode, to: &mut Burst<T>, amount: Amount) -> usize {
    let room = to.room();
    assert!(amount.most() <= room, "{} items do not fit, {room} do", amount.most());
    let items = to.as_vec();
    // SAFETY: there is room for as many.
    let popped = unsafe { ring.pop(mode, items.spare_capacity_mut().as_mut_ptr().cast(), amount) };
    // SAFETY: so many have been added, and they fit.
    unsafe { items.set_len(items.len() + popped) };
    popped
}

/// What all ends tell of their ring.
macro_rules! observe {
    ($($end:ident)*) => { $(
        impl<T> $end<T> {
            /// How many items the ring has room for.
            #[inline]
            pub fn capacity(&self) -> usize {
                self.ring.capacity()
            }

            /// How many items are in it at this moment. Another thread may change that at once.
            #[inline]
            pub fn len(&self) -> usize {
                self.ring.len()
            }

            /// Whether none is in it at this moment.
            #[inline]
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }
        }

        impl<T> fmt::Debug for $end<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({} of {})", stringify!($end), self.len(), self.capacity())
            }
        }
    )* };
}

observe!(Producer Consumer MpProducer MpConsumer);

impl<T> Clone for MpProducer<T> {
    fn clone(&self) -> Self {
        Self { ring: Arc::clone(&self.ring) }
    }
}

impl<T> Clone for MpConsumer<T> {
    fn clone(&self) -> Self {
        Self { ring: Arc::clone(&self.ring) }
    }
}

#[cfg(test)]
mod tests;

#[cfg(all(test, loom))]
mod loom_tests;
