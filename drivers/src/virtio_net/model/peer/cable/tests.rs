use std::thread;

use underpass::ErrorKind;

use super::*;
use crate::virtio_net::model::peer::Offload;

type End = Vec<Box<dyn Peer>>;

// The hub is one for the whole process: each test has names of its own.
fn end(name: &str, to: &str, pairs: usize) -> End {
    plug_in(name, to, &Impairments::default(), pairs).unwrap()
}

fn impaired(name: &str, to: &str, impairments: &Impairments) -> Box<dyn Peer> {
    plug_in(name, to, impairments, 1).unwrap().remove(0)
}

fn percent(percent: f64) -> Chance {
    Chance::from_percent(percent).unwrap()
}

fn send(peer: &mut dyn Peer, number: u32) -> bool {
    peer.transmit(Frame::finished(&number.to_le_bytes().repeat(15)))
}

fn receive(peer: &mut dyn Peer) -> Option<u32> {
    let frame = peer.receive()?;
    let number = u32::from_le_bytes(frame.bytes[..4].try_into().unwrap());
    assert_eq!(frame.bytes, number.to_le_bytes().repeat(15));
    Some(number)
}

fn receive_all(peer: &mut dyn Peer) -> Vec<u32> {
    std::iter::from_fn(|| receive(peer)).collect()
}

#[test]
fn the_link_is_up_while_both_ends_are_there() {
    let mut a = end("up-a", "up-b", 1);
    assert!(!a[0].link_up());
    assert!(send(&mut *a[0], 1), "an end that is alone takes frames, and loses them");
    assert_eq!(receive(&mut *a[0]), None);

    let mut b = end("up-b", "up-a", 1);
    assert!(a[0].link_up() && b[0].link_up());
    assert_eq!(receive(&mut *b[0]), None, "what was sent before does not arrive");
    let offload = Offload { checksum: Some((34, 16)), segment: None };
    assert!(a[0].transmit(Frame { bytes: &[7; 1500], offload }));
    let frame = b[0].receive().unwrap();
    assert_eq!((frame.bytes, frame.offload), (&[7; 1500][..], offload));

    // What was sent by one that left still arrives; what was sent to it does not, even if another comes in its place.
    assert!(send(&mut *b[0], 2) && send(&mut *b[0], 3));
    assert!(send(&mut *a[0], 4));
    drop(b);
    assert!(!a[0].link_up());
    assert_eq!(receive_all(&mut *a[0]), [2, 3]);
    let mut b = end("up-b", "up-a", 1);
    assert_eq!(receive(&mut *b[0]), None);
    assert!(send(&mut *a[0], 5));
    assert_eq!(receive(&mut *b[0]), Some(5));

    let counters = a[0].counters();
    assert_eq!((counters.tx_frames.get(), counters.unplugged.get()), (4, 2), "frames 1 and 4");

    // What the one before sent and nobody took is lost when another takes its place, and counted.
    assert!(send(&mut *b[0], 6) && send(&mut *b[0], 7));
    drop(b);
    let mut b = end("up-b", "up-a", 1);
    assert!(send(&mut *b[0], 8));
    assert_eq!(receive_all(&mut *a[0]), [8]);
    assert_eq!(counters.unplugged.get(), 4);
}

#[test]
fn queue_pairs_are_joined_though_the_ends_have_different_numbers() {
    let (mut a, mut b) = (end("pairs-a", "pairs-b", 4), end("pairs-b", "pairs-a", 3));
    for round in 0..10 {
        for (pair, peer) in (0..).zip(a.iter_mut()).chain((0..).zip(b.iter_mut())) {
            assert!(send(&mut **peer, 10 * round + pair));
        }
    }
    let of = |pair: u32| (0..10).map(|round| 10 * round + pair).collect::<Vec<_>>();
    let mut first = receive_all(&mut *b[0]);
    first.sort_unstable();
    let mut expected = [of(0), of(3)].concat();
    expected.sort_unstable();
    assert_eq!(first, expected, "pair 0 of three has lanes 0 and 3");
    assert_eq!(receive_all(&mut *b[1]), of(1));
    assert_eq!(receive_all(&mut *b[2]), of(2));
    for (pair, peer) in (0..3).zip(&mut a) {
        assert_eq!(receive_all(&mut **peer), of(pair));
    }
    assert_eq!(receive(&mut *a[3]), None);
    // The link is up until the last pair of an end is gone.
    b.truncate(1);
    assert!(a[0].link_up());
    b.clear();
    assert!(!a[0].link_up());
}

#[test]
fn a_name_has_one_cable() {
    let a = end("one-a", "one-b", 1);
    for (name, to, names) in
        [("one-a", "one-c", "one-a"), ("one-c", "one-a", "one-b"), ("one-b", "one-c", "one-a")]
    {
        let error = plug_in(name, to, &Impairments::default(), 1).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert!(error.to_string().contains(names), "{error}");
    }
    drop(a);
    let _ = end("one-b", "one-c", 1);
}

#[test]
fn a_full_lane_refuses_and_loses_nothing() {
    let impairments =
        Impairments { loss: percent(30.0), reorder: percent(20.0), seed: 5, ..Impairments::default() };
    // The same frames, once with room for all, once with many refusals.
    let mut runs = Vec::new();
    for at_once in [10, 4000] {
        let mut a = impaired("full-a", "full-b", &impairments);
        let mut b = end("full-b", "full-a", 1);
        let (mut number, mut received, mut refused) = (0, Vec::new(), 0);
        while number < 4000 {
            let mut sent = 0;
            while sent < at_once && number < 4000 {
                if !send(&mut *a, number) {
                    refused += 1;
                    break;
                }
                number += 1;
                sent += 1;
            }
            received.extend(receive_all(&mut *b[0]));
        }
        assert_eq!(refused > 0, at_once == 4000);
        drop(a);
        received.extend(receive_all(&mut *b[0]));
        runs.push(received);
    }
    assert_eq!(runs[0], runs[1], "chance does not depend on how often a frame is offered");
}

#[test]
fn what_is_lost_and_overtaken_is_decided_by_the_seed() {
    let run = |seed| {
        let impairments =
            Impairments { loss: percent(10.0), reorder: percent(5.0), seed, ..Impairments::default() };
        let mut a = impaired("seed-a", "seed-b", &impairments);
        let mut b = end("seed-b", "seed-a", 1);
        let mut received = Vec::new();
        for number in 0..10_000 {
            assert!(send(&mut *a, number));
            received.extend(receive(&mut *b[0]));
        }
        let counters = a.counters();
        drop(a);
        received.extend(receive_all(&mut *b[0]));
        (received, counters.lost.get(), counters.reordered.get())
    };
    let (received, lost, reordered) = run(1);
    assert_eq!(run(1), (received.clone(), lost, reordered));
    assert_ne!(run(2).0, received);

    assert!((900..1100).contains(&lost), "{lost}");
    assert_eq!(received.len() as u64, 10_000 - lost, "nothing is lost but what is counted");
    // One that was overtaken comes right after the one that overtook it, and nothing else is out of order.
    let descents = received.windows(2).filter(|pair| pair[0] > pair[1]).count() as u64;
    assert_eq!(descents, reordered);
    assert!((300..600).contains(&reordered), "{reordered}");
    let mut sorted = received;
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len() as u64, 10_000 - lost, "and nothing came twice");
}

#[test]
fn the_last_frame_is_not_held_for_ever() {
    let impairments = Impairments { reorder: percent(100.0), ..Impairments::default() };
    let mut a = impaired("held-a", "held-b", &impairments);
    let mut b = end("held-b", "held-a", 1);
    assert!(send(&mut *a, 1));
    assert_eq!(receive(&mut *b[0]), None);
    thread::sleep(OVERTAKEN_WITHIN);
    assert_eq!((receive(&mut *a), receive(&mut *b[0])), (None, Some(1)));
    assert_eq!(a.counters().reordered.get(), 0, "nothing overtook it");
}

#[test]
fn a_delayed_frame_is_not_early_and_none_is_lost() {
    let delay = Duration::from_millis(20);
    let mut a = impaired("delay-a", "delay-b", &Impairments { delay, ..Impairments::default() });
    let mut b = end("delay-b", "delay-a", 1);
    let start = Instant::now();
    for number in 0..100 {
        assert!(send(&mut *a, number));
    }
    let mut received = Vec::new();
    while received.len() < 100 && start.elapsed() < Duration::from_secs(10) {
        let at = Instant::now();
        if let Some(number) = receive(&mut *b[0]) {
            received.push(number);
            assert!(at.elapsed() + (at - start) >= delay);
        }
    }
    assert_eq!(received, (0..100).collect::<Vec<_>>());

    // One that is still on its way when the receiver goes is counted there.
    assert!(send(&mut *a, 100));
    assert_eq!(receive(&mut *b[0]), None);
    let counters = b[0].counters();
    drop(b);
    assert_eq!(counters.unplugged.get(), 1);
}

#[test]
fn two_threads_lose_nothing_and_keep_the_order() {
    const FRAMES: u32 = 100_000;
    let (mut a, mut b) = (end("thread-a", "thread-b", 1), end("thread-b", "thread-a", 1));
    let sender = thread::spawn(move || {
        for number in 0..FRAMES {
            while !send(&mut *a[0], number) {
                thread::yield_now();
            }
        }
    });
    let mut next = 0;
    while next < FRAMES {
        match receive(&mut *b[0]) {
            Some(number) => {
                assert_eq!(number, next);
                next += 1;
            }
            None => thread::yield_now(),
        }
    }
    sender.join().unwrap();
}
