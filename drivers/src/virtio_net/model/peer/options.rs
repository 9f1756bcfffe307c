//! From what a user writes after `peer=` to the peers of a device.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use underpass::net::MacAddr;
use underpass::{Error, ErrorKind, Result};

use super::cable::{self, Impairments};
use super::generator::{self, Traffic, TrafficProtocol};
use super::loopback::Loopback;
use super::pcap::{self, Pace};
use super::random::Chance;
use super::sink::Sink;
use super::{Peer, tap};

/// Which peer a device has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PeerSpec {
    /// `loop`: what the driver sends on a queue pair comes back on it.
    #[default]
    Loop,
    /// `generator`: sends traffic, and takes what the driver sends.
    Generator(Traffic),
    /// `sink`: takes what the driver sends.
    Sink {
        /// Counts frames with a wrong checksum.
        verify: bool,
    },
    /// The name of another port: a cable to that port. The link is up while both are there.
    Cable {
        /// This port's own name, which the other port has as its peer.
        name: String,
        /// The other port's name.
        to: String,
        /// What happens to the frames that this port sends.
        impairments: Impairments,
    },
    /// `pcap:IN:OUT`: the packets of a file come in, once; what the driver sends is written to another.
    Pcap {
        /// The file that is read.
        input: Option<PathBuf>,
        /// The file that is written.
        output: Option<PathBuf>,
        /// When packets come in.
        pace: Pace,
    },
    /// `tap:NAME`: an interface of the kernel.
    Tap {
        /// The interface's name.
        name: String,
    },
}

/// An option that a device's address takes for its peer.
#[derive(Debug, Clone, Copy)]
pub struct PeerOption {
    /// What stands before the equals sign.
    pub name: &'static str,
    /// What stands after it, for people.
    pub values: &'static str,
    /// What it does, in one line.
    pub what: &'static str,
    /// The peers that take it.
    peers: &'static [&'static str],
}

const GENERATOR: &str = "generator";
const SINK: &str = "sink";
const PORT: &str = "NAME";
const PCAP: &str = "pcap";

impl PeerSpec {
    /// What can stand after `peer=`, for people.
    pub const PEERS: &str = "loop, generator, sink, pcap:IN:OUT, tap:NAME, the name of another port";

    /// All options that [`parse`](Self::parse) asks for.
    pub const OPTIONS: &[PeerOption] = &[
        PeerOption {
            name: "size",
            values: "BYTES|MIN-MAX",
            what: "generator: a frame's bytes without its check sequence (64)",
            peers: &[GENERATOR],
        },
        PeerOption {
            name: "flows",
            values: "N",
            what: "generator: flows that take turns (16)",
            peers: &[GENERATOR],
        },
        PeerOption {
            name: "rate",
            values: "PPS|max",
            what: "generator: frames a second, all queues together (max)",
            peers: &[GENERATOR],
        },
        PeerOption {
            name: "proto",
            values: "udp|tcp",
            what: "generator: what the frames carry (udp)",
            peers: &[GENERATOR],
        },
        PeerOption {
            name: "verify",
            values: "checksums",
            what: "sink: count wrong checksums",
            peers: &[SINK],
        },
        PeerOption {
            name: "name",
            values: "NAME",
            what: "cable: this port's own name, which the other port has as its peer",
            peers: &[PORT],
        },
        PeerOption {
            name: "loss",
            values: "PERCENT",
            what: "cable: how many of the frames sent here are lost (0)",
            peers: &[PORT],
        },
        PeerOption {
            name: "reorder",
            values: "PERCENT",
            what: "cable: how many of the frames sent here change places with the next (0)",
            peers: &[PORT],
        },
        PeerOption {
            name: "delay",
            values: "MICROSECONDS",
            what: "cable: how long frames sent here are on their way (0)",
            peers: &[PORT],
        },
        PeerOption {
            name: "seed",
            values: "N",
            what: "generator, cable: another number, other chances (0)",
            peers: &[GENERATOR, PORT],
        },
        PeerOption {
            name: "pace",
            values: "max|real",
            what: "pcap: packets as fast as they are taken, or as they were captured (max)",
            peers: &[PCAP],
        },
    ];

    /// Reads what stands after `peer=` in a device's address; `option` gives the values of the address's other options.
    ///
    /// In an address a comma ends an option, and in `pcap:IN:OUT` a colon ends a path: paths can have neither.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a peer or a value that is not known, and for an option that is another peer's.
    pub fn parse<'a>(peer: &str, option: impl Fn(&str) -> Option<&'a str>) -> Result<Self> {
        let (kind, rest) = peer.split_once(':').map_or((peer, None), |(kind, rest)| (kind, Some(rest)));
        let options = |takes| Options::new(peer, takes, &option);
        match (kind, rest) {
            ("loop", None) => options("loop").map(|_| Self::Loop),
            (GENERATOR, None) => Ok(Self::Generator(traffic(&options(GENERATOR)?)?)),
            (SINK, None) => {
                let verify = options(SINK)?.choice("verify", &[("checksums", true)])?;
                Ok(Self::Sink { verify: verify.unwrap_or_default() })
            }
            (PCAP, Some(files)) => capture(files, &options(PCAP)?),
            ("tap", Some(name)) if !name.is_empty() => {
                options("tap:NAME").map(|_| Self::Tap { name: name.to_owned() })
            }
            _ if is_port_name(peer) => cable(peer, &options(PORT)?),
            _ => Err(refused(peer, "it is not known").mend(format!("peer can be: {}", Self::PEERS))),
        }
    }

    /// Makes the peers, one for each of `pairs` queue pairs of a device whose own address is `mac`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] for a cable's end that is plugged in already, or a file or tap in use;
    /// [`ErrorKind::InvalidInput`] for a file that is not a whole capture of Ethernet frames; what opening files and
    /// interfaces gives.
    pub fn open(&self, pairs: usize, mac: MacAddr) -> Result<Vec<Box<dyn Peer>>> {
        match self {
            Self::Loop => Ok((0..pairs).map(|_| Box::new(Loopback::new()) as Box<dyn Peer>).collect()),
            Self::Generator(traffic) => Ok(generator::open(traffic, mac, pairs)),
            Self::Sink { verify } => {
                Ok((0..pairs).map(|_| Box::new(Sink::new(*verify)) as Box<dyn Peer>).collect())
            }
            Self::Cable { name, to, impairments } => cable::plug_in(name, to, impairments, pairs),
            Self::Pcap { input, output, pace } => {
                pcap::open(input.as_deref(), output.as_deref(), *pace, pairs)
            }
            Self::Tap { name } => tap::open(name, pairs),
        }
    }
}

fn traffic(options: &Options<'_, '_>) -> Result<Traffic> {
    let default = Traffic::default();
    let size = options.range("size", Traffic::SIZES)?.unwrap_or(default.size);
    let rate = match options.value("rate") {
        None | Some("max") => None,
        Some(_) => options.number("rate", 1..=1_000_000_000)?,
    };
    let protocols = [("udp", TrafficProtocol::Udp), ("tcp", TrafficProtocol::Tcp)];
    let traffic = Traffic {
        size,
        flows: options.number("flows", 1..=Traffic::MAX_FLOWS)?.unwrap_or(default.flows),
        rate,
        protocol: options.choice("proto", &protocols)?.unwrap_or_default(),
        seed: options.number("seed", 0..=u64::MAX)?.unwrap_or_default(),
    };
    let memory = u64::from(traffic.flows) * u64::from(size.1);
    if memory > Traffic::MAX_MEMORY {
        let flows = Traffic::MAX_MEMORY / u64::from(size.1);
        let why = format!("{} flows of {} bytes take too much memory", traffic.flows, size.1);
        return Err(refused(options.peer, why).mend(format!("with this size there can be {flows} flows")));
    }
    Ok(traffic)
}

fn cable(to: &str, options: &Options<'_, '_>) -> Result<PeerSpec> {
    let Some(name) = options.value("name") else {
        return Err(refused(to, "it is not known, or else this port has no name that a cable could lead back to")
            .mend(format!(
                "peer can be: {}; for a cable between two ports, name=a,peer=b on one and name=b,peer=a on the other",
                PeerSpec::PEERS
            )));
    };
    if !is_port_name(name) {
        return Err(options.wrong(
            "name",
            "no port can be named so",
            "use letters, digits, - and _, and not a kind of peer",
        ));
    }
    if name == to {
        return Err(options.wrong(
            "name",
            "a cable has two ends",
            "name the other port as the peer, or use peer=loop",
        ));
    }
    let impairments = Impairments {
        loss: options.percent("loss")?,
        reorder: options.percent("reorder")?,
        delay: Duration::from_micros(options.number("delay", 0..=10_000_000)?.unwrap_or_default()),
        seed: options.number("seed", 0..=u64::MAX)?.unwrap_or_default(),
    };
    Ok(PeerSpec::Cable { name: name.to_owned(), to: to.to_owned(), impairments })
}

fn capture(files: &str, options: &Options<'_, '_>) -> Result<PeerSpec> {
    let (input, output) = files.split_once(':').unwrap_or((files, ""));
    let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
    let (input, output) = (path(input), path(output));
    let mend = "write pcap:IN:OUT, pcap:IN or pcap::OUT; a path can have no colon and no comma here: rename the file, or \
                link to it";
    if files.matches(':').count() > 1 {
        return Err(refused(options.peer, "it has more than two paths").mend(mend));
    }
    if input.is_none() && output.is_none() {
        return Err(refused(options.peer, "it names no file").mend(mend));
    }
    let pace = options.choice("pace", &[("max", Pace::Max), ("real", Pace::Real)])?.unwrap_or_default();
    Ok(PeerSpec::Pcap { input, output, pace })
}

/// Whether a port can have this name: one that is no kind of peer.
fn is_port_name(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        && !["loop", GENERATOR, SINK, PCAP, "tap"].contains(&name)
}

fn refused(peer: &str, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("use peer={peer}"), why.into())
}

/// The options of an address that are one peer's.
struct Options<'f, 'a> {
    peer: &'f str,
    value: &'f dyn Fn(&str) -> Option<&'a str>,
}

impl<'f, 'a> Options<'f, 'a> {
    /// Refuses options that `takes` does not take.
    fn new(peer: &'f str, takes: &str, value: &'f dyn Fn(&str) -> Option<&'a str>) -> Result<Self> {
        let options = Self { peer, value };
        let foreign = |known: &&PeerOption| !known.peers.contains(&takes) && value(known.name).is_some();
        match PeerSpec::OPTIONS.iter().find(foreign) {
            None => Ok(options),
            Some(known) => {
                let theirs = known.peers.join(", peer=");
                let mine = PeerSpec::OPTIONS.iter().filter(|known| known.peers.contains(&takes));
                let mine: Vec<_> = mine.map(|known| known.name).collect();
                let mine = if mine.is_empty() { "none".to_owned() } else { mine.join(", ") };
                let mend = format!("{} goes with peer={theirs}; options of peer={takes}: {mine}", known.name);
                Err(options.wrong(known.name, "this peer has no such option", mend))
            }
        }
    }

    fn value(&self, name: &str) -> Option<&'a str> {
        (self.value)(name)
    }

    fn wrong(&self, name: &str, why: &str, mend: impl Into<String>) -> Error {
        let value = self.value(name).unwrap_or_default();
        refused(self.peer, format!("{name}={value}: {why}")).mend(mend.into())
    }

    fn number<N: FromStr + PartialOrd + Display>(
        &self,
        name: &str,
        range: RangeInclusive<N>,
    ) -> Result<Option<N>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => {
                let mend = format!("{name} is a number from {} to {}", range.start(), range.end());
                Err(self.wrong(name, "it can not be that", mend))
            }
        }
    }

    /// One number, or two with a hyphen between.
    fn range(&self, name: &str, range: RangeInclusive<u16>) -> Result<Option<(u16, u16)>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let (first, last) = value.split_once('-').unwrap_or((value, value));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if *range.start() <= first && first <= last && last <= *range.end() => {
                Ok(Some((first, last)))
            }
            _ => {
                let mend = format!("{name} is N or MIN-MAX, from {} to {}", range.start(), range.end());
                Err(self.wrong(name, "it can not be that", mend))
            }
        }
    }

    fn percent(&self, name: &str) -> Result<Chance> {
        let Some(value) = self.value(name) else { return Ok(Chance::default()) };
        let percent = value.strip_suffix('%').unwrap_or(value).parse().ok().and_then(Chance::from_percent);
        percent.ok_or_else(|| {
            self.wrong(name, "it can not be that", format!("{name} is percent, 0 to 100, as in {name}=0.5"))
        })
    }

    fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let meaning = choices.iter().find(|(choice, _)| *choice == value).map(|(_, meaning)| *meaning);
        meaning.map(Some).ok_or_else(|| {
            let choices: Vec<_> = choices.iter().map(|(choice, _)| *choice).collect();
            self.wrong(name, "it can not be that", format!("{name} can be: {}", choices.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses the options of an address from `peer=` on.
    fn parse(text: &str) -> Result<PeerSpec> {
        let options: Vec<_> = text.split(',').map(|option| option.split_once('=').unwrap()).collect();
        let value = |name: &str| options.iter().find(|(given, _)| *given == name).map(|(_, value)| *value);
        PeerSpec::parse(value("peer").unwrap(), value)
    }

    #[test]
    fn each_peer_is_understood() {
        assert_eq!(parse("peer=loop,queues=4").unwrap(), PeerSpec::Loop);
        assert_eq!(parse("peer=generator").unwrap(), PeerSpec::Generator(Traffic::default()));
        let traffic =
            Traffic { size: (60, 1514), flows: 9, rate: Some(1000), protocol: TrafficProtocol::Tcp, seed: 3 };
        let text = "peer=generator,size=60-1514,flows=9,rate=1000,proto=tcp,seed=3";
        assert_eq!(parse(text).unwrap(), PeerSpec::Generator(traffic));
        let max = Traffic { size: (1514, 1514), ..Traffic::default() };
        assert_eq!(parse("peer=generator,size=1514,rate=max").unwrap(), PeerSpec::Generator(max));
        assert_eq!(parse("peer=sink").unwrap(), PeerSpec::Sink { verify: false });
        assert_eq!(parse("peer=sink,verify=checksums").unwrap(), PeerSpec::Sink { verify: true });
        let pcap = |input: Option<&str>, output: Option<&str>, pace| PeerSpec::Pcap {
            input: input.map(PathBuf::from),
            output: output.map(PathBuf::from),
            pace,
        };
        assert_eq!(
            parse("peer=pcap:a:/b.pcap,pace=real").unwrap(),
            pcap(Some("a"), Some("/b.pcap"), Pace::Real)
        );
        assert_eq!(parse("peer=pcap:a").unwrap(), pcap(Some("a"), None, Pace::Max));
        assert_eq!(parse("peer=pcap:a:").unwrap(), pcap(Some("a"), None, Pace::Max));
        assert_eq!(parse("peer=pcap::b").unwrap(), pcap(None, Some("b"), Pace::Max));
        assert_eq!(parse("peer=tap:tap0").unwrap(), PeerSpec::Tap { name: "tap0".to_owned() });
        let impairments = Impairments {
            loss: Chance::from_percent(0.5).unwrap(),
            reorder: Chance::from_percent(2.0).unwrap(),
            delay: Duration::from_micros(150),
            seed: 7,
        };
        assert_eq!(
            parse("peer=b,name=a,loss=0.5%,reorder=2,delay=150,seed=7").unwrap(),
            PeerSpec::Cable { name: "a".to_owned(), to: "b".to_owned(), impairments }
        );
    }

    #[test]
    fn what_can_not_be_is_refused_with_what_can() {
        for (text, mend) in [
            ("peer=", "peer can be: loop, generator"),
            ("peer=b", "name=a,peer=b on one and name=b,peer=a on the other"),
            ("peer=Loop", "name=a,peer=b on one"),
            ("peer=tap", "peer can be: "),
            ("peer=tap:", "peer can be: "),
            ("peer=loop:1", "peer can be: "),
            ("peer=b,name=b", "use peer=loop"),
            ("peer=b,name=sink", "not a kind of peer"),
            ("peer=b,name=a:c", "letters, digits"),
            ("peer=b,name=a,loss=101", "loss is percent, 0 to 100"),
            ("peer=b,name=a,delay=-1", "delay is a number from 0"),
            ("peer=pcap", "peer can be: "),
            ("peer=pcap:", "write pcap:IN:OUT"),
            ("peer=pcap::", "write pcap:IN:OUT"),
            ("peer=pcap:a:b:c", "no colon and no comma"),
            ("peer=generator,size=59", "from 60 to 65535"),
            ("peer=generator,size=100-99", "MIN-MAX"),
            ("peer=generator,size=65536", "from 60 to 65535"),
            ("peer=generator,size=", "from 60 to 65535"),
            ("peer=generator,flows=0", "from 1 to 65536"),
            ("peer=generator,flows=65536,size=9000", "there can be 29826 flows"),
            ("peer=generator,rate=fast", "rate is a number from 1"),
            ("peer=generator,proto=sctp", "proto can be: udp, tcp"),
            ("peer=sink,verify=all", "verify can be: checksums"),
            // An option of another peer.
            ("peer=loop,size=64", "size goes with peer=generator; options of peer=loop: none"),
            ("peer=sink,rate=max", "rate goes with peer=generator; options of peer=sink: verify"),
            ("peer=generator,name=a", "name goes with peer=NAME"),
            ("peer=pcap:a:b,seed=1", "seed goes with peer=generator, peer=NAME; options of peer=pcap: pace"),
            ("peer=b,name=a,pace=real", "pace goes with peer=pcap"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.mend_text().is_some_and(|given| given.contains(mend)), "{text}: {error}");
        }
    }

    #[test]
    fn no_option_is_asked_for_that_is_not_listed() {
        for peer in ["loop", "generator", "sink", "pcap:a", "tap:a", "b"] {
            let value = |name: &str| {
                assert!(PeerSpec::OPTIONS.iter().any(|known| known.name == name), "{name}");
                None
            };
            let _ = PeerSpec::parse(peer, value);
        }
    }
}
