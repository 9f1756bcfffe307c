//! Network ports for tests: with the other end of their cables in the test's hands, and waiting that ends.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod frames;
pub(crate) mod nic;
#[path = "../random.rs"]
mod random;
pub(crate) mod ring;
pub(crate) mod tapped;
pub(crate) mod virtio;
pub(crate) mod wire;

use std::time::{Duration, Instant};

use underpass::net::{Config, Port, RxQueue, Started, TxQueue, Values};
use underpass::{Burst, Packet, Pool};
use underpass_drivers::virtio_net::model::VirtioNetControl;

pub(crate) use random::Random;
pub(crate) use tapped::Taps;
pub(crate) use wire::Wire;

/// Longer than anything in these tests takes, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Calls `turn` until it says that it is done.
#[track_caller]
pub(crate) fn until(what: &str, mut turn: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !turn() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// A port and what is around it.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) port: Box<dyn Port>,
    pub(crate) wire: Wire,
    pub(crate) taps: Taps,
    /// Knows what rules the driver broke. `None` where the test plays the device.
    pub(crate) control: Option<VirtioNetControl>,
}

impl Bench {
    /// Gives the device time, where it has none of its own.
    pub(crate) fn step(&self) {
        self.taps.lend();
    }

    /// Starts with one queue each way.
    pub(crate) fn start(&mut self, config: &Config) -> Started {
        let started = self.port.start(config).unwrap();
        assert_eq!(started.rx.len(), config.rx_queues.max(1));
        assert_eq!(started.tx.len(), config.tx_queues.max(1));
        started
    }

    /// Drops the queues and stops; all buffers of these pools are home then.
    pub(crate) fn stop(&mut self, started: Started, pools: &[&Pool]) {
        self.check();
        drop(started);
        self.port.stop().unwrap();
        for pool in pools {
            assert_eq!(pool.available(), pool.capacity(), "buffers of {pool:?} are lost");
        }
    }

    /// The driver broke no rule so far, and nothing failed.
    pub(crate) fn check(&mut self) {
        if let Some(control) = &self.control {
            assert_eq!(control.violation(), None, "the driver broke a rule");
        }
        assert_eq!(self.port.next_fault().map(|fault| fault.to_string()), None);
        assert_eq!(self.port.next_error().map(|error| error.to_string()), None);
    }

    /// Sends all of `packets`.
    pub(crate) fn send(&self, tx: &mut dyn TxQueue, packets: impl IntoIterator<Item = Packet>) {
        let mut burst = burst(packets);
        until("room on the transmit queue", || {
            tx.tx_burst(&mut burst);
            self.step();
            burst.is_empty()
        });
    }

    /// Waits until the device has sent everything.
    pub(crate) fn flush(&self, tx: &mut dyn TxQueue) {
        until("the device sends", || {
            self.step();
            tx.reclaim() == 0
        });
    }

    /// What the port has sent since the last call, which must be `count` frames at least.
    pub(crate) fn sent(&self, count: usize) -> Vec<Vec<u8>> {
        until("what was sent is on the wire", || self.wire.sent_count() >= count);
        self.wire.settle();
        self.wire.sent(0)
    }

    /// Receives exactly `count` packets.
    pub(crate) fn receive(&self, rx: &mut dyn RxQueue, count: usize) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut burst = Burst::with_capacity(32);
        until("packets arrive", || {
            self.step();
            let before = burst.len();
            assert_eq!(rx.rx_burst(&mut burst), burst.len() - before);
            packets.extend(burst.drain_all());
            packets.len() >= count
        });
        assert_eq!(packets.len(), count);
        packets
    }

    /// Receives whatever is on its way to any queue, `least` packets at least: until nothing came for a while.
    pub(crate) fn drain(&self, queues: &mut [Box<dyn RxQueue>], least: usize) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut burst = Burst::with_capacity(32);
        let mut still = 0;
        let mut since = Instant::now();
        until("silence", || {
            self.step();
            still += 1;
            for queue in &mut *queues {
                if queue.rx_burst(&mut burst) != 0 {
                    (still, since) = (0, Instant::now());
                    packets.extend(burst.drain_all());
                }
            }
            packets.len() >= least && still > 50 && since.elapsed() > self.wire.silence()
        });
        packets
    }

    /// Sends packets on an echoing wire and receives as many.
    pub(crate) fn echo(
        &self,
        started: &mut Started,
        packets: impl IntoIterator<Item = Packet>,
    ) -> Vec<Packet> {
        let mut to_send = burst(packets);
        let count = to_send.len();
        let mut back = Vec::new();
        let mut received = Burst::with_capacity(64);
        until("packets come back", || {
            started.tx[0].tx_burst(&mut to_send);
            self.step();
            started.rx[0].rx_burst(&mut received);
            back.extend(received.drain_all());
            back.len() >= count
        });
        assert_eq!(back.len(), count);
        back
    }

    /// Few packets there and back, in order; what comes of others before is dropped.
    #[track_caller]
    pub(crate) fn works(&self, started: &mut Started, pool: &Pool) {
        const STREAM: u16 = 0xaaaa;
        let frame = |n: u64| frames::numbered(STREAM, n, 60 + 7 * n as usize);
        let mut packets = burst((0..20).map(|n| packet(pool, &frame(n))));
        let (mut received, mut next) = (Burst::with_capacity(16), 0);
        until("packets come back", || {
            started.tx[0].tx_burst(&mut packets);
            self.step();
            started.rx[0].rx_burst(&mut received);
            for packet in received.drain_all() {
                let bytes = contents(&packet);
                if bytes.len() < frames::MIN_NUMBERED || frames::identify(&bytes).0 == STREAM {
                    assert!(bytes == frame(next), "packet {next} changed on the way");
                    next += 1;
                }
            }
            next == 20
        });
    }

    /// What the first queues have counted.
    pub(crate) fn counted(&self) -> (Values, Values) {
        let (rx, tx) = self.port.counters();
        (rx[0].values(), tx[0].values())
    }
}

pub(crate) fn burst<T>(items: impl IntoIterator<Item = T>) -> Burst<T> {
    let items: Vec<T> = items.into_iter().collect();
    let mut burst = Burst::with_capacity(items.len().max(1));
    burst.extend(items.into_iter());
    burst
}

/// A packet of one segment.
pub(crate) fn packet(pool: &Pool, bytes: &[u8]) -> Packet {
    let mut packet = pool.alloc().expect("the pool has a buffer");
    packet.append(bytes.len()).expect("it fits in a buffer").copy_from_slice(bytes);
    packet
}

/// A packet in segments that end at these places.
pub(crate) fn chain(pool: &Pool, bytes: &[u8], cuts: &[usize]) -> Packet {
    let mut whole: Option<Packet> = None;
    let mut from = 0;
    for to in cuts.iter().copied().chain([bytes.len()]) {
        let segment = packet(pool, &bytes[from..to]);
        from = to;
        match &mut whole {
            None => whole = Some(segment),
            Some(whole) => whole.chain(segment),
        }
    }
    whole.unwrap()
}

/// The bytes of all segments.
pub(crate) fn contents(packet: &Packet) -> Vec<u8> {
    packet.segments().flat_map(|segment| segment.data().iter().copied()).collect()
}

pub(crate) fn pool(count: usize) -> Pool {
    Pool::builder(count).name("test").build().unwrap()
}

/// A pool whose buffers hold `len` bytes behind the headroom.
pub(crate) fn small_pool(count: usize, len: u32) -> Pool {
    Pool::builder(count).name("small").buffer_len(underpass::pool::HEADROOM + len).build().unwrap()
}
