//! A software DSA without threads: its engines take a step whenever a channel is polled, so that what happens does
//! not depend on the scheduler.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use underpass::accel::{Accelerator, Channel, Config, Counters, Done, Job, Limits, Reason, Rejected, State};
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::pci::{PciDevice, Run};
use underpass::{Access, Burst, Error, Fault, Pasid, Region, Result};
use underpass_drivers::dsa::Dsa;
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};

#[derive(Debug)]
pub(crate) struct Stepped(Arc<Mutex<Dsa>>);

impl Stepped {
    pub(crate) fn open(profile: DsaProfile) -> Self {
        let iommu = SoftIommu::new(SoftOptions::default());
        let model = Box::new(DsaModel::new(profile));
        let device = PciDevice::in_process("soft:dsa", model, &iommu, Run::Stepped).unwrap();
        Self(Arc::new(Mutex::new(Dsa::open(device).unwrap())))
    }

    fn dsa(&self) -> MutexGuard<'_, Dsa> {
        self.0.lock().unwrap()
    }
}

impl Accelerator for Stepped {
    fn name(&self) -> &'static str {
        "soft:dsa"
    }

    fn driver(&self) -> &'static str {
        self.dsa().driver()
    }

    fn max_channels(&self) -> usize {
        self.dsa().max_channels()
    }

    fn limits(&self) -> Limits {
        self.dsa().limits()
    }

    fn channels(&mut self, config: &Config) -> Result<Vec<Box<dyn Channel>>> {
        let channels = self.dsa().channels(config)?.into_iter();
        let stepped = |channel| SteppedChannel { channel, dsa: Self(Arc::clone(&self.0)) };
        Ok(channels.map(|channel| Box::new(stepped(channel)) as Box<dyn Channel>).collect())
    }

    fn next_error(&mut self) -> Option<Error> {
        self.dsa().next_error()
    }

    fn next_fault(&mut self) -> Option<Fault> {
        self.dsa().next_fault()
    }
}

#[derive(Debug)]
struct SteppedChannel {
    // Dropped before the device.
    channel: Box<dyn Channel>,
    dsa: Stepped,
}

impl Channel for SteppedChannel {
    fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        self.channel.map(region, access)
    }

    fn unmap(&mut self, region: &Arc<Region>) -> Result<()> {
        self.channel.unmap(region)
    }

    fn pasid(&self) -> Option<Pasid> {
        self.channel.pasid()
    }

    fn limits(&self) -> Limits {
        self.channel.limits()
    }

    fn state(&self) -> State {
        self.channel.state()
    }

    fn submit(&mut self, job: Job) -> Result<(), Rejected> {
        self.channel.submit(job)
    }

    fn submit_batch(&mut self, jobs: &mut Burst<Job>) -> Result<usize, (usize, Reason)> {
        self.channel.submit_batch(jobs)
    }

    fn poll(&mut self, done: &mut Burst<Done>) -> usize {
        self.dsa.dsa().device().step();
        self.channel.poll(done)
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        while self.dsa.dsa().device().step() {}
        self.channel.wait(timeout)
    }

    fn outstanding(&self) -> usize {
        self.channel.outstanding()
    }

    fn reset(&mut self, done: &mut Burst<Done>) -> Result<usize> {
        self.channel.reset(done)
    }

    fn counters(&self) -> Arc<Counters> {
        self.channel.counters()
    }
}
