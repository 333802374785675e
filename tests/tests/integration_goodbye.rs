//! A session that ends while its process goes on: the bytes stay, the place is free, and nobody takes it for an accident. Parts of
//! `tests/c/goodbye.c`, on devices that the CPU sees and on such that it does not, and what C does not show.

use std::mem::ManuallyDrop;
use std::process::Command;
use std::time::{Duration, Instant};

use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::{Error, ErrorCode, Session};
use uhmm_tests::c::{compile, run};
use uhmm_tests::{PATIENCE, TestBed, manifest};

const LEN: u64 = 1 << 20;

fn of_spaces(max_spaces: u32, options: &str) -> String {
    format!("{}\n[quota]\nmax_spaces = {max_spaces}\n", manifest("64MiB", options))
}

/// Nothing of it is an error to those who run the system.
fn no_accident(bed: &TestBed) {
    let log = bed.log();
    let bad: Vec<&str> = log.lines().filter(|line| line.contains("ERROR") || line.contains("was killed")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

fn passes(part: &str, max_spaces: u32) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = compile(&["goodbye.c"], dir.path());
    for options in ["", "aperture = false"] {
        let bed = TestBed::with_log(&of_spaces(max_spaces, options));
        let output = run(Command::new(&program).arg(bed.run_dir()).arg(part));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), format!("ok {part}"), "{options}");
        no_accident(&bed);
    }
}

#[test]
fn integration_a_session_that_ends_leaves_the_bytes_and_its_place() {
    passes("again_and_again", 1);
}

#[test]
fn integration_a_session_ends_while_its_devices_still_work() {
    passes("while_it_works", 1);
}

#[test]
fn integration_a_childs_session_that_ends_leaves_the_bytes_and_its_place() {
    passes("in_child", 2);
}

#[test]
fn integration_a_childs_session_ends_and_what_its_parent_allocated_is_served_on() {
    passes("child_with_allocated", 2);
}

/// Where there is room for one.
fn connects_soon(bed: &TestBed) -> Session {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Session::connect(Some(bed.run_dir())) {
            Ok(session) => return session,
            Err(Error::Service { code: ErrorCode::NoMemory, .. }) if Instant::now() < deadline => {
                std::thread::yield_now()
            }
            Err(error) => panic!("the place of a session that has ended is never free: {error}"),
        }
    }
}

#[test]
fn integration_a_session_ends_though_its_pager_is_away() {
    for options in ["", "aperture = false"] {
        let bed = TestBed::with_log(&of_spaces(1, options));
        for round in 0..4u8 {
            let session = connects_soon(&bed);
            let device = session.device("soft0").expect("device");
            let memory = ProgramMemory::private(LEN).expect("mmap");
            let bytes: Vec<u8> = (0..LEN).map(|at| (at / 5) as u8 ^ round).collect();
            memory.write(0, &bytes).expect("write");
            session.adopt(memory.addr(), LEN).expect("adopt");
            assert!(session.migrate(memory.addr(), LEN, &device).expect("migrate").complete());
            let pager = bed.process("pager");
            let goodbye = std::thread::spawn(move || drop((device, session)));
            // At once, or in the middle of it.
            std::thread::sleep(Duration::from_millis(u64::from(round)));
            pager.kill();
            goodbye.join().expect("it ends");
            let mut found = vec![0; LEN as usize];
            memory.read(0, &mut found).expect("read");
            assert!(found == bytes, "round {round}: the bytes are the program's");
        }
        drop(connects_soon(&bed));
    }
}

/// A session that is refused leaves nothing behind: neither in the system nor in the program.
#[test]
fn integration_a_refused_session_leaves_nothing_behind() {
    let bed = TestBed::with_log(&of_spaces(1, ""));
    let session = bed.session();
    let threads = || std::fs::read_dir("/proc/self/task").expect("threads").count();
    let refused = || {
        let refused = Session::connect(Some(bed.run_dir())).map(drop).expect_err("there is room for one");
        assert_eq!(refused.code(), ErrorCode::NoMemory, "{refused}");
    };
    // What it has to say starts the thread of the log, once.
    refused();
    let before = threads();
    (0..5).for_each(|_| refused());
    // One that has ended may be seen for an instant.
    let deadline = Instant::now() + PATIENCE;
    while threads() > before {
        assert!(Instant::now() < deadline, "threads of refused sessions stay");
        std::thread::yield_now();
    }
    drop(session);
    drop(connects_soon(&bed));
    no_accident(&bed);
}

/// Supervisor, holder and pager at once are one death more than anybody promises. Nobody is left waiting for an answer, and the process may begin anew.
#[test]
fn integration_nobody_waits_for_an_answer_of_a_system_that_is_gone() {
    let text = manifest("64MiB", "");
    let mut bed = TestBed::with_log(&text);
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    // Unmapping it would wait for a pager that never comes.
    let memory = ManuallyDrop::new(ProgramMemory::private(LEN).expect("mmap"));
    let region = session.allocate(LEN).expect("allocate");
    session.adopt(memory.addr(), LEN).expect("adopt");
    session.migrate(memory.addr(), LEN, &device).expect("migrate");
    bed.kill_all();
    let not_running = |error: Error| assert!(matches!(error, Error::NotRunning { .. }), "{error:?}");
    // The first ones may have been sent before anybody knew.
    not_running(session.residency(memory.addr(), LEN).expect_err("nobody answers"));
    not_running(session.migrate(memory.addr(), LEN, &device).expect_err("nobody answers"));
    not_running(device.read(memory.addr(), &mut [0; 4096]).map(drop).expect_err("nobody answers"));
    not_running(session.adopt(memory.addr(), LEN).map(drop).expect_err("nobody answers"));
    not_running(region.free().expect_err("nobody answers"));
    bed.start_again(&text);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match session.residency(memory.addr(), LEN) {
            Err(Error::NotRunning { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            Err(Error::Service { code: ErrorCode::Permission, .. }) => break,
            other => panic!("the new system does not know this session, and says: {other:?}"),
        }
    }
    let again = bed.session();
    let device_again = again.device("soft0").expect("device");
    let other = ProgramMemory::private(LEN).expect("mmap");
    other.write(0, &[7; 64]).expect("write");
    again.adopt(other.addr(), LEN).expect("adopt");
    assert!(again.migrate(other.addr(), LEN, &device_again).expect("migrate").complete());
    let begun = Instant::now();
    drop((device, session));
    assert!(begun.elapsed() < Duration::from_secs(5), "nobody is there to be waited for");
    let mut found = [0; 64];
    other.read(0, &mut found).expect("read");
    assert_eq!(found, [7; 64]);
}
