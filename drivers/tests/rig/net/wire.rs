//! The other end of a port's cables, in the test's hands.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use underpass::net::MIN_FRAME;
use underpass_drivers::virtio_net::model::peer::{Frame, Offload, Peer, PeerCounters};

use super::nic;

/// Frames that an echoing wire holds for each queue pair, at most.
const ROOM: usize = 8192;

/// A frame on the wire.
#[derive(Debug, Clone, Default)]
pub(crate) struct OnWire {
    pub(crate) bytes: Vec<u8>,
    pub(crate) offload: Offload,
}

/// One cable a queue pair. What the port sends is recorded, or comes back.
#[derive(Clone)]
pub(crate) struct Wire {
    state: Arc<Mutex<State>>,
    /// What carries the frames, where no model does.
    cable: Option<Arc<nic::Cable>>,
}

#[derive(Debug)]
struct State {
    pairs: Vec<Cable>,
    far_end: FarEnd,
    blocked: bool,
    up: bool,
}

/// What becomes of frames that the port sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FarEnd {
    /// They are recorded as they are.
    Records,
    /// They are recorded as they would travel: the device completes checksums and cuts segments before.
    RecordsFinished,
    /// They arrive again.
    Echoes,
}

#[derive(Debug, Default)]
struct Cable {
    sent: VecDeque<OnWire>,
    arriving: VecDeque<OnWire>,
}

impl Wire {
    /// One that records what is sent.
    pub(crate) fn new(pairs: usize) -> Self {
        Self::with(pairs, FarEnd::Records)
    }

    /// One that records what is sent as it would travel: the device completes checksums and cuts segments before.
    pub(crate) fn finishing(pairs: usize) -> Self {
        Self::with(pairs, FarEnd::RecordsFinished)
    }

    /// One on which everything that is sent arrives again.
    pub(crate) fn echo(pairs: usize) -> Self {
        Self::with(pairs, FarEnd::Echoes)
    }

    fn with(pairs: usize, far_end: FarEnd) -> Self {
        let pairs = (0..pairs).map(|_| Cable::default()).collect();
        let state = State { pairs, far_end, blocked: false, up: true };
        Self { state: Arc::new(Mutex::new(state)), cable: None }
    }

    /// The same wire, at the end of a cable.
    pub(super) fn plugged(&self, cable: Arc<nic::Cable>) -> Self {
        Self { cable: Some(cable), ..self.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The shortest frame that arrives as it was sent: what is shorter is padded to this.
    pub(crate) fn least(&self) -> usize {
        if self.cable.is_some() { nic::LEAST } else { MIN_FRAME }
    }

    /// The frame as it arrives.
    pub(crate) fn padded(&self, mut frame: Vec<u8>) -> Vec<u8> {
        frame.resize(frame.len().max(self.least()), 0);
        frame
    }

    /// How long nothing comes when nothing more is on its way.
    pub(crate) fn silence(&self) -> Duration {
        // A model's engines on threads of their own take their time.
        if self.cable.is_some() { nic::SILENCE } else { Duration::from_millis(3) }
    }

    /// Waits for more than is expected.
    pub(crate) fn settle(&self) {
        if self.cable.is_some() {
            thread::sleep(nic::SURPRISE);
        }
    }

    pub(crate) fn pairs(&self) -> usize {
        self.state().pairs.len()
    }

    /// The device's side, one a queue pair.
    pub(crate) fn peers(&self) -> Vec<Box<dyn Peer>> {
        let pairs = self.state().pairs.len();
        (0..pairs).map(|pair| Box::new(End::new(self, pair)) as Box<dyn Peer>).collect()
    }

    /// Sends a frame to the port.
    pub(crate) fn send(&self, pair: usize, bytes: Vec<u8>) {
        self.send_unfinished(pair, OnWire { bytes, offload: Offload::default() });
    }

    /// Sends a frame whose checksum or segmentation is left to the receiver.
    pub(crate) fn send_unfinished(&self, pair: usize, frame: OnWire) {
        self.state().pairs[pair].arriving.push_back(frame);
    }

    /// How many frames have yet to arrive at the port.
    pub(crate) fn arriving(&self) -> usize {
        self.state().pairs.iter().map(|cable| cable.arriving.len()).sum()
    }

    /// What the port sent on this pair since the last call.
    pub(crate) fn sent(&self, pair: usize) -> Vec<Vec<u8>> {
        self.state().pairs[pair].sent.drain(..).map(|frame| frame.bytes).collect()
    }

    /// How many frames the port has sent that were not looked at.
    pub(crate) fn sent_count(&self) -> usize {
        self.state().pairs.iter().map(|cable| cable.sent.len()).sum()
    }

    /// Takes nothing more from the port, or does again.
    pub(crate) fn block(&self, blocked: bool) {
        self.state().blocked = blocked;
    }

    /// Loses everything that is on the way.
    pub(crate) fn forget(&self) {
        for cable in &mut self.state().pairs {
            cable.sent.clear();
            cable.arriving.clear();
        }
    }

    /// Takes the link down or up.
    pub(crate) fn set_link(&self, up: bool) {
        if let Some(cable) = &self.cable {
            cable.set_link(up);
        }
        self.state().up = up;
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("state", &self.state).finish_non_exhaustive()
    }
}

struct End {
    wire: Wire,
    pair: usize,
    /// What the device reads.
    frame: OnWire,
    counters: Arc<PeerCounters>,
}

impl End {
    fn new(wire: &Wire, pair: usize) -> Self {
        Self { wire: wire.clone(), pair, frame: OnWire::default(), counters: Arc::default() }
    }
}

impl Peer for End {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        let mut state = self.wire.state();
        let (echoes, blocked) = (state.far_end == FarEnd::Echoes, state.blocked);
        let cable = &mut state.pairs[self.pair];
        let to = if echoes { &mut cable.arriving } else { &mut cable.sent };
        let room = to.len() < ROOM && !blocked;
        if room {
            to.push_back(OnWire { bytes: frame.bytes.to_vec(), offload: frame.offload });
        }
        room
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        self.frame = self.wire.state().pairs[self.pair].arriving.pop_front()?;
        Some(Frame { bytes: &self.frame.bytes, offload: self.frame.offload })
    }

    fn link_up(&self) -> bool {
        self.wire.state().up
    }

    fn carries_offloads(&self) -> bool {
        self.wire.state().far_end != FarEnd::RecordsFinished
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}
