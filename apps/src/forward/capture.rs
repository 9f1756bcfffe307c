//! Writes a copy of packets to a pcap file, off the data path.
//!
//! Each lane has a [`Tap`]: it copies packets, as they are to stand in the file, into a chunk of memory and hands full
//! chunks to the one thread that writes. Both ways go through rings, so that a lane makes no system call and waits for
//! nothing; a packet that finds no chunk is not captured, and counted.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow};
use underpass::Packet;
use underpass::ring::{self, Consumer, Producer};
use zerocopy::{Immutable, IntoBytes};

/// Bytes of a chunk: some 200 µs of 10 Gbit/s.
const CHUNK: usize = 256 << 10;

/// Chunks of a tap: what the writer may be behind.
const CHUNKS: usize = 16;

/// How long the writer sleeps when there is nothing to write.
const NAP: Duration = Duration::from_millis(1);

/// What a file begins with, in this machine's byte order ("PCAP Capture File Format", draft-ietf-opsawg-pcap,
/// section 4).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct FileHeader {
    magic: u32,
    major: u16,
    minor: u16,
    reserved: [u32; 2],
    snap_len: u32,
    link_type: u32,
}

const FILE_HEADER: FileHeader = FileHeader {
    // Times have nanoseconds.
    magic: 0xa1b2_3c4d,
    major: 2,
    minor: 4,
    reserved: [0; 2],
    snap_len: CHUNK as u32,
    // LINKTYPE_ETHERNET
    link_type: 1,
};

/// What stands before each packet's bytes (section 5).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RecordHeader {
    seconds: u32,
    nanoseconds: u32,
    captured: u32,
    len: u32,
}

/// Packets that were copied, as they are in the file.
#[derive(Debug)]
struct Chunk {
    packets: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn new() -> Self {
        Self { packets: 0, bytes: Vec::with_capacity(CHUNK) }
    }

    fn empty(&mut self) {
        self.packets = 0;
        self.bytes.clear();
    }

    /// Whether a packet of `len` bytes fits.
    #[inline]
    fn has_room(&self, len: usize) -> bool {
        self.bytes.capacity() - self.bytes.len() >= size_of::<RecordHeader>() + len
    }
}

/// A lane's end of a capture.
#[derive(Debug)]
pub(super) struct Tap {
    chunk: Option<Chunk>,
    full: Producer<Chunk>,
    free: Consumer<Chunk>,
    missed: Arc<AtomicU64>,
}

impl Tap {
    /// Captures these packets as they are now.
    #[inline]
    pub(super) fn copy(&mut self, packets: &[Packet]) {
        if packets.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for packet in packets {
            let len = packet.len();
            let Some(chunk) = self.chunk_for(len) else {
                self.missed.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let header = RecordHeader {
                seconds: now.as_secs() as u32,
                nanoseconds: now.subsec_nanos(),
                captured: len as u32,
                len: len as u32,
            };
            chunk.packets += 1;
            chunk.bytes.extend_from_slice(header.as_bytes());
            for segment in packet.segments() {
                chunk.bytes.extend_from_slice(segment.data());
            }
        }
    }

    /// A chunk that has room for a packet of `len` bytes: this one or, if there is one, a new one.
    #[inline]
    fn chunk_for(&mut self, len: usize) -> Option<&mut Chunk> {
        if self.chunk.as_ref().is_none_or(|chunk| !chunk.has_room(len)) {
            self.flush();
            if self.chunk.is_none() {
                self.chunk = self.free.pop();
            }
        }
        self.chunk.as_mut().filter(|chunk| chunk.has_room(len))
    }

    /// Hands what was captured so far to the writer.
    #[inline]
    pub(super) fn flush(&mut self) {
        if let Some(chunk) = self.chunk.take_if(|chunk| chunk.packets != 0) {
            // There is room for all chunks there are.
            self.chunk = self.full.push(chunk).err();
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.flush();
    }
}

/// The writer's end of a lane.
#[derive(Debug)]
struct Source {
    full: Consumer<Chunk>,
    free: Producer<Chunk>,
}

/// A capture that is going on.
#[derive(Debug)]
pub(super) struct Capture {
    path: PathBuf,
    writer: JoinHandle<std::io::Result<u64>>,
    stop: Arc<AtomicBool>,
    missed: Arc<AtomicU64>,
}

/// What a capture came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Captured {
    /// Packets in the file.
    pub(super) packets: u64,
    /// Packets that are not, because the file was written more slowly than they came.
    pub(super) missed: u64,
}

impl Capture {
    /// Begins a file, and gives a tap for each of `lanes`.
    pub(super) fn create(path: &Path, lanes: usize) -> anyhow::Result<(Self, Vec<Tap>)> {
        let failed = || format!("cannot write {}", path.display());
        let mut file = File::create(path).with_context(failed)?;
        file.write_all(FILE_HEADER.as_bytes()).with_context(failed)?;

        let (stop, missed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (taps, sources) = (0..lanes).map(|_| connect(&missed)).unzip();
        let stopped = Arc::clone(&stop);
        let writer = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || write(&mut file, sources, &stopped))
            .with_context(failed)?;
        Ok((Self { path: path.to_owned(), writer, stop, missed }, taps))
    }

    /// Writes what is left and ends the file. The taps are to be gone.
    pub(super) fn finish(self) -> anyhow::Result<Captured> {
        // Release, for the writer's Acquire: what taps handed over is there for the round after that.
        self.stop.store(true, Ordering::Release);
        let failed = || format!("cannot write {}", self.path.display());
        let written = self.writer.join().map_err(|_| anyhow!("its thread panicked")).with_context(failed)?;
        Ok(Captured { packets: written.with_context(failed)?, missed: self.missed.load(Ordering::Relaxed) })
    }
}

/// The two ends of a lane.
fn connect(missed: &Arc<AtomicU64>) -> (Tap, Source) {
    let (to_writer, full) = ring::spsc(CHUNKS);
    let (mut to_tap, free) = ring::spsc(CHUNKS);
    for _ in 0..CHUNKS {
        // There is room for all of them.
        let _ = to_tap.push(Chunk::new());
    }
    let tap = Tap { chunk: None, full: to_writer, free, missed: Arc::clone(missed) };
    (tap, Source { full, free: to_tap })
}

/// Writes chunks as they come, until it is told to stop and none is left; returns how many packets it wrote. After an
/// error the taps find no more chunks.
fn write(file: &mut File, mut sources: Vec<Source>, stopped: &AtomicBool) -> std::io::Result<u64> {
    let mut written = 0;
    loop {
        let last = stopped.load(Ordering::Acquire);
        let mut idle = true;
        for source in &mut sources {
            while let Some(mut chunk) = source.full.pop() {
                file.write_all(&chunk.bytes)?;
                written += chunk.packets;
                idle = false;
                chunk.empty();
                // There is room for all chunks there are.
                let _ = source.free.push(chunk);
            }
        }
        if idle && last {
            return Ok(written);
        }
        if idle {
            thread::sleep(NAP);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pcap_file::DataLink;
    use pcap_file::pcap::PcapReader;
    use underpass::Pool;

    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("underpass-capture-{}-{name}", std::process::id()))
    }

    /// A packet of two segments, with bytes that tell its number.
    fn packet(pool: &Pool, number: usize) -> (Packet, Vec<u8>) {
        let bytes: Vec<u8> = (0..60 + number % 1400).map(|at| (at * 7 + number) as u8).collect();
        let (first, second) = bytes.split_at(number % 60);
        let [mut head, mut tail] = [first, second].map(|part| {
            let mut packet = pool.alloc().unwrap();
            packet.append(part.len()).unwrap().copy_from_slice(part);
            packet
        });
        head.chain(tail.take_next().unwrap_or(tail));
        (head, bytes)
    }

    #[test]
    fn what_is_read_back_is_what_was_captured() {
        let path = path("round-trip");
        let pool = Pool::builder(256).build().unwrap();
        let (capture, mut taps) = Capture::create(&path, 2).unwrap();
        let mut expected = [vec![], vec![]];
        for number in 0..3000 {
            let (packet, bytes) = packet(&pool, number);
            taps[number % 2].copy(&[packet]);
            expected[number % 2].push(bytes);
            if number % 100 == 0 {
                // The writer catches up: nothing may be missed.
                taps.iter_mut().for_each(Tap::flush);
                thread::sleep(Duration::from_millis(2));
            }
        }
        drop(taps);
        assert_eq!(capture.finish().unwrap(), Captured { packets: 3000, missed: 0 });

        let mut reader = PcapReader::new(File::open(&path).unwrap()).unwrap();
        assert_eq!(reader.header().datalink, DataLink::ETHERNET);
        let mut found = vec![];
        let (mut before, now) = (Duration::ZERO, SystemTime::now().duration_since(UNIX_EPOCH).unwrap());
        while let Some(record) = reader.next_packet() {
            let record = record.unwrap();
            assert_eq!(record.orig_len as usize, record.data.len());
            assert!(now.abs_diff(record.timestamp) < Duration::from_secs(60));
            before = before.max(record.timestamp);
            found.push(record.data.to_vec());
        }
        // Of each lane in order.
        for lane in &expected {
            let mut found = found.iter();
            assert!(lane.iter().all(|bytes| found.any(|record| record == bytes)));
        }
        assert_eq!(found.len(), 3000);
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_the_writer_does_not_keep_up_with_is_counted() {
        let pool = Pool::builder(4).build().unwrap();
        let missed = Arc::default();
        // Nobody writes.
        let (mut tap, mut source) = connect(&missed);
        let mut packet = pool.alloc().unwrap();
        packet.append(1500).unwrap();
        let packets = [packet];
        let in_chunk = (CHUNK / (1500 + size_of::<RecordHeader>())) as u64;
        for _ in 0..in_chunk * CHUNKS as u64 + 10 {
            tap.copy(&packets);
        }
        assert_eq!(missed.load(Ordering::Relaxed), 10);
        // One chunk comes back, and it goes on.
        let mut chunk = source.full.pop().unwrap();
        assert_eq!(chunk.packets, in_chunk);
        chunk.empty();
        source.free.push(chunk).unwrap();
        tap.copy(&packets);
        assert_eq!(missed.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn a_file_that_can_not_be_written_is_an_error() {
        assert!(Capture::create(Path::new("/nowhere/at/all"), 1).is_err());
        if Path::new("/dev/full").exists() {
            let error = Capture::create(Path::new("/dev/full"), 1).map(|_| ()).unwrap_err();
            assert!(format!("{error:#}").starts_with("cannot write /dev/full: "), "{error:#}");
        }
    }
}
