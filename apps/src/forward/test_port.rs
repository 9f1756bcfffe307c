//! A port whose other end is the test: frames are put in and taken out as bytes.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use underpass::net::{
    Config, Counters, Info, Link, MacAddr, Offloads, Port, Rss, RxQueue, Started, State, TxQueue, Values,
};
use underpass::{Burst, Error, ErrorKind, Fault, Packet, Pool, Result};

/// What is at the other end of one queue pair.
#[derive(Debug, Default)]
pub(super) struct Wire {
    incoming: Mutex<VecDeque<Vec<u8>>>,
    outgoing: Mutex<Vec<Vec<u8>>>,
    /// The transmit queue takes nothing.
    pub(super) blocked: AtomicBool,
    /// The device is gone.
    pub(super) gone: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// Lets the queue receive these frames.
    pub(super) fn put(&self, frames: impl IntoIterator<Item = Vec<u8>>) {
        lock(&self.incoming).extend(frames);
    }

    /// What was sent so far.
    pub(super) fn sent(&self) -> Vec<Vec<u8>> {
        lock(&self.outgoing).clone()
    }

    fn state(&self) -> State {
        if self.gone.load(Ordering::Relaxed) { State::Gone } else { State::Running }
    }
}

/// The port. What is shared with the test is behind `Arc`s.
#[derive(Debug)]
pub(super) struct TestPort {
    name: String,
    wires: Vec<Arc<Wire>>,
    counters: (Vec<Arc<Counters>>, Vec<Arc<Counters>>),
    /// Queues that are lent out.
    lent: Arc<AtomicUsize>,
    /// Memory whose packets it may send.
    mapped: Vec<Pool>,
    /// Every pool that it was started with or told of.
    pub(super) pools: Arc<Mutex<Vec<Pool>>>,
}

impl TestPort {
    pub(super) fn new(name: &str, queues: usize) -> Self {
        let counters = || (0..queues).map(|_| Arc::default()).collect();
        Self {
            name: name.to_owned(),
            wires: (0..queues).map(|_| Arc::default()).collect(),
            counters: (counters(), counters()),
            lent: Arc::default(),
            mapped: Vec::new(),
            pools: Arc::default(),
        }
    }

    pub(super) fn wires(&self) -> Vec<Arc<Wire>> {
        self.wires.clone()
    }
}

#[derive(Debug)]
struct Lent(Arc<AtomicUsize>);

impl Lent {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[derive(Debug)]
struct Rx {
    wire: Arc<Wire>,
    pool: Pool,
    counters: Arc<Counters>,
    _lent: Lent,
}

impl RxQueue for Rx {
    fn rx_burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        let mut incoming = lock(&self.wire.incoming);
        let mut count = 0;
        while self.wire.state() == State::Running
            && !burst.is_full()
            && let Some(frame) = incoming.pop_front()
        {
            let mut packet = self.pool.alloc().expect("a buffer");
            packet.append(frame.len()).expect("room").copy_from_slice(&frame);
            self.counters.add(Values { packets: 1, bytes: frame.len() as u64, ..Values::default() });
            burst.push(packet).expect("room");
            count += 1;
        }
        count
    }

    fn state(&self) -> State {
        self.wire.state()
    }

    fn index(&self) -> u16 {
        0
    }

    fn wait(&mut self, _: Duration) -> Result<()> {
        Ok(())
    }
}

/// Sends at most so many packets at a time, as a short queue would.
const MOST: usize = 5;

#[derive(Debug)]
struct Tx {
    wire: Arc<Wire>,
    /// Sent, and not yet given back.
    kept: Vec<Packet>,
    mapped: Vec<Range<usize>>,
    counters: Arc<Counters>,
    _lent: Lent,
}

impl TxQueue for Tx {
    fn tx_burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.kept.clear();
        if self.wire.blocked.load(Ordering::Relaxed) || self.wire.state() != State::Running {
            return 0;
        }
        let count = burst.len().min(MOST);
        for packet in burst.drain(count) {
            let bytes = packet.data().as_ptr().addr();
            if !self.mapped.iter().any(|memory| memory.contains(&bytes)) {
                self.counters.add(Values { refused: 1, ..Values::default() });
                continue;
            }
            self.counters.add(Values { packets: 1, bytes: packet.len() as u64, ..Values::default() });
            lock(&self.wire.outgoing).push(packet.data().to_vec());
            self.kept.push(packet);
        }
        count
    }

    fn reclaim(&mut self) -> usize {
        self.kept.pop();
        self.kept.len()
    }

    fn state(&self) -> State {
        self.wire.state()
    }

    fn index(&self) -> u16 {
        0
    }
}

impl Port for TestPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn driver(&self) -> &'static str {
        "test"
    }

    fn info(&self) -> Info {
        Info {
            max_rx_queues: self.wires.len(),
            max_tx_queues: self.wires.len(),
            max_rx_depth: 256,
            max_tx_depth: 256,
            max_mtu: 1500,
            offloads: Offloads::NONE,
            rss_key_len: 0,
            rss_table_len: 0,
            interrupts: false,
        }
    }

    fn map(&mut self, pool: &Pool) -> Result<()> {
        self.mapped.push(pool.clone());
        lock(&self.pools).push(pool.clone());
        Ok(())
    }

    fn unmap(&mut self, _: &Pool) -> Result<()> {
        Ok(())
    }

    fn start(&mut self, config: &Config) -> Result<Started> {
        for pool in &config.pools {
            self.map(pool)?;
        }
        let memory = |pool: &Pool| {
            let start = pool.region().as_ptr().addr().get();
            start..start + pool.region().len() as usize
        };
        let mapped: Vec<_> = self.mapped.iter().map(memory).collect();
        let rx = self.wires.iter().zip(&self.counters.0).take(config.rx_queues).map(|(wire, counters)| {
            Box::new(Rx {
                wire: Arc::clone(wire),
                pool: config.pools[0].clone(),
                counters: Arc::clone(counters),
                _lent: Lent::new(&self.lent),
            }) as _
        });
        let tx = self.wires.iter().zip(&self.counters.1).take(config.tx_queues).map(|(wire, counters)| {
            Box::new(Tx {
                wire: Arc::clone(wire),
                kept: Vec::new(),
                mapped: mapped.clone(),
                counters: Arc::clone(counters),
                _lent: Lent::new(&self.lent),
            }) as _
        });
        let (rx, tx) = (rx.collect(), tx.collect());
        Ok(Started { rx, tx, offloads: Offloads::NONE, mtu: config.mtu.unwrap_or(1500) })
    }

    fn quiesce(&self) {}

    fn stop(&mut self) -> Result<()> {
        match self.lent.load(Ordering::Acquire) {
            0 => Ok(()),
            lent => Err(Error::new(ErrorKind::Busy, "stop", format!("{lent} queues are lent out"))),
        }
    }

    fn link(&mut self) -> Link {
        Link { up: true, ..Link::default() }
    }

    fn mac(&self) -> MacAddr {
        MacAddr::local(0x0a0b)
    }

    fn set_mac(&mut self, _: MacAddr) -> Result<()> {
        Ok(())
    }

    fn set_promiscuous(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn set_all_multicast(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn set_mac_filter(&mut self, _: &[MacAddr]) -> Result<()> {
        Ok(())
    }

    fn set_vlan_filter(&mut self, _: u16, _: bool) -> Result<()> {
        Ok(())
    }

    fn set_rss(&mut self, _: &Rss) -> Result<()> {
        Ok(())
    }

    fn counters(&self) -> (Vec<Arc<Counters>>, Vec<Arc<Counters>>) {
        self.counters.clone()
    }

    fn next_error(&mut self) -> Option<Error> {
        let gone = self.wires.iter().any(|wire| wire.gone.swap(false, Ordering::Relaxed));
        gone.then(|| Error::new(ErrorKind::Device, "go on", "the test took it away"))
    }

    fn next_fault(&mut self) -> Option<Fault> {
        None
    }
}
