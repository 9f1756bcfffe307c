//! What the kernel tells of a device besides its interrupts: that it wants it back, or that it failed.
//!
//! Both are eventfds (`VFIO_PCI_REQ_IRQ_INDEX`, `VFIO_PCI_ERR_IRQ_INDEX`), and one thread a device sleeps on them, so that
//! everybody else learns of it by one relaxed load. Whoever unplugs a device, or unbinds it, waits in the kernel until
//! its user has closed it (`vfio_unregister_group_dev` in `drivers/vfio/vfio_main.c` of Linux 7.3).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use underpass_iommu::{Error, ErrorKind, Result};

use super::ioctl::{self, Handle, Irq};
use crate::interrupt::Interrupt;

/// Why a device is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    /// The kernel asks for it back: it was unplugged, or somebody unbinds it.
    Asked = 1,
    /// It had an error that it does not recover from by itself.
    Failed = 2,
}

impl Gone {
    pub(super) fn error(self) -> Error {
        let error = |why| Error::new(ErrorKind::Gone, "go on", why);
        match self {
            Self::Asked => error("the device was unplugged, or the kernel asks for it back")
                .mend("close it; when it is there again and bound to vfio-pci, open it anew"),
            Self::Failed => error("the device reported an error that only a reset ends (PCI Express AER)")
                .mend("close it and open it again, which resets it; see the kernel's log: dmesg"),
        }
    }
}

/// The thread that sleeps until something happens, and what has happened.
#[derive(Debug)]
pub(super) struct Events {
    gone: Arc<AtomicU8>,
    stop: Arc<Interrupt>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Events {
    /// Watches what the device has of these.
    pub(super) fn watch(name: &str, handle: &Handle) -> Result<Self> {
        let mut watched = Vec::new();
        for (irq, gone) in [(Irq::Request, Gone::Asked), (Irq::Error, Gone::Failed)] {
            let count = ioctl::irq_count(handle, irq)
                .map_err(|error| Error::os("ask what events the device has", "the kernel refuses", error))?;
            if count == 0 {
                continue;
            }
            let event = Interrupt::new()?;
            match ioctl::set_irqs(handle, irq, &[event.as_fd()]) {
                Ok(_) => watched.push((event, gone)),
                Err(error) => tracing::warn!(
                    "{name}: its {irq:?} event can not be had ({error}): whoever unplugs it waits for this process"
                ),
            }
        }
        let (gone, stop) = (Arc::new(AtomicU8::new(0)), Arc::new(Interrupt::new()?));
        let this =
            |thread| Self { gone: Arc::clone(&gone), stop: Arc::clone(&stop), thread: Mutex::new(thread) };
        if watched.is_empty() {
            return Ok(this(None));
        }
        let (state, stop, device) = (Arc::clone(&gone), Arc::clone(&stop), name.to_owned());
        let run = move || sleep(&device, &stop, &watched, &state);
        // The kernel keeps 15 bytes of a name.
        let thread = std::thread::Builder::new().name("vfio events".into()).spawn(run);
        thread
            .map(|thread| this(Some(thread)))
            .map_err(|error| Error::os("watch the device", "the operating system starts no thread", error))
    }

    /// Whether the device is gone, and why.
    #[inline]
    pub(super) fn gone(&self) -> Option<Gone> {
        // It stands for itself: nothing else is read because of it.
        match self.gone.load(Ordering::Relaxed) {
            0 => None,
            1 => Some(Gone::Asked),
            _ => Some(Gone::Failed),
        }
    }

    /// Watches no more.
    pub(super) fn stop(&self) {
        self.stop.signal();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watched a device had panicked");
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sleeps until the first of the events, or until it is to stop.
fn sleep(device: &str, stop: &Interrupt, watched: &[(Interrupt, Gone)], state: &AtomicU8) {
    let fds: Vec<BorrowedFd<'_>> =
        watched.iter().map(|(event, _)| event.as_fd()).chain([stop.as_fd()]).collect();
    loop {
        let mut polled: Vec<PollFd<'_>> =
            fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => {
                return tracing::error!("{device}: its events are watched no more: poll failed ({errno})");
            }
        }
        if polled.last().is_some_and(|stop| !stop.revents().is_empty()) {
            return;
        }
        let happened = polled.iter().zip(watched).find(|(polled, _)| !polled.revents().is_empty());
        if let Some((_, (_, gone))) = happened {
            state.store(*gone as u8, Ordering::Relaxed);
            return tracing::info!("{}", gone.error().device(device.to_owned()));
        }
    }
}
