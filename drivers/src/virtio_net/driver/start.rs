//! Starting and stopping: from a plan to queues that are lent out, and back.

use std::iter;
use std::mem;
use std::sync::Arc;

use underpass::dma::{DmaBuf, DmaSpace, in_one_page};
use underpass::net::toeplitz::DEFAULT_KEY;
use underpass::net::{Config, Counters, MIN_FRAME, RxQueue, Started, TxQueue};
use underpass::pool::HEADROOM;
use underpass::{Access, Error, ErrorKind, Packet, Pool, Region, Result};

use super::VirtioNet;
use super::control::{self, Control, ControlQueue};
use super::lease::{AnyHome, Home, Lease, Ring, Status};
use super::offer::Plan;
use super::rx::{RxParts, RxRing};
use super::transport::{Notifier, QueueSetup, nonsense};
use super::tx::{MAX_FRONT, TxParts, TxRing};
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

/// Hands out ring memory, queue by queue, each in one piece for the device.
struct Memory(DmaBuf);

impl Memory {
    fn take(&mut self, len: usize) -> DmaBuf {
        let at = self.0.offset();
        drop(self.0.split_to(in_one_page(at, padded(len)) - at));
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

    /// Bytes of memory for all rings and commands, which are [taken](Memory::take) in this order.
    fn memory_len<Q: Virtqueue<Token = Packet>, C: Virtqueue<Token = ()>>(&self, plan: &Plan) -> usize {
        let rx = iter::repeat_n(Q::memory_len(&self.rx), plan.rx_queues.into());
        let tx = iter::repeat_n(Q::memory_len(&self.tx), plan.tx_rings().into());
        let control = [C::memory_len(&self.control), control::MEMORY];
        rx.chain(tx).chain(control).map(padded).fold(0, |at, len| in_one_page(at, len) + len)
    }
}

impl VirtioNet {
    /// Brings the device up for `plan`. What an error leaves behind, [`halt`](Self::halt) takes down.
    pub(super) fn bring_up(&mut self, config: &Config, plan: &Plan) -> Result<Started> {
        if plan.features.contains(Features::RING_PACKED) {
            self.bring_up_with::<PackedQueue<Packet>, PackedQueue<()>>(config, plan)
        } else {
            self.bring_up_with::<SplitQueue<Packet>, SplitQueue<()>>(config, plan)
        }
    }

    fn bring_up_with<Q, C>(&mut self, config: &Config, plan: &Plan) -> Result<Started>
    where
        Q: Virtqueue<Token = Packet> + Send + 'static,
        C: Virtqueue<Token = ()> + Send + 'static,
    {
        let setups = Setups::of(plan);
        let (mut memory, headers) = self.prepare(plan.clone(), setups.memory_len::<Q, C>(plan))?;
        self.transport.reset()?;
        self.transport.accept(plan.features)?;
        let rx = self.receive_queues::<Q>(config, plan, &setups.rx, &mut memory)?;
        let tx = self.transmit_queues::<Q>(plan, &setups.tx, &mut memory, &headers)?;
        let control = self.control_queue::<C>(plan, &setups.control, &mut memory)?;
        self.transport.go();
        if let Some(running) = &mut self.running {
            running.control = control;
        }
        self.apply(plan)?;
        // Queues are notified only now that the device may use them.
        let mut rx: Vec<_> = rx.iter().filter_map(Home::lend).collect();
        rx.iter_mut().filter_map(Lease::ring_mut).for_each(RxRing::refill);
        Ok(Started {
            rx: rx.into_iter().map(|queue| Box::new(queue) as Box<dyn RxQueue>).collect(),
            tx: tx.iter().filter_map(Home::lend).map(|queue| Box::new(queue) as Box<dyn TxQueue>).collect(),
            offloads: plan.offloads,
            mtu: plan.mtu,
        })
    }

    /// Makes the memory that the plan needs, and buffers for headers. From here on there is something to take down.
    fn prepare(&mut self, plan: Plan, len: usize) -> Result<(Memory, Pool)> {
        let node = self.device.numa_node();
        let headers = Pool::builder(usize::from(plan.tx_depth) * usize::from(plan.tx_rings()))
            .buffer_len(HEADROOM + MAX_FRONT as u32)
            .cache(0)
            .name("virtio-net headers")
            .numa_node(node)
            .build()?;
        let mut region = Region::builder(len as u64).name("virtio-net");
        if let Some(node) = node {
            region = region.numa_node(node);
        }
        let memory = region.build()?;
        let rings = Memory(DmaBuf::new(Arc::clone(&memory))?);
        let space = self.space_mut()?;
        space.map(headers.region(), Access::READ)?;
        if let Err(error) = space.map(&memory, Access::READ_WRITE) {
            space.unmap(headers.region())?;
            return Err(error);
        }
        let running = Running { plan, queues: Vec::new(), control: None, memory, headers: headers.clone() };
        self.running = Some(running);
        Ok((rings, headers))
    }

    /// Queues of a device may differ, and what it can do is told by the first of each kind.
    fn check_depth(&self, index: u16, depth: u16, config: &str) -> Result<()> {
        let most = self.transport.max_queue_size(index);
        if depth <= most {
            return Ok(());
        }
        let why = format!("queue {index} has {most} entries, and {depth} are asked for");
        let mend = match most.checked_ilog2() {
            Some(log) => format!("set Config::{config} to at most {}", 1_u16 << log),
            None => "start it with fewer queues".to_owned(),
        };
        Err(Error::new(ErrorKind::InvalidInput, "start it", why).mend(mend))
    }

    fn enable(
        &self,
        index: u16,
        setup: &Setup,
        queue: &impl Virtqueue,
        vector: Option<u16>,
    ) -> Result<Notifier> {
        let queue = QueueSetup { index, size: setup.size, areas: queue.areas(), vector };
        self.transport.enable_queue(&queue, setup.features)
    }

    fn receive_queues<Q: Virtqueue<Token = Packet> + Send + 'static>(
        &mut self,
        config: &Config,
        plan: &Plan,
        setup: &Setup,
        memory: &mut Memory,
    ) -> Result<Vec<Arc<Home<RxRing<Q>>>>> {
        let interrupts =
            if config.interrupts { self.device.interrupts(plan.rx_queues.into())? } else { Vec::new() };
        let interrupts = interrupts.into_iter().map(Some).chain(iter::repeat_with(|| None));
        let mut homes = Vec::new();
        for (n, interrupt) in (0..plan.rx_queues).zip(interrupts) {
            self.check_depth(net::receive_queue(n), setup.size, "rx_depth")?;
            let queue = Q::new(memory.take(Q::memory_len(setup)), &self.space, setup)?;
            let vector = interrupt.as_ref().map(|_| n);
            let parts = RxParts {
                space: Arc::clone(&self.space),
                pool: config.pools[usize::from(n) % config.pools.len()].clone(),
                notifier: self.enable(net::receive_queue(n), setup, &queue, vector)?,
                counters: counters(&mut self.counters.0, n),
                status: Arc::default(),
                device: Arc::clone(&self.device),
                interrupt,
                offloads: plan.offloads,
                header_len: plan.header_len(),
                max_frame: plan.max_rx,
                port: config.port,
                index: n,
            };
            let status = Arc::clone(&parts.status);
            homes.push(self.settle(format!("receive queue {n}"), status, RxRing::new(queue, parts)));
        }
        Ok(homes)
    }

    /// Those that are to be lent out.
    fn transmit_queues<Q: Virtqueue<Token = Packet> + Send + 'static>(
        &mut self,
        plan: &Plan,
        setup: &Setup,
        memory: &mut Memory,
        headers: &Pool,
    ) -> Result<Vec<Arc<Home<TxRing<Q>>>>> {
        let mut homes = Vec::new();
        for n in 0..plan.tx_rings() {
            self.check_depth(net::transmit_queue(n), setup.size, "tx_depth")?;
            let queue = Q::new(memory.take(Q::memory_len(setup)), &self.space, setup)?;
            let parts = TxParts {
                space: Arc::clone(&self.space),
                headers: headers.clone(),
                notifier: self.enable(net::transmit_queue(n), setup, &queue, None)?,
                counters: if n < plan.tx_queues { counters(&mut self.counters.1, n) } else { Arc::default() },
                status: Arc::default(),
                device: Arc::clone(&self.device),
                offloads: plan.offloads,
                indirect: plan.features.contains(Features::INDIRECT_DESC),
                header_len: plan.header_len(),
                max_frame: usize::from(plan.mtu) + MIN_FRAME,
                max_chain: plan.max_chain,
                index: n,
            };
            let status = Arc::clone(&parts.status);
            homes.push(self.settle(format!("transmit queue {n}"), status, TxRing::new(queue, parts)));
        }
        homes.truncate(plan.tx_queues.into());
        Ok(homes)
    }

    /// Gives a ring its home.
    fn settle<R: Ring + 'static>(&mut self, name: String, status: Arc<Status>, ring: R) -> Arc<Home<R>> {
        let home = Home::new(ring);
        if let Some(running) = &mut self.running {
            let home = Arc::clone(&home);
            running.queues.push(Queue { name, status, reported: false, home });
        }
        home
    }

    fn control_queue<C: Virtqueue<Token = ()> + Send + 'static>(
        &self,
        plan: &Plan,
        setup: &Setup,
        memory: &mut Memory,
    ) -> Result<Option<Box<dyn ControlQueue>>> {
        if !plan.features.contains(Features::CTRL_VQ) {
            return Ok(None);
        }
        let pairs =
            if plan.features.intersects(Features::MQ | Features::RSS) { self.offer.max_pairs } else { 1 };
        let index = net::control_queue(pairs)
            .ok_or_else(|| nonsense("max_virtqueue_pairs", "no index is left for the control queue"))?;
        // The largest power of two that it has, up to what there is memory for.
        let has = self.transport.max_queue_size(index);
        let size = has.min(setup.size).checked_ilog2().map_or(0, |log| 1 << log);
        if size < control::CHAIN {
            let why = format_args!("it has {has} entries, and a command takes {}", control::CHAIN);
            return Err(nonsense(format_args!("queue {index}, the control queue"), why));
        }
        let setup = &Setup { size, ..*setup };
        let queue = C::new(memory.take(C::memory_len(setup)), &self.space, setup)?;
        let notifier = self.enable(index, setup, &queue, None)?;
        let commands = memory.take(control::MEMORY);
        let control =
            Control::new(queue, notifier, commands, Arc::clone(&self.space), Arc::clone(&self.device));
        Ok(Some(Box::new(control)))
    }

    /// Tells a device that has just begun to work how to distribute packets, and what to receive.
    fn apply(&mut self, plan: &Plan) -> Result<()> {
        let has = |feature| plan.features.contains(feature);
        if let Some(rss) = &plan.rss {
            self.send_rss(rss)?;
        } else {
            if has(Features::MQ) {
                let pairs = plan.rx_queues.to_le_bytes();
                self.command("use several queues", Command::MQ_VQ_PAIRS_SET, &pairs)?;
            }
            if has(Features::HASH_REPORT) {
                let data = control::hash_config(&DEFAULT_KEY, self.offer.hash_types);
                self.command("report hashes", Command::MQ_HASH_CONFIG, &data)?;
            }
        }
        let filters = self.filters.clone();
        if has(Features::CTRL_MAC_ADDR) && filters.mac != self.offer.mac {
            self.send_mac(filters.mac)?;
        }
        if has(Features::CTRL_RX) {
            self.send_promiscuous(filters.promiscuous)?;
            self.send_all_multicast(filters.all_multicast)?;
            if !filters.addresses.is_empty() {
                self.send_mac_filter(&filters.addresses)?;
            }
        }
        if has(Features::CTRL_VLAN) {
            filters.vlans.iter().try_for_each(|vlan| self.send_vlan(*vlan, true))?;
        }
        Ok(())
    }

    /// Has the device do a command that has no result.
    pub(super) fn command(&mut self, what: &'static str, command: Command, data: &[u8]) -> Result<()> {
        self.ask(what, command, data, 0).map(|_| ())
    }

    /// Has the device do a command with a result of `len` bytes.
    pub(super) fn ask(
        &mut self,
        what: &'static str,
        command: Command,
        data: &[u8],
        len: usize,
    ) -> Result<&[u8]> {
        match self.running.as_mut().and_then(|running| running.control.as_mut()) {
            Some(control) => control.command(&self.transport, what, command, data, len),
            None => Err(Error::new(ErrorKind::Unsupported, what, "the device has no control queue")
                .mend("do without it, or have the device offer CTRL_VQ")),
        }
    }

    /// Stops the device. All that was posted is back in its pools then, apart from what is on queues that are still lent
    /// out.
    pub(super) fn halt(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return self.unmap_started() };
        if let Err(error) = self.transport.reset() {
            self.is_gone = true;
            for queue in &running.queues {
                queue.home.leak();
            }
            running.memory.leak();
            tracing::error!("{}: it did not stop: its memory is leaked", self.device.name());
            let kept = (running, Arc::clone(&self.space), Arc::clone(&self.attachment));
            #[allow(clippy::mem_forget, reason = "the device's last write has no time")]
            mem::forget(kept);
            return Err(error);
        }
        let Running { queues, control, memory, headers, .. } = running;
        for queue in queues {
            queue.home.close();
        }
        drop(control);
        // A queue that is still lent out keeps the space as it is.
        if let Some(space) = Arc::get_mut(&mut self.space) {
            space.unmap(&memory)?;
            space.unmap(headers.region())?;
            self.unmap_started()?;
        }
        Ok(())
    }

    /// The space, to map and unmap: no queue has it.
    pub(super) fn space_mut(&mut self) -> Result<&mut DmaSpace> {
        Arc::get_mut(&mut self.space).ok_or_else(|| {
            Error::new(
                ErrorKind::Gone,
                "change what it can reach",
                "it did not stop, and may still use its memory",
            )
            .mend("open the device again")
        })
    }
}

/// The counters of queue `n`, which go on from an earlier start.
fn counters(all: &mut Vec<Arc<Counters>>, n: u16) -> Arc<Counters> {
    let n = usize::from(n);
    if all.len() <= n {
        all.resize_with(n + 1, Arc::default);
    }
    Arc::clone(&all[n])
}
