//! How long a run goes: what workers and the command share.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What workers are to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Wait until all are there.
    Ready,
    /// Move packets.
    Running,
    /// Take no more; send what there is.
    Draining,
}

/// A run, from its begin to its end.
#[derive(Debug)]
pub(super) struct Run {
    phase: AtomicU8,
    began: OnceLock<Instant>,
    ended: OnceLock<Instant>,
    failed: OnceLock<usize>,
    limit: Option<Limit>,
}

/// So many packets, and no more.
#[derive(Debug)]
struct Limit {
    /// Not claimed by anybody.
    left: AtomicU64,
    /// Not yet received or made.
    missing: AtomicU64,
}

impl Run {
    /// One that ends after `packets`, if that is given.
    pub(super) fn new(packets: Option<u64>) -> Self {
        let limit =
            packets.map(|packets| Limit { left: AtomicU64::new(packets), missing: AtomicU64::new(packets) });
        Self {
            phase: AtomicU8::new(0),
            began: OnceLock::new(),
            ended: OnceLock::new(),
            failed: OnceLock::new(),
            limit,
        }
    }

    /// What to do now: one relaxed load.
    #[inline]
    pub(super) fn phase(&self) -> Phase {
        // Relaxed: the phase carries nothing but itself; what workers did is handed over when they are joined.
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Ready,
            1 => Phase::Running,
            _ => Phase::Draining,
        }
    }

    /// Lets all workers begin.
    pub(super) fn begin(&self) {
        self.began.get_or_init(Instant::now);
        self.phase.store(1, Ordering::Relaxed);
    }

    /// Lets all workers finish.
    pub(super) fn end(&self) {
        self.ended.get_or_init(Instant::now);
        self.phase.store(2, Ordering::Relaxed);
    }

    /// A queue of `port` has stopped working: there is nothing to go on with.
    pub(super) fn fail(&self, port: usize) {
        self.failed.get_or_init(|| port);
        self.end();
    }

    /// The port that failed first.
    pub(super) fn failed_port(&self) -> Option<usize> {
        self.failed.get().copied()
    }

    /// From begin to end, or until now.
    pub(super) fn time(&self) -> Duration {
        let Some(began) = self.began.get() else { return Duration::ZERO };
        self.ended.get().copied().unwrap_or_else(Instant::now) - *began
    }

    /// Asks for `count` packets to receive or make; returns how many it may be.
    #[inline]
    pub(super) fn claim(&self, count: usize) -> usize {
        let Some(limit) = &self.limit else { return count };
        let mut claimed = 0;
        let take = |left: u64| {
            claimed = left.min(count as u64);
            Some(left - claimed)
        };
        // It never refuses. Relaxed: counts alone.
        let _ = limit.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        claimed as usize
    }

    /// Of those [claimed](Self::claim) came `done`. The last one ends the run.
    #[inline]
    pub(super) fn settle(&self, claimed: usize, done: usize) {
        let Some(limit) = &self.limit else { return };
        limit.left.fetch_add((claimed - done) as u64, Ordering::Relaxed);
        if done != 0 && limit.missing.fetch_sub(done as u64, Ordering::Relaxed) == done as u64 {
            self.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn exactly_as_many_as_asked_for() {
        let run = Arc::new(Run::new(Some(100_003)));
        run.begin();
        let workers = (1..4).map(|n| {
            let run = Arc::clone(&run);
            thread::spawn(move || {
                let mut all = 0;
                for round in 0.. {
                    let claimed = run.claim(32);
                    // Others find less or nothing to do, now and then.
                    let done = if round % n == 0 { claimed } else { claimed / 3 };
                    run.settle(claimed, done);
                    all += done;
                    if run.phase() == Phase::Draining {
                        break;
                    }
                }
                all
            })
        });
        let workers: Vec<_> = workers.collect();
        let all: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert_eq!(all, 100_003);
        assert_eq!(run.claim(1), 0);
        let time = run.time();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(run.time(), time, "it is over");
    }

    #[test]
    fn without_a_limit_it_goes_on() {
        let run = Run::new(None);
        assert_eq!((run.phase(), run.time()), (Phase::Ready, Duration::ZERO));
        run.begin();
        assert_eq!(run.claim(32), 32);
        run.settle(32, 32);
        assert_eq!(run.phase(), Phase::Running);
        run.end();
        assert_eq!(run.phase(), Phase::Draining);
    }
}
