//! Sends and receives 60-byte frames in bursts of 32 through the virtio-net driver, for a program that counts
//! instructions: `benches/instructions` runs it under callgrind, which counts within [`count_rx`] and [`count_tx`] alone. The
//! device, a loop, is stepped in between.
//!
//! `net_instructions FEATURES ROUNDS`: of all features without those named, as in `no-packed,no-in-order`.

use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::net::{Config, Port, RxQueue, TxQueue};
use underpass::pci::{PciDevice, Run};
use underpass::{Burst, Packet, Pool};
use underpass_drivers::virtio_net::driver::VirtioNet;
use underpass_drivers::virtio_net::model::{Features, Profile, VirtioNetModel};

const BURST: usize = 32;

#[inline(never)]
fn count_rx(rx: &mut dyn RxQueue, burst: &mut Burst<Packet>) -> usize {
    rx.rx_burst(burst)
}

/// Not the same code as [`count_rx`], or the two would be one function.
#[inline(never)]
fn count_tx(tx: &mut dyn TxQueue, burst: &mut Burst<Packet>) -> usize {
    std::hint::black_box(());
    tx.tx_burst(burst)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let without = arguments.next().unwrap_or_default();
    let rounds: usize = arguments.next().map_or(Ok(1000), |rounds| rounds.parse())?;
    let mut features = Profile::SUPPORTED;
    for name in without.split(',').filter(|name| !name.is_empty()) {
        features = features
            - match name {
                "no-packed" => Features::RING_PACKED,
                "no-in-order" => Features::IN_ORDER,
                "no-indirect" => Features::INDIRECT_DESC,
                _ => return Err(format!("{name} is none of no-packed, no-in-order, no-indirect").into()),
            };
    }
    let model = VirtioNetModel::new(Profile { features, ..Profile::default() })?;
    let iommu = SoftIommu::new(SoftOptions::default());
    let device = PciDevice::in_process("soft:virtio-net", Box::new(model), &iommu, Run::Stepped)?;
    let mut port = VirtioNet::open(device)?;
    let pool = Pool::builder(4096).build()?;
    let mut started = port.start(&Config { rx_depth: 256, tx_depth: 256, ..Config::new(&pool) })?;
    let (rx, tx) = (&mut *started.rx[0], &mut *started.tx[0]);
    let mut burst = Burst::with_capacity(BURST);
    pool.alloc_burst(BURST, &mut burst);
    for packet in burst.iter_mut() {
        packet.append(60);
    }
    for round in 0..rounds {
        let sent = count_tx(tx, &mut burst);
        // All that the device does for a burst, so that the driver finds whole ones.
        for _ in 0..4 {
            port.device().step();
        }
        let received = count_rx(rx, &mut burst);
        if (sent, received) != (BURST, BURST) {
            return Err(format!("round {round}: {sent} sent, {received} received").into());
        }
    }
    Ok(())
}
