//! The commands that look at this machine, whatever it is. What they do to devices is tested in the testbed.

mod command;

use std::path::Path;

use serde_json::Value;

use self::command::{errors, text, underpass};

fn object(args: &[&str]) -> (Value, Option<i32>) {
    let output = underpass(args);
    let object = serde_json::from_slice(&output.stdout);
    (
        object.unwrap_or_else(|error| panic!("{args:?}: {error}: {}", text(&output.stderr))),
        output.status.code(),
    )
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn the_json_objects_keep_their_contract() {
    let (report, status) = object(&["doctor", "--json"]);
    let checks = report["checks"].as_array().expect("a list");
    let mut failed = 0;
    for check in checks {
        assert_eq!(keys(check), ["found", "mend", "name", "status"]);
        let status = check["status"].as_str().expect("a status");
        assert!(["ok", "warn", "fail"].contains(&status), "{check}");
        assert_eq!(check["mend"].is_null(), status == "ok", "{check}");
        failed += i32::from(status == "fail");
    }
    assert_eq!(status, Some(failed.min(1)), "1 if a check fails");

    let (report, status) = object(&["devices", "--all", "--json"]);
    assert_eq!(status, Some(0));
    for device in report["devices"].as_array().expect("a list") {
        for key in [
            "address",
            "vendor",
            "device",
            "class",
            "name",
            "kernel_driver",
            "iommu_group",
            "cdev",
            "numa_node",
        ] {
            assert!(device.get(key).is_some(), "{key} is missing in {device}");
        }
        assert!(device.get("driver").is_some());
        let address = device["address"].as_str().expect("an address");
        assert!(Path::new("/sys/bus/pci/devices").join(address).exists(), "{address}");
    }
}

#[test]
fn what_is_no_address_is_wrong_usage() {
    for command in ["bind", "unbind"] {
        for args in [&[command][..], &[command, "0000:00"], &[command, "eth0"], &[command, "0000:00:1f.8"]] {
            let output = underpass(args);
            let errors = errors(&output);
            assert_eq!(output.status.code(), Some(2), "{args:?}: {errors:?}");
            assert_eq!(errors.len(), 1, "{args:?}: {errors:?}");
            assert!(errors[0].contains(&format!("{command} --help")), "{errors:?}");
        }
    }
    // Where nothing can be.
    let output = underpass(&["unbind", "fffffffe:ff:1f.7"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output)[0].contains("devices --all"), "{:?}", errors(&output));
}
