//! What a run says: one JSON object, or one table for people.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::args::Args;
use super::device::Opened;
use super::expect::Shape;
use super::isolation::Isolation;
use super::turns::MIN_TURNS;
use crate::size;

/// A run's result. The keys up to `queues` are relied on by others: more may be added, none renamed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// The device's address, as the user gave it.
    pub(crate) device: String,
    pub(crate) op: &'static str,
    pub(crate) bytes_per_job: u64,
    pub(crate) batch: usize,
    pub(crate) depth: usize,
    /// Jobs that were measured; `bytes` and `seconds` are theirs.
    pub(crate) jobs: u64,
    pub(crate) bytes: u64,
    /// How long the device worked.
    pub(crate) seconds: f64,
    pub(crate) gib_per_second: f64,
    pub(crate) jobs_per_second: f64,
    /// `None` where there is nothing to compare with.
    pub(crate) memcpy_gib_per_second: Option<f64>,
    /// `None` if the run was too short or too noisy.
    pub(crate) ratio_to_memcpy: Option<f64>,
    /// A check of all buffers ran and passed.
    pub(crate) verified: bool,
    pub(crate) failed: u64,
    pub(crate) queues: Vec<QueueReport>,
    /// The driver's name.
    pub(crate) driver: &'static str,
    /// Bytes of all buffers together.
    pub(crate) working_set: u64,
    /// memcpy's speed relative to itself in the same turns: how far the ratio can be trusted.
    pub(crate) memcpy_to_memcpy: Option<f64>,
    pub(crate) turns: usize,
    /// `--jobs` decided how long the run was, not `--seconds`.
    #[serde(skip)]
    pub(crate) by_jobs: bool,
    /// Pages of 2 MiB that the buffers did not get.
    #[serde(skip)]
    pub(crate) small_pages: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) crc32c: Option<String>,
    /// How long a file took in all, with reading, checking and writing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) isolation: Option<Isolation>,
}

/// One queue's part.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct QueueReport {
    /// `None` where the device has no PASIDs.
    pub(crate) pasid: Option<u32>,
    pub(crate) jobs: u64,
}

impl Report {
    /// A report of jobs that took so long; what else there is to say is filled in later.
    pub(crate) fn new(
        args: &Args,
        opened: &Opened,
        shape: &Shape,
        seconds: f64,
        queues: Vec<QueueReport>,
    ) -> Self {
        let jobs = queues.iter().map(|queue| queue.jobs).sum();
        let mut report = Self {
            device: args.device.clone(),
            op: shape.kind.name(),
            bytes_per_job: shape.bytes(),
            batch: args.batch,
            depth: opened.depth,
            jobs,
            bytes: 0,
            seconds,
            gib_per_second: 0.0,
            jobs_per_second: if jobs == 0 { 0.0 } else { jobs as f64 / seconds },
            memcpy_gib_per_second: None,
            ratio_to_memcpy: None,
            verified: false,
            failed: 0,
            queues,
            driver: opened.device.driver(),
            working_set: 0,
            memcpy_to_memcpy: None,
            turns: 0,
            by_jobs: args.jobs.is_some(),
            small_pages: 0,
            crc32c: None,
            file_seconds: None,
            isolation: None,
        };
        report.set_bytes(jobs * shape.bytes());
        report
    }

    /// Corrects the bytes of all jobs together, where not all of them are full.
    pub(crate) fn set_bytes(&mut self, bytes: u64) {
        self.bytes = bytes;
        self.gib_per_second = gib_per_second(bytes, self.seconds);
    }

    fn ratio(&self) -> String {
        match (self.ratio_to_memcpy, self.memcpy_to_memcpy) {
            (Some(ratio), _) => format!("{ratio:.2}"),
            (None, Some(_)) if self.turns < MIN_TURNS => "too short".to_owned(),
            (None, Some(_)) => "too noisy".to_owned(),
            (None, None) => "-".to_owned(),
        }
    }

    /// Why there is no ratio, and what helps.
    fn no_ratio(&self) -> Option<String> {
        let spread = self.memcpy_to_memcpy.filter(|_| self.ratio_to_memcpy.is_none())?;
        let row = format!("{} {}", self.op, size::show(self.bytes_per_job));
        let more = if self.by_jobs { "--jobs" } else { "--seconds" };
        Some(if self.turns < MIN_TURNS {
            format!(
                "{row}: no ratio from {} turns with memcpy, it takes {MIN_TURNS}; let it run to its end, or use more \
                 {more}.\n",
                self.turns
            )
        } else {
            format!(
                "{row}: too noisy for a ratio: memcpy against itself gave {spread:.2} over {} turns; use more {more}, \
                 or a quieter machine.\n",
                self.turns
            )
        })
    }

    fn pasids(&self) -> String {
        let pasid = |queue: &QueueReport| queue.pasid.map_or_else(|| "none".to_owned(), |p| p.to_string());
        self.queues.iter().map(pasid).collect::<Vec<_>>().join(", ")
    }

    fn verified(&self) -> &'static str {
        match (self.verified, self.failed) {
            (true, _) => "yes",
            (false, 0) => "not checked",
            (false, _) => "NO",
        }
    }

    /// What does not fit into the table: lines for people, each with its line feed.
    pub(crate) fn notes(&self) -> String {
        let mut notes = Vec::new();
        if let Some(crc) = &self.crc32c {
            notes.push(format!("CRC32C: {crc} ({} bytes)\n", self.bytes));
        }
        notes.extend(self.no_ratio());
        if let Some(isolation) = &self.isolation {
            notes.push(format!("{isolation}\n"));
        }
        notes.concat()
    }
}

/// Puts together what is known of each queue.
pub(crate) fn queues(pasids: Vec<Option<u32>>, jobs: &[u64]) -> Vec<QueueReport> {
    pasids.into_iter().zip(jobs).map(|(pasid, jobs)| QueueReport { pasid, jobs: *jobs }).collect()
}

/// Bytes in a time as a speed. No bytes have none.
pub(crate) fn gib_per_second(bytes: u64, seconds: f64) -> f64 {
    if bytes == 0 { 0.0 } else { bytes as f64 / seconds / f64::from(1 << 30) }
}

/// Several runs as one table, with its line feed.
pub(crate) fn table(reports: &[Report]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "op", "size", "batch", "depth", "jobs", "GiB/s", "memcpy", "ratio", "failed", "PASIDs", "verified",
    ]);
    for report in reports {
        table.add_row([
            report.op.to_owned(),
            size::show(report.bytes_per_job),
            report.batch.to_string(),
            report.depth.to_string(),
            report.jobs.to_string(),
            format!("{:.2}", report.gib_per_second),
            report.memcpy_gib_per_second.map_or_else(|| "-".to_owned(), |speed| format!("{speed:.2}")),
            report.ratio(),
            report.failed.to_string(),
            report.pasids(),
            report.verified().to_owned(),
        ]);
    }
    for index in 1..=8 {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned() + "\n");
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(turns: usize, memcpy_to_memcpy: f64) -> Report {
        Report {
            device: "soft:dsa".to_owned(),
            op: "copy",
            bytes_per_job: 4096,
            batch: 1,
            depth: 1,
            jobs: 1,
            bytes: 4096,
            seconds: 1.0,
            gib_per_second: 1.0,
            jobs_per_second: 1.0,
            memcpy_gib_per_second: Some(1.0),
            ratio_to_memcpy: None,
            verified: true,
            failed: 0,
            queues: vec![],
            driver: "dsa",
            working_set: 8192,
            memcpy_to_memcpy: Some(memcpy_to_memcpy),
            turns,
            by_jobs: false,
            small_pages: 0,
            crc32c: None,
            file_seconds: None,
            isolation: None,
        }
    }

    #[test]
    fn too_short_is_not_too_noisy() {
        let (short, noisy) = (report(30, 1.02), report(31, 1.2));
        assert_eq!((short.ratio(), noisy.ratio()), ("too short".to_owned(), "too noisy".to_owned()));
        assert!(short.notes().starts_with("copy 4 KiB: no ratio from 30 turns"), "{}", short.notes());
        assert!(noisy.notes().contains("copy 4 KiB: too noisy") && noisy.notes().contains("1.20 over 31"));
        assert!(noisy.notes().contains("--seconds"));
        let by_jobs = Report { by_jobs: true, ..noisy };
        assert!(by_jobs.notes().contains("more --jobs"), "{}", by_jobs.notes());
    }
}
