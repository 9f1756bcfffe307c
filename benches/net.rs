//! `forward` in mode io, without the application: what a worker does for one burst between two software ports, the devices
//! and their generators included, which the worker runs itself. Time a packet that crosses, one way.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use underpass::net::{Config, Port, RxQueue, TxQueue};
use underpass::pool::Slot;
use underpass::{Burst, Packet, Pool};

const BURST: usize = 32;

/// Two ports, from each of which one queue's packets go to the other.
struct Pair {
    lanes: [(Box<dyn RxQueue>, Box<dyn TxQueue>); 2],
    burst: Burst<Packet>,
    // After the queues, which go back to them.
    _ports: [Box<dyn Port>; 2],
}

impl Pair {
    fn new(ring: &str) -> underpass::Result<Self> {
        let address = format!("soft:virtio-net,peer=generator,size=64,ring={ring}");
        let registry = underpass_drivers::builtin();
        let mut ports = [registry.open_port(&address)?, registry.open_port(&address)?];
        let pools = [Pool::builder(4096).build()?, Pool::builder(4096).build()?];
        let mut queues = Vec::new();
        for (port, (own, other)) in ports.iter_mut().zip([(&pools[0], &pools[1]), (&pools[1], &pools[0])]) {
            port.map(other)?;
            let mut started = port.start(&Config::new(own))?;
            queues.push((started.rx.remove(0), started.tx.remove(0)));
        }
        let (second, first) = (queues.pop().expect("two"), queues.pop().expect("two"));
        let lanes = [(first.0, second.1), (second.0, first.1)];
        Ok(Self { lanes, burst: Burst::with_capacity(BURST), _ports: ports })
    }

    /// Forwards `count` packets.
    fn forward(&mut self, count: u64) {
        let mut sent = 0;
        while sent < count {
            for (rx, tx) in &mut self.lanes {
                rx.rx_burst(&mut self.burst);
                while !self.burst.is_empty() {
                    sent += tx.tx_burst(&mut self.burst) as u64;
                }
            }
        }
    }
}

fn forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("forward-io");
    group.throughput(Throughput::Elements(1));
    // As a worker has: a cache of its own in each pool.
    let _slot = Slot::claim();
    for ring in ["packed", "split"] {
        let mut pair = Pair::new(ring).expect("software ports need nothing");
        group.bench_function(ring, |bencher| {
            bencher.iter_custom(|packets| {
                let start = std::time::Instant::now();
                pair.forward(packets);
                start.elapsed()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
