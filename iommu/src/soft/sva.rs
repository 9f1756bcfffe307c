//! Reaching this process's own memory at an address that may not exist.
//!
//! Under SVA a device uses this process's pointers, and another thread may unmap one at any time. Dereferencing it
//! would crash; `process_vm_readv(2)` and `process_vm_writev(2)` on ourselves look it up in the kernel's page table at
//! the moment of the access, and report what is not there. That costs a system call for each 64 KiB.
//!
//! All of it is marked cold, so that it takes no registers from the accesses that are not SVA.
//!
//! # Why this module is unsafe, and what makes it sound
//! The kernel copies between a Rust slice of ours and an address that a device chose. The slice is described
//! exactly. Whether the device may write at that address is what the [`SvaToken`](crate::SvaToken)'s maker vouched for.

use std::io;

use crate::{Access, Error, ErrorKind, Result};

const PAGE: u64 = 4096;
/// Pages in one call: one access covers at most 64 KiB, which touches at most 17.
const PAGES: usize = 17;

/// Reads from `address` on until `out` is full or a page is missing; returns how many bytes were read.
#[cold]
#[inline(never)]
pub(super) fn read(address: u64, out: &mut [u8]) -> usize {
    let me = std::process::id().cast_signed();
    transfer(address, out.len(), |remote, done, len| {
        let local = libc::iovec { iov_base: out[done..].as_mut_ptr().cast(), iov_len: len };
        // SAFETY: `local` describes len bytes of `out`, which is borrowed mutably; the kernel checks the remote
        // addresses, which it only reads.
        unsafe { libc::process_vm_readv(me, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0) }
    })
}

/// Writes `data` from `address` on until a page is missing or read-only; returns how many bytes were written.
#[cold]
#[inline(never)]
pub(super) fn write(address: u64, data: &[u8]) -> usize {
    let me = std::process::id().cast_signed();
    transfer(address, data.len(), |remote, done, len| {
        let local = libc::iovec { iov_base: data[done..].as_ptr().cast_mut().cast(), iov_len: len };
        // SAFETY: `local` describes len bytes of `data`, which the kernel only reads; it checks the remote
        // addresses, and that a device may write there is what the SVA token stands for.
        unsafe { libc::process_vm_writev(me, &raw const local, 1, remote.as_ptr(), remote.len() as _, 0) }
    })
}

/// How many of the `len` bytes from `address` on could be accessed now, up to the first page that could not.
#[cold]
#[inline(never)]
pub(super) fn accessible(address: u64, len: u64, access: Access) -> u64 {
    let mut at = 0;
    while at < len {
        if !check(address + at, access) {
            return at;
        }
        at += PAGE - (address + at) % PAGE;
    }
    len
}

/// Whether `access` to the byte at `address` would be possible now. Whether it is writable is looked up instead of
/// tried: writing back what was read could undo another thread's write.
#[cold]
#[inline(never)]
pub(super) fn check(address: u64, access: Access) -> bool {
    let mut byte = [0];
    if read(address, &mut byte) == 0 {
        return false;
    }
    !access.allows(Access::WRITE) || writable(address)
}

/// Calls `call(remote pages, bytes done, bytes of these pages)` until all is done or a call falls short.
fn transfer(address: u64, len: usize, mut call: impl FnMut(&[libc::iovec], usize, usize) -> isize) -> usize {
    let mut done = 0;
    while done < len {
        // One element a page: the kernel never stops in the middle of an element.
        let mut pages = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PAGES];
        let (mut count, mut bytes) = (0, 0);
        while count < PAGES && done + bytes < len {
            let Some(at) = address.checked_add((done + bytes) as u64) else {
                break;
            };
            let n = ((PAGE - at % PAGE) as usize).min(len - done - bytes);
            pages[count] =
                libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(at as usize), iov_len: n };
            count += 1;
            bytes += n;
        }
        if count == 0 {
            break;
        }
        let moved = call(&pages[..count], done, bytes);
        done += usize::try_from(moved).unwrap_or(0);
        if moved != bytes.cast_signed() {
            break;
        }
    }
    done
}

/// Whether the mapping that holds `address` is writable, from /proc/self/maps.
fn writable(address: u64) -> bool {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return false;
    };
    maps.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        let Some((first, end)) = words.next().and_then(|range| range.split_once('-')) else {
            return false;
        };
        let within = u64::from_str_radix(first, 16).is_ok_and(|first| first <= address)
            && u64::from_str_radix(end, 16).is_ok_and(|end| address < end);
        within && words.next().is_some_and(|rights| rights.as_bytes().get(1) == Some(&b'w'))
    })
}

/// Checks that the kernel lets this process reach itself that way.
pub(super) fn available() -> Result<()> {
    let word = 0x5a5a_u64;
    let mut out = [0; 8];
    if read((&raw const word).expose_provenance() as u64, &mut out) == 8 && u64::from_ne_bytes(out) == word {
        return Ok(());
    }
    let errno = io::Error::last_os_error();
    Err(Error::new(
        ErrorKind::Unsupported,
        "share the process's address space with a device",
        format!("process_vm_readv on this process itself failed ({errno})"),
    )
    .mend("allow process_vm_readv and process_vm_writev in the container's seccomp profile"))
}
