//! The control queue ("Control Virtqueue", 5.1.6.5): each command is checked as a whole, then done or refused.

use underpass::model::Bus;
use underpass::net::MacAddr;
use underpass::net::toeplitz::Toeplitz;
use zerocopy::FromBytes;

use super::device::{Device, Role};
use super::rules::{Filter, GUEST_OFFLOADS, HASH_TYPES, Rules, Steering};
use super::spec::Features;
use super::spec::control::{Command, ERR, HashConfigHead, OK, RssConfigHead};
use super::spec::net::{HASH_KEY_LEN, INDIRECTION_TABLE_LEN};
use super::stats;
use super::virtqueue::{Broken, Virtqueue};

/// Commands that one step serves at most.
const BURST: usize = 4;
/// The longest command that is read.
const MAX_LEN: usize = 64 * 1024;

/// A command was not done: its data are wrong, or it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused;

/// Serves the commands that are there. Returns whether there were any.
pub(super) fn serve(device: &Device, bus: &mut Bus, queue: &mut Virtqueue) -> Result<bool, Broken> {
    let index = device.index(Role::Control);
    if !device.has_available(bus, queue, index)? {
        return Ok(false);
    }
    let mut segments = Vec::new();
    for _ in 0..BURST {
        segments.clear();
        let Some(chain) = queue.take(bus, &mut segments)? else { break };
        let len = chain.readable as usize;
        if len < size_of::<Command>() || chain.writes == 0 {
            return Err(Broken::Rule(
                "a control command has no class and command, or no place for the answer",
            ));
        }
        let done = if len <= MAX_LEN {
            let mut bytes = vec![0; len];
            let mut at = 0;
            for segment in &segments[..chain.reads.into()] {
                let end = at + segment.len as usize;
                bus.read(None, segment.iova, &mut bytes[at..end])?;
                at = end;
            }
            execute(device, &bytes)
        } else {
            Err(Refused)
        };
        let mut answer = vec![if done.is_ok() { OK } else { ERR }];
        answer.extend(done.unwrap_or_default());
        // Of a result, what there is room for.
        answer.truncate(chain.writable as usize);
        let mut left = &answer[..];
        for segment in &segments[chain.reads.into()..] {
            let part = left.split_off(..left.len().min(segment.len as usize)).unwrap_or_default();
            if !part.is_empty() {
                bus.write(None, segment.iova, part)?;
            }
        }
        queue.put(&chain, answer.len() as u32);
    }
    if queue.flush(bus)? {
        device.interrupt_queue(index);
    }
    Ok(true)
}

/// Does a command, and returns its result. When this returns every engine works by the new rules.
fn execute(device: &Device, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
    let (command, data) = Command::read_from_prefix(bytes).map_err(|_| Refused)?;
    let mut rules = Rules::clone(&device.rules());
    let needs = |feature| if device.features().contains(feature) { Ok(()) } else { Err(Refused) };
    match command {
        Command::RX_PROMISC | Command::RX_ALLMULTI => {
            needs(Features::CTRL_RX)?;
            *mode(&mut rules.filter, command)? = flag(data)?;
        }
        Command::RX_ALLUNI | Command::RX_NOMULTI | Command::RX_NOUNI | Command::RX_NOBCAST => {
            needs(Features::CTRL_RX_EXTRA)?;
            *mode(&mut rules.filter, command)? = flag(data)?;
        }
        Command::MAC_TABLE_SET => {
            needs(Features::CTRL_RX)?;
            let (unicast, rest) = mac_table(data, false)?;
            let (multicast, rest) = mac_table(rest, true)?;
            if !rest.is_empty() {
                return Err(Refused);
            }
            (rules.filter.unicast, rules.filter.multicast) = (unicast, multicast);
        }
        Command::MAC_ADDR_SET => {
            needs(Features::CTRL_MAC_ADDR)?;
            let mac = MacAddr(data.try_into().map_err(|_| Refused)?);
            if mac.is_multicast() {
                return Err(Refused);
            }
            rules.filter.mac = mac;
            device.set_mac(mac);
        }
        Command::VLAN_ADD | Command::VLAN_DEL => {
            let vlans = rules.filter.vlans.as_mut().ok_or(Refused)?;
            let id = usize::from(word(data)?);
            let (place, bit) = (vlans.get_mut(id / 64).ok_or(Refused)?, 1 << (id % 64));
            *place = if command == Command::VLAN_ADD { *place | bit } else { *place & !bit };
        }
        Command::ANNOUNCE_ACK => {
            needs(Features::GUEST_ANNOUNCE)?;
            if !data.is_empty() {
                return Err(Refused);
            }
            device.end_announce();
            return Ok(Vec::new());
        }
        Command::MQ_VQ_PAIRS_SET => {
            needs(Features::MQ)?;
            let pairs = word(data)?;
            if pairs == 0 || pairs > device.profile.queue_pairs || !(0..pairs).all(|n| receives(device, n)) {
                return Err(Refused);
            }
            device.flows.clear();
            rules.steering = if pairs == 1 { Steering::First } else { Steering::Flows(pairs) };
            rules.transmitting = pairs;
        }
        Command::MQ_RSS_CONFIG => {
            needs(Features::RSS)?;
            set_rss(device, &mut rules, data)?;
        }
        Command::MQ_HASH_CONFIG => {
            needs(Features::HASH_REPORT)?;
            let (head, data) = HashConfigHead::read_from_prefix(data).map_err(|_| Refused)?;
            if head.reserved != [0; 4] {
                return Err(Refused);
            }
            set_hash(&mut rules, head.hash_types, data)?;
        }
        Command::GUEST_OFFLOADS_SET => {
            needs(Features::CTRL_GUEST_OFFLOADS)?;
            let wanted = Features(u64::from_le_bytes(data.try_into().map_err(|_| Refused)?));
            let known = rules.features & GUEST_OFFLOADS;
            if !known.contains(wanted) || wanted.consistent() != wanted {
                return Err(Refused);
            }
            rules.offloads = wanted;
        }
        Command::STATS_QUERY => {
            needs(Features::DEVICE_STATS)?;
            return stats::query(data);
        }
        Command::STATS_GET => {
            needs(Features::DEVICE_STATS)?;
            return stats::get(device, data);
        }
        _ => return Err(Refused),
    }
    device.set_rules(rules);
    device.wait_for_others(Some(0));
    Ok(Vec::new())
}

/// The switch that a command of the class RX is about.
fn mode(filter: &mut Filter, command: Command) -> Result<&mut bool, Refused> {
    Ok(match command {
        Command::RX_PROMISC => &mut filter.promiscuous,
        Command::RX_ALLMULTI => &mut filter.all_multicast,
        Command::RX_ALLUNI => &mut filter.all_unicast,
        Command::RX_NOMULTI => &mut filter.no_multicast,
        Command::RX_NOUNI => &mut filter.no_unicast,
        Command::RX_NOBCAST => &mut filter.no_broadcast,
        _ => return Err(Refused),
    })
}

/// One byte, 0 or 1.
fn flag(data: &[u8]) -> Result<bool, Refused> {
    match data {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(Refused),
    }
}

/// 16 bits and nothing else.
fn word(data: &[u8]) -> Result<u16, Refused> {
    Ok(u16::from_le_bytes(data.try_into().map_err(|_| Refused)?))
}

/// A table of addresses with its length in front, all multicast or none, and what is behind it.
fn mac_table(data: &[u8], multicast: bool) -> Result<(Vec<MacAddr>, &[u8]), Refused> {
    let (entries, rest) = u32::read_from_prefix(data).map_err(|_| Refused)?;
    let len = (entries as usize).checked_mul(6).ok_or(Refused)?;
    let (table, rest) = rest.split_at_checked(len).ok_or(Refused)?;
    let addresses: Vec<_> = table.as_chunks::<6>().0.iter().copied().map(MacAddr).collect();
    if addresses.iter().any(|address| address.is_multicast() != multicast) {
        return Err(Refused);
    }
    Ok((addresses, rest))
}

/// Whether that receive queue is there.
fn receives(device: &Device, queue: u16) -> bool {
    queue < device.profile.queue_pairs && device.receiving() & 1 << queue != 0
}

/// "Setting RSS parameters", 5.1.6.5.7.1.
fn set_rss(device: &Device, rules: &mut Rules, data: &[u8]) -> Result<(), Refused> {
    let (head, rest) = RssConfigHead::read_from_prefix(data).map_err(|_| Refused)?;
    let entries = usize::from(head.indirection_table_mask) + 1;
    if !entries.is_power_of_two() || entries > INDIRECTION_TABLE_LEN {
        return Err(Refused);
    }
    let (table, rest) = rest.split_at_checked(2 * entries).ok_or(Refused)?;
    let table: Box<[u16]> = table.as_chunks::<2>().0.iter().map(|entry| u16::from_le_bytes(*entry)).collect();
    let (transmitting, rest) = u16::read_from_prefix(rest).map_err(|_| Refused)?;
    let all_there = table.iter().chain([&head.unclassified_queue]).all(|queue| receives(device, *queue));
    if !all_there || transmitting == 0 || transmitting > device.profile.queue_pairs {
        return Err(Refused);
    }
    set_hash(rules, head.hash_types, rest)?;
    rules.transmitting = transmitting;
    rules.steering = Steering::Table { entries: table, unclassified: head.unclassified_queue };
    Ok(())
}

/// Hash types, and the key with its length in front. A shorter key than the longest is filled up with zeros.
fn set_hash(rules: &mut Rules, hash_types: u32, key: &[u8]) -> Result<(), Refused> {
    let (len, key) = key.split_first().ok_or(Refused)?;
    if hash_types & !HASH_TYPES != 0 || key.len() != usize::from(*len) || key.len() > HASH_KEY_LEN {
        return Err(Refused);
    }
    let mut whole = [0; HASH_KEY_LEN];
    whole[..key.len()].copy_from_slice(key);
    rules.hash_types = hash_types;
    rules.toeplitz = Toeplitz::new(&whole);
    Ok(())
}
