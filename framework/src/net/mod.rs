//! The network class: ports with queues of packets.
//!
//! A [`Port`] is opened once. [`Port::start`] configures it and lends out its queues ([`RxQueue`], [`TxQueue`]), each
//! for one worker at a time. A queue is a lease: the port keeps the ring's memory and the buffers that are posted on
//! it, and dropping a queue only gives it back. [`Port::stop`] needs all of them back; [`Port::quiesce`] asks for them, by
//! turning their [`State`] to [`State::Quiesced`], which costs a worker one relaxed load a burst to see.
//!
//! Packets travel in [`Burst`]s, with one virtual call a burst. A packet goes to the device and comes back without being
//! copied; which memory a port's device can reach is what [`Port::map`] was told, and a packet of any other is refused and
//! counted.

pub mod checksum;
mod counters;
pub mod headers;
pub mod pcap;
pub mod toeplitz;

use std::fmt;
use std::ops::{BitAnd, BitOr};
use std::sync::Arc;
use std::time::Duration;

pub use counters::{Counters, Values};
pub use headers::MacAddr;

use crate::{Burst, Error, Fault, Packet, Pasid, Pool, Result};

/// Bytes of an Ethernet header without tags: the smallest frame that a port sends.
pub const MIN_FRAME: usize = 14;

/// What a frame may have beyond the MTU at most: the Ethernet header and one VLAN tag. Without a tag it is the header alone,
/// [`MIN_FRAME`].
pub const FRAME_OVERHEAD: usize = 18;

/// Whether a queue works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// It moves packets.
    Running,
    /// The port wants it back: it moves nothing; drop it.
    Quiesced,
    /// The device broke its rules, asked for a reset, or is not there any more: it moves nothing; drop it. Stopping and
    /// starting the port again may mend it; [`Port::next_error`] says what happened.
    Gone,
}

/// What a device does for packets, or a set of such things.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads(u32);

impl Offloads {
    /// None.
    pub const NONE: Self = Self(0);
    /// Received packets say whether their checksums are right ([`Packet::checksum`]).
    pub const RX_CHECKSUM: Self = Self(1 << 0);
    /// Checksums of packets to send are computed ([`TxOffload`](crate::TxOffload)).
    pub const TX_CHECKSUM: Self = Self(1 << 1);
    /// TCP payload is cut into segments (TSO), over IPv4 and IPv6.
    pub const TX_TCP_SEGMENT: Self = Self(1 << 2);
    /// UDP payload is cut into datagrams (USO).
    pub const TX_UDP_SEGMENT: Self = Self(1 << 3);
    /// TCP segments may arrive joined to packets larger than the MTU ([`Packet::segment_size`]). Needs [`RX_CHECKSUM`](Self::RX_CHECKSUM).
    pub const RX_LARGE: Self = Self(1 << 4);
    /// A received packet may be spread over several buffers.
    pub const RX_SCATTER: Self = Self(1 << 5);
    /// Received packets are distributed to queues by a hash of their addresses and ports.
    pub const RSS: Self = Self(1 << 6);
    /// Received packets carry that hash ([`Packet::rss_hash`]).
    pub const RSS_HASH: Self = Self(1 << 7);
    /// VLAN tags are taken out of received packets ([`Packet::vlan`]).
    pub const RX_VLAN: Self = Self(1 << 8);
    /// VLAN tags are put into packets to send ([`Packet::vlan`]).
    pub const TX_VLAN: Self = Self(1 << 9);
    /// Received packets say when they came ([`Packet::timestamp`]).
    pub const RX_TIMESTAMP: Self = Self(1 << 10);

    /// Each alone, with its name.
    pub const NAMES: [(Self, &'static str); 11] = [
        (Self::RX_CHECKSUM, "rx-checksum"),
        (Self::TX_CHECKSUM, "tx-checksum"),
        (Self::TX_TCP_SEGMENT, "tx-tcp-segment"),
        (Self::TX_UDP_SEGMENT, "tx-udp-segment"),
        (Self::RX_LARGE, "rx-large"),
        (Self::RX_SCATTER, "rx-scatter"),
        (Self::RSS, "rss"),
        (Self::RSS_HASH, "rss-hash"),
        (Self::RX_VLAN, "rx-vlan"),
        (Self::TX_VLAN, "tx-vlan"),
        (Self::RX_TIMESTAMP, "rx-timestamp"),
    ];

    /// Whether all of `others` are in it.
    #[inline]
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// Whether it is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those that are not in `others`.
    #[must_use]
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }
}

impl BitOr for Offloads {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Offloads {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> =
            Self::NAMES.into_iter().filter(|(one, _)| self.contains(*one)).map(|(_, name)| name).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Offloads({self})")
    }
}

/// What a port can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Receive queues, at most.
    pub max_rx_queues: usize,
    /// Transmit queues, at most.
    pub max_tx_queues: usize,
    /// Packets on a receive queue, at most.
    pub max_rx_depth: usize,
    /// Packets on a transmit queue, at most.
    pub max_tx_depth: usize,
    /// The largest MTU.
    pub max_mtu: u16,
    /// What it can do for packets.
    pub offloads: Offloads,
    /// Bytes of an RSS key; 0 where there is no RSS.
    pub rss_key_len: usize,
    /// Entries of the RSS table, at most: a power of two; 0 where there is no RSS.
    pub rss_table_len: usize,
    /// Interrupts for receive queues can be asked for.
    pub interrupts: bool,
}

/// How packets are distributed to receive queues: entry `hash % table.len()` names the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rss {
    /// The Toeplitz key, of [`Info::rss_key_len`] bytes.
    pub key: Vec<u8>,
    /// The queue of each entry; a power of two of them.
    pub table: Vec<u16>,
}

/// How a port is to be started.
#[derive(Debug, Clone)]
pub struct Config {
    /// What its packets say of where they came from ([`Packet::port`]).
    pub port: u16,
    /// Receive queues; 0 is taken as 1.
    pub rx_queues: usize,
    /// Transmit queues; 0 is taken as 1.
    pub tx_queues: usize,
    /// Packets on each receive queue; 0 leaves it to the driver. Rounded up to what the device takes.
    pub rx_depth: usize,
    /// Packets on each transmit queue; likewise.
    pub tx_depth: usize,
    /// Where receive queue n takes its buffers from: `pools[n % pools.len()]`. Those that are not
    /// [mapped](Port::map) are while the port is started.
    pub pools: Vec<Pool>,
    /// Offloads that are wanted; what is granted is in [`Started::offloads`].
    pub offloads: Offloads,
    /// Offloads without which it should not start.
    pub required: Offloads,
    /// How to distribute packets; `None` is the driver's own key, and all queues in turn.
    pub rss: Option<Rss>,
    /// The largest IP packet to receive and to send, in bytes; `None` is 1500, or the device's if that is less.
    pub mtu: Option<u16>,
    /// Receive everything, whatever its destination.
    pub promiscuous: bool,
    /// Let [`RxQueue::wait`] sleep until a packet comes.
    pub interrupts: bool,
}

impl Config {
    /// One queue each way, buffers from `pool`, promiscuous, no offloads.
    pub fn new(pool: &Pool) -> Self {
        Self {
            port: 0,
            rx_queues: 1,
            tx_queues: 1,
            rx_depth: 0,
            tx_depth: 0,
            pools: vec![pool.clone()],
            offloads: Offloads::NONE,
            required: Offloads::NONE,
            rss: None,
            mtu: None,
            promiscuous: true,
            interrupts: false,
        }
    }
}

/// What [`Port::start`] lends out.
#[derive(Debug)]
pub struct Started {
    /// The receive queues, in order.
    pub rx: Vec<Box<dyn RxQueue>>,
    /// The transmit queues, in order.
    pub tx: Vec<Box<dyn TxQueue>>,
    /// The offloads granted: of those wanted, what the device does.
    pub offloads: Offloads,
    /// The MTU in use.
    pub mtu: u16,
}

/// The state of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// Whether packets can pass.
    pub up: bool,
    /// Megabits a second, if it is known.
    pub speed: Option<u32>,
    /// Both ways at once, if it is known.
    pub full_duplex: Option<bool>,
}

/// Packets that the device dropped before the application could see them, or after it sent them, as the device itself
/// counts: over-long ones, those for which there was no buffer, those sent while the link was down. Filtered ones, which
/// are for somebody else, are not among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceDrops {
    /// Received.
    pub rx: u64,
    /// To send: [`Counters`] have them among the packets that the device took.
    pub tx: u64,
}

/// A device of the network class.
pub trait Port: Send + fmt::Debug {
    /// Its address as the user gave it: "soft:virtio-net", "0000:3b:00.0".
    fn name(&self) -> &str;

    /// Its driver: "virtio-net".
    fn driver(&self) -> &'static str;

    /// What it can do.
    fn info(&self) -> Info;

    /// The PASID that its DMA carries; `None` where it uses the device's own address space, which is then shared by all
    /// its queues.
    fn pasid(&self) -> Option<Pasid> {
        None
    }

    /// Lets the device read and write all packets of `pool`, from the next [`start`](Self::start) on: needed for each
    /// pool whose packets it is to send, the other port's among them. Mapping one again does nothing. Only while the port
    /// is stopped.
    ///
    /// # Errors
    /// [`Busy`](crate::ErrorKind::Busy) while it is started; the IOMMU's refusal.
    fn map(&mut self, pool: &Pool) -> Result<()>;

    /// Takes the pool's memory away from the device again. Only while the port is stopped.
    ///
    /// # Errors
    /// [`Busy`](crate::ErrorKind::Busy) while it is started; [`NotFound`](crate::ErrorKind::NotFound) if it is not mapped.
    fn unmap(&mut self, pool: &Pool) -> Result<()>;

    /// Configures the device, fills its receive queues and starts it.
    ///
    /// # Errors
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more queues, deeper ones or a larger MTU than the device has,
    /// or a pool that is too small; [`Unsupported`](crate::ErrorKind::Unsupported) for required offloads that the device
    /// refuses, or for interrupts that it does not have; [`Busy`](crate::ErrorKind::Busy) if it is started already.
    /// Nothing is started then.
    fn start(&mut self, config: &Config) -> Result<Started>;

    /// Asks for all queues back: their state turns to [`State::Quiesced`].
    fn quiesce(&self);

    /// Stops the device and gives all buffers on its queues back to their pools; packets that were not sent are counted
    /// as dropped. It can then be started again, with another configuration.
    ///
    /// # Errors
    /// [`Busy`](crate::ErrorKind::Busy) while queues are lent out (after [`quiesce`](Self::quiesce), so that they come
    /// back: call again); [`Timeout`](crate::ErrorKind::Timeout) if the device does not stop: what it could still write is
    /// leaked.
    fn stop(&mut self) -> Result<()>;

    /// The link as the device tells it.
    fn link(&mut self) -> Link;

    /// Its own address.
    fn mac(&self) -> MacAddr;

    /// Sets its own address.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if the device does not let its address be set; for this and those
    /// below the device's refusal.
    fn set_mac(&mut self, mac: MacAddr) -> Result<()>;

    /// Receives everything, or what is addressed to it alone.
    fn set_promiscuous(&mut self, on: bool) -> Result<()>;

    /// Receives all multicast packets, or those of the filter alone.
    fn set_all_multicast(&mut self, on: bool) -> Result<()>;

    /// The addresses besides its own that it receives, unicast and multicast; replaces those set before.
    fn set_mac_filter(&mut self, addresses: &[MacAddr]) -> Result<()>;

    /// Receives packets with this VLAN id, or not. Without any id set, all are received.
    fn set_vlan_filter(&mut self, vlan: u16, on: bool) -> Result<()>;

    /// How packets are distributed to the receive queues, from now on.
    fn set_rss(&mut self, rss: &Rss) -> Result<()>;

    /// The counters of each receive queue and of each transmit queue, in order. They go on counting over a restart; reading
    /// them disturbs nothing. Empty before the first start.
    fn counters(&self) -> (Vec<Arc<Counters>>, Vec<Arc<Counters>>);

    /// What the device itself dropped on the queues in use; `None` if it has no such counters, or is stopped. From when on
    /// it counts is the device's affair: a fresh one starts at 0, a stop and a start may or may not set it back. Asking
    /// disturbs no traffic, but it is a command that the device answers, for now and then.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) and [`Device`](crate::ErrorKind::Device) if it does not answer, or not so that
    /// it makes sense.
    fn device_drops(&mut self) -> Result<Option<DeviceDrops>> {
        Ok(None)
    }

    /// The next error that the device made or reported on its own account, if any.
    fn next_error(&mut self) -> Option<Error>;

    /// The next access that the IOMMU refused, if it reports them.
    fn next_fault(&mut self) -> Option<Fault>;
}

/// A receive queue, on loan from its port.
pub trait RxQueue: Send + fmt::Debug {
    /// Appends received packets to `burst`, as many as there are and it has room for, and returns how many. Gives the device
    /// new buffers for them. Never waits.
    fn rx_burst(&mut self, burst: &mut Burst<Packet>) -> usize;

    /// Whether it works: one relaxed load.
    fn state(&self) -> State;

    /// Its number.
    fn index(&self) -> u16;

    /// Sleeps until the device signals a packet, or for `timeout`. Returns at once when there is something to receive.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) unless [`Config::interrupts`] was set and the device has them.
    fn wait(&mut self, timeout: Duration) -> Result<()>;
}

/// A transmit queue, on loan from its port.
pub trait TxQueue: Send + fmt::Debug {
    /// Takes packets from the front of `burst`, as many as fit on the queue, and returns how many; the rest stays the
    /// caller's. Gives the buffers of packets that were sent before back to their pools. Never waits.
    ///
    /// A packet that can not be sent is taken, dropped and counted: a runt, one over the MTU, one of memory that is not
    /// mapped, one that asks for an offload that was not granted.
    fn tx_burst(&mut self, burst: &mut Burst<Packet>) -> usize;

    /// Gives the buffers of packets that were sent back to their pools, without sending any, and returns how many packets
    /// are still with the device.
    fn reclaim(&mut self) -> usize;

    /// Whether it works: one relaxed load.
    fn state(&self) -> State;

    /// Its number.
    fn index(&self) -> u16;
}
