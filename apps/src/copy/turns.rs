//! Measuring the device against memcpy, in turns within one run.
//!
//! The speed of one core's memcpy wanders by a tenth and more on a shared machine, so the two are never measured
//! one after the other: a turn is a slice of the jobs done by the device, the same bytes copied by memcpy over
//! the same buffers in the same order, and that once more; the order of the three rotates from turn to turn.
//! memcpy runs on the core that the device's engine uses, while the drivers' threads sleep. The two memcpy
//! figures of a turn tell how far any ratio of this run can be trusted.

use std::ops::Range;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use underpass::worker::{Idle, Work, Worker, WorkerConfig};
use underpass::{Error, ErrorKind, Result};

use super::lane::Lane;
use crate::interrupt::Stop;

/// Turns of a measurement, at least.
pub(crate) const MIN_TURNS: usize = 31;

/// Each part of a turn takes at least about this long, so that waking up does not count.
const SLICE: Duration = Duration::from_millis(6);

/// Outside of this, memcpy against itself is too far from 1 for any ratio to mean something.
const TRUSTED: std::ops::RangeInclusive<f64> = 0.95..=1.05;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Extent {
    /// So long in all, memcpy's turns included.
    Time(Duration),
    /// So many jobs, over all queues.
    Jobs(u64),
}

/// Which cores do what.
#[derive(Debug, Clone)]
pub(crate) struct Cores {
    /// Queue n's driver runs on entry n, modulo their number.
    pub(crate) drivers: Vec<usize>,
    pub(crate) memcpy: usize,
}

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// Jobs that each queue did.
    pub(crate) jobs: Vec<u64>,
    /// How long the device worked.
    pub(crate) seconds: f64,
    /// How long memcpy worked, for how many jobs' bytes.
    pub(crate) memcpy_seconds: f64,
    pub(crate) memcpy_jobs: u64,
    /// For each turn, how long each part took: the device, memcpy, memcpy again.
    pub(crate) turns: Vec<[f64; 3]>,
}

impl Measured {
    /// The speed of one memcpy relative to the other: the median over the turns.
    pub(crate) fn memcpy_to_memcpy(&self) -> Option<f64> {
        median(self.turns.iter().map(|[_, first, second]| first / second))
    }

    /// The device's speed relative to memcpy: the median over the turns. `None` if there were too few of them,
    /// or memcpy's speed wandered too much.
    pub(crate) fn ratio_to_memcpy(&self) -> Option<f64> {
        let trusted = self.turns.len() >= MIN_TURNS && TRUSTED.contains(&self.memcpy_to_memcpy()?);
        let ratios = self.turns.iter().map(|[device, first, second]| (first + second) / 2.0 / device);
        median(ratios).filter(|_| trusted)
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n.is_multiple_of(2) => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

/// A part of a turn, as the thread saw it that did it.
#[derive(Debug, Clone, Copy)]
struct Span {
    began: Instant,
    ended: Instant,
    jobs: u64,
}

/// A thread on a core of its own that does what it is told and sleeps in between.
struct Hand<Order> {
    orders: Sender<Order>,
    answers: Receiver<Result<Span>>,
    worker: Worker,
}

impl<Order: Send + 'static> Hand<Order> {
    fn spawn(
        name: String,
        core: usize,
        mut work: impl FnMut(Order) -> Result<Span> + Send + 'static,
    ) -> Result<Self> {
        let (orders, inbox) = mpsc::channel();
        let (outbox, answers) = mpsc::channel();
        let config = WorkerConfig { name, core: Some(core), idle: Idle::Adaptive };
        let worker = Worker::spawn(config, move |_| match inbox.recv_timeout(Duration::from_millis(100)) {
            Ok(order) => match outbox.send(work(order)) {
                Ok(()) => Work::Busy,
                Err(_) => Work::Finished,
            },
            Err(RecvTimeoutError::Timeout) => Work::Idle,
            Err(RecvTimeoutError::Disconnected) => Work::Finished,
        })?;
        Ok(Self { orders, answers, worker })
    }

    /// Starts it on something; [`answer`](Self::answer) waits for the end.
    fn order(&self, order: Order) {
        // A thread that is gone is found when its answer is missing.
        let _ = self.orders.send(order);
    }

    fn answer(&self) -> Result<Span> {
        self.answers.recv().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Gone, "finish the turn", "a worker thread ended early"))
        })
    }

    /// Ends the thread. A panic of it is told instead of what followed from it.
    fn join(self) -> Result<()> {
        drop(self.orders);
        self.worker.join()
    }
}

type Lanes = Arc<Vec<Mutex<Lane>>>;

struct Crew {
    drivers: Vec<Hand<Range<u64>>>,
    memcpy: Hand<Vec<Range<u64>>>,
}

impl Crew {
    fn new(lanes: &Lanes, cores: &Cores, stop: &Stop) -> Result<Self> {
        let mut drivers = Vec::with_capacity(lanes.len());
        for index in 0..lanes.len() {
            let (lanes, stop) = (Arc::clone(lanes), stop.clone());
            let core = cores.drivers[index % cores.drivers.len()];
            drivers.push(Hand::spawn(format!("queue{index}"), core, move |numbers: Range<u64>| {
                let mut lane = lanes[index].lock().unwrap_or_else(PoisonError::into_inner);
                // One job that does not count wakes up whatever sleeps in the device.
                let start = numbers.start;
                if !numbers.is_empty() {
                    lane.run(start..start + 1, &stop)?;
                }
                let began = Instant::now();
                let jobs = lane.run(numbers, &stop)?;
                Ok(Span { began, ended: Instant::now(), jobs })
            })?);
        }
        let lanes = Arc::clone(lanes);
        let memcpy = Hand::spawn("memcpy".to_owned(), cores.memcpy, move |numbers: Vec<Range<u64>>| {
            let mut lanes: Vec<_> =
                lanes.iter().map(|lane| lane.lock().unwrap_or_else(PoisonError::into_inner)).collect();
            let jobs = numbers.iter().map(|numbers| numbers.end - numbers.start).sum();
            let began = Instant::now();
            for (lane, numbers) in lanes.iter_mut().zip(numbers) {
                lane.memcpy(numbers);
            }
            Ok(Span { began, ended: Instant::now(), jobs })
        })?;
        Ok(Self { drivers, memcpy })
    }

    /// Has the device do these jobs, each queue its own: how long it took in all, and how many each queue did.
    fn device(&self, numbers: &[Range<u64>]) -> Result<(f64, Vec<u64>)> {
        for (hand, numbers) in self.drivers.iter().zip(numbers) {
            hand.order(numbers.clone());
        }
        // All answers are waited for before the first error is told: the threads then sleep again.
        let spans: Vec<_> = self.drivers.iter().map(Hand::answer).collect();
        let spans = spans.into_iter().collect::<Result<Vec<_>>>()?;
        let began = spans.iter().map(|span| span.began).min();
        let ended = spans.iter().map(|span| span.ended).max();
        let seconds = began.zip(ended).map_or(0.0, |(began, ended)| (ended - began).as_secs_f64());
        Ok((seconds, spans.iter().map(|span| span.jobs).collect()))
    }

    fn memcpy(&self, numbers: &[Range<u64>]) -> Result<(f64, u64)> {
        self.memcpy.order(numbers.to_vec());
        let span = self.memcpy.answer()?;
        Ok(((span.ended - span.began).as_secs_f64(), span.jobs))
    }

    fn join(self) -> Result<()> {
        let results: Vec<_> = self.drivers.into_iter().map(Hand::join).chain([self.memcpy.join()]).collect();
        results.into_iter().collect()
    }
}

/// Measures the lanes' jobs; `with_memcpy` unless they move no bytes. `progress` hears how much is done, 0 to 1.
pub(crate) fn measure(
    lanes: &Lanes,
    cores: &Cores,
    extent: Extent,
    batch: usize,
    with_memcpy: bool,
    stop: &Stop,
    progress: &mut dyn FnMut(f64),
) -> Result<Measured> {
    let crew = Crew::new(lanes, cores, stop)?;
    let measured = run(&crew, lanes, extent, batch as u64, with_memcpy, stop, progress);
    crew.join()?;
    measured
}

/// Which jobs each turn has.
struct Schedule {
    extent: Extent,
    queues: u64,
    /// Jobs of one queue in a turn, where the time decides how many turns there are.
    slice: u64,
    /// Turns, where the jobs decide it.
    turns: u64,
    batch: u64,
}

impl Schedule {
    /// Sees to it that each part of a turn takes as long as [`SLICE`], given that the faster of the two takes
    /// `seconds` for `circle` jobs of each queue.
    fn new(extent: Extent, circles: &[u64], seconds: f64, batch: u64) -> Self {
        let (queues, circle) = (circles.len() as u64, circles.iter().copied().max().unwrap_or(1));
        let slice = circle as f64 * SLICE.as_secs_f64() / seconds.max(1e-9);
        let slice = (slice.clamp(1.0, 1e12) as u64).next_multiple_of(batch);
        let turns = match extent {
            Extent::Time(_) => 0,
            Extent::Jobs(jobs) => (jobs / queues / slice).max(MIN_TURNS as u64),
        };
        Self { extent, queues, slice, turns, batch }
    }

    /// The numbers of the jobs that each queue does in a turn.
    fn turn(&self, turn: u64) -> Vec<Range<u64>> {
        let Extent::Jobs(jobs) = self.extent else {
            return vec![turn * self.slice..(turn + 1) * self.slice; self.queues as usize];
        };
        let of_queue = |queue| {
            let jobs = jobs / self.queues + u64::from(queue < jobs % self.queues);
            let before = |turn| {
                let even = (u128::from(jobs) * u128::from(turn) / u128::from(self.turns)) as u64;
                // Whole batches, but for the last one.
                if turn == self.turns { jobs } else { even / self.batch * self.batch }
            };
            before(turn)..before(turn + 1)
        };
        (0..self.queues).map(of_queue).collect()
    }

    /// How much is done before this turn, 0 to 1.
    fn done(&self, turn: u64, elapsed: Duration) -> f64 {
        match self.extent {
            Extent::Time(time) => {
                let by_time = elapsed.as_secs_f64() / time.as_secs_f64();
                by_time.min(turn as f64 / MIN_TURNS as f64).min(1.0)
            }
            Extent::Jobs(_) => turn as f64 / self.turns as f64,
        }
    }
}

fn run(
    crew: &Crew,
    lanes: &Lanes,
    extent: Extent,
    batch: u64,
    with_memcpy: bool,
    stop: &Stop,
    progress: &mut dyn FnMut(f64),
) -> Result<Measured> {
    let circles: Vec<u64> =
        lanes.iter().map(|lane| lane.lock().unwrap_or_else(PoisonError::into_inner).slots()).collect();
    let mut measured = Measured { jobs: vec![0; circles.len()], ..Measured::default() };

    // Once round, not counted: brings everything into the state in which it is measured, and tells how fast it is.
    let round: Vec<Range<u64>> = circles.iter().map(|circle| 0..*circle).collect();
    let mut fastest = crew.device(&round)?.0;
    if with_memcpy {
        fastest = fastest.min(crew.memcpy(&round)?.0);
    }
    let schedule = Schedule::new(extent, &circles, fastest, batch);

    let began = Instant::now();
    for turn in 0.. {
        let done = schedule.done(turn, began.elapsed());
        progress(done);
        if done >= 1.0 || stop.asked() {
            break;
        }
        let numbers = schedule.turn(turn);
        if numbers.iter().all(Range::is_empty) {
            continue;
        }
        let mut took = [0.0; 3];
        for step in 0..3 {
            let part = (step + turn as usize) % took.len();
            if part == 0 {
                let (seconds, jobs) = crew.device(&numbers)?;
                took[part] = seconds;
                measured.seconds += seconds;
                measured.jobs.iter_mut().zip(jobs).for_each(|(all, jobs)| *all += jobs);
            } else if with_memcpy && !stop.asked() {
                let (seconds, jobs) = crew.memcpy(&numbers)?;
                took[part] = seconds;
                measured.memcpy_seconds += seconds;
                measured.memcpy_jobs += jobs;
            }
        }
        // A turn that was cut short compares nothing.
        if with_memcpy && !stop.asked() {
            measured.turns.push(took);
        }
    }
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(turns: Vec<[f64; 3]>) -> Measured {
        Measured { turns, ..Measured::default() }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_turns() {
        let mut turns = vec![[2.0, 1.0, 1.0]; 30];
        turns.push([1000.0, 1.0, 1.0]);
        assert_eq!(measured(turns).ratio_to_memcpy(), Some(0.5));
    }

    #[test]
    fn a_schedule_has_each_job_once() {
        for (jobs, circles, batch) in [(1, &[8][..], 1), (997, &[64, 64], 32), (100_000, &[7, 7, 7], 4)] {
            let schedule = Schedule::new(Extent::Jobs(jobs), circles, 0.001, batch);
            let mut next = vec![0; circles.len()];
            for turn in 0..schedule.turns {
                for (next, numbers) in next.iter_mut().zip(schedule.turn(turn)) {
                    assert_eq!(numbers.start, *next);
                    *next = numbers.end;
                }
            }
            assert_eq!(next.iter().sum::<u64>(), jobs);
            assert!(schedule.turns >= MIN_TURNS as u64);
            assert!((schedule.done(schedule.turns, Duration::ZERO) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_measurement_by_time_has_enough_turns() {
        let schedule = Schedule::new(Extent::Time(Duration::from_millis(1)), &[100], 0.01, 8);
        assert_eq!(schedule.slice, 64, "60 jobs in 6 ms, in whole batches");
        assert!(schedule.done(30, Duration::from_secs(5)) < 1.0);
        assert!(schedule.done(31, Duration::from_secs(5)) >= 1.0);
        assert_eq!(schedule.turn(2).first(), Some(&(128..192)));
    }

    #[test]
    fn no_ratio_from_noise_or_from_few_turns() {
        assert_eq!(measured(vec![[1.0, 1.06, 1.0]; 31]).ratio_to_memcpy(), None);
        assert_eq!(measured(vec![[1.0, 1.0, 1.0]; 30]).ratio_to_memcpy(), None);
        assert_eq!(measured(vec![]).memcpy_to_memcpy(), None);
    }
}
