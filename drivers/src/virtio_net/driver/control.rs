//! The control queue ("Control Virtqueue", 5.1.6.5): one command at a time, each waited for.

use std::sync::Arc;

use underpass::dma::{DmaBuf, DmaSpace};
use underpass::net::{MacAddr, Rss};
use underpass::pci::PciDevice;
use underpass::{Access, Error, ErrorKind, Result};
use zerocopy::IntoBytes;

use super::offer::MAX_RSS_TABLE;
use super::transport::{DEADLINE, Notifier, Transport, poll};
use super::virtqueue::{Buffer, Virtqueue};
use crate::virtio_net::spec::control::{BasicStats, Command, HashConfigHead, OK, RssConfigHead};
use crate::virtio_net::spec::pci::status;

/// Entries of the queue, at most.
pub(super) const DEPTH: u16 = 16;

/// Buffers of a command: what the device reads, and its answer.
pub(super) const CHAIN: u16 = 2;

/// Bytes of memory for a command and its answer: the longest RSS table, or the addresses of some 1300 filters.
pub(super) const MEMORY: usize = 8192;

/// Those of the answer and a result, in a line of their own.
const ANSWER: usize = 64;

const _: () = assert!(2 * MAX_RSS_TABLE + 512 <= MEMORY - ANSWER);
const _: () = assert!(size_of::<BasicStats>() < ANSWER);

/// A control queue, whatever its ring is.
pub(super) trait ControlQueue: Send {
    /// Has the device do `command`, in words `what`. Returns its result, of `result` bytes.
    fn command(
        &mut self,
        transport: &Transport,
        what: &'static str,
        command: Command,
        data: &[u8],
        result: usize,
    ) -> Result<&[u8]>;
}

/// The control queue.
pub(super) struct Control<Q> {
    queue: Q,
    notifier: Notifier,
    request: DmaBuf,
    answer: DmaBuf,
    space: Arc<DmaSpace>,
    device: Arc<PciDevice>,
    /// The device has not answered and may yet do so.
    stuck: bool,
}

impl<Q: Virtqueue<Token = ()>> Control<Q> {
    pub(super) fn new(
        queue: Q,
        notifier: Notifier,
        mut memory: DmaBuf,
        space: Arc<DmaSpace>,
        device: Arc<PciDevice>,
    ) -> Self {
        let answer = memory.split_off(MEMORY - ANSWER);
        Self { queue, notifier, request: memory, answer, space, device, stuck: false }
    }

    fn failed(&self, kind: ErrorKind, what: &'static str, why: impl Into<String>) -> Error {
        Error::new(kind, what, why.into()).device(self.device.name().to_owned())
    }
}

impl<Q: Virtqueue<Token = ()> + Send> ControlQueue for Control<Q> {
    fn command(
        &mut self,
        transport: &Transport,
        what: &'static str,
        command: Command,
        data: &[u8],
        result: usize,
    ) -> Result<&[u8]> {
        if self.stuck {
            let why = "an earlier command was not answered";
            return Err(self.failed(ErrorKind::Gone, what, why).mend("stop it and start it again"));
        }
        let head = command.as_bytes();
        let len = head.len() + data.len();
        if len > self.request.len() {
            let why = format!("the command has {len} bytes, and {} at most", self.request.len());
            return Err(self.failed(ErrorKind::InvalidInput, what, why).mend("give it fewer addresses"));
        }
        self.request[..head.len()].copy_from_slice(head);
        self.request[head.len()..len].copy_from_slice(data);
        self.answer[0] = !OK;

        let out = self.space.hand_out(&self.request, Access::READ);
        let back = self.space.hand_out(&self.answer, Access::WRITE);
        let (Some(out), Some(back)) = (out, back) else {
            return Err(self.failed(ErrorKind::InvalidInput, what, "its memory is not mapped"));
        };
        let buffers = [Buffer::readable(out, len as u32), Buffer::writable(back, 1 + result as u32)];
        self.stuck = true;
        if self.queue.add((), &buffers).is_err() {
            return Err(self.failed(ErrorKind::Device, what, "the control queue is broken"));
        }
        self.queue.publish();
        if self.queue.needs_notify() {
            self.notifier.notify(self.queue.position());
        }
        let used = poll(|| {
            self.device.lend(0);
            // Reading a register also steps a device that only does something then.
            let failed = transport.status() & status::DEVICE_NEEDS_RESET != 0;
            match self.queue.take_used() {
                Ok(None) if failed => Some(Err("the device failed: it asks for a reset")),
                Ok(None) => None,
                Ok(Some(((), written))) => Some(Ok(written as usize)),
                Err(broken) => Some(Err(broken.why)),
            }
        });
        let written = match used {
            Some(Ok(written)) => written,
            Some(Err(why)) => {
                return Err(self.failed(ErrorKind::Device, what, why).mend("stop it and start it again"));
            }
            None => {
                let why = format!("the control queue has no answer after {DEADLINE:?}");
                return Err(self.failed(ErrorKind::Timeout, what, why).mend("stop it and start it again"));
            }
        };
        self.stuck = false;
        self.space.take_back(&self.request, Access::READ);
        self.space.take_back(&self.answer, Access::WRITE);
        match self.answer[0] {
            OK if result != 0 && written <= result => {
                let why =
                    format!("its result has {result} bytes, and the device wrote {written} with the answer");
                Err(self.failed(ErrorKind::Device, what, why).mend("do without it"))
            }
            OK => Ok(&self.answer[1..=result]),
            answer => Err(self
                .failed(ErrorKind::Device, what, format!("the device refused it: its answer is {answer}"))
                .mend("do without it, or have the device support it")),
        }
    }
}

/// The data of [`Command::MAC_TABLE_SET`].
pub(super) fn mac_table(addresses: &[MacAddr]) -> Vec<u8> {
    let mut data = Vec::with_capacity(8 + 6 * addresses.len());
    for multicast in [false, true] {
        let those = || addresses.iter().filter(|address| address.is_multicast() == multicast);
        data.extend((those().count() as u32).to_le_bytes());
        those().for_each(|address| data.extend(address.octets()));
    }
    data
}

/// The data of [`Command::MQ_RSS_CONFIG`].
pub(super) fn rss_config(rss: &Rss, hash_types: u32, tx_queues: u16) -> Vec<u8> {
    let head = RssConfigHead {
        hash_types,
        // A power of two up to MAX_RSS_TABLE.
        indirection_table_mask: (rss.table.len() - 1) as u16,
        unclassified_queue: 0,
    };
    let mut data = head.as_bytes().to_vec();
    data.extend(rss.table.iter().flat_map(|pair| pair.to_le_bytes()));
    data.extend(tx_queues.to_le_bytes());
    data.push(rss.key.len() as u8);
    data.extend(&rss.key);
    data
}

/// The data of [`Command::MQ_HASH_CONFIG`].
pub(super) fn hash_config(key: &[u8], hash_types: u32) -> Vec<u8> {
    let head = HashConfigHead { hash_types, ..HashConfigHead::default() };
    let mut data = head.as_bytes().to_vec();
    data.push(key.len() as u8);
    data.extend(key);
    data
}
