//! `underpass forward`: moves packets between ports, or drops, makes or answers them.
//!
//! The way of a packet: [`lane`] receives it in a burst, has [`rewrite`] or [`echo`] change it and sends it. [`ports`] opens
//! the ports and starts them; each core's worker runs the lanes of its queues until [`mod@run`] says that it is over.

mod args;
mod capture;
mod echo;
mod generate;
mod lane;
mod mode;
mod ports;
mod rates;
pub(crate) mod report;
mod rewrite;
mod run;
#[cfg(test)]
mod test_port;

use std::fmt::Write as _;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use underpass::net::{MacAddr, Port, Started};
use underpass::worker::{self, Idle, Worker, WorkerConfig};
use underpass::{Error, ErrorKind};

pub(crate) use self::args::Args;
use self::capture::{Capture, Tap};
use self::generate::Generator;
use self::lane::{Counts, Lane, Progress, Tally, Work};
use self::mode::Mode;
use self::ports::Ports;
use self::rates::Rates;
use self::report::{CaptureReport, LaneResult, Report};
use self::run::{Phase, Run};
use crate::Usage;
use crate::copy;
use crate::interrupt::Stop;

/// How long a run without `--port` takes, unless told otherwise.
const USUAL: Duration = Duration::from_secs(5);

/// Flows that flowgen makes, as testpmd.
const FLOWS: u16 = 1024;

/// How often the command looks how its workers are doing.
const LOOK: Duration = Duration::from_millis(10);

/// How often it asks the devices how they are.
const ASK: Duration = Duration::from_millis(100);

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let (ports, cores) = open(args)?;
    // Later than the ports: it starts a thread, and a software IOMMU has to wait for the kernel (membarrier(2)), for some
    // 20 ms, in a process that has threads already.
    let stop = Stop::install()?;
    let (report, failure) = forward(args, ports, &cores, &stop, true)?;
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&report)?))?;
    } else {
        let next =
            if args.ports.is_empty() { next(args.mode, &crate::command_name()) } else { String::new() };
        crate::print(&format!("{}{next}", report.text()))?;
    }
    copy::tell_small_pages(report.small_pages);
    judge(&report, failure.as_ref())
}

/// What stands below the options in the long help: what a software port's address can say.
pub(crate) fn long_help() -> String {
    let registry = underpass_drivers::builtin();
    let mut help = String::new();
    for scheme in registry.known().filter(|scheme| scheme.name == ports::SOFTWARE) {
        let _ = writeln!(help, "Options of {}, {}:", scheme.name, scheme.what);
        for option in scheme.options {
            let _ = writeln!(help, "  {}={}\n          {}", option.name, option.values, option.what);
        }
    }
    help
}

/// What a run without `--port` was, and what to do next; `command` starts this program.
fn next(mode: Mode, command: &str) -> String {
    let what = match mode {
        Mode::Txonly => {
            "Each port is a software virtio-net, and what it sends is thrown away at its other end."
        }
        Mode::Flowgen => {
            "Each port is a software virtio-net, and what it sends comes back from its other end."
        }
        Mode::Rxonly => "Each port is a software virtio-net with a packet generator at its other end.",
        Mode::Icmpecho => {
            "Each port is a software virtio-net with a packet generator at its other end, which asks nothing."
        }
        Mode::Io | Mode::Mac | Mode::Macswap => {
            "Each port is a software virtio-net with a packet generator at its other end; what one receives the other sends."
        }
    };
    format!(
        "
{what}

What to try next:
  {command} forward --mode macswap --queues 2 --cores 0,1    two queues a port, on two cores
  {command} forward --seconds 1 --pcap FILE                  a copy of the packets, for tcpdump -r FILE
  {command} forward --mode macswap --port soft:virtio-net,peer=pcap:IN:OUT --idle 1
{:width$}                                             a capture in, a capture out
  {command} forward --help                                   all modes, options and peers
",
        "",
        width = command.len() + 15,
    )
}

/// Whether a run that came to its end also went well.
pub(crate) fn judge(report: &Report, failure: Option<&Error>) -> anyhow::Result<()> {
    if let Some(error) = failure {
        return Err(error.clone().into());
    }
    if report.unexplained != 0 {
        bail!(
            "{} packets are not accounted for; run it again with -v, and report it with the output of --json",
            report.unexplained
        );
    }
    Ok(())
}

/// Does what the arguments say, and reports on it, together with what made it end early, if that was a failure.
pub(crate) fn measure(args: &Args, stop: &Stop, show_rates: bool) -> anyhow::Result<(Report, Option<Error>)> {
    let (ports, cores) = open(args)?;
    forward(args, ports, &cores, stop, show_rates)
}

/// Ports that are open, and the cores to run on.
type Opened = (Vec<Box<dyn Port>>, Vec<usize>);

/// Opens the ports.
fn open(args: &Args) -> anyhow::Result<Opened> {
    let cores = cores(args)?;
    for (index, core) in cores.iter().enumerate().skip(args.queues) {
        crate::note(&format!("core {core} has nothing to do: --queues {} uses it", index + 1));
    }
    let addresses = if args.ports.is_empty() { ports::usual(args) } else { args.ports.clone() };
    for (port, _) in &args.eth_peer {
        if *port >= addresses.len() {
            return Err(Usage(format!(
                "--eth-peer names port {port}; the last one is {}",
                addresses.len() - 1
            ))
            .into());
        }
    }
    Ok((ports::open(&args.trust.registry(), &addresses)?, cores))
}

/// The cores to run on: those given, or one for each queue as far as there are.
fn cores(args: &Args) -> anyhow::Result<Vec<usize>> {
    let cores = match &args.cores {
        Some(cores) => cores.0.clone(),
        None => worker::cores().iter().copied().take(args.queues).collect(),
    };
    if cores.is_empty() {
        bail!("cannot find out which cores this process may use; name one with --cores");
    }
    for (index, core) in cores.iter().enumerate() {
        crate::check_core(*core)?;
        if cores[..index].contains(core) {
            return Err(Usage(format!("--cores names core {core} twice")).into());
        }
    }
    Ok(cores)
}

/// Runs ports that are open.
fn forward(
    args: &Args,
    opened: Vec<Box<dyn Port>>,
    cores: &[usize],
    stop: &Stop,
    show_rates: bool,
) -> anyhow::Result<(Report, Option<Error>)> {
    let count = opened.len();
    let target = |port| if args.mode.stays_on_port() { port } else { args.topology.target(port, count) };
    let targets: Vec<usize> = (0..count).map(target).collect();
    let (mut ports, started) = ports::start(opened, args, &targets)?;
    for port in ports.without_link() {
        crate::note(&format!("port {port}: the link of {} is down", ports.ports[port].name()));
    }
    let (capture, taps) = match &args.pcap {
        Some(path) => {
            Capture::create(path, count * args.queues).map(|(capture, taps)| (Some(capture), taps))?
        }
        None => (None, Vec::new()),
    };
    let lanes = lanes(args, &ports, &targets, cores, started, taps)?;
    let places: Vec<_> = lanes.iter().map(|(place, lane)| (*place, lane.counts())).collect();
    let run = Arc::new(Run::new(args.packets));
    let workers = spawn(lanes, cores, &run)?;
    run.begin();
    let failed =
        || workers.iter().any(Worker::is_finished) || capture.as_ref().is_some_and(Capture::has_failed);
    let failure = watch(args, &mut ports, &places, &run, &failed, stop, show_rates);
    run.end();
    let joined: Result<Vec<()>, Error> = workers.into_iter().map(Worker::join).collect();
    let failed = run.failed_port();
    // Before they are stopped, which they may not survive.
    let told = ports.errors(failed);
    let dropped = ports.device_drops();
    let stopped = ports.stop();
    let (captured, cut) = capture.map(Capture::finish).unzip();

    let results: Vec<_> = places.iter().map(|(place, counts)| place.result(&counts.tally())).collect();
    let mut report = Report::new(args.mode, args.burst, run.time().as_secs_f64(), &ports.ports, &results);
    report.add_device_drops(&dropped);
    report.small_pages = ports.pools.iter().map(|pool| copy::small_pages(pool.region())).sum();
    report.capture = args.pcap.as_ref().zip(captured).map(|(path, captured)| CaptureReport {
        file: path.display().to_string(),
        packets: captured.packets,
        missed: captured.missed,
        unsent: report.ports.iter().map(|port| port.tx_dropped).sum(),
    });
    // What the device says of it is nearer to the cause than what the application saw.
    let gone = failure.or(told).or_else(|| {
        let name = ports.ports[failed?].name().to_owned();
        Some(Error::new(ErrorKind::Gone, "move packets", "a queue of it stopped working").device(name))
    });
    Ok((report, joined.err().or(gone).or(stopped.err()).or(cut.flatten())))
}

/// Where a lane is.
#[derive(Debug, Clone, Copy)]
struct Place {
    port: usize,
    target: usize,
    queue: usize,
    core: usize,
}

impl Place {
    fn result(self, tally: &Tally) -> LaneResult {
        let Self { port, target, queue, core } = self;
        LaneResult { port, target, queue, core, tally: *tally }
    }
}

/// A lane for each receive queue of each port, with the transmit queue of the same number of its target.
fn lanes(
    args: &Args,
    ports: &Ports,
    targets: &[usize],
    cores: &[usize],
    started: Vec<Started>,
    taps: Vec<Tap>,
) -> anyhow::Result<Vec<(Place, Lane)>> {
    let mut taps = taps.into_iter();
    let (rx, tx): (Vec<_>, Vec<_>) = started.into_iter().map(|lent| (lent.rx, lent.tx)).unzip();
    let mut tx: Vec<Vec<Option<_>>> =
        tx.into_iter().map(|queues| queues.into_iter().map(Some).collect()).collect();
    let mut lanes = Vec::new();
    for (port, queues) in rx.into_iter().enumerate() {
        let target = targets[port];
        for (queue, rx) in queues.into_iter().enumerate() {
            let Some(tx) = tx[target].get_mut(queue).and_then(Option::take) else {
                bail!("{} gave fewer transmit queues than were asked for", ports.ports[target].name());
            };
            let work = work(args, ports, port, target)?;
            let place = Place { port, target, queue, core: cores[queue % cores.len()] };
            lanes.push((place, Lane::new(rx, tx, work, args.burst, taps.next())));
        }
    }
    Ok(lanes)
}

/// The station that packets of a port go to, unless told otherwise: locally administered, and none of the addresses
/// that ports without one of their own have ([`MacAddr::local`]).
fn station(port: usize) -> MacAddr {
    let [.., a, b] = port.to_be_bytes();
    MacAddr([2, 1, 0, 0, a, b])
}

/// What the mode does to packets from `port` that go to `target`.
fn work(args: &Args, ports: &Ports, port: usize, target: usize) -> anyhow::Result<Work> {
    let source = ports.ports[target].mac();
    let given = args.eth_peer.iter().rev().find(|(port, _)| *port == target);
    let destination = given.map_or_else(|| station(target), |(_, mac)| *mac);
    let generator = |flows| {
        Generator::new(&ports.pools[port], args.packet_size, flows, source, destination)
            .with_context(|| format!("packets of {} bytes can not be made", args.packet_size))
    };
    Ok(match args.mode {
        Mode::Io => Work::Forward,
        Mode::Mac => Work::SetMacs { source, destination },
        Mode::Macswap => Work::SwapMacs,
        Mode::Rxonly => Work::Drop,
        Mode::Txonly => Work::Generate(generator(1)?),
        Mode::Flowgen => Work::GenerateAndDrop(generator(args.flows.unwrap_or(FLOWS))?),
        Mode::Icmpecho => Work::Answer(source),
    })
}

/// Starts a worker on each core, with the lanes that belong there.
fn spawn(lanes: Vec<(Place, Lane)>, cores: &[usize], run: &Arc<Run>) -> anyhow::Result<Vec<Worker>> {
    let mut by_core: Vec<Vec<(Place, Lane)>> = cores.iter().map(|_| Vec::new()).collect();
    for (place, lane) in lanes {
        by_core[place.queue % cores.len()].push((place, lane));
    }
    let workers =
        by_core.into_iter().zip(cores).filter(|(lanes, _)| !lanes.is_empty()).map(|(lanes, core)| {
            let name = format!("forward {core}");
            let (run, mut lanes) = (Arc::clone(run), lanes);
            Worker::spawn(WorkerConfig { name, core: Some(*core), idle: Idle::Adaptive }, move |_| {
                turn(&mut lanes, &run)
            })
        });
    Ok(workers.collect::<Result<_, _>>()?)
}

/// One call of a worker's body: each lane in turn.
#[inline]
fn turn(lanes: &mut Vec<(Place, Lane)>, run: &Run) -> worker::Work {
    let mut busy = false;
    match run.phase() {
        Phase::Ready => {}
        Phase::Running => {
            for (place, lane) in lanes {
                match lane.step(run) {
                    Progress::Busy => busy = true,
                    Progress::Idle => {}
                    Progress::Over if lane.receives() => run.fail(place.target),
                    Progress::Over => run.fail(place.port),
                }
            }
        }
        Phase::Draining => {
            lanes.retain_mut(|(_, lane)| {
                let progress = lane.drain();
                busy |= progress == Progress::Busy;
                progress != Progress::Over
            });
            if lanes.is_empty() {
                return worker::Work::Finished;
            }
        }
    }
    if busy { worker::Work::Busy } else { worker::Work::Idle }
}

/// Looks after a run until it is over: its time is up, its packets have passed, nothing comes any more, the user asks
/// for its end, or something failed. Returns the error of a device that reported one.
fn watch(
    args: &Args,
    ports: &mut Ports,
    places: &[(Place, Arc<Counts>)],
    run: &Run,
    failed: &dyn Fn() -> bool,
    stop: &Stop,
    show_rates: bool,
) -> Option<Error> {
    let ends_by_itself = args.packets.is_some() || args.idle.is_some() || !args.ports.is_empty();
    let most = args.seconds.or((!ends_by_itself).then_some(USUAL));
    let mut rates = Rates::new(ports.ports.len(), show_rates);
    let (mut came, mut since, mut asked) = (0, Instant::now(), Instant::now());
    while run.phase() == Phase::Running {
        let left = most.map_or(LOOK, |most| most.saturating_sub(run.time()));
        if left.is_zero() || stop.asked() || failed() {
            return None;
        }
        // Where a device fails, its queues may look as if nothing came.
        if asked.elapsed() >= ASK {
            asked = Instant::now();
            if let Some((port, error)) = ports.failure() {
                run.fail(port);
                return Some(error);
            }
        }
        if let Some(idle) = args.idle {
            let now =
                places.iter().map(|(_, counts)| counts.tally().received + counts.tally().generated).sum();
            if now != came {
                (came, since) = (now, Instant::now());
            } else if since.elapsed() >= idle {
                return None;
            }
        }
        rates.tell(&ports.ports, || places.iter().map(|(_, counts)| counts.tally().no_room).sum());
        thread::sleep(left.min(LOOK));
    }
    None
}

#[cfg(test)]
mod tests;
