//! A tap interface of the kernel: what the network stack sends on it is read here, what is written here it receives.
//!
//! This module holds `unsafe` for one system call that no safe interface offers: it names the interface that an open
//! file stands for. The call reads and writes one structure of the kernel's size, which lives on the stack until it returns.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};

use crate::{Error, ErrorKind, Result};

const DEVICE: &str = "/dev/net/tun";

/// Bytes of an interface's name, with the zero at its end (`linux/if.h`).
const NAME_LEN: usize = 16;

/// Frames with their Ethernet header (`linux/if_tun.h`).
const IFF_TAP: u16 = 0x0002;
/// Without a header of the tap's own in front.
const IFF_NO_PI: u16 = 0x1000;
/// Several files for one interface, each a queue.
const IFF_MULTI_QUEUE: u16 = 0x0100;

/// The part of `struct ifreq` that matters here, in its whole size (`linux/if.h`).
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_LEN],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

/// `TUNSETIFF` (`linux/if_tun.h`), which was defined with a plain number's size.
const SET_INTERFACE: rustix::ioctl::Opcode = opcode::write::<i32>(b'T', 202);

/// Opens the tap interface `name`, and creates it if there is none: one file for each queue. A read of a file takes one
/// frame, a write sends one; neither waits.
///
/// # Errors
/// [`InvalidInput`](ErrorKind::InvalidInput) for a name that no interface can have; [`Permission`](ErrorKind::Permission)
/// without `CAP_NET_ADMIN`, unless the interface was made for this user; [`Busy`](ErrorKind::Busy) if another process has
/// it.
pub fn open(name: &str, queues: usize) -> Result<Vec<File>> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    if !(1..NAME_LEN).contains(&name.len()) || !name.bytes().all(allowed) || matches!(name, "." | "..") {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("open the tap {name:?}"),
            "no interface has such a name",
        )
        .mend("use 1 to 15 letters and digits"));
    }
    let is_new = !interface(name).exists();
    let files = (0..queues).map(|_| open_queue(name, queues > 1)).collect::<Result<_>>()?;
    if is_new {
        tracing::info!(
            "the tap {name} was not there: it is new, and goes when its last user does; to use it, run: sudo ip link \
             set {name} up"
        );
    }
    Ok(files)
}

fn open_queue(name: &str, is_one_of_many: bool) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(DEVICE)
        .map_err(|error| not_opened(name, error))?;
    let mut request = InterfaceRequest { name: [0; NAME_LEN], flags: IFF_TAP | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    if is_one_of_many {
        request.flags |= IFF_MULTI_QUEUE;
    }
    // SAFETY: the operation reads and writes one `struct ifreq`, and that is what it is given, in its whole size.
    let operation = unsafe { Updater::<SET_INTERFACE, _>::new(&mut request) };
    // SAFETY: the operation is the one of the file's driver, and borrows what it works on until it has returned.
    match unsafe { ioctl(&file, operation) } {
        Ok(()) => Ok(file),
        Err(errno) => {
            let is_tap = interface(name).join("tun_flags").exists();
            Err(refused(name, is_one_of_many, is_tap, errno))
        }
    }
}

/// Where the kernel shows the interface, if there is one.
fn interface(name: &str) -> PathBuf {
    Path::new("/sys/class/net").join(name)
}

/// The kernel's device of all taps can not be opened.
fn not_opened(name: &str, error: io::Error) -> Error {
    let mend = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "run it with sudo, or as a user that may open the file (see: ls -l /dev/net/tun)"
        }
        _ => "run: sudo modprobe tun; in a container, pass the device in (--device /dev/net/tun)",
    };
    Error::os(format!("open the tap {name}"), format!("{DEVICE} can not be opened"), error).mend(mend)
}

/// `is_tap`: there is an interface of this name, and it is a tap or a tun.
fn refused(name: &str, is_one_of_many: bool, is_tap: bool, errno: Errno) -> Error {
    let add = format!(
        "ip tuntap add dev {name} mode tap user $USER{}",
        if is_one_of_many { " multi_queue" } else { "" }
    );
    let (why, mend) = match errno {
        Errno::PERM => ("this user may not create or use it", format!("run: sudo {add}")),
        Errno::BUSY => ("another process uses it", "end that process, or use another name".to_owned()),
        Errno::INVAL if is_tap => (
            "it was made for another number of queues, or is a tun",
            format!("use another name, or run: sudo ip link del {name} && sudo {add}"),
        ),
        // Nothing is said of deleting what was not made for this.
        Errno::INVAL => ("an interface of this name is no tap", "use another name".to_owned()),
        _ => ("the kernel refused", format!("run: sudo {add}")),
    };
    Error::os(format!("open the tap {name}"), why, errno).mend(mend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_before_the_kernel_is_asked() {
        for name in ["", "..", "tap/0", "tap%d", "tap 0", "a-name-that-is-too-long"] {
            let error = open(name, 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
    }

    #[test]
    fn who_may_not_open_it_is_told_the_command_that_mends_it() {
        let error = refused("tap7", false, false, Errno::PERM);
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(
            error.to_string().ends_with("; run: sudo ip tuntap add dev tap7 mode tap user $USER"),
            "{error}"
        );
        assert!(refused("tap7", true, false, Errno::PERM).to_string().ends_with(" multi_queue"));
    }

    #[test]
    fn only_a_tap_is_to_be_deleted() {
        let told = |is_tap| refused("lo", false, is_tap, Errno::INVAL).to_string();
        assert!(told(true).contains("ip link del lo"), "{}", told(true));
        assert!(told(false).ends_with("; use another name"), "{}", told(false));
        assert!(!interface("lo").join("tun_flags").exists());
    }

    #[test]
    fn a_device_that_may_not_be_opened_is_not_one_that_is_not_there() {
        let told = |kind: io::ErrorKind| not_opened("tap7", kind.into()).to_string();
        assert!(!told(io::ErrorKind::PermissionDenied).contains("modprobe"));
        assert!(told(io::ErrorKind::NotFound).contains("modprobe tun"));
    }
}
