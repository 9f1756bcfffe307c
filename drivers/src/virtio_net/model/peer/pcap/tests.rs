use std::fs;

use pcap_file::Endianness;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};

use super::*;

/// A folder of a test's own, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("underpass-pcap-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Frames of many lengths, none like another.
fn frames() -> Vec<Vec<u8>> {
    (0..300u32).map(|at| (0..at * 31 % 1501).map(|byte| (byte * 7 + at) as u8).collect()).collect()
}

/// A capture of frames 1 millisecond apart.
fn capture(header: PcapHeader, frames: &[Vec<u8>]) -> Vec<u8> {
    let mut writer = PcapWriter::with_header(Vec::new(), header).unwrap();
    for (at, frame) in (0..).zip(frames) {
        let captured = Duration::from_secs(1_700_000_000) + Duration::from_millis(at);
        writer.write_packet(&PcapPacket::new(captured, frame.len() as u32, frame)).unwrap();
    }
    writer.into_writer()
}

fn refusal(input: Option<&Path>, output: Option<&Path>) -> Error {
    open(input, output, Pace::Max, 1).err().expect("it must be refused")
}

#[test]
fn what_comes_in_and_goes_out_is_the_same_byte_for_byte() {
    let folder = Folder::new("round-trip");
    let expected = frames();
    for endianness in [Endianness::Little, Endianness::Big] {
        for ts_resolution in [TsResolution::MicroSecond, TsResolution::NanoSecond] {
            let header = PcapHeader { endianness, ts_resolution, ..PcapHeader::default() };
            let input = folder.write("in.pcap", &capture(header, &expected));
            let output = folder.path("out.pcap");
            fs::write(&output, "what was in it before, and is longer than a header").unwrap();
            let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            let mut peers = open(Some(&input), Some(&output), Pace::Max, 3).unwrap();
            assert!(peers[1].receive().is_none() && peers[2].receive().is_none());
            let mut pair = 0;
            while let Some(frame) = peers[0].receive() {
                let bytes = frame.bytes.to_vec();
                assert!(peers[pair].transmit(Frame::finished(&bytes)), "pair {pair}");
                pair = (pair + 1) % 3;
            }
            assert!(peers[0].receive().is_none(), "a file is delivered once");
            let counters = peers[0].counters();
            assert_eq!((counters.rx_frames.get(), counters.failed.get()), (300, 0));
            drop(peers);

            let mut reader = PcapReader::new(File::open(&output).unwrap()).unwrap();
            let header = reader.header();
            assert_eq!(
                (header.datalink, header.ts_resolution),
                (DataLink::ETHERNET, TsResolution::NanoSecond)
            );
            let mut last = before;
            for expected in &expected {
                let packet = reader.next_packet().unwrap().unwrap();
                assert_eq!(packet.data, *expected);
                assert_eq!(packet.orig_len as usize, expected.len());
                assert!(packet.timestamp >= last && packet.timestamp < before + Duration::from_secs(60));
                last = packet.timestamp;
            }
            assert!(reader.next_packet().is_none());
        }
    }
}

#[test]
fn a_cut_file_is_refused_with_the_packet_at_which_it_is_cut() {
    let folder = Folder::new("cut");
    let frames = [vec![1; 60], vec![2; 1000], vec![3; 60]];
    let whole = capture(PcapHeader::default(), &frames);
    let starts = [24, 24 + 76, 24 + 76 + 1016];
    for len in 0..whole.len() {
        let path = folder.write("cut.pcap", &whole[..len]);
        if starts.contains(&len) {
            // Cut between two packets: nothing in the file tells.
            assert!(open(Some(&path), None, Pace::Max, 1).is_ok());
            continue;
        }
        let error = refusal(Some(&path), None);
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let packet = starts.iter().filter(|start| len > **start).count();
        let expected = if packet == 0 {
            "it is not a pcap file".to_owned()
        } else {
            format!("packet {packet} is not whole")
        };
        assert!(error.to_string().contains(&expected), "{len} bytes: {error}");
    }
}

#[test]
fn what_is_no_capture_of_ethernet_frames_is_refused() {
    let folder = Folder::new("other");
    let text = folder.write("text", &b"this is not a capture file ".repeat(100));
    assert!(refusal(Some(&text), None).to_string().contains("not a pcap file"));
    let next_generation = folder.write("a.pcapng", &[0x0a, 0x0d, 0x0d, 0x0a].repeat(30));
    assert!(refusal(Some(&next_generation), None).to_string().contains("editcap -F pcap"));
    let raw = PcapHeader { datalink: DataLink::RAW, ..PcapHeader::default() };
    let raw = folder.write("raw.pcap", &capture(raw, &[]));
    assert!(refusal(Some(&raw), None).to_string().contains("link type RAW"));
    // Lengths that no packet has: one that would still fit in the file, one that needs all memory.
    for len in [MAX_PACKET + 1, u32::MAX] {
        let header = PcapHeader { snaplen: 300_000, ..PcapHeader::default() };
        let mut bytes = capture(header, &[vec![1; 60], vec![2; 300_000]]);
        bytes[24 + 76 + 8..][..4].copy_from_slice(&len.to_be_bytes());
        let long = folder.write("long.pcap", &bytes);
        assert!(refusal(Some(&long), None).to_string().contains("packet 2 is "), "{len}");
    }
    assert_eq!(refusal(Some(&folder.path("missing")), None).kind(), ErrorKind::NotFound);
    assert!(refusal(Some(&folder.0), None).to_string().contains("not a regular file"));
    assert_eq!(refusal(None, Some(&folder.path("no/such/folder"))).kind(), ErrorKind::NotFound);
}

#[test]
fn a_packet_that_was_captured_in_part_is_delivered_as_it_is() {
    let folder = Folder::new("part");
    let header = PcapHeader { snaplen: 96, ..PcapHeader::default() };
    let mut bytes = capture(header, &[vec![1; 96]]);
    bytes[24 + 12..][..4].copy_from_slice(&1514u32.to_be_bytes());
    let path = folder.write("part.pcap", &bytes);
    let mut peer = open(Some(&path), None, Pace::Max, 1).unwrap().remove(0);
    assert_eq!(peer.receive().unwrap().bytes, [1; 96]);
}

#[test]
fn no_file_has_two_users() {
    let folder = Folder::new("users");
    let input = folder.write("in.pcap", &capture(PcapHeader::default(), &frames()));
    let before = fs::read(&input).unwrap();
    let other_name = folder.path("link.pcap");
    std::os::unix::fs::symlink(&input, &other_name).unwrap();
    for output in [&input, &other_name] {
        assert!(refusal(Some(&input), Some(output)).to_string().contains("both read and written"));
    }
    assert_eq!(fs::read(&input).unwrap(), before, "and it must not be emptied");

    let output = folder.path("out.pcap");
    let first = open(None, Some(&output), Pace::Max, 2).unwrap();
    assert_eq!(refusal(None, Some(&output)).kind(), ErrorKind::Busy);
    drop(first);
    assert!(open(None, Some(&output), Pace::Max, 1).is_ok());
}

#[test]
fn what_was_sent_is_in_the_file_after_a_quiet_time() {
    let folder = Folder::new("quiet");
    let output = folder.path("out.pcap");
    let mut peer = open(None, Some(&output), Pace::Max, 1).unwrap().remove(0);
    peer.transmit(Frame::finished(&[5; 100]));
    for _ in 0..QUIET_POLLS {
        assert!(peer.receive().is_none());
    }
    assert_eq!(fs::metadata(&output).unwrap().len(), 24 + 16 + 100);
}

#[test]
fn a_full_disk_is_counted() {
    let mut peer = open(None, Some(Path::new("/dev/full")), Pace::Max, 1);
    // Its header is refused already where that is seen at once.
    let error = peer.as_mut().err().expect("nothing fits on it");
    assert_eq!(error.kind(), ErrorKind::NoMemory, "{error}");
}

#[test]
fn what_can_not_be_written_is_counted_and_the_link_goes_down() {
    use std::os::fd::AsRawFd;

    let (reader, writer) = io::pipe().unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
    let mut peers = open(None, Some(&path), Pace::Max, 2).unwrap();
    drop((reader, writer));
    for _ in 0..3 {
        assert!(peers[1].transmit(Frame::finished(&[5; 100])));
    }
    for _ in 0..QUIET_POLLS {
        assert!(peers[1].receive().is_none());
    }
    assert!(!peers[0].link_up() && !peers[1].link_up());
    peers[1].transmit(Frame::finished(&[5; 100]));
    let counters = peers[1].counters();
    assert_eq!((counters.tx_frames.get(), counters.undelivered.get(), counters.failed.get()), (4, 4, 4));
}

#[test]
fn a_file_that_is_written_is_not_read_and_one_that_is_read_not_written() {
    let folder = Folder::new("locks");
    let path = folder.write("a.pcap", &capture(PcapHeader::default(), &frames()));
    let readers = [0, 1].map(|_| open(Some(&path), None, Pace::Max, 1).unwrap());
    assert_eq!(refusal(None, Some(&path)).kind(), ErrorKind::Busy);
    drop(readers);
    let writer = open(None, Some(&path), Pace::Max, 1).unwrap();
    assert_eq!(refusal(Some(&path), None).kind(), ErrorKind::Busy);
    drop(writer);
    let empty = folder.write("empty.pcap", &[]);
    assert!(refusal(Some(&empty), None).to_string().ends_with("it is empty; capture it again"));
}

#[test]
fn packets_come_as_they_were_captured_if_asked_for() {
    let folder = Folder::new("pace");
    let path = folder.write("in.pcap", &capture(PcapHeader::default(), &vec![vec![9; 60]; 30]));
    let mut peer = open(Some(&path), None, Pace::Real, 1).unwrap().remove(0);
    let mut arrivals = Vec::new();
    let start = Instant::now();
    let deadline = start + Duration::from_secs(10);
    while arrivals.len() < 30 && Instant::now() < deadline {
        if peer.receive().is_some() {
            arrivals.push(Instant::now());
        }
    }
    assert_eq!(arrivals.len(), 30);
    for (at, arrival) in (0..).zip(&arrivals) {
        assert!(*arrival - start >= Duration::from_millis(at), "packet {at}");
    }
}
