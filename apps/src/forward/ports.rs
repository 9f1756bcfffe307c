//! Opens the ports, gives them memory, starts and stops them.

use underpass::net::{Config, DeviceDrops, FRAME_OVERHEAD, MIN_FRAME, Port, Started};
use underpass::pci::PciAddress;
use underpass::pool::HEADROOM;
use underpass::{Error, ErrorKind, Pool};
use underpass_drivers::Registry;

use super::args::Args;
use super::mode::Mode;
use crate::Usage;

/// Buffers that a thread may hold back in its cache of a pool.
const CACHE: usize = 256;

/// The MTU of Ethernet (RFC 894).
const MTU: u16 = 1500;

/// Room for a frame in a buffer, at least.
const MIN_ROOM: usize = 2048;

/// The software port, which is there on any machine.
pub(super) const SOFTWARE: &str = "soft:virtio-net";

/// Ports that were started, with the memory of their packets.
#[derive(Debug)]
pub(super) struct Ports {
    // In this order: a pool outlives the ports that use it.
    pub(super) ports: Vec<Box<dyn Port>>,
    pub(super) pools: Vec<Pool>,
}

/// The addresses that are opened when none is given: two software ports, each with what suits the mode at its other end.
pub(super) fn usual(args: &Args) -> Vec<String> {
    let Args { queues, packet_size, .. } = args;
    let peer = match args.mode {
        Mode::Txonly => "sink".to_owned(),
        Mode::Flowgen => "loop".to_owned(),
        _ => format!("generator,size={packet_size}"),
    };
    let mtu = args.mtu.map(|mtu| format!(",mtu={mtu}")).unwrap_or_default();
    vec![format!("{SOFTWARE},queues={queues}{mtu},peer={peer}"); 2]
}

/// Opens the ports at these addresses.
pub(super) fn open(registry: &Registry, addresses: &[String]) -> anyhow::Result<Vec<Box<dyn Port>>> {
    for (index, address) in addresses.iter().enumerate() {
        if let Some(earlier) = addresses[..index].iter().position(|earlier| is_same(earlier, address)) {
            return Err(Usage(format!(
                "port {index}, {address}, is port {earlier} already; name each port once"
            ))
            .into());
        }
    }
    Ok(addresses.iter().map(|address| registry.open_port(address)).collect::<Result<_, _>>()?)
}

/// Whether both name the same device. A software device is made anew each time that it is named.
fn is_same(a: &str, b: &str) -> bool {
    let device = |address: &str| {
        let device = address.split(',').next().unwrap_or_default();
        // A PCI function has several spellings.
        device.parse().map_or_else(|_| device.to_owned(), |address: PciAddress| address.to_string())
    };
    !device(a).starts_with("soft:") && device(a) == device(b)
}

/// Starts all ports with the queues that are asked for. What port n receives, port `targets[n]` can send without copying
/// it.
pub(super) fn start(
    mut ports: Vec<Box<dyn Port>>,
    args: &Args,
    targets: &[usize],
) -> anyhow::Result<(Ports, Vec<Started>)> {
    let mut pools = Vec::with_capacity(ports.len());
    for (index, port) in ports.iter().enumerate() {
        let most = port.info().max_rx_queues.min(port.info().max_tx_queues);
        if args.queues > most {
            let error = Error::new(
                ErrorKind::InvalidInput,
                format!("use {} queues", args.queues),
                format!("it has {most} each way"),
            );
            return Err(error.device(port.name().to_owned()).mend(more_queues(most, port.name())).into());
        }
        pools.push(pool(index, args)?);
    }
    let mut started = Vec::with_capacity(ports.len());
    for index in 0..ports.len() {
        let sources = (0..targets.len()).filter(|source| targets[*source] == index && *source != index);
        for source in sources {
            ports[index].map(&pools[source])?;
        }
        let port = &mut ports[index];
        let info = port.info();
        let mut config = Config::new(&pools[index]);
        config.port = index as u16;
        (config.rx_queues, config.tx_queues) = (args.queues, args.queues);
        (config.rx_depth, config.tx_depth) =
            (args.ring.min(info.max_rx_depth), args.ring.min(info.max_tx_depth));
        config.mtu = args.mtu;
        let lent = port.start(&config)?;
        let largest = usize::from(lent.mtu) + MIN_FRAME;
        // Without --port, what is at the other end makes them.
        let generated = args.mode.generates() || args.ports.is_empty();
        if generated && args.packet_size > largest {
            return Err(Usage(format!(
                "packets of {} bytes are over the MTU of {}; use --packet-size {largest} or a larger --mtu",
                args.packet_size,
                port.name()
            ))
            .into());
        }
        started.push(lent);
    }
    Ok((Ports { ports, pools }, started))
}

fn more_queues(most: usize, name: &str) -> String {
    let option = if name.starts_with("soft:") { ", or give its address the option queues=N" } else { "" };
    format!("use --queues {most} or less{option}")
}

/// The memory for what a port receives or generates: enough for its own receive queues, for the transmit queues of the
/// port that sends it, for the bursts in between, and for the caches of all threads, of which this one fills the queues.
fn pool(index: usize, args: &Args) -> Result<Pool, Error> {
    let buffers = args.ring.checked_add(args.burst).and_then(|each| {
        let threads = args.queues.checked_add(1)?;
        each.checked_mul(2)?.checked_mul(args.queues)?.checked_add(threads.checked_mul(CACHE)?)
    });
    let room = (usize::from(args.mtu.unwrap_or(MTU)) + FRAME_OVERHEAD).max(args.packet_size).max(MIN_ROOM);
    let buffer_len = room as u32 + HEADROOM;
    // No memory holds that many: the pool says so.
    Pool::builder(buffers.unwrap_or(usize::MAX / (2 * buffer_len as usize)))
        .buffer_len(buffer_len)
        .cache(CACHE)
        .name(&format!("port {index}"))
        .build()
}

impl Ports {
    /// Stops all ports, whose queues must be back. Returns the first error.
    pub(super) fn stop(&mut self) -> Result<(), Error> {
        // Each is stopped, whatever became of the one before it.
        let results: Vec<_> = self.ports.iter_mut().map(|port| port.stop()).collect();
        results.into_iter().collect()
    }

    /// What each device itself dropped, where it knows. One that does not answer is told of in the log.
    pub(super) fn device_drops(&mut self) -> Vec<Option<DeviceDrops>> {
        let ask = |port: &mut Box<dyn Port>| {
            port.device_drops().inspect_err(|error| tracing::warn!("{error}")).unwrap_or_default()
        };
        self.ports.iter_mut().map(ask).collect()
    }

    /// What the devices and the IOMMU have to say goes to the log, but for the first error of the port `of`: it is returned.
    pub(super) fn errors(&mut self, of: Option<usize>) -> Option<Error> {
        const MOST: usize = 8;
        let mut wanted = None;
        for (index, port) in self.ports.iter_mut().enumerate() {
            let name = port.name().to_owned();
            let errors = std::iter::from_fn(|| port.next_error()).take(MOST);
            let mut errors = errors.map(|error| error.device(name.clone()));
            if of == Some(index) {
                wanted = errors.next();
            }
            errors.for_each(|error| tracing::warn!("{error}"));
            for fault in std::iter::from_fn(|| port.next_fault()).take(MOST) {
                tracing::warn!("{fault}");
            }
        }
        wanted
    }

    /// The first port whose device has an error to report, and that error.
    pub(super) fn failure(&mut self) -> Option<(usize, Error)> {
        self.ports.iter_mut().enumerate().find_map(|(index, port)| {
            let error = port.next_error()?;
            Some((index, error.device(port.name().to_owned())))
        })
    }

    /// Ports without a link.
    pub(super) fn without_link(&mut self) -> Vec<usize> {
        let down = self.ports.iter_mut().enumerate().filter_map(|(n, port)| (!port.link().up).then_some(n));
        down.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_any_of_its_names() {
        for (a, b, same) in [
            ("0000:3b:00.0", "3b:00.0", true),
            ("3B:00.0", "3b:00.0,queues=2", true),
            ("0000:3b:00.0", "0001:3b:00.0", false),
            ("3b:00.0", "3b:00.1", false),
            ("soft:virtio-net", "soft:virtio-net", false),
        ] {
            assert_eq!(is_same(a, b), same, "{a} {b}");
        }
    }
}
