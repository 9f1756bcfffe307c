//! Submitting and polling, receiving and sending allocate nothing and call the system for nothing, after start. A lock
//! that somebody else holds would be a system call, too. Nor does the software device, which is watched where its
//! engines run on the thread that polls.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{c_int, c_ulong, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use underpass::accel::{Accelerator, Channel, Config, Done, Job, Op, Source};
use underpass::dma::DmaBuf;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::net::{self, Offloads, RxQueue, TxQueue};
use underpass::pci::{PciDevice, Run};
use underpass::{Access, Burst, Packet, Pool, Region, Transport, TxOffload};
use underpass_drivers::builtin;
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};
use underpass_drivers::dsa::{Dsa, WqMode};

/// Counts what this thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: it is the system's allocator; the counter beside it has no destructor and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: `ptr` came from `alloc` above with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the kernel looks at before each system call of the watched thread: 0 lets it pass, 1 makes it a signal.
static SELECTOR: AtomicU8 = AtomicU8::new(PASS);
const PASS: u8 = 0;
const SIGNAL: u8 = 1;

/// The number of the system call that was caught; -1 is none.
static CAUGHT: AtomicI32 = AtomicI32::new(-1);

/// One thread at a time is watched.
static WATCHED: Mutex<()> = Mutex::new(());

extern "C" fn caught(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // siginfo_t of SIGSYS: three ints, then the address of the call, then its number.
    const NUMBER: usize = 24;
    // Returning from this handler is a system call.
    SELECTOR.store(PASS, Ordering::Relaxed);
    // SAFETY: the kernel passes a valid siginfo_t, which is larger.
    let number = unsafe { info.cast::<u8>().add(NUMBER) };
    #[allow(clippy::cast_ptr_alignment, reason = "a siginfo_t is aligned to 8")]
    // SAFETY: there is an int at this offset (include/uapi/asm-generic/siginfo.h).
    CAUGHT.store(unsafe { number.cast::<c_int>().read() }, Ordering::Relaxed);
}

/// Switches the dispatch of this thread's system calls on or off (Documentation/admin-guide/syscall-user-dispatch.rst).
fn dispatch(on: bool) -> bool {
    const PR_SET_SYSCALL_USER_DISPATCH: c_int = 59;
    let selector = if on { SELECTOR.as_ptr() } else { ptr::null_mut() };
    let none: c_ulong = 0;
    // SAFETY: the selector is a static; no range of addresses is excepted.
    let result =
        unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, c_ulong::from(on), none, none, selector) };
    result == 0
}

/// What `work` did: allocations, and the first system call, if any.
fn watch(work: impl FnOnce()) -> (u64, Option<i32>) {
    let _one = WATCHED.lock().unwrap();
    let mut action: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();
    let fields = action.as_mut_ptr();
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = caught;
    // SAFETY: `fields` points to zeroes, which are a sigaction.
    let action = unsafe { &mut *fields };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler only stores to atomics, which a signal handler may.
    let installed = unsafe { libc::sigaction(libc::SIGSYS, action, ptr::null_mut()) };
    assert_eq!(installed, 0);
    assert!(dispatch(true), "the kernel has no syscall user dispatch: it came with Linux 5.11");
    CAUGHT.store(-1, Ordering::Relaxed);
    let before = ALLOCATIONS.get();
    SELECTOR.store(SIGNAL, Ordering::Relaxed);
    work();
    SELECTOR.store(PASS, Ordering::Relaxed);
    let allocations = ALLOCATIONS.get() - before;
    assert!(dispatch(false));
    (allocations, Some(CAUGHT.load(Ordering::Relaxed)).filter(|number| *number >= 0))
}

#[test]
fn the_watch_sees_allocations_and_system_calls() {
    let (allocations, call) = watch(|| drop(std::hint::black_box(Box::new(5))));
    assert_eq!((allocations, call), (2, None));
    let (allocations, call) = watch(|| {
        // SAFETY: it takes nothing and touches nothing.
        unsafe { libc::getppid() };
    });
    assert_eq!((allocations, call), (0, Some(libc::SYS_getppid as i32)));
}

const BATCH: usize = 8;
const SIZE: usize = 2048;
const JOBS: u64 = 5000;

/// A job on two buffers, of a kind that goes with `turn`; some read `shared`.
fn job(turn: usize, a: DmaBuf, b: DmaBuf, shared: &Arc<DmaBuf>) -> Job {
    Job::new(match turn % 4 {
        0 => Op::Copy { src: a.into(), dst: b },
        1 => Op::CopyCrc { src: a.into(), dst: b, seed: 1 },
        2 => Op::Compare { a: a.into(), b: b.into() },
        _ => Op::Dualcast { src: Arc::clone(shared).into(), dst1: a, dst2: b },
    })
}

/// Takes a job's buffers back.
fn recycle(job: Job, free: &mut Vec<DmaBuf>) {
    match job.op {
        Op::Copy { src: Source::Owned(a), dst: b }
        | Op::CopyCrc { src: Source::Owned(a), dst: b, .. }
        | Op::Compare { a: Source::Owned(a), b: Source::Owned(b) }
        | Op::Dualcast { dst1: a, dst2: b, .. } => free.extend([a, b]),
        _ => {}
    }
}

fn poll(channel: &mut dyn Channel, done: &mut Burst<Done>, free: &mut Vec<DmaBuf>, step: &dyn Fn()) {
    step();
    channel.poll(done);
    done.drain_all().for_each(|done| recycle(done.job, free));
}

/// Many jobs, single and in batches, with a queue that is full at times.
fn run(
    channel: &mut dyn Channel,
    free: &mut Vec<DmaBuf>,
    shared: &Arc<DmaBuf>,
    jobs: &mut Burst<Job>,
    done: &mut Burst<Done>,
    step: &dyn Fn(),
) {
    let mut turn = 0;
    while channel.counters().values().jobs < JOBS {
        turn += 1;
        if turn % 3 == 0 {
            while !jobs.is_full() && free.len() >= 2 {
                let (Some(a), Some(b)) = (free.pop(), free.pop()) else { return };
                let _ = jobs.push(job(jobs.len(), a, b, shared));
            }
            // Refused jobs stay for the next turn.
            let _ = channel.submit_batch(jobs);
        } else if let (Some(a), Some(b)) = (free.pop(), free.pop())
            && let Err(rejected) = channel.submit(job(turn, a, b, shared))
        {
            recycle(rejected.job, free);
        }
        poll(channel, done, free, step);
    }
    while channel.outstanding() != 0 {
        poll(channel, done, free, step);
    }
}

fn quiet(address: &str) {
    quiet_jobs(address, &mut *builtin().open(address).unwrap(), |_| {});
}

fn quiet_jobs<A: Accelerator + ?Sized>(name: &str, device: &mut A, step: fn(&A)) {
    let deadline = Some(Duration::from_secs(60));
    let mut channels =
        device.channels(&Config { depth: 16, batch: BATCH, deadline, ..Config::default() }).unwrap();
    let channel = &mut *channels[0];
    let region = Region::builder(1 << 20).build().unwrap();
    channel.map(&region, Access::READ_WRITE).unwrap();
    // Destinations of a dualcast must agree in the low bits of their addresses.
    let mut free: Vec<_> = DmaBuf::new(region)
        .unwrap()
        .into_chunks(4096)
        .into_iter()
        .map(|mut page| page.split_to(SIZE))
        .collect();
    let shared = free.pop().unwrap().freeze();
    let (mut jobs, mut done) = (Burst::with_capacity(BATCH), Burst::with_capacity(BATCH - 1));
    let (allocations, call) =
        watch(|| run(channel, &mut free, &shared, &mut jobs, &mut done, &|| step(device)));
    assert_eq!(allocations, 0, "{name}: allocations and deallocations");
    assert_eq!(call, None, "{name}: a system call");
    assert_eq!(channel.counters().values().failed, 0);
}

#[test]
fn the_data_path_is_quiet() {
    for address in ["soft:dsa", "soft:dsa,engines=2", "soft:dsa,mode=shared", "soft:dsa,pasids=0", "cpu"] {
        quiet(address);
    }
}

#[test]
fn the_software_device_is_quiet() {
    for mode in [WqMode::Dedicated, WqMode::Shared] {
        for engines in [1, 2] {
            let model = Box::new(DsaModel::new(DsaProfile { engines, ..DsaProfile::default() }));
            let iommu = SoftIommu::new(SoftOptions::default());
            let pci = PciDevice::in_process("soft:dsa", model, &iommu, Run::Stepped).unwrap();
            let mut dsa = Dsa::open(pci).unwrap().with_mode(mode);
            quiet_jobs(&format!("{mode:?}, {engines} engines, stepped"), &mut dsa, |dsa| {
                dsa.device().step();
            });
        }
    }
}

/// Packets there and back, in one segment and in several, plain and with offloads, over a full ring and with pools that
/// run dry; and packets that are dropped.
fn forward(
    rx: &mut dyn RxQueue,
    tx: &mut dyn TxQueue,
    [pool, foreign]: [&Pool; 2],
    offloads: Offloads,
    rounds: usize,
    [burst, held, hoard]: [&mut Burst<Packet>; 3],
) {
    for round in 0..rounds {
        let size = 1 + round % 48;
        pool.alloc_burst(size, burst);
        for (n, packet) in burst.iter_mut().enumerate() {
            let len = 60 + (round * 7 + n * 13) % 1400;
            let Some(bytes) = packet.append(len) else { return };
            bytes.fill(n as u8);
            match n % 6 {
                1 => {
                    if let Some(mut tail) = pool.alloc() {
                        let _ = tail.append(40);
                        packet.chain(tail);
                    }
                }
                // No room for a header before the packet.
                2 => drop(packet.prepend(packet.headroom())),
                3 if offloads.contains(Offloads::TX_CHECKSUM) => packet.set_tx_offload(Some(TxOffload {
                    l2_len: 14,
                    l3_len: 20,
                    l4_len: 8,
                    ipv6: false,
                    transport: Transport::Udp,
                    ip_checksum: false,
                    l4_checksum: true,
                    segment: 0,
                })),
                4 if offloads.contains(Offloads::TX_VLAN) => packet.set_vlan(Some(5)),
                _ => {}
            }
        }
        // A runt, and one that the port does not map.
        if round % 10 == 0 {
            let _ = pool.alloc().map(|packet| burst.push(packet));
            let _ = foreign.alloc().map(|mut packet| {
                let _ = packet.append(64);
                burst.push(packet)
            });
        }
        tx.tx_burst(burst);
        // What did not fit is dropped in one go.
        burst.clear();
        if round % 9 == 0 {
            // Nothing is left to receive into.
            pool.alloc_burst(hoard.room(), hoard);
        }
        rx.rx_burst(held);
        hoard.clear();
        if round % 5 == 0 {
            tx.reclaim();
        }
        if held.is_full() || round % 7 == 0 {
            held.clear();
        }
    }
    while tx.reclaim() != 0 {
        held.clear();
        rx.rx_burst(held);
    }
    held.clear();
}

fn quiet_packets(address: &str, offloads: Offloads) {
    let mut port = builtin().open_port(address).unwrap();
    let pool = Pool::builder(192).build().unwrap();
    let foreign = Pool::builder(16).build().unwrap();
    let config = net::Config { rx_depth: 64, tx_depth: 32, offloads, ..net::Config::new(&pool) };
    let mut started = port.start(&config).unwrap();
    let [mut burst, mut held, mut hoard] = [64, 160, 192].map(Burst::with_capacity);
    let mut run = |rounds| {
        let (rx, tx) = (&mut *started.rx[0], &mut *started.tx[0]);
        forward(rx, tx, [&pool, &foreign], started.offloads, rounds, [&mut burst, &mut held, &mut hoard]);
    };
    // The thread's first use of a pool gives it a cache, and a peer's first frames make room for the others.
    run(2000);
    let (allocations, call) = watch(|| run(5000));
    assert_eq!(allocations, 0, "{address}: allocations and deallocations");
    assert_eq!(call, None, "{address}: a system call");
    let (rx, tx) = port.counters();
    let (rx, tx) = (rx[0].values(), tx[0].values());
    assert!(rx.packets > 10_000 && rx.no_buffers > 0 && rx.dropped() == 0, "{address}: {rx:?}");
    assert!(tx.runts > 0 && tx.refused > 0 && tx.packets >= rx.packets, "{address}: {tx:?}");
    drop(started);
    port.stop().unwrap();
    assert_eq!((pool.available(), foreign.available()), (pool.capacity(), foreign.capacity()));
}

#[test]
fn the_packet_path_is_quiet() {
    let all = Offloads::RX_CHECKSUM | Offloads::TX_CHECKSUM | Offloads::RX_SCATTER | Offloads::TX_VLAN;
    for ring in ["split", "packed"] {
        for offloads in [Offloads::NONE, all] {
            quiet_packets(&format!("soft:virtio-net,ring={ring},queues=2"), offloads);
        }
    }
}
