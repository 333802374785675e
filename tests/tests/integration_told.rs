//! Errors that say what they mean, and what comes home for those who cannot wait for a page: parts of `tests/c/told.c`, each a process of its own,
//! and what an operator does from outside.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::PageStatus;
use uhmm_tests::c::{compile, run};
use uhmm_tests::{TestBed, manifest, uhmm_exe};

const PAGE: u64 = 4096;

/// Runs a part on devices that the CPU sees, and on such that it does not.
fn passes(part: &str) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = compile(&["told.c"], dir.path());
    for options in ["", "aperture = false"] {
        let bed = TestBed::with_manifest(&manifest("64MiB", options));
        let output = run(Command::new(&program).arg(bed.run_dir()).arg(part));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("ok {part}"), "{options}");
    }
}

#[test]
fn integration_errors_say_what_they_mean_in_c() {
    passes("errors");
}

#[test]
fn integration_a_process_without_a_mapping_left_is_told_so() {
    passes("no_mapping_left");
}

#[test]
fn integration_a_run_directory_that_a_process_has_left_behind_is_forbidden_not_silent() {
    passes("closed_directory");
}

#[test]
fn integration_pages_that_stay_for_a_failure_have_a_reason() {
    passes("reasons");
}

#[test]
fn integration_a_drivers_author_selects_maps_and_looks() {
    passes("selections");
}

#[test]
fn integration_pages_are_at_home_before_a_fatal_signal_ends_the_process() {
    passes("fatal_signals");
}

/// What a debugger, or gcore, does.
fn read_as_debugger(addr: u64, len: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    File::open(format!("/proc/{}/mem", std::process::id()))?.read_exact_at(&mut bytes, addr)?;
    Ok(bytes)
}

fn operator(bed: &TestBed, args: &[&str]) -> String {
    let output = run(Command::new(uhmm_exe()).arg("--run-dir").arg(bed.run_dir()).args(args));
    String::from_utf8(output.stdout).expect("text")
}

fn home_is_home(options: &str) {
    let bed = TestBed::with_manifest(&manifest("64MiB", options));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    // Half of it was never touched.
    let len = 64 * PAGE;
    let private = ProgramMemory::private(len).expect("mmap");
    let shared = session.allocate(len).expect("allocate");
    let bytes: Vec<u8> = (0..len / 2).map(|at| (at / 7) as u8).collect();
    private.write(0, &bytes).expect("write");
    shared.bytes().write(0, &bytes).expect("write");
    session.adopt(private.addr(), len).expect("adopt");
    for addr in [private.addr(), shared.addr()] {
        session.migrate(addr, len / 4, &device).expect("migrate");
        assert!(read_as_debugger(addr, PAGE).is_err(), "the kernel's limit, for which all this is");
    }
    let pid = std::process::id().to_string();
    assert!(operator(&bed, &["home", &pid]).contains("is at home"));
    for addr in [private.addr(), shared.addr()] {
        let found = read_as_debugger(addr, len).expect("everything can be read");
        assert!(found[..bytes.len()] == bytes[..], "the bytes are the program's");
        assert!(found[bytes.len()..].iter().all(|byte| *byte == 0), "what was never touched is zero");
        let report = session.migrate(addr, len, &device).expect("migrate");
        assert_eq!((report.moved_pages, report.pages_with(PageStatus::Pinned)), (0, 64), "{report:?}");
        assert!(report.why.contains("uhmm home"), "{}", report.why);
    }
    // What comes under management later is at home as well, all of it, and stays; so does what another session manages.
    let other = bed.session();
    let later = ProgramMemory::private(len).expect("mmap");
    let others = ProgramMemory::private(len).expect("mmap");
    let allocated = session.allocate(len).expect("allocate");
    later.write(PAGE, &bytes[..PAGE as usize]).expect("write");
    session.adopt(later.addr(), len).expect("adopt");
    other.adopt(others.addr(), len).expect("adopt");
    let all_there = || {
        for addr in [later.addr(), others.addr(), allocated.addr()] {
            let found = read_as_debugger(addr, len).expect("everything can be read");
            let expected = if addr == later.addr() { &bytes[..PAGE as usize] } else { &[0; PAGE as usize] };
            assert!(found[PAGE as usize..2 * PAGE as usize] == *expected, "the bytes are the program's");
            assert!(found[2 * PAGE as usize..].iter().all(|byte| *byte == 0), "what was never touched is zero");
        }
    };
    all_there();
    for (session, addr) in [(&session, later.addr()), (&other, others.addr()), (&session, allocated.addr())] {
        let report = session.migrate(addr, len, &device).expect("migrate");
        assert_eq!((report.moved_pages, report.pages_with(PageStatus::Pinned)), (0, 64), "{report:?}");
    }
    // Not even a new pager lets it go.
    let killed = bed.kill("pager");
    bed.wait_ready("pager", killed);
    let job = device.read_at(private.addr(), len, None).expect("a read begins");
    assert_eq!(session.migrate(private.addr(), len, &device).expect("migrate").moved_pages, 0);
    assert!(!job.is_ready(), "a device fault waits");
    all_there();
    assert_eq!(read_as_debugger(private.addr(), len).expect("still there")[..bytes.len()], bytes[..]);
    operator(&bed, &["home", "--release", &pid]);
    let (seen, _) = job.wait().expect("the fault is answered");
    assert!(seen[..bytes.len()] == bytes[..]);
    assert!(session.migrate(private.addr(), len, &device).expect("migrate").complete());
    assert!(operator(&bed, &["empty", "soft0"]).contains("pages came home"));
    assert_eq!(session.residency_summary(private.addr(), len).expect("residency").all_device_pages(), 0);
    session.release(private.addr(), len).expect("release");
}

#[test]
fn integration_a_process_that_the_operator_brings_home_can_be_read_by_a_debugger() {
    home_is_home("");
    home_is_home("aperture = false");
}
