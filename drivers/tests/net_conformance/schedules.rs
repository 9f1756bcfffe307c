//! Whatever the order of calls and of the device's steps: what goes out comes back, in order, once.

use std::collections::VecDeque;

use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, TestRunner};
use underpass::Burst;
use underpass::net::Config;

use crate::rig::frames::{identify, numbered};
use crate::rig::{chain, contents, pool, until};
use crate::{Kind, config, echo};

/// What a random schedule does next.
#[derive(Debug, Clone)]
enum Turn {
    /// Sends frames of this size.
    Send {
        count: usize,
        size: usize,
        segments: usize,
    },
    Receive {
        room: usize,
    },
    Reclaim,
    Step {
        times: usize,
    },
    /// The wire takes nothing more, or does again.
    Block(bool),
    /// Frees the oldest of the packets that were received.
    Release {
        count: usize,
    },
    /// Stops, and starts with these depths.
    Restart {
        rx_depth: usize,
        tx_depth: usize,
    },
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = prop_oneof![
        8 => (1..40_usize, 14..1515_usize, 1..4_usize)
            .prop_map(|(count, size, segments)| Turn::Send { count, size, segments }),
        8 => (0..40_usize).prop_map(|room| Turn::Receive { room }),
        2 => Just(Turn::Reclaim),
        6 => (1..4_usize).prop_map(|times| Turn::Step { times }),
        1 => any::<bool>().prop_map(Turn::Block),
        4 => (0..60_usize).prop_map(|count| Turn::Release { count }),
        1 => (1..40_usize, 4..40_usize).prop_map(|(rx_depth, tx_depth)| Turn::Restart { rx_depth, tx_depth }),
    ];
    prop::collection::vec(turn, 1..80)
}

/// Whatever the order of calls and of the device's steps: what goes out comes back, in order, once.
pub(super) fn random_schedules(kind: &Kind) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: kind.times(40) as u32,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    });
    runner
        .run(&turns(), |turns| {
            schedule(kind, &turns);
            Ok(())
        })
        .unwrap();
}

fn schedule(kind: &Kind, turns: &[Turn]) {
    let mut bench = echo(kind);
    let pool = pool(160);
    let mut started = bench.start(&Config { rx_depth: 32, tx_depth: 16, ..config(&pool) });
    // Of a stream all frames arrive in order; a restart loses what is on the way, and begins another. What waits in QEMU is
    // not lost, and arrives before it.
    let (mut stream, mut made, mut seen) = (0, 0_u64, 0_u64);
    let mut sizes = Vec::new();
    let mut held = VecDeque::new();
    for turn in turns {
        match *turn {
            Turn::Send { count, size, segments } => {
                let size = size.max(bench.wire.least());
                let mut packets = Burst::with_capacity(count);
                while packets.len() < count && pool.available() >= segments {
                    let frame = numbered(stream, made + packets.len() as u64, size);
                    let cuts: Vec<_> = (1..segments).map(|n| n * size / segments).collect();
                    packets.push(chain(&pool, &frame, &cuts)).unwrap();
                }
                let before = packets.len();
                let taken = started.tx[0].tx_burst(&mut packets);
                assert_eq!(taken + packets.len(), before);
                made += taken as u64;
                sizes.extend(std::iter::repeat_n(size, taken));
            }
            Turn::Receive { room } => {
                let mut burst = Burst::with_capacity(room);
                assert!(started.rx[0].rx_burst(&mut burst) <= room);
                for packet in burst.drain_all() {
                    if kind.is_nic() && identify(&contents(&packet)).0 != stream {
                        continue;
                    }
                    let expected = sizes.get(seen as usize).map(|size| numbered(stream, seen, *size));
                    assert_eq!(Some(contents(&packet)), expected, "frame {seen}");
                    seen += 1;
                    held.push_back(packet);
                }
            }
            Turn::Reclaim => assert!(started.tx[0].reclaim() <= made as usize),
            Turn::Step { times } => (0..times).for_each(|_| bench.step()),
            Turn::Block(blocked) => bench.wire.block(blocked),
            Turn::Release { count } => drop(held.drain(..count.min(held.len()))),
            Turn::Restart { rx_depth, tx_depth } => {
                drop(started);
                bench.port.stop().unwrap();
                held.clear();
                assert_eq!(pool.available(), pool.capacity());
                bench.wire.forget();
                started = bench.start(&Config { rx_depth, tx_depth, ..config(&pool) });
                (made, seen, stream) = (0, 0, stream + 1);
                sizes.clear();
            }
        }
    }
    bench.wire.block(false);
    held.clear();
    let mut burst = Burst::with_capacity(16);
    until("the rest comes back", || {
        bench.step();
        started.tx[0].reclaim();
        started.rx[0].rx_burst(&mut burst);
        for packet in burst.drain_all() {
            if kind.is_nic() && identify(&contents(&packet)).0 != stream {
                continue;
            }
            assert!(contents(&packet) == numbered(stream, seen, sizes[seen as usize]));
            seen += 1;
        }
        seen == made
    });
    bench.stop(started, &[&pool]);
}
