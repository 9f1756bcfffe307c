//! PASIDs: each is attached to the page table of its space and no other, and what a device can not do is said.

use std::sync::Arc;

use underpass_iommu::iommufd::{Device, Iommufd};
use underpass_iommu::{Access, Attachable, AttachableKind, Error, ErrorKind, Iova, Pasid, Result};

use crate::kernel::{HAS_PASIDS, LAST_PASID};
use crate::rig::{map, pasid, small, with_mock};

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_pasid_is_attached_to_the_page_table_of_its_space_until_it_is_detached() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let [one, other] = [(); 2].map(|()| rig.ioas());
        let number = pasid(5);
        let is_at = |table| rig.kernel.pasid_has(device.ids(), number.get(), table);
        assert!(is_at(None));
        let attachment = one.attach(&device, Some(number)).unwrap();
        let table = device.page_table(Some(number));
        assert!(table.is_some() && is_at(table));
        let mapping = map(&one, &small(3));
        assert!(rig.maps(table.unwrap(), &mapping));
        for ioas in [&one, &other] {
            assert_eq!(ioas.attach(&device, Some(number)).unwrap_err().kind(), ErrorKind::Busy);
            assert!(is_at(table), "who is refused changes nothing");
        }
        drop(attachment);
        assert!(is_at(None));
        assert_eq!(device.page_table(Some(number)), None);
        // The same PASID in another space: the device now reaches what is mapped there.
        let _attachment = other.attach(&device, Some(number)).unwrap();
        let theirs = map(&other, &small(2));
        let table = device.page_table(Some(number));
        assert!(is_at(table) && rig.maps(table.unwrap(), &theirs));
        assert!(!rig.maps_any_at(table.unwrap(), mapping.iova(), mapping.region()));
    });
}

/// The kernel moves a PASID that is attached already, without a word: what the backend refuses to have happen.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_pasid_that_is_replaced_leaves_its_old_page_table() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let AttachableKind::Iommufd(bound) = device.kind() else { panic!("the mock is no such device") };
        let [one, other] = [(); 2].map(|()| rig.ioas());
        let number = pasid(12);
        let _attachment = one.attach(&device, Some(number)).unwrap();
        let _elsewhere = other.attach(&device, Some(pasid(13))).unwrap();
        let [from, to] = [number, pasid(13)].map(|pasid| device.page_table(Some(pasid)).unwrap());
        let is_at = |table| rig.kernel.pasid_has(device.ids(), number.get(), Some(table));
        assert!(is_at(from) && !is_at(to));
        assert_eq!(bound.attach(to, Some(number)).unwrap(), to);
        assert!(is_at(to) && !is_at(from));
        assert_eq!(bound.attach(from, Some(number)).unwrap(), from);
        assert!(is_at(from));
        // Not to one that is not there; and the PASID stays where it was.
        assert!(bound.attach(10_000, Some(number)).is_err());
        assert!(is_at(from));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn pasids_with_a_space_each_are_isolated() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let numbers = [None, Some(pasid(1)), Some(pasid(2)), Some(pasid(77)), Some(pasid(0x8_0000))];
        let spaces = numbers.map(|_| rig.ioas());
        let _attachments: Vec<_> = numbers
            .iter()
            .zip(&spaces)
            .map(|(number, ioas)| ioas.attach(&device, *number).unwrap())
            .collect();
        // Of different sizes, so that the spaces do not look alike by chance.
        let mappings: Vec<_> = (3..).zip(&spaces).map(|(pages, ioas)| map(ioas, &small(pages))).collect();
        for (n, number) in numbers.iter().enumerate() {
            let table = device.page_table(*number).unwrap();
            assert!(number.is_none_or(|number| rig.kernel.pasid_has(
                device.ids(),
                number.get(),
                Some(table)
            )));
            for (m, mapping) in mappings.iter().enumerate() {
                if n == m {
                    assert!(rig.maps(table, mapping));
                } else {
                    assert!(!rig.maps_any_at(table, mapping.iova(), mapping.region()));
                }
            }
        }
        // Not by address, but by space: the same address is other memory in each.
        assert!(mappings.windows(2).all(|pair| pair[0].iova() == pair[1].iova()), "{mappings:?}");
        for (m, mapping) in mappings.iter().enumerate() {
            let space = rig.ioas_of(device.page_table(numbers[m]).unwrap());
            rig.kernel.write(space, mapping.iova(), m as u8 + 1).unwrap();
        }
        for (m, mapping) in mappings.iter().enumerate() {
            let space = rig.ioas_of(device.page_table(numbers[m]).unwrap());
            assert_eq!(rig.kernel.read(space, mapping.iova()).unwrap(), m as u8 + 1);
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn many_pasids_of_a_device_in_one_space_share_its_page_table() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let ioas = rig.ioas();
        let own = ioas.attach(&device, None).unwrap();
        let mut attachments: Vec<_> =
            (1..=64).map(|number| ioas.attach(&device, Some(pasid(number))).unwrap()).collect();
        let table = device.page_table(None).unwrap();
        let mapping = map(&ioas, &small(4));
        for number in 1..=64 {
            assert_eq!(device.page_table(Some(pasid(number))), Some(table));
            assert!(rig.kernel.pasid_has(device.ids(), number, Some(table)));
        }
        // It lasts as long as anybody is attached to it.
        drop(own);
        let last = attachments.pop().unwrap();
        drop(attachments);
        assert!(rig.kernel.pasid_has(device.ids(), 64, Some(table)) && rig.maps(table, &mapping));
        drop(last);
        assert_eq!(rig.kernel.destroy(table).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_without_pasids_says_so_and_keeps_its_own_space() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let own = ioas.attach(&device, None).unwrap();
        assert_eq!(own.capabilities().max_pasids, 0);
        let error = ioas.attach(&device, Some(pasid(1))).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Exhausted), "{error}");
        assert!(error.to_string().contains("PASID") && error.mend_text().is_some(), "{error}");
        assert!(rig.kernel.pasid_has(device.ids(), 1, None));
        let mapping = map(&ioas, &small(1));
        assert!(rig.maps(device.page_table(None).unwrap(), &mapping));
    });
}

/// Plays a second device of an IOMMU group, which the kernel attaches to the first one's page table and to no other. (Each
/// mock device has a group of its own.)
#[derive(Debug)]
struct Second {
    device: Arc<dyn Device>,
    first_ones: u32,
}

impl Device for Second {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn id(&self) -> u32 {
        self.device.id()
    }

    fn iommufd(&self) -> &Iommufd {
        self.device.iommufd()
    }

    fn attach(&self, page_table: u32, pasid: Option<Pasid>) -> Result<u32> {
        if page_table != self.first_ones {
            return Err(Error::os("attach", "refused", std::io::Error::from_raw_os_error(libc::EINVAL)));
        }
        self.device.attach(page_table, pasid)
    }

    fn detach(&self, pasid: Option<Pasid>) -> Result<()> {
        self.device.detach(pasid)
    }
}

struct Bound(Arc<dyn Device>);

impl Attachable for Bound {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Iommufd(&self.0)
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn who_shares_a_page_table_with_a_device_that_has_pasids_has_none_for_that() {
    with_mock(|rig| {
        let (first, mock) = (rig.device(HAS_PASIDS), rig.device(0));
        let ioas = rig.ioas();
        let attachment = ioas.attach(&first, None).unwrap();
        let table = first.page_table(None).unwrap();
        let AttachableKind::Iommufd(device) = mock.kind() else { panic!("the mock is no such device") };
        let second = Bound(Arc::new(Second { device: Arc::clone(device), first_ones: table }));
        let other = ioas.attach(&second, None).unwrap();
        assert_eq!(mock.page_table(None), Some(table));
        assert_eq!(attachment.capabilities().max_pasids, LAST_PASID);
        assert_eq!(other.capabilities().max_pasids, 0);
        assert_eq!(ioas.attach(&second, Some(pasid(1))).unwrap_err().kind(), ErrorKind::Exhausted);
        // The table lasts as long as either has it.
        drop(attachment);
        let mapping = map(&ioas, &small(2));
        assert!(rig.maps(table, &mapping));
        drop(other);
        assert_eq!(rig.kernel.destroy(table).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn pasids_end_where_the_device_says() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let ioas = rig.ioas();
        let last = ioas.attach(&device, Pasid::new(LAST_PASID)).unwrap();
        assert_eq!(last.capabilities().max_pasids, LAST_PASID);
        assert!(rig.kernel.pasid_has(device.ids(), LAST_PASID, device.page_table(Pasid::new(LAST_PASID))));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_of_its_own_and_its_pasids_come_and_go_in_any_order() {
    with_mock(|rig| {
        let device = rig.device(HAS_PASIDS);
        let [one, other] = [(); 2].map(|()| rig.ioas());
        let first = one.attach(&device, Some(pasid(9))).unwrap();
        let own = other.attach(&device, None).unwrap();
        let second = one.attach(&device, Some(pasid(10))).unwrap();
        let [here, there] = [&one, &other].map(|ioas| ioas.map(&small(2), Access::READ_WRITE).unwrap());
        let table = device.page_table(Some(pasid(10))).unwrap();
        assert!(rig.maps(table, &here));
        assert!(rig.maps(device.page_table(None).unwrap(), &there));
        drop(own);
        assert!(rig.kernel.pasid_has(device.ids(), 9, Some(table)));
        drop(first);
        assert!(rig.kernel.pasid_has(device.ids(), 9, None));
        assert!(rig.kernel.pasid_has(device.ids(), 10, Some(table)) && rig.maps(table, &here));
        let _own = one.attach(&device, None).unwrap();
        assert_eq!(device.page_table(None), Some(table), "a device has one page table a space");
        drop((second, there));
        assert!(rig.maps(table, &here));
        assert_ne!(here.iova(), Iova::new(0));
    });
}
