//! Drivers against devices that live in another process (vfio-user): killed drivers, killed devices, and everybody else meanwhile.

use std::time::{Duration, Instant};

use uhmm_sdk::{Device, Job, PageStatus, Region, Session};
use uhmm_tests::{DeviceModel, PATIENCE, TestBed, manifest, pattern::word, pci_device};

const MIB: u64 = 1 << 20;
const LEN: u64 = 4 * MIB;
const ROUNDS: u64 = 50;

fn fill(region: &Region, seed: u64) {
    for index in 0..LEN / 8 {
        region.write_u64(index * 8, word(seed, index)).expect("write");
    }
}

fn expected_sum(seed: u64) -> u64 {
    (0..LEN / 8).fold(0, |sum, index| sum.wrapping_add(word(seed, index)))
}

fn sum_on(device: &Device, region: &Region) -> u64 {
    let job = Job::new("sum", [region.addr(), LEN]).idempotent();
    device.run(job).expect("sum").results[0]
}

fn compare(region: &Region, seed: u64) {
    for index in 0..LEN / 8 {
        assert_eq!(region.read_u64(index * 8).expect("read"), word(seed, index), "word {index} of seed {seed}");
    }
}

fn out(session: &Session, region: &Region, device: &Device) {
    let report = session.migrate(region.addr(), LEN, device).expect("migrate");
    assert!(report.complete(), "{report:?}");
}

/// Software device `soft0`, and `accel0` on an accelerator model.
fn system(model: &DeviceModel) -> TestBed {
    let accel = pci_device("accel0", "bar", model, "");
    TestBed::with_manifest(&format!("{}{accel}", manifest("16MiB", "")))
}

#[test]
fn integration_a_driver_that_is_killed_finds_the_device_and_its_memory_as_they_were() {
    let model = DeviceModel::start(&["accel", "--memory", "16MiB"]);
    let bed = system(&model);
    let session = bed.session();
    let device = session.device("accel0").expect("device");
    let region = session.allocate(LEN).expect("region");
    for round in 0..ROUNDS {
        fill(&region, round);
        out(&session, &region, &device);
        let target = bed.process("accel0");
        // Killed while a job runs, which the next incarnation runs again.
        let job = device.submit(Job::new("sum", [region.addr(), LEN]).idempotent());
        let killed = target.kill();
        assert_eq!(job.wait().expect("sum").results, [expected_sum(round)], "round {round}");
        bed.wait_ready("accel0", killed);
        let summary = session.residency_summary(region.addr(), LEN).expect("residency");
        assert_eq!((summary.all_device_pages(), summary.poisoned_pages), (LEN / 4096, 0), "round {round}: {summary:?}");
        compare(&region, round);
    }
}

#[test]
fn integration_a_device_that_is_pulled_out_costs_its_pages_and_nobody_else_anything() {
    let model = DeviceModel::start(&["accel", "--memory", "16MiB"]);
    let bed = system(&model);
    let (session, other) = (bed.session(), bed.session());
    let (accel, soft) = (session.device("accel0").expect("device"), other.device("soft0").expect("device"));
    let (there, safe) = (session.allocate(LEN).expect("region"), other.allocate(LEN).expect("region"));
    fill(&there, 1);
    fill(&safe, 2);
    out(&session, &there, &accel);
    out(&other, &safe, &soft);
    assert_eq!(sum_on(&accel, &there), expected_sum(1));

    let before = bed.process("accel0");
    let _model = model.replace(&["accel", "--memory", "16MiB"]);
    let came_back = bed.wait_ready("accel0", before.incarnation());
    assert!(came_back.last_exit.contains("exit"), "the driver did not end by itself: {came_back:?}");

    // The new device holds other bytes: what was on the old one is lost, and said to be.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let summary = session.residency_summary(there.addr(), LEN).expect("residency");
        if summary.poisoned_pages == LEN / 4096 {
            break;
        }
        assert!(Instant::now() < deadline, "{summary:?}");
        std::thread::yield_now();
    }
    let report = session.migrate(there.addr(), LEN, &accel).expect("migrate");
    assert_eq!(report.pages_with(PageStatus::Poisoned), LEN / 4096, "{report:?}");
    let job = accel.submit(Job::new("sum", [there.addr(), LEN]).idempotent().deadline(Duration::from_secs(20)));
    assert!(job.wait().is_err(), "a job was given pages that are lost");

    // Everybody else, and new memory on the new device.
    assert_eq!(sum_on(&soft, &safe), expected_sum(2));
    compare(&safe, 2);
    let fresh = session.allocate(LEN).expect("region");
    fill(&fresh, 3);
    out(&session, &fresh, &accel);
    assert_eq!(sum_on(&accel, &fresh), expected_sum(3));
    compare(&fresh, 3);
}

#[test]
fn integration_while_a_device_is_gone_its_pages_come_home_and_its_jobs_end_with_an_error() {
    let mut model = DeviceModel::start(&["accel", "--memory", "16MiB"]);
    let bed = system(&model);
    let session = bed.session();
    let accel = session.device("accel0").expect("device");
    let region = session.allocate(LEN).expect("region");
    fill(&region, 7);
    out(&session, &region, &accel);
    model.kill();
    // The memory of this device is a file that the pager holds too: a program that touches it gets its bytes back.
    compare(&region, 7);
    let job = accel.submit(Job::new("sum", [region.addr(), LEN]).deadline(Duration::from_secs(3)));
    let error = job.wait().expect_err("nobody can run this job").to_string();
    assert!(error.contains("restarted") || error.contains("eadline"), "{error}");
    // Another device does its work.
    let soft = session.device("soft0").expect("device");
    assert_eq!(sum_on(&soft, &region), expected_sum(7));
}
