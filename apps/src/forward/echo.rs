//! Answers requests in place: ARP, ICMP echo, and their counterparts of IPv6.

use std::mem;
use std::net::Ipv6Addr;

use underpass::net::MacAddr;
use underpass::net::checksum;
use underpass::net::headers::{
    Arp, Ethernet, Fragment, Headers, IcmpEcho, Ip, Ipv4, Ipv6, L4Checksum, ethertype, protocol,
};
use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Hops that answers start with.
const TTL: u8 = 64;

/// A neighbour solicitation or advertisement with the one option that both usually have (RFC 4861, sections 4.3, 4.4
/// and 4.6.1).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Neighbor {
    kind: u8,
    code: u8,
    checksum: U16,
    flags: U32,
    target: [u8; 16],
    option: u8,
    /// In units of 8 bytes.
    option_len: u8,
    mac: MacAddr,
}

impl Neighbor {
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    /// Option: the sender's link-layer address.
    const SOURCE: u8 = 1;
    /// Option: the target's.
    const TARGET: u8 = 2;
    /// Flags: it answers a solicitation, and replaces what was known.
    const SOLICITED_OVERRIDE: u32 = 3 << 29;
    /// Neighbour discovery is never forwarded: it comes with the most hops there can be (RFC 4861, section 7.1.1).
    const HOP_LIMIT: u8 = 255;
}

/// Makes `frame` the answer of the station `mac` to the request in it, and says whether it did. What is no request, not
/// for one station, damaged or a fragment is left as it is.
///
/// It has every address that is asked for, except one that somebody is about to take and asks whether it is free.
pub(super) fn answer(frame: &mut [u8], mac: MacAddr) -> bool {
    let headers = Headers::parse(frame);
    let answered = match (headers.ethertype, headers.protocol) {
        (ethertype::ARP, _) => answer_arp(&mut frame[headers.l3_offset()..], mac),
        _ if headers.fragment != Fragment::Whole || checksum::check_l4(frame, &headers) != Some(true) => None,
        (ethertype::IPV4, protocol::ICMP) => answer_ping(frame, &headers),
        (ethertype::IPV6, protocol::ICMPV6) => {
            answer_ping6(frame, &headers).or_else(|| answer_neighbor(frame, &headers, mac))
        }
        _ => None,
    };
    let Some(()) = answered else { return false };
    if let Ok((ethernet, _)) = Ethernet::mut_from_prefix(frame) {
        ethernet.destination = mem::replace(&mut ethernet.source, mac);
    }
    true
}

fn answer_arp(bytes: &mut [u8], mac: MacAddr) -> Option<()> {
    let (arp, _) = Arp::mut_from_prefix(bytes).ok()?;
    let is_request = arp.hardware == 1
        && arp.protocol == ethertype::IPV4
        && (arp.hardware_len, arp.protocol_len) == (6, 4)
        && arp.operation == Arp::REQUEST;
    // A probe has no sender, an announcement is its own target (RFC 5227, section 1.1).
    if !is_request || arp.sender_ip == [0; 4] || arp.sender_ip == arp.target_ip {
        return None;
    }
    arp.operation = U16::new(Arp::REPLY);
    arp.target_mac = mem::replace(&mut arp.sender_mac, mac);
    mem::swap(&mut arp.sender_ip, &mut arp.target_ip);
    Some(())
}

fn answer_ping(frame: &mut [u8], headers: &Headers) -> Option<()> {
    if headers.ip != Some(Ip::V4) || checksum::check_ip(frame, headers) != Some(true) {
        return None;
    }
    let (ip, _) = Ipv4::mut_from_prefix(&mut frame[headers.l3_offset()..]).ok()?;
    let (source, destination) = (ip.source_addr(), ip.destination_addr());
    // No station answers with such a source (RFC 1122, section 3.2.1.3).
    let is_one = |ip: std::net::Ipv4Addr| !ip.is_multicast() && !ip.is_broadcast() && !ip.is_unspecified();
    if !is_one(source) || !is_one(destination) {
        return None;
    }
    turn_echo(&mut frame[headers.l4_offset()..], IcmpEcho::REQUEST, IcmpEcho::REPLY)?;
    let (ip, _) = Ipv4::mut_from_prefix(&mut frame[headers.l3_offset()..]).ok()?;
    mem::swap(&mut ip.source, &mut ip.destination);
    ip.ttl = TTL;
    checksum::write_ip(frame, headers);
    Some(())
}

fn answer_ping6(frame: &mut [u8], headers: &Headers) -> Option<()> {
    let (ip, _) = Ipv6::ref_from_prefix(&frame[headers.l3_offset()..]).ok()?;
    if !is_one(ip.source_addr()) || !is_one(ip.destination_addr()) {
        return None;
    }
    // The pseudo header's sum stays the same with source and destination swapped.
    turn_echo(&mut frame[headers.l4_offset()..], IcmpEcho::V6_REQUEST, IcmpEcho::V6_REPLY)?;
    let (ip, _) = Ipv6::mut_from_prefix(&mut frame[headers.l3_offset()..]).ok()?;
    mem::swap(&mut ip.source, &mut ip.destination);
    ip.hop_limit = TTL;
    Some(())
}

/// Makes the reply of the request that `bytes` start with, if it is one.
fn turn_echo(bytes: &mut [u8], request: u8, reply: u8) -> Option<()> {
    let (echo, _) = IcmpEcho::mut_from_prefix(bytes).ok()?;
    if (echo.kind, echo.code) != (request, 0) {
        return None;
    }
    echo.kind = reply;
    let word = |kind| u16::from_be_bytes([kind, 0]);
    echo.checksum = U16::new(checksum::update(echo.checksum.get(), word(request), word(reply)));
    Some(())
}

fn answer_neighbor(frame: &mut [u8], headers: &Headers, mac: MacAddr) -> Option<()> {
    let end = headers.end();
    // Other options than the sender's address are not used, and an answer takes as many bytes.
    let (message, _) = Neighbor::mut_from_prefix(&mut frame[headers.l4_offset()..end]).ok()?;
    let is_solicitation = (message.kind, message.code) == (Neighbor::SOLICITATION, 0)
        && (message.option, message.option_len) == (Neighbor::SOURCE, 1);
    let target = message.target;
    if !is_solicitation || !is_one(target.into()) || end - headers.l4_offset() != size_of::<Neighbor>() {
        return None;
    }
    let (ip, _) = Ipv6::mut_from_prefix(&mut frame[headers.l3_offset()..]).ok()?;
    // Without a source somebody asks whether the address is free (RFC 4862, section 5.4.2).
    if ip.hop_limit != Neighbor::HOP_LIMIT || !is_one(ip.source_addr()) {
        return None;
    }
    ip.destination = mem::replace(&mut ip.source, target);
    let (message, _) = Neighbor::mut_from_prefix(&mut frame[headers.l4_offset()..]).ok()?;
    message.kind = Neighbor::ADVERTISEMENT;
    message.flags = U32::new(Neighbor::SOLICITED_OVERRIDE);
    message.option = Neighbor::TARGET;
    message.mac = mac;
    checksum::write_l4(frame, headers, L4Checksum::Full);
    Some(())
}

fn is_one(ip: Ipv6Addr) -> bool {
    !ip.is_multicast() && !ip.is_unspecified()
}

#[cfg(test)]
mod tests;
