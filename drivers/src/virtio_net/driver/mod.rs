//! The driver: brings the device up, lends out its queues and configures it while it runs. A packet's way is `rx` or
//! `tx` and then `virtqueue`; `transport`, `offer` and `control` are the control plane.
//!
//! All queues share one address space, the device's own: today's NICs have no PASID for each queue, so isolation is
//! between devices. [`Port::map`] decides which memory is in it.

mod control;
mod frame;
mod lease;
mod offer;
mod rx;
mod start;
mod stats;
mod transport;
mod tx;
pub mod virtqueue;

use std::fmt;
use std::sync::Arc;

use underpass::dma::DmaSpace;
use underpass::iommu::Attachment;
use underpass::net::{Config, Counters, DeviceDrops, Info, Link, MacAddr, Port, Rss, Started};
use underpass::pci::PciDevice;
use underpass::{Access, Error, ErrorKind, Fault, Pool, Region, Result};

use self::offer::Offer;
use self::start::Running;
use self::transport::Transport;
use super::spec::control::Command;
use super::spec::net::{config, link};
use super::spec::{Features, pci::status};

/// The largest VLAN id (IEEE 802.1Q).
const MAX_VLAN: u16 = 0xfff;

/// A virtio-net device, over any [`PciDevice`] that is a modern one.
///
/// - Rings are packed if the device offers that, else split.
/// - [`RX_LARGE`](underpass::net::Offloads::RX_LARGE) is granted only together with `RX_CHECKSUM`, and with `RX_SCATTER`
///   or pools whose buffers hold 64 KiB.
/// - VLAN tags are taken out and put in by the driver, as the device has nothing for it; so is the IPv4 header's checksum.
/// - What a device without the respective feature does not filter is received: it is asked nothing then.
/// - Of IP and transport headers nothing is looked up: [`TxOffload`](underpass::TxOffload) says where they are, in the
///   packet's first segment.
/// - A queue that broke down works again after a stop and a start, which reset the whole device (`RING_RESET` is not used).
///   The port sends nothing on its own account, so it does not offer to announce itself (`GUEST_ANNOUNCE`).
/// - VLAN filters are agreed on when the port starts. A port that was started without any VLAN id set receives all,
///   and takes the first id only once it is stopped; likewise it can not lose its last id while it runs.
pub struct VirtioNet {
    running: Option<Running>,
    filters: Filters,
    offer: Offer,
    counters: (Vec<Arc<Counters>>, Vec<Arc<Counters>>),
    failure_reported: bool,
    transport: Transport,
    /// The device did not stop: it is of no use any more.
    is_gone: bool,
    mapped: Vec<Arc<Region>>,
    /// Those of them that were mapped for as long as it runs.
    mapped_by_start: Vec<Arc<Region>>,
    // Given up in this order: detached, then unmapped, then closed.
    attachment: Arc<Attachment>,
    space: Arc<DmaSpace>,
    device: Arc<PciDevice>,
}

/// What is to be received, as set by the application; it outlives a restart.
#[derive(Debug, Clone, Default)]
struct Filters {
    mac: MacAddr,
    promiscuous: bool,
    all_multicast: bool,
    addresses: Vec<MacAddr>,
    vlans: Vec<u16>,
}

impl VirtioNet {
    /// Checks what the device is, resets it and asks what it can do.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it is no virtio-net device, a legacy one, or one that goes past the IOMMU;
    /// [`ErrorKind::Device`] for registers that make no sense; [`ErrorKind::Timeout`] if it does not answer to a reset;
    /// the IOMMU's refusal to attach it.
    pub fn open(device: PciDevice) -> Result<Self> {
        let name = device.name().to_owned();
        Self::attach(device).map_err(|error| error.device(name))
    }

    fn attach(device: PciDevice) -> Result<Self> {
        let transport = Transport::discover(&device)?;
        transport.reset()?;
        let offer = Offer::read(&device, &transport)?;
        let ioas = device.iommu().alloc_ioas()?;
        let attachment = ioas.attach(&device, None)?;
        device.set_bus_master(true)?;
        Ok(Self {
            running: None,
            filters: Filters { mac: offer.mac, ..Filters::default() },
            offer,
            counters: (Vec::new(), Vec::new()),
            failure_reported: false,
            transport,
            is_gone: false,
            mapped: Vec::new(),
            mapped_by_start: Vec::new(),
            attachment: Arc::new(attachment),
            space: Arc::new(DmaSpace::new(ioas)),
            device: Arc::new(device),
        })
    }

    /// The PCI device beneath.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }

    /// Does a command for a setting, if the device is running; when it is started, all of them are told again.
    fn set(
        &mut self,
        needs: Features,
        what: &'static str,
        send: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let result = match &self.running {
            _ if !self.offer.features.contains(needs) => {
                let why = format!("the device does not offer {}", needs - self.offer.features);
                Err(Error::new(ErrorKind::Unsupported, what, why).mend("do without it"))
            }
            None => Ok(()),
            Some(running) if !running.plan.features.contains(needs) => {
                Err(Error::new(ErrorKind::Busy, what, "it was started without filters of that kind")
                    .mend("stop it, set the filter, and start it again"))
            }
            Some(_) => send(self),
        };
        result.map_err(|error| error.device(self.device.name().to_owned()))
    }

    fn send_mac(&mut self, mac: MacAddr) -> Result<()> {
        self.command("set its address", Command::MAC_ADDR_SET, &mac.octets())
    }

    fn send_promiscuous(&mut self, on: bool) -> Result<()> {
        self.command("set promiscuous mode", Command::RX_PROMISC, &[on.into()])
    }

    fn send_all_multicast(&mut self, on: bool) -> Result<()> {
        self.command("set all-multicast mode", Command::RX_ALLMULTI, &[on.into()])
    }

    fn send_mac_filter(&mut self, addresses: &[MacAddr]) -> Result<()> {
        self.command("set its address filter", Command::MAC_TABLE_SET, &control::mac_table(addresses))
    }

    fn send_vlan(&mut self, vlan: u16, on: bool) -> Result<()> {
        let command = if on { Command::VLAN_ADD } else { Command::VLAN_DEL };
        self.command("set its VLAN filter", command, &vlan.to_le_bytes())
    }

    fn send_rss(&mut self, rss: &Rss) -> Result<()> {
        let Some(running) = &self.running else { return Ok(()) };
        let data = control::rss_config(rss, self.offer.hash_types, running.plan.tx_queues);
        self.command("set how packets are distributed", Command::MQ_RSS_CONFIG, &data)
    }

    fn named(&self, error: Error) -> Error {
        error.device(self.device.name().to_owned())
    }

    /// Maps a region, unless it is mapped. Whether it was not.
    fn map_region(&mut self, region: &Arc<Region>) -> Result<bool> {
        if self.mapped.iter().any(|mapped| Arc::ptr_eq(mapped, region)) {
            return Ok(false);
        }
        self.space_mut()?.map(region, Access::READ_WRITE)?;
        self.mapped.push(Arc::clone(region));
        Ok(true)
    }

    fn unmap_region(&mut self, region: &Arc<Region>) -> Result<()> {
        self.space_mut()?.unmap(region)?;
        self.mapped.retain(|mapped| !Arc::ptr_eq(mapped, region));
        Ok(())
    }

    /// Maps the pools for as long as it runs, those that are not mapped anyway.
    fn map_started(&mut self, pools: &[Pool]) -> Result<()> {
        for pool in pools {
            if self.map_region(pool.region())? {
                self.mapped_by_start.push(Arc::clone(pool.region()));
            }
        }
        Ok(())
    }

    /// Unmaps what the start has mapped.
    fn unmap_started(&mut self) -> Result<()> {
        while let Some(region) = self.mapped_by_start.pop() {
            self.unmap_region(&region)?;
        }
        Ok(())
    }

    fn check_stopped(&self, what: &'static str) -> Result<()> {
        if self.is_gone {
            let error = Error::new(ErrorKind::Gone, what, "it did not stop when it was told to");
            return Err(self.named(error.mend("open the device again")));
        }
        if self.running.is_some() {
            let error = Error::new(ErrorKind::Busy, what, "it is started");
            return Err(self.named(error.mend("stop it first")));
        }
        Ok(())
    }

    fn start_stopped(&mut self, config: &Config) -> Result<Started> {
        let plan = self.offer.plan(config, !self.filters.vlans.is_empty())?;
        self.filters.promiscuous = config.promiscuous;
        self.failure_reported = false;
        self.map_started(&config.pools).and_then(|()| self.bring_up(config, &plan)).inspect_err(|_| {
            // An error here is logged, and there on the next start.
            let _ = self.halt();
        })
    }
}

impl Port for VirtioNet {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn driver(&self) -> &'static str {
        "virtio-net"
    }

    fn info(&self) -> Info {
        self.offer.info()
    }

    fn map(&mut self, pool: &Pool) -> Result<()> {
        self.check_stopped("map a pool")?;
        self.map_region(pool.region()).map(drop).map_err(|error| self.named(error))
    }

    fn unmap(&mut self, pool: &Pool) -> Result<()> {
        self.check_stopped("unmap a pool")?;
        self.unmap_region(pool.region()).map_err(|error| self.named(error))
    }

    fn start(&mut self, config: &Config) -> Result<Started> {
        self.check_stopped("start it")?;
        self.start_stopped(config).map_err(|error| self.named(error))
    }

    fn quiesce(&self) {
        if let Some(running) = &self.running {
            running.quiesce();
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.quiesce();
        let lent = self.running.as_ref().map_or(0, Running::lent);
        if lent != 0 {
            let error = Error::new(ErrorKind::Busy, "stop it", format!("{lent} of its queues are lent out"));
            return Err(self.named(error.mend("drop them, and stop it again")));
        }
        self.halt().map_err(|error| self.named(error))
    }

    fn link(&mut self) -> Link {
        let has = |feature| self.offer.features.contains(feature);
        let read = self.transport.config(|fields| {
            let status = if has(Features::STATUS) { fields.read16(config::STATUS)? } else { link::UP };
            let (speed, duplex) = if has(Features::SPEED_DUPLEX) {
                (fields.read32(config::SPEED)?, fields.read8(config::DUPLEX)?)
            } else {
                (config::SPEED_UNKNOWN, config::DUPLEX_UNKNOWN)
            };
            Ok(Link {
                up: status & link::UP != 0,
                // A larger value is an unknown one.
                speed: i32::try_from(speed).is_ok().then_some(speed),
                full_duplex: match duplex {
                    config::DUPLEX_FULL => Some(true),
                    config::DUPLEX_HALF => Some(false),
                    _ => None,
                },
            })
        });
        // A device that can not tell has no link that anybody could rely on.
        read.unwrap_or_default()
    }

    fn mac(&self) -> MacAddr {
        self.filters.mac
    }

    fn set_mac(&mut self, mac: MacAddr) -> Result<()> {
        if mac.is_multicast() || mac == MacAddr::default() {
            let error =
                Error::new(ErrorKind::InvalidInput, "set its address", format!("{mac} is no station's"));
            return Err(self.named(error.mend("give it a unicast address")));
        }
        self.set(Features::CTRL_MAC_ADDR, "set its address", |this| this.send_mac(mac))?;
        self.filters.mac = mac;
        Ok(())
    }

    fn set_promiscuous(&mut self, on: bool) -> Result<()> {
        self.set(Features::CTRL_RX, "set promiscuous mode", |this| this.send_promiscuous(on))?;
        self.filters.promiscuous = on;
        Ok(())
    }

    fn set_all_multicast(&mut self, on: bool) -> Result<()> {
        self.set(Features::CTRL_RX, "set all-multicast mode", |this| this.send_all_multicast(on))?;
        self.filters.all_multicast = on;
        Ok(())
    }

    fn set_mac_filter(&mut self, addresses: &[MacAddr]) -> Result<()> {
        self.set(Features::CTRL_RX, "set its address filter", |this| this.send_mac_filter(addresses))?;
        self.filters.addresses = addresses.to_vec();
        Ok(())
    }

    fn set_vlan_filter(&mut self, vlan: u16, on: bool) -> Result<()> {
        const WHAT: &str = "set its VLAN filter";
        let error = |kind, why: String, mend| Err(Error::new(kind, WHAT, why).mend(mend));
        let has = self.filters.vlans.contains(&vlan);
        let checked = if vlan > MAX_VLAN {
            error(ErrorKind::InvalidInput, format!("{vlan} is no VLAN id"), "give one from 0 to 4095")
        } else if self.running.is_some() && !on && self.filters.vlans == [vlan] {
            let why = "it is the last id, without which all are received; that is agreed on at the start";
            error(ErrorKind::Busy, why.to_owned(), "stop it, take the id away, and start it again")
        } else {
            Ok(())
        };
        checked.map_err(|error| self.named(error))?;
        if has != on {
            self.set(Features::CTRL_VLAN, WHAT, |this| this.send_vlan(vlan, on))?;
            self.filters.vlans.retain(|id| *id != vlan);
            self.filters.vlans.extend(on.then_some(vlan));
        }
        Ok(())
    }

    fn set_rss(&mut self, rss: &Rss) -> Result<()> {
        const WHAT: &str = "set how packets are distributed";
        let result = match &self.running {
            Some(running) if running.plan.rss.is_some() => {
                self.offer.check_rss(rss, running.plan.rx_queues).and_then(|()| self.send_rss(rss))
            }
            Some(_) => Err(Error::new(ErrorKind::Unsupported, WHAT, "it was started without RSS")
                .mend("start it with Offloads::RSS")),
            None => Err(Error::new(ErrorKind::InvalidInput, WHAT, "it is stopped")
                .mend("start it, with this in Config::rss")),
        };
        result.map_err(|error| self.named(error))
    }

    fn counters(&self) -> (Vec<Arc<Counters>>, Vec<Arc<Counters>>) {
        self.counters.clone()
    }

    fn device_drops(&mut self) -> Result<Option<DeviceDrops>> {
        self.ask_drops().map_err(|error| self.named(error))
    }

    fn next_error(&mut self) -> Option<Error> {
        self.look_for_failure().map(|error| self.named(error))
    }

    fn next_fault(&mut self) -> Option<Fault> {
        self.device.next_fault()
    }
}

impl VirtioNet {
    fn look_for_failure(&mut self) -> Option<Error> {
        const MEND: &str = "stop it and start it again; packets on its queues are lost";
        let running = self.running.as_mut()?;
        if !self.failure_reported {
            // What the device's owner knows of it is nearer to the cause than what its registers say.
            let failure = self.device.failure().or_else(|| {
                let (kind, why) = match self.transport.status() {
                    // All ones is what reading nothing gives.
                    u8::MAX => (ErrorKind::Gone, "nothing answers at its registers"),
                    now if now & status::DEVICE_NEEDS_RESET != 0 => {
                        (ErrorKind::Device, "it failed, and asks for a reset")
                    }
                    now if now & status::DRIVER_OK == 0 => (ErrorKind::Device, "somebody else has reset it"),
                    _ => return None,
                };
                Some(Error::new(kind, "go on", why).mend(MEND))
            });
            if let Some(failure) = failure {
                self.failure_reported = true;
                for queue in &mut running.queues {
                    queue.status.break_down(failure.to_string());
                    queue.reported = true;
                }
                return Some(failure);
            }
        }
        let queue =
            running.queues.iter_mut().find(|queue| !queue.reported && queue.status.broken().is_some())?;
        queue.reported = true;
        let why = queue.status.broken().unwrap_or_default().to_owned();
        Some(Error::new(ErrorKind::Device, format!("use {}", queue.name), why).mend(MEND))
    }
}

impl Drop for VirtioNet {
    /// Stops the device. Queues that are still lent out do nothing from here on.
    fn drop(&mut self) {
        self.quiesce();
        if let Err(error) = self.halt() {
            tracing::error!("{}", self.named(error));
        }
        match self.device.set_bus_master(false) {
            // What is not there does no DMA.
            Err(error) if error.kind() != ErrorKind::Gone => tracing::error!("{}", self.named(error)),
            _ => {}
        }
    }
}

impl fmt::Debug for VirtioNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioNet")
            .field("device", &self.device)
            .field("offer", &self.offer)
            .field("running", &self.running.is_some())
            .finish_non_exhaustive()
    }
}
