//! What becomes of the log is nobody's business: a disk that is full, a reader that is gone and one that reads no more end and hold no service.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::PidFd;
use uhmm_sdk::{Operator, Session, Target};
use uhmm_tests::uhmm_exe;

const LEN: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn full() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").expect("/dev/full").into()
}

/// A pipe that nobody will ever read of, with and without somebody who could.
fn unread(dropped: bool) -> (Stdio, Option<OwnedFd>) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    (writer.into(), (!dropped).then_some(reader))
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ready(run_dir: &Path, above: u32) -> Option<u32> {
    let services = Operator::connect(Some(run_dir)).ok()?.status().ok()?;
    let pager = services.iter().find(|service| service.name == "pager")?.incarnation;
    (pager > above && services.iter().all(|service| service.state == "ready")).then_some(pager)
}

/// A whole life of a system whose services say a lot and all of it in vain.
fn lives_with(stdout: Stdio, stderr: Stdio) {
    let dir = tempfile::tempdir().expect("a folder");
    let run_dir = dir.path().join("run");
    let mut command = Command::new(uhmm_exe());
    command.arg("--run-dir").arg(&run_dir).arg("up").env("UHMM_LOG", "trace");
    let mut up: Child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().expect("uhmm up");
    let first = wait_for("never ready", || ready(&run_dir, 0));
    let session = Session::connect(Some(&run_dir)).expect("a session");
    let device = session.device("soft0").expect("device");
    let region = session.allocate(LEN).expect("memory");
    let turn = |seed: u64| {
        for index in 0..LEN / 8 {
            region.write_u64(index * 8, index ^ seed).expect("inside");
        }
        session.migrate(region.addr(), LEN, &device).expect("out");
        session.migrate(region.addr(), LEN, Target::Home).expect("home");
        let wrong = (0..LEN / 8).find(|index| region.read_u64(index * 8).expect("inside") != index ^ seed);
        assert_eq!(wrong, None, "a word is wrong");
    };
    (0..4).for_each(turn);
    let before = up.id();
    Operator::connect(Some(&run_dir)).and_then(|mut operator| operator.kill("pager")).expect("kill");
    wait_for("the pager does not come again", || ready(&run_dir, first));
    (4..8).for_each(turn);
    drop((region, device, session));
    Operator::connect(Some(&run_dir)).and_then(Operator::shutdown).expect("down");
    let ended = wait_for("uhmm up does not end", || up.try_wait().expect("wait"));
    assert!(ended.success(), "uhmm up ended with {ended}");
    assert!(PidFd::open(before).is_err());
}

#[test]
fn integration_a_full_disk_under_the_log_ends_nobody() {
    lives_with(full(), full());
}

#[test]
fn integration_a_reader_of_the_log_that_is_gone_ends_nobody() {
    let (stdout, _) = unread(true);
    let (stderr, _) = unread(true);
    lives_with(stdout, stderr);
}

#[test]
fn integration_a_reader_of_the_log_that_reads_no_more_holds_nobody() {
    let (stdout, _kept) = unread(false);
    let (stderr, _kept_too) = unread(false);
    lives_with(stdout, stderr);
}

/// `uhmm up | head -1`: the first line is what somebody waits for.
#[test]
fn integration_ready_is_told_to_a_reader_that_goes_away_after_it() {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    let reading = std::thread::spawn(move || {
        let mut line = String::new();
        BufReader::new(std::fs::File::from(reader)).read_line(&mut line).expect("a line");
        line
    });
    lives_with(writer.into(), full());
    assert_eq!(reading.join().expect("it reads"), "ready\n");
}
