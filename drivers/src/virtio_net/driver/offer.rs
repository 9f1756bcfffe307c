//! What the device offers, checked, and what of it a configuration takes.

use underpass::net::toeplitz::DEFAULT_KEY;
use underpass::net::{Config, FRAME_OVERHEAD, Info, MIN_FRAME, MacAddr, Offloads, Rss};
use underpass::pci::{PciDevice, cap};
use underpass::pool::HEADROOM;
use underpass::{Error, ErrorKind, Pool, Result};

use super::transport::{DeviceConfig, Transport, nonsense};
use super::tx::MAX_CHAIN;
use crate::virtio_net::spec::control::VQ_PAIRS_MAX;
use crate::virtio_net::spec::net::{
    HASH_KEY_LEN, HashHeader, Header, INDIRECTION_TABLE_LEN, config, hash_type,
};
use crate::virtio_net::spec::{Features, net};

/// Packets on a queue where the application does not say, if the device has room for as many.
const DEFAULT_DEPTH: usize = 256;

/// The MTU where the application does not say, if the device has no smaller one.
const DEFAULT_MTU: u16 = 1500;

/// The largest MTU of a device that names none: frames up to 64 KiB.
const MAX_MTU: u16 = u16::MAX - FRAME_OVERHEAD as u16;

/// The longest packet that may arrive where segments are joined, from the Ethernet header on ("Setting Up Receive
/// Buffers", 5.1.6.3).
pub(super) const MAX_LARGE: usize = 65_589;

/// The least room in a buffer, of which a packet may fill several.
const MIN_ROOM: usize = 64;

/// The longest RSS table that this driver sends, so that the command fits into the memory that it has for commands.
pub(super) const MAX_RSS_TABLE: usize = 2048;

/// Accepted wherever they are offered. `RING_PACKED` is the device's to choose by offering it.
const ALWAYS: Features = Features(
    Features::VERSION_1.0
        | Features::ACCESS_PLATFORM.0
        | Features::ORDER_PLATFORM.0
        | Features::RING_PACKED.0
        | Features::IN_ORDER.0
        | Features::EVENT_IDX.0
        | Features::INDIRECT_DESC.0
        | Features::NOTIFICATION_DATA.0
        | Features::NOTIF_CONFIG_DATA.0
        | Features::MAC.0
        | Features::STATUS.0
        | Features::SPEED_DUPLEX.0
        | Features::CTRL_VQ.0
        | Features::CTRL_RX.0
        | Features::CTRL_MAC_ADDR.0
        | Features::DEVICE_STATS.0,
);

/// What each offload needs of the device. Not here: VLAN tags, which the driver itself takes out and puts in.
const OFFLOADS: [(Offloads, Features); 8] = [
    (Offloads::RX_CHECKSUM, Features::GUEST_CSUM),
    (Offloads::TX_CHECKSUM, Features::CSUM),
    (Offloads::TX_TCP_SEGMENT, Features(Features::CSUM.0 | Features::HOST_TSO4.0 | Features::HOST_TSO6.0)),
    (Offloads::TX_UDP_SEGMENT, Features(Features::CSUM.0 | Features::HOST_USO.0)),
    (Offloads::RX_LARGE, Features(Features::GUEST_CSUM.0 | Features::GUEST_TSO4.0 | Features::GUEST_TSO6.0)),
    (Offloads::RX_SCATTER, Features::MRG_RXBUF),
    (Offloads::RSS, Features(Features::RSS.0 | Features::CTRL_VQ.0)),
    (Offloads::RSS_HASH, Features(Features::HASH_REPORT.0 | Features::CTRL_VQ.0)),
];

/// The hashes that are asked for: of addresses and ports where there are some.
const HASH_TYPES: u32 = hash_type::IPV4
    | hash_type::TCPV4
    | hash_type::UDPV4
    | hash_type::IPV6
    | hash_type::TCPV6
    | hash_type::UDPV6;

/// What the device offers.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    pub features: Features,
    pub mac: MacAddr,
    /// Queue pairs.
    pub max_pairs: u16,
    pub max_rx_depth: u16,
    pub max_tx_depth: u16,
    /// The device's own, if it names one.
    mtu: Option<u16>,
    rss_table_len: usize,
    pub hash_types: u32,
    interrupts: bool,
}

/// What is to be started.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub features: Features,
    pub offloads: Offloads,
    pub rx_queues: u16,
    pub tx_queues: u16,
    pub rx_depth: u16,
    pub tx_depth: u16,
    pub mtu: u16,
    /// The longest frame to receive, without a VLAN tag.
    pub max_rx: usize,
    /// The most buffers of a packet to send.
    pub max_chain: u16,
    pub rss: Option<Rss>,
}

impl Plan {
    /// Transmit queues to be set up: with steering by flows one a receive queue, also where fewer are used.
    pub(super) fn tx_rings(&self) -> u16 {
        if self.rss.is_some() { self.tx_queues } else { self.rx_queues }
    }

    /// Bytes before each packet.
    pub(super) fn header_len(&self) -> usize {
        header_len(self.features)
    }
}

const fn header_len(features: Features) -> usize {
    if features.contains(Features::HASH_REPORT) { size_of::<HashHeader>() } else { size_of::<Header>() }
}

impl Offer {
    /// Asks the device, which was just reset.
    pub(super) fn read(device: &PciDevice, transport: &Transport) -> Result<Self> {
        let mut features = transport.offered();
        if !transport.has_notify_data() {
            features = features - Features::NOTIF_CONFIG_DATA;
        }
        let features = features.consistent();
        for (feature, why, mend) in [
            (
                Features::VERSION_1,
                "it is a legacy device",
                "have it offer VERSION_1 (QEMU: disable-legacy=on)",
            ),
            (
                Features::ACCESS_PLATFORM,
                "it would go past the IOMMU, and take I/O virtual addresses for physical ones",
                "have it offer ACCESS_PLATFORM (QEMU: iommu_platform=on)",
            ),
        ] {
            if !features.contains(feature) {
                let why = format!("{why}; it offers {features}");
                return Err(Error::new(ErrorKind::Unsupported, "drive it", why).mend(mend));
            }
        }
        let with = |feature, read: &dyn Fn() -> Result<u32>| {
            if features.intersects(feature) { read() } else { Ok(0) }
        };
        let multi = Features::MQ | Features::RSS;
        let hashing = Features::RSS | Features::HASH_REPORT;
        let read16 = |at| transport.config(|config| config.read16(at).map(u32::from));
        let max_pairs =
            with(multi, &|| read16(config::MAX_VIRTQUEUE_PAIRS))?.max(u32::from(!features.intersects(multi)));
        if !(1..=u32::from(VQ_PAIRS_MAX)).contains(&max_pairs) {
            return Err(nonsense("max_virtqueue_pairs", format_args!("it is {max_pairs}")));
        }
        let mtu = with(Features::MTU, &|| read16(config::MTU))? as u16;
        if features.contains(Features::MTU) && mtu < config::MIN_MTU {
            return Err(nonsense("mtu", format_args!("it is {mtu}, less than {}", config::MIN_MTU)));
        }
        let key = with(hashing, &|| {
            transport.config(|config| config.read8(config::RSS_MAX_KEY_SIZE).map(u32::from))
        })?;
        let table = with(Features::RSS, &|| read16(config::RSS_MAX_INDIRECTION_TABLE_LENGTH))? as usize;
        if features.intersects(hashing) && (key as usize) < HASH_KEY_LEN {
            return Err(nonsense("rss_max_key_size", format_args!("it is {key}, less than {HASH_KEY_LEN}")));
        }
        if features.contains(Features::RSS) && table < INDIRECTION_TABLE_LEN {
            let why = format_args!("it is {table}, less than {INDIRECTION_TABLE_LEN}");
            return Err(nonsense("rss_max_indirection_table_length", why));
        }
        let mac = if features.contains(Features::MAC) {
            MacAddr(transport.config(DeviceConfig::mac)?)
        } else {
            local_mac(device.name())
        };
        if mac.is_multicast() || mac == MacAddr::default() {
            return Err(nonsense("mac", format_args!("{mac} is no station's address")));
        }
        let depth = |queue: u16| {
            // The largest power of two that it reaches.
            let size = transport.max_queue_size(queue).checked_ilog2().map_or(0, |log| 1 << log);
            if size >= 2 { Ok(size) } else { Err(nonsense(format_args!("queue {queue}"), "it is not there")) }
        };
        Ok(Self {
            features,
            mac,
            max_pairs: max_pairs as u16,
            max_rx_depth: depth(net::receive_queue(0))?,
            max_tx_depth: depth(net::transmit_queue(0))?,
            mtu: features.contains(Features::MTU).then_some(mtu),
            rss_table_len: if table == 0 { 0 } else { (1 << table.ilog2()).min(MAX_RSS_TABLE) },
            hash_types: with(hashing, &|| {
                transport.config(|config| config.read32(config::SUPPORTED_HASH_TYPES))
            })? & HASH_TYPES,
            interrupts: device.config().capability(cap::MSIX).is_some(),
        })
    }

    fn max_mtu(&self) -> u16 {
        self.mtu.unwrap_or(MAX_MTU).min(MAX_MTU)
    }

    pub(super) fn info(&self) -> Info {
        let offloads = OFFLOADS
            .into_iter()
            .filter(|(_, needs)| self.features.contains(*needs))
            .fold(Offloads::RX_VLAN | Offloads::TX_VLAN, |all, (offload, _)| all | offload);
        let rss = offloads.contains(Offloads::RSS);
        Info {
            max_rx_queues: self.max_pairs.into(),
            max_tx_queues: self.max_pairs.into(),
            max_rx_depth: self.max_rx_depth.into(),
            max_tx_depth: self.max_tx_depth.into(),
            max_mtu: self.max_mtu(),
            offloads,
            rss_key_len: if rss { HASH_KEY_LEN } else { 0 },
            rss_table_len: if rss { self.rss_table_len } else { 0 },
            interrupts: self.interrupts,
        }
    }

    /// What to start for `config`, with VLAN filters or without.
    pub(super) fn plan(&self, config: &Config, vlan_filter: bool) -> Result<Plan> {
        let rx_queues = at_most("receive queues", config.rx_queues.max(1), self.max_pairs)?;
        let tx_queues = at_most("transmit queues", config.tx_queues.max(1), self.max_pairs)?;
        let rx_depth = depth("packets on a receive queue", config.rx_depth, self.max_rx_depth)?;
        let tx_depth = depth("packets on a transmit queue", config.tx_depth, self.max_tx_depth)?;
        let mtu = match config.mtu {
            Some(mtu) if mtu < config::MIN_MTU => {
                let why = format!("an MTU of {mtu} is asked for, and IPv4 needs {}", config::MIN_MTU);
                return Err(invalid(why).mend(format!("ask for {} to {}", config::MIN_MTU, self.max_mtu())));
            }
            Some(mtu) => at_most("bytes of MTU", mtu.into(), self.max_mtu())?,
            None => DEFAULT_MTU.min(self.max_mtu()),
        };
        let room = receive_room(config, rx_queues, rx_depth)?;
        if config.interrupts && !self.interrupts {
            let why = "interrupts are asked for, and the device has no MSI-X";
            return Err(Error::new(ErrorKind::Unsupported, "start it", why)
                .mend("start it without Config::interrupts, and poll"));
        }

        let mut offloads = (config.offloads | config.required) & self.info().offloads;
        // Large packets come in one buffer or in several, and their checksums are not complete.
        let needs_scatter = room < MAX_LARGE && !offloads.contains(Offloads::RX_SCATTER);
        if needs_scatter || !offloads.contains(Offloads::RX_CHECKSUM) {
            offloads = offloads.without(Offloads::RX_LARGE);
        }
        if !offloads.contains(config.required) {
            let missing = config.required.without(offloads);
            return Err(Error::new(
                ErrorKind::Unsupported,
                "start it",
                format!("these offloads are required, and it does not have them or not so: {missing}"),
            )
            .mend("do without them, or ask also for what they need: rx-large needs rx-checksum, and rx-scatter or buffers of 64 KiB"));
        }
        let frame = usize::from(mtu) + FRAME_OVERHEAD;
        let scatter = offloads.contains(Offloads::RX_SCATTER);
        if room < if scatter { MIN_ROOM } else { frame } {
            let why = format!(
                "frames of {frame} bytes are to fit into the pool's buffers, which have room for {room}"
            );
            return Err(invalid(why).mend(format!(
                "make them at least {} bytes long, take a smaller MTU, or ask for rx-scatter",
                frame + HEADROOM as usize
            )));
        }

        let mut features = ALWAYS;
        for (_, needs) in OFFLOADS.into_iter().filter(|(offload, _)| offloads.contains(*offload)) {
            features |= needs;
        }
        if offloads.contains(Offloads::RX_LARGE) {
            features |= Features::GUEST_ECN;
        }
        if rx_queues.max(tx_queues) > 1 {
            features |= Features::MQ;
        }
        // By accepting it the driver promises to have room for packets of the device's MTU.
        if scatter || room >= usize::from(self.max_mtu()) + FRAME_OVERHEAD {
            features |= Features::MTU;
        }
        if vlan_filter {
            features |= Features::CTRL_VLAN;
        }
        let features = (features & self.features).consistent();
        if rx_queues < tx_queues && !features.contains(Features::RSS) {
            // Steering by flows uses as many receive queues as transmit queues, and each needs somebody to empty it.
            let why = format!(
                "{tx_queues} transmit queues need as many receive queues, and {rx_queues} are asked for"
            );
            return Err(invalid(why).mend("ask for as many receive queues, or for rss if the device has it"));
        }
        if rx_queues.max(tx_queues) > 1 && !features.intersects(Features::MQ | Features::RSS) {
            return Err(nonsense("its features", "it has several queues, and no way to use them"));
        }
        let rss = self.rss(config, offloads, rx_queues)?;
        Ok(Plan {
            features,
            offloads,
            rx_queues,
            tx_queues,
            rx_depth,
            tx_depth,
            mtu,
            max_rx: if offloads.contains(Offloads::RX_LARGE) {
                MAX_LARGE
            } else {
                usize::from(mtu) + MIN_FRAME
            },
            max_chain: MAX_CHAIN.min(tx_depth),
            rss,
        })
    }

    fn rss(&self, config: &Config, offloads: Offloads, rx_queues: u16) -> Result<Option<Rss>> {
        if !offloads.contains(Offloads::RSS) {
            return Ok(None);
        }
        let table_len = usize::from(rx_queues).next_power_of_two();
        let table_len = table_len.max(INDIRECTION_TABLE_LEN).min(self.rss_table_len);
        let rss = config.rss.clone().unwrap_or_else(|| Rss {
            key: DEFAULT_KEY.to_vec(),
            table: (0..rx_queues).cycle().take(table_len).collect(),
        });
        self.check_rss(&rss, rx_queues)?;
        Ok(Some(rss))
    }

    /// Whether the device can distribute packets so, to so many queues.
    pub(super) fn check_rss(&self, rss: &Rss, rx_queues: u16) -> Result<()> {
        let (key, table) = (rss.key.len(), rss.table.len());
        if key != HASH_KEY_LEN {
            let why = format!("the RSS key has {key} bytes");
            return Err(invalid(why).mend(format!("give it {HASH_KEY_LEN}")));
        }
        if !table.is_power_of_two() || table > self.rss_table_len {
            let why = format!("the RSS table has {table} entries");
            return Err(invalid(why).mend(format!("give it a power of two, up to {}", self.rss_table_len)));
        }
        if let Some(queue) = rss.table.iter().find(|queue| **queue >= rx_queues) {
            let why = format!("the RSS table names queue {queue}, and there are {rx_queues}");
            return Err(invalid(why).mend("name queues from 0 on that are started"));
        }
        Ok(())
    }
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, "start it", why)
}

fn at_most(what: &str, asked: usize, most: u16) -> Result<u16> {
    u16::try_from(asked).ok().filter(|asked| *asked <= most).ok_or_else(|| {
        invalid(format!("{asked} {what} are asked for, and it has {most}"))
            .mend(format!("ask for at most {most}"))
    })
}

/// How many packets there are to be on a queue.
fn depth(what: &str, asked: usize, most: u16) -> Result<u16> {
    match asked {
        0 => Ok(most.min(DEFAULT_DEPTH as u16)),
        asked => Ok(at_most(what, asked, most)?.max(2).next_power_of_two()),
    }
}

/// Bytes of a frame that fit into a buffer of any of the pools, which have enough of them.
fn receive_room(config: &Config, rx_queues: u16, rx_depth: u16) -> Result<usize> {
    if config.pools.is_empty() {
        return Err(
            invalid("it has no pool to take buffers from".to_owned()).mend("put one into Config::pools")
        );
    }
    let used = config.pools.len().min(rx_queues.into());
    for (n, pool) in config.pools[..used].iter().enumerate() {
        // Queue n, n + pools, n + 2 * pools, ...
        let queues = (usize::from(rx_queues) - n).div_ceil(config.pools.len());
        let needs = queues * usize::from(rx_depth);
        if pool.capacity() < needs {
            let why = format!(
                "pool {} has {} buffers, and {queues} receive queues of {rx_depth} need {needs}",
                pool.name(),
                pool.capacity()
            );
            return Err(invalid(why).mend("make the pool larger, or the queues shorter (Config::rx_depth)"));
        }
    }
    let room = |pool: &Pool| pool.buffer_len() - HEADROOM as usize;
    Ok(config.pools[..used].iter().map(room).min().unwrap_or(0))
}

/// A locally administered address for a device that has none: the same each time for the same name.
fn local_mac(name: &str) -> MacAddr {
    // FNV-1a.
    let number =
        name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    MacAddr::local(number)
}
