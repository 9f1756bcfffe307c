//! A fixed-capacity vector, the unit that the data path moves.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::vec::Drain;

/// A vector that never grows past the capacity it was made with, so that filling it allocates nothing.
pub struct Burst<T>(Vec<T>);

impl<T> Burst<T> {
    /// An empty burst with room for `capacity` items.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Appends an item, or gives it back if there is no room.
    #[inline]
    pub fn push(&mut self, item: T) -> Result<(), T> {
        if self.is_full() {
            return Err(item);
        }
        self.0.push(item);
        Ok(())
    }

    /// Appends an item, for a caller who knows that there is room: large items that can not come back are moved once
    /// instead of twice.
    ///
    /// # Panics
    /// If there is none.
    #[inline]
    pub fn put(&mut self, item: T) {
        assert!(!self.is_full(), "a burst of {} items is full", self.capacity());
        self.0.push(item);
    }

    /// Takes the last item.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.0.pop()
    }

    /// How many more items fit.
    #[inline]
    pub fn room(&self) -> usize {
        self.0.capacity() - self.0.len()
    }

    /// Whether no more items fit.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.0.len() == self.0.capacity()
    }

    /// How many items fit in all.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// Takes the first `count` items out, in order.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline]
    pub fn drain(&mut self, count: usize) -> Drain<'_, T> {
        self.0.drain(..count)
    }

    /// Takes all items out, in order.
    #[inline]
    pub fn drain_all(&mut self) -> Drain<'_, T> {
        self.0.drain(..)
    }

    /// Drops all items.
    #[inline]
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl<T> Deref for Burst<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for Burst<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Burst<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
