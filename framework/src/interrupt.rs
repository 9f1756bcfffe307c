//! Interrupts as eventfds, one a vector: what VFIO signals for a real device, and what a model triggers.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use underpass_iommu::{Error, Result};

/// One interrupt vector, for the driver. Signals add up until [`drain`](Self::drain) takes them all.
///
/// The order that loses nothing is: wait, drain, then look at the queue.
///
/// A device without message-signalled interrupts has one vector, its line, which is shared with other devices and stays
/// asserted until its driver has seen to the device's cause: it is masked at each signal and unmasked by
/// [`drain`](Self::drain), so that a cause which is still there signals again.
#[derive(Debug)]
pub struct Interrupt {
    fd: Arc<OwnedFd>,
    line: Option<Weak<dyn Line>>,
}

/// A line interrupt, as the kernel has it: masked when it is signalled.
pub(crate) trait Line: Send + Sync + fmt::Debug {
    /// Lets the device signal again.
    fn unmask(&self);
}

impl Interrupt {
    pub(crate) fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::os("create an interrupt", "eventfd was refused", errno))?;
        Ok(Self { fd: Arc::new(fd), line: None })
    }

    /// The same for a line. Nobody unmasks it any more once `line` is gone.
    pub(crate) fn of_line(self, line: Weak<dyn Line>) -> Self {
        Self { line: Some(line), ..self }
    }

    /// Sleeps until the vector is signalled (true) or `timeout` is over (false); `None` waits without end. The
    /// signal stays until it is drained.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], left.as_ref()) {
                Ok(ready) => return Ok(ready != 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::os("wait for an interrupt", "poll failed", errno)),
            }
        }
    }

    pub(crate) fn signal(&self) {
        signal(&self.fd);
    }

    /// Takes all signals and returns whether there were any. Never waits.
    #[allow(clippy::must_use_candidate, reason = "called to clear the signal, too")]
    pub fn drain(&self) -> bool {
        // The only failure that an eventfd's read has left is EAGAIN: not signalled.
        let signalled = rustix::io::read(&*self.fd, &mut [0; 8]).is_ok();
        if let Some(line) = self.line.as_ref().filter(|_| signalled).and_then(Weak::upgrade) {
            line.unmask();
        }
        signalled
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn signal(fd: &OwnedFd) {
    // EAGAIN: 2^64 - 2 signals are there already, so it is signalled.
    let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

/// A model's way to its vectors. Clones signal the same ones.
#[derive(Clone, Default)]
pub struct Interrupts(Arc<RwLock<Vec<Arc<OwnedFd>>>>);

impl Interrupts {
    /// Signals `vector`. Nothing happens where the driver has not asked for it.
    pub fn trigger(&self, vector: usize) {
        if let Some(fd) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(vector) {
            signal(fd);
        }
    }

    /// Makes `interrupts` the vectors from 0 on; those set before are signalled no more.
    pub(crate) fn set(&self, interrupts: &[Interrupt]) {
        let fds = interrupts.iter().map(|interrupt| Arc::clone(&interrupt.fd)).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = fds;
    }
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vectors = self.0.read().unwrap_or_else(PoisonError::into_inner).len();
        write!(f, "Interrupts({vectors} vectors)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Interrupts, Vec<Interrupt>) {
        let vectors = vec![Interrupt::new().unwrap(), Interrupt::new().unwrap()];
        let interrupts = Interrupts::default();
        interrupts.set(&vectors);
        (interrupts, vectors)
    }

    #[test]
    fn a_signal_stays_until_it_is_drained_and_reaches_its_vector_alone() {
        let (interrupts, vectors) = pair();
        interrupts.clone().trigger(1);
        interrupts.trigger(1);
        assert!(vectors[1].wait(None).unwrap());
        assert!(vectors[1].wait(Some(Duration::ZERO)).unwrap(), "waiting does not take the signal");
        assert!(vectors[1].drain());
        assert!(!vectors[1].drain(), "both signals were taken");
        assert!(!vectors[0].drain());
        assert!(!vectors[0].wait(Some(Duration::ZERO)).unwrap());
    }

    #[test]
    fn a_wait_ends_at_its_timeout_not_before() {
        let (_interrupts, vectors) = pair();
        let (start, timeout) = (Instant::now(), Duration::from_millis(20));
        assert!(!vectors[0].wait(Some(timeout)).unwrap());
        assert!(start.elapsed() >= timeout);
    }

    #[test]
    fn a_wait_sees_a_signal_from_another_thread() {
        let (interrupts, vectors) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(5));
                interrupts.trigger(0);
            });
            assert!(vectors[0].wait(Some(Duration::from_secs(30))).unwrap());
        });
    }

    #[test]
    fn a_line_is_unmasked_at_each_signal_that_is_taken_while_its_device_is_there() {
        #[derive(Debug, Default)]
        struct Counter(std::sync::atomic::AtomicUsize);
        impl Line for Counter {
            fn unmask(&self) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        let line = Arc::new(Counter::default());
        let interrupt = Interrupt::new().unwrap().of_line(Arc::downgrade(&line) as Weak<dyn Line>);
        let unmasked = || line.0.load(std::sync::atomic::Ordering::Relaxed);
        assert!(!interrupt.drain());
        assert_eq!(unmasked(), 0, "it was not signalled, so it is not masked");
        interrupt.signal();
        interrupt.signal();
        assert!(interrupt.drain());
        assert_eq!(unmasked(), 1);
        drop(line);
        interrupt.signal();
        assert!(interrupt.drain());
    }

    #[test]
    fn vectors_that_nobody_asked_for_are_silent_and_setting_again_replaces() {
        let (interrupts, old) = pair();
        interrupts.trigger(2);
        interrupts.trigger(usize::MAX);
        let new = [Interrupt::new().unwrap()];
        interrupts.set(&new);
        interrupts.trigger(0);
        assert!(!old[0].drain());
        assert!(new[0].drain());
    }
}
