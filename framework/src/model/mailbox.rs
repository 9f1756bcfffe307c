//! What is between a doorbell and the engines: submissions in a bounded queue, without a lock.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;
use crossbeam::utils::CachePadded;

/// In [`Mailbox::state`]: nothing is accepted.
const CLOSED: u64 = 1 << 63;

/// Submissions that a device has accepted and that its engines have yet to take, the oldest first.
///
/// Any number of threads submit and take at once; none waits for another, except for one that was interrupted between
/// being accepted and leaving its submission. What was accepted and what was taken is counted, so that a device can
/// tell when all that it held at some time is done: that is what draining a queue is.
///
/// ```
/// use underpass::model::{Mailbox, Refused};
///
/// let portal = Mailbox::new(8);
/// assert_eq!(portal.accept(8, "too early"), Err(Refused::Closed));
/// portal.open();
/// portal.accept(1, "first").unwrap();
/// assert_eq!(portal.accept(1, "second"), Err(Refused::Full));
/// assert_eq!(portal.take(), Some("first"));
/// assert_eq!((portal.accepted(), portal.taken()), (1, 1));
/// ```
pub struct Mailbox<T> {
    items: ArrayQueue<T>,
    /// How many were accepted so far, and [`CLOSED`]: one word, so that none is accepted after it was closed.
    state: CachePadded<AtomicU64>,
    /// How many of them were taken.
    taken: CachePadded<AtomicU64>,
}

/// Why a [`Mailbox`] did not accept a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is closed.
    Closed,
    /// It holds as many as the submitter may fill it with.
    Full,
}

impl<T> Mailbox<T> {
    /// A closed one, with room for `capacity` submissions.
    ///
    /// # Panics
    /// If `capacity` is 0.
    pub fn new(capacity: usize) -> Self {
        Self {
            items: ArrayQueue::new(capacity),
            state: CachePadded::new(AtomicU64::new(CLOSED)),
            taken: CachePadded::default(),
        }
    }

    /// Starts to accept submissions. Whoever finds it open sees what was written before this call.
    pub fn open(&self) {
        // Release: pairs with the Acquire in `is_open` and `accept`.
        self.state.fetch_and(!CLOSED, Ordering::Release);
    }

    /// Stops to accept submissions. Those that were accepted stay; [`accepted`](Self::accepted) no longer changes.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
    }

    /// Whether it accepts submissions at this moment.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED == 0
    }

    /// Accepts a submission if fewer than `limit` are held, and fewer than there is room for.
    ///
    /// # Errors
    /// [`Refused`]; the submission is dropped.
    #[inline]
    pub fn accept(&self, limit: usize, item: T) -> Result<(), Refused> {
        let limit = limit.min(self.items.capacity()) as u64;
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            if state & CLOSED != 0 {
                return Err(Refused::Closed);
            }
            // `taken` is read after `state`, so that it may be the greater: then the exchange below fails.
            if state.saturating_sub(self.taken()) >= limit {
                return Err(Refused::Full);
            }
            let next =
                self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire);
            match next {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let mut item = item;
        // There is room: `limit` is at most the capacity, and a place counts as taken only when it is free again.
        while let Err(back) = self.items.push(item) {
            item = back;
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Takes the oldest submission.
    #[inline]
    pub fn take(&self) -> Option<T> {
        let item = self.items.pop()?;
        // Release: pairs with the Acquire in `taken`.
        self.taken.fetch_add(1, Ordering::Release);
        Some(item)
    }

    /// Drops all that was accepted, also what is still on its way. Of use once it is closed, in a reset.
    pub fn clear(&self) {
        while self.taken() < self.accepted() {
            if self.take().is_none() {
                std::hint::spin_loop();
            }
        }
    }

    /// How many were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.state.load(Ordering::Acquire) & !CLOSED
    }

    /// How many were taken so far. Whoever sees one taken sees what its taker wrote before it took it.
    #[inline]
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// How many are held: accepted, and not yet taken.
    pub fn occupancy(&self) -> usize {
        // In this order, so that none is counted that was taken before.
        let accepted = self.accepted();
        accepted.saturating_sub(self.taken()) as usize
    }

    /// Whether there is nothing to take at this moment.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

impl<T> fmt::Debug for Mailbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox")
            .field("is_open", &self.is_open())
            .field("accepted", &self.accepted())
            .field("taken", &self.taken())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn it_accepts_while_it_is_open_and_keeps_the_order() {
        let mailbox = Mailbox::new(4);
        assert_eq!(mailbox.accept(4, 0), Err(Refused::Closed));
        mailbox.open();
        for n in 1..=3 {
            mailbox.accept(4, n).unwrap();
        }
        mailbox.close();
        assert_eq!(mailbox.accept(4, 4), Err(Refused::Closed));
        assert_eq!((mailbox.accepted(), mailbox.taken(), mailbox.occupancy()), (3, 0, 3));
        assert_eq!((mailbox.take(), mailbox.take()), (Some(1), Some(2)), "what it held stays");
        assert_eq!((mailbox.accepted(), mailbox.taken(), mailbox.occupancy()), (3, 2, 1));
        assert!(!mailbox.is_empty());
        mailbox.clear();
        assert!(mailbox.is_empty() && mailbox.take().is_none());
        assert_eq!(mailbox.taken(), 3);
        mailbox.open();
        mailbox.accept(4, 5).unwrap();
        assert_eq!(mailbox.accepted(), 4, "the counts go on");
    }

    #[test]
    fn a_limit_is_the_submitters_own_and_the_capacity_everybodys() {
        let mailbox = Mailbox::new(3);
        mailbox.open();
        assert_eq!(mailbox.accept(0, ()), Err(Refused::Full));
        mailbox.accept(1, ()).unwrap();
        assert_eq!(mailbox.accept(1, ()), Err(Refused::Full));
        mailbox.accept(2, ()).unwrap();
        mailbox.accept(usize::MAX, ()).unwrap();
        assert_eq!(mailbox.accept(usize::MAX, ()), Err(Refused::Full));
        mailbox.take().unwrap();
        assert_eq!(mailbox.accept(2, ()), Err(Refused::Full));
        mailbox.accept(3, ()).unwrap();
    }

    #[test]
    fn two_submitters_and_two_takers_lose_nothing_and_never_pass_the_limit() {
        const EACH: u64 = 50_000;
        const LIMIT: usize = 3;
        let mailbox = Mailbox::new(4);
        mailbox.open();
        let submit = |first: u64| {
            for n in first..first + EACH {
                while mailbox.accept(LIMIT, n) == Err(Refused::Full) {
                    thread::yield_now();
                }
            }
        };
        let take = || {
            let mut seen = Vec::new();
            while mailbox.taken() < 2 * EACH {
                assert!(mailbox.occupancy() <= LIMIT);
                match mailbox.take() {
                    Some(n) => seen.push(n),
                    None => thread::yield_now(),
                }
            }
            // Each submitter's come in its order.
            for of_one in [0..EACH, EACH..2 * EACH] {
                assert!(seen.iter().filter(|n| of_one.contains(n)).is_sorted());
            }
            seen
        };
        let mut all = thread::scope(|scope| {
            scope.spawn(|| submit(0));
            scope.spawn(|| submit(EACH));
            let takers = [scope.spawn(take), scope.spawn(take)];
            takers.map(|taker| taker.join().unwrap()).concat()
        });
        all.sort_unstable();
        assert!(all.into_iter().eq(0..2 * EACH));
    }

    #[test]
    fn nothing_is_accepted_after_it_was_closed() {
        for _ in 0..200 {
            let mailbox = Mailbox::new(2);
            mailbox.open();
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                let submitter = scope.spawn(|| {
                    let mut accepted = 0;
                    loop {
                        match mailbox.accept(2, ()) {
                            Ok(()) => accepted += 1,
                            Err(Refused::Full) => drop(mailbox.take()),
                            Err(Refused::Closed) => break accepted,
                        }
                        over.store(true, Ordering::Relaxed);
                    }
                });
                while !over.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
                mailbox.close();
                let at_close = mailbox.accepted();
                mailbox.clear();
                assert_eq!((mailbox.accepted(), mailbox.occupancy()), (at_close, 0));
                assert_eq!(submitter.join().unwrap(), at_close);
            });
            assert!(mailbox.is_empty());
        }
    }
}
