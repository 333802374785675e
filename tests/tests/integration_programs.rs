//! Programs that know nothing of uhmm, with all their memory under management and half of it on the way to a device all the time, while
//! pager and driver are killed: every answer is the same as in a plain run.
//!
//! `tests/programs/preload.c` adopts and migrates; the programs answer rounds (see there). `UHMM_PROGRAM_SECONDS=60` makes the runs
//! longer than these few seconds.

use std::cell::RefCell;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uhmm_tests::process::{Process, tail};
use uhmm_tests::{TestBed, c, manifest};

/// Debian's own Python, for which Debian's numpy is made.
const PYTHON: &str = "/usr/bin/python3";
/// A run that moved less than this has not tested much.
const MOVED_PAGES_MIN: u64 = 4000;
/// Percent of a program's private memory that is under management at least, over all rounds of the preload library. The rest is threads'
/// stacks, data of libraries, uhmm's own, and what has just been mapped.
const ADOPTED_PERCENT_MIN: u64 = 75;
/// The same where heaps shrink and grow all the time: what has just grown is not managed yet, and on a busy machine that is much of it.
const ADOPTED_PERCENT_MIN_OF_THREADS: u64 = 20;

/// Where a program runs: plain, or on `bed` with all its memory under management.
struct Stage<'a> {
    folder: TempDir,
    bed: Option<&'a TestBed>,
    /// Rounds go on for so long; there are two in any case.
    duration: Duration,
    /// Where the tested program's threads were before its end: the program may go on while those of uhmm hang.
    before_end: RefCell<String>,
}

type Outcome = Result<Vec<String>, String>;

impl<'a> Stage<'a> {
    fn new(bed: Option<&'a TestBed>) -> Self {
        let folder = TempDir::new().expect("a temporary directory");
        let duration = if bed.is_some() { Duration::from_secs(seconds()) } else { Duration::ZERO };
        if bed.is_some() {
            let options = ["-shared", "-fPIC"];
            c::compile_to(folder.path().join("preload.so"), &[source("preload.c")], &options);
        }
        Self { folder, bed, duration, before_end: RefCell::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn report(&self) -> String {
        std::fs::read_to_string(self.path("report"))
            .expect("the preload library writes a report when the program exits")
    }

    /// A command whose program is the one that is tested.
    fn tested(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.env_remove("LD_PRELOAD");
        if let Some(bed) = self.bed {
            command.env("LD_PRELOAD", self.path("preload.so")).env("UHMM_RUN_DIR", bed.run_dir());
            command.env("UHMM_PRELOAD_REPORT", self.path("report"));
        }
        command
    }

    fn start(&self, name: &str, command: &mut Command) -> Process {
        Process::start(name, command, self.folder.path())
    }

    /// Rounds until the time is over. `begin` goes in front of the first one.
    fn play(&self, program: &mut Process, begin: &str, round: &str) -> Outcome {
        let started = Instant::now();
        let mut answers = Vec::new();
        let mut text = begin.to_owned() + round;
        while answers.len() < 2 || started.elapsed() < self.duration {
            answers.push(program.ask(&text, |line| line == ".")?);
            round.clone_into(&mut text);
        }
        Ok(answers)
    }

    /// The same, then the program's end.
    fn play_to_the_end(&self, program: &mut Process, begin: &str, round: &str) -> Outcome {
        let answers = self.play(program, begin, round)?;
        self.before_end.replace(program.describe("before its end"));
        program.end()?;
        Ok(answers)
    }
}

/// How long each program runs under uhmm.
fn seconds() -> u64 {
    std::env::var("UHMM_PROGRAM_SECONDS").map_or(8, |text| text.parse().expect("UHMM_PROGRAM_SECONDS is a number"))
}

fn source(name: &str) -> PathBuf {
    c::top().join("tests/programs").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(source(name)).expect("the source is committed")
}

/// Plain, then under uhmm: the same answers, and pages moved, and services died meanwhile.
fn same_as_plain(adopted_percent_min: u64, run: fn(&Stage<'_>) -> Outcome) {
    programs_are_installed();
    let plain = run(&Stage::new(None)).unwrap_or_else(|text| panic!("the plain run failed: {text}"));
    assert!(plain.iter().all(|answer| *answer == plain[0]), "the rounds of a plain run differ: {plain:#?}");

    let bed = TestBed::with_log(&manifest("512MiB", ""));
    let stage = Stage::new(Some(&bed));
    let (outcome, kills) = std::thread::scope(|scope| {
        let (end, ended) = channel();
        let killer = scope.spawn(|| kill_every_second(&bed, ended));
        let outcome = run(&stage);
        drop(end);
        (outcome, killer.join().expect("every killed service comes back"))
    });
    let answers = outcome.unwrap_or_else(|text| panic!("{text}\n-- the services said last:\n{}", tail(&bed.log())));
    for (round, answer) in answers.iter().enumerate() {
        assert_eq!(*answer, plain[0], "round {round} of {}", answers.len());
    }
    let report = stage.report();
    println!("{} rounds, {kills} kills; {report}", answers.len());
    assert!(kills >= seconds() / 2, "only {kills} services were killed");
    assert!(
        counter(&report, "moved_pages") >= MOVED_PAGES_MIN,
        "too few pages moved: {report}\n{}",
        stage.before_end.borrow()
    );
    let (adopted, left) = (counter(&report, "adopted_bytes"), counter(&report, "left_bytes"));
    assert!(adopted * 100 >= (adopted + left) * adopted_percent_min, "not all memory was adopted: {report}");
}

fn counter(report: &str, name: &str) -> u64 {
    let mut fields = report.split_whitespace().filter_map(|field| field.split_once('='));
    let (_, value) = fields.find(|(field, _)| *field == name).unwrap_or_else(|| panic!("no {name} in {report:?}"));
    value.parse().expect("a number")
}

/// kill -9 of pager and driver in turn, until `ended` hangs up. Returns how many there were.
fn kill_every_second(bed: &TestBed, ended: Receiver<()>) -> u64 {
    let mut next = Instant::now();
    for kills in 0.. {
        next += Duration::from_secs(1);
        let pause = next.saturating_duration_since(Instant::now());
        if ended.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
            return kills;
        }
        let victim = if kills % 2 == 0 { "pager" } else { "soft0" };
        let killed = bed.kill(victim);
        bed.wait_ready(victim, killed);
    }
    unreachable!("the range has no end")
}

/// A program that is missing fails the test: nothing is left out in silence.
fn programs_are_installed() {
    let numpy = Command::new(PYTHON).args(["-I", "-c", "import numpy"]).output();
    let programs = ["redis-check-rdb", "redis-benchmark", "sqlite3"].map(|name| Path::new("/usr/bin").join(name));
    let missing = programs.iter().find(|program| !program.exists());
    assert!(
        missing.is_none() && numpy.is_ok_and(|output| output.status.success()),
        "the tests need Debian's programs: apt-get install --no-install-recommends redis-tools sqlite3 python3-numpy"
    );
}

fn threads(stage: &Stage<'_>, options: &[(&str, &str)]) -> Outcome {
    let program = c::compile_to(stage.path("threads"), &[source("threads.c")], &[]);
    let mut command = stage.tested(program);
    let mut program = stage.start("threads", command.envs(options.iter().copied()));
    stage.play_to_the_end(&mut program, "", "round\n")
}

#[test]
fn integration_programs_24_threads_allocate_and_free() {
    same_as_plain(ADOPTED_PERCENT_MIN_OF_THREADS, |stage| threads(stage, &[]));
}

#[test]
fn integration_programs_24_threads_share_one_arena() {
    same_as_plain(ADOPTED_PERCENT_MIN_OF_THREADS, |stage| threads(stage, &[("MALLOC_ARENA_MAX", "1")]));
}

#[test]
fn integration_programs_python_with_numpy() {
    same_as_plain(ADOPTED_PERCENT_MIN, |stage| {
        let mut program = stage.start("python3", stage.tested(PYTHON).arg("-I").arg(source("numbers.py")));
        stage.play_to_the_end(&mut program, "", "round\n")
    });
}

#[test]
fn integration_programs_sqlite() {
    same_as_plain(ADOPTED_PERCENT_MIN, |stage| {
        let mut program = stage.start("sqlite3", stage.tested("/usr/bin/sqlite3").args(["-bail", ":memory:"]));
        stage.play_to_the_end(&mut program, &text("begin.sql"), &text("round.sql"))
    });
}

/// The server, ready. Debian's redis-server is another name of this program; its own package would begin a service too.
fn redis_server(stage: &Stage<'_>, name: &str, command: &mut Command) -> Result<Process, String> {
    let folder = stage.folder.path();
    command.arg0("redis-server").args(["--port", "0", "--save", "", "--unixsocket"]).arg(stage.path(name));
    let mut server = stage.start(name, command.arg("--dir").arg(folder));
    server.ask("", |line| line.contains("now ready to accept connections"))?;
    Ok(server)
}

/// Rounds of a client; then the server ends, because the client tells it to.
fn redis_client(stage: &Stage<'_>, server: &mut Process, name: &str, options: &[&str]) -> Outcome {
    let mut command = Command::new(PYTHON);
    command.arg("-I").arg(source("redis_client.py")).arg(stage.path(name)).arg(stage.folder.path()).args(options);
    let mut client = stage.start(&format!("{name}-client"), &mut command);
    let answers = stage.play(&mut client, "", "round\n");
    let answers = answers.map_err(|text| text + &server.describe("is the server"))?;
    stage.before_end.replace(server.describe("before its end"));
    client.end().map_err(|text| text + &server.describe("is the server"))?;
    server.end()?;
    Ok(answers)
}

#[test]
fn integration_programs_redis_server() {
    same_as_plain(ADOPTED_PERCENT_MIN, |stage| {
        let program = "/usr/bin/redis-check-rdb";
        let mut server = redis_server(stage, "redis", &mut stage.tested(program))?;
        let answers = redis_client(stage, &mut server, "redis", &[])?;
        // What the forked child saved, as a server sees it that has nothing to do with uhmm.
        let plain = Stage::new(None);
        std::fs::rename(stage.path("dump.rdb"), plain.path("dump.rdb")).expect("it was saved");
        let mut server = redis_server(&plain, "loaded", &mut plain.tested(program))?;
        let loaded = redis_client(&plain, &mut server, "loaded", &["--loaded"])?;
        Ok(answers.iter().map(|answer| format!("{answer}{}", loaded[0])).collect())
    });
}
