//! Shows that one queue can not reach another's memory: first the driver refuses to submit such a buffer, then
//! the device is made to try all the same, and the IOMMU refuses that.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;
use underpass::accel::{Accelerator, Channel, Done, Job, JobError, Op, OpKind, Reason};
use underpass::dma::DmaBuf;
use underpass::{Access, Burst, Error, ErrorKind, Fault, Iova, Pasid, Result};

/// How long a fault record may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was tried, and who refused it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Isolation {
    /// The PASID of the queue whose memory it is.
    owner_pasid: u32,
    /// The PASID of the queue that tried to reach it.
    intruder_pasid: u32,
    /// The memory's address in the owner's address space.
    iova: String,
    /// The driver's reason not to submit the buffer to the other queue.
    driver_refused: String,
    /// What the device reported when it tried all the same.
    device_reported: String,
    /// The IOMMU's record of that.
    fault: Record,
}

/// A fault record.
#[derive(Debug, Clone, Serialize)]
struct Record {
    device: String,
    pasid: Option<u32>,
    iova: String,
    access: String,
    reason: String,
}

impl From<&Fault> for Record {
    fn from(fault: &Fault) -> Self {
        Self {
            device: fault.device.to_string(),
            pasid: fault.pasid.map(Pasid::get),
            iova: fault.iova.to_string(),
            access: fault.access.to_string(),
            reason: fault.reason.to_string(),
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { owner_pasid, intruder_pasid, iova, driver_refused, device_reported, fault } = self;
        let pasid = fault.pasid.map_or_else(|| "none".to_owned(), |pasid| pasid.to_string());
        writeln!(
            f,
            "Isolation: queue 0 (PASID {owner_pasid}) has a buffer at IOVA {iova}, and can read it."
        )?;
        writeln!(f, "  queue 1 (PASID {intruder_pasid}) submits it: the driver refuses: {driver_refused}")?;
        writeln!(f, "  queue 1 probes its address: the device reports: {device_reported}")?;
        write!(
            f,
            "  the IOMMU's fault record: device {}, PASID {pasid}, IOVA {}, {}, {}",
            fault.device, fault.iova, fault.access, fault.reason
        )
    }
}

/// Makes queue 1 of `device` try to reach a buffer of queue 0.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where queues have no address spaces of their own; [`ErrorKind::Device`] if the
/// attempt was not stopped.
pub(crate) fn show(
    device: &mut dyn Accelerator,
    owner: &mut dyn Channel,
    intruder: &mut dyn Channel,
) -> Result<Isolation> {
    let name = device.name().to_owned();
    let failed =
        |kind, why: String| Error::new(kind, "show that its queues are isolated", why).device(name.clone());
    let (Some(owner_pasid), Some(intruder_pasid)) = (owner.pasid(), intruder.pasid()) else {
        let why = "its queues have no PASID, so they share one address space";
        return Err(failed(ErrorKind::Unsupported, why.into()).mend("try --device soft:dsa"));
    };
    if !intruder.limits().ops.contains(OpKind::Probe) {
        return Err(failed(ErrorKind::Unsupported, "it can not be made to access a bare address".into()));
    }

    let buf = DmaBuf::allocate(4096)?;
    let region = buf.region().clone();
    owner.map(&region, Access::READ_WRITE)?;
    let iova = owner.iova(&buf).ok_or_else(|| {
        failed(ErrorKind::Unsupported, "its queues do not tell where they find a buffer".into())
    })?;

    // Asked politely: the buffer's region is not in queue 1's table.
    let driver_refused = match intruder.submit(Job::crc(buf, 0)) {
        Err(rejected) if rejected.why == Reason::NotMapped => rejected.why.to_string(),
        Err(rejected) => return Err(failed(ErrorKind::Device, rejected.why.to_string())),
        Ok(()) => return Err(failed(ErrorKind::Device, "the driver took a buffer of another queue".into())),
    };

    // Past the driver's check. The owner can read there, so what stops the other queue is its PASID.
    probe(owner, iova, &name)?.result.map_err(|why| {
        failed(ErrorKind::Device, format!("queue 0 can not read its own buffer at {iova}: {why}"))
    })?;
    while device.next_fault().is_some() {}
    let device_reported = match probe(intruder, iova, &name)?.result {
        Err(refused @ JobError::PageFault { .. }) => refused.to_string(),
        Err(other) => return Err(failed(ErrorKind::Device, other.to_string())),
        Ok(_) => {
            return Err(failed(ErrorKind::Device, format!("queue 1 READ queue 0's buffer at {iova}")));
        }
    };
    let fault =
        next_fault(device).ok_or_else(|| failed(ErrorKind::Device, "the IOMMU recorded no fault".into()))?;
    if fault.pasid != Some(intruder_pasid) {
        return Err(failed(ErrorKind::Device, format!("the fault names another queue: {fault}")));
    }
    owner.unmap(&region)?;
    Ok(Isolation {
        owner_pasid: owner_pasid.get(),
        intruder_pasid: intruder_pasid.get(),
        iova: iova.to_string(),
        driver_refused,
        device_reported,
        fault: Record::from(&fault),
    })
}

/// Has the queue read at `iova`, and waits for the end of it.
fn probe(channel: &mut dyn Channel, iova: Iova, device: &str) -> Result<Done> {
    let failed =
        |why: String| Error::new(ErrorKind::Device, "probe an address", why).device(device.to_owned());
    channel
        .submit(Job::new(Op::Probe { iova, len: 64 }))
        .map_err(|rejected| failed(rejected.why.to_string()))?;
    let mut done = Burst::with_capacity(1);
    while channel.poll(&mut done) == 0 {
        if channel.state() != underpass::accel::State::Running {
            channel.reset(&mut done)?;
            break;
        }
        std::thread::yield_now();
    }
    done.pop().ok_or_else(|| failed("the job did not come back".into()))
}

fn next_fault(device: &mut dyn Accelerator) -> Option<Fault> {
    let began = Instant::now();
    loop {
        let fault = device.next_fault();
        if fault.is_some() || began.elapsed() > PATIENCE {
            return fault;
        }
        std::thread::yield_now();
    }
}
