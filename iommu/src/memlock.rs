//! How much memory this process may lock (`RLIMIT_MEMLOCK`), and what to do where that is too little.

use std::{fs, io};

use crate::Error;
use crate::memory::Bytes;

/// The most memory that this process may lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    /// `RLIMIT_MEMLOCK` in bytes; `None` if there is none for this process.
    bytes: Option<u64>,
}

impl Limit {
    pub(crate) fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        // Capabilities are a thread's.
        Self::parse(&text("/proc/self/limits"), &text("/proc/thread-self/status"))
    }

    /// The same, if it is to blame for a refusal to lock more than `needed` bytes, all in all.
    pub(crate) fn below(self, needed: u64) -> Self {
        Self { bytes: self.bytes.filter(|limit| *limit < needed) }
    }

    /// From the texts of /proc/self/limits and /proc/thread-self/status.
    fn parse(limits: &str, status: &str) -> Self {
        /// Whoever has it locks as much as it likes (capabilities(7)).
        const CAP_IPC_LOCK: u32 = 14;
        let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let capabilities = capabilities.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
        let limit = limit.and_then(|line| line.split_whitespace().next()?.parse().ok());
        Self { bytes: limit.filter(|_| capabilities >> CAP_IPC_LOCK & 1 == 0) }
    }
}

/// Why `needed` bytes, all in all, could not be pinned or mapped.
#[cold]
pub(crate) fn out_of_memory(
    operation: String,
    limit: &Limit,
    needed: u64,
    error: impl Into<io::Error>,
) -> Error {
    let Some(limit) = limit.bytes else {
        return Error::os(operation, "the kernel has no memory for its tables", error)
            .mend("stop what else uses memory");
    };
    let (why, enough) = if needed > limit {
        let why = format!("that makes {} of locked memory, and {} are allowed", Bytes(needed), Bytes(limit));
        (why, needed)
    } else {
        let why = format!(
            "that makes {} of locked memory; {} are allowed, but other processes of this user have a part of them",
            Bytes(needed),
            Bytes(limit)
        );
        (why, limit + needed)
    };
    Error::os(operation, why, error).mend(format!(
        "allow {enough} bytes: run `ulimit -l {}` as root in the shell that starts it, or set LimitMEMLOCK={enough} in its \
         systemd unit",
        enough.div_ceil(1024)
    ))
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::ErrorKind;

    fn mend(error: &Error) -> &str {
        error.mend_text().expect("every refusal has a mend")
    }

    const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max locked memory         8388608              16777216             bytes
Max address space         unlimited            unlimited            bytes
";

    #[test]
    fn the_limit_is_the_soft_one_unless_the_process_is_exempt() {
        let user = "Name:\tcat\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000000000\n";
        let root = "CapEff:\t000001ffffffffff\n";
        let all_but_ipc_lock = "CapEff:\t000001ffffffbfff\n";
        assert_eq!(Limit::parse(LIMITS, user).bytes, Some(8 << 20));
        assert_eq!(Limit::parse(LIMITS, all_but_ipc_lock).bytes, Some(8 << 20));
        assert_eq!(Limit::parse(LIMITS, root).bytes, None);
        assert_eq!(Limit::parse(&LIMITS.replace("8388608 ", "unlimited"), user).bytes, None);
    }

    #[test]
    fn too_little_memlock_says_how_much_is_needed() {
        let limit = Limit { bytes: Some(8 << 20) };
        let error = out_of_memory("map it".to_owned(), &limit, 66 << 20, Errno::NOMEM);
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        let text = error.to_string();
        assert!(text.contains("66 MiB of locked memory, and 8 MiB are allowed"), "{text}");
        assert!(
            mend(&error).contains("ulimit -l 67584`") && mend(&error).contains("LimitMEMLOCK=69206016"),
            "{text}"
        );
        // The user's other processes count, and nobody says how much they have.
        let error = out_of_memory("map it".to_owned(), &limit, 6 << 20, Errno::NOMEM);
        assert!(error.to_string().contains("other processes of this user"), "{error}");
        assert!(mend(&error).contains("LimitMEMLOCK=14680064"), "{error}");
        let error = out_of_memory("map it".to_owned(), &Limit { bytes: None }, 66 << 20, Errno::NOMEM);
        assert!(
            !error.to_string().contains("ulimit"),
            "a limit that does not count is not to blame: {error}"
        );
    }

    #[test]
    fn a_limit_that_was_not_reached_is_not_to_blame() {
        let limit = Limit { bytes: Some(8 << 20) };
        assert_eq!(limit.below((8 << 20) + 1), limit);
        assert_eq!(limit.below(8 << 20), Limit { bytes: None });
    }
}
