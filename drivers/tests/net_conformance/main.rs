//! One suite that every network port passes: the software virtio-net with split and packed rings, with and without the
//! features that change how packets travel, and with its device run by the worker, by the test and by threads.
//!
//! A test of the suite takes a [`Kind`] and is run for each. The other end of the cable is the test's: it sees what the
//! port sends, and sends what the port is to receive. What a frame must look like comes from `rig::frames`, which has
//! nothing in common with the code under test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod filters;
mod life;
mod offloads;
mod packets;
#[path = "../rig/net/mod.rs"]
mod rig;
mod schedules;

use underpass::Pool;
use underpass::net::Config;
use underpass_drivers::virtio_net::spec::Features;

use rig::virtio::{Kind, inline, stepped, threads};
use rig::{Bench, Wire};

macro_rules! suite {
    ($($module:ident: [$($test:ident),* $(,)?])*) => {
        macro_rules! kind {
            ($name:ident: $kind:expr) => {
                mod $name {
                    use super::*;
                    const KIND: Kind = $kind;
                    $($(#[test] fn $test() { super::$module::$test(&KIND); })*)*
                }
            };
        }
    };
}

suite! {
    life: [
        a_port_says_what_it_can_do,
        it_starts_and_stops_with_other_configurations,
        what_is_lent_out_keeps_the_port_busy,
        impossible_configurations_are_refused,
        packets_of_other_pools_are_sent_once_these_are_mapped,
        the_link_goes_down_and_up,
        waiting_ends_with_a_packet_or_in_time,
        a_device_that_needs_a_reset_gets_one,
        a_port_can_be_dropped_before_its_queues,
        a_pool_can_be_dropped_first,
        a_panic_gives_the_queues_back,
    ]
    packets: [
        frames_of_every_size_come_back_byte_for_byte,
        chains_are_sent_as_one_frame,
        a_frame_may_fill_several_buffers,
        a_full_ring_keeps_order_and_loses_nothing,
        what_does_not_fit_stays_the_callers,
        a_full_burst_receives_nothing,
        a_dry_pool_delays_packets_and_loses_none,
        what_can_not_be_sent_is_dropped_and_counted,
        frames_that_no_port_may_pass_on_are_dropped,
        counters_are_exact_and_outlive_a_restart,
        packets_not_sent_are_counted_when_it_stops,
        queues_work_on_threads_of_their_own,
    ]
    offloads: [
        received_checksums_are_judged,
        checksums_are_completed,
        long_payloads_are_segmented,
        joined_segments_are_received,
        offloads_that_were_not_granted_are_refused,
        vlan_tags_are_taken_out_and_put_in,
        packets_are_distributed_by_their_hash,
    ]
    filters: [
        addresses_are_filtered,
        vlans_are_filtered,
    ]
    schedules: [
        random_schedules,
    ]
}

kind!(split: Kind::new(inline, false, &[Features::RING_PACKED]));
kind!(split_stepped: Kind::new(stepped, true, &[Features::RING_PACKED, Features::IN_ORDER]));
kind!(split_threads: Kind::new(threads, false, &[Features::RING_PACKED, Features::EVENT_IDX]));
kind!(split_unmerged: Kind::new(inline, true, &[
    Features::RING_PACKED,
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
]));
kind!(packed: Kind::new(inline, true, &[]));
kind!(packed_stepped: Kind::new(stepped, true, &[Features::IN_ORDER]));
kind!(packed_threads: Kind::new(threads, true, &[Features::EVENT_IDX]));
kind!(packed_unmerged: Kind::new(inline, false, &[
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
    Features::IN_ORDER,
]));
// What it is not notified of the device does not see.
kind!(split_notified: Kind { notified: true, ..Kind::new(inline, false, &[Features::RING_PACKED]) });
kind!(packed_notified: Kind { notified: true, ..Kind::new(stepped, false, &[Features::EVENT_IDX]) });
// As little as a device may have.
kind!(bare: Kind::new(inline, true, &[Features(!(Features::VERSION_1.0 | Features::ACCESS_PLATFORM.0))]));

/// A port on a wire that gives back what is sent.
fn echo(kind: &Kind) -> Bench {
    kind.open(&Wire::echo(1))
}

/// One queue each way, of 64 packets.
fn config(pool: &Pool) -> Config {
    Config { rx_depth: 64, tx_depth: 64, ..Config::new(pool) }
}
