//! The driver's own cost: no-op jobs on a device that is plain memory. Run in release with `--ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, reason = "a measurement")]

mod plain;

use std::time::{Duration, Instant};

use underpass::Burst;
use underpass::accel::{Accelerator, Config, Job, Op};
use underpass::iommu::soft::SoftOptions;
use underpass_drivers::dsa::Dsa;

const DEPTH: usize = 32;
const ROUNDS: u32 = 4000;

/// Nanoseconds a job for submitting and for polling: medians over the rounds.
fn cost(batch: usize) -> (f64, f64) {
    let (device, mut plain) = plain::device(SoftOptions::default());
    let mut dsa = Dsa::open(device).unwrap();
    let mut channels = dsa.channels(&Config { depth: DEPTH, batch, ..Config::default() }).unwrap();
    let channel = &mut channels[0];
    // What the application does for a job, making it and looking at what came back, is not counted.
    let mut bursts: Vec<_> = (0..DEPTH).map(|_| Burst::with_capacity(batch)).collect();
    let mut done: Vec<_> = (0..DEPTH).map(|_| Burst::with_capacity(batch)).collect();
    let (mut submitting, mut polling) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for jobs in &mut bursts {
            while jobs.push(Job::new(Op::Nop)).is_ok() {}
        }
        let begun = Instant::now();
        for jobs in &mut bursts {
            if batch > 1 {
                channel.submit_batch(jobs).unwrap();
            } else if let Some(job) = jobs.pop() {
                channel.submit(job).unwrap();
            }
        }
        submitting.push(begun.elapsed());
        plain.complete(channel.pasid(), DEPTH);
        let begun = Instant::now();
        for done in &mut done {
            channel.poll(done);
        }
        polling.push(begun.elapsed());
        assert_eq!(channel.outstanding(), 0);
        done.iter_mut().for_each(Burst::clear);
    }
    let a_job = |mut rounds: Vec<Duration>| {
        rounds.sort();
        rounds[rounds.len() / 2].as_nanos() as f64 / (DEPTH * batch) as f64
    };
    (a_job(submitting), a_job(polling))
}

#[test]
#[ignore = "a measurement, of a release build"]
fn the_drivers_own_cost() {
    for batch in [1, 32] {
        let (submit, poll) = cost(batch);
        println!("batch {batch}: submit {submit:.1} ns, poll {poll:.1} ns, {:.1} ns a job", submit + poll);
    }
}
