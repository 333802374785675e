//! The conformance suite against the software device: plain, without an aperture, with every service killed at random moments, with the agent stopped.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use serde_json::Value;
use uhmm_tests::model::DeviceModel;
use uhmm_tests::{TestBed, manifest_of, pci_device, uhmm_exe};

/// Cases of the disturbed runs: one or two of every group.
const SUBSET: &str = "^(T0[1-5]_|T1[0-9]_|T2[2459]_|T3[0-7]_|T40_|K0[69]_|K1[0478]_|K21_|F0[126]_|X01_|C0[12]_|IGT\\.(once|many-64k)\\.\
                      (malloc|mmap|mmap-remap|mmap-huge|mmap-shared|region)$|P0[456]_|P17_)";

/// Runs the suite and gives its JSON back.
fn conformance(args: &[&str]) -> Value {
    let mut command = Command::new(uhmm_exe());
    command.arg("conformance").arg("--json").args(args).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().expect("uhmm conformance starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert_eq!(output.status.success(), count(&report, "failed") == 0, "the exit status does not tell of failures");
    report
}

fn count(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("the report has no number {key}"))
}

fn cases(report: &Value) -> &[Value] {
    report["cases"].as_array().map(Vec::as_slice).expect("the report has cases")
}

/// Names, states and reasons of what did not pass.
fn failures(report: &Value) -> Vec<String> {
    let failed = cases(report).iter().filter(|case| case["status"] == "failed");
    failed.map(|case| format!("{}: {}", case["name"], case["why"])).collect()
}

fn assert_held(report: &Value, passed_at_least: u64) {
    let sum = count(report, "passed") + count(report, "failed") + count(report, "not_applicable");
    assert_eq!(sum, cases(report).len() as u64, "the totals are not those of the cases");
    assert!(failures(report).is_empty(), "{:#?}", failures(report));
    assert!(count(report, "passed") >= passed_at_least, "only {} cases passed", count(report, "passed"));
    for case in cases(report).iter().filter(|case| case["status"] == "not_applicable") {
        assert!(case["why"].as_str().is_some_and(|why| why.len() > 10), "{case} gives no reason");
    }
}

#[test]
fn integration_conformance_holds_for_the_software_device() {
    let report = conformance(&[]);
    assert_held(&report, 350);
    let names: BTreeSet<&str> = cases(&report).iter().filter_map(|case| case["name"].as_str()).collect();
    let list = Command::new(uhmm_exe()).args(["conformance", "--list"]).output().expect("uhmm conformance --list");
    let listed = String::from_utf8(list.stdout).expect("text");
    assert_eq!(listed.lines().collect::<BTreeSet<_>>(), names, "the list is not what was run");
}

/// All cases about coherent memory, and those in which the program uses allocated memory, forks or evicts.
const COHERENT: &str = "\\.coherent$|^(F0[1-5]|K06|K11|K21|D0[1-3]|X0[1-4]|S03|Z01)_|^IGT\\.(once|many-64k)\\.region$";

#[test]
fn integration_conformance_holds_for_coherent_devices() {
    let report = conformance(&["--coherent", "--filter", COHERENT]);
    assert_held(&report, 45);
    let twins = |status: &str| {
        let of = |case: &&Value| case["name"].as_str().is_some_and(|name| name.ends_with(".coherent"));
        cases(&report).iter().filter(of).filter(|case| case["status"] == status).count()
    };
    assert!(
        twins("passed") >= 30,
        "only {} coherent cases passed, {} do not apply",
        twins("passed"),
        twins("not_applicable")
    );
}

#[test]
fn integration_conformance_holds_for_coherent_devices_while_services_are_killed() {
    assert_held(&conformance(&["--coherent", "--chaos", "2", "--filter", "\\.coherent$"]), 30);
}

#[test]
fn integration_conformance_holds_for_devices_without_an_aperture() {
    let bed = TestBed::with_manifest(&manifest_of(2, "64MiB", "aperture = false"));
    let run_dir = bed.run_dir().to_str().expect("a path that is text");
    assert_held(&conformance(&["--run-dir", run_dir]), 350);
}

#[test]
fn integration_conformance_holds_while_services_are_killed() {
    assert_held(&conformance(&["--chaos", "1", "--filter", SUBSET]), 45);
}

#[test]
fn integration_conformance_holds_while_the_agent_stands_still() {
    assert_held(&conformance(&["--pause-agent", "--filter", SUBSET]), 45);
}

#[test]
fn integration_conformance_refuses_what_it_cannot_run() {
    for args in [["--filter", "no such case"], ["--filter", "("], ["--driver", "no-such-driver"]] {
        let output = Command::new(uhmm_exe()).arg("conformance").args(args).output().expect("uhmm conformance starts");
        assert!(!output.status.success(), "{args:?} was accepted");
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(words.contains(args[1]), "{args:?}: the error does not name it: {words}");
    }
}

/// Devices in other processes: the aperture of an accelerator, its copy engine, and an NVMe namespace.
#[test]
fn integration_conformance_holds_for_devices_in_other_processes() {
    for (driver, model) in [
        ("bar", ["accel", "--memory", "64MiB"]),
        ("accel", ["accel", "--memory", "64MiB"]),
        ("nvme", ["nvme", "--memory", "64MiB"]),
    ] {
        let model = DeviceModel::start(&model);
        let device = pci_device("pci0", driver, &model, "");
        let bed = TestBed::with_manifest(&format!("{}{device}", manifest_of(0, "", "")));
        let run_dir = bed.run_dir().to_str().expect("a plain path");
        let report = conformance(&["--run-dir", run_dir, "--driver", driver, "--filter", SUBSET]);
        assert_held(&report, 60);
    }
}
