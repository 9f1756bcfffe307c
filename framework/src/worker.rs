//! Threads that poll: pinned, named, counted, stopped between two loops, and heard of when they panic.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use core_affinity::CoreId;
use crossbeam::utils::CachePadded;
use underpass_iommu::{Error, ErrorKind, Result};

use crate::pool::Slot;

/// The cores that this process may run on, ascending. Listed once: a pinned thread would see its own core alone.
pub fn cores() -> &'static [usize] {
    static CORES: LazyLock<Vec<usize>> = LazyLock::new(|| {
        let mut cores: Vec<_> =
            core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
        cores.sort_unstable();
        cores
    });
    &CORES
}

/// Checks that a worker can be pinned to `core`.
///
/// # Errors
/// [`ErrorKind::NotFound`], listing the cores there are.
pub fn check_core(core: usize) -> Result<()> {
    if cores().contains(&core) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::NotFound,
        format!("pin a worker to core {core}"),
        "there is no such core, or this process may not use it",
    )
    .mend(format!("use one of {}", Ranges(cores()))))
}

/// Numbers in ascending order as people write them: "0-3,8".
struct Ranges<'a>(&'a [usize]);

impl fmt::Display for Ranges<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, run) in self.0.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

/// What one call of a worker's body did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// There was something to do.
    Busy,
    /// There was nothing to do.
    Idle,
    /// It will never have anything to do again: the worker ends.
    Finished,
}

/// How a worker spends the time when there is nothing to do. None of them needs to be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Idle {
    /// Polls on at once: the least latency, and the core's whole power.
    Busy,
    /// Tells the CPU that it spins (PAUSE), which leaves more to a sibling hyper-thread.
    Pause,
    /// Spins for about 20 µs, then yields to other threads, then sleeps: from 50 µs doubling up to 1 ms.
    #[default]
    Adaptive,
}

/// Carries out an [`Idle`] strategy.
#[derive(Debug)]
pub struct Idler {
    strategy: Idle,
    /// Calls since the last work, for Adaptive.
    calls: u32,
}

impl Idler {
    /// PAUSE takes 40 to 140 cycles and a look at an empty queue about as long: together some 20 µs.
    const SPINS: u32 = 256;
    /// A yield takes about 1 µs where nobody else wants the core.
    const YIELDS: u32 = 128;
    const FIRST_SLEEP: Duration = Duration::from_micros(50);
    const LONGEST_SLEEP: Duration = Duration::from_millis(1);

    /// One that has not idled yet.
    pub const fn new(strategy: Idle) -> Self {
        Self { strategy, calls: 0 }
    }

    /// There was work: starts over with spinning.
    #[inline]
    pub fn reset(&mut self) {
        self.calls = 0;
    }

    /// There was none.
    #[inline]
    pub fn idle(&mut self) {
        match self.strategy {
            Idle::Busy => {}
            Idle::Pause => std::hint::spin_loop(),
            Idle::Adaptive => self.adapt(),
        }
    }

    fn adapt(&mut self) {
        let calls = self.calls;
        self.calls = calls.saturating_add(1);
        if calls < Self::SPINS {
            std::hint::spin_loop();
        } else if calls < Self::SPINS + Self::YIELDS {
            thread::yield_now();
        } else {
            thread::sleep(Self::sleep_after(calls - Self::SPINS - Self::YIELDS));
        }
    }

    fn sleep_after(sleeps: u32) -> Duration {
        // 50 µs * 2^5 is over the longest already.
        (Self::FIRST_SLEEP * (1 << sleeps.min(5))).min(Self::LONGEST_SLEEP)
    }
}

/// Counters of one worker, on cache lines of their own. The worker writes them, anybody reads.
#[derive(Debug, Default)]
pub struct WorkerCounters(CachePadded<CounterWords>);

#[derive(Debug, Default)]
struct CounterWords {
    loops: AtomicU64,
    idle_loops: AtomicU64,
    items: AtomicU64,
}

impl WorkerCounters {
    /// For the worker alone (a single writer needs no locked instruction): counts items that it handled.
    #[inline]
    pub fn add_items(&self, items: u64) {
        add(&self.0.items, items);
    }

    /// Times that the body was called.
    pub fn loops(&self) -> u64 {
        self.0.loops.load(Ordering::Relaxed)
    }

    /// Times that it found nothing to do.
    pub fn idle_loops(&self) -> u64 {
        self.0.idle_loops.load(Ordering::Relaxed)
    }

    /// Items that the body counted.
    pub fn items(&self) -> u64 {
        self.0.items.load(Ordering::Relaxed)
    }
}

#[inline]
fn add(word: &AtomicU64, delta: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
}

/// How a worker is set up.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name, for messages. The kernel shows 15 bytes of it, the last ones where it is longer.
    pub name: String,
    /// The core that it is pinned to; `None` leaves it to the scheduler.
    pub core: Option<usize>,
    /// What it does when there is nothing to do.
    pub idle: Idle,
}

/// What a worker's body knows of its worker.
#[derive(Debug)]
pub struct Context {
    shared: Arc<Shared>,
}

impl Context {
    /// The worker's counters.
    #[inline]
    pub fn counters(&self) -> &WorkerCounters {
        &self.shared.counters
    }

    /// The worker's full name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The core that it is pinned to.
    pub fn core(&self) -> Option<usize> {
        self.shared.core
    }
}

#[derive(Debug)]
struct Shared {
    name: String,
    core: Option<usize>,
    stop: AtomicBool,
    panic: OnceLock<String>,
    counters: Arc<WorkerCounters>,
}

/// A thread that calls its body again and again until it is stopped, finishes or panics. It has a [`Slot`] of its own, so
/// that pools are fast in its body. Dropping it stops and joins.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a worker. It is pinned when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a core that does not exist, listing those that do; the operating system's refusal
    /// to pin or to start the thread.
    pub fn spawn(config: WorkerConfig, body: impl FnMut(&Context) -> Work + Send + 'static) -> Result<Self> {
        let WorkerConfig { name, core, idle } = config;
        // This also keeps ids of 1024 and more, on which core_affinity aborts, away from it: no such core is listed.
        core.map_or(Ok(()), check_core)?;
        let thread_name = kernel_name(&name);
        let shared = Arc::new(Shared {
            name,
            core,
            stop: AtomicBool::new(false),
            panic: OnceLock::new(),
            counters: Arc::default(),
        });
        let (pinned, confirmed) = mpsc::sync_channel(1);
        let context = Context { shared: Arc::clone(&shared) };
        let thread = thread::Builder::new()
            .name(thread_name)
            .spawn(move || {
                let ok = core.is_none_or(|id| core_affinity::set_for_current(CoreId { id }));
                // The receiver waits for exactly this.
                let _ = pinned.send(ok);
                if ok {
                    // Given back after `run` has dropped the body, and what packets that had.
                    let _slot = Slot::claim();
                    run(&context, idle, body);
                }
            })
            .map_err(|error| {
                Error::os(format!("start worker {}", shared.name), "no thread could be made", error)
            })?;
        let worker = Self { shared, thread: Some(thread) };
        if confirmed.recv() == Ok(true) {
            return Ok(worker);
        }
        Err(Error::new(
            ErrorKind::Os,
            format!("start worker {}", worker.shared.name),
            format!("the kernel did not pin it to core {}", core.unwrap_or_default()),
        )
        .mend("check the cpuset of this process: cat /proc/self/status"))
    }

    /// Its full name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The core that it is pinned to.
    pub fn core(&self) -> Option<usize> {
        self.shared.core
    }

    /// Asks it to end after the current call of its body. Returns at once.
    pub fn stop(&self) {
        // Relaxed: the flag carries nothing but itself; what the body did is handed over by join.
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Waits for its end: after [`stop`](Self::stop), [`Work::Finished`] or a panic.
    ///
    /// # Errors
    /// [`ErrorKind::Gone`] if its body panicked, with its name and the panic's message.
    pub fn join(mut self) -> Result<()> {
        self.wait();
        self.failure().map_or(Ok(()), Err)
    }

    /// The error that [`join`](Self::join) would return, once its body has panicked.
    pub fn failure(&self) -> Option<Error> {
        let message = self.shared.panic.get()?;
        let error =
            Error::new(ErrorKind::Gone, format!("run worker {}", self.shared.name), panicked(message));
        Some(error.mend("start another; the panic is a bug in what it ran"))
    }

    /// Its counters, which may be read while it works.
    pub fn counters(&self) -> Arc<WorkerCounters> {
        Arc::clone(&self.shared.counters)
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn wait(&mut self) {
        if let Some(Err(payload)) = self.thread.take().map(JoinHandle::join) {
            self.shared.panic.get_or_init(|| panic_message(&*payload));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
        self.wait();
    }
}

/// The loop itself, and what becomes of a panic in it.
fn run(context: &Context, idle: Idle, mut body: impl FnMut(&Context) -> Work) {
    let shared = &context.shared;
    let polling = catch_unwind(AssertUnwindSafe(|| {
        let mut idler = Idler::new(idle);
        while !shared.stop.load(Ordering::Relaxed) {
            add(&shared.counters.0.loops, 1);
            match body(context) {
                Work::Busy => idler.reset(),
                Work::Idle => {
                    add(&shared.counters.0.idle_loops, 1);
                    idler.idle();
                }
                Work::Finished => break,
            }
        }
    }));
    // What the body owns is dropped here, on its core; a panic in that is reported like any other.
    let dropping = catch_unwind(AssertUnwindSafe(move || drop(body)));
    if let Err(payload) = polling.and(dropping) {
        let message = panic_message(&*payload);
        tracing::error!("worker {} {}", shared.name, panicked(&message));
        shared.panic.get_or_init(|| message);
    }
}

fn panicked(message: &str) -> String {
    format!("it panicked: {message}")
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("(no message)").to_owned()
}

/// The last 15 bytes of `name`, whole characters, as the kernel takes them: the number of a thread is at the end.
fn kernel_name(name: &str) -> String {
    let start = (name.len().saturating_sub(15)..=name.len()).find(|&at| name.is_char_boundary(at));
    name[start.unwrap_or(0)..].replace('\0', "")
}

#[cfg(test)]
mod tests;
