//! Page requests: each is told as a fault, once, and answered.

use underpass_iommu::iommufd::Options;
use underpass_iommu::{Access, Attachable, Attachment, Fault, FaultReason, Iova, Pasid};

use crate::kernel::{HAS_PASIDS, RequestQueue};
use crate::rig::{MockDevice, Rig, pasid, small, with_mock, with_options};

fn options() -> Options {
    Options { page_faults: true, ..Options::default() }
}

const READ: u32 = 1;
const WRITE: u32 = 2;

fn request(rig: &Rig, device: &MockDevice, pasid: Option<Pasid>, iova: u64, access: u32) {
    rig.kernel.request_page(device.ids(), pasid.map(Pasid::get), Iova::new(iova), access).unwrap();
}

fn all_faults(attachment: &Attachment) -> Vec<Fault> {
    std::iter::from_fn(|| attachment.next_fault().unwrap()).collect()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_request_is_a_fault_with_its_address_and_pasid() {
    with_options(options(), |rig| {
        let device = rig.device(HAS_PASIDS);
        let [one, other] = [(); 2].map(|()| rig.ioas());
        let own = one.attach(&device, None).unwrap();
        let under = other.attach(&device, Some(pasid(6))).unwrap();
        assert!(own.capabilities().fault_reporting && under.capabilities().fault_reporting);
        assert_eq!(all_faults(&own), []);
        request(rig, &device, None, 0x4000_0000, WRITE);
        request(rig, &device, Some(pasid(6)), 0xffff_ffff_f000, READ);
        request(rig, &device, Some(pasid(6)), 0x5000, READ | WRITE);
        let fault = |pasid, iova, access| Fault {
            device: device.name().into(),
            pasid,
            iova: Iova::new(iova),
            access,
            reason: FaultReason::PageRequest,
        };
        assert_eq!(all_faults(&own), [fault(None, 0x4000_0000, Access::WRITE)]);
        let theirs = [
            fault(Some(pasid(6)), 0xffff_ffff_f000, Access::READ),
            fault(Some(pasid(6)), 0x5000, Access::READ_WRITE),
        ];
        assert_eq!(all_faults(&under), theirs);
        assert_eq!(all_faults(&under), []);
    });
}

/// The mock does not tell what the answer was; that it was one, it does.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn whoever_takes_a_fault_has_answered_the_request() {
    with_options(options(), |rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        let queue = RequestQueue::open();
        request(rig, &device, None, 0x1000, READ);
        let cookie = queue.take().unwrap();
        assert_eq!(attachment.next_fault().unwrap(), None, "somebody else has it");
        queue.answer(cookie).unwrap();
        assert_eq!(queue.answer(cookie).unwrap_err().raw_os_error(), Some(libc::EINVAL), "answered");
        request(rig, &device, None, 0x2000, READ);
        assert_eq!(attachment.next_fault().unwrap().unwrap().iova, Iova::new(0x2000));
        // Cookies are the lowest numbers that are free: it had this one, and is answered.
        assert_eq!(queue.answer(cookie).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        request(rig, &device, None, 0x3000, READ);
        assert_eq!(queue.take().unwrap(), cookie, "which is free again");
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn no_request_of_many_is_lost() {
    with_options(options(), |rig| {
        let device = rig.device(HAS_PASIDS);
        let ioas = rig.ioas();
        let attachments =
            [None, Some(pasid(1)), Some(pasid(2))].map(|pasid| ioas.attach(&device, pasid).unwrap());
        let pages = || (1..=1000_u64).map(|n| (n * 4096, attachments[n as usize % 3].pasid()));
        for (iova, pasid) in pages() {
            request(rig, &device, pasid, iova, READ);
        }
        let faults = all_faults(&attachments[0]);
        assert!(faults.iter().map(|fault| (fault.iova.get(), fault.pasid)).eq(pages()));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn who_is_detached_leaves_no_request_behind() {
    with_options(options(), |rig| {
        let device = rig.device(HAS_PASIDS);
        let ioas = rig.ioas();
        for number in [None, Some(pasid(3))] {
            let attachment = ioas.attach(&device, number).unwrap();
            request(rig, &device, number, 0x7000, WRITE);
            drop(attachment);
            // A device that is attached to nothing is refused by the kernel itself.
            request(rig, &device, number, 0x8000, WRITE);
            let again = ioas.attach(&device, number).unwrap();
            assert_eq!(all_faults(&again), []);
            request(rig, &device, number, 0x9000, WRITE);
            assert_eq!(all_faults(&again).len(), 1);
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn requests_are_told_only_where_that_was_asked_for() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        assert!(!attachment.capabilities().fault_reporting);
        let mapping = ioas.map(&small(1), Access::READ).unwrap();
        request(rig, &device, None, mapping.iova().get(), READ);
        assert_eq!(all_faults(&attachment), []);
        assert!(rig.maps(device.page_table(None).unwrap(), &mapping));
    });
}
