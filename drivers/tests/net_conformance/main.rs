//! One suite that every network port passes: the software virtio-net with split and packed rings, with and without the
//! features that change how packets travel, and with its device run by the worker, by the test and by threads; and in
//! `ci/testbed` QEMU's virtio-net behind a kernel's IOMMU.
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

use rig::nic::Nic;
use rig::virtio::{Kind as Model, inline, stepped, threads};
use rig::{Bench, Wire};

/// What is tested.
#[derive(Debug)]
enum Kind {
    /// A software device.
    Model(Model),
    /// A NIC of the testbed.
    Nic(Nic),
}

impl Kind {
    /// A port with its driver, on `wire`.
    fn open(&self, wire: &Wire) -> Bench {
        match self {
            Self::Model(model) => model.open(wire),
            Self::Nic(nic) => nic.open(wire),
        }
    }

    /// Whether the device offers none of these features.
    fn is_without(&self, features: Features) -> bool {
        matches!(self, Self::Model(model) if model.without.contains(features))
    }

    fn is_nic(&self) -> bool {
        matches!(self, Self::Nic(_))
    }

    /// How often something is repeated: on an emulated processor less often, as it is some 30 times slower.
    fn times(&self, times: u64) -> u64 {
        if self.is_nic() { times.div_ceil(20) } else { times }
    }
}

/// Makes a macro `$kind` that has a module with these tests for one subject. `$which` is an attribute of each of them.
macro_rules! suite {
    ($kind:ident, $subject:path, $which:meta; $($module:ident: [$($test:ident),* $(,)?])*) => {
        macro_rules! $kind {
            ($name:ident: $device:expr) => {
                mod $name {
                    use super::*;
                    const KIND: Kind = $subject($device);
                    $($(
                        #[test]
                        #[$which]
                        fn $test() {
                            super::$module::$test(&KIND);
                        }
                    )*)*
                }
            };
        }
    };
}

suite! {
    model, Kind::Model, cfg(test);
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

model!(split: Model::new(inline, false, &[Features::RING_PACKED]));
model!(split_stepped: Model::new(stepped, true, &[Features::RING_PACKED, Features::IN_ORDER]));
model!(split_threads: Model::new(threads, false, &[Features::RING_PACKED, Features::EVENT_IDX]));
model!(split_unmerged: Model::new(inline, true, &[
    Features::RING_PACKED,
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
]));
model!(packed: Model::new(inline, true, &[]));
model!(packed_stepped: Model::new(stepped, true, &[Features::IN_ORDER]));
model!(packed_threads: Model::new(threads, true, &[Features::EVENT_IDX]));
model!(packed_unmerged: Model::new(inline, false, &[
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
    Features::IN_ORDER,
]));
// What it is not notified of the device does not see.
model!(split_notified: Model { notified: true, ..Model::new(inline, false, &[Features::RING_PACKED]) });
model!(packed_notified: Model { notified: true, ..Model::new(stepped, false, &[Features::EVENT_IDX]) });
// As little as a device may have.
model!(bare: Model::new(inline, true, &[Features(!(Features::VERSION_1.0 | Features::ACCESS_PLATFORM.0))]));

// Not for a NIC at the end of a cable, where the test holds neither the device nor the driver of the other end:
// - a_device_that_needs_a_reset_gets_one: QEMU's asks for one only after a driver's bug;
// - what_does_not_fit_stays_the_callers, packets_not_sent_are_counted_when_it_stops: nothing holds it up, the other end takes
//   all there is;
// - received_checksums_are_judged, joined_segments_are_received: a cable carries only what is finished.
suite! {
    nic, Kind::Nic, ignore = "needs a real kernel: ci/testbed";
    life: [
        a_port_says_what_it_can_do,
        it_starts_and_stops_with_other_configurations,
        what_is_lent_out_keeps_the_port_busy,
        impossible_configurations_are_refused,
        packets_of_other_pools_are_sent_once_these_are_mapped,
        the_link_goes_down_and_up,
        waiting_ends_with_a_packet_or_in_time,
        a_port_can_be_dropped_before_its_queues,
        a_pool_can_be_dropped_first,
        a_panic_gives_the_queues_back,
    ]
    packets: [
        frames_of_every_size_come_back_byte_for_byte,
        chains_are_sent_as_one_frame,
        a_frame_may_fill_several_buffers,
        a_full_ring_keeps_order_and_loses_nothing,
        a_full_burst_receives_nothing,
        a_dry_pool_delays_packets_and_loses_none,
        what_can_not_be_sent_is_dropped_and_counted,
        frames_that_no_port_may_pass_on_are_dropped,
        counters_are_exact_and_outlive_a_restart,
        queues_work_on_threads_of_their_own,
    ]
    offloads: [
        checksums_are_completed,
        long_payloads_are_segmented,
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

nic!(testbed_queues: Nic::new("UNDERPASS_NET0", "UNDERPASS_PEER0", "net0"));
nic!(testbed_packed: Nic::new("UNDERPASS_NET1", "UNDERPASS_PEER1", "net1"));

/// A port on a wire that gives back what is sent.
fn echo(kind: &Kind) -> Bench {
    kind.open(&Wire::echo(1))
}

/// One queue each way, of 64 packets.
fn config(pool: &Pool) -> Config {
    Config { rx_depth: 64, tx_depth: 64, ..Config::new(pool) }
}
