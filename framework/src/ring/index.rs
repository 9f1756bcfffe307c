//! Who may use which slots, and since when: the algorithm of all rings, in safe code.
//!
//! Positions count the items that ever went through the ring; 64 bits of them never wrap. Each [`Side`] (that of the
//! producers, that of the consumers) has two of them. `head` is how far slots are reserved, `tail` how far they are
//! finished with: written, or read. Slots between a side's tail and its head belong to whoever reserved them, those
//! between the two sides' tails hold items, and the rest is free:
//!
//! ```text
//! consumers.tail <= consumers.head <= producers.tail <= producers.head <= consumers.tail + capacity
//! ```
//!
//! A side only ever reads the other's *tail*, by an Acquire load that pairs with the Release store in `publish`: what was
//! written to a slot, or read from it, happened before. It does so only when what it saw last time is not enough,
//! since that line is in the other core's cache; what it saw is kept in `limit`.
//!
//! In memory that others share too, any of these words may hold anything. So all that is read from there is checked before
//! it is used: what is found is [`Refused::Corrupt`], and nothing overflows or waits for ever.

use std::sync::atomic::{AtomicU64, Ordering};

/// A 64-bit atomic word: the standard one, or loom's.
pub(super) trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    /// Replaces `old` (Release), or tells what is there (Acquire). May fail for no reason.
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64>;
    /// Waits for another thread to do something, for the `turn`th time.
    fn wait(turn: u32);
}

/// Two cache lines, since processors fetch lines in pairs: what one core writes and another does not is in its own.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// The positions of those who push, or of those who pop.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Side<W> {
    reserved: Line<Reserved<W>>,
    tail: Line<W>,
}

/// What the threads of one side share among themselves, if there are several.
#[derive(Debug, Default)]
#[repr(C)]
struct Reserved<W> {
    head: W,
    /// Up to where slots can be reserved, as far as is known: the other side's tail when it was last read, plus
    /// this side's lead.
    limit: W,
}

impl<W: Word> Side<W> {
    /// How many items this side has finished with.
    pub(super) fn tail(&self) -> u64 {
        self.tail.0.load(Ordering::Acquire)
    }
}

/// A ring as one of its sides sees it.
pub(super) struct View<'a, W> {
    pub(super) ours: &'a Side<W>,
    pub(super) theirs: &'a Side<W>,
    /// By how much this side may be ahead of the other's tail: the capacity for producers, 0 for consumers.
    pub(super) lead: u64,
    pub(super) capacity: u64,
    /// How often to wait for another thread of this side before it is taken for dead; `None`: for as long as it takes.
    pub(super) patience: Option<u32>,
}

impl<W: Word> View<'_, W> {
    /// Up to where slots can be reserved.
    #[inline]
    fn limit(&self) -> u64 {
        self.theirs.tail().wrapping_add(self.lead)
    }
}

/// A run of slots that one thread may write, or read, until it publishes them. Never longer than the ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) at: u64,
    pub(super) count: u64,
}

/// Why no slots were reserved or published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// There are not as many.
    TooFew,
    /// The positions make no sense.
    Corrupt,
}

/// How many items an operation moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amount {
    /// No less than this, or none.
    least: u64,
    /// No more than this.
    most: u64,
}

impl Amount {
    /// All or nothing.
    pub(super) fn exactly(count: usize) -> Self {
        Self { least: count as u64, most: count as u64 }
    }

    /// As many as possible.
    pub(super) fn up_to(count: usize) -> Self {
        Self { least: 1, most: count as u64 }
    }

    pub(super) fn most(self) -> usize {
        self.most as usize
    }

    /// How many of `free` it takes. An empty run is none: among several threads, who publishes nothing would take the
    /// tail back to where another has gone on from.
    fn of(self, free: u64) -> Result<u64, Refused> {
        let count = self.most.min(free);
        if count >= self.least.max(1) { Ok(count) } else { Err(Refused::TooFew) }
    }
}

/// How the threads of one side share it.
pub(super) trait Mode {
    /// Reserves slots.
    fn reserve<W: Word>(&mut self, ring: &View<'_, W>, amount: Amount) -> Result<Run, Refused>;

    /// Gives a run to the other side.
    fn publish<W: Word>(&mut self, ring: &View<'_, W>, run: Run) -> Result<(), Refused>;
}

/// A side that one thread has for itself: where it is, nobody else needs to know. In cache lines of its own, as a ring's two
/// ends are often neighbours on the stack that they were made on.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Single {
    head: u64,
    limit: u64,
}

impl Single {
    /// Goes on where `side` was left. Nobody else does.
    pub(super) fn new<W: Word>(side: &Side<W>) -> Self {
        let head = side.tail();
        Self { head, limit: head }
    }
}

impl Mode for Single {
    #[inline]
    fn reserve<W: Word>(&mut self, ring: &View<'_, W>, amount: Amount) -> Result<Run, Refused> {
        let mut free = self.limit.wrapping_sub(self.head);
        if free < amount.most {
            let limit = ring.limit();
            free = limit.wrapping_sub(self.head);
            if free > ring.capacity {
                return Err(Refused::Corrupt);
            }
            self.limit = limit;
        }
        Ok(Run { at: self.head, count: amount.of(free)? })
    }

    #[inline]
    fn publish<W: Word>(&mut self, ring: &View<'_, W>, run: Run) -> Result<(), Refused> {
        self.head = run.at.wrapping_add(run.count);
        // Release: pairs with the Acquire in `Side::tail`.
        ring.ours.tail.0.store(self.head, Ordering::Release);
        Ok(())
    }
}

/// A side that any number of threads share. They reserve slots by moving the head with a compare-and-exchange and publish
/// them in the order of reservation, so that a thread which is interrupted in between makes others of its side wait.
#[derive(Debug)]
pub(super) struct Multi;

/// How often a thread tries to reserve slots while others get ahead of it. It would be unheard of among those that do
/// nothing else but move items.
const TRIES: u32 = 1 << 20;

impl Mode for Multi {
    #[inline]
    fn reserve<W: Word>(&mut self, ring: &View<'_, W>, amount: Amount) -> Result<Run, Refused> {
        let Reserved { head, limit } = &ring.ours.reserved.0;
        // Acquire, as wherever the head is read: pairs with the exchange below. Who moved it there had read the other side's
        // tail before; so what is read of that from here on allows the head too, and free slots do not come out negative.
        let mut at = head.load(Ordering::Acquire);
        for _ in 0..TRIES {
            // Both may be old: the limit may even be one that another thread read before the head came here.
            // Acquire: pairs with the Release below, and so with the publication that the limit was read from.
            let mut free = limit.load(Ordering::Acquire).wrapping_sub(at);
            if free < amount.most || free > ring.capacity {
                let now = ring.limit();
                limit.store(now, Ordering::Release);
                free = now.wrapping_sub(at);
            }
            if free > ring.capacity {
                // It was the head that is old: whoever sees the other side's tail also sees the head which allowed it.
                match head.load(Ordering::Acquire) {
                    now if now == at => return Err(Refused::Corrupt),
                    now => at = now,
                }
                continue;
            }
            let count = amount.of(free)?;
            // What a run's owner does with its slots is ordered by the tails.
            match head.exchange(at, at.wrapping_add(count)) {
                Ok(()) => return Ok(Run { at, count }),
                Err(now) => at = now,
            }
        }
        Err(Refused::TooFew)
    }

    #[inline]
    fn publish<W: Word>(&mut self, ring: &View<'_, W>, run: Run) -> Result<(), Refused> {
        let tail = &ring.ours.tail.0;
        let mut turn = 0;
        // Acquire: whoever sees the store below also sees what those before have done.
        while tail.load(Ordering::Acquire) != run.at {
            if ring.patience.is_some_and(|most| turn >= most) {
                return Err(Refused::Corrupt);
            }
            W::wait(turn);
            turn = turn.saturating_add(1);
        }
        // Release: pairs with the Acquire in `Side::tail`.
        tail.store(run.at.wrapping_add(run.count), Ordering::Release);
        Ok(())
    }
}

impl Word for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        self.compare_exchange_weak(old, new, Ordering::Release, Ordering::Acquire).map(drop)
    }

    #[inline]
    fn wait(turn: u32) {
        // Copying a burst takes less than this; after it, the other thread is probably not running.
        if turn < 64 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}
