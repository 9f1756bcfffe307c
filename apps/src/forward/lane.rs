//! The data path: one receive queue, what is done to its packets, and one transmit queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use underpass::net::{MacAddr, RxQueue, State, TxQueue};
use underpass::{Burst, Packet};

use super::capture::Tap;
use super::echo;
use super::generate::Generator;
use super::rewrite;
use super::run::Run;

/// How long a transmit queue may take nothing before the packets for it are dropped: a lane that waits for ever stops its
/// receive queue too.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long packets may stay with a device at the end.
const LAST_PATIENCE: Duration = Duration::from_millis(500);

/// What a lane does to packets.
#[derive(Debug)]
pub(super) enum Work {
    /// Nothing.
    Forward,
    /// Gives them new addresses.
    SetMacs { source: MacAddr, destination: MacAddr },
    /// Swaps their addresses.
    SwapMacs,
    /// Answers requests, as this station.
    Answer(MacAddr),
    /// Drops them.
    Drop,
    /// Makes some.
    Generate(Generator),
    /// Makes some, and drops those that come.
    GenerateAndDrop(Generator),
}

/// Counts of one lane: the lane writes, anybody reads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    received: AtomicU64,
    generated: AtomicU64,
    consumed: AtomicU64,
    unanswered: AtomicU64,
    sent: AtomicU64,
    no_room: AtomicU64,
}

/// [`Counts`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    /// Packets that the receive queue gave.
    pub(super) received: u64,
    /// Packets that were made here.
    pub(super) generated: u64,
    /// Packets that were to be received only.
    pub(super) consumed: u64,
    /// Packets that were no requests.
    pub(super) unanswered: u64,
    /// Packets that the transmit queue took.
    pub(super) sent: u64,
    /// Packets that were dropped because it took none.
    pub(super) no_room: u64,
}

impl Counts {
    pub(super) fn tally(&self) -> Tally {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Tally {
            received: read(&self.received),
            generated: read(&self.generated),
            consumed: read(&self.consumed),
            unanswered: read(&self.unanswered),
            sent: read(&self.sent),
            no_room: read(&self.no_room),
        }
    }
}

/// A single writer needs no locked instruction.
#[inline]
fn add(word: &AtomicU64, delta: usize) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(delta as u64), Ordering::Relaxed);
}

/// One queue's way through the application.
#[derive(Debug)]
pub(super) struct Lane {
    rx: Box<dyn RxQueue>,
    tx: Box<dyn TxQueue>,
    work: Work,
    tap: Option<Tap>,
    /// Packets that are done with and not yet taken by the transmit queue.
    ready: Burst<Packet>,
    /// Packets that came, where not all of them go on.
    came: Burst<Packet>,
    /// For the last packets of a run that has a number of them: as many as may still come.
    last: Burst<Packet>,
    counts: Arc<Counts>,
    /// Since when the transmit queue has taken nothing.
    stuck: Option<Instant>,
}

/// How a call went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// It moved packets.
    Busy,
    /// There were none to move.
    Idle,
    /// A queue has stopped working, or at the end: all is done.
    Over,
}

impl Lane {
    /// A lane that moves up to `burst` packets at a time.
    pub(super) fn new(
        rx: Box<dyn RxQueue>,
        tx: Box<dyn TxQueue>,
        work: Work,
        burst: usize,
        tap: Option<Tap>,
    ) -> Self {
        Self {
            rx,
            tx,
            work,
            tap,
            ready: Burst::with_capacity(burst),
            came: Burst::with_capacity(burst),
            last: Burst::with_capacity(0),
            counts: Arc::default(),
            stuck: None,
        }
    }

    /// Its counts, to be read while it works.
    pub(super) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Moves one burst, as far as the transmit queue takes it.
    #[inline]
    pub(super) fn step(&mut self, run: &Run) -> Progress {
        // Packets that the transmit queue did not take come first: meanwhile the receive queue holds the next ones.
        let came = if self.ready.is_empty() { self.fill(run) } else { 0 };
        let sent = if self.ready.is_empty() { 0 } else { self.send() };
        if came + sent != 0 {
            return Progress::Busy;
        }
        // Packets that were sent are to come back even if none follow.
        self.tx.reclaim();
        if let Some(tap) = &mut self.tap {
            tap.flush();
        }
        if self.is_running() { Progress::Idle } else { Progress::Over }
    }

    /// Brings what is left to its end, receiving no more.
    pub(super) fn drain(&mut self) -> Progress {
        if self.is_running() && !self.ready.is_empty() {
            self.send();
            return Progress::Busy;
        }
        add(&self.counts.no_room, self.ready.len());
        self.ready.free();
        let left = self.tx.reclaim();
        let since = *self.stuck.get_or_insert_with(Instant::now);
        if left == 0 || !self.is_running() || since.elapsed() > LAST_PATIENCE {
            return Progress::Over;
        }
        Progress::Idle
    }

    /// Whether its receive queue works.
    pub(super) fn receives(&self) -> bool {
        self.rx.state() == State::Running
    }

    fn is_running(&self) -> bool {
        self.receives() && self.tx.state() == State::Running
    }

    /// Gets packets, and does to them what is to be done. Returns how many there were.
    #[inline]
    fn fill(&mut self, run: &Run) -> usize {
        let Self { rx, ready, came, last, counts, .. } = self;
        let rx = &mut **rx;
        let count = match &mut self.work {
            Work::Forward => receive(rx, ready, last, run, counts),
            Work::SetMacs { source, destination } => {
                let count = receive(rx, ready, last, run, counts);
                for packet in &mut ready[..] {
                    rewrite::set_macs(packet.data_mut(), *source, *destination);
                }
                count
            }
            Work::SwapMacs => {
                let count = receive(rx, ready, last, run, counts);
                for packet in &mut ready[..] {
                    rewrite::swap_macs(packet.data_mut());
                }
                count
            }
            Work::Answer(mac) => {
                let count = receive(rx, came, last, run, counts);
                for mut packet in came.drain_all() {
                    // One of several segments is none that is answered: pings of that length are fragments.
                    if packet.next().is_none() && echo::answer(packet.data_mut(), *mac) {
                        // It has room for as many.
                        let _ = ready.push(packet);
                    }
                }
                add(&counts.unanswered, count - ready.len());
                count
            }
            Work::Drop => {
                let count = receive(rx, came, last, run, counts);
                if let Some(tap) = &mut self.tap {
                    tap.copy(came);
                }
                came.free();
                add(&counts.consumed, count);
                return count;
            }
            Work::Generate(generator) => generate(generator, ready, run, counts),
            Work::GenerateAndDrop(generator) => {
                let dropped = rx.rx_burst(came);
                came.free();
                add(&counts.received, dropped);
                add(&counts.consumed, dropped);
                dropped + generate(generator, ready, run, counts)
            }
        };
        if let Some(tap) = &mut self.tap {
            tap.copy(ready);
        }
        count
    }

    /// Hands over what is ready. Returns how many packets the transmit queue took.
    #[inline]
    fn send(&mut self) -> usize {
        let sent = self.tx.tx_burst(&mut self.ready);
        add(&self.counts.sent, sent);
        if sent != 0 {
            self.stuck = None;
        } else if self.stuck.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            self.stuck = None;
            add(&self.counts.no_room, self.ready.len());
            self.ready.free();
        }
        sent
    }
}

/// Receives as many packets as there is room for and the run still wants.
#[inline]
fn receive(
    rx: &mut dyn RxQueue,
    into: &mut Burst<Packet>,
    last: &mut Burst<Packet>,
    run: &Run,
    counts: &Counts,
) -> usize {
    let room = into.room();
    let claimed = run.claim(room);
    let received = if claimed == room {
        rx.rx_burst(into)
    } else {
        // What is not taken stays with others: this happens a few times at the end, not on every poll.
        if last.capacity() != claimed {
            *last = Burst::with_capacity(claimed);
        }
        let received = rx.rx_burst(last);
        into.append(last, received);
        received
    };
    run.settle(claimed, received);
    add(&counts.received, received);
    received
}

/// Makes as many packets as there is room for and the run still wants.
#[inline]
fn generate(generator: &mut Generator, into: &mut Burst<Packet>, run: &Run, counts: &Counts) -> usize {
    let claimed = run.claim(into.room());
    let made = generator.fill(claimed, into);
    run.settle(claimed, made);
    add(&counts.generated, made);
    made
}
