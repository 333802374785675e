//! `uhmm run -- PROGRAM` with Debian's own programs under half of their memory, while pager and driver are killed: each says what it says in a plain run.
//! All programs, smaller parts, and the kernel's swap beside it: `uhmm-run-compare` (docs/run.md).

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uhmm_tests::compare::arrange::{Arrangement, Ground};
use uhmm_tests::compare::programs;
use uhmm_tests::{c, uhmm_exe};

/// Of data. What a program's own code and heap take is beside it.
const MIB: u64 = 32;
const FAR_BYTES: u64 = 512 << 20;
/// A program that is slow and still right is none of this test's affair.
const PATIENCE: Duration = Duration::from_secs(200);
const KILL_EVERY: Duration = Duration::from_millis(300);
/// More often, and the supervisor waits longer each time, as it does when a service cannot live.
const KILLS_MAX: u64 = 6;

/// `ram_mib`: about half of what it has at its greatest.
fn same_as_plain(name: &str, ram_mib: u64) {
    let library = c::library_dir().join("libuhmm_preload.so");
    let ground = Ground::new(Path::new(&uhmm_exe()), &library, None).expect("a place");
    let program = programs::all().into_iter().find(|program| program.name == name).expect("it is in the list");
    program.must_be_installed();
    let plain = ground.place(Arrangement::Plain, 0, 0).and_then(|place| program.run(&place, MIB, PATIENCE));
    let plain = plain.expect("it runs without uhmm");

    let place = ground.place(Arrangement::Uhmm, ram_mib << 20, FAR_BYTES).expect("a place");
    let ended = AtomicBool::new(false);
    let (kills, outcome) = std::thread::scope(|scope| {
        let killer = scope.spawn(|| place.kill_in_turn(KILL_EVERY, KILLS_MAX, &ended));
        let outcome = program.run(&place, MIB, PATIENCE);
        ended.store(true, Ordering::Relaxed);
        (killer.join().expect("the killer ends"), outcome)
    });
    assert_eq!(outcome.expect("it runs with uhmm").result, plain.result);
    let costs = place.costs().expect("uhmm run says what it came to");
    println!("{name}: {costs:?}, {kills} kills");
    assert!(kills > 0, "nothing was killed");
    assert!(costs.faults > 0, "nothing ever came back: {costs:?}");
}

#[test]
fn integration_run_python_is_the_same() {
    same_as_plain("python3", 24);
}

#[test]
fn integration_run_pagerank_is_the_same() {
    same_as_plain("pagerank", 20);
}

#[test]
fn integration_run_sqlite_is_the_same() {
    same_as_plain("sqlite3", 16);
}
