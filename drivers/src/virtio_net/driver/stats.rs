//! What the device itself has counted ("Device Statistics", 1.3).

use underpass::net::DeviceDrops;
use underpass::{Error, ErrorKind, Result};
use zerocopy::{FromBytes, IntoBytes};

use super::VirtioNet;
use crate::virtio_net::spec::control::{BasicStats, Command, StatsRequest, stats_type};
use crate::virtio_net::spec::{Features, net};

const WHAT: &str = "read what it dropped";

impl VirtioNet {
    /// Asks for the drops of all queues in use; `None` where the device does not count them, and while it is stopped.
    pub(super) fn ask_drops(&mut self) -> Result<Option<DeviceDrops>> {
        let Some(running) = &self.running else { return Ok(None) };
        if !running.plan.features.contains(Features::DEVICE_STATS | Features::CTRL_VQ) {
            return Ok(None);
        }
        let (rx_queues, tx_queues) = (running.plan.rx_queues, running.plan.tx_rings());
        // Only what this says may be asked for.
        let types = self.ask(WHAT, Command::STATS_QUERY, &[], size_of::<u64>())?;
        let types = u64::read_from_bytes(types).unwrap_or_default();
        if types & stats_type::RX_BASIC == 0 || types & stats_type::TX_BASIC == 0 {
            return Ok(None);
        }
        let mut drops = DeviceDrops::default();
        for n in 0..rx_queues {
            let of_queue = self.ask_queue(net::receive_queue(n), stats_type::RX_BASIC)?;
            drops.rx = drops.rx.saturating_add(of_queue.drops);
        }
        for n in 0..tx_queues {
            let of_queue = self.ask_queue(net::transmit_queue(n), stats_type::TX_BASIC)?;
            drops.tx = drops.tx.saturating_add(of_queue.drops);
        }
        Ok(Some(drops))
    }

    fn ask_queue(&mut self, vq_index: u16, types: u64) -> Result<BasicStats> {
        let request = StatsRequest { vq_index, types, ..StatsRequest::default() };
        let result = self.ask(WHAT, Command::STATS_GET, request.as_bytes(), size_of::<BasicStats>())?;
        let stats = BasicStats::read_from_bytes(result).unwrap_or_default();
        let header = stats.header;
        let fits = u32::from(header.kind) == types.trailing_zeros()
            && header.vq_index == vq_index
            && usize::from(header.size) >= size_of::<BasicStats>();
        if !fits {
            let why = format!("it was asked for the statistics of queue {vq_index}, and gave {header:?}");
            return Err(Error::new(ErrorKind::Device, WHAT, why).mend("do without them"));
        }
        Ok(stats)
    }
}
