//! Draws how fast the software DSA copies, beside memcpy, by size: `benches/copy.svg`.
//!
//! ```sh
//! cargo build --release && cargo run --release -p underpass-benches --example copy_chart
//! ```
//!
//! Each point is one `underpass copy --json`, which measures the two in turns over the same buffers.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use plotters::prelude::*;
use serde_json::Value;

const SIZES: [u32; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096];
const SERIES: [(&str, u32, RGBColor); 2] =
    [("batches of 32", 32, RGBColor(0x1b, 0x6e, 0xc2)), ("single jobs", 1, RGBColor(0xc2, 0x5b, 0x1b))];

fn main() -> Result<(), Box<dyn Error>> {
    let binary = binary()?;
    let mut series = Vec::new();
    for (name, batch, colour) in SERIES {
        let mut points = Vec::new();
        for size in SIZES {
            let report = measure(&binary, size, batch)?;
            match report["ratio_to_memcpy"].as_f64() {
                Some(ratio) => points.push((f64::from(size), ratio)),
                None => eprintln!("{name}, {size} KiB: too noisy; left out"),
            }
        }
        series.push(Series { name, colour, points });
    }
    let svg = Path::new(env!("CARGO_MANIFEST_DIR")).join("copy.svg");
    draw(&svg, &series)?;
    eprintln!("benches/copy.svg is drawn");
    Ok(())
}

/// The application, beside this example's own folder.
fn binary() -> Result<PathBuf, Box<dyn Error>> {
    let example = std::env::current_exe()?;
    let binary = example.ancestors().nth(2).ok_or("no folder above the examples")?.join("underpass");
    if binary.exists() { Ok(binary) } else { Err("no application is built: cargo build --release".into()) }
}

fn measure(binary: &Path, kib: u32, batch: u32) -> Result<Value, Box<dyn Error>> {
    eprintln!("{kib} KiB, batch {batch}");
    // The working set is 64 MiB however large the jobs are; more of them would not fit in flight.
    let depth = (32 * 1024 / kib / batch / 2).clamp(1, 32);
    let arguments = ["copy", "--json", "--no-verify", "--seconds", "3"];
    let output = Command::new(binary)
        .args(arguments)
        .args(["--size", &format!("{kib}k"), "--batch", &batch.to_string(), "--depth", &depth.to_string()])
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

struct Series {
    name: &'static str,
    colour: RGBColor,
    /// KiB a job, ratio to memcpy.
    points: Vec<(f64, f64)>,
}

fn draw(path: &Path, series: &[Series]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (760, 380)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("soft:dsa copies, relative to memcpy over the same buffers", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(48)
        .build_cartesian_2d((1.0..4096.0).log_scale().base(2.0), 0.0..1.1)?;
    chart
        .configure_mesh()
        .x_desc("bytes a job (KiB)")
        .y_desc("1 is memcpy's speed")
        .x_labels(13)
        .x_label_formatter(&|kib| format!("{kib:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(LineSeries::new([(1.0, 1.0), (4096.0, 1.0)], BLACK.mix(0.4)))?;
    for &Series { name, colour, ref points } in series {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
