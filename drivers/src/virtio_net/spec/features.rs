//! Feature bits ("Feature Bits", 2.2; "Reserved Feature Bits", 6; "Network Device / Feature bits", 5.1.3).

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub};

/// A set of feature bits 0 to 63.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Features(pub u64);

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        impl Features {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// The named bits, lowest first.
            const NAMES: &[(Self, &str)] = &[$((Self::$name, stringify!($name)),)*];
        }
    };
}

features! {
    /// The device completes checksums of packets sent.
    CSUM = 0;
    /// The driver takes packets whose checksum is not complete.
    GUEST_CSUM = 1;
    /// Receive offloads can be changed by the control queue while running.
    CTRL_GUEST_OFFLOADS = 2;
    /// The configuration holds the largest MTU.
    MTU = 3;
    /// The configuration holds the MAC address.
    MAC = 5;
    /// The driver takes IPv4 TCP segments that were merged.
    GUEST_TSO4 = 7;
    /// The driver takes IPv6 TCP segments that were merged.
    GUEST_TSO6 = 8;
    /// The driver takes merged TCP segments with ECN.
    GUEST_ECN = 9;
    /// The driver takes whole UDP datagrams that came in fragments.
    GUEST_UFO = 10;
    /// The device segments TCP over IPv4.
    HOST_TSO4 = 11;
    /// The device segments TCP over IPv6.
    HOST_TSO6 = 12;
    /// The device segments TCP with ECN.
    HOST_ECN = 13;
    /// The device fragments UDP.
    HOST_UFO = 14;
    /// A packet received may fill several buffers.
    MRG_RXBUF = 15;
    /// The configuration holds the link status.
    STATUS = 16;
    /// There is a control queue.
    CTRL_VQ = 17;
    /// Promiscuous and all-multicast modes by the control queue.
    CTRL_RX = 18;
    /// VLAN filters by the control queue.
    CTRL_VLAN = 19;
    /// More receive modes by the control queue.
    CTRL_RX_EXTRA = 20;
    /// The driver can send gratuitous packets when the device asks for them.
    GUEST_ANNOUNCE = 21;
    /// Several pairs of queues, with automatic receive steering.
    MQ = 22;
    /// The MAC address can be set by the control queue.
    CTRL_MAC_ADDR = 23;

    /// Descriptors may point to tables of descriptors.
    INDIRECT_DESC = 28;
    /// Notifications are asked for by index.
    EVENT_IDX = 29;
    /// The device follows version 1 or later.
    VERSION_1 = 32;
    /// The device is behind an IOMMU: addresses are IOVAs.
    ACCESS_PLATFORM = 33;
    /// Packed virtqueues.
    RING_PACKED = 34;
    /// Buffers are used in the order in which they were made available.
    IN_ORDER = 35;
    /// The device orders memory accesses as other devices of the platform do.
    ORDER_PLATFORM = 36;
    /// Single-root I/O virtualisation.
    SR_IOV = 37;
    /// Notifications tell the queue's position.
    NOTIFICATION_DATA = 38;
    /// Notifications carry a value of the device's instead of the queue's index.
    NOTIF_CONFIG_DATA = 39;
    /// Queues can be reset one by one.
    RING_RESET = 40;

    /// The device's own counts by the control queue (1.3).
    DEVICE_STATS = 50;
    /// Notification coalescing for each queue (1.3).
    VQ_NOTF_COAL = 52;
    /// Notification coalescing.
    NOTF_COAL = 53;
    /// The driver takes IPv4 UDP datagrams that were merged.
    GUEST_USO4 = 54;
    /// The driver takes IPv6 UDP datagrams that were merged.
    GUEST_USO6 = 55;
    /// The device segments UDP into datagrams.
    HOST_USO = 56;
    /// Each packet received comes with its hash.
    HASH_REPORT = 57;
    /// The driver can tell the exact length of the headers.
    GUEST_HDRLEN = 59;
    /// Receive-side scaling.
    RSS = 60;
    /// The device tells how many segments it merged.
    RSC_EXT = 61;
    /// The device may stand by for a primary one with the same MAC address.
    STANDBY = 62;
    /// The configuration holds speed and duplex mode.
    SPEED_DUPLEX = 63;
}

impl Features {
    /// None.
    pub const NONE: Self = Self(0);

    /// What each feature requires: one of the set beside it at least ("Feature bit requirements", 5.1.3.1, and
    /// `NOTIF_CONFIG_DATA`'s in "Reserved Feature Bits").
    pub const REQUIREMENTS: &[(Self, Self)] = &[
        (Self::GUEST_TSO4, Self::GUEST_CSUM),
        (Self::GUEST_TSO6, Self::GUEST_CSUM),
        (Self::GUEST_ECN, Self(Self::GUEST_TSO4.0 | Self::GUEST_TSO6.0)),
        (Self::GUEST_UFO, Self::GUEST_CSUM),
        (Self::GUEST_USO4, Self::GUEST_CSUM),
        (Self::GUEST_USO6, Self::GUEST_CSUM),
        (Self::HOST_TSO4, Self::CSUM),
        (Self::HOST_TSO6, Self::CSUM),
        (Self::HOST_ECN, Self(Self::HOST_TSO4.0 | Self::HOST_TSO6.0)),
        (Self::HOST_UFO, Self::CSUM),
        (Self::HOST_USO, Self::CSUM),
        (Self::CTRL_RX, Self::CTRL_VQ),
        (Self::CTRL_RX_EXTRA, Self::CTRL_VQ),
        (Self::CTRL_VLAN, Self::CTRL_VQ),
        (Self::CTRL_GUEST_OFFLOADS, Self::CTRL_VQ),
        (Self::GUEST_ANNOUNCE, Self::CTRL_VQ),
        (Self::MQ, Self::CTRL_VQ),
        (Self::CTRL_MAC_ADDR, Self::CTRL_VQ),
        (Self::NOTF_COAL, Self::CTRL_VQ),
        (Self::VQ_NOTF_COAL, Self::CTRL_VQ),
        (Self::RSC_EXT, Self(Self::HOST_TSO4.0 | Self::HOST_TSO6.0)),
        (Self::RSS, Self::CTRL_VQ),
        (Self::NOTIF_CONFIG_DATA, Self::NOTIFICATION_DATA),
    ];

    /// Whether all of `other` are set.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any of `other` is set.
    #[inline]
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether none is set.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Without the features whose [`REQUIREMENTS`](Self::REQUIREMENTS) are not met: a set that may be offered or accepted.
    #[must_use]
    pub fn consistent(mut self) -> Self {
        loop {
            let unmet = Self::REQUIREMENTS
                .iter()
                .filter(|(feature, needs)| self.contains(*feature) && !self.intersects(*needs))
                .fold(Self::NONE, |unmet, (feature, _)| unmet | *feature);
            if unmet.is_empty() {
                return self;
            }
            self = self - unmet;
        }
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Features {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Features {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Those of the left side that the right side does not have.
impl Sub for Features {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// The names, with a space between; a bit without one by its number.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let bits = (0..64).map(|bit| (bit, Self(1 << bit))).filter(|(_, feature)| self.contains(*feature));
        for (n, (bit, feature)) in bits.enumerate() {
            let space = if n == 0 { "" } else { " " };
            match Self::NAMES.iter().find(|(named, _)| *named == feature) {
                Some((_, name)) => write!(f, "{space}{name}")?,
                None => write!(f, "{space}bit{bit}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}
