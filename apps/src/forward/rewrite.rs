//! Changes Ethernet addresses in place.

use std::mem;

use underpass::net::MacAddr;
use underpass::net::headers::Ethernet;
use zerocopy::FromBytes;

/// Swaps source and destination. A frame without an Ethernet header stays as it is.
#[inline]
pub(super) fn swap_macs(frame: &mut [u8]) {
    if let Ok((ethernet, _)) = Ethernet::mut_from_prefix(frame) {
        mem::swap(&mut ethernet.source, &mut ethernet.destination);
    }
}

/// Sets source and destination. A frame without an Ethernet header stays as it is.
#[inline]
pub(super) fn set_macs(frame: &mut [u8], source: MacAddr, destination: MacAddr) {
    if let Ok((ethernet, _)) = Ethernet::mut_from_prefix(frame) {
        (ethernet.source, ethernet.destination) = (source, destination);
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{EtherType, Ethernet2Header, PacketBuilder};

    use super::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
    const C: [u8; 6] = [2, 0, 0, 0, 0, 0xc];

    fn frame() -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(A, B).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9).udp(1, 2);
        builder.write(&mut frame, &[1, 2, 3]).unwrap();
        frame
    }

    #[test]
    fn only_the_addresses_change() {
        let before = frame();
        for (rewrite, source, destination) in [
            (swap_macs as fn(&mut [u8]), B, A),
            ((|frame| set_macs(frame, MacAddr(C), MacAddr(A))) as fn(&mut [u8]), C, A),
        ] {
            let mut after = before.clone();
            rewrite(&mut after);
            let (ethernet, rest) = Ethernet2Header::from_slice(&after).unwrap();
            assert_eq!(ethernet, Ethernet2Header { source, destination, ether_type: EtherType::IPV4 });
            assert_eq!(rest, &before[14..]);
        }
    }

    #[test]
    fn a_runt_stays_as_it_is() {
        for len in 0..14 {
            let mut runt: Vec<u8> = (0..len).collect();
            swap_macs(&mut runt);
            set_macs(&mut runt, MacAddr(A), MacAddr(B));
            assert!(runt.into_iter().eq(0..len));
        }
    }
}
