//! Page requests: what a device with PRI asks for when a translation fails, instead of giving up.
//!
//! Source: "IO Page Fault" in `include/uapi/linux/iommufd.h` of Linux 7.3; PCI Express Base Specification 6.0, section 10.4.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::calls::{self, FaultFd};
use super::{Device, Object, uapi};
use crate::{Access, Error, Fault, FaultReason, Iova, Pasid, Result};

/// Requests that a read takes at first, and at most: those of one group have to fit.
const FIRST_READ: usize = 128;
const LARGEST_READ: usize = 32 * 1024;

/// The page requests of a device in one address space. They wait in the kernel until somebody looks.
#[derive(Debug)]
pub(super) struct RequestQueue {
    // Closed before the object is destroyed, which the kernel refuses otherwise.
    fd: FaultFd,
    object: Object,
    device: (u32, Arc<str>),
    /// Read and answered, but not yet handed out.
    pending: Mutex<VecDeque<Fault>>,
}

impl RequestQueue {
    /// One for `device`; none where the kernel has no such queues (before 6.11).
    pub(super) fn new(ioas: &Object, device: &dyn Device) -> Result<Option<Self>> {
        match calls::fault_queue_alloc(ioas.fd()) {
            Ok((id, fd)) => Ok(Some(Self {
                fd,
                object: Object::new(&ioas.iommufd, id, "queue of page requests"),
                device: (device.id(), device.name().into()),
                pending: Mutex::default(),
            })),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
            Err(error) => Err(Error::os("make a queue of page requests", "the kernel refuses", error)),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.object.id
    }

    /// The oldest request that nobody has seen. All that are there are answered first: the device may not have the page.
    pub(super) fn next(&self) -> Result<Option<Fault>> {
        // A panic leaves whole faults in the queue.
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.is_empty() {
            let requests = self.read()?;
            pending.extend(requests.iter().map(|request| fault(request, self.device.0, &self.device.1)));
            // All of them, whatever becomes of one: what was read comes only once, and the device waits for each.
            cookies(&requests).into_iter().map(|cookie| self.refuse(cookie)).fold(Ok(()), Result::and)?;
        }
        Ok(pending.pop_front())
    }

    fn read(&self) -> Result<Vec<uapi::iommu_hwpt_pgfault>> {
        let mut requests = vec![uapi::iommu_hwpt_pgfault::default(); FIRST_READ];
        loop {
            match self.fd.read(&mut requests) {
                Ok(count) => {
                    requests.truncate(count);
                    return Ok(requests);
                }
                // A group that does not fit.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && requests.len() < LARGEST_READ => {
                    requests.resize(requests.len() * 4, uapi::iommu_hwpt_pgfault::default());
                }
                Err(error) => {
                    return Err(Error::os(
                        "read the page requests of the device",
                        "the kernel refuses",
                        error,
                    ));
                }
            }
        }
    }

    fn refuse(&self, cookie: u32) -> Result<()> {
        let code = uapi::iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID;
        match self.fd.respond(cookie, code) {
            // Detaching the PASID that it came from, in another thread, has answered it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Err(error) => Err(Error::os("answer a page request of the device", "the kernel refuses", error)
                .mend("reset the device: it may wait for the answer")),
            Ok(()) => Ok(()),
        }
    }
}

/// The cookies of the groups in `requests`, each once.
fn cookies(requests: &[uapi::iommu_hwpt_pgfault]) -> Vec<u32> {
    // The kernel hands out a group's requests one after the other.
    let mut cookies: Vec<_> = requests.iter().map(|request| request.cookie).collect();
    cookies.dedup();
    cookies
}

fn fault(request: &uapi::iommu_hwpt_pgfault, id: u32, name: &Arc<str>) -> Fault {
    let has_pasid = request.flags & uapi::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_PASID_VALID != 0;
    let writes = request.perm & uapi::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_WRITE != 0;
    let reads = request.perm & uapi::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_READ != 0;
    Fault {
        // Another of the same IOMMU group may share the page table.
        device: if request.dev_id == id {
            Arc::clone(name)
        } else {
            format!("device {}", request.dev_id).into()
        },
        pasid: Pasid::new(request.pasid).filter(|_| has_pasid),
        iova: Iova::new(request.addr),
        access: match (reads, writes) {
            (true, true) => Access::READ_WRITE,
            (false, true) => Access::WRITE,
            _ => Access::READ,
        },
        reason: FaultReason::PageRequest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_told_as_a_fault() {
        let name: Arc<str> = "0000:3b:00.0".into();
        let request = uapi::iommu_hwpt_pgfault {
            flags: 1,
            dev_id: 7,
            pasid: 5,
            perm: 2,
            addr: 0x4000_1000,
            cookie: 9,
            ..Default::default()
        };
        let told = fault(&request, 7, &name);
        assert_eq!(
            (told.pasid, told.iova, told.access),
            (Pasid::new(5), Iova::new(0x4000_1000), Access::WRITE)
        );
        assert_eq!(
            told.to_string(),
            "0000:3b:00.0: write of 0x40001000 under PASID 5 refused: the device asked for a page that it may not have"
        );
        let own = fault(&uapi::iommu_hwpt_pgfault { flags: 2, perm: 3, dev_id: 8, ..request }, 7, &name);
        assert_eq!(
            (own.pasid, own.access),
            (None, Access::READ_WRITE),
            "the PASID means nothing without its flag"
        );
        assert_eq!(&*own.device, "device 8");
    }

    #[test]
    fn each_group_is_answered_once() {
        let requests: Vec<_> =
            [3, 3, 3, 1, 2, 2].map(|cookie| uapi::iommu_hwpt_pgfault { cookie, ..Default::default() }).into();
        assert_eq!(cookies(&requests), [3, 1, 2]);
        assert_eq!(cookies(&[]), []);
    }
}
