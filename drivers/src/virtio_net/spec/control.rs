//! The control queue ("Control Virtqueue", 5.1.6.5). A command is one buffer: [`Command`] and the command's data, which
//! the device reads, then one byte, which it writes: [`OK`] or [`ERR`]. Behind that it writes the command's result, which
//! only those of device statistics have.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How each command starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Command {
    /// What it is about, one of those below.
    pub class: u8,
    /// Which of the class.
    pub command: u8,
}

const _: () = assert!(size_of::<Command>() == 2);

impl Command {
    const fn new(class: u8, command: u8) -> Self {
        Self { class, command }
    }

    /// Receive everything. Data: one byte, 1 or 0. With `CTRL_RX` ("Packet Receive Filtering").
    pub const RX_PROMISC: Self = Self::new(0, 0);
    /// Receive all multicast packets. Data: one byte, 1 or 0. With `CTRL_RX`.
    pub const RX_ALLMULTI: Self = Self::new(0, 1);
    /// Receive all unicast packets. Data: one byte, 1 or 0. With `CTRL_RX_EXTRA`.
    pub const RX_ALLUNI: Self = Self::new(0, 2);
    /// Receive no multicast packets. Data: one byte, 1 or 0. With `CTRL_RX_EXTRA`.
    pub const RX_NOMULTI: Self = Self::new(0, 3);
    /// Receive no unicast packets. Data: one byte, 1 or 0. With `CTRL_RX_EXTRA`.
    pub const RX_NOUNI: Self = Self::new(0, 4);
    /// Receive no broadcast packets. Data: one byte, 1 or 0. With `CTRL_RX_EXTRA`.
    pub const RX_NOBCAST: Self = Self::new(0, 5);

    /// Set the filter tables, unicast and then multicast. Data: twice a count of 32 bits and so many addresses of 6 bytes.
    /// With `CTRL_RX` ("Setting MAC Address Filtering").
    pub const MAC_TABLE_SET: Self = Self::new(1, 0);
    /// Set the MAC address. Data: its 6 bytes. With `CTRL_MAC_ADDR`.
    pub const MAC_ADDR_SET: Self = Self::new(1, 1);

    /// Receive packets of a VLAN. Data: its id, 16 bits. With `CTRL_VLAN` ("VLAN Filtering").
    pub const VLAN_ADD: Self = Self::new(2, 0);
    /// Receive them no more. Data: its id, 16 bits.
    pub const VLAN_DEL: Self = Self::new(2, 1);

    /// The gratuitous packets were sent. No data. With `GUEST_ANNOUNCE` ("Gratuitous Packet Sending").
    pub const ANNOUNCE_ACK: Self = Self::new(3, 0);

    /// How many queue pairs to use, with automatic receive steering. Data: 16 bits. With `MQ` ("Automatic receive steering
    /// in multiqueue mode").
    pub const MQ_VQ_PAIRS_SET: Self = Self::new(4, 0);
    /// Receive-side scaling. Data: [`RssConfigHead`], the indirection table (queue pairs, 16 bits each),
    /// `max_tx_vq` (16 bits), and the key: one byte of length, then its bytes. With `RSS` ("Receive-side scaling (RSS)").
    pub const MQ_RSS_CONFIG: Self = Self::new(4, 1);
    /// Which hashes to report. Data: [`HashConfigHead`], and the key: one byte of length, then its bytes. With
    /// `HASH_REPORT` ("Hash calculation").
    pub const MQ_HASH_CONFIG: Self = Self::new(4, 2);

    /// Which receive offloads are on. Data: their feature bits, 64 bits. With `CTRL_GUEST_OFFLOADS` ("Offloads State
    /// Configuration").
    pub const GUEST_OFFLOADS_SET: Self = Self::new(5, 0);

    /// Which statistics there are. No data; result: [`stats_type`]s, 64 bits. With `DEVICE_STATS` ("Query Statistic
    /// Capabilities", 1.3).
    pub const STATS_QUERY: Self = Self::new(8, 0);
    /// Statistics of queues. Data: [`StatsRequest`]s; result: for each, its types' statistics, lowest bit first. With
    /// `DEVICE_STATS` ("Get Statistics", 1.3).
    pub const STATS_GET: Self = Self::new(8, 1);
}

/// The command was done.
pub const OK: u8 = 0;
/// The command failed or is not known; the driver's setting stands as before.
pub const ERR: u8 = 1;

/// Least that [`Command::MQ_VQ_PAIRS_SET`] takes.
pub const VQ_PAIRS_MIN: u16 = 1;
/// Most that [`Command::MQ_VQ_PAIRS_SET`] takes.
pub const VQ_PAIRS_MAX: u16 = 0x8000;

/// The fixed start of `struct virtio_net_rss_config` ("Setting RSS parameters").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RssConfigHead {
    /// [`hash_type`](super::net::hash_type)s to use.
    pub hash_types: u32,
    /// Entries of the table, a power of two, minus one: what the hash is masked with.
    pub indirection_table_mask: u16,
    /// Queue pair of packets without a hash. Bit 15 is zero, here and in the table.
    pub unclassified_queue: u16,
}

const _: () = assert!(size_of::<RssConfigHead>() == 8);

/// The fixed start of `struct virtio_net_hash_config` ("Hash calculation").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HashConfigHead {
    /// [`hash_type`](super::net::hash_type)s to report.
    pub hash_types: u32,
    /// Zero.
    pub reserved: [u16; 4],
}

const _: () = assert!(size_of::<HashConfigHead>() == 12);

/// Types of statistics ("Device Statistics", 1.3), as bits; a reply names its type by the bit's number. Not here: those
/// of the control queue, checksums, segmentation and speed.
pub mod stats_type {
    /// [`BasicStats`](super::BasicStats) of a receive queue.
    pub const RX_BASIC: u64 = 1 << 0;
    /// [`BasicStats`](super::BasicStats) of a transmit queue.
    pub const TX_BASIC: u64 = 1 << 16;
}

/// One queue of `struct virtio_net_ctrl_queue_stats` ("Get Statistics", 1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatsRequest {
    /// The queue.
    pub vq_index: u16,
    /// Zero.
    pub reserved: [u16; 3],
    /// The [`stats_type`]s wanted.
    pub types: u64,
}

const _: () = assert!(size_of::<StatsRequest>() == 16);

/// `struct virtio_net_stats_reply_hdr`, the start of each reply ("Get Statistics", 1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatsHeader {
    /// The number of its [`stats_type`]'s bit.
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
    /// The queue.
    pub vq_index: u16,
    /// Zero.
    pub reserved1: u16,
    /// Bytes of the reply, this header's among them.
    pub size: u16,
}

const _: () = assert!(size_of::<StatsHeader>() == 8);

/// `struct virtio_net_stats_rx_basic` and `struct virtio_net_stats_tx_basic`, which have the same shape ("Receiveq Basic
/// Statistics" and "Transmitq Basic Statistics", 1.3). The counters wrap around.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BasicStats {
    /// What it is.
    pub header: StatsHeader,
    /// Notifications that came from the driver.
    pub notifications: u64,
    /// Packets passed to the driver, or packets that were sent: segments count one by one.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Interrupts for this queue.
    pub interrupts: u64,
    /// Packets dropped, for whatever reason.
    pub drops: u64,
    /// Of those, received ones for which there was no descriptor (`rx_drop_overruns`), or ones to send that are malformed
    /// (`tx_drop_malformed`).
    pub overruns_or_malformed: u64,
}

const _: () = assert!(size_of::<BasicStats>() == 56);
