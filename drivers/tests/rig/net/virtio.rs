//! virtio-net ports for tests.

use underpass::Result;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::model::Model;
use underpass::pci::{PciDevice, Run};
use underpass_drivers::virtio_net::driver::VirtioNet;
use underpass_drivers::virtio_net::model::{Profile, VirtioNetModel};
use underpass_drivers::virtio_net::spec::Features;

use super::tapped::{Tapped, Taps};
use super::{Bench, Wire};

/// A software device of a certain kind, and who runs it.
#[derive(Debug, Clone)]
pub(crate) struct Kind {
    /// Features that the device does not offer.
    pub(crate) without: Features,
    pub(crate) run: fn() -> Run,
    pub(crate) check_leases: bool,
    /// The device looks at its queues only when it was notified.
    pub(crate) notified: bool,
}

pub(crate) fn inline() -> Run {
    Run::Inline
}

pub(crate) fn stepped() -> Run {
    Run::Stepped
}

pub(crate) fn threads() -> Run {
    Run::Threads { cores: Vec::new() }
}

impl Kind {
    pub(crate) const fn new(run: fn() -> Run, check_leases: bool, without: &[Features]) -> Self {
        let (mut all, mut n) = (0, 0);
        while n < without.len() {
            all |= without[n].0;
            n += 1;
        }
        Self { without: Features(all), run, check_leases, notified: false }
    }

    pub(crate) fn profile(&self, pairs: usize) -> Profile {
        let queue_pairs = pairs as u16;
        let profile = Profile { queue_pairs, notified: self.notified, ..Profile::default() };
        Profile { features: (profile.features - self.without).consistent(), ..profile }
    }

    pub(crate) fn iommu(&self) -> SoftIommu {
        SoftIommu::new(SoftOptions { check_leases: self.check_leases, ..SoftOptions::default() })
    }

    /// A port with its driver, on `wire`.
    pub(crate) fn open(&self, wire: &Wire) -> Bench {
        let pairs = wire.pairs();
        let model = VirtioNetModel::with_peers(self.profile(pairs), wire.peers());
        let control = model.control();
        let taps = Taps::new((self.run)() == Run::Stepped);
        let port = self.open_model(Box::new(Tapped::new(Box::new(model), &taps))).unwrap();
        Bench { port: Box::new(port), wire: wire.clone(), taps, control: Some(control) }
    }

    pub(crate) fn open_model(&self, model: Box<dyn Model>) -> Result<VirtioNet> {
        VirtioNet::open(PciDevice::in_process("soft:virtio-net", model, &self.iommu(), (self.run)())?)
    }
}
