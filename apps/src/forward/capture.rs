//! Writes a copy of packets to a pcap file, off the data path.
//!
//! Each lane has a [`Tap`]: it copies packets, as they are to stand in the file, into a chunk of memory and hands full
//! chunks to the one thread that writes. Both ways go through rings, so that a lane makes no system call and waits for
//! nothing; a packet that finds no chunk is not captured, and counted.

use std::fs::{File, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use underpass::net::pcap::{FileHeader, RecordHeader};
use underpass::ring::{self, Consumer, Producer};
use underpass::{Error, ErrorKind, Packet};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of a chunk: some 200 µs of 10 Gbit/s.
const CHUNK: usize = 256 << 10;

/// Chunks of a tap: what the writer may be behind.
const CHUNKS: usize = 16;

/// How long the writer sleeps when there is nothing to write.
const NAP: Duration = Duration::from_millis(1);

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
            let header = RecordHeader::new(now, len);
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
    writer: JoinHandle<u64>,
    shared: Arc<Shared>,
}

/// What the writer and others know of each other.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    failure: OnceLock<Error>,
    missed: Arc<AtomicU64>,
}

/// What a capture came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Captured {
    /// Packets in the file.
    pub(super) packets: u64,
    /// Packets that are not, because the file did not keep up with them or could not be written to its end.
    pub(super) missed: u64,
}

impl Capture {
    /// Begins a file, and gives a tap for each of `lanes`.
    ///
    /// # Errors
    /// The file can not be written, is no regular file, or somebody else reads or writes it.
    pub(super) fn create(path: &Path, lanes: usize) -> Result<(Self, Vec<Tap>), Error> {
        let mut file = open(path)?;
        file.write_all(FileHeader::new(CHUNK as u32).as_bytes()).map_err(|error| not_written(path, error))?;
        let shared = Arc::new(Shared::default());
        let (taps, sources) = (0..lanes).map(|_| connect(&shared.missed)).unzip();
        let (name, writers) = (path.to_owned(), Arc::clone(&shared));
        let writer = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || write(&name, &mut file, sources, &writers))
            .map_err(|error| Error::os(operation(path), "no thread could be made", error))?;
        Ok((Self { writer, shared }, taps))
    }

    /// Whether the file could not be written: it gets no more packets.
    pub(super) fn has_failed(&self) -> bool {
        self.shared.failure.get().is_some()
    }

    /// Writes what is left and ends the file. The taps are to be gone. Says also what stopped it before its end.
    pub(super) fn finish(self) -> (Captured, Option<Error>) {
        // Release, for the writer's Acquire: what taps handed over is there for the round after that.
        self.shared.stop.store(true, Ordering::Release);
        let joined = self.writer.join();
        let panicked =
            || Error::new(ErrorKind::Os, "write the capture", "its thread panicked").mend("report it");
        let failure = self.shared.failure.get().cloned().or_else(|| joined.is_err().then(panicked));
        let captured = Captured {
            packets: joined.unwrap_or_default(),
            missed: self.shared.missed.load(Ordering::Relaxed),
        };
        (captured, failure)
    }
}

/// Opens a file for this capture alone, and only then makes it empty: it may be what a port reads or writes.
fn open(path: &Path) -> Result<File, Error> {
    let refused = |kind, why, mend| Err(Error::new(kind, operation(path), why).mend(mend));
    // Not waiting for a reader, if it is a pipe.
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    let is_else = |metadata: io::Result<std::fs::Metadata>| {
        metadata.is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
    };
    if is_else(file.as_ref().map_or_else(|_| path.metadata(), File::metadata)) {
        let mend = "name a file, and read that: tcpdump -r FILE";
        return refused(ErrorKind::InvalidInput, "it is not a regular file", mend);
    }
    let file = file.map_err(|error| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir());
        let mend = match folder {
            Some(folder) => format!("make its directory first: mkdir -p {}", folder.display()),
            None => "name a file that you may write".to_owned(),
        };
        Error::os(operation(path), "it can not be opened", error).mend(mend)
    })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let why = "a port of this command, or another command, reads or writes it";
            return refused(ErrorKind::Busy, why, "name another file");
        }
        Err(TryLockError::Error(error)) => {
            return Err(Error::os(operation(path), "it can not be locked", error)
                .mend("name a file on a local file system"));
        }
    }
    file.set_len(0).map_err(|error| not_written(path, error))?;
    Ok(file)
}

fn operation(path: &Path) -> String {
    format!("write the capture {}", path.display())
}

fn not_written(path: &Path, error: io::Error) -> Error {
    Error::os(operation(path), "it takes no more", error)
        .mend("make room there or name a file elsewhere; --packets bounds how many there are")
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

/// Writes chunks as they come, until it is told to stop and none is left; returns how many packets are in the file.
/// After an error the file ends with its last whole packet, and all others are missed.
fn write(path: &Path, file: &mut File, mut sources: Vec<Source>, shared: &Shared) -> u64 {
    let mut written = 0;
    loop {
        let last = shared.stop.load(Ordering::Acquire);
        let mut idle = true;
        for source in &mut sources {
            while let Some(mut chunk) = source.full.pop() {
                let mut whole = 0;
                if shared.failure.get().is_none() {
                    whole = append(file, &chunk).unwrap_or_else(|(whole, error)| {
                        // It is empty until here.
                        let _ = shared.failure.set(not_written(path, error));
                        whole
                    });
                }
                written += whole;
                shared.missed.fetch_add(chunk.packets - whole, Ordering::Relaxed);
                idle = false;
                chunk.empty();
                // There is room for all chunks there are.
                let _ = source.free.push(chunk);
            }
        }
        if idle && last {
            return written;
        }
        if idle {
            thread::sleep(NAP);
        }
    }
}

/// Writes a chunk, and returns how many packets that were. An error takes back the part of a packet that was written.
fn append(file: &mut File, chunk: &Chunk) -> Result<u64, (u64, io::Error)> {
    let begin = file.stream_position().map_err(|error| (0, error))?;
    let Err(error) = file.write_all(&chunk.bytes) else { return Ok(chunk.packets) };
    let end = file.stream_position().unwrap_or(begin);
    let (packets, len) = whole_packets(&chunk.bytes, (end - begin) as usize);
    // What is there stays readable even if this fails too.
    let _ = file.set_len(begin + len as u64);
    Err((packets, error))
}

/// How many whole packets are in the first `limit` of a chunk's `bytes`, and where the last one ends.
fn whole_packets(bytes: &[u8], limit: usize) -> (u64, usize) {
    let (mut packets, mut end) = (0, 0);
    while let Ok((header, _)) = RecordHeader::read_from_prefix(&bytes[end..]) {
        let next = end + size_of::<RecordHeader>() + header.captured_len as usize;
        if next > limit {
            break;
        }
        (packets, end) = (packets + 1, next);
    }
    (packets, end)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

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
        let (captured, failure) = capture.finish();
        assert_eq!(captured, Captured { packets: 3000, missed: 0 });
        assert!(failure.is_none(), "{failure:?}");

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
        let refused = |path: &Path| Capture::create(path, 1).map(|_| ()).unwrap_err().to_string();
        let error = refused(Path::new("/nowhere/at/all"));
        assert!(error.starts_with("cannot write the capture /nowhere/at/all: "), "{error}");
        assert!(error.ends_with("mkdir -p /nowhere/at"), "{error}");
        let error = refused(Path::new("/dev/null"));
        assert!(error.contains("not a regular file; "), "{error}");
    }

    #[test]
    fn a_file_that_somebody_has_is_left_as_it_is() {
        let path = path("taken");
        fs::write(&path, "something").unwrap();
        let reader = File::open(&path).unwrap();
        for lock in [File::lock, File::lock_shared] {
            lock(&reader).unwrap();
            let error = Capture::create(&path, 1).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert_eq!(fs::read(&path).unwrap(), b"something");
            reader.unlock().unwrap();
        }
        // One capture holds off another.
        let (first, taps) = Capture::create(&path, 1).unwrap();
        assert!(Capture::create(&path, 1).is_err());
        drop(taps);
        assert!(first.finish().1.is_none());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn after_an_error_all_packets_are_missed_and_the_command_can_see_it() {
        let pool = Pool::builder(4).build().unwrap();
        let path = path("read-only");
        fs::write(&path, "").unwrap();
        let mut file = File::open(&path).unwrap();
        let shared = Arc::new(Shared::default());
        let (mut tap, source) = connect(&shared.missed);
        for number in 1..4 {
            tap.copy(&[packet(&pool, number).0]);
        }
        drop(tap);
        shared.stop.store(true, Ordering::Relaxed);
        assert_eq!(write(&path, &mut file, vec![source], &shared), 0);
        assert_eq!(shared.missed.load(Ordering::Relaxed), 3);
        assert!(shared.failure.get().is_some_and(|error| error.mend_text().is_some()));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_ends_with_its_last_whole_packet() {
        let pool = Pool::builder(4).build().unwrap();
        let (mut tap, _source) = connect(&Arc::default());
        let mut ends = vec![0];
        for number in [1, 60, 1399] {
            let (packet, bytes) = packet(&pool, number);
            tap.copy(&[packet]);
            ends.push(ends[ends.len() - 1] + 16 + bytes.len());
        }
        let bytes = &tap.chunk.as_ref().unwrap().bytes;
        for limit in 0..=bytes.len() {
            let packets = ends.iter().filter(|end| **end <= limit).count() - 1;
            assert_eq!(whole_packets(bytes, limit), (packets as u64, ends[packets]), "{limit}");
        }
    }
}
