//! Makes packets of a number of flows.

use std::net::Ipv4Addr;

use underpass::net::headers::{Flow, Headers, L4Checksum};
use underpass::net::{MacAddr, checksum};
use underpass::{Burst, Packet, Pool, Transport};

/// From whom packets come, and whom the first flow goes to: the networks for benchmarks (RFC 2544, appendix C.2.2).
const SOURCE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 0);

/// Discard (RFC 863).
const PORT: u16 = 9;

/// Offsets in an IPv4 header: its checksum, and the half of the destination that differs from flow to flow.
const IP_CHECKSUM: usize = 10;
const IP_DESTINATION_LOW: usize = 18;

/// Offset in a UDP header.
const UDP_CHECKSUM: usize = 6;

/// Writes packets of UDP flows, one after the other; each flow has a destination address of its own.
#[derive(Debug)]
pub(super) struct Generator {
    pool: Pool,
    /// The first flow's packet.
    frame: Vec<u8>,
    headers: Headers,
    flows: u16,
    next: u16,
}

impl Generator {
    /// Packets of `size` bytes in `flows` flows, in buffers from `pool`; `None` if they do not fit.
    pub(super) fn new(
        pool: &Pool,
        size: usize,
        flows: u16,
        source_mac: MacAddr,
        destination_mac: MacAddr,
    ) -> Option<Self> {
        let flow = Flow {
            source_mac,
            destination_mac,
            vlan: None,
            source: SOURCE.into(),
            destination: DESTINATION.into(),
            transport: Transport::Udp,
            source_port: PORT,
            destination_port: PORT,
        };
        let mut frame = vec![0; size];
        let headers = flow.write(&mut frame, L4Checksum::Full)?;
        Some(Self { pool: pool.clone(), frame, headers, flows, next: 0 })
    }

    /// Appends `count` packets to `burst`, or as many as there are buffers and room for.
    pub(super) fn fill(&mut self, count: usize, burst: &mut Burst<Packet>) -> usize {
        let before = burst.len();
        let count = self.pool.alloc_burst(count, burst);
        for packet in &mut burst[before..] {
            // The pool's buffers are made for this size.
            if let Some(bytes) = packet.append(self.frame.len()) {
                self.write(bytes);
            }
        }
        count
    }

    /// Writes the next flow's packet.
    #[inline]
    fn write(&mut self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.frame);
        let flow = self.next;
        self.next = if flow + 1 == self.flows { 0 } else { flow + 1 };
        let (l3, l4) = (self.headers.l3_offset(), self.headers.l4_offset());
        set(bytes, l3 + IP_DESTINATION_LOW, flow);
        set(bytes, l3 + IP_CHECKSUM, checksum::update(get(bytes, l3 + IP_CHECKSUM), 0, flow));
        let sum = checksum::update(get(bytes, l4 + UDP_CHECKSUM), 0, flow);
        // 0 would mean that there is no checksum (RFC 768).
        set(bytes, l4 + UDP_CHECKSUM, if sum == 0 { 0xffff } else { sum });
    }
}

#[inline]
fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
fn set(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use etherparse::{NetHeaders, PacketHeaders};

    use super::*;

    #[test]
    fn every_packet_is_valid_and_flows_differ() {
        let pool = Pool::builder(64).build().unwrap();
        let (from, to) = (MacAddr::local(1), MacAddr::local(2));
        for size in [42, 60, 64, 1514] {
            let mut generator = Generator::new(&pool, size, 700, from, to).unwrap();
            let mut flows = Vec::new();
            let mut burst = Burst::with_capacity(7);
            for _ in 0..200 {
                assert_eq!(generator.fill(7, &mut burst), 7);
                for packet in burst.drain_all() {
                    assert_eq!(packet.len(), size);
                    let parsed = PacketHeaders::from_ethernet_slice(packet.data()).unwrap();
                    let Some(NetHeaders::Ipv4(ip, _)) = &parsed.net else { panic!("no IPv4") };
                    let udp = parsed.transport.as_ref().and_then(|t| t.clone().udp()).unwrap();
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv4(ip, parsed.payload.slice()).unwrap());
                    flows.push(ip.destination);
                }
            }
            assert_eq!(flows.iter().collect::<HashSet<_>>().len(), 700);
            assert_eq!(flows[..700], flows[700..], "they come round in the same order");
        }
        assert!(Generator::new(&pool, 41, 1, from, to).is_none());
    }

    #[test]
    fn an_exhausted_pool_gives_fewer() {
        let pool = Pool::builder(4).cache(0).build().unwrap();
        let mut generator = Generator::new(&pool, 64, 1, MacAddr::local(1), MacAddr::local(2)).unwrap();
        let mut burst = Burst::with_capacity(8);
        assert_eq!(generator.fill(8, &mut burst), 4);
        burst.clear();
        assert_eq!(generator.fill(3, &mut burst), 3);
    }
}
