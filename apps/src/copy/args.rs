//! The options of `underpass copy`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use underpass::accel::{DifBlock, OpKind};

use crate::registry::Trust;
use crate::size;
use crate::value::{positive, seconds};

/// Operations that a benchmark can repeat. Drain and probe are not among them: neither works on a buffer.
pub(crate) const OPS: [OpKind; 16] = [
    OpKind::Nop,
    OpKind::Copy,
    OpKind::CopyWithin,
    OpKind::Fill,
    OpKind::Compare,
    OpKind::ComparePattern,
    OpKind::CreateDelta,
    OpKind::ApplyDelta,
    OpKind::Dualcast,
    OpKind::Crc,
    OpKind::CopyCrc,
    OpKind::DifCheck,
    OpKind::DifInsert,
    OpKind::DifStrip,
    OpKind::DifUpdate,
    OpKind::CacheFlush,
];

/// Have a device copy, fill, compare or checksum memory, and compare it with memcpy
#[derive(Debug, Clone, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub(crate) struct Args {
    /// The device: a PCI device bound to vfio-pci, 0000:6a:01.0, or soft:dsa[,wqs=N,engines=N,core=N,...], or cpu
    #[arg(long, default_value = "soft:dsa")]
    pub(crate) device: String,
    /// What a job does
    #[arg(long, default_value = "copy", value_parser = op_parser(), hide_possible_values = false)]
    pub(crate) op: OpKind,
    /// Bytes of data in a job: 4096, 4k, 64KiB, 1M
    #[arg(long, default_value = "64KiB", value_parser = job_size)]
    pub(crate) size: u64,
    /// Jobs submitted at a time; 1 is no batches
    #[arg(long, default_value_t = 1, value_parser = positive::<usize>)]
    pub(crate) batch: usize,
    /// Submissions outstanding at a time in each queue; the driver's choice unless given
    #[arg(long, value_parser = positive::<usize>)]
    pub(crate) depth: Option<usize>,
    /// Queues, each with a thread, an address space and memory of its own
    #[arg(long, default_value_t = 1, value_parser = positive::<usize>)]
    pub(crate) queues: usize,
    /// Bytes of all buffers of all queues together, sources and destinations [default: 64 MiB]
    #[arg(long, value_parser = size::parse_nonzero)]
    pub(crate) working_set: Option<u64>,
    /// How long to measure, memcpy's turns included; at least 31 turns are made
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub(crate) seconds: Duration,
    /// Do so many jobs instead
    #[arg(long, value_parser = positive::<u64>, conflicts_with = "seconds")]
    pub(crate) jobs: Option<u64>,
    /// Check all buffers against the CPU's own computation, after the run (the default)
    #[arg(long, overrides_with = "no_verify")]
    verify: bool,
    /// Do not check
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Cores that the queues' threads run on, in turn: 0,2,4
    #[arg(long, value_delimiter = ',', value_name = "CORE,...")]
    pub(crate) core: Vec<usize>,
    /// Bytes of the blocks that the dif operations protect
    #[arg(long, default_value = "512", value_parser = block_parser())]
    pub(crate) dif_block: DifBlock,
    /// Have queue 1 try to reach queue 0's memory first, and show how that is stopped
    #[arg(long)]
    pub(crate) show_isolation: bool,
    /// Send this file through the device instead, in jobs that copy and compute the CRC32C
    #[arg(long, value_name = "FILE", requires = "output",
          conflicts_with_all = ["op", "seconds", "jobs", "working_set", "show_isolation"])]
    pub(crate) input: Option<PathBuf>,
    /// Where the file that came through goes
    #[arg(long, value_name = "FILE", requires = "input")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

fn op_parser() -> impl TypedValueParser<Value = OpKind> {
    PossibleValuesParser::new(OPS.map(OpKind::name)).try_map(|name| {
        OPS.into_iter().find(|op| op.name() == name).ok_or_else(|| format!("{name} is not an operation"))
    })
}

fn block_parser() -> impl TypedValueParser<Value = DifBlock> {
    PossibleValuesParser::new(["512", "520", "4096", "4104"]).try_map(|bytes| {
        let block = DifBlock::ALL.into_iter().find(|block| block.bytes().to_string() == bytes);
        block.ok_or_else(|| format!("{bytes} is not a block's size"))
    })
}

/// A job's bytes: no more than an address space could ever hold, so that sums of a few do not overflow.
fn job_size(text: &str) -> Result<u64, String> {
    match size::parse_nonzero(text)? {
        bytes if bytes >> 48 != 0 => Err("that is more than an address space holds".into()),
        bytes => Ok(bytes),
    }
}
