//! The built command, from outside: results, exit statuses, files and what it leaves behind.

mod command;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use self::command::{Scratch, errors, interrupted, text, underpass};

/// Runs `copy` with `--json`, which must succeed and print one object and nothing else.
fn copy(args: &[&str]) -> Value {
    let output = underpass(&[&["copy", "--json"], args].concat());
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report.is_object());
    report
}

/// CRC32C by definition, bit by bit (RFC 3720, appendix B.4).
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def0_u64 ^ len as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn the_first_screen_says_what_there_is() {
    let output = underpass(&[]);
    assert_eq!(output.status.code(), Some(0));
    let screen = text(&output.stdout);
    for word in ["demo", "copy", "forward", "doctor", "devices", "bind", "Try:", "--help"] {
        assert!(screen.contains(word), "{word} is missing in {screen}");
    }
    assert!(screen.lines().count() < 30, "it is to be short: {screen}");
    assert!(output.stderr.is_empty());
}

#[test]
fn bad_input_is_one_line_and_the_right_status() {
    for (args, status, says) in [
        // Wrong usage.
        ("--size 0", 2, "at least 1"),
        ("--size ten", 2, "--size"),
        ("--op move", 2, "copy-crc"),
        ("--colour", 2, "--colour"),
        ("--queues 0", 2, "at least 1"),
        ("--depth 0", 2, "at least 1"),
        ("--batch 0", 2, "at least 1"),
        ("--jobs 0", 2, "at least 1"),
        ("--jobs 1e9", 2, "whole number"),
        ("--jobs 99999999999999999999", 2, "too large"),
        ("--jobs 5 --seconds 1", 2, "--seconds"),
        ("--seconds 0", 2, "more than 0"),
        ("--seconds soon", 2, "number of seconds"),
        ("--seconds nan", 2, "number of seconds"),
        ("--seconds inf", 2, "too long"),
        ("--seconds=-1", 2, "more than 0"),
        ("--size 16777216T", 2, "64 bits"),
        ("--size 8388608T", 2, "address space"),
        ("--device nvme", 2, "soft:dsa"),
        ("--device soft:dsa,colour=red", 2, "engines"),
        ("--device soft:dsa,engines=none", 2, "engines"),
        ("--working-set 64k --size 64k", 2, "--working-set"),
        ("--working-set 1G --size 1", 2, "--size"),
        ("--working-set 1M --size 4k --batch 512", 2, "--working-set"),
        ("--op dif-insert --size 1000", 2, "512"),
        ("--op dif-insert --dif-block 1000", 2, "4104"),
        ("--op create-delta --size 12", 2, "multiple of 8"),
        ("--op apply-delta --size 1M", 2, "512 KiB"),
        ("--input /dev/zero", 2, "--output"),
        ("--input a --output b --op fill", 2, "--op"),
        ("--size 3G", 2, "2 GiB"),
        ("--queues 9", 2, "8"),
        ("--queues 1000000000", 2, "8"),
        ("--device soft:dsa,wqs=1 --queues 2", 2, "--queues 1"),
        ("--depth 100000", 2, "100000"),
        ("--batch 100000 ", 2, "--batch"),
        ("--core 4095", 2, "4095"),
        // What the device or the machine can not do.
        ("--device soft:dsa,pasids=1 --queues 2", 1, "PASID"),
        ("--device soft:dsa,core=4095", 1, "4095"),
        ("--working-set 64T --size 1G", 1, "available"),
        ("--device cpu --show-isolation", 1, "PASID"),
    ] {
        let args: Vec<_> = ["copy", "--json"].into_iter().chain(args.split_whitespace()).collect();
        let output = underpass(&args);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors:?}");
        assert_eq!(errors.len(), 1, "{args:?}: {errors:?}");
        assert!(errors[0].starts_with("underpass: ") && errors[0].contains(says), "{args:?}: {errors:?}");
        assert!(output.stdout.is_empty(), "{args:?} printed {:?}", text(&output.stdout));
    }
    for args in [&["backward"][..], &["copy", "extra"], &["demo", "--size", "1"]] {
        let output = underpass(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert_eq!(errors(&output).len(), 1, "{args:?}: {:?}", errors(&output));
    }
}

#[test]
fn the_json_object_keeps_its_contract() {
    let report =
        copy(&["--queues", "2", "--size", "16k", "--batch", "4", "--working-set", "8M", "--seconds", "0.1"]);
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"));
    assert_eq!(report["device"], "soft:dsa");
    assert_eq!(report["op"], "copy");
    assert_eq!(report["bytes_per_job"], 16384);
    assert_eq!(report["batch"], 4);
    assert!(report["depth"].as_u64() >= Some(1));
    assert_eq!(report["verified"], true);
    assert_eq!(report["failed"], 0);
    let jobs = report["jobs"].as_u64().expect("a count");
    assert!(jobs > 0);
    assert_eq!(report["bytes"], jobs * 16384);
    assert!(number("seconds") > 0.0 && number("memcpy_gib_per_second") > 0.0);
    let speed = number("bytes") / number("seconds") / f64::from(1 << 30);
    assert!((number("gib_per_second") / speed - 1.0).abs() < 1e-6);
    assert!((number("jobs_per_second") * number("seconds") / number("jobs") - 1.0).abs() < 1e-6);
    let ratio = &report["ratio_to_memcpy"];
    assert!(ratio.is_null() || ratio.as_f64() > Some(0.0), "{ratio}");
    let queues = report["queues"].as_array().expect("an array");
    assert_eq!(queues.len(), 2);
    let pasids: Vec<_> = queues.iter().map(|queue| queue["pasid"].as_u64().expect("a PASID")).collect();
    assert!(pasids[0] != 0 && pasids[1] != 0 && pasids[0] != pasids[1], "{pasids:?}");
    let by_queue: Vec<_> = queues.iter().map(|queue| queue["jobs"].as_u64().expect("a count")).collect();
    assert!(by_queue.iter().all(|jobs| *jobs > 0));
    assert_eq!(by_queue.iter().sum::<u64>(), jobs);
}

#[test]
fn a_device_without_pasids_says_null() {
    let report = copy(&["--device", "cpu", "--working-set", "1M", "--jobs", "100"]);
    assert!(report["queues"][0]["pasid"].is_null());
    assert_eq!(report["verified"], true);
}

#[test]
fn it_does_as_many_jobs_as_asked() {
    for (jobs, batch, queues) in [(1, "1", "1"), (30, "8", "1"), (997, "32", "2"), (4, "1", "3")] {
        let count = jobs.to_string();
        let report = copy(&[
            "--jobs",
            &count,
            "--batch",
            batch,
            "--queues",
            queues,
            "--size",
            "4k",
            "--working-set",
            "1M",
        ]);
        assert_eq!(report["jobs"], jobs, "{report}");
        assert_eq!(report["bytes"], jobs * 4096);
    }
}

#[test]
fn every_operation_leaves_what_the_cpu_computed() {
    let ops = "nop copy copy-within fill compare compare-pattern create-delta apply-delta dualcast crc copy-crc \
               dif-check dif-insert dif-strip dif-update cache-flush";
    for device in ["cpu", "soft:dsa,check=leases"] {
        for op in ops.split_whitespace().filter(|op| device != "cpu" || *op != "cache-flush") {
            let report = copy(&[
                "--device",
                device,
                "--op",
                op,
                "--size",
                "4k",
                "--batch",
                "3",
                "--jobs",
                "40",
                "--working-set",
                "256k",
                "--queues",
                "2",
            ]);
            assert_eq!(report["op"], op);
            assert_eq!(report["verified"], true, "{report}");
            assert_eq!(report["failed"], 0, "{report}");
        }
    }
    for block in ["520", "4096", "4104"] {
        let size = (block.parse::<u32>().expect("a number") * 3).to_string();
        let report = copy(&["--op", "dif-update", "--dif-block", block, "--size", &size, "--jobs", "40"]);
        assert_eq!(report["verified"], true, "{report}");
    }
}

#[test]
fn odd_sizes_and_the_smallest_working_set() {
    for (op, size) in [("copy", "1"), ("copy-crc", "4097"), ("fill", "13"), ("dualcast", "100"), ("crc", "1")]
    {
        let report = copy(&["--op", op, "--size", size, "--jobs", "50", "--working-set", "16k"]);
        assert_eq!(report["verified"], true, "{report}");
    }
    let report = copy(&["--size", "64k", "--working-set", "128k", "--jobs", "40"]);
    assert_eq!(report["working_set"], 128 << 10, "{report}");
}

#[test]
fn verified_means_that_a_check_ran() {
    let report = copy(&["--no-verify", "--jobs", "40", "--working-set", "1M"]);
    assert_eq!(report["verified"], false);
    assert_eq!(report["failed"], 0);
    assert_eq!(copy(&["--verify", "--jobs", "40", "--working-set", "1M"])["verified"], true);
}

#[test]
fn people_get_one_aligned_table() {
    let output = underpass(&["copy", "--jobs", "40", "--working-set", "1M"]);
    assert_eq!(output.status.code(), Some(0));
    let table = text(&output.stdout);
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].contains("GiB/s") && lines[0].contains("PASIDs"), "{table}");
    assert!(lines[1].contains("64 KiB") && lines[1].ends_with("yes"), "{table}");
}

#[test]
fn a_file_goes_through_unharmed() {
    let scratch = Scratch::new("file");
    let (input, output) = (scratch.path("input"), scratch.path("output"));
    for (len, options) in [
        (0, ""),
        (1, ""),
        (65_535, ""),
        (65_536, "--batch 4"),
        (65_537, "--queues 3"),
        ((5 << 20) + 123, "--size 4k --batch 32 --queues 2"),
        ((5 << 20) + 123, "--size 1000 --depth 2 --device cpu"),
        (5 << 20, "--size 1M --device soft:dsa,check=leases"),
    ] {
        let data = noise(len);
        fs::write(&input, &data).expect("an input");
        let options: Vec<_> = options.split_whitespace().collect();
        let report = copy(&[&["--input", &input, "--output", &output], &options[..]].concat());
        assert!(fs::read(&output).expect("an output") == data, "{len} bytes with {options:?} differ");
        assert_eq!(report["crc32c"], format!("{:08x}", crc32c(&data)), "{len} bytes with {options:?}");
        assert_eq!(report["bytes"], len);
        assert_eq!(report["verified"], true);
        assert!(report["file_seconds"].as_f64() > report["seconds"].as_f64(), "{report}");
        assert_eq!(scratch.names(), ["input", "output"]);
    }
    let shown = underpass(&["copy", "--input", &input, "--output", &input]);
    assert_eq!(shown.status.code(), Some(0), "a file may replace itself");
    assert!(text(&shown.stdout).contains(&format!("{:08x}", crc32c(&noise(5 << 20)))));
}

#[test]
fn a_file_that_can_not_be_sent_leaves_nothing_behind() {
    let scratch = Scratch::new("refused");
    let (input, output, directory) =
        (scratch.path("input"), scratch.path("output"), scratch.path("directory"));
    fs::write(&input, b"data").expect("an input");
    fs::write(&output, b"before").expect("an output");
    fs::create_dir(&directory).expect("a directory");
    let missing = scratch.path("missing");
    let nowhere = format!("{missing}/output");
    for (from, to, options, status) in [
        (&missing, &output, &[][..], 1),
        (&directory, &output, &[], 1),
        (&input, &directory, &[], 1),
        (&input, &nowhere, &[], 1),
        (&input, &"/dev/null".to_owned(), &[], 1),
        (&input, &output, &["--size", "3G"], 2),
        (&input, &output, &["--device", "soft:dsa,wqs=1", "--queues", "2"], 2),
    ] {
        let args = [&["copy", "--json", "--input", from, "--output", to], options].concat();
        let result = underpass(&args);
        assert_eq!(result.status.code(), Some(status), "{args:?}");
        assert_eq!(errors(&result).len(), 1, "{args:?}: {:?}", errors(&result));
        assert!(result.stdout.is_empty(), "{args:?}");
        assert_eq!(fs::read(&output).expect("an output"), b"before");
        assert_eq!(scratch.names(), ["directory", "input", "output"]);
    }
    // A file that can be opened but not read.
    if Path::new("/proc/self/mem").exists() {
        let result = underpass(&["copy", "--input", "/proc/self/mem", "--output", &output]);
        assert_eq!(result.status.code(), Some(1));
        assert_eq!(errors(&result).len(), 1, "{:?}", errors(&result));
        assert_eq!(scratch.names(), ["directory", "input", "output"]);
    }
}

#[test]
fn one_queue_can_not_reach_the_others_memory() {
    let args = ["copy", "--show-isolation", "--jobs", "40", "--working-set", "1M"];
    let output = underpass(&args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for words in ["driver refuses", "not mapped for this queue", "device reports", "fault record", "IOVA 0x"]
    {
        assert!(shown.contains(words), "{words:?} is missing in {shown}");
    }
    let report = copy(&args[1..]);
    let (owner, intruder) = (&report["queues"][0]["pasid"], &report["queues"][1]["pasid"]);
    let isolation = &report["isolation"];
    assert_eq!(isolation["owner_pasid"], *owner);
    assert_eq!(isolation["fault"]["pasid"], *intruder);
    assert_eq!(isolation["fault"]["access"], "read");
    assert_eq!(isolation["fault"]["device"], report["device"]);
    assert_eq!(isolation["fault"]["iova"], isolation["iova"]);
    assert_eq!(report["verified"], true, "both queues still work: {report}");
}

#[test]
fn ctrl_c_stops_and_still_tells_what_was_done() {
    let output =
        interrupted(&["copy", "--json", "--seconds", "3600", "--working-set", "4M"], Duration::from_secs(1));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report["jobs"].as_u64() > Some(0), "{report}");
    assert_eq!(report["failed"], 0);
}

/// Stops the command in the middle of a file.
#[test]
fn ctrl_c_in_a_file_writes_nothing_and_tells_what_was_done() {
    let scratch = Scratch::new("stopped");
    let output = scratch.path("output");
    fs::write(&output, b"before").expect("an output");
    // Endless, so that it can not be over before the signal; killed, it leaves nothing either.
    for (signal, status) in [("-INT", Some(0)), ("-KILL", None)] {
        let child = Command::new(env!("CARGO_BIN_EXE_underpass"))
            .args(["copy", "--json", "--size", "4k", "--input", "/dev/zero", "--output", &output])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        thread::sleep(Duration::from_secs(1));
        let id = child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().expect("kill").success());
        let result = child.wait_with_output().expect("its output");
        assert_eq!(result.status.code(), status, "{}", text(&result.stderr));
        assert_eq!(fs::read(&output).expect("an output"), b"before");
        if status.is_some() {
            assert_eq!(scratch.names(), ["output"]);
            let report: Value = serde_json::from_slice(&result.stdout).expect("one JSON object");
            assert_eq!(report["verified"], false);
            assert_eq!(report["failed"], 0);
            assert!(report["bytes"].as_u64() > Some(0), "{report}");
            assert!(report["crc32c"].is_null());
            assert!(text(&result.stderr).contains("nothing was written"), "{}", text(&result.stderr));
        }
    }
}

#[test]
fn one_job_a_queue_is_enough() {
    let report = copy(&["--size", "40M", "--jobs", "1", "--no-verify"]);
    assert_eq!(report["working_set"], 80 << 20, "{report}");
    let output = underpass(&["copy", "--size", "40M", "--jobs", "1", "--no-verify"]);
    assert!(text(&output.stderr).contains("80 MiB"), "the user is told: {}", text(&output.stderr));
}

#[test]
fn a_reader_that_leaves_is_no_error_and_a_full_disk_is() {
    if let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") {
        let status = Command::new(env!("CARGO_BIN_EXE_underpass"))
            .stdout(full)
            .stderr(Stdio::null())
            .status()
            .expect("it starts");
        assert_eq!(status.code(), Some(1));
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_underpass"))
        .args(["copy", "--jobs", "40", "--working-set", "1M"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("a status").code(), Some(0));
}
