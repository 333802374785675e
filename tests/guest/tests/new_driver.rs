//! `docs/write-a-driver.md` from its second step to its last, word for word. On the host `uhmm driver new chip` has written the crate, and cargo has built it
//! (`guest-run`): `/helpers/chip` is that program, `/helpers/chip.toml` its manifest. Here it drives the second teaching device.

use std::fs;
use std::path::PathBuf;

use uhmm_guest::devices::{EDU, vfio_devices};
use uhmm_guest::running::System;
use uhmm_sdk::{Job, Operator, Residency, Session};

const PAGE: u64 = 4096;

/// What the reader edits: the address. And what the guest's place for programs makes necessary: where the program lies.
fn manifest() -> PathBuf {
    let written = fs::read_to_string("/helpers/chip.toml").unwrap();
    let address = &vfio_devices(EDU)[1];
    let edited = |line: &str| match line.split_once('=') {
        Some((key, _)) if key.trim() == "pci" => format!("pci = \"{address}\""),
        Some((key, _)) if key.trim() == "command" => "command = [\"/helpers/chip\"]".to_owned(),
        _ => line.to_owned(),
    };
    let lines: Vec<String> = written.lines().map(edited).collect();
    assert_eq!(written.lines().zip(&lines).filter(|(old, new)| old != new).count(), 2, "{written}");
    // For the cases that order failures, as the last step says.
    let text = format!("fault_injection = true\n{}\n", lines.join("\n"));
    let path = PathBuf::from("/tmp/chip.toml");
    fs::write(&path, text).unwrap();
    path
}

#[test]
#[ignore = "runs in the guest: tests/guest/run new_driver"]
fn the_generated_driver_is_killed_and_takes_its_device_over() {
    let system = System::up("chip", &manifest());
    system.uhmm(&["stats"]);
    let session = Session::connect(Some(system.run_dir())).unwrap();
    let device = session.device("chip0").unwrap();
    let region = session.allocate(PAGE).unwrap();
    (0..PAGE / 8).for_each(|index| region.write_u64(index * 8, index * 7).unwrap());
    assert!(session.migrate(region.addr(), PAGE, &device).unwrap().complete());
    let incarnation = || {
        let services = Operator::connect(Some(system.run_dir())).unwrap().status().unwrap();
        services.iter().find(|service| service.name == "chip0").unwrap().incarnation
    };
    assert_eq!(incarnation(), 1);
    system.uhmm(&["kill", "chip0"]);
    // The device computes; the call waits for the next incarnation.
    assert_eq!(device.run(Job::new("factorial", [5]).idempotent()).unwrap().results, [120]);
    assert_eq!(incarnation(), 2);
    let runs = session.residency(region.addr(), PAGE).unwrap();
    assert!(matches!(runs[0].residency, Residency::Device(_)), "nobody brought it home: {runs:?}");
    (0..PAGE / 8).for_each(|index| assert_eq!(region.read_u64(index * 8).unwrap(), index * 7));
}

#[test]
#[ignore = "runs in the guest: tests/guest/run new_driver"]
fn the_generated_driver_passes_conformance() {
    System::up("chip", &manifest()).conformance("chip");
}
