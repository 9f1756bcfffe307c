//! `peer=NAME`: a cable to another port of this process.
//!
//! Each queue pair sends on a [`Lane`] of its own, a bounded queue of frames, and receives from lanes of the other end:
//! pair n from all whose number is n modulo its own end's pairs. What an end's options say of loss, reordering and delay
//! is done to what that end sends.

mod hub;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use underpass::Result;

use self::hub::{Plug, State};
use super::random::{Chance, Random};
use super::slot::Slot;
use super::{Frame, Peer, PeerCounters};

/// Frames on a lane at most: as many as a usual transmit queue holds.
const DEPTH: usize = 512;
/// Likewise, if the cable delays them.
const DELAYED_DEPTH: usize = 4096;
/// A frame that is to be overtaken goes on after this time if nothing was sent to overtake it.
const OVERTAKEN_WITHIN: Duration = Duration::from_millis(10);

/// What happens to frames on their way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Impairments {
    /// How likely a frame is lost.
    pub loss: Chance,
    /// How likely a frame is overtaken by the one sent after it.
    pub reorder: Chance,
    /// How long each is on its way.
    pub delay: Duration,
    /// What decides which: the same seed decides the same for the same frames.
    pub seed: u64,
}

/// Frames under way from one queue pair, and slots for more.
struct Lane {
    filled: ArrayQueue<Box<Parcel>>,
    free: ArrayQueue<Box<Parcel>>,
}

struct Parcel {
    slot: Slot,
    /// When it arrives, on a cable with a delay.
    due: Option<Instant>,
}

impl Lane {
    fn new(depth: usize) -> Self {
        let lane = Self { filled: ArrayQueue::new(depth), free: ArrayQueue::new(depth) };
        for _ in 0..depth {
            lane.release(Box::new(Parcel { slot: Slot::new(), due: None }));
        }
        lane
    }

    // There are as many parcels as each queue has room for, so that neither is ever full.

    fn send(&self, parcel: Box<Parcel>) {
        let sent = self.filled.push(parcel);
        debug_assert!(sent.is_ok(), "a parcel of another lane");
    }

    fn release(&self, parcel: Box<Parcel>) {
        let released = self.free.push(parcel);
        debug_assert!(released.is_ok(), "a parcel of another lane");
    }

    /// Throws away what is under way, and returns how much that was.
    fn clear(&self) -> u64 {
        let mut cleared = 0;
        while let Some(parcel) = self.filled.pop() {
            self.release(parcel);
            cleared += 1;
        }
        cleared
    }
}

/// One queue pair's part of a cable's end.
struct Cable {
    plug: Arc<Plug>,
    /// The state of the link when it was looked at last.
    seen: State,
    sending: Sending,
    receiving: Receiving,
    counters: Arc<PeerCounters>,
}

/// Plugs one end of a cable in: of the port `name`, with the other end in the port `to`. Returns its queue pairs' parts.
pub(super) fn plug_in(
    name: &str,
    to: &str,
    impairments: &Impairments,
    pairs: usize,
) -> Result<Vec<Box<dyn Peer>>> {
    let depth = if impairments.delay.is_zero() { DEPTH } else { DELAYED_DEPTH };
    let lanes: Vec<_> = (0..pairs).map(|_| Arc::new(Lane::new(depth))).collect();
    let plug = Arc::new(Plug::insert(name, to, lanes.clone())?);
    let part = |(pair, lane)| {
        Box::new(Cable {
            plug: Arc::clone(&plug),
            seen: State::default(),
            sending: Sending {
                lane,
                random: Random::new(impairments.seed, pair),
                impairments: impairments.clone(),
                unused: None,
                held: None,
            },
            receiving: Receiving { pair, pairs, ..Receiving::default() },
            counters: Arc::default(),
        }) as Box<dyn Peer>
    };
    Ok(lanes.into_iter().enumerate().map(part).collect())
}

impl Cable {
    /// Whether both ends are plugged in.
    #[inline]
    fn is_up(&mut self) -> bool {
        if self.plug.state() != self.seen {
            self.look_again();
        }
        self.seen.is_up()
    }

    /// The other end came or went: what was sent to the one before does not arrive any more. What that one sent does, until
    /// there is another.
    #[cold]
    fn look_again(&mut self) {
        let (state, lanes) = self.plug.other_end();
        self.seen = state;
        let mut unplugged = self.sending.clear();
        self.counters.undelivered.add(unplugged);
        if let Some(lanes) = lanes {
            unplugged += self.receiving.switch(lanes);
        }
        self.counters.unplugged.add(unplugged);
    }
}

impl Peer for Cable {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        if !self.is_up() {
            self.counters.sent(frame.bytes);
            self.counters.unplugged.add(1);
            self.counters.undelivered.add(1);
            return true;
        }
        // Chance is asked only for frames that there is room for: it must not depend on how often one is offered.
        let Some(parcel) = self.sending.parcel() else { return false };
        self.counters.sent(frame.bytes);
        match self.sending.send(parcel, frame) {
            Fate::Sent => {}
            Fate::Lost => self.counters.lost.add(1),
            Fate::Overtook => self.counters.reordered.add(1),
        }
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        self.is_up();
        self.sending.let_go(OVERTAKEN_WITHIN);
        let frame = self.receiving.take()?;
        self.counters.received(frame.bytes);
        Some(frame)
    }

    fn link_up(&self) -> bool {
        self.plug.state().is_up()
    }

    fn sorts_flows(&self) -> bool {
        true
    }

    fn carries_offloads(&self) -> bool {
        true
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        if self.is_up() {
            self.sending.let_go(Duration::ZERO);
        }
        self.counters.unplugged.add(self.receiving.put_back());
    }
}

/// The half that sends.
struct Sending {
    lane: Arc<Lane>,
    random: Random,
    impairments: Impairments,
    /// Was taken for a frame that got lost.
    unused: Option<Box<Parcel>>,
    /// Is to be overtaken by the next frame, and since when.
    held: Option<(Box<Parcel>, Instant)>,
}

/// What became of a frame.
enum Fate {
    /// It is on its way, or will be as soon as another overtook it.
    Sent,
    Lost,
    /// It is on its way, before the one that was sent earlier.
    Overtook,
}

impl Sending {
    /// Room for one more frame.
    #[inline]
    fn parcel(&mut self) -> Option<Box<Parcel>> {
        self.unused.take().or_else(|| self.lane.free.pop())
    }

    #[inline]
    fn send(&mut self, mut parcel: Box<Parcel>, frame: Frame<'_>) -> Fate {
        let Impairments { loss, reorder, delay, .. } = self.impairments;
        if self.random.happens(loss) {
            self.unused = Some(parcel);
            return Fate::Lost;
        }
        parcel.slot.put(frame);
        parcel.due = (!delay.is_zero()).then(|| Instant::now() + delay);
        let is_chosen = self.random.happens(reorder);
        match self.held.take() {
            Some((held, _)) => {
                self.lane.send(parcel);
                self.lane.send(held);
                Fate::Overtook
            }
            None if is_chosen => {
                self.held = Some((parcel, Instant::now()));
                Fate::Sent
            }
            None => {
                self.lane.send(parcel);
                Fate::Sent
            }
        }
    }

    /// Sends what was held for so long, with nothing to overtake it.
    #[inline]
    fn let_go(&mut self, after: Duration) {
        if let Some((parcel, _)) = self.held.take_if(|(_, since)| since.elapsed() >= after) {
            self.lane.send(parcel);
        }
    }

    /// Throws away what is under way, and returns how many frames that were.
    fn clear(&mut self) -> u64 {
        self.let_go(Duration::ZERO);
        self.lane.clear()
    }
}

/// The half that receives.
#[derive(Default)]
struct Receiving {
    pair: usize,
    pairs: usize,
    lanes: Vec<Arc<Lane>>,
    /// The lane to look at first.
    next: usize,
    /// The parcel that was taken last, and which lane's it is.
    parcel: Option<(Box<Parcel>, usize)>,
    /// It is still on its way.
    is_early: bool,
}

impl Receiving {
    /// The next frame that has arrived.
    #[inline]
    fn take(&mut self) -> Option<Frame<'_>> {
        if !self.is_early {
            self.put_back();
            self.parcel = self.pop();
        }
        let (parcel, _) = self.parcel.as_ref()?;
        self.is_early = parcel.due.is_some_and(|due| Instant::now() < due);
        if self.is_early { None } else { Some(parcel.slot.frame()) }
    }

    /// The next parcel, of one lane after the other.
    #[inline]
    fn pop(&mut self) -> Option<(Box<Parcel>, usize)> {
        let lanes = self.lanes.len();
        let (parcel, lane) = (self.next..self.next + lanes)
            .map(|lane| lane % lanes)
            .find_map(|lane| Some((self.lanes[lane].filled.pop()?, lane)))?;
        self.next = lane + 1;
        Some((parcel, lane))
    }

    /// Gives the parcel that was taken last back to its lane. Returns how many frames are lost by that: 1 if it was still on
    /// its way, else 0.
    #[inline]
    fn put_back(&mut self) -> u64 {
        if let Some((parcel, lane)) = self.parcel.take() {
            self.lanes[lane].release(parcel);
        }
        u64::from(std::mem::take(&mut self.is_early))
    }

    /// Receives from now on from its part of these lanes. Returns how many frames of those before had not arrived.
    fn switch(&mut self, lanes: Vec<Arc<Lane>>) -> u64 {
        let lost = self.put_back() + self.lanes.iter().map(|lane| lane.clear()).sum::<u64>();
        self.lanes = lanes.into_iter().skip(self.pair).step_by(self.pairs).collect();
        self.next = 0;
        lost
    }
}

#[cfg(test)]
mod tests;
