//! What the device does for packets: checksums, segments, VLAN tags, distribution to queues.

use std::collections::HashMap;

use underpass::net::{Config, Offloads, Rss, RxQueue};
use underpass::{Checksum, ErrorKind, Transport, TxOffload};
use underpass_drivers::virtio_net::model::peer::{Offload, Segment, SegmentKind};

use crate::rig::frames::{Field, Flow, KEY, numbered, toeplitz};
use crate::rig::wire::OnWire;
use crate::rig::{Bench, Random, Wire, chain, contents, packet, pool, small_pool};
use crate::{Kind, config};

/// Bytes whose sums differ from one place to the next.
fn filler(len: usize, factor: usize) -> Vec<u8> {
    (0..len).map(|n| (n * factor + n / 251 + len) as u8).collect()
}

/// Flows of each kind that has a transport checksum.
fn flows() -> [Flow; 5] {
    [
        Flow::new(false, false, 1),
        Flow::new(false, true, 2),
        Flow::new(true, false, 3),
        Flow::new(true, true, 4),
        Flow { vlan: Some(0x2005), ..Flow::new(false, true, 5) },
    ]
}

pub(super) fn received_checksums_are_judged(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    for offloads in [Offloads::NONE, Offloads::RX_CHECKSUM] {
        let mut started = bench.start(&Config { offloads, ..config(&pool) });
        let granted = started.offloads.contains(Offloads::RX_CHECKSUM);
        assert_eq!(
            granted,
            (bench.port.info().offloads & offloads).contains(Offloads::RX_CHECKSUM) && !offloads.is_empty()
        );
        let mut receive = |frame: OnWire| {
            bench.wire.send_unfinished(0, frame);
            let packet = bench.receive(&mut *started.rx[0], 1).remove(0);
            (packet.checksum(), contents(&packet))
        };
        let plain = |bytes: Vec<u8>| OnWire { bytes, offload: Offload::default() };
        for (flow, size) in
            flows().into_iter().flat_map(|flow| [1, 2, 100, 1001].map(|size| (flow.clone(), size)))
        {
            let payload = filler(size, 7);
            let with = |field| Flow { field, ..flow.clone() }.frame(&payload);
            let (checksum, bytes) = receive(plain(with(Field::Right)));
            assert!(bytes == with(Field::Right));
            if flow.vlan.is_none() {
                assert_eq!(checksum, if granted { Checksum::Good } else { Checksum::Unknown }, "{flow:?}");
            } else {
                assert!(matches!(checksum, Checksum::Good | Checksum::Unknown));
            }

            let (checksum, bytes) = receive(plain(with(Field::Wrong)));
            assert!(bytes == with(Field::Wrong), "a wrong checksum is passed on as it is");
            assert!(matches!(checksum, Checksum::Bad | Checksum::Unknown), "{checksum:?}: {flow:?}");

            let start = (flow.l2_len() + flow.l3_len()) as u16;
            let offload = Offload { checksum: Some((start, flow.checksum_offset() as u16)), segment: None };
            let (checksum, bytes) = receive(OnWire { bytes: with(Field::Pseudo), offload });
            if granted && checksum == Checksum::Partial {
                assert!(bytes == with(Field::Pseudo));
            } else {
                assert!(
                    checksum != Checksum::Partial && bytes == with(Field::Right),
                    "{checksum:?}: {flow:?}"
                );
            }
        }
        // No transport at all.
        let (checksum, _) = receive(plain(numbered(1, 1, 40)));
        assert_eq!(checksum, Checksum::Unknown);
        bench.stop(started, &[&pool]);
    }
}

fn asks(flow: &Flow, segment: u16) -> TxOffload {
    TxOffload {
        l2_len: flow.l2_len() as u8,
        l3_len: flow.l3_len() as u16,
        l4_len: flow.l4_len() as u8,
        ipv6: flow.v6,
        transport: if flow.tcp { Transport::Tcp } else { Transport::Udp },
        ip_checksum: false,
        l4_checksum: true,
        segment,
    }
}

pub(super) fn checksums_are_completed(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let pool = pool(256);
    let mut started = bench.start(&Config { offloads: Offloads::TX_CHECKSUM, ..config(&pool) });
    if !started.offloads.contains(Offloads::TX_CHECKSUM) {
        assert!(!bench.port.info().offloads.contains(Offloads::TX_CHECKSUM));
        return;
    }
    let tx = &mut *started.tx[0];
    let mut expected = Vec::new();
    for flow in flows() {
        for size in [1, 2, 3, 64, 999, 1400] {
            let payload = filler(size, 31);
            expected.push(bench.wire.padded(flow.frame(&payload)));
            let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
            let cuts: &[usize] =
                if size == 64 { &[flow.headers_len() - 3, flow.headers_len() + 11] } else { &[] };
            let mut packet = chain(&pool, &frame, cuts);
            packet.set_tx_offload(Some(asks(&flow, 0)));
            bench.send(tx, [packet]);
        }
    }
    bench.flush(tx);
    // Flows may overtake one another where the other end joins segments.
    let mut sent = bench.sent(expected.len());
    sent.sort();
    expected.sort();
    assert_eq!(sent.len(), expected.len());
    for (sent, expected) in sent.iter().zip(&expected) {
        assert_eq!(sent, expected);
    }
    // The IPv4 header's checksum is done, or the packet is refused: never sent without.
    let flow = Flow::new(false, true, 8);
    let right = flow.frame(&[5; 100]);
    let mut wrong = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&[5; 100]);
    wrong[24..26].fill(0);
    let mut packet = packet(&pool, &wrong);
    packet.set_tx_offload(Some(TxOffload { ip_checksum: true, ..asks(&flow, 0) }));
    bench.send(tx, [packet]);
    bench.flush(tx);
    let refused = bench.counted().1.refused;
    let sent = bench.sent(1 - refused as usize);
    assert!(
        sent == [&right[..]] && refused == 0 || sent.is_empty() && refused == 1,
        "{refused} refused: {sent:x?}"
    );

    // Lengths that lead outside the packet are the sender's lie.
    let refused = bench.counted().1.refused;
    let lies = [
        TxOffload { l2_len: 255, ..asks(&flow, 0) },
        TxOffload { l3_len: u16::MAX, ..asks(&flow, 0) },
        TxOffload { l2_len: 14, l3_len: 20 + 20 + 100 - 17, ..asks(&flow, 0) },
    ];
    for (n, lie) in (1..).zip(lies) {
        let mut packet = crate::rig::packet(&pool, &right);
        packet.set_tx_offload(Some(lie));
        bench.send(tx, [packet]);
        bench.flush(tx);
        assert_eq!((bench.counted().1.refused - refused, bench.sent(0).len()), (n, 0), "{lie:?}");
    }
    bench.stop(started, &[&pool]);
}

pub(super) fn long_payloads_are_segmented(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let (pool, large) = (pool(256), small_pool(32, 65_000));
    let wanted = Offloads::TX_CHECKSUM | Offloads::TX_TCP_SEGMENT | Offloads::TX_UDP_SEGMENT;
    bench.port.map(&large).unwrap();
    let mut started = bench.start(&Config { offloads: wanted, ..config(&pool) });
    let granted = started.offloads;
    assert_eq!(granted, bench.port.info().offloads & wanted);
    let tx = &mut *started.tx[0];
    let mut done = 0;
    for flow in flows() {
        let offload = if flow.tcp { Offloads::TX_TCP_SEGMENT } else { Offloads::TX_UDP_SEGMENT };
        if !granted.contains(offload) {
            continue;
        }
        for (len, size) in [(1, 1400), (1400, 1400), (1401, 1400), (2999, 1000), (9000, 536), (60_000, 1440)]
        {
            for flags in if flow.tcp { &[0x10, 0x19, 0x99][..] } else { &[0][..] } {
                let flow = Flow { flags: *flags, ..flow.clone() };
                let payload = filler(len, 13);
                let expected = flow.segments(&payload, size);
                let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
                let cuts: &[usize] =
                    if done % 2 == 0 || len < 100 { &[] } else { &[flow.headers_len(), 100] };
                let mut packet = chain(&large, &frame, cuts);
                packet.set_tx_offload(Some(asks(&flow, size as u16)));
                bench.send(tx, [packet]);
                bench.flush(tx);
                let sent = bench.sent(expected.len());
                assert_eq!(sent.len(), expected.len(), "{len} bytes by {size}: {flow:?}");
                let expected = expected.into_iter().map(|segment| bench.wire.padded(segment));
                for (n, (sent, expected)) in sent.iter().zip(expected).enumerate() {
                    assert_eq!(
                        sent[..flow.headers_len()],
                        expected[..flow.headers_len()],
                        "segment {n}: {flow:?}"
                    );
                    assert!(*sent == expected, "segment {n} of {len} bytes: {flow:?}");
                }
                done += 1;
            }
        }
    }
    // One that says what can not be.
    if granted.contains(Offloads::TX_TCP_SEGMENT) {
        let flow = Flow::new(false, true, 9);
        let refused = bench.counted().1.refused;
        let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&[1; 3000]);
        for lie in [
            TxOffload { l4_len: 255, l3_len: 3000, ..asks(&flow, 1000) },
            TxOffload { l4_len: 0, ..asks(&flow, 1000) },
            TxOffload { l4_checksum: false, ..asks(&flow, 1000) },
        ] {
            let mut packet = packet(&large, &frame);
            packet.set_tx_offload(Some(lie));
            bench.send(tx, [packet]);
            bench.flush(tx);
            // A device may look for the headers itself.
            let sent = bench.sent(0);
            assert!(sent.is_empty() || sent == flow.segments(&[1; 3000], 1000), "{lie:?}");
        }
        assert!(bench.counted().1.refused > refused);
    }
    assert!(done > 0 || granted.is_empty());
    bench.stop(started, &[&pool, &large]);
}

pub(super) fn joined_segments_are_received(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(512);
    let all = Offloads::RX_CHECKSUM | Offloads::RX_LARGE | Offloads::RX_SCATTER;
    for offloads in [Offloads::NONE, Offloads::RX_CHECKSUM, all] {
        let mut started = bench.start(&Config { offloads, ..config(&pool) });
        for (flow, kind) in [
            (Flow::new(false, true, 1), SegmentKind::Tcp4),
            (Flow::new(true, true, 2), SegmentKind::Tcp6),
            (Flow::new(false, false, 3), SegmentKind::Udp),
            (Flow::new(true, false, 4), SegmentKind::Udp),
        ] {
            let payload = filler(20_000, 17);
            let joined = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
            let start = (flow.l2_len() + flow.l3_len()) as u16;
            let segment = Segment { kind, size: 1400, header_len: flow.headers_len() as u16 };
            let offload =
                Offload { checksum: Some((start, flow.checksum_offset() as u16)), segment: Some(segment) };
            bench.wire.send_unfinished(0, OnWire { bytes: joined.clone(), offload });
            let segments = flow.segments(&payload, 1400);
            let large = started.offloads.contains(Offloads::RX_LARGE) && flow.tcp;
            let back = bench.drain(&mut started.rx, if large { 1 } else { segments.len() });
            if large {
                assert_eq!((back.len(), back[0].checksum()), (1, Checksum::Partial));
                assert!(contents(&back[0]) == joined);
            } else {
                assert!(back.iter().map(contents).eq(segments), "{flow:?}");
            }
        }
        let (counted, _) = bench.counted();
        assert_eq!(counted.dropped(), 0, "{counted:?}");
        bench.stop(started, &[&pool]);
    }
}

pub(super) fn offloads_that_were_not_granted_are_refused(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let mut refused = 0;
    for flow in flows() {
        for offload in [
            asks(&flow, 0),
            asks(&flow, 500),
            TxOffload { ip_checksum: true, l4_checksum: false, ..asks(&flow, 0) },
        ] {
            let mut packet = packet(&pool, &flow.frame(&[1; 1000]));
            packet.set_tx_offload(Some(offload));
            bench.send(&mut *started.tx[0], [packet]);
            refused += 1;
        }
    }
    let mut tagged = packet(&pool, &numbered(1, 1, 100));
    tagged.set_vlan(Some(7));
    bench.send(&mut *started.tx[0], [tagged]);
    refused += 1;
    bench.flush(&mut *started.tx[0]);
    let (_, counted) = bench.counted();
    assert_eq!((counted.packets, counted.refused, bench.sent(0).len()), (0, refused, 0));
    bench.stop(started, &[&pool]);
}

pub(super) fn vlan_tags_are_taken_out_and_put_in(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let wanted = Offloads::RX_VLAN | Offloads::TX_VLAN | Offloads::TX_CHECKSUM;
    let mut started = bench.start(&Config { offloads: wanted, ..config(&pool) });
    let granted = started.offloads;
    let tagged = Flow { vlan: Some(0xe123), ..Flow::udp4(3) };
    let plain = Flow { vlan: None, ..tagged.clone() };
    for (flow, stripped) in [(&tagged, true), (&plain, false)] {
        bench.wire.send(0, flow.frame(&[7; 77]));
        let back = bench.receive(&mut *started.rx[0], 1).remove(0);
        if granted.contains(Offloads::RX_VLAN) {
            assert_eq!(contents(&back), plain.frame(&[7; 77]));
            assert_eq!(back.vlan(), stripped.then_some(0xe123));
        } else {
            assert_eq!((contents(&back), back.vlan()), (flow.frame(&[7; 77]), None));
        }
    }
    // A tag and nothing else is too short a frame to look into.
    if bench.wire.least() < 18 {
        bench.wire.send(0, [&[0xff; 12][..], &[0x81, 0]].concat());
        bench.wire.send(0, [&[0xff; 12][..], &[0x81, 0, 0, 5]].concat());
        let back = bench.drain(&mut started.rx, 2);
        assert!(back.iter().all(|packet| packet.vlan().is_none() && packet.len() < 18));
    }
    if granted.contains(Offloads::TX_VLAN) {
        let tx = &mut *started.tx[0];
        for cuts in [&[][..], &[12], &[5, 13], &[30]] {
            let mut packet = chain(&pool, &plain.frame(&[8; 500]), cuts);
            packet.set_vlan(tagged.vlan);
            bench.send(tx, [packet]);
            bench.flush(tx);
            let sent = bench.sent(usize::from(cuts.first() != Some(&5)));
            // Addresses in two segments may be refused, not sent wrong.
            assert!(
                sent.is_empty() && cuts.first() == Some(&5) || sent == [tagged.frame(&[8; 500])],
                "{cuts:?}"
            );
        }
    }
    bench.stop(started, &[&pool]);
}

pub(super) fn packets_are_distributed_by_their_hash(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(3));
    let info = bench.port.info();
    if !info.offloads.contains(Offloads::RSS) {
        let rss = Rss { key: KEY.to_vec(), table: vec![0] };
        let pool = pool(64);
        let started = bench.start(&Config { rx_depth: 16, ..config(&pool) });
        assert_eq!(bench.port.set_rss(&rss).unwrap_err().kind(), ErrorKind::Unsupported);
        return bench.stop(started, &[&pool]);
    }
    assert!(info.rss_key_len <= KEY.len(), "a longer key than is used here");
    let queues = info.max_rx_queues.min(info.max_tx_queues);
    let pool = pool(1024);
    let key = &KEY[..info.rss_key_len];
    let mut random = Random(99);
    let mut table = |len: usize| -> Vec<u16> { (0..len).map(|_| random.below(queues) as u16).collect() };
    let rss = Rss { key: key.to_vec(), table: table(info.rss_table_len) };
    let mut started = bench.start(&Config {
        rx_queues: queues,
        tx_queues: queues,
        offloads: Offloads::RSS | Offloads::RSS_HASH,
        rss: Some(rss.clone()),
        ..config(&pool)
    });
    assert!(started.offloads.contains(Offloads::RSS));
    let reports = started.offloads.contains(Offloads::RSS_HASH);
    let check = |bench: &Bench, rx: &mut [Box<dyn RxQueue>], rss: &Rss| {
        let flows: Vec<_> = (0..120).map(|n| Flow::new(n % 2 == 0, n % 3 == 0, 300 * n)).collect();
        let frames: HashMap<_, _> = flows.iter().map(|flow| (flow.frame(&[9; 60]), flow)).collect();
        for (n, frame) in frames.keys().enumerate() {
            bench.wire.send(n % queues, frame.clone());
        }
        let back = bench.drain(rx, flows.len());
        assert_eq!(back.len(), flows.len());
        for packet in back {
            let hash = toeplitz(&rss.key, &frames[&contents(&packet)].hashed());
            assert_eq!(packet.queue(), rss.table[hash as usize % rss.table.len()]);
            assert_eq!(packet.rss_hash(), reports.then_some(hash));
        }
    };
    // Which queue lends its packets, not what they say, is what counts.
    for (n, queue) in started.rx.iter_mut().enumerate() {
        let flow = (0..).map(|n| Flow::new(false, true, n));
        let mut flow = flow.filter(|flow| {
            let hash = toeplitz(key, &flow.hashed());
            usize::from(rss.table[hash as usize % rss.table.len()]) == n
        });
        bench.wire.send(n, flow.next().unwrap().frame(&[1]));
        assert_eq!(bench.receive(&mut **queue, 1)[0].queue(), n as u16);
    }
    check(&bench, &mut started.rx, &rss);
    for len in [1, 2, 64, info.rss_table_len] {
        let rss = Rss { key: key.iter().rev().copied().collect(), table: table(len) };
        bench.port.set_rss(&rss).unwrap();
        check(&bench, &mut started.rx, &rss);
        for wrong in [
            Rss { table: vec![queues as u16], ..rss.clone() },
            Rss { table: vec![0; 3], ..rss.clone() },
            Rss { table: Vec::new(), ..rss.clone() },
            Rss { table: vec![0; 2 * info.rss_table_len], ..rss.clone() },
            Rss { key: vec![1; info.rss_key_len + 1], ..rss.clone() },
        ] {
            assert_eq!(bench.port.set_rss(&wrong).unwrap_err().kind(), ErrorKind::InvalidInput, "{wrong:?}");
        }
        check(&bench, &mut started.rx, &rss);
    }
    // What has no addresses goes somewhere.
    bench.wire.send(0, numbered(1, 1, 30));
    let other = bench.drain(&mut started.rx, 1);
    assert_eq!((other.len(), other[0].rss_hash()), (1, None));
    drop(other);
    bench.stop(started, &[&pool]);
}
