//! What the driver itself looks at in a frame: its length and its VLAN tag.

use underpass::Packet;
use underpass::net::MIN_FRAME;
use underpass::net::headers::ethertype;

/// Bytes of a frame's addresses, behind which a VLAN tag is.
pub(super) const ADDRESSES: usize = 12;

/// Bytes of a VLAN tag.
pub(super) const TAG: usize = 4;

/// Whether a frame of `len` bytes, which begins with `start`, is not too long: `max` bytes, and where it has a VLAN tag the
/// tag's, as the MTU counts what is behind it.
#[inline]
pub(super) fn fits(start: &[u8], len: usize, max: usize) -> bool {
    len <= max || len <= max + TAG && has_tag(start)
}

/// Whether there is a tag behind the addresses (IEEE 802.1Q, a customer's or a service provider's).
#[cold]
fn has_tag(start: &[u8]) -> bool {
    let Some(&[high, low]) = start.get(ADDRESSES..ADDRESSES + 2) else { return false };
    matches!(u16::from_be_bytes([high, low]), ethertype::VLAN | ethertype::QINQ)
}

/// Bytes of a packet's frame as it is on the wire, where the driver takes tags out and puts them in.
#[inline]
pub(super) fn wire_len(packet: &Packet) -> usize {
    packet.len() + packet.vlan().map_or(0, |_| TAG)
}

/// Takes a VLAN tag out of the frame, if it has one.
pub(super) fn strip_vlan(packet: &mut Packet) {
    let data = packet.data_mut();
    if data.len() < MIN_FRAME + TAG || data[ADDRESSES..][..2] != ethertype::VLAN.to_be_bytes() {
        return;
    }
    let tci = u16::from_be_bytes([data[ADDRESSES + 2], data[ADDRESSES + 3]]);
    data.copy_within(..ADDRESSES, TAG);
    packet.trim_front(TAG);
    packet.set_vlan(Some(tci));
}
