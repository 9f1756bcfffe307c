//! Against etherparse, which builds the requests and judges the answers.

use etherparse::{
    ArpOperation, ArpPacket, Icmpv4Type, Icmpv6Type, NetHeaders, PacketBuilder, PacketHeaders,
    TransportHeader, VlanId,
};
use proptest::prelude::*;

use super::*;

const ASKER: [u8; 6] = [2, 0, 0, 0, 0, 1];
const US: [u8; 6] = [2, 0, 0, 0, 0, 2];
const V4: ([u8; 4], [u8; 4]) = ([10, 0, 0, 1], [10, 0, 0, 2]);

fn v6(last: u8) -> [u8; 16] {
    let mut ip = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[15] = last;
    ip
}

fn answered(frame: &[u8]) -> Option<Vec<u8>> {
    let mut frame = frame.to_vec();
    let before = frame.clone();
    let answered = answer(&mut frame, MacAddr(US));
    assert!(answered || frame == before, "what is not answered stays as it is");
    answered.then_some(frame)
}

fn assert_between(frame: &[u8], source: [u8; 6], destination: [u8; 6]) {
    assert_eq!(frame[..6], destination);
    assert_eq!(frame[6..12], source);
}

fn arp(operation: ArpOperation, sender: [u8; 4], target: [u8; 4], tag: Option<u16>) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(ASKER, [0xff; 6]);
    let packet = ArpPacket::new(
        etherparse::ArpHardwareId::ETHERNET,
        etherparse::EtherType::IPV4,
        operation,
        &ASKER,
        &sender,
        &[0; 6],
        &target,
    )
    .unwrap();
    let mut frame = Vec::new();
    match tag {
        None => ethernet.arp(packet).write(&mut frame).unwrap(),
        Some(tag) => {
            ethernet.single_vlan(VlanId::try_new(tag).unwrap()).arp(packet).write(&mut frame).unwrap();
        }
    }
    // As it is on the wire: padded to the smallest frame.
    frame.resize(60, 0);
    frame
}

#[test]
fn arp_requests_are_answered_with_our_address() {
    for tag in [None, Some(77)] {
        let reply = answered(&arp(ArpOperation::REQUEST, V4.0, V4.1, tag)).expect("an answer");
        assert_between(&reply, US, ASKER);
        let parsed = PacketHeaders::from_ethernet_slice(&reply).unwrap();
        assert_eq!(parsed.link_exts.len(), usize::from(tag.is_some()));
        let Some(NetHeaders::Arp(arp)) = parsed.net else { panic!("no ARP") };
        assert_eq!(arp.operation, ArpOperation::REPLY);
        assert_eq!((arp.sender_hw_addr(), arp.sender_protocol_addr()), (&US[..], &V4.1[..]));
        assert_eq!((arp.target_hw_addr(), arp.target_protocol_addr()), (&ASKER[..], &V4.0[..]));
        assert_eq!(reply.len(), 60);
    }
}

#[test]
fn arp_that_asks_for_nobody_is_not_answered() {
    assert!(answered(&arp(ArpOperation::REPLY, V4.0, V4.1, None)).is_none());
    // A probe, and an announcement.
    assert!(answered(&arp(ArpOperation::REQUEST, [0; 4], V4.1, None)).is_none());
    assert!(answered(&arp(ArpOperation::REQUEST, V4.0, V4.0, None)).is_none());
    // For another kind of address.
    let mut other = arp(ArpOperation::REQUEST, V4.0, V4.1, None);
    other[17] = 0xdd;
    assert!(answered(&other).is_none());
    assert!(answered(&arp(ArpOperation::REQUEST, V4.0, V4.1, None)[..41]).is_none());
}

fn ping(payload: &[u8], id: u16, sequence: u16, ttl: u8, options: usize) -> Vec<u8> {
    let mut ip =
        etherparse::Ipv4Header::new(0, ttl, etherparse::ip_number::ICMP, V4.0, V4.1).expect("no payload yet");
    ip.options = vec![1; options * 4][..].try_into().unwrap();
    let headers = etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default());
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(ASKER, US).ip(headers).icmpv4_echo_request(id, sequence);
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn ping6(payload: &[u8], id: u16, sequence: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(ASKER, US).ipv6(v6(1), v6(2), 3).icmpv6_echo_request(id, sequence);
    builder.write(&mut frame, payload).unwrap();
    frame
}

proptest! {
    #[test]
    fn pings_are_answered(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        id: u16,
        sequence: u16,
        ttl in 1u8..,
        options in 0usize..=10,
        padding in 0usize..20,
    ) {
        let mut request = ping(&payload, id, sequence, ttl, options);
        request.extend(std::iter::repeat_n(0xaa, padding));
        let reply = answered(&request).expect("an answer");
        prop_assert_eq!(reply.len(), request.len());
        assert_between(&reply, US, ASKER);
        let parsed = PacketHeaders::from_ethernet_slice(&reply).unwrap();
        let Some(NetHeaders::Ipv4(ip, _)) = &parsed.net else { panic!("no IPv4") };
        prop_assert_eq!((ip.source, ip.destination, ip.time_to_live), (V4.1, V4.0, 64));
        prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        let Some(TransportHeader::Icmpv4(icmp)) = &parsed.transport else { panic!("no ICMP") };
        let Icmpv4Type::EchoReply(echo) = icmp.icmp_type else { panic!("no reply") };
        prop_assert_eq!((echo.id, echo.seq), (id, sequence));
        prop_assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(&payload));
        prop_assert_eq!(parsed.payload.slice(), &payload[..]);
    }

    #[test]
    fn pings_over_ipv6_are_answered(payload in prop::collection::vec(any::<u8>(), 0..200), id: u16, sequence: u16) {
        let reply = answered(&ping6(&payload, id, sequence)).expect("an answer");
        assert_between(&reply, US, ASKER);
        let parsed = PacketHeaders::from_ethernet_slice(&reply).unwrap();
        let Some(NetHeaders::Ipv6(ip, _)) = &parsed.net else { panic!("no IPv6") };
        prop_assert_eq!((ip.source, ip.destination, ip.hop_limit), (v6(2), v6(1), 64));
        let Some(TransportHeader::Icmpv6(icmp)) = &parsed.transport else { panic!("no ICMPv6") };
        let Icmpv6Type::EchoReply(echo) = icmp.icmp_type else { panic!("no reply") };
        prop_assert_eq!((echo.id, echo.seq), (id, sequence));
        prop_assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(ip.source, ip.destination, &payload).unwrap());
        prop_assert_eq!(parsed.payload.slice(), &payload[..]);
    }

    #[test]
    fn damage_is_not_answered(payload in prop::collection::vec(any::<u8>(), 4..50), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        for request in [ping(&payload, 1, 2, 64, 0), ping6(&payload, 1, 2)] {
            // Behind the addresses and the EtherType. What no checksum of IPv6 covers: class, flow, hops.
            let mut damaged = request.clone();
            let at = 14 + at.index(damaged.len() - 14);
            damaged[at] ^= 1 << bit;
            if request[14] >> 4 == 4 || at >= 14 + 8 {
                prop_assert!(answered(&damaged).is_none(), "byte {}", at);
            }
        }
    }

    #[test]
    fn any_bytes_will_do(bytes in prop::collection::vec(any::<u8>(), 0..100), kind in 0usize..4) {
        let mut frame = match kind {
            0 => ping(&bytes, 1, 2, 3, 0),
            1 => ping6(&bytes, 1, 2),
            2 => solicitation(v6(1), 2),
            _ => arp(ArpOperation::REQUEST, V4.0, V4.1, None),
        };
        for (at, byte) in bytes.iter().enumerate().take(5) {
            let index = (at * 17 + usize::from(*byte)) % frame.len();
            frame[index] = *byte;
        }
        answered(&frame);
        answered(&frame[..usize::from(bytes.first().copied().unwrap_or(0)).min(frame.len())]);
        answered(&bytes);
    }
}

#[test]
fn pings_to_and_from_many_and_fragments_are_not_answered() {
    let rebuilt = |source: [u8; 4], destination: [u8; 4]| {
        let mut frame = Vec::new();
        let builder =
            PacketBuilder::ethernet2(ASKER, US).ipv4(source, destination, 9).icmpv4_echo_request(1, 2);
        builder.write(&mut frame, b"ping").unwrap();
        frame
    };
    assert!(answered(&rebuilt(V4.0, V4.1)).is_some());
    for (source, destination) in
        [(V4.0, [224, 0, 0, 1]), (V4.0, [255; 4]), ([0; 4], V4.1), ([239, 1, 1, 1], V4.1)]
    {
        assert!(answered(&rebuilt(source, destination)).is_none(), "{source:?} {destination:?}");
    }
    // More fragments follow.
    let mut fragment = rebuilt(V4.0, V4.1);
    fragment[20] |= 0x20;
    let headers = Headers::parse(&fragment);
    checksum::write_ip(&mut fragment, &headers);
    assert!(answered(&fragment).is_none());
    // A reply is not answered, or two of us would never end.
    let reply = answered(&rebuilt(V4.0, V4.1)).unwrap();
    assert!(answered(&reply).is_none());
}

/// A neighbour solicitation, byte by byte as in RFC 4861, section 4.3.
fn solicitation(source: [u8; 16], last: u8) -> Vec<u8> {
    let mut solicited = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0];
    solicited[15] = last;
    let payload = [&v6(last)[..], &[1, 1], &ASKER].concat();
    let mut frame = Vec::new();
    let builder =
        PacketBuilder::ethernet2(ASKER, [0x33, 0x33, 0xff, 0, 0, last]).ipv6(source, solicited, 255);
    builder.icmpv6_raw(135, 0, [0; 4]).write(&mut frame, &payload).unwrap();
    frame
}

#[test]
fn neighbours_that_ask_are_answered() {
    let reply = answered(&solicitation(v6(1), 2)).expect("an answer");
    assert_between(&reply, US, ASKER);
    let parsed = PacketHeaders::from_ethernet_slice(&reply).unwrap();
    let Some(NetHeaders::Ipv6(ip, _)) = &parsed.net else { panic!("no IPv6") };
    assert_eq!((ip.source, ip.destination, ip.hop_limit), (v6(2), v6(1), 255));
    let Some(TransportHeader::Icmpv6(icmp)) = &parsed.transport else { panic!("no ICMPv6") };
    let Icmpv6Type::NeighborAdvertisement(advertisement) = icmp.icmp_type else { panic!("no advertisement") };
    assert!(advertisement.solicited && advertisement.r#override && !advertisement.router);
    let expected = [&v6(2)[..], &[2, 1], &US].concat();
    assert_eq!(parsed.payload.slice(), expected);
    assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(ip.source, ip.destination, &expected).unwrap());

    assert!(answered(&solicitation([0; 16], 2)).is_none(), "somebody is about to take the address");
    let mut routed = solicitation(v6(1), 2);
    routed[14 + 7] = 254;
    assert!(answered(&routed).is_none(), "it came over a router");
}

/// The bytes behind the addresses that the kernel's answer and ours must have in common.
fn comparable(frame: &[u8]) -> Vec<u8> {
    let headers = Headers::parse(frame);
    // Of an IP header version, lengths and addresses; ids and hops are each station's own.
    let ip = headers.addresses(frame).unwrap_or_default();
    let rest = match headers.ethertype {
        ethertype::ARP => &frame[14..14 + size_of::<Arp>()],
        _ => &frame[headers.l4_offset()..headers.end()],
    };
    [&frame[12..15], ip, rest].concat()
}

#[test]
fn a_real_ping_is_answered_as_the_kernel_did() {
    // Both ways of a conversation of two kernels, made by tests/data/make: ARP, neighbours, three kinds of ping.
    let capture = include_bytes!("../../../tests/data/ping.pcap");
    let mut reader = pcap_file::pcap::PcapReader::new(&capture[..]).unwrap();
    let mut frames = vec![];
    while let Some(packet) = reader.next_packet() {
        frames.push(packet.unwrap().data.to_vec());
    }
    let (asker, kernel) = ([2, 0, 0, 0, 0, 0x0a], [2, 0, 0, 0, 0, 0x0b]);
    let mut ours = vec![];
    for frame in frames.iter().filter(|frame| frame[6..12] == asker) {
        let mut frame = frame.clone();
        if answer(&mut frame, MacAddr(kernel)) {
            assert_between(&frame, kernel, asker);
            ours.push(comparable(&frame));
        }
    }
    let theirs = frames.iter().filter(|frame| frame[..6] == asker && frame[6..12] == kernel);
    let theirs: Vec<_> = theirs.map(|frame| comparable(frame)).collect();
    assert_eq!(ours.len(), 1 + 3 + 2 + 1 + 3);
    assert_eq!(ours, theirs);
    // And to none of the answers is answered.
    assert!(frames.iter().filter(|frame| frame[6..12] == kernel).all(|frame| answered(frame).is_none()));
}
