//! Starting and stopping: from a plan to queues that are lent out, and back.

use std::iter;
use std::mem;
use std::sync::Arc;

use underpass::dma::DmaBuf;
use underpass::net::{Config, Counters, RxQueue, Started, TxQueue};
use underpass::pool::HEADROOM;
use underpass::{Access, Error, ErrorKind, Packet, Pool, Region, Result};

use super::VirtioNet;
use super::control::{self, Control, ControlQueue};
use super::lease::{AnyHome, Home, Status};
use super::offer::Plan;
use super::rx::{RxParts, RxRing};
use super::transport::{Notifier, QueueSetup, nonsense};
use super::tx::{MAX_HEADER, TxParts, TxRing};
use super::virtqueue::{PackedQueue, Setup, SplitQueue, Virtqueue};
use crate::virtio_net::spec::control::Command;
use crate::virtio_net::spec::{Features, net};

/// A started port.
pub(super) struct Running {
    pub plan: Plan,
    pub queues: Vec<Queue>,
    control: Option<Box<dyn ControlQueue>>,
    memory: Arc<Region>,
    headers: Pool,
}

/// One queue, lent out or not.
pub(super) struct Queue {
    pub name: String,
    pub status: Arc<Status>,
    /// Why it broke down was told.
    pub reported: bool,
    home: Arc<dyn AnyHome>,
}

impl Running {
    pub(super) fn quiesce(&self) {
        self.queues.iter().for_each(|queue| queue.status.quiesce());
    }

    /// How many queues are lent out.
    pub(super) fn lent(&self) -> usize {
        self.queues.iter().filter(|queue| queue.home.is_out()).count()
    }
}

/// Hands out ring memory, queue by queue.
struct Memory(DmaBuf);

impl Memory {
    fn take(&mut self, len: usize) -> DmaBuf {
        let mut piece = self.0.split_to(padded(len));
        drop(piece.split_off(len));
        piece
    }
}

fn padded(len: usize) -> usize {
    len.next_multiple_of(64)
}

/// What all queues of a plan are set up with.
struct Setups {
    rx: Setup,
    tx: Setup,
    control: Setup,
}

impl Setups {
    fn of(plan: &Plan) -> Self {
        let setup = |size, max_chain| Setup { size, features: plan.features, max_chain };
        Self {
            rx: setup(plan.rx_depth, 1),
            tx: setup(plan.tx_depth, plan.max_chain),
            control: setup(control::DEPTH, control::CHAIN),
        }
    }

    /// Bytes of memory for all rings and commands.
    fn memory_len<Q: Virtqueue<Token = Packet>, C: Virtqueue<Token = ()>>(&self, plan: &Plan) -> usize {
        padded(Q::memory_len(&self.rx)) * usize::from(plan.rx_queues)
            + padded(Q::memory_len(&self.tx)) * usize::from(plan.tx_rings())
            + padded(C::memory_len(&self.control))
            + control::MEMORY
    }
}

impl VirtioNet {
    /// Brings the device up for `plan`. What an error leaves behind, [`halt`](Self::halt) takes down.
    pub(super) fn bring_up(&mut self, config: &Config, plan: Plan) -> Result<Started> {
        if plan.features.contains(Features::RING_PACKED) {
            self.bring_up_with::<PackedQueue<Packet>, PackedQueue<()>>(config, plan)
        } else {
            self.bring_up_with::<SplitQueue<Packet>, SplitQueue<()>>(config, plan)
        }
    }

    fn bring_up_with<Q, C>(&mut self, config: &Config, plan: Plan) -> Result<Started>
    where
        Q: Virtqueue<Token = Packet> + Send + 'static,
        C: Virtqueue<Token = ()> + Send + 'static,
    {
        let setups = Setups::of(&plan);
        let headers = Pool::builder(usize::from(plan.tx_depth) * usize::from(plan.tx_rings()))
            .buffer_len(HEADROOM + MAX_HEADER.next_multiple_of(64) as u32)
            .cache(0)
            .name("virtio-net headers")
            .numa_node(self.device.numa_node())
            .build()?;
        let mut region = Region::builder(setups.memory_len::<Q, C>(&plan) as u64).name("virtio-net");
        if let Some(node) = self.device.numa_node() {
            region = region.numa_node(node);
        }
        let memory = region.build()?;
        let space = self.space_mut()?;
        space.map(headers.region(), Access::READ)?;
        if let Err(error) = space.map(&memory, Access::READ_WRITE) {
            space.unmap(headers.region())?;
            return Err(error);
        }
        let mut rings = Memory(DmaBuf::new(Arc::clone(&memory))?);
        let running = Running { plan, queues: Vec::new(), control: None, memory, headers };
        // From here on there is something to take down.
        let running = self.running.insert(running);
        let plan = &running.plan;

        self.transport.reset()?;
        self.transport.accept(plan.features)?;
        let interrupts = if config.interrupts && self.offer.info().interrupts {
            self.device.interrupts(plan.rx_queues.into())?
        } else {
            Vec::new()
        };
        let mut interrupts = interrupts.into_iter().map(Some).chain(iter::repeat_with(|| None));
        let mut started =
            Started { rx: Vec::new(), tx: Vec::new(), offloads: plan.offloads, mtu: plan.mtu };
        let enable = |index, queue: Setup, areas, vector| -> Result<Notifier> {
            let setup = QueueSetup { index, size: queue.size, areas, vector };
            self.transport.enable_queue(&setup, queue.features)
        };
        for n in 0..plan.rx_queues {
            let queue = Q::new(rings.take(Q::memory_len(&setups.rx)), &self.space, &setups.rx)?;
            let interrupt = interrupts.next().flatten();
            let vector = interrupt.as_ref().map(|_| n);
            let notifier = enable(net::receive_queue(n), setups.rx, queue.areas(), vector)?;
            let status = Arc::<Status>::default();
            let ring = RxRing::new(
                queue,
                RxParts {
                    space: Arc::clone(&self.space),
                    pool: config.pools[usize::from(n) % config.pools.len()].clone(),
                    notifier,
                    counters: counters(&mut self.counters.0, n),
                    status: Arc::clone(&status),
                    device: Arc::clone(&self.device),
                    interrupt,
                    offloads: plan.offloads,
                    header_len: plan.header_len(),
                    max_frame: plan.max_rx,
                    port: config.port,
                    index: n,
                },
            );
            let home = Home::new(ring);
            started.rx.extend(home.lend().map(|lease| Box::new(lease) as Box<dyn RxQueue>));
            let name = format!("receive queue {n}");
            running.queues.push(Queue { name, status, reported: false, home });
        }
    }
}
