//! What is told of refusals that no test machine brings about, or not all of them.

use super::*;

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn mend(error: &Error) -> &str {
    error.mend_text().expect("every refusal has a mend")
}

#[test]
fn a_missing_iommufd_is_told_from_a_forbidden_one() {
    let missing = open(errno(libc::ENOENT));
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(mend(&missing).contains("modprobe iommufd") && mend(&missing).contains("CONFIG_IOMMUFD"));
    let forbidden = open(errno(libc::EACCES));
    assert_eq!(forbidden.kind(), ErrorKind::Permission);
    assert!(mend(&forbidden).contains("chown"));
}

#[test]
fn a_refused_bind_says_which_of_its_causes_it_is() {
    let alone = || Group { number: Some(7), devices: 1, in_use: vec![] };
    let not_viable = Group { number: Some(7), devices: 2, in_use: vec!["0000:00:1f.6 (e1000e)".to_owned()] };
    let shared = Group { devices: 2, ..alone() };
    for (code, group, with_token, kind, says, mended_by) in [
        (libc::EPERM, not_viable, false, ErrorKind::Permission, "0000:00:1f.6 (e1000e)", "underpass bind"),
        (
            libc::EPERM,
            alone(),
            false,
            ErrorKind::Permission,
            "interrupt remapping",
            "allow_unsafe_interrupts",
        ),
        (libc::EPERM, shared, false, ErrorKind::Permission, "another process has a device of", "remapping"),
        (libc::EBUSY, alone(), false, ErrorKind::Busy, "IOMMU group 7", "fuser"),
        (libc::EINVAL, alone(), false, ErrorKind::Busy, "another process has it open", "fuser"),
        (libc::EINVAL, alone(), true, ErrorKind::InvalidInput, "no VF token", "leave the token out"),
        (libc::EACCES, alone(), false, ErrorKind::Permission, "needs its VF token", "vf-token="),
        (libc::EACCES, alone(), true, ErrorKind::Permission, "another one", "vf-token="),
        (libc::ENODEV, alone(), false, ErrorKind::Gone, "gone", "lspci"),
    ] {
        let error = bind(errno(code), &group, with_token);
        assert_eq!((error.kind(), error.errno()), (kind, Some(code)), "{error}");
        assert!(error.to_string().contains(says) && mend(&error).contains(mended_by), "{error}");
    }
    let unrelated = bind(errno(libc::EPERM), &alone(), false).to_string();
    assert!(!unrelated.contains("another process"), "nobody else can be in its group: {unrelated}");
}

#[test]
fn a_refused_pasid_says_who_refuses_it() {
    let pasid = Pasid::new(5).unwrap();
    let old = no_pasids(pasid, &Registers::Unknown, Some("6.14.11-amd64"));
    assert!(old.to_string().contains("Linux 6.14.11-amd64") && mend(&old).contains("6.15"), "{old}");
    for release in [Some("6.15.0"), Some("7.3.4"), Some("10.0-rc1"), Some("strange"), None] {
        let error = no_pasids(pasid, &Registers::Unknown, release);
        assert!(error.to_string().contains("virtio-iommu has none"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Exhausted);
    }
    let amd = Registers::new(iommufd_bindings::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD, &[0xff; 16]);
    let error = attach(Some(libc::EOPNOTSUPP), Some(pasid), &amd, 0);
    assert!(error.to_string().contains("AMD-Vi") && error.kind() == ErrorKind::Unsupported, "{error}");
    let error = attach(Some(libc::EOPNOTSUPP), Some(pasid), &Registers::Unknown, 0);
    assert!(!error.to_string().contains("AMD-Vi") && error.kind() == ErrorKind::Unsupported, "{error}");
}

#[test]
fn a_refused_attachment_says_what_is_in_the_way() {
    for (code, kind, says) in [
        (libc::EADDRINUSE, ErrorKind::Busy, "mapped already"),
        (libc::EINVAL, ErrorKind::Busy, "another device of its IOMMU group"),
        (libc::EBUSY, ErrorKind::Busy, "resetting"),
        (libc::ENODEV, ErrorKind::Gone, "gone"),
        (libc::ENOMEM, ErrorKind::NoMemory, "memory"),
        (libc::EFAULT, ErrorKind::Os, "the kernel refuses"),
    ] {
        let error = attach(Some(code), None, &Registers::Unknown, 0);
        assert_eq!(error.kind(), kind);
        assert!(error.to_string().contains(says) && !mend(&error).is_empty(), "{error}");
    }
}
