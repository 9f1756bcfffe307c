//! Device statistics ("Device Statistics", 1.3): the basic ones of receive and transmit queues.
//!
//! What the filters keep out is not for this driver, so it is not among the drops. There are no overruns: a frame for which
//! there is no buffer waits. Counts go on over a reset of the device.

use std::sync::atomic::Ordering;

use zerocopy::{FromBytes, IntoBytes};

use super::control::Refused;
use super::device::{Device, Role};
use super::report::Count;
use super::spec::control::{BasicStats, StatsHeader, StatsRequest, stats_type};

/// The result of `STATS_QUERY`.
pub(super) fn query(data: &[u8]) -> Result<Vec<u8>, Refused> {
    let types = stats_type::RX_BASIC | stats_type::TX_BASIC;
    if data.is_empty() { Ok(types.to_le_bytes().to_vec()) } else { Err(Refused) }
}

/// The result of `STATS_GET`: everything that is asked for, or nothing.
pub(super) fn get(device: &Device, data: &[u8]) -> Result<Vec<u8>, Refused> {
    let (requests, rest) = data.as_chunks::<{ size_of::<StatsRequest>() }>();
    if requests.is_empty() || !rest.is_empty() {
        return Err(Refused);
    }
    let mut result = Vec::new();
    for request in requests {
        let StatsRequest { vq_index, reserved, types } =
            StatsRequest::read_from_bytes(request).map_err(|_| Refused)?;
        let role = device.role(vq_index).ok_or(Refused)?;
        let known = match role {
            Role::Receive(_) => stats_type::RX_BASIC,
            Role::Transmit(_) => stats_type::TX_BASIC,
            Role::Control => 0,
        };
        if reserved != [0; 3] || types & !known != 0 {
            return Err(Refused);
        }
        if types != 0 {
            result.extend_from_slice(basic(device, role, vq_index, types).as_bytes());
        }
    }
    Ok(result)
}

/// The statistics of the one type in `types`.
fn basic(device: &Device, role: Role, vq_index: u16, types: u64) -> BasicStats {
    let sum = |pair, counts: &[Count]| {
        counts.iter().fold(0_u64, |sum, count| sum.wrapping_add(device.count_of(pair, *count)))
    };
    let (packets, bytes, drops, overruns_or_malformed) = match role {
        Role::Receive(pair) => (
            sum(pair, &[Count::RxFrames]),
            sum(pair, &[Count::RxBytes]),
            sum(pair, &[Count::RxOversize, Count::RxNoQueue, Count::RxReset]),
            0,
        ),
        Role::Transmit(pair) => (
            sum(pair, &[Count::TxSent]),
            sum(pair, &[Count::TxBytes]),
            sum(
                pair,
                &[
                    Count::TxRunts,
                    Count::TxOversize,
                    Count::TxMalformed,
                    Count::TxLinkDown,
                    Count::TxUndelivered,
                    Count::TxReset,
                ],
            ),
            sum(pair, &[Count::TxRunts, Count::TxMalformed]),
        ),
        Role::Control => (0, 0, 0, 0),
    };
    let signals = &device.signals[usize::from(vq_index)];
    let header = StatsHeader {
        kind: types.trailing_zeros() as u8,
        vq_index,
        size: size_of::<BasicStats>() as u16,
        ..StatsHeader::default()
    };
    BasicStats {
        header,
        notifications: signals.notifications.load(Ordering::Relaxed),
        packets,
        bytes,
        interrupts: signals.interrupts.load(Ordering::Relaxed),
        drops,
        overruns_or_malformed,
    }
}
