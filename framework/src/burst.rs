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

    /// Appends all of `items`. Large ones are made in place, where [`push`](Self::push) would move each twice because it
    /// may have to give it back.
    ///
    /// # Panics
    /// If there is no room for as many.
    #[inline]
    pub fn extend(&mut self, items: impl ExactSizeIterator<Item = T>) {
        assert!(items.len() <= self.room(), "{} items do not fit, {} do", items.len(), self.room());
        self.0.extend(items);
    }

    /// Moves the first `count` items of `from` to the end of this burst.
    ///
    /// # Panics
    /// If there are fewer, or no room for as many.
    #[inline]
    pub fn append(&mut self, from: &mut Self, count: usize) {
        assert!(count <= self.room(), "{count} items do not fit, {} do", self.room());
        let all = count == from.len();
        if all && self.is_empty() && self.capacity() == from.capacity() {
            // The two trade places: nothing is copied.
            std::mem::swap(self, from);
        } else if all {
            self.0.append(&mut from.0);
        } else {
            self.0.extend(from.0.drain(..count));
        }
    }

    /// The vector, for those who move items in or out as memory. It must not grow.
    #[inline]
    pub(crate) fn as_vec(&mut self) -> &mut Vec<T> {
        &mut self.0
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

    /// Drops all items, one by one. For packets there is [`free`](Self::free).
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

#[cfg(test)]
mod tests {
    use super::*;

    fn of(items: &[u8], capacity: usize) -> Burst<u8> {
        let mut burst = Burst::with_capacity(capacity);
        burst.extend(items.iter().copied());
        burst
    }

    #[test]
    fn appending_moves_the_first_items_and_keeps_both_capacities() {
        // To some that are there, to an empty one, and to an empty one of the same capacity.
        for (before, capacity) in [(&[1, 2][..], 5), (&[], 5), (&[], 3)] {
            for count in 0..=3 {
                let (mut to, mut from) = (of(before, capacity), of(&[3, 4, 5], 3));
                to.append(&mut from, count);
                assert_eq!(to[..], [before, &[3, 4, 5][..count]].concat());
                assert_eq!(from[..], [3, 4, 5][count..]);
                assert_eq!((to.capacity(), from.capacity()), (capacity, 3));
            }
        }
    }

    #[test]
    fn a_full_one_gives_the_item_back() {
        let mut burst = of(&[1, 2], 2);
        assert_eq!(burst.push(3), Err(3));
        assert_eq!(burst.drain(1).collect::<Vec<_>>(), [1]);
        assert_eq!((burst.room(), &burst[..]), (1, &[2][..]));
    }

    #[test]
    #[should_panic(expected = "3 items do not fit, 2 do")]
    fn appending_more_than_fits_is_a_bug() {
        of(&[1], 3).append(&mut of(&[2, 3, 4], 3), 3);
    }

    #[test]
    #[should_panic(expected = "2 items do not fit, 1 do")]
    fn extending_past_the_capacity_is_a_bug() {
        of(&[1, 2], 3).extend([3, 4].into_iter());
    }
}
