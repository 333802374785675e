//! Drivers against devices that live in another process (vfio-user): killed drivers, killed devices, and everybody else meanwhile.

use std::time::{Duration, Instant};

use uhmm_sdk::{Device, Job, PageStatus, Region, Session};
use uhmm_tests::model::DeviceModel;
use uhmm_tests::{PATIENCE, TestBed, manifest, pattern::Rng, pattern::spin, pattern::word, pci_device};

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

const ACCEL: &[&str] = &["accel", "--memory", "16MiB"];

/// Software device `soft0`, and `pci0` on a model.
fn system(model: &DeviceModel, driver: &str) -> TestBed {
    let device = pci_device("pci0", driver, model, "");
    TestBed::with_manifest(&format!("{}{device}", manifest("16MiB", "")))
}

/// Killed while pages move and while a job runs; what the device holds is there afterwards.
fn kill_rounds(driver: &str, model: &[&str]) {
    let model = DeviceModel::start(model);
    let bed = system(&model, driver);
    let session = bed.session();
    let device = session.device("pci0").expect("device");
    let region = session.allocate(LEN).expect("region");
    let mut rng = Rng::new(7);
    for round in 0..ROUNDS {
        fill(&region, round);
        let spins = rng.below(200_000);
        bed.kill_during("pci0", |_| spin(spins), || out(&session, &region, &device));
        let target = bed.process("pci0");
        let job = device.submit(Job::new("sum", [region.addr(), LEN]).idempotent());
        let killed = target.kill();
        assert_eq!(job.wait().expect("sum").results, [expected_sum(round)], "round {round}");
        bed.wait_ready("pci0", killed);
        let summary = session.residency_summary(region.addr(), LEN).expect("residency");
        assert_eq!((summary.all_device_pages(), summary.poisoned_pages), (LEN / 4096, 0), "round {round}: {summary:?}");
        compare(&region, round);
    }
}

#[test]
fn integration_killed_bar_driver_finds_device_and_memory_as_they_were() {
    kill_rounds("bar", ACCEL);
}

#[test]
fn integration_killed_accel_driver_finds_device_and_memory_as_they_were() {
    kill_rounds("accel", ACCEL);
}

#[test]
fn integration_killed_nvme_driver_finds_device_and_memory_as_they_were() {
    kill_rounds("nvme", &["nvme", "--memory", "32MiB"]);
}

/// Each fault in turn, while data goes out and home; another device and another client do not notice.
fn faults(driver: &str, model: &[&str], faults: &[&str]) {
    for fault in faults {
        let at: Vec<String> = [40, 80, 120].iter().map(|command| format!("{fault}@{command}")).collect();
        let mut args = model.to_vec();
        args.extend(at.iter().flat_map(|fault| ["--fault", fault]));
        let model = DeviceModel::start(&args);
        let bed = system(&model, driver);
        let (session, other) = (bed.session(), bed.session());
        let (device, soft) = (session.device("pci0").expect("device"), other.device("soft0").expect("device"));
        let (region, safe) = (session.allocate(LEN).expect("region"), other.allocate(LEN).expect("region"));
        fill(&safe, 9);
        out(&other, &safe, &soft);
        for round in 0..4 {
            fill(&region, round);
            out(&session, &region, &device);
            assert_eq!(sum_on(&device, &region), expected_sum(round), "{fault}");
            compare(&region, round);
        }
        assert_eq!(sum_on(&soft, &safe), expected_sum(9), "{fault}");
        compare(&safe, 9);
        let summary = session.residency_summary(region.addr(), LEN).expect("residency");
        assert_eq!(summary.poisoned_pages, 0, "{fault}: {summary:?}");
        assert_eq!(model.injected(), at.len(), "{fault} did not happen");
    }
}

#[test]
fn integration_faults_of_an_accelerator_cost_no_byte() {
    faults("accel", ACCEL, &["command-error", "drop-completion", "stuck-queue", "corrupt-id", "stray-dma"]);
}

#[test]
fn integration_faults_of_an_nvme_controller_cost_no_byte() {
    let nvme = ["nvme", "--memory", "32MiB"];
    faults("nvme", &nvme, &["command-error", "drop-completion", "stuck-queue", "corrupt-id", "stray-dma"]);
}

/// The new device has other memory: what was on the old one is lost and said to be, and nobody else notices.
fn pulled_out(driver: &str, args: &[&str]) {
    let model = DeviceModel::start(args);
    let bed = system(&model, driver);
    let (session, other) = (bed.session(), bed.session());
    let (accel, soft) = (session.device("pci0").expect("device"), other.device("soft0").expect("device"));
    let (there, safe) = (session.allocate(LEN).expect("region"), other.allocate(LEN).expect("region"));
    fill(&there, 1);
    fill(&safe, 2);
    out(&session, &there, &accel);
    out(&other, &safe, &soft);
    assert_eq!(sum_on(&accel, &there), expected_sum(1));

    let before = bed.process("pci0");
    let _model = model.replace(args);
    let came_back = bed.wait_ready("pci0", before.incarnation());
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
fn integration_a_pulled_out_bar_costs_its_pages_and_nobody_else_anything() {
    pulled_out("bar", ACCEL);
}

#[test]
fn integration_a_pulled_out_accelerator_costs_its_pages_and_nobody_else_anything() {
    pulled_out("accel", ACCEL);
}

#[test]
fn integration_a_pulled_out_nvme_controller_costs_its_pages_and_nobody_else_anything() {
    pulled_out("nvme", &["nvme", "--memory", "32MiB"]);
}

#[test]
fn integration_while_a_device_is_gone_its_pages_come_home_and_its_jobs_end_with_an_error() {
    let mut model = DeviceModel::start(ACCEL);
    let bed = system(&model, "bar");
    let session = bed.session();
    let accel = session.device("pci0").expect("device");
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
