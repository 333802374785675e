//! The invariants of the design brief (section 4) that only a whole system can show; the others are in `pager/core/tests`.

use uhmm_sdk::{Job, Region};
use uhmm_tests::{TestBed, pattern::word};

const MIB: u64 = 1 << 20;

fn fill(region: &Region) {
    for index in 0..region.len_bytes() / 8 {
        region.write_u64(index * 8, word(9, index)).expect("write");
    }
}

fn check(region: &Region) {
    for index in 0..region.len_bytes() / 8 {
        assert_eq!(region.read_u64(index * 8).expect("read"), word(9, index), "word {index}");
    }
}

/// A child cannot disturb what is on a device. It inherits managed ranges where the kernel tells of forks, and only there (what it
/// sees then: conformance F05, S03).
#[test]
fn integration_inv6_children_of_a_managed_process_leave_its_bytes_alone() {
    let bed = TestBed::start("16MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(4 * MIB).expect("region");
    fill(&region);
    for _ in 0..8 {
        session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
        let child = std::process::Command::new("/bin/true").status().expect("a child process");
        assert!(child.success());
        let half = region.len_bytes() / 2;
        device.run(Job::new("sum", [region.addr(), half]).idempotent()).expect("job");
        check(&region);
    }
    let flags = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let start = format!("{:x}-", region.addr());
    let mine = flags.split_once(&start).expect("the region is mapped").1;
    let line = mine.lines().find(|line| line.starts_with("VmFlags:")).expect("flags");
    let left_out = line.split_whitespace().any(|flag| flag == "dc");
    assert_eq!(left_out, !session.fork_supported(), "a child inherits exactly what its parent is told of: {line}");
}

/// A fault never waits on a cycle: the pager has no mapping of any client's memory through which it could fault itself.
#[test]
fn integration_inv7_the_pager_maps_no_managed_memory_and_its_own_is_locked() {
    let bed = TestBed::start("16MiB");
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(4 * MIB).expect("region");
    fill(&region);
    session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    check(&region);
    let services = bed.operator().status().expect("status");
    let pager = services.iter().find(|service| service.name == "pager").expect("pager").pid;
    let own = std::fs::read_to_string("/proc/self/maps").expect("maps");
    assert!(own.contains("uhmm-region"), "the name that is looked for is not the region's");
    let maps = std::fs::read_to_string(format!("/proc/{pager}/maps")).expect("the pager's maps");
    assert!(!maps.contains("uhmm-region"), "the pager maps a client's region:\n{maps}");
    let status = std::fs::read_to_string(format!("/proc/{pager}/status")).expect("the pager's status");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("VmLck");
    let locked_kib: u64 = locked.trim().trim_end_matches("kB").trim().parse().expect("a number");
    assert!(locked_kib > 0, "no memory of the pager is locked: raise the limit (ulimit -l unlimited) or run as root");
}

/// Every service gives up gaining privileges before it serves anybody.
#[test]
fn integration_services_run_without_new_privileges() {
    let bed = TestBed::start("8MiB");
    for service in bed.operator().status().expect("status") {
        let status = std::fs::read_to_string(format!("/proc/{}/status", service.pid)).expect("its status");
        assert!(status.lines().any(|line| line == "NoNewPrivs:\t1"), "{}: {status}", service.name);
    }
}
