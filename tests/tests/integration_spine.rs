//! The main job across separate processes: memory moves to a device, jobs run on the same pointers, faults bring it home.

use uhmm_sdk::{Advice, ErrorCode, Job, Region, Residency, Session, Target};
use uhmm_tests::{TestBed, manifest, pattern::word};

const MIB: u64 = 1 << 20;

fn fill(region: &Region, seed: u64) {
    for index in 0..region.len_bytes() / 8 {
        region.write_u64(index * 8, word(seed, index)).expect("write");
    }
}

fn check(region: &Region, seed: u64) {
    for index in 0..region.len_bytes() / 8 {
        let found = region.read_u64(index * 8).expect("read");
        assert_eq!(found, word(seed, index), "word {index} of {}", region.len_bytes() / 8);
    }
}

fn expected_sum(region: &Region, seed: u64) -> u64 {
    (0..region.len_bytes() / 8).fold(0, |sum, index| sum.wrapping_add(word(seed, index)))
}

fn sum_job(region: &Region) -> Job {
    Job::new("sum", [region.addr(), region.len_bytes()]).idempotent()
}

fn migrates_computes_and_comes_home(bed: &TestBed) {
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(16 * MIB).expect("region");
    fill(&region, 1);
    let report = session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    assert!(report.complete(), "{report:?}");
    assert_eq!(region.populated_bytes().expect("size"), 0, "system pages are still there");
    let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!(summary.device_pages[0], region.len_bytes() / 4096);
    assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, 1)]);
    // The device writes, the CPU sees it; the CPU writes, the device sees it.
    device.run(Job::new("fill", [region.addr() + 4096, 8192, 0x55])).expect("fill");
    assert_eq!(region.read_u64(4096).expect("read"), 0x5555_5555_5555_5555);
    assert_eq!(region.read_u64(4096 + 8192 - 8).expect("read"), 0x5555_5555_5555_5555);
    fill(&region, 2);
    assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, 2)]);
    session.migrate(region.addr(), region.len_bytes(), uhmm_sdk::Target::Home).expect("evict");
    let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!(summary.system_pages, region.len_bytes() / 4096, "{summary:?}");
    check(&region, 2);
}

#[test]
fn integration_spine_with_an_aperture() {
    migrates_computes_and_comes_home(&TestBed::start("64MiB"));
}

#[test]
fn integration_spine_without_an_aperture() {
    migrates_computes_and_comes_home(&TestBed::with_manifest(&manifest("64MiB", "aperture = false")));
}

#[test]
fn integration_device_faults_bring_pages_in_one_request_a_window() {
    let bed = TestBed::start("64MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(4 * MIB).expect("region");
    fill(&region, 3);
    let result = device.run(sum_job(&region)).expect("job");
    assert_eq!(result.results, [expected_sum(&region, 3)]);
    assert!(result.fault_count > 0, "nothing had been migrated");
    assert!(result.fault_count < region.len_bytes() / 4096 / 4, "{} faults: nothing rode along", result.fault_count);
    let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!(summary.device_pages[0], region.len_bytes() / 4096, "a device fault migrates: {summary:?}");
}

#[test]
fn integration_device_memory_running_out_evicts_and_never_fails() {
    for options in ["", "aperture = false"] {
        let bed = TestBed::with_manifest(&manifest("8MiB", options));
        let session = bed.session();
        let device = session.device("soft0").expect("device");
        let region = session.allocate(24 * MIB).expect("region");
        fill(&region, 4);
        for _ in 0..2 {
            assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, 4)]);
        }
        let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
        assert!(summary.device_pages[0] <= 8 * MIB / 4096, "{summary:?}");
        assert!(bed.metric("pager", "evicted") > 0);
        check(&region, 4);
    }
}

#[test]
fn integration_jobs_of_a_device_see_what_four_threads_change_meanwhile() {
    let bed = TestBed::start("32MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(8 * MIB).expect("region");
    let quarter = region.len_bytes() / 4;
    for round in 0..4u64 {
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let region = &region;
                scope.spawn(move || {
                    for offset in (0..quarter).step_by(8) {
                        let index = (thread * quarter + offset) / 8;
                        region.write_u64(index * 8, word(round, index)).expect("write");
                    }
                });
            }
            session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
        });
        assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, round)]);
        check(&region, round);
    }
}

#[test]
fn integration_pinned_pages_go_home_and_stay_and_the_device_uses_them_in_place() {
    let bed = TestBed::start("32MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(MIB).expect("region");
    fill(&region, 5);
    session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    session.pin(region.addr(), region.len_bytes()).expect("pin");
    let report = session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    assert_eq!(report.moved_pages, 0, "{report:?}");
    assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, 5)]);
    let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!((summary.system_pages, summary.pinned_pages), (256, 256), "{summary:?}");
    session.unpin(region.addr(), region.len_bytes()).expect("unpin");
    let report = session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    assert_eq!(report.moved_pages, 256, "{report:?}");
    check(&region, 5);
}

#[test]
fn integration_advice_in_place_maps_system_pages_and_read_only_refuses_device_writes() {
    let bed = TestBed::start("32MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(MIB).expect("region");
    fill(&region, 6);
    session.advise(region.addr(), region.len_bytes(), Advice::InPlace).expect("advise");
    assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, 6)]);
    let summary = session.residency_summary(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!(summary.system_pages, 256, "{summary:?}");
    device.run(Job::new("fill", [region.addr(), 4096, 7])).expect("fill");
    assert_eq!(region.read_u64(0).expect("read"), 0x0707_0707_0707_0707);
    let other = session.allocate(MIB).expect("region");
    session.advise(other.addr(), other.len_bytes(), Advice::DeviceReadOnly).expect("advise");
    let refused = device.run(Job::new("fill", [other.addr(), 4096, 7])).expect_err("read-only");
    assert_eq!(refused.code(), ErrorCode::Permission, "{refused}");
    assert_eq!(other.read_u64(0).expect("read"), 0);
}

#[test]
fn integration_two_devices_mirror_one_process_and_every_page_has_one_owner() {
    let two = manifest("32MiB", "")
        + "\n[[service]]\nname = \"soft1\"\nkind = \"driver\"\ndriver = \"soft\"\n\n[[device]]\nname = \"soft1\"\nservice = \"soft1\"\nmemory_bytes = \"32MiB\"\naperture = false\n";
    let bed = TestBed::with_manifest(&two);
    let session = bed.session();
    let devices = ["soft0", "soft1"].map(|name| session.device(name).expect("device"));
    let region = session.allocate(4 * MIB).expect("region");
    fill(&region, 7);
    for round in 0..6usize {
        let device = &devices[round % 2];
        let job = Job::new("fill", [region.addr() + 4096 * round as u64, 4096, round as u64 + 1]);
        device.run(job).expect("fill");
        let sums = devices.each_ref().map(|device| device.submit(sum_job(&region)));
        let sums = sums.map(|pending| pending.wait().expect("sum").results);
        assert_eq!(sums[0], sums[1], "round {round}: the devices see different bytes");
        let cpu = (0..region.len_bytes() / 8)
            .fold(0u64, |sum, index| sum.wrapping_add(region.read_u64(index * 8).expect("read")));
        assert_eq!(sums[0], [cpu]);
    }
    let runs = session.residency(region.addr(), region.len_bytes()).expect("residency");
    assert_eq!(runs.iter().map(|run| run.page_count).sum::<u64>(), 1024);
}

#[test]
fn integration_untouched_pages_are_zero_on_the_device_and_after_coming_home() {
    let bed = TestBed::start("32MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(2 * MIB).expect("region");
    assert_eq!(device.run(sum_job(&region)).expect("job").results, [0]);
    let runs = session.residency(region.addr(), region.len_bytes()).expect("residency");
    assert!(runs.iter().all(|run| run.residency == Residency::Device(0)), "{runs:?}");
    for index in 0..region.len_bytes() / 8 {
        assert_eq!(region.read_u64(index * 8).expect("read"), 0);
    }
}

#[test]
fn integration_a_freed_region_can_be_allocated_again_at_once() {
    let bed = TestBed::start("16MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    for round in 0..20 {
        let region = session.allocate(2 * MIB).expect("region");
        fill(&region, round);
        session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
        assert_eq!(device.run(sum_job(&region)).expect("job").results, [expected_sum(&region, round)]);
        region.free().expect("free");
    }
    assert_eq!(bed.metric("pager", "regions"), 0);
}

#[test]
fn integration_a_migration_can_be_awaited_later() {
    let bed = TestBed::start("32MiB");
    let session: Session = bed.session();
    let region = session.allocate(4 * MIB).expect("region");
    fill(&region, 8);
    let pending = session.prefetch(region.addr(), region.len_bytes(), Target::Device(0));
    assert!(pending.expect("accepted").wait().expect("migrate").complete());
    check(&region, 8);
}
