//! `peer=pcap:IN:OUT`: the packets of one capture file come in, what the driver sends goes to another.
//!
//! Meant for what is to be looked at, not for speed: both files are read and written in the device's own step.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use pcap_file::pcap::{PcapReader, RawPcapPacket};
use pcap_file::{DataLink, PcapError, TsResolution};
use underpass::net::pcap::{FileHeader, RecordHeader};
use underpass::{Error, ErrorKind, Result};
use zerocopy::IntoBytes;

use super::slot::Slot;
use super::{Frame, Peer, PeerCounters};

/// The longest packet that a capture file has (libpcap's limit for Ethernet).
const MAX_PACKET: u32 = 262_144;
/// What is written is gathered up to so many bytes.
const BUFFER: usize = 1 << 16;
/// It is flushed when the device asked for so many frames without sending one,
const QUIET_POLLS: u32 = 1024;
/// or after this time.
const FLUSH_WITHIN: Duration = Duration::from_secs(1);

/// When packets of a file are delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pace {
    /// As fast as there are buffers.
    #[default]
    Max,
    /// With the distances in time that they were captured with.
    Real,
}

struct Pcap {
    input: Option<Input>,
    output: Option<Arc<Output>>,
    /// How often the device asked for a frame since it sent one; not counted further than to the flush.
    polls: u32,
    counters: Arc<PeerCounters>,
}

/// Opens both files. The first queue pair gets all of the input; the output has what was sent on all, in the order in
/// which it came.
pub(super) fn open(
    input: Option<&Path>,
    output: Option<&Path>,
    pace: Pace,
    pairs: usize,
) -> Result<Vec<Box<dyn Peer>>> {
    let mut reader = input.map(|path| Input::open(path, pace)).transpose()?;
    let writer = output.map(|path| Output::create(path, input)).transpose()?.map(Arc::new);
    let peer = |_| {
        let counters = Arc::default();
        Box::new(Pcap { input: reader.take(), output: writer.clone(), polls: QUIET_POLLS, counters })
            as Box<dyn Peer>
    };
    Ok((0..pairs).map(peer).collect())
}

impl Peer for Pcap {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        self.counters.sent(frame.bytes);
        if let Some(output) = &self.output {
            self.polls = 0;
            let lost = output.write(frame.bytes);
            if lost != 0 {
                self.counters.not_taken(lost);
            }
        }
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        if self.polls < QUIET_POLLS {
            self.polls += 1;
            if let Some(output) = self.output.as_ref().filter(|_| self.polls == QUIET_POLLS) {
                let lost = output.flush();
                if lost != 0 {
                    self.counters.not_taken(lost);
                }
            }
        }
        let input = self.input.as_mut().filter(|input| !input.is_over)?;
        let has_packet = input.is_early
            || input.read().unwrap_or_else(|error| {
                let why = why(&error, "it was cut after it was opened");
                tracing::error!("{}: {why}: nothing more is delivered of it", input.path.display());
                self.counters.failed.add(1);
                false
            });
        if !has_packet {
            // It stays open, and so locked: nobody writes over it while this port is there.
            input.is_over = true;
            return None;
        }
        input.is_early = input.due.is_some_and(|due| Instant::now() < due);
        if input.is_early {
            return None;
        }
        let frame = input.packet.frame();
        self.counters.received(frame.bytes);
        Some(frame)
    }

    /// Down once the output can not be written any more.
    fn link_up(&self) -> bool {
        self.output.as_ref().is_none_or(|output| !output.is_broken())
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}

/// A capture file that is read.
struct Input {
    path: PathBuf,
    reader: PcapReader<File>,
    pace: Pace,
    /// When the first packet was read, and when it was captured.
    start: Option<(Instant, Duration)>,
    /// The packet that was read last.
    packet: Slot,
    /// When that is to be delivered, if not at once.
    due: Option<Instant>,
    /// It is not to be delivered yet.
    is_early: bool,
    /// There are no more.
    is_over: bool,
}

impl Input {
    /// Opens a file after it was read through once: a damaged one is refused before any of it is delivered.
    fn open(path: &Path, pace: Pace) -> Result<Self> {
        let mut reader = reader(path)?;
        let (mut packets, mut cut) = (0u64, 0u64);
        while let Some(packet) = reader.next_raw_packet() {
            packets += 1;
            let why = match packet {
                Ok(packet) if packet.incl_len <= MAX_PACKET => {
                    cut += u64::from(packet.incl_len < packet.orig_len);
                    continue;
                }
                Ok(packet) => format!("packet {packets} is said to have {} bytes", packet.incl_len),
                Err(error) => {
                    format!(
                        "packet {packets} is not whole: {}",
                        why(&error, "the file ends in the middle of it")
                    )
                }
            };
            let mend = match packets - 1 {
                0 => "capture it again".to_owned(),
                whole => format!(
                    "capture it again, or keep what is before it: editcap -r {} MENDED.pcap 1-{whole}",
                    path.display()
                ),
            };
            return Err(refused(path, why).mend(mend));
        }
        if cut != 0 {
            tracing::warn!(
                "{}: {cut} of {packets} packets were captured in part only, and are delivered as short as they are",
                path.display()
            );
        }
        Ok(Self {
            path: path.to_owned(),
            reader: self::reader(path)?,
            pace,
            start: None,
            packet: Slot::new(),
            due: None,
            is_early: false,
            is_over: false,
        })
    }

    /// Reads the next packet; false at the end of the file.
    fn read(&mut self) -> Result<bool, PcapError> {
        let resolution = self.reader.header().ts_resolution;
        let Some(packet) = self.reader.next_raw_packet().transpose()? else { return Ok(false) };
        self.packet.put(Frame::finished(&packet.data));
        if self.pace == Pace::Real {
            let captured = captured(&packet, resolution);
            let (start, first) = *self.start.get_or_insert_with(|| (Instant::now(), captured));
            self.due = Some(start + captured.saturating_sub(first));
        }
        Ok(true)
    }
}

/// When a packet was captured, since 1970.
fn captured(packet: &RawPcapPacket<'_>, resolution: TsResolution) -> Duration {
    let fraction = match resolution {
        TsResolution::MicroSecond => Duration::from_micros(packet.ts_frac.into()),
        TsResolution::NanoSecond => Duration::from_nanos(packet.ts_frac.into()),
    };
    Duration::from_secs(packet.ts_sec.into()) + fraction
}

/// A reader of an Ethernet capture.
fn reader(path: &Path) -> Result<PcapReader<File>> {
    let file = File::open(path).map_err(|error| failed(path, "it can not be opened", error))?;
    // It is read twice, which a pipe can not be.
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err(refused(path, "it is not a regular file").mend("save the packets in a file first"));
    }
    // So that nobody empties it meanwhile. Where a file system has no locks it does without.
    if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("read the file {}", path.display()),
            "it is being written",
        )
        .mend("wait until whoever writes it has ended, or read a copy"));
    }
    let is_empty = file.metadata().is_ok_and(|metadata| metadata.len() == 0);
    let reader = PcapReader::new(file).map_err(|error| {
        let again = "capture it again".to_owned();
        let (why, mend) = match &error {
            _ if is_empty => ("it is empty".to_owned(), again),
            PcapError::InvalidField(_) => (
                "it does not begin as one does".to_owned(),
                format!("if it is a pcapng file, convert it: editcap -F pcap {} OUT.pcap", path.display()),
            ),
            other => (why(other, "it is shorter than its header"), again),
        };
        refused(path, format!("it is not a pcap file: {why}")).mend(mend)
    })?;
    match reader.header().datalink {
        DataLink::ETHERNET => Ok(reader),
        other => {
            Err(refused(path, format!("its packets are not Ethernet frames but of link type {other:?}"))
                .mend("capture on one Ethernet interface, not on all (-i any)"))
        }
    }
}

fn why(error: &PcapError, at_the_end: &str) -> String {
    match error {
        PcapError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => at_the_end.to_owned(),
        PcapError::IoError(error) => error.to_string(),
        PcapError::InvalidField(field) => (*field).to_owned(),
        other => other.to_string(),
    }
}

fn refused(path: &Path, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("use the file {}", path.display()), why.into())
}

fn failed(path: &Path, why: &'static str, error: io::Error) -> Error {
    Error::os(format!("use the file {}", path.display()), why, error)
}

/// A capture file that is written. (`PcapWriter` could not be flushed before its end.)
struct Output {
    path: PathBuf,
    writer: Mutex<Writer>,
    /// It could not be written, and has ended: what would follow half a packet is of no use.
    is_broken: AtomicBool,
}

struct Writer {
    file: File,
    /// What is to be written, and how many frames that are.
    buffer: Vec<u8>,
    frames: u64,
    flushed: Instant,
}

impl Output {
    fn create(path: &Path, input: Option<&Path>) -> Result<Self> {
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|error| failed(path, "it can not be created", error))?;
        let is_input = input.is_some_and(|input| is_same(&file, input));
        if is_input {
            return Err(refused(path, "it can not be both read and written").mend("name two files"));
        }
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::new(
                ErrorKind::Busy,
                format!("write the file {}", path.display()),
                "another port or program uses it",
            )
            .mend("give each port a file of its own"),
            TryLockError::Error(error) => failed(path, "it can not be locked", error),
        })?;
        // A pipe or a device has no length.
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            file.set_len(0).map_err(|error| failed(path, "it can not be made empty", error))?;
        }
        file.write_all(FileHeader::new(MAX_PACKET).as_bytes())
            .map_err(|error| failed(path, "it can not be written", error))?;
        let buffer = Vec::with_capacity(BUFFER + MAX_PACKET as usize);
        let writer = Writer { file, buffer, frames: 0, flushed: Instant::now() };
        Ok(Self { path: path.to_owned(), writer: Mutex::new(writer), is_broken: AtomicBool::new(false) })
    }

    fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a frame. Returns how many frames are lost: this one, and those that were still to be flushed.
    fn write(&self, frame: &[u8]) -> u64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let header = RecordHeader::new(now, frame.len());
        let mut writer = self.writer();
        writer.buffer.extend_from_slice(header.as_bytes());
        writer.buffer.extend_from_slice(frame);
        writer.frames += 1;
        let is_due = writer.buffer.len() >= BUFFER || writer.flushed.elapsed() >= FLUSH_WITHIN;
        if is_due || self.is_broken() { self.end_batch(&mut writer) } else { 0 }
    }

    /// Likewise, without one more.
    fn flush(&self) -> u64 {
        self.end_batch(&mut self.writer())
    }

    fn end_batch(&self, writer: &mut Writer) -> u64 {
        let frames = std::mem::take(&mut writer.frames);
        let result = if self.is_broken() { None } else { Some(writer.file.write_all(&writer.buffer)) };
        writer.buffer.clear();
        match result {
            Some(Ok(())) => {
                writer.flushed = Instant::now();
                0
            }
            Some(Err(error)) => {
                tracing::error!(
                    "{}: {error}: {frames} frames are lost, nothing more is written to it, and the link goes down",
                    self.path.display()
                );
                self.is_broken.store(true, Ordering::Relaxed);
                frames
            }
            None => frames,
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush();
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().is_ok_and(|ours| path.metadata().is_ok_and(|theirs| identity(ours) == identity(theirs)))
}

#[cfg(test)]
mod tests;
