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
    pub(crate) seconds: f64,
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
        Ok(Self { queue, free: free.collect(), jobs: 0, small_pages })
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
    let count = (BUFFERS / queues.len() / size / 2).max(batch).max(2);
    let lines = queues.into_iter().map(|queue| Line::new(queue, size, count));
    let mut lines: Vec<Line> = lines.collect::<Result<_>>()?;
    // Pieces by their place in the file, from the first that is not written yet; `None` is with the device.
    let mut window: VecDeque<Option<Done>> = VecDeque::with_capacity(count * lines.len());
    let (mut read, mut written) = (0, 0);
    let (mut crc, mut bytes) = (0, 0);
    let mut end = false;
    let began = Instant::now();
    while !end || !window.is_empty() {
        if stop.asked() {
            for line in &mut lines {
                line.queue.drain(drop, drop)?;
            }
            break;
        }
        // Whole batches go round over the queues.
        while !end {
            let index = read as usize / batch % lines.len();
            let line = &mut lines[index];
            if !line.queue.has_room() && !line.queue.submit()? {
                break;
            }
            let Some((mut src, mut dst)) = line.free.pop() else { break };
            let len = fill(input, &mut src).context("cannot read the input")?;
            end = len < size;
            if len == 0 {
                break;
            }
            if end {
                drop((src.split_off(len), dst.split_off(len)));
            }
            line.queue.stage(Job::new(Op::CopyCrc { src: src.into(), dst, seed: 0 }).tag(read));
            line.jobs += 1;
            window.push_back(None);
            read += 1;
        }
        for line in &mut lines {
            if end || !line.queue.has_room() {
                line.queue.submit()?;
            }
            line.queue.poll(|done| {
                let place = (done.job.tag - written) as usize;
                window[place] = Some(done);
            })?;
        }
        while let Some(done) = window.front_mut().and_then(Option::take) {
            window.pop_front();
            let index = written as usize / batch % lines.len();
            let (outcome, src, dst) = taken_apart(done)
                .with_context(|| format!("the device failed on the piece at byte {bytes} of the input"))?;
            if verify && (*src != *dst || crc32c::update(0, &dst) != outcome.crc) {
                bail!("the device copied the piece at byte {bytes} of the input wrongly");
            }
            output.write(&dst)?;
            crc = crc32c::combine(crc, outcome.crc, dst.len() as u64);
            bytes += dst.len() as u64;
            written += 1;
            lines[index].free.push((src, dst));
            progress(bytes);
        }
    }
    Ok(Sent {
        jobs: lines.iter().map(|line| line.jobs).collect(),
        bytes,
        seconds: began.elapsed().as_secs_f64(),
        crc,
        small_pages: lines.iter().map(|line| line.small_pages).sum(),
        complete: end && window.is_empty(),
        working_set: (2 * size * count * lines.len()) as u64,
    })
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
