//! The driver's own cost: no-op jobs on a device that is plain memory. Run in release with `--ignored --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test")]

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
    let mut jobs = Burst::with_capacity(batch);
    let mut done = Burst::with_capacity(32);
    let (mut submitting, mut polling) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..DEPTH {
            if batch == 1 {
                channel.submit(Job::new(Op::Nop)).unwrap();
            } else {
                while jobs.push(Job::new(Op::Nop)).is_ok() {}
                channel.submit_batch(&mut jobs).unwrap();
            }
        }
        submitting.push(begun.elapsed());
        plain.complete(channel.pasid(), DEPTH);
        let begun = Instant::now();
        while channel.poll(&mut done) != 0 {
            done.clear();
        }
        polling.push(begun.elapsed());
        assert_eq!(channel.outstanding(), 0);
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
