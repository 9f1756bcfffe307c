//! Ports that are stopped, configured anew and started again while packets pass: two cables with a forwarder between
//! them, that moves packets from one port to the other without copying. No buffer is lost, and no packet is changed or
//! comes twice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "rig/net/mod.rs"]
mod rig;

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;

use underpass::net::{Config, Offloads, Port, Started, State};
use underpass::pool::Slot;
use underpass::{Burst, ErrorKind, Packet, Pool};
use underpass_drivers::builtin;

use rig::frames::{MIN_NUMBERED, identify, numbered};
use rig::{Random, contents, pool, until};

/// Where a port's queues lie for its worker; empty while the port is stopped.
type Lane = Mutex<Option<Started>>;

/// The four ends of two cables: 0 and 3 generate and check, 1 and 2 forward to each other.
struct Path {
    lanes: [Lane; 4],
    /// The end of it.
    over: AtomicBool,
    /// Packets that came all the way, at each end.
    arrived: [AtomicU64; 2],
}

impl Path {
    /// A worker's turn: it takes the queues that lie there, and gives back those that are to go home by dropping them.
    fn with_queues(&self, port: usize, queues: &mut Option<Started>) {
        if queues.is_none() {
            *queues = self.lanes[port].lock().unwrap().take();
        }
        let gone = |started: &Started| {
            started.rx.iter().any(|queue| queue.state() != State::Running)
                || started.tx.iter().any(|queue| queue.state() != State::Running)
        };
        if queues.as_ref().is_some_and(gone) {
            *queues = None;
        }
    }

    /// Sends a stream of numbered frames, and checks the stream that arrives.
    fn generate(&self, port: usize, end: usize, pool: &Pool) {
        let _slot = Slot::claim();
        let mut random = Random(port as u64);
        let (mut queues, mut seen, mut next) = (None, HashSet::new(), 0);
        let [mut to_send, mut received] = [(); 2].map(|()| Burst::with_capacity(32));
        while !self.over.load(Ordering::Relaxed) {
            self.with_queues(port, &mut queues);
            let Some(Started { rx, tx, .. }) = &mut queues else {
                std::thread::yield_now();
                continue;
            };
            for tx in tx {
                while to_send.len() < 1 + random.below(32)
                    && let Some(mut packet) = pool.alloc()
                {
                    let frame = numbered(end as u16, next, MIN_NUMBERED + random.below(1000));
                    next += 1;
                    packet.append(frame.len()).unwrap().copy_from_slice(&frame);
                    to_send.push(packet).unwrap();
                }
                tx.tx_burst(&mut to_send);
            }
            for rx in rx {
                rx.rx_burst(&mut received);
                for packet in received.drain_all() {
                    let (stream, number) = identify(&contents(&packet));
                    assert_eq!(usize::from(stream), 1 - end);
                    assert!(seen.insert(number), "frame {number} came twice");
                    self.arrived[end].fetch_add(1, Ordering::Relaxed);
                }
            }
            std::thread::yield_now();
        }
    }

    /// Moves packets from each of the two middle ports to the other.
    fn forward(&self) {
        let _slot = Slot::claim();
        let mut queues = [None, None];
        let mut between = [(); 2].map(|()| Burst::with_capacity(32));
        while !self.over.load(Ordering::Relaxed) {
            for (n, queues) in queues.iter_mut().enumerate() {
                self.with_queues(n + 1, queues);
            }
            let [left, right] = &mut queues;
            let [rightward, leftward] = &mut between;
            carry(left, right, rightward);
            carry(right, left, leftward);
            std::thread::yield_now();
        }
    }
}

/// Moves what one port has received to the other; what that does not take stays in `between`.
fn carry(from: &mut Option<Started>, to: &mut Option<Started>, between: &mut Burst<Packet>) {
    for rx in from.iter_mut().flat_map(|started| &mut started.rx) {
        rx.rx_burst(between);
        if let Some(Started { tx, .. }) = to {
            let count = tx.len();
            tx[usize::from(rx.index()) % count].tx_burst(between);
        }
    }
}

fn ports(name: &str, options: &str) -> [Box<dyn Port>; 4] {
    [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")].map(|(end, other)| {
        let cable = format!("name={name}-{end},peer={name}-{other}");
        builtin().open_port(&format!("soft:virtio-net,queues=2,{cable},{options}")).unwrap()
    })
}

/// `vary`: whether the number of queues changes, too.
fn restarts(name: &str, options: &str, rounds: u64, vary: bool) {
    let mut ports = ports(name, options);
    let pools = [(); 4].map(|()| pool(1024));
    // Each middle port sends the other's packets.
    ports[1].map(&pools[2]).unwrap();
    ports[2].map(&pools[1]).unwrap();
    let path = Path {
        lanes: [(); 4].map(|()| Mutex::default()),
        over: AtomicBool::new(false),
        arrived: [(); 2].map(|()| AtomicU64::new(0)),
    };
    let mut random = Random(rounds);
    let mut start = |ports: &mut [Box<dyn Port>], n: usize| {
        let queues = if vary { 1 + random.below(2) } else { 2 };
        let all = Offloads::RX_CHECKSUM | Offloads::RX_SCATTER | Offloads::TX_CHECKSUM | Offloads::RSS;
        let config = Config {
            rx_queues: queues,
            tx_queues: queues,
            rx_depth: 8 << random.below(5),
            tx_depth: 8 << random.below(5),
            mtu: [None, Some(1400), Some(1100)][random.below(3)],
            offloads: if random.coin() { all } else { Offloads::NONE },
            ..Config::new(&pools[n])
        };
        *path.lanes[n].lock().unwrap() = Some(ports[n].start(&config).unwrap());
    };
    std::thread::scope(|scope| {
        (0..4).for_each(|n| start(&mut ports, n));
        let path = &path;
        let (first, last) = (&pools[0], &pools[3]);
        let workers = [
            scope.spawn(move || path.generate(0, 0, first)),
            scope.spawn(move || path.generate(3, 1, last)),
            scope.spawn(move || path.forward()),
        ];
        let arrived = || path.arrived.each_ref().map(|count| count.load(Ordering::Relaxed));
        for round in 0..rounds {
            // All the way, in both directions, after every restart.
            let before = arrived();
            until("packets pass", || {
                assert!(!workers.iter().any(ScopedJoinHandle::is_finished), "a worker failed");
                arrived().iter().zip(before).all(|(now, before)| *now >= before + 50)
            });
            for n in [round as usize % 4, round as usize / 3 % 4] {
                stop(&mut *ports[n], &path.lanes[n]);
                start(&mut ports, n);
            }
        }
        path.over.store(true, Ordering::Relaxed);
    });
    for (port, lane) in ports.iter_mut().zip(&path.lanes) {
        stop(&mut **port, lane);
        assert_eq!(port.next_error().map(|error| error.to_string()), None);
        assert_eq!(port.next_fault().map(|fault| fault.to_string()), None);
        let (rx, tx) = port.counters();
        for counters in rx.iter().chain(&tx) {
            let counted = counters.values();
            assert_eq!((counted.runts, counted.refused, counted.errors), (0, 0, 0), "{counted:?}");
        }
    }
    for pool in pools {
        assert_eq!(pool.available(), pool.capacity(), "buffers are lost");
    }
}

/// Stops a port whose queues somebody works with.
fn stop(port: &mut dyn Port, lane: &Lane) {
    port.quiesce();
    until("the queues come home", || {
        // They may not have been fetched yet.
        drop(lane.lock().unwrap().take());
        match port.stop() {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                false
            }
        }
    });
}

#[test]
fn split_rings_restart_under_load() {
    restarts("split", "ring=split", 60, false);
}

#[test]
fn packed_rings_restart_under_load() {
    restarts("packed", "ring=packed", 60, false);
}

#[test]
fn devices_with_threads_restart_under_load() {
    restarts("threads", "ring=packed,run=threads", 30, true);
}

#[test]
fn nothing_is_written_that_was_not_lent_while_ports_restart() {
    restarts("leases-split", "ring=split,check=leases", 20, false);
    restarts("leases-packed", "ring=packed,check=leases", 20, false);
}
