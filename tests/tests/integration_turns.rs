//! One turn of the pager is bounded: whatever a client has much of, others are served, heartbeats are answered, and nobody is refused.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use uhmm_sdk::Job;
use uhmm_tests::c::compile;
use uhmm_tests::pattern::word;
use uhmm_tests::{PATIENCE, TestBed};

const PAGE: u64 = 4096;
/// New clients that come while somebody else makes a storm.
const CLIENTS: usize = 20;

/// A program of `tests/c/turns.c` at work.
struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
}

impl Program {
    /// `enter`: a control group.
    fn start(bed: &TestBed, part: &str, enter: Option<&Path>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let program = compile(&["turns.c"], dir.path());
        let enter = enter.map_or(String::from("true"), |group| format!("echo $$ > {}/cgroup.procs", group.display()));
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{enter} && exec \"$0\" \"$1\" \"$2\"")).arg(program);
        command.arg(bed.run_dir()).arg(part).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a program");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Self { input: child.stdin.take(), child, output, _dir: dir }
    }

    fn says(&mut self, text: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        assert_eq!(line.trim_end(), text);
    }

    fn go_on(&mut self) {
        self.input.as_mut().expect("its input").write_all(b"k").expect("it reads");
    }

    fn ends_well(mut self) {
        drop(self.input.take());
        self.says("ok");
        assert!(self.child.wait().expect("an end").success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("A program of a test cannot be ended: {error}");
        }
    }
}

/// New clients come, and each gets something done.
fn others_are_served(bed: &TestBed, clients: usize) {
    for _ in 0..clients {
        let session = bed.session();
        let device = session.device("soft0").expect("device");
        let region = session.allocate(PAGE).expect("region");
        (0..PAGE / 8).for_each(|index| region.write_u64(index * 8, word(3, index)).expect("write"));
        assert!(session.migrate(region.addr(), PAGE, &device).expect("migrate").complete());
        let sum = (0..PAGE / 8).fold(0u64, |sum, index| sum.wrapping_add(word(3, index)));
        assert_eq!(device.run(Job::new("sum", [region.addr(), PAGE]).idempotent()).expect("sum").results, [sum]);
    }
}

fn nobody_was_restarted(bed: &TestBed) {
    for service in ["pager", "mirror", "soft0"] {
        assert_eq!(bed.status(service).incarnation, 1, "{service}: {:?}", bed.status(service));
    }
}

#[test]
fn integration_a_terabyte_that_nobody_touched_costs_nothing() {
    let bed = TestBed::start("64MiB");
    let begun = Instant::now();
    let mut program = Program::start(&bed, "sparse", None);
    program.says("kill the pager");
    nobody_was_restarted(&bed);
    let killed = bed.kill("pager");
    bed.wait_ready("pager", killed);
    program.go_on();
    program.ends_well();
    // A look at each page alone would take longer, each of a dozen times.
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(bed.status("pager").incarnation, 2, "it was killed by us alone");
}

#[test]
fn integration_the_end_of_thousands_of_regions_stops_nobody() {
    let bed = TestBed::start("4GiB");
    let mut program = Program::start(&bed, "regions", None);
    program.says("regions are there");
    program.go_on();
    program.ends_well();
    others_are_served(&bed, 3);
    let end = Instant::now() + PATIENCE;
    while bed.metric("pager", "regions") > 0 {
        assert!(Instant::now() < end, "regions of a dead process are left");
        others_are_served(&bed, 1);
    }
    nobody_was_restarted(&bed);
}

#[test]
fn integration_a_storm_of_forks_stops_nobody_and_fills_no_quota() {
    let bed = TestBed::start("128MiB");
    let mut program = Program::start(&bed, "forks", None);
    program.says("storm");
    others_are_served(&bed, CLIENTS);
    nobody_was_restarted(&bed);
    program.ends_well();
    let end = Instant::now() + PATIENCE;
    // This process's own sessions may be kept until it ends.
    while bed.metric("pager", "spaces") > CLIENTS as u64 {
        assert!(Instant::now() < end, "spaces of dead children are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn integration_threads_that_drop_memory_all_the_time_stop_nobody() {
    let bed = TestBed::start("64MiB");
    let mut program = Program::start(&bed, "drops", None);
    program.says("storm");
    others_are_served(&bed, CLIENTS);
    nobody_was_restarted(&bed);
    program.ends_well();
}

/// A control group of memory in which nobody is killed; where there are none, nothing can be full for long.
struct Group(PathBuf);

impl Group {
    fn make() -> Option<Self> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/memory/uhmm-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        let group = Self(path);
        std::fs::write(group.0.join("memory.oom_control"), "1").ok()?;
        Some(group)
    }

    fn bytes(&self, file: &str) -> u64 {
        let text = std::fs::read_to_string(self.0.join(file)).expect("a control group");
        text.trim().parse().expect("a number")
    }

    fn limit(&self, bytes: u64) {
        std::fs::write(self.0.join("memory.limit_in_bytes"), bytes.to_string()).expect("a limit");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

#[test]
fn integration_a_client_that_may_have_no_more_memory_is_asked_now_and_then_and_gets_its_pages_when_it_may() {
    let Some(group) = Group::make() else {
        return eprintln!("No control group of memory can be made here: nothing is tested");
    };
    let bed = TestBed::with_log(&uhmm_tests::manifest("64MiB", ""));
    let mut program = Program::start(&bed, "limit", Some(&group.0));
    program.says("away");
    // Room for a stack and some pages, not for what comes home.
    group.limit(group.bytes("memory.usage_in_bytes") + (1 << 20));
    program.go_on();
    bed.wait_log("may have no more memory");
    let before = bed.metric("pager", "retries");
    std::thread::sleep(Duration::from_secs(2));
    let retries = bed.metric("pager", "retries") - before;
    assert!((1..500).contains(&retries), "{retries} tries in two seconds");
    others_are_served(&bed, 2);
    group.limit(1 << 30);
    program.ends_well();
    let said = bed.log().matches("may have no more memory").count();
    assert!((1..=4).contains(&said), "said {said} times: it is told when it becomes full, not for each try");
}
