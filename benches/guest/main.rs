//! What our layers cost above the kernel's, inside `ci/testbed`: mapping memory, and a start up to the first packet. Each is
//! compared with a bare program (`bare.rs`), which does the same ioctls, in turns within one run.
//!
//! ```sh
//! ci/testbed/run --row vtd-scalable --suite bench
//! ```
//!
//! The lines that start with `testbed: figure: ` have the figures. Times are those of an emulated processor; only ratios
//! say something.

#![allow(clippy::print_stdout, reason = "the figures are the output")]

mod bare;
#[path = "../first_packet.rs"]
mod first_packet;

use std::env;
use std::error::Error;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use underpass::iommu::PageSize;
use underpass::pci::PciDevice;
use underpass::pci::host::HostDevice;
use underpass::vfio::Options;
use underpass::{Access, Region};

use bare::{Iommufd, Vfio};
use first_packet::{Start, median};

/// Turns of each kind.
const TURNS: usize = 21;

/// What is mapped.
const BYTES: u64 = 256 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ours", address] => return first_packet::program(address),
        ["bare", address] => return bare::first_packet(&cdev(address)?),
        _ => {}
    }
    let (Ok(edu), Ok(other_edu), Ok(net)) =
        (env::var("UNDERPASS_EDU"), env::var("UNDERPASS_EDU2"), env::var("UNDERPASS_PLUG"))
    else {
        println!("left out: this takes the devices of ci/testbed");
        return Ok(());
    };
    map(&edu, &other_edu, BYTES)?;
    map(&edu, &other_edu, PageSize::Size2M.bytes())?;
    start(&net)?;
    // The testbed looks for how many tests passed, as libtest says it.
    println!("test result: ok. 2 passed");
    Ok(())
}

/// Maps all of [`BYTES`], in regions of `each`, for one device by our backend and for another one by bare ioctls.
fn map(ours: &str, theirs: &str, each: u64) -> Result<(), Box<dyn Error>> {
    let region = |_| Region::builder(each).page_size(PageSize::Size2M).build();
    let regions = (0..BYTES / each).map(region).collect::<Result<Vec<_>, _>>()?;

    let device = PciDevice::open(ours.parse()?, &Options::default())?;
    let ioas = device.iommu().alloc_ioas()?;
    let _attachment = ioas.attach(&device, None)?;
    let bare = Vfio::open(&cdev(theirs)?, Iommufd::open()?)?;

    let (mut our_times, mut bare_times) = (Vec::new(), Vec::new());
    for turn in 0..2 * TURNS {
        if turn % 2 == 0 {
            let mut mappings = Vec::with_capacity(regions.len());
            let began = Instant::now();
            for region in &regions {
                mappings.push(ioas.map(region, Access::READ_WRITE)?);
            }
            let mapped = began.elapsed();
            drop(mappings);
            our_times.push((mapped, began.elapsed()));
        } else {
            let began = Instant::now();
            // Somewhere above what the machine may have holes for.
            for (iova, region) in ((4 << 30)..).step_by(each as usize).zip(&regions) {
                bare.iommufd.map(region.fd()?.as_fd(), iova, each)?;
            }
            let mapped = began.elapsed();
            for (iova, _) in ((4 << 30)..).step_by(each as usize).zip(&regions) {
                bare.iommufd.unmap(iova, each)?;
            }
            bare_times.push((mapped, began.elapsed()));
        }
    }
    let what = format!("256 MiB of huge pages in {} of {} MiB", regions.len(), each >> 20);
    let mapped = |times: &[(Duration, Duration)]| median(times.iter().map(|(mapped, _)| *mapped));
    let both = |times: &[(Duration, Duration)]| median(times.iter().map(|(_, both)| *both));
    compare(&format!("map {what}"), mapped(&our_times), mapped(&bare_times));
    compare(&format!("map and unmap {what}"), both(&our_times), both(&bare_times));
    Ok(())
}

/// Starts our program and the bare one.
fn start(address: &str) -> Result<(), Box<dyn Error>> {
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..TURNS.div_ceil(2) {
        ours.push(Start::of(&["ours", address])?);
        bare.push(Start::of(&["bare", address])?);
    }
    // Bound is opened: the kernel resets the device then, for whomever.
    let reset = median(bare.iter().map(|start| start.step("bind")));
    let all = |starts: &[Start]| median(starts.iter().map(|start| start.all)) - reset;
    figure(&format!("the kernel's reset of the device, when it is bound: {reset:.1} ms"));
    for (name, starts) in [("ours", &ours), ("bare", &bare)] {
        let steps = starts[0]
            .steps
            .iter()
            .map(|(step, _)| format!("{step} {:.1} ms", median(starts.iter().map(|start| start.step(step)))));
        let (before, steps) = (median(starts.iter().map(Start::before)), steps.collect::<Vec<_>>());
        figure(&format!("{name}: {before:.1} ms before its first line, {}", steps.join(", ")));
    }
    compare("start to the first packet, without that reset", all(&ours), all(&bare));
    Ok(())
}

fn compare(what: &str, ours: f64, bare: f64) {
    figure(&format!("{what}: {ours:.2} ms, bare {bare:.2} ms, ratio {:.2}", ours / bare));
}

fn figure(text: &str) {
    println!("testbed: figure: {text}");
}

/// The character device of a PCI function that is bound to vfio-pci.
fn cdev(address: &str) -> Result<std::path::PathBuf, Box<dyn Error>> {
    let cdev = HostDevice::find(address.parse()?)?.cdev();
    cdev.ok_or_else(|| format!("{address} has no character device").into())
}
