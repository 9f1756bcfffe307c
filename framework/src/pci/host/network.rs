//! Which network interfaces a device has, and what the kernel's network stack does with them.

use std::net::{IpAddr, Ipv6Addr};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Host, HostDevice, link_name, names};
use crate::{Error, ErrorKind, Result};

const CLASS: &str = "/sys/class/net";

/// An address that an interface of this network namespace has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InterfaceAddress {
    /// The interface's number in the kernel.
    pub(super) interface: u32,
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

impl InterfaceAddress {
    /// Whether somebody gave it. Each IPv6 interface that is up makes itself a link-local address, which tells nothing.
    fn is_given(&self) -> bool {
        match self.address {
            IpAddr::V4(_) => true,
            IpAddr::V6(address) => !address.is_unicast_link_local(),
        }
    }
}

/// The device's interfaces, by name.
pub(super) fn interfaces(device: &HostDevice) -> Vec<String> {
    let class = device.host.path(CLASS);
    let mut names = names(&class).unwrap_or_default();
    names.retain(|name| device.holds(&class.join(name)));
    names
}

/// What would be cut off with the device, a line each.
pub(super) fn uses(device: &HostDevice) -> Result<Vec<String>> {
    let interfaces = interfaces(device);
    if interfaces.is_empty() {
        return Ok(Vec::new());
    }
    let host = &device.host;
    let addresses = (host.addresses)()?;
    let default_routes = default_routes(host);
    let mut uses = Vec::new();
    for name in interfaces {
        let folder = host.path(CLASS).join(&name);
        let number: Option<u32> = super::text(&folder.join("ifindex")).and_then(|number| number.parse().ok());
        let given = addresses.iter().filter(|given| Some(given.interface) == number && given.is_given());
        uses.extend(given.map(|given| format!("{name} has the address {}/{}", given.address, given.prefix)));
        if default_routes.contains(&name) {
            uses.push(format!("the default route goes through {name}"));
        }
        if let Some(master) = link_name(&folder.join("master")) {
            uses.push(format!("{name} is part of {master}"));
        } else {
            // A VLAN, macvlan or the like has the addresses instead.
            let entries = names(&folder).unwrap_or_default();
            let uppers = entries.iter().filter_map(|entry| entry.strip_prefix("upper_"));
            uses.extend(uppers.map(|upper| format!("{upper} is on top of {name}")));
        }
    }
    Ok(uses)
}

/// Interfaces with a default route (`/proc/net/route`, and `/proc/net/ipv6_route` where there is IPv6).
fn default_routes(host: &Host) -> Vec<String> {
    let mut interfaces = Vec::new();
    for line in host.text("/proc/net/route").unwrap_or_default().lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [interface, "00000000", _, _, _, _, _, "00000000", ..] = fields[..] {
            interfaces.push(interface.to_owned());
        }
    }
    for line in host.text("/proc/net/ipv6_route").unwrap_or_default().lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        // Destination and its prefix; the kernel's own entry that refuses all is on lo.
        if let [destination, "00", .., interface] = fields[..]
            && destination.bytes().all(|digit| digit == b'0')
            && interface != "lo"
        {
            interfaces.push(interface.to_owned());
        }
    }
    interfaces
}

/// Of `linux/netlink.h` and `linux/rtnetlink.h`.
mod message {
    pub(super) const ERROR: u16 = 2;
    pub(super) const DONE: u16 = 3;
    pub(super) const NEW_ADDRESS: u16 = 20;
    pub(super) const GET_ADDRESS: u16 = 22;
    pub(super) const REQUEST: u16 = 0x001;
    pub(super) const DUMP: u16 = 0x300;
}

/// Attributes of an address (`linux/if_addr.h`).
mod attribute {
    pub(super) const ADDRESS: u16 = 1;
    /// The interface's own address where the other one is that of its peer.
    pub(super) const LOCAL: u16 = 2;
}

/// `struct nlmsghdr`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MessageHeader {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct ifaddrmsg`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AddressHeader {
    family: u8,
    prefix: u8,
    flags: u8,
    scope: u8,
    interface: u32,
}

/// `struct rtattr`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AttributeHeader {
    len: u16,
    kind: u16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Request {
    message: MessageHeader,
    address: AddressHeader,
}

/// What one answer of the kernel's says.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    More,
    Done,
    Refused,
}

/// All addresses of this network namespace's interfaces, as the kernel lists them over netlink.
pub(super) fn addresses() -> Result<Vec<InterfaceAddress>> {
    const OPERATION: &str = "list the addresses of network interfaces";
    let failed = |errno| Error::os(OPERATION, "the kernel does not answer over netlink", errno);
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).map_err(failed)?;
    let request = Request {
        message: MessageHeader {
            len: size_of::<Request>() as u32,
            kind: message::GET_ADDRESS,
            flags: message::REQUEST | message::DUMP,
            sequence: 1,
            port: 0,
        },
        address: AddressHeader { family: 0, prefix: 0, flags: 0, scope: 0, interface: 0 },
    };
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, request.as_bytes(), SendFlags::empty(), &kernel).map_err(failed)?;
    let mut addresses = Vec::new();
    let mut buffer = vec![0; 32 << 10];
    loop {
        let (len, _) = recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()).map_err(failed)?;
        match read_answer(&buffer[..len], &mut addresses) {
            Answer::More => {}
            Answer::Done => return Ok(addresses),
            Answer::Refused => {
                return Err(Error::new(ErrorKind::Os, OPERATION, "the kernel's answer is an error"));
            }
        }
    }
}

/// Takes the addresses out of one answer.
fn read_answer(mut answer: &[u8], addresses: &mut Vec<InterfaceAddress>) -> Answer {
    while let Ok((header, _)) = MessageHeader::read_from_prefix(answer) {
        let Some(body) = answer.get(size_of::<MessageHeader>()..header.len as usize) else {
            return Answer::Refused;
        };
        match header.kind {
            message::DONE => return Answer::Done,
            message::ERROR => return Answer::Refused,
            message::NEW_ADDRESS => addresses.extend(read_address(body)),
            _ => {}
        }
        answer = answer.get((header.len as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    Answer::More
}

fn read_address(body: &[u8]) -> Option<InterfaceAddress> {
    let (header, mut rest) = AddressHeader::read_from_prefix(body).ok()?;
    let (mut address, mut local) = (None, None);
    while let Ok((attribute, _)) = AttributeHeader::read_from_prefix(rest) {
        let value = rest.get(size_of::<AttributeHeader>()..attribute.len as usize)?;
        match attribute.kind {
            attribute::ADDRESS => address = read_ip(value),
            attribute::LOCAL => local = read_ip(value),
            _ => {}
        }
        rest = rest.get((attribute.len as usize).next_multiple_of(4)..).unwrap_or_default();
    }
    let address = local.or(address)?;
    Some(InterfaceAddress { interface: header.interface, address, prefix: header.prefix })
}

fn read_ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes)));
    v4().or_else(v6)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of the kernel's as rtnetlink(7) lays it out: eth0 (2) has 10.0.0.2 with its peer 10.0.0.1,
    /// and a link-local one.
    fn answer() -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend([40, 0, 0, 0, 20, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([2, 24, 0, 0, 2, 0, 0, 0]);
        bytes.extend([8, 0, 1, 0, 10, 0, 0, 1]);
        bytes.extend([8, 0, 2, 0, 10, 0, 0, 2]);
        bytes.extend([44, 0, 0, 0, 20, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([10, 64, 0, 253, 2, 0, 0, 0]);
        bytes.extend([20, 0, 1, 0, 0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes
    }

    #[test]
    fn the_interfaces_own_address_is_taken() {
        let mut addresses = Vec::new();
        assert_eq!(read_answer(&answer(), &mut addresses), Answer::More);
        assert_eq!(addresses.len(), 2);
        assert_eq!(addresses[0].address, "10.0.0.2".parse::<IpAddr>().unwrap());
        assert_eq!((addresses[0].interface, addresses[0].prefix), (2, 24));
        assert!(addresses[0].is_given());
        assert_eq!(addresses[1].address, "fe80::1".parse::<IpAddr>().unwrap());
        assert!(!addresses[1].is_given(), "it comes by itself");
    }

    #[test]
    fn an_answer_that_is_cut_short_ends() {
        let whole = answer();
        for len in 0..whole.len() {
            let mut addresses = Vec::new();
            read_answer(&whole[..len], &mut addresses);
            assert!(addresses.len() < 2);
        }
        // Lengths that lead nowhere.
        for len in [0_u8, 1, 15] {
            let mut bytes = whole.clone();
            bytes[0] = len;
            assert_eq!(read_answer(&bytes, &mut Vec::new()), Answer::Refused);
            let mut bytes = whole.clone();
            bytes[24] = len.min(3);
            read_answer(&bytes, &mut Vec::new());
        }
        assert_eq!(
            read_answer(&[16, 0, 0, 0, 3, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0], &mut Vec::new()),
            Answer::Done
        );
    }

    #[test]
    fn the_kernel_lists_the_loopback_address() {
        let addresses = addresses().unwrap();
        let loopback = addresses.iter().any(|given| given.address.is_loopback());
        // A fresh network namespace has none; then there is nothing at all.
        assert!(loopback || addresses.is_empty(), "{addresses:?}");
    }
}
