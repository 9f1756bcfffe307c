//! Sends a file through the device, in jobs that copy and compute the CRC32C in one pass.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, anyhow, bail};
use underpass::accel::{Done, Job, Op, OpKind, Outcome};
use underpass::dma::DmaBuf;
use underpass::{Region, Result};

use super::memory;
use super::output::Output;
use super::queue::Queue;
use crate::crc32c;
use crate::interrupt::Stop;

/// Bytes of buffers for all queues together, unless a single job takes more.
const BUFFERS: usize = 64 << 20;

/// What went through.
#[derive(Debug)]
pub(crate) struct Sent {
    /// Jobs by queue.
    pub(crate) jobs: Vec<u64>,
    pub(crate) bytes: u64,
    /// How long the device worked.
    pub(crate) seconds: f64,
    /// How long all took, with reading, checking and writing.
    pub(crate) file_seconds: f64,
    /// The device's CRC32C of the whole file.
    pub(crate) crc: u32,
    /// Bytes of buffers.
    pub(crate) working_set: u64,
    /// Pages of 2 MiB that the buffers did not get.
    pub(crate) small_pages: u64,
    /// The whole file; false if the user asked to stop before.
    pub(crate) complete: bool,
}

/// The input, opened and found to be a file.
pub(crate) fn open_input(path: &Path) -> anyhow::Result<File> {
    let failed = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(failed)?;
    if file.metadata().with_context(failed)?.is_dir() {
        return Err(anyhow!("it is a directory; name a file").context(failed()));
    }
    Ok(file)
}

/// A queue with the buffers that are free.
#[derive(Debug)]
struct Line {
    queue: Queue,
    free: Vec<(DmaBuf, DmaBuf)>,
    /// Jobs of the next round.
    ready: VecDeque<Job>,
    jobs: u64,
    small_pages: u64,
}

impl Line {
    fn new(mut queue: Queue, size: usize, count: usize) -> Result<Self> {
        let region = Region::builder((2 * size * count) as u64).name("underpass-file").build()?;
        queue.map(&region)?;
        let small_pages = memory::small_pages(&region);
        let mut sources = DmaBuf::new(region)?;
        let destinations = sources.split_off(size * count);
        let free = sources.into_chunks(size).into_iter().zip(destinations.into_chunks(size)).take(count);
        Ok(Self { queue, free: free.collect(), ready: VecDeque::new(), jobs: 0, small_pages })
    }
}

/// Sends all of `input` to `output`, `size` bytes a job, over all `queues`. Each piece is compared with its source
/// and its CRC with the CPU's if `verify`.
///
/// # Errors
/// A file's, the device's, or a piece that came out wrong.
pub(crate) fn send(
    input: &mut File,
    output: &mut Output,
    queues: Vec<Queue>,
    (size, batch): (usize, usize),
    verify: bool,
    stop: &Stop,
    progress: &mut dyn FnMut(u64),
) -> anyhow::Result<Sent> {
    let count = (BUFFERS / queues.len() / size / 2).max(batch);
    let lines = queues.into_iter().map(|queue| Line::new(queue, size, count));
    let mut lines: Vec<Line> = lines.collect::<Result<_>>()?;
    let mut sent = Sent {
        jobs: Vec::new(),
        bytes: 0,
        seconds: 0.0,
        file_seconds: 0.0,
        crc: 0,
        working_set: (2 * size * count * lines.len()) as u64,
        small_pages: lines.iter().map(|line| line.small_pages).sum(),
        complete: false,
    };
    let began = Instant::now();
    // The files and the device take turns, so that the device's speed is told apart from theirs.
    while !sent.complete && !stop.asked() {
        let (pieces, end) = read(input, &mut lines, (size, batch), stop).context("cannot read the input")?;
        let device_began = Instant::now();
        let round = work(&mut lines, pieces)?;
        sent.seconds += device_began.elapsed().as_secs_f64();
        for (piece, done) in round.into_iter().enumerate() {
            let bytes = sent.bytes;
            let (outcome, src, dst) = taken_apart(done)
                .with_context(|| format!("the device failed on the piece at byte {bytes} of the input"))?;
            if verify && (*src != *dst || crc32c::update(0, &dst) != outcome.crc) {
                bail!("the device copied the piece at byte {bytes} of the input wrongly");
            }
            output.write(&dst)?;
            sent.crc = crc32c::combine(sent.crc, outcome.crc, dst.len() as u64);
            sent.bytes += dst.len() as u64;
            let line = piece / batch % lines.len();
            lines[line].free.push((src, dst));
            progress(sent.bytes);
        }
        sent.complete = end;
    }
    sent.jobs = lines.iter().map(|line| line.jobs).collect();
    sent.file_seconds = began.elapsed().as_secs_f64();
    Ok(sent)
}

/// Reads pieces into all buffers that are free, whole batches in turn for each queue. Returns how many there are and
/// whether the input is at its end.
fn read(
    input: &mut File,
    lines: &mut [Line],
    (size, batch): (usize, usize),
    stop: &Stop,
) -> io::Result<(usize, bool)> {
    let mut pieces = 0;
    while !stop.asked() {
        let index = pieces / batch % lines.len();
        let line = &mut lines[index];
        let Some((mut src, mut dst)) = line.free.pop() else { break };
        let len = fill(input, &mut src)?;
        if len == 0 {
            return Ok((pieces, true));
        }
        if len < size {
            drop((src.split_off(len), dst.split_off(len)));
        }
        line.ready.push_back(Job::new(Op::CopyCrc { src: src.into(), dst, seed: 0 }).tag(pieces as u64));
        line.jobs += 1;
        pieces += 1;
        if len < size {
            return Ok((pieces, true));
        }
    }
    Ok((pieces, false))
}

/// Has the device do all that is ready, and returns it in the order of the file.
fn work(lines: &mut [Line], pieces: usize) -> Result<Vec<Done>> {
    let mut round: Vec<Option<Done>> = (0..pieces).map(|_| None).collect();
    let mut finished = 0;
    while finished < pieces {
        for Line { queue, ready, .. } in &mut *lines {
            loop {
                while queue.has_room()
                    && let Some(job) = ready.pop_front()
                {
                    queue.stage(job);
                }
                if queue.staged() == 0 || !queue.submit()? {
                    break;
                }
            }
            finished += queue.poll(|done| {
                let place = done.job.tag as usize;
                round[place] = Some(done);
            })?;
        }
    }
    Ok(round.into_iter().flatten().collect())
}

/// A finished piece's outcome and buffers.
fn taken_apart(done: Done) -> anyhow::Result<(Outcome, DmaBuf, DmaBuf)> {
    let outcome = done.result?;
    match done.job.op {
        Op::CopyCrc { src: underpass::accel::Source::Owned(src), dst, .. } => Ok((outcome, src, dst)),
        other => bail!("a {} job came back instead of {}", other.kind().name(), OpKind::CopyCrc.name()),
    }
}

/// Reads until `buf` is full or the input ends; returns how much was read.
fn fill(input: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match input.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
