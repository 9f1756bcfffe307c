//! What a device did for a packet, or is to do.

/// What is known of a received packet's checksums (the transport's; the IPv4 header's where the device looks at it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// The device did not look.
    #[default]
    Unknown = 0,
    /// The device found it right.
    Good = 1,
    /// The device found it wrong.
    Bad = 2,
    /// The sender left the transport checksum to be computed by hardware, and the packet never passed any: the data are
    /// right, the field holds the pseudo header's sum only. To send it on, ask for the checksum again.
    Partial = 3,
}

/// A transport protocol whose checksum or segmentation can be left to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Transport {
    Tcp,
    Udp,
}

/// What a packet asks of the device that sends it. The header lengths say where the headers are; nothing is parsed
/// on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxOffload {
    /// Bytes before the IP header: 14, 18 with a VLAN tag.
    pub l2_len: u8,
    /// Bytes of the IP header, extension headers included.
    pub l3_len: u16,
    /// Bytes of the transport header; only segmentation looks at it.
    pub l4_len: u8,
    /// Whether the IP header is version 6.
    pub ipv6: bool,
    /// The transport protocol.
    pub transport: Transport,
    /// Compute the IPv4 header's checksum.
    pub ip_checksum: bool,
    /// Compute the transport's checksum; its field holds the pseudo header's sum, with the length of the whole packet from
    /// the transport header on, also where it is to be cut into segments (VIRTIO 1.2, 5.1.6.2: `NEEDS_CSUM` means the same
    /// with and without segmentation; a device that wants the sum without the length is its driver's to serve).
    pub l4_checksum: bool,
    /// Cut the payload into segments of at most so many bytes (TSO, USO), each with its own length and checksums, whatever
    /// [`l4_checksum`](Self::l4_checksum) and [`ip_checksum`](Self::ip_checksum) are; 0: leave the packet whole. The
    /// transport checksum's field holds the same sum as for `l4_checksum`.
    pub segment: u16,
}
