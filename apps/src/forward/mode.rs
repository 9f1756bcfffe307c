//! What can be done to packets.

use clap::ValueEnum;

/// What is done to packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Send on as they are what the other port receives
    Io,
    /// Send on with new addresses: from the sending port, to its --eth-peer
    Mac,
    /// Send on with source and destination address swapped
    Macswap,
    /// Receive only, and drop
    Rxonly,
    /// Send generated packets of one flow only
    Txonly,
    /// Send generated packets of many flows; receive, and drop
    Flowgen,
    /// Answer ARP and neighbour requests and pings, for any address, on the port where they came; drop all else
    Icmpecho,
}

impl Mode {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Mac => "mac",
            Self::Macswap => "macswap",
            Self::Rxonly => "rxonly",
            Self::Txonly => "txonly",
            Self::Flowgen => "flowgen",
            Self::Icmpecho => "icmpecho",
        }
    }

    /// Whether it makes packets.
    pub(crate) fn generates(self) -> bool {
        matches!(self, Self::Txonly | Self::Flowgen)
    }

    /// Whether packets go out where they came in, whatever the topology.
    pub(crate) fn stays_on_port(self) -> bool {
        self == Self::Icmpecho
    }
}

/// Which port sends on what another one receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Topology {
    /// 0 to 1 and 1 to 0, 2 to 3 and 3 to 2; an odd last one to itself
    Paired,
    /// Each to the next, the last one to the first
    Chained,
    /// Each to itself
    Loop,
}

impl Topology {
    /// The port that sends on what `port` of `ports` receives. No two have the same.
    pub(crate) fn target(self, port: usize, ports: usize) -> usize {
        match self {
            Self::Paired if port ^ 1 < ports => port ^ 1,
            Self::Paired | Self::Loop => port,
            Self::Chained => (port + 1) % ports,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_ports_have_the_same_target() {
        for topology in Topology::value_variants() {
            for ports in 1..6 {
                let mut targets: Vec<_> = (0..ports).map(|port| topology.target(port, ports)).collect();
                targets.sort_unstable();
                assert!(targets.into_iter().eq(0..ports), "{topology:?}");
            }
        }
        let targets =
            |topology: Topology| -> Vec<_> { (0..3).map(|port| topology.target(port, 3)).collect() };
        assert_eq!(targets(Topology::Paired), [1, 0, 2]);
        assert_eq!(targets(Topology::Chained), [1, 2, 0]);
        assert_eq!(targets(Topology::Loop), [0, 1, 2]);
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for mode in Mode::value_variants() {
            assert_eq!(
                mode.to_possible_value().map(|value| value.get_name().to_owned()),
                Some(mode.name().to_owned())
            );
        }
    }
}
