//! Against etherparse, which parses and builds on its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    EtherPayloadSlice, IpHeaders, IpNumber, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader,
    Ipv6RoutingExtensions, LinkExtHeader, NetHeaders, PacketBuilder, PacketHeaders, PayloadSlice,
    TransportHeader, VlanId,
};
use proptest::prelude::*;

use super::*;
use crate::Transport;
use crate::net::checksum;

/// What both parsers can tell.
#[derive(Debug, PartialEq, Eq, Default)]
struct Found {
    l2_len: usize,
    l3_len: usize,
    /// Only of a packet that is not fragmented: etherparse does not look into fragments.
    l4_len: usize,
    vlan: Option<u16>,
    ethertype: Option<u16>,
    ip: Option<Ip>,
    protocol: Option<u8>,
    fragmented: bool,
    addresses: Option<Vec<u8>>,
    ports: Option<[u16; 2]>,
}

fn ours(frame: &[u8]) -> Found {
    let headers = Headers::parse(frame);
    let fragmented = headers.fragment != Fragment::Whole;
    let ports = headers.ports(frame).map(|[a, b, c, d]| [[*a, *b], [*c, *d]].map(u16::from_be_bytes));
    Found {
        l2_len: headers.l3_offset(),
        l3_len: headers.l3_len.into(),
        l4_len: if fragmented { 0 } else { headers.l4_len.into() },
        vlan: headers.vlan,
        ethertype: (headers.l2_len != 0).then_some(headers.ethertype),
        ip: headers.ip,
        protocol: headers.ip.map(|_| headers.protocol),
        fragmented,
        addresses: headers.addresses(frame).map(<[u8]>::to_vec),
        ports: if fragmented { None } else { ports },
    }
}

/// What etherparse finds, where it finds no fault.
fn etherparses(frame: &[u8]) -> Option<Found> {
    let packet = PacketHeaders::from_ethernet_slice(frame).ok()?;
    let link = packet.link.as_ref()?.clone().ethernet2()?;
    let mut found = Found { l2_len: 14, ethertype: Some(link.ether_type.0), ..Found::default() };
    for tag in &packet.link_exts {
        let LinkExtHeader::Vlan(tag) = tag else { return None };
        let [high, low] = [tag.to_bytes()[0], tag.to_bytes()[1]];
        found.vlan.get_or_insert(u16::from_be_bytes([high, low]));
        found.ethertype = Some(tag.ether_type.0);
        found.l2_len += 4;
    }
    match &packet.net {
        Some(NetHeaders::Ipv4(ip, extensions)) => {
            // It looks behind an authentication header over IPv4 too.
            if extensions.auth.is_some() {
                return None;
            }
            found.ip = Some(Ip::V4);
            found.l3_len = ip.header_len();
            found.protocol = Some(ip.protocol.0);
            found.fragmented = ip.is_fragmenting_payload();
            found.addresses = Some([ip.source, ip.destination].concat());
        }
        Some(NetHeaders::Ipv6(ip, extensions)) => {
            // It takes a length of 0 for "up to the frame's end".
            if ip.payload_length == 0 {
                return None;
            }
            found.ip = Some(Ip::V6);
            found.l3_len = ip.header_len() + extensions.header_len();
            found.protocol = Some(extensions.next_header(ip.next_header).ok()?.0);
            found.fragmented = extensions.is_fragmenting_payload();
            found.addresses = Some([ip.source, ip.destination].concat());
        }
        _ => {}
    }
    let ports = |source, destination| Some([source, destination]);
    match &packet.transport {
        Some(TransportHeader::Udp(udp)) => {
            (found.l4_len, found.ports) = (8, ports(udp.source_port, udp.destination_port));
        }
        Some(TransportHeader::Tcp(tcp)) => {
            (found.l4_len, found.ports) = (tcp.header_len(), ports(tcp.source_port, tcp.destination_port));
        }
        Some(TransportHeader::Icmpv4(_) | TransportHeader::Icmpv6(_)) => found.l4_len = 8,
        _ => {}
    }
    // It walks each extension header once and in order only; here they come in any order, and often.
    let extension = |protocol: IpNumber| protocol.is_ipv6_ext_header_value();
    match packet.payload {
        PayloadSlice::Ip(payload) if found.ip == Some(Ip::V6) && extension(payload.ip_number) => None,
        // A third tag, or MACsec.
        PayloadSlice::Ether(EtherPayloadSlice { ether_type, .. })
            if Some(ether_type.0) != found.ethertype =>
        {
            None
        }
        _ if packet.link_exts.len() > 2 => None,
        _ => Some(found),
    }
}

/// How a frame is put together by etherparse.
#[derive(Debug, Clone)]
struct Recipe {
    vlans: Vec<u16>,
    ip: IpAddr,
    /// Options of IPv4, or lengths of extension headers of IPv6: hop by hop, destination, routing.
    extensions: [Option<u8>; 3],
    /// More fragments, and offset.
    fragment: Option<(bool, u16)>,
    transport: u8,
    ports: (u16, u16),
    payload: Vec<u8>,
    padding: usize,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let ip = prop_oneof![
        any::<[u8; 4]>().prop_map(|octets| IpAddr::V4(octets.into())),
        any::<[u8; 16]>().prop_map(|octets| IpAddr::V6(octets.into())),
    ];
    let extension = prop::option::weighted(0.3, 0u8..6);
    (
        prop::collection::vec(0u16..4096, 0..=2),
        ip,
        [extension.clone(), extension.clone(), extension],
        prop::option::weighted(0.3, (any::<bool>(), 0u16..0x1fff)),
        0u8..5,
        any::<(u16, u16)>(),
        // Without a payload of IPv6 etherparse takes the padding for it.
        prop::collection::vec(any::<u8>(), 1..100),
        0usize..20,
    )
        .prop_map(|(vlans, ip, extensions, fragment, transport, ports, payload, padding)| Recipe {
            vlans,
            ip,
            extensions,
            fragment,
            transport,
            ports,
            payload,
            padding,
        })
}

impl Recipe {
    fn ip_headers(&self) -> IpHeaders {
        match self.ip {
            IpAddr::V4(ip) => {
                let mut header = etherparse::Ipv4Header::new(0, 9, IpNumber(0), [10, 0, 0, 1], ip.octets())
                    .expect("no payload is too long");
                let options = vec![1; usize::from(self.extensions[0].unwrap_or(0)) * 4];
                header.options = options[..].try_into().expect("few options");
                if let Some((more, offset)) = self.fragment {
                    header.more_fragments = more;
                    header.fragment_offset = offset.try_into().expect("13 bits");
                    header.dont_fragment = false;
                }
                IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default())
            }
            IpAddr::V6(ip) => {
                let raw = |len: u8| {
                    let body = vec![0; 6 + usize::from(len) * 8];
                    Ipv6RawExtHeader::new_raw(IpNumber(0), &body).expect("a fitting length")
                };
                let [hop_by_hop, destination, routing] = self.extensions;
                let header =
                    Ipv6Header { source: [1; 16], destination: ip.octets(), ..Ipv6Header::default() };
                let fragment = self.fragment.map(|(more, offset)| {
                    let offset = offset.try_into().expect("13 bits");
                    Ipv6FragmentHeader::new(IpNumber(0), offset, more, 7)
                });
                let extensions = Ipv6Extensions {
                    hop_by_hop_options: hop_by_hop.map(raw),
                    destination_options: destination.map(raw),
                    routing: routing.map(|len| Ipv6RoutingExtensions {
                        routing: raw(len),
                        final_destination_options: None,
                    }),
                    fragment,
                    auth: None,
                };
                IpHeaders::Ipv6(header, extensions)
            }
        }
    }

    fn build(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let id = |id: u16| VlanId::try_new(id).expect("12 bits");
        let ip = match self.vlans[..] {
            [] => ethernet.ip(self.ip_headers()),
            [tag] => ethernet.single_vlan(id(tag)).ip(self.ip_headers()),
            [outer, inner, ..] => ethernet.double_vlan(id(outer), id(inner)).ip(self.ip_headers()),
        };
        let (source, destination) = self.ports;
        let mut frame = Vec::new();
        match self.transport {
            0 => ip.udp(source, destination).write(&mut frame, &self.payload),
            1 => ip.tcp(source, destination, 1, 2).write(&mut frame, &self.payload),
            2 => {
                let options = [etherparse::TcpOptionElement::Timestamp(3, 4)];
                let tcp = ip.tcp(source, destination, 1, 2).options(&options).expect("few options");
                tcp.write(&mut frame, &self.payload)
            }
            3 if self.ip.is_ipv4() => ip.icmpv4_echo_request(5, 6).write(&mut frame, &self.payload),
            3 => ip.icmpv6_echo_request(5, 6).write(&mut frame, &self.payload),
            // Nothing that is known here: SCTP.
            _ => ip.write(&mut frame, IpNumber(132), &self.payload),
        }
        .expect("a packet");
        frame.extend(std::iter::repeat_n(0xee, self.padding));
        frame
    }

    fn is_fragmented(&self) -> bool {
        self.fragment.is_some_and(|(more, offset)| more || offset != 0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn what_etherparse_builds_is_found(recipe in recipe()) {
        let frame = recipe.build();
        let found = ours(&frame);
        let expected = etherparses(&frame);
        prop_assert_eq!(Some(&found), expected.as_ref());
        let headers = Headers::parse(&frame);
        prop_assert_eq!(headers.end(), frame.len() - recipe.padding);
        prop_assert!(!headers.truncated);
        prop_assert_eq!(found.fragmented, recipe.is_fragmented());
        match recipe.fragment {
            Some((_, 1..)) => prop_assert_eq!((headers.fragment, headers.l4_len), (Fragment::Later, 0)),
            Some((true, 0)) => {
                prop_assert_eq!(headers.fragment, Fragment::First);
                prop_assert_eq!(headers.l4_len != 0, recipe.transport < 4);
            }
            _ => {}
        }
    }

    #[test]
    fn etherparses_checksums_are_right(recipe in recipe()) {
        let mut frame = recipe.build();
        let headers = Headers::parse(&frame);
        prop_assert_eq!(checksum::check_ip(&frame, &headers), recipe.ip.is_ipv4().then_some(true));
        let has_checksum = recipe.transport < 4 && !recipe.is_fragmented();
        prop_assert_eq!(checksum::check_l4(&frame, &headers), has_checksum.then_some(true));

        // Writing them again changes nothing, and a changed byte is noticed.
        let before = frame.clone();
        checksum::write_ip(&mut frame, &headers);
        checksum::write_l4(&mut frame, &headers, L4Checksum::Full);
        prop_assert_eq!(&before, &frame);
        if has_checksum && headers.payload_offset() < headers.end() {
            frame[headers.payload_offset()] ^= 0x10;
            prop_assert_eq!(checksum::check_l4(&frame, &headers), Some(false));
        }
    }

    #[test]
    fn damaged_frames_are_found_alike_or_refused(
        recipe in recipe(),
        damage in prop::collection::vec((0usize..80, any::<u8>()), 0..4),
        cut in 0usize..200,
    ) {
        let mut frame = recipe.build();
        for (at, value) in damage {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(frame.len().saturating_sub(cut.saturating_sub(100)));
        let found = ours(&frame);
        // What some used for outer tags before 802.1ad; etherparse takes it for one, as we do not.
        prop_assume!(found.ethertype != Some(0x9100));
        if let Some(expected) = etherparses(&frame) {
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn any_bytes_will_do(mut bytes in prop::collection::vec(any::<u8>(), 0..300), ethertype in 0usize..5) {
        let ethertypes = [ethertype::IPV4, ethertype::IPV6, ethertype::VLAN, ethertype::QINQ, ethertype::ARP];
        if let Some(field) = bytes.get_mut(12..14) {
            field.copy_from_slice(&ethertypes[ethertype].to_be_bytes());
        }
        if let Some(version) = bytes.get_mut(14) {
            *version = match ethertypes[ethertype] {
                ethertype::IPV4 => 0x40 | *version & 0xf,
                ethertype::IPV6 => 0x60 | *version & 0xf,
                _ => *version,
            };
        }
        let headers = Headers::parse(&bytes);
        prop_assert!(headers.end() <= bytes.len());
        prop_assert!(headers.payload_offset() <= headers.end());
        let _ = (headers.addresses(&bytes), headers.ports(&bytes));
        let _ = (checksum::check_ip(&bytes, &headers), checksum::check_l4(&bytes, &headers));
        let before = bytes.clone();
        checksum::write_ip(&mut bytes, &headers);
        checksum::write_l4(&mut bytes, &headers, L4Checksum::Full);
        prop_assert_eq!(&before[..headers.l3_offset()], &bytes[..headers.l3_offset()]);
        prop_assert_eq!(headers, Headers { ..Headers::parse(&bytes) });
        // Another frame than the one that was parsed gives nothing or nonsense, and no panic.
        let _ = (headers.addresses(&[]), headers.ports(&[]), checksum::check_l4(&[], &headers));
    }

    #[test]
    fn what_is_built_is_valid_for_etherparse(
        v4 in any::<Option<([u8; 4], [u8; 4])>>(),
        v6 in any::<([u8; 16], [u8; 16])>(),
        vlan in prop::option::of(any::<u16>()),
        is_tcp: bool,
        ports in any::<(u16, u16)>(),
        payload in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let (source, destination) = match v4 {
            Some((source, destination)) => (Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into()),
            None => (Ipv6Addr::from(v6.0).into(), Ipv6Addr::from(v6.1).into()),
        };
        let flow = Flow {
            source_mac: MacAddr::local(1),
            destination_mac: MacAddr::local(2),
            vlan,
            source,
            destination,
            transport: if is_tcp { Transport::Tcp } else { Transport::Udp },
            source_port: ports.0,
            destination_port: ports.1,
        };
        let mut frame = vec![0xa5; flow.headers_len()];
        frame.extend(&payload);
        let headers = flow.write(&mut frame, L4Checksum::Full).expect("it fits");
        prop_assert_eq!(headers, Headers::parse(&frame));
        prop_assert_eq!(&frame[headers.payload_offset()..], &payload[..]);

        let parsed = PacketHeaders::from_ethernet_slice(&frame).expect("etherparse finds no fault");
        let link = parsed.link.as_ref().and_then(|link| link.clone().ethernet2()).expect("Ethernet");
        prop_assert_eq!((link.source, link.destination), (flow.source_mac.0, flow.destination_mac.0));
        let found = etherparses(&frame).expect("etherparse finds no fault");
        prop_assert_eq!(found.ports, Some([ports.0, ports.1]));
        prop_assert_eq!(found.vlan, vlan);
        if let Some(NetHeaders::Ipv4(ip, _)) = &parsed.net {
            prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            prop_assert_eq!((ip.source, ip.destination), v4.expect("IPv4"));
        } else {
            prop_assert_eq!(found.addresses, Some([v6.0, v6.1].concat()));
        }
        let net = parsed.net.as_ref().expect("IP");
        let right = match (parsed.transport.as_ref().expect("a transport"), net) {
            (TransportHeader::Udp(udp), NetHeaders::Ipv4(ip, _)) => {
                udp.checksum == udp.calc_checksum_ipv4(ip, &payload).expect("short")
            }
            (TransportHeader::Udp(udp), NetHeaders::Ipv6(ip, _)) => {
                udp.checksum == udp.calc_checksum_ipv6(ip, &payload).expect("short")
            }
            (TransportHeader::Tcp(tcp), NetHeaders::Ipv4(ip, _)) => {
                tcp.checksum == tcp.calc_checksum_ipv4(ip, &payload).expect("short")
            }
            (TransportHeader::Tcp(tcp), NetHeaders::Ipv6(ip, _)) => {
                tcp.checksum == tcp.calc_checksum_ipv6(ip, &payload).expect("short")
            }
            _ => false,
        };
        prop_assert!(right, "a wrong checksum");

        // What a device that offloads does: sums up from the transport header on, over what is in the field.
        let mut offloaded = frame.clone();
        flow.write(&mut offloaded, L4Checksum::Offload).expect("it fits");
        let sum = checksum::of(&offloaded[headers.l4_offset()..]);
        let field = headers.l4_offset() + checksum::l4_checksum_offset(headers.protocol).expect("it has one");
        let sum = if sum == 0 && !is_tcp { 0xffff } else { sum };
        offloaded[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        prop_assert_eq!(offloaded, frame);
    }
}

fn udp(source: IpAddr, destination: IpAddr) -> Flow {
    Flow {
        source_mac: MacAddr::local(1),
        destination_mac: MacAddr::local(2),
        vlan: None,
        source,
        destination,
        transport: Transport::Udp,
        source_port: 1,
        destination_port: 2,
    }
}

#[test]
fn a_frame_that_no_header_can_describe_is_not_written() {
    let (v4, v6) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([1u16; 8]));
    let flow = udp(v4, v4);
    for len in [0, 13, 41, 14 + 65536] {
        let mut frame = vec![0; len];
        assert_eq!(flow.write(&mut frame, L4Checksum::Full), None, "{len}");
        assert!(frame.iter().all(|byte| *byte == 0));
    }
    assert!(flow.write(&mut [0; 42], L4Checksum::Full).is_some());
    assert!(flow.write(&mut vec![0; 14 + 65535], L4Checksum::Full).is_some());
    let mut frame = [0; 100];
    assert_eq!(udp(v4, v6).write(&mut frame, L4Checksum::Full), None);
    assert_eq!(frame, [0; 100]);
}

#[test]
fn udp_without_a_checksum_is_told_apart() {
    let v4 = udp([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let v6 = udp([1u16; 8].into(), [2u16; 8].into());
    for (flow, checked) in [(v4, None), (v6, Some(false))] {
        let mut frame = [0; 100];
        let headers = flow.write(&mut frame, L4Checksum::Full).expect("it fits");
        assert_eq!(checksum::check_l4(&frame, &headers), Some(true));
        frame[headers.l4_offset() + 6..headers.payload_offset()].fill(0);
        assert_eq!(checksum::check_l4(&frame, &headers), checked);
    }
}

#[test]
fn a_sum_of_zero_is_written_as_ones_in_udp() {
    let flow = udp([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let mut frame = [0; 44];
    let headers = flow.write(&mut frame, L4Checksum::Full).expect("it fits");
    // The payload becomes what makes the sum come out as 0.
    let field = headers.l4_offset() + 6..headers.l4_offset() + 8;
    let checksum = [frame[field.start], frame[field.start + 1]];
    frame[headers.payload_offset()..].copy_from_slice(&checksum);
    let headers = flow.write(&mut frame, L4Checksum::Full).expect("it fits");
    assert_eq!(frame[field], [0xff, 0xff]);
    assert_eq!(checksum::check_l4(&frame, &headers), Some(true));
}

#[test]
fn a_packet_longer_than_its_frame_is_said_to_be_truncated() {
    let mut frame = [0; 200];
    udp([10, 0, 0, 1].into(), [10, 0, 0, 2].into()).write(&mut frame, L4Checksum::Full).expect("it fits");
    let headers = Headers::parse(&frame[..100]);
    assert!(headers.truncated);
    assert_eq!((headers.end(), headers.l4_len), (100, 8));
    assert_eq!(checksum::check_l4(&frame[..100], &headers), None);
}

#[test]
fn extension_headers_are_walked_in_any_order_but_not_for_ever() {
    let mut frame = vec![0; 14 + 40 + 8 * 20];
    frame[12..14].copy_from_slice(&ethertype::IPV6.to_be_bytes());
    frame[14] = 0x60;
    frame[18..20].copy_from_slice(&(8u16 * 20).to_be_bytes());
    // Hop-by-hop options of 8 bytes, each followed by another.
    let headers = Headers::parse(&frame);
    assert_eq!((headers.l3_len, headers.l4_len, headers.protocol), (40 + 8 * 8, 0, protocol::HOP_BY_HOP));
    // The third is followed by UDP.
    frame[14 + 40 + 8 * 2] = protocol::UDP;
    let headers = Headers::parse(&frame);
    assert_eq!((headers.l3_len, headers.l4_len, headers.protocol), (40 + 8 * 3, 8, protocol::UDP));
}

#[test]
fn ethernet_addresses_are_read_as_they_are_shown() {
    let mac = MacAddr([0x02, 0x00, 0xab, 0xcd, 0xef, 0x09]);
    assert_eq!(mac.to_string(), "02:00:ab:cd:ef:09");
    for text in ["02:00:ab:cd:ef:09", "02-00-AB-CD-EF-09"] {
        assert_eq!(text.parse(), Ok(mac), "{text}");
    }
    for text in [
        "",
        "02:00:ab:cd:ef",
        "02:00:ab:cd:ef:09:01",
        "2:0:ab:cd:ef:9",
        "02:00:ab:cd:ef:+9",
        "02:00-ab:cd:ef:09",
    ] {
        assert_eq!(text.parse::<MacAddr>(), Err(ParseMacError), "{text}");
    }
    assert!(!mac.is_multicast() && MacAddr::BROADCAST.is_multicast() && MacAddr::BROADCAST.is_broadcast());
    assert!(MacAddr([1, 0, 0x5e, 0, 0, 1]).is_multicast());
    assert_eq!(MacAddr::local(0x0102_0304).to_string(), "02:00:01:02:03:04");
}
