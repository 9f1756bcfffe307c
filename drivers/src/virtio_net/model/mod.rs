//! The software twin of the device: it answers the registers, serves the virtqueues behind the software IOMMU, and
//! ends in a [peer], the other end of its cable. It is what the driver is tested against, so it checks what the
//! specification lets a device check, and believes nothing that a driver writes: whoever breaks a rule finds
//! `DEVICE_NEEDS_RESET` in the status, and the rule in [`VirtioNetControl::violation`].
//!
//! What is where: `registers` and `config_space` are the PCI transport, `device` is what all parts share; `engine` runs a
//! queue pair with `transmit` and `receive`, on the virtqueues of `split` and `packed`; `control` does commands,
//! `rules` is what they set, `stats` what they ask; `offload` does checksums and segmentation.
//!
//! What the specification leaves open:
//! - The engines look for buffers themselves, so the driver is told not to notify; [`Profile::notified`] changes that.
//! - A frame for which there is no buffer waits, and what is behind it in the peer waits, too: nothing is lost because a
//!   driver is slow. One that could never fit is dropped and counted, as are runts and over-long frames.
//! - A driver that has negotiated `CTRL_RX` starts with its own address and broadcasts; any other receives everything.
//!   In promiscuous mode VLAN filters do not count.
//! - While the link is down, what is sent is dropped and counted, and nothing is received.
//! - A frame that would be cut into more than 2048 segments is dropped and counted as malformed.
//! - MSI-X counts as enabled. Events without a vector show in the ISR status.
//! - In order, one used element stands for a batch of buffers only where they have no part that the device writes.
//!
//! What is not offered: UDP fragmentation (`*_UFO`, deprecated), merging of received segments (`RSC_EXT`: the device never
//! merges), notification coalescing (interrupts come once a burst as it is), `STANDBY`, `SR_IOV`, `ORDER_PLATFORM`, the
//! IPv6 extension header hashes, and of what only 1.3 has all but the basic device statistics of queues. There is no window to the BARs in configuration space
//! (`VIRTIO_PCI_CAP_PCI_CFG`), which the specification asks for: configuration space is served without the model.

mod config_space;
mod control;
mod device;
mod engine;
mod inbox;
mod offload;
mod packed;
pub mod peer;
mod receive;
mod registers;
mod report;
mod rules;
mod split;
mod stats;
mod transmit;
mod virtqueue;

use std::fmt;
use std::sync::Arc;

use underpass::Result;
use underpass::model::{BarKind, BarSpec, Doorbell, Engine, Host, Model, Width};
use underpass::net::MacAddr;
use underpass::pci::ConfigSpace;

use self::device::Device;
use self::peer::{Peer, PeerSpec};
use self::registers::Notifications;
use super::spec;

pub use self::report::{Count, Violation};
pub use super::spec::Features;

/// What kind of device a model is.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Queue pairs, 1 to [`MAX_QUEUE_PAIRS`](Self::MAX_QUEUE_PAIRS). Each has an engine.
    pub queue_pairs: u16,
    /// Entries of the largest queue: a power of two up to 32768.
    pub max_queue_size: u16,
    /// What is offered, of [`SUPPORTED`](Self::SUPPORTED). A feature without those that it requires is left out.
    pub features: Features,
    /// The MTU, 68 at least.
    pub mtu: u16,
    /// The MAC address.
    pub mac: MacAddr,
    /// The speed that the device tells, in megabits a second.
    pub speed: Option<u32>,
    /// The device looks at a queue only when the driver has notified it, and asks for that. It is how a driver's
    /// notifications are tested; otherwise the engines poll.
    pub notified: bool,
    /// The other end of the cable.
    pub peer: PeerSpec,
}

impl Profile {
    /// The most queue pairs.
    pub const MAX_QUEUE_PAIRS: u16 = 16;

    /// All that can be offered.
    pub const SUPPORTED: Features = {
        const ALL: [Features; 37] = [
            Features::CSUM,
            Features::GUEST_CSUM,
            Features::CTRL_GUEST_OFFLOADS,
            Features::MTU,
            Features::MAC,
            Features::GUEST_TSO4,
            Features::GUEST_TSO6,
            Features::GUEST_ECN,
            Features::HOST_TSO4,
            Features::HOST_TSO6,
            Features::HOST_ECN,
            Features::MRG_RXBUF,
            Features::STATUS,
            Features::CTRL_VQ,
            Features::CTRL_RX,
            Features::CTRL_VLAN,
            Features::CTRL_RX_EXTRA,
            Features::GUEST_ANNOUNCE,
            Features::MQ,
            Features::CTRL_MAC_ADDR,
            Features::INDIRECT_DESC,
            Features::EVENT_IDX,
            Features::VERSION_1,
            Features::ACCESS_PLATFORM,
            Features::RING_PACKED,
            Features::IN_ORDER,
            Features::NOTIFICATION_DATA,
            Features::NOTIF_CONFIG_DATA,
            Features::RING_RESET,
            Features::GUEST_USO4,
            Features::GUEST_USO6,
            Features::HOST_USO,
            Features::HASH_REPORT,
            Features::GUEST_HDRLEN,
            Features::RSS,
            Features::SPEED_DUPLEX,
            Features::DEVICE_STATS,
        ];
        let (mut all, mut n) = (0, 0);
        while n < ALL.len() {
            all |= ALL[n].0;
            n += 1;
        }
        Features(all)
    };

    /// The same profile with everything brought into its range.
    fn in_range(mut self) -> Self {
        let largest = self.max_queue_size.clamp(1, spec::split::MAX_SIZE);
        self.queue_pairs = self.queue_pairs.clamp(1, Self::MAX_QUEUE_PAIRS);
        self.max_queue_size = 1 << largest.ilog2();
        self.mtu = self.mtu.max(spec::net::config::MIN_MTU);
        self.features = ((self.features & Self::SUPPORTED) | Features::VERSION_1).consistent();
        self
    }

    /// The features that the device offers.
    fn offered(&self) -> Features {
        self.features
    }

    /// How many queues there are.
    fn queues(&self) -> usize {
        2 * usize::from(self.queue_pairs) + usize::from(self.features.contains(Features::CTRL_VQ))
    }

    /// How many interrupt vectors there are: one a queue, and one for configuration changes.
    fn vectors(&self) -> usize {
        self.queues() + 1
    }
}

impl Default for Profile {
    /// One queue pair, everything that can be offered, a loop.
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            max_queue_size: 1024,
            features: Self::SUPPORTED,
            mtu: 1500,
            mac: MacAddr::local(1),
            speed: None,
            notified: false,
            peer: PeerSpec::Loop,
        }
    }
}

/// A software virtio-net device.
pub struct VirtioNetModel {
    device: Arc<Device>,
    /// Until the engines take them.
    peers: Vec<Box<dyn Peer>>,
}

impl VirtioNetModel {
    /// A device of this kind, as after power-on. What is out of range in the profile is brought into it.
    ///
    /// # Errors
    /// What [`PeerSpec::open`] gives.
    pub fn new(profile: Profile) -> Result<Self> {
        let profile = profile.in_range();
        let peers = profile.peer.open(profile.queue_pairs.into(), profile.mac)?;
        Ok(Self::with_peers(profile, peers))
    }

    /// The same with peers of the caller's, one for each queue pair, which are as many as there are peers.
    pub fn with_peers(profile: Profile, mut peers: Vec<Box<dyn Peer>>) -> Self {
        peers.truncate(Profile::MAX_QUEUE_PAIRS.into());
        let profile = Profile { queue_pairs: peers.len() as u16, ..profile }.in_range();
        Self { device: Arc::new(Device::new(profile)), peers }
    }

    /// A handle that acts on the device from outside.
    pub fn control(&self) -> VirtioNetControl {
        VirtioNetControl { device: Arc::clone(&self.device) }
    }
}

impl fmt::Debug for VirtioNetModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioNetModel").field("profile", &self.device.profile).finish_non_exhaustive()
    }
}

impl Model for VirtioNetModel {
    fn config_space(&self) -> ConfigSpace {
        config_space::config_space(self.device.profile.queues(), self.vectors())
    }

    fn bars(&self) -> Vec<BarSpec> {
        let notifications = Arc::new(Notifications(Arc::clone(&self.device))) as Arc<dyn Doorbell>;
        vec![
            BarSpec {
                index: config_space::REGISTERS,
                len: config_space::REGISTERS_LEN,
                kind: BarKind::Registers,
            },
            BarSpec {
                index: config_space::NOTIFY,
                len: config_space::NOTIFY_LEN,
                kind: BarKind::Doorbells { page: config_space::NOTIFY_LEN, targets: vec![notifications] },
            },
        ]
    }

    fn vectors(&self) -> usize {
        self.device.profile.vectors()
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        engine::engines(&self.device, &*host, std::mem::take(&mut self.peers))
    }

    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        if bar == config_space::REGISTERS {
            self.device.registers().read(&self.device, offset, width)
        } else {
            0
        }
    }

    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        if bar == config_space::REGISTERS {
            self.device.registers().write(&self.device, offset, width, value);
        }
    }

    fn config_written(&mut self, config: &ConfigSpace) {
        self.device.set_bus_master(config.bus_master());
    }

    fn reset(&mut self) {
        self.device.registers().reset(&self.device);
    }
}

/// Acts on a software device from outside, as whoever holds the cable does, and looks into it. Clones are of the same
/// device; it may outlive it.
#[derive(Clone)]
pub struct VirtioNetControl {
    device: Arc<Device>,
}

impl VirtioNetControl {
    /// Plugs the cable in, or pulls it out. The driver is told if it can be.
    pub fn set_link(&self, up: bool) {
        self.device.set_link(up);
    }

    /// Whether the link is up: the cable is in, and the peer is there.
    pub fn link_is_up(&self) -> bool {
        self.device.link_is_up()
    }

    /// Asks the driver to send gratuitous packets, if it negotiated `GUEST_ANNOUNCE`.
    pub fn announce(&self) {
        self.device.announce();
    }

    /// What the driver did wrong the last time that the device needed a reset.
    pub fn violation(&self) -> Option<Violation> {
        self.device.violation()
    }

    /// How many there were so far.
    pub fn count(&self, count: Count) -> u64 {
        self.device.count(count)
    }
}

impl fmt::Debug for VirtioNetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioNetControl")
            .field("link_is_up", &self.link_is_up())
            .field("violation", &self.violation())
            .finish_non_exhaustive()
    }
}
