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

use std::sync::atomic::Ordering;

/// A 64-bit atomic word: the standard one, or loom's.
pub(super) trait Word {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    /// May fail for no reason. Orders nothing.
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64>;
    /// Another thread is to change this word: give way to it. `turn` counts the calls.
    fn wait(&self, turn: u32);
}

/// Two cache lines, since processors fetch lines in pairs: what one core writes and another does not is in its own.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub(super) struct Line<T>(T);

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
    pub(super) fn tail(&self, order: Ordering) -> u64 {
        self.tail.0.load(order)
    }
}

/// A run of slots that one thread may write, or read, until it publishes them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) at: u64,
    pub(super) count: u64,
}

/// How many items an operation moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amount {
    /// No less than this, or none.
    pub(super) least: u64,
    /// No more than this.
    pub(super) most: u64,
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

    /// How many of `free` it takes. An empty run is none: among several threads, who publishes nothing would take the
    /// tail back to where another has gone on from.
    fn of(self, free: u64) -> Option<u64> {
        let count = self.most.min(free);
        (count >= self.least.max(1)).then_some(count)
    }
}

/// How the threads of one side share it.
pub(super) trait Mode {
    /// Reserves slots of `ours`, which lead those that `theirs` has finished with by at most `lead`: the capacity for
    /// producers, 0 for consumers. `None`: there are too few.
    fn reserve<W: Word>(
        &mut self,
        ours: &Side<W>,
        theirs: &Side<W>,
        lead: u64,
        amount: Amount,
    ) -> Option<Run>;

    /// Gives a run to the other side.
    fn publish<W: Word>(&mut self, ours: &Side<W>, run: Run);
}

/// A side that one thread has for itself: where it is, nobody else needs to know.
#[derive(Debug, Default)]
pub(super) struct Single {
    head: u64,
    limit: u64,
}

impl Single {
    /// Goes on where `ours` was left. Nobody else of that side goes on.
    pub(super) fn at<W: Word>(ours: &Side<W>) -> Self {
        let head = ours.tail(Ordering::Acquire);
        Self { head, limit: head }
    }
}

impl Mode for Single {
    #[inline]
    fn reserve<W: Word>(
        &mut self,
        _ours: &Side<W>,
        theirs: &Side<W>,
        lead: u64,
        amount: Amount,
    ) -> Option<Run> {
        if self.limit - self.head < amount.most {
            self.limit = theirs.tail(Ordering::Acquire) + lead;
        }
        let count = amount.of(self.limit - self.head)?;
        Some(Run { at: self.head, count })
    }

    #[inline]
    fn publish<W: Word>(&mut self, ours: &Side<W>, run: Run) {
        self.head = run.at + run.count;
        // Release: pairs with the Acquire in `reserve`.
        ours.tail.0.store(self.head, Ordering::Release);
    }
}

/// A side that any number of threads share. They reserve slots by moving the head with a compare-and-exchange and publish
/// them in the order of reservation, so that a thread which is interrupted in between makes others of its side wait.
#[derive(Debug, Default)]
pub(super) struct Multi;

impl Mode for Multi {
    #[inline]
    fn reserve<W: Word>(
        &mut self,
        ours: &Side<W>,
        theirs: &Side<W>,
        lead: u64,
        amount: Amount,
    ) -> Option<Run> {
        let Reserved { head, limit } = &ours.reserved.0;
        let mut at = head.load(Ordering::Relaxed);
        loop {
            // Both can be old. Signed: another thread may have stored a limit that it read before the head came here.
            // Acquire: pairs with the Release below, and so with the publication that the limit was read from.
            let mut free = limit.load(Ordering::Acquire).wrapping_sub(at).cast_signed();
            if free < amount.most.cast_signed() {
                let now = theirs.tail(Ordering::Acquire) + lead;
                limit.store(now, Ordering::Release);
                free = now.wrapping_sub(at).cast_signed();
            }
            let count = amount.of(free.max(0).cast_unsigned())?;
            // Relaxed: the head orders nothing. What a run's owner does is ordered by the tails.
            match head.exchange(at, at + count) {
                Ok(()) => return Some(Run { at, count }),
                Err(now) => at = now,
            }
        }
    }

    #[inline]
    fn publish<W: Word>(&mut self, ours: &Side<W>, run: Run) {
        let tail = &ours.tail.0;
        let mut turn = 0;
        // Acquire: whoever sees the store below also sees what those before have done.
        while tail.load(Ordering::Acquire) != run.at {
            tail.wait(turn);
            turn += 1;
        }
        // Release: pairs with the Acquire in `reserve`.
        tail.store(run.at + run.count, Ordering::Release);
    }
}
