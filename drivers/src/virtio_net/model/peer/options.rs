//! From what a user writes after `peer=` to the peers of a device.

use underpass::{Error, ErrorKind, Result};

use super::Peer;
use super::loopback::Loopback;

/// An option that a device's address takes for its peer.
#[derive(Debug, Clone, Copy)]
pub struct PeerOption {
    /// What stands before the equals sign.
    pub name: &'static str,
    /// What stands after it, for people.
    pub values: &'static str,
    /// What it does, in one line.
    pub what: &'static str,
}

/// Which peer a device has.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum PeerSpec {
    /// What the driver sends on a queue pair comes back on it.
    Loop,
}

impl PeerSpec {
    /// All options that [`parse`](Self::parse) asks for.
    pub const OPTIONS: &[PeerOption] = &[];

    /// Reads what stands after `peer=` in a device's address; `option` gives the values of the address's other options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a peer, an option or a value that is not known, or one that is another peer's.
    pub fn parse<'a>(peer: &str, _option: impl Fn(&str) -> Option<&'a str>) -> Result<Self> {
        match peer {
            "loop" => Ok(Self::Loop),
            _ => Err(Error::new(ErrorKind::InvalidInput, format!("use peer={peer}"), "it is not known")
                .mend("peer can be: loop")),
        }
    }

    /// Makes the peers, one for each of `pairs` queue pairs.
    ///
    /// # Errors
    /// What opening a file or an interface gives.
    pub fn open(&self, pairs: usize) -> Result<Vec<Box<dyn Peer>>> {
        match self {
            Self::Loop => Ok((0..pairs).map(|_| Box::new(Loopback::new()) as Box<dyn Peer>).collect()),
        }
    }
}
