//! The one error type of the workspace.

use std::borrow::Cow;
use std::fmt;

/// `Result` with this workspace's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is, for code that reacts to it; people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense: a size of zero, an unknown name or option.
    InvalidInput,
    /// This device, IOMMU, CPU or kernel can not do it.
    Unsupported,
    /// There is no such device, file or core.
    NotFound,
    /// The process may not do it.
    Permission,
    /// Somebody else has it, or work is still outstanding.
    Busy,
    /// Memory, huge pages or the memlock limit ran out.
    NoMemory,
    /// A bounded resource other than memory ran out: PASIDs, IOVAs, queues, slots.
    Exhausted,
    /// The device broke its specification or reported an error of its own.
    Device,
    /// The device did not answer in time.
    Timeout,
    /// The device is gone, or was reset under the caller.
    Gone,
    /// A system call failed in another way.
    Os,
}

/// Says what failed, on which device, why, and how to mend it.
///
/// Shown in one line: `DEVICE: cannot OPERATION: WHY (os error); MEND`.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    device: Option<Cow<'static, str>>,
    operation: Cow<'static, str>,
    why: Cow<'static, str>,
    errno: Option<i32>,
    mend: Option<Cow<'static, str>>,
}

impl Error {
    /// An error of `kind` while trying to do `operation` (an infinitive: "map a region"), because of `why`.
    #[must_use]
    #[cold]
    pub fn new(
        kind: ErrorKind,
        operation: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            device: None,
            operation: operation.into(),
            why: why.into(),
            errno: None,
            mend: None,
        }))
    }

    /// An error from a system call that failed with `error` while trying to do `operation`; the kind follows errno.
    #[must_use]
    #[cold]
    pub fn os(
        operation: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
        error: impl Into<std::io::Error>,
    ) -> Self {
        let error = error.into();
        let kind = match error.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => ErrorKind::Permission,
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => ErrorKind::NotFound,
            Some(libc::ENOMEM | libc::ENOSPC) => ErrorKind::NoMemory,
            Some(libc::EBUSY) => ErrorKind::Busy,
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => ErrorKind::Unsupported,
            _ => ErrorKind::Os,
        };
        let mut this = Self::new(kind, operation, why);
        this.0.errno = error.raw_os_error();
        this
    }

    /// Names the device; the first name given stays.
    #[must_use]
    pub fn device(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.0.device.get_or_insert(name.into());
        self
    }

    /// Says that it is of another kind than its errno means elsewhere.
    #[must_use]
    pub fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// Says how to mend it, best as a command: "run: sysctl vm.nr\_hugepages=64".
    #[must_use]
    pub fn mend(mut self, mend: impl Into<Cow<'static, str>>) -> Self {
        self.0.mend = Some(mend.into());
        self
    }

    /// The kind, for code that reacts to it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno of the system call that failed, if one did.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }

    /// The device that it happened on, if one is known.
    pub fn device_name(&self) -> Option<&str> {
        self.0.device.as_deref()
    }

    /// How to mend it, if that is known.
    pub fn mend_text(&self) -> Option<&str> {
        self.0.mend.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(device) = &inner.device {
            write!(f, "{device}: ")?;
        }
        write!(f, "cannot {}: {}", inner.operation, inner.why)?;
        if let Some(errno) = inner.errno {
            write!(f, " ({})", std::io::Error::from_raw_os_error(errno))?;
        }
        if let Some(mend) = &inner.mend {
            write!(f, "; {mend}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_what_where_why_and_the_mend() {
        let error = Error::os("map a region of 2 MiB", "too little may be locked", rustix::io::Errno::NOMEM)
            .device("0000:3b:00.0")
            .device("a second name is not taken")
            .mend("run: ulimit -l unlimited");
        assert_eq!(
            error.to_string(),
            "0000:3b:00.0: cannot map a region of 2 MiB: too little may be locked \
             (Cannot allocate memory (os error 12)); run: ulimit -l unlimited"
        );
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        assert_eq!(size_of::<Error>(), size_of::<usize>(), "an error must stay cheap to return");
    }
}
