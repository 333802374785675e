//! The invariants of the design brief (section 4) that only a whole system can show; the others are in `pager/core/tests`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::uffd::EventJournal;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, PidFd, Userfaultfd, Window};
use uhmm_sdk::{Job, Region};
use uhmm_tests::{PATIENCE, TestBed, manifest, pattern::word};

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

/// A device that is told of munmap by message takes new memory at an old address for what it is, however late the message comes.
#[test]
fn integration_memory_adopted_at_an_old_address_is_never_taken_for_the_old_one() {
    let bed = TestBed::with_manifest(&manifest("16MiB", "aperture = false"));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let old = ProgramMemory::private(MIB).expect("memory");
    old.write(0, &vec![0xaa; MIB as usize]).expect("inside");
    let _old = session.adopt(old.addr(), MIB).expect("adopt");
    session.migrate(old.addr(), MIB, &device).expect("migrate");
    let mut seen = vec![0; MIB as usize];
    device.read(old.addr(), &mut seen).expect("read");
    assert!(seen.iter().all(|byte| *byte == 0xaa));

    let mirror = bed.operator().status().expect("status").into_iter().find(|status| status.name == "mirror");
    let mirror = PidFd::open(mirror.expect("in the plan").pid).expect("the mirror runs");
    assert!(mirror.signal(Signal::STOP).expect("stop"));
    old.unmap(0, MIB).expect("unmap");
    let new = old.map_fresh(0, MIB).expect("new memory at the same place");
    new.write(0, &vec![0xbb; MIB as usize]).expect("inside");
    let (session, addr) = (&session, new.addr());
    std::thread::scope(|scope| {
        let (told, adopted) = std::sync::mpsc::channel();
        scope.spawn(move || {
            let adopted = session.adopt(addr, MIB).expect("adopt");
            told.send(()).expect("the test waits");
            adopted
        });
        // The device is still told that the old memory is gone.
        let early = adopted.recv_timeout(Duration::from_millis(300));
        let mut seen = vec![0; MIB as usize];
        if early.is_err() {
            assert!(mirror.signal(Signal::CONT).expect("continue"));
            adopted.recv().expect("adopted");
        }
        device.read(addr, &mut seen).expect("read");
        let wrong = seen.iter().filter(|byte| **byte != 0xbb).count();
        // Whoever did not wait has the mirror go on only now, so that the test ends.
        mirror.signal(Signal::CONT).expect("continue");
        assert_eq!(wrong, 0, "bytes of the old memory");
    });
}

/// A file of a process's whose name begins so.
fn descriptor(pid: u32, name: &str) -> Option<PathBuf> {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process's descriptors");
    let is_it = |path: &PathBuf| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with(name));
    all.flatten().map(|entry| entry.path()).find(is_it)
}

/// The userfaultfd of the only program, and the memory in which a pager reads its events: for who plays the pager in its last moment.
fn eyes_of_the_pager(pager: u32) -> (Userfaultfd, EventJournal) {
    let uffd = descriptor(pager, "anon_inode:[userfaultfd]").expect("the pager has the program's userfaultfd");
    let number = uffd.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("a number");
    let process = Pid::from_raw(pager.cast_signed()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let uffd = pidfd_getfd(process.expect("it runs"), number, PidfdGetfdFlags::empty()).expect("a copy");
    let journal = descriptor(pager, "/memfd:uhmm-journal").expect("the pager's journal");
    let journal = File::options().read(true).write(true).open(journal).expect("open");
    let window = Window::map(journal.as_fd(), 0, EventJournal::LEN_BYTES, uhmm_kernel_hook::window::Prot::ReadWrite);
    (Userfaultfd::from_fd(uffd).expect("a userfaultfd"), EventJournal::new(window.expect("map"), 1))
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// madvise returns when its event is read. A pager that is killed then leaves it in the journal, and the next one must know of it before it
/// has pages put back that were on their way out.
#[test]
fn integration_inv3_what_was_dropped_before_the_eyes_of_a_pager_that_died_is_not_put_back_by_the_next_one() {
    const DROPPED: std::ops::Range<u64> = 16..48;
    let bed = TestBed::with_manifest(&manifest("16MiB", "aperture = false"));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let memory = ProgramMemory::private(MIB).expect("memory");
    for page in 0..MIB / PAGE_SIZE {
        memory.store_u64(page * PAGE_SIZE, word(3, page)).expect("inside");
    }
    let _adopted = session.adopt(memory.addr(), MIB).expect("adopt");
    let process = |name: &str| {
        let pid = bed.status(name).pid;
        (pid, PidFd::open(pid).expect("it runs"))
    };
    let ((_, driver), (pager_pid, pager)) = (process("soft0"), process("pager"));
    let (uffd, journal) = eyes_of_the_pager(pager_pid);
    std::thread::scope(|scope| {
        // The pages are taken out, and their copies are never made.
        assert!(driver.signal(Signal::STOP).expect("stop"));
        let (session, device, memory) = (&session, &device, &memory);
        scope.spawn(move || session.migrate(memory.addr(), MIB, device));
        let mine = pagemap::open_own_pagemap().expect("pagemap");
        let range = AddrRange { start: memory.addr(), len: MIB };
        let is_out = || pagemap::scan(mine.as_fd(), range, Categories::PRESENT).expect("scan").is_empty();
        wait_until("the pages are not taken out", is_out);
        assert!(pager.signal(Signal::STOP).expect("stop"));
        let (from, len) = (DROPPED.start * PAGE_SIZE, (DROPPED.end - DROPPED.start) * PAGE_SIZE);
        let drops = scope.spawn(move || memory.advise(from, len, ProgramAdvice::DontNeed).expect("madvise"));
        let mut events = Vec::new();
        wait_until("no event comes", || journal.read(&uffd, session.space(), &mut events).expect("read") > 0);
        drops.join().expect("it goes on");
        bed.kill("pager");
        driver.signal(Signal::KILL).expect("kill");
        for page in 0..MIB / PAGE_SIZE {
            let wanted = if DROPPED.contains(&page) { 0 } else { word(3, page) };
            assert_eq!(memory.load_u64(page * PAGE_SIZE).expect("inside"), wanted, "page {page}");
        }
    });
}
