//! The kinds of address that this crate has, and how each is opened.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};

use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::net::MacAddr;
use underpass::pci::{PciDevice, Run};
use underpass::{Error, ErrorKind, Result};

use super::{Address, Class, Device, Scheme, SchemeOption};
use crate::cpu::Cpu;
use crate::dsa::model::{DsaModel, DsaProfile};
use crate::dsa::{Dsa, WqMode};
use crate::virtio_net::driver::VirtioNet;
use crate::virtio_net::model::peer::PeerSpec;
use crate::virtio_net::model::{Features, Profile, VirtioNetModel};

/// Every scheme, in the order in which help texts list them.
pub(super) const ALL: &[&Scheme] = &[&CPU, &SOFT_DSA, &SOFT_VIRTIO_NET];

const CPU: Scheme = Scheme {
    name: "cpu",
    what: "jobs done by the CPU, in the thread that submits them",
    class: Class::Accelerator,
    options: &[],
    open: |_| Ok(Device::Accelerator(Box::new(Cpu::new()))),
};

const SOFT_DSA: Scheme = Scheme {
    name: "soft:dsa",
    what: "a software Intel DSA behind the software IOMMU, in this process",
    class: Class::Accelerator,
    options: &[
        SchemeOption { name: "wqs", values: "N", what: "work queues, 1 to 32 (8)" },
        SchemeOption { name: "engines", values: "N", what: "engines, each a thread, 1 to 32 (1)" },
        SchemeOption {
            name: "mode",
            values: "dedicated|shared",
            what: "how work queues are used (dedicated)",
        },
        SchemeOption { name: "pasids", values: "N", what: "PASIDs that the IOMMU has; 0 is none (1048575)" },
        SchemeOption {
            name: "check",
            values: "leases",
            what: "refuse DMA to memory that was not handed out",
        },
        SchemeOption { name: "core", values: "N", what: "the core that the engines run on (any)" },
    ],
    open: open_soft_dsa,
};

const SOFT_WQS: RangeInclusive<usize> = 1..=DsaProfile::MAX_WQS;
const SOFT_ENGINES: RangeInclusive<usize> = 1..=DsaProfile::MAX_ENGINES;
/// PASIDs have 20 bits, and 0 is not one that is given out.
const SOFT_PASIDS: RangeInclusive<u32> = 0..=(1 << 20) - 1;

fn open_soft_dsa(address: &Address<'_>) -> Result<Device> {
    let mut profile = DsaProfile::default();
    if let Some(wqs) = address.number("wqs", SOFT_WQS)? {
        profile.wqs = wqs;
    }
    profile.engines = address.number("engines", SOFT_ENGINES)?.unwrap_or(1);
    let mode = address.choice("mode", &[("dedicated", WqMode::Dedicated), ("shared", WqMode::Shared)])?;
    let check_leases = address.choice("check", &[("leases", true)])?.unwrap_or_default();
    let mut options = SoftOptions { check_leases, ..SoftOptions::default() };
    if let Some(pasids) = address.number("pasids", SOFT_PASIDS)? {
        options.max_pasids = pasids;
    }
    let cores = address.core()?.into_iter().collect();
    let iommu = SoftIommu::new(options);
    let model = Box::new(DsaModel::new(profile));
    let device = PciDevice::in_process(address.text, model, &iommu, Run::Threads { cores })?;
    Ok(Device::Accelerator(Box::new(Dsa::open(device)?.with_mode(mode.unwrap_or_default()))))
}

const SOFT_VIRTIO_NET: Scheme = Scheme {
    name: "soft:virtio-net",
    what: "a software virtio-net device behind the software IOMMU, in this process",
    class: Class::Port,
    options: &VIRTIO_NET_OPTIONS,
    open: open_soft_virtio_net,
};

/// Those of the device, and then those of what its cable ends at.
const VIRTIO_NET_OPTIONS: [SchemeOption; OWN.len() + PeerSpec::OPTIONS.len()] = {
    let mut all = [OWN[0]; OWN.len() + PeerSpec::OPTIONS.len()];
    let mut n = 0;
    while n < all.len() {
        all[n] = if n < OWN.len() {
            OWN[n]
        } else {
            let option = PeerSpec::OPTIONS[n - OWN.len()];
            SchemeOption { name: option.name, values: option.values, what: option.what }
        };
        n += 1;
    }
    all
};

const OWN: [SchemeOption; 8] = [
    SchemeOption { name: "queues", values: "N", what: "queue pairs, 1 to 16 (1)" },
    SchemeOption { name: "ring", values: "packed|split", what: "the layout of its virtqueues (packed)" },
    SchemeOption { name: "mtu", values: "BYTES", what: "the largest IP packet, 68 to 65535 (1500)" },
    SchemeOption { name: "mac", values: "ADDRESS", what: "its own address (02:00:00:00:00:01, and so on)" },
    SchemeOption {
        name: "run",
        values: "inline|threads",
        what: "who runs the device: the worker that polls it, or a thread for each queue pair (inline)",
    },
    SchemeOption { name: "core", values: "N", what: "with run=threads: the core that they run on (any)" },
    SchemeOption { name: "check", values: "leases", what: "refuse DMA to memory that was not handed out" },
    SchemeOption {
        name: "peer",
        values: PeerSpec::PEERS,
        what: "what is at the other end of its cable (loop)",
    },
];

const SOFT_PAIRS: RangeInclusive<u16> = 1..=Profile::MAX_QUEUE_PAIRS;
const SOFT_MTU: RangeInclusive<u16> = 68..=u16::MAX;

fn open_soft_virtio_net(address: &Address<'_>) -> Result<Device> {
    // Each device of a process has another address, as it would from the factory.
    static OPENED: AtomicU32 = AtomicU32::new(0);
    let mut profile = Profile::default();
    if let Some(queues) = address.number("queues", SOFT_PAIRS)? {
        profile.queue_pairs = queues;
    }
    if address.choice("ring", &[("packed", false), ("split", true)])?.unwrap_or_default() {
        profile.features = profile.features - Features::RING_PACKED;
    }
    if let Some(mtu) = address.number("mtu", SOFT_MTU)? {
        profile.mtu = mtu;
    }
    let peer = address.option("peer").unwrap_or("loop");
    profile.peer = PeerSpec::parse(peer, |name| address.option(name))
        .map_err(|error| error.device(address.text.to_owned()))?;
    let threads = address.choice("run", &[("inline", false), ("threads", true)])?.unwrap_or_default();
    let run = if threads {
        Run::Threads { cores: address.core()?.into_iter().collect() }
    } else if address.option("core").is_some() {
        let why = "core= says where its threads run, and it has none";
        return Err(Error::new(ErrorKind::InvalidInput, format!("open {:?}", address.text), why)
            .mend("add run=threads, or leave core= out: the worker that polls it runs it"));
    } else {
        Run::Inline
    };
    let check_leases = address.choice("check", &[("leases", true)])?.unwrap_or_default();
    profile.mac = match address.mac("mac")? {
        Some(mac) => mac,
        None => MacAddr::local(OPENED.fetch_add(1, Ordering::Relaxed) + 1),
    };
    let iommu = SoftIommu::new(SoftOptions { check_leases, ..SoftOptions::default() });
    let model = VirtioNetModel::new(profile).map_err(|error| error.device(address.text.to_owned()))?;
    let device = PciDevice::in_process(address.text, Box::new(model), &iommu, run)?;
    Ok(Device::Port(Box::new(VirtioNet::open(device)?)))
}
