//! Opens the device, and decides who runs on which core.

use anyhow::bail;
use underpass::accel::{Accelerator, Channel, Config, OpKind};
use underpass::{Error, ErrorKind, worker};

use super::args::{Args, OPS};
use super::expect::Shape;
use super::turns::Cores;
use crate::size;

/// The device with its channels set up.
pub(crate) struct Opened {
    pub(crate) device: Box<dyn Accelerator>,
    pub(crate) channels: Vec<Box<dyn Channel>>,
    /// Submissions outstanding in each queue, as the device set it up.
    pub(crate) depth: usize,
    pub(crate) cores: Cores,
}

/// Opens the device for `queues` queues, if it can do jobs of `shape`.
pub(crate) fn open(args: &Args, shape: &Shape, queues: usize) -> anyhow::Result<Opened> {
    let (engine, cores) = place(&args.device, &args.core)?;
    let mut device = args.trust.registry().open_on(&args.device, engine)?;
    check(&*device, args.batch, shape, queues).map_err(|error| error.device(args.device.clone()))?;
    let depth = args.depth.unwrap_or(0);
    let config = Config { channels: queues, depth, batch: args.batch, ..Config::default() };
    let channels = device.channels(&config)?;
    let depth = channels.first().map_or(0, |channel| channel.limits().depth);
    Ok(Opened { device, channels, depth, cores })
}

/// What the device can not do, before any memory is allocated for it.
fn check(device: &dyn Accelerator, batch: usize, shape: &Shape, queues: usize) -> Result<(), Error> {
    let limits = device.limits();
    let over = |operation, why| Error::new(ErrorKind::InvalidInput, operation, why);
    if queues > device.max_channels() {
        let most = device.max_channels();
        let error = over(format!("use {queues} queues"), format!("it has {most}"));
        return Err(error.mend(format!("use --queues {most} or less")));
    }
    if !limits.ops.contains(shape.kind) {
        let known: Vec<_> = limits.ops.iter().filter(|op| OPS.contains(op)).map(OpKind::name).collect();
        let operation = format!("do {}", shape.kind.name());
        let error = Error::new(ErrorKind::Unsupported, operation, "the device does not have that operation");
        return Err(error.mend(format!("it has: {}", known.join(", "))));
    }
    let longest = shape.lens().into_iter().max().unwrap_or(0) as u64;
    if longest > limits.max_bytes {
        let operation = format!("do jobs of {}", size::show(longest));
        let error = over(operation, format!("its largest is {}", size::show(limits.max_bytes)));
        return Err(error.mend("choose a smaller --size"));
    }
    if batch > limits.max_batch {
        let most = limits.max_batch;
        let error = over(format!("do batches of {batch}"), format!("its largest batch is {most}"));
        return Err(error.mend(format!("use --batch {most} or less")));
    }
    Ok(())
}

/// The core for the device's engine and who runs on which core: a software device's engine and memcpy on the last
/// one, unless the address names another; the drivers on the others. Where the engine is no thread of this machine, memcpy runs where the driver does.
fn place(device: &str, asked: &[usize]) -> anyhow::Result<(Option<usize>, Cores)> {
    for core in asked {
        crate::check_core(*core)?;
    }
    let all = worker::cores();
    let Some(last) = all.last() else { bail!("cannot find out which cores this process may use") };
    let mut engine = None;
    if device.split(',').next() == Some("soft:dsa") {
        let given = device.split(',').find_map(|option| option.strip_prefix("core="));
        engine = Some(given.and_then(|core| core.parse().ok()).unwrap_or(*last));
    }
    let mut drivers = asked.to_vec();
    if drivers.is_empty() {
        drivers.extend(all.iter().filter(|core| Some(**core) != engine));
    }
    if drivers.is_empty() {
        drivers.push(*last);
    }
    let memcpy = engine.unwrap_or(drivers[0]);
    Ok((engine, Cores { drivers, memcpy }))
}

/// What went wrong, where all that is known from outside is that the device stopped: what the device itself says
/// of it, if it does.
pub(crate) fn cause(device: &mut dyn Accelerator, error: Error) -> Error {
    if error.kind() != ErrorKind::Timeout {
        tell_errors(device);
        return error;
    }
    let told = device.next_error();
    tell_errors(device);
    told.unwrap_or(error)
}

/// What the device and the IOMMU have to say, as warnings.
pub(crate) fn tell_errors(device: &mut dyn Accelerator) {
    const MOST: usize = 8;
    for error in std::iter::from_fn(|| device.next_error()).take(MOST) {
        tracing::warn!("{error}");
    }
    for fault in std::iter::from_fn(|| device.next_fault()).take(MOST) {
        tracing::warn!("{fault}");
    }
}
