//! Against the published vectors, and against the definition.

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;

use super::*;

/// "Verifying the RSS Hash Calculation": destination, source, hash of the addresses, hash with the ports.
const VECTORS: [(&str, &str, u32, u32); 8] = [
    ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
    ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
    ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
    ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
    ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
    ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x2cc1_8cd5, 0x4020_7d3d),
    ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0x0f0c_461c, 0xdde5_1bbf),
    (
        "[fe80::200:f8ff:fe21:67cf]:38024",
        "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
        0x4b61_e985,
        0x02d1_feef,
    ),
];

fn octets(address: SocketAddr) -> Vec<u8> {
    match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[test]
fn microsofts_vectors_come_out() {
    let toeplitz = Toeplitz::default();
    for (destination, source, of_addresses, with_ports) in VECTORS {
        let destination: SocketAddr = destination.parse().expect("an address");
        let source: SocketAddr = source.parse().expect("an address");
        let addresses = [octets(source), octets(destination)].concat();
        let [a, b] = source.port().to_be_bytes();
        let [c, d] = destination.port().to_be_bytes();
        assert_eq!(toeplitz.hash(&addresses, None), of_addresses, "{source} to {destination}");
        assert_eq!(toeplitz.hash(&addresses, Some(&[a, b, c, d])), with_ports, "{source} to {destination}");
    }
}

/// The definition: for each bit of the input that is set, the key shifted left by that bit's number.
fn by_definition(key: &[u8; KEY_LEN], input: &[u8]) -> u32 {
    let key_bit = |n: usize| u32::from(key[n / 8] >> (7 - n % 8) & 1);
    let set = (0..input.len() * 8).filter(|n| input[n / 8] >> (7 - n % 8) & 1 == 1);
    set.fold(0, |hash, n| hash ^ (n..n + 32).fold(0, |window, bit| window << 1 | key_bit(bit)))
}

proptest! {
    #[test]
    fn any_key_and_input_are_hashed_by_the_definition(
        key in any::<[u8; KEY_LEN]>(),
        addresses in prop::collection::vec(any::<u8>(), 0..=32),
        ports in any::<Option<[u8; 4]>>(),
    ) {
        let input: Vec<u8> = addresses.iter().copied().chain(ports.into_iter().flatten()).collect();
        prop_assert_eq!(Toeplitz::new(&key).hash(&addresses, ports.as_ref()), by_definition(&key, &input));
    }
}
