//! `uhmm run -- PROGRAM`: programs that know nothing of uhmm, as their users start them.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use uhmm_tests::process::Process;
use uhmm_tests::{PATIENCE, TestBed, c, manifest, uhmm_exe};

const MIB: usize = 96;
const RAM_KIB: u64 = 48 << 10;

struct Stage {
    folder: TempDir,
    program: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let folder = TempDir::new().expect("a temporary directory");
        let program = build(folder.path(), "working_set", &[]);
        Self { folder, program }
    }

    /// `uhmm run ARGUMENTS -- the program`.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = run(&self.folder);
        command.args(arguments).arg("--").arg(&self.program).arg(MIB.to_string());
        command
    }

    fn start(&self, command: &mut Command) -> Process {
        let mut program = Process::start("run", command, self.folder.path());
        program.ask("", |line| line == "built").expect("it begins");
        program
    }

    /// What the program answers without uhmm: a hash a round.
    fn plain(&self, rounds: &[&str]) -> Vec<String> {
        let mut plain = Command::new(&self.program);
        let mut program = Process::start("plain", plain.arg(MIB.to_string()), self.folder.path());
        program.ask("", |line| line == "built").expect("it begins");
        rounds.iter().map(|round| answer(&mut program, round).0).collect()
    }
}

/// `uhmm run` without any system in sight, and with the library of this build.
fn run(folder: &TempDir) -> Command {
    let mut command = Command::new(uhmm_exe());
    command.env("UHMM_RUN_DIR", folder.path().join("no system")).env("UHMM_RUN_LIBRARY", library());
    command.env_remove("LD_PRELOAD").arg("run");
    command
}

fn library() -> PathBuf {
    let library = c::library_dir().join("libuhmm_preload.so");
    assert!(library.exists(), "{} is missing: run `cargo build -p uhmm-preload`", library.display());
    library
}

/// A program of tests/programs, linked with nothing of uhmm's.
fn build(folder: &Path, name: &str, options: &[&str]) -> PathBuf {
    let (source, into) = (c::top().join("tests/programs").join(name).with_extension("c"), folder.join(name));
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]).args(options).arg(source).arg("-o").arg(&into);
    c::run(&mut cc);
    into
}

/// One round: its hash, and what was resident at its end.
fn answer(program: &mut Process, round: &str) -> (String, u64) {
    let line = program.ask(&format!("{round}\n"), |_| true).expect("an answer");
    let (hash, resident) = line.trim().split_once(' ').unwrap_or_else(|| panic!("a strange answer: {line}"));
    (hash.to_owned(), resident.parse().expect("a number"))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What the program under `uhmm run` has in memory.
fn resident_kib(run: u32) -> u64 {
    let children = std::fs::read_to_string(format!("/proc/{run}/task/{run}/children")).expect("the children");
    let is_program = |pid: &&str| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "working_set")
    };
    let program = children.split_whitespace().find(is_program).expect("the program runs");
    let status = std::fs::read_to_string(format!("/proc/{program}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Twice its limit, on a system of its own with a file: every word is right. A program that touches all of its memory as fast as it can is over
/// its limit meanwhile, since nothing in it waits for room; as soon as it does something else it is below.
#[test]
fn integration_run_holds_a_program_to_its_limit() {
    let stage = Stage::new();
    let rounds = ["go", "go", "fork", "go", "go"];
    let expected = stage.plain(&rounds);
    let far = format!("512MiB:{}", stage.folder.path().join("far0").display());
    let mut program = stage.start(&mut stage.command(&["--ram", "48MiB", "--far", &far, "--stats"]));
    let answers: Vec<(String, u64)> = rounds.iter().map(|round| answer(&mut program, round)).collect();
    let hashes: Vec<&String> = answers.iter().map(|(hash, _)| hash).collect();
    assert_eq!(hashes, expected.iter().collect::<Vec<_>>());
    let deadline = Instant::now() + PATIENCE;
    while resident_kib(program.id()) > RAM_KIB {
        let resident = resident_kib(program.id());
        assert!(Instant::now() < deadline, "{resident} KiB stay over the limit of {RAM_KIB} KiB: {answers:?}");
        std::thread::yield_now();
    }
}

#[test]
fn integration_run_on_a_running_system_survives_pager_and_driver() {
    let bed = TestBed::with_manifest(&manifest("256MiB", ""));
    let stage = Stage::new();
    let rounds = ["go", "fork", "go", "go", "go", "go"];
    let expected = stage.plain(&rounds);
    let mut command = stage.command(&["--ram", "48MiB", "--device", "soft0"]);
    let mut program = stage.start(command.env("UHMM_RUN_DIR", bed.run_dir()));
    for (round, (line, hash)) in rounds.iter().zip(&expected).enumerate() {
        bed.kill(if round % 2 == 0 { "pager" } else { "soft0" });
        assert_eq!(&answer(&mut program, line).0, hash, "round {round}");
    }
    assert!(bed.metric("pager", "pages_out") > 0, "nothing ever left");
}

/// The program's own status, its signals, and what goes wrong before it.
#[test]
fn integration_run_has_the_exit_status_of_its_program() {
    let folder = TempDir::new().expect("a temporary directory");
    let code = |command: &[&str]| {
        let mut run = run(&folder);
        let output = run.args(["--soft", "64MiB", "--"]).args(command).stdin(Stdio::null()).output().expect("it runs");
        (output.status.code(), text(&output))
    };
    assert_eq!(code(&["/bin/sh", "-c", "exit 42"]), (Some(42), String::new()));
    assert_eq!(code(&["/bin/sh", "-c", "kill -9 $$"]), (Some(128 + 9), String::new()));
    // What a program starts is run with uhmm, too.
    assert_eq!(code(&["/bin/sh", "-c", "seq 1000 | sort -n | tail -1 | grep -qx 1000"]), (Some(0), String::new()));
    for (command, expected) in [("no-such-program", 127), ("/etc", 126), ("/etc/passwd", 126)] {
        let (code, text) = code(&[command]);
        assert_eq!(code, Some(expected), "{text}");
        assert!(text.starts_with("Error: ") && text.contains(command) && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn integration_run_passes_signals_on() {
    let stage = Stage::new();
    let mut command = stage.command(&["--soft", "256MiB"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    // It ends by itself when its input does.
    let _input = child.stdin.take();
    let mut begun = [0; 6];
    std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut begun).expect("its first line");
    assert_eq!(&begun, b"built\n");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
    assert_eq!(child.wait().expect("it ends").code(), Some(7), "the program's own handler");
}

/// Who stands before the program may die: it runs on, with every byte.
#[test]
fn integration_run_may_be_killed_and_the_program_goes_on() {
    let bed = TestBed::with_manifest(&manifest("256MiB", ""));
    let stage = Stage::new();
    let expected = stage.plain(&["go", "go"]);
    let mut command = stage.command(&["--ram", "48MiB"]);
    let mut program = stage.start(command.env("UHMM_RUN_DIR", bed.run_dir()));
    assert_eq!(answer(&mut program, "go").0, expected[0]);
    let run = Pid::from_raw(program.id() as i32).expect("a pid");
    kill_process(run, Signal::KILL).expect("it runs");
    assert_eq!(answer(&mut program, "go").0, expected[1]);
}

#[test]
fn integration_run_says_what_cannot_run_with_it_and_runs_it_without() {
    let folder = TempDir::new().expect("a temporary directory");
    let program = build(folder.path(), "working_set", &["-static"]);
    let output = |options: &[&str]| {
        let mut run = run(&folder);
        run.args(options).arg("--").arg(&program).arg("2").stdin(Stdio::null()).output().expect("it runs")
    };
    let refused = output(&["--soft", "64MiB"]);
    assert_eq!(refused.status.code(), Some(125), "{}", text(&refused));
    assert!(
        text(&refused).contains("linked statically") && text(&refused).contains("--or-without"),
        "{}",
        text(&refused)
    );
    let without = output(&["--soft", "64MiB", "--or-without"]);
    assert_eq!((without.status.code(), without.stdout.as_slice()), (Some(3), &b"built\n"[..]));
    assert!(text(&without).contains("runs without uhmm"), "{}", text(&without));
}

#[test]
fn integration_run_refuses_what_cannot_be_meant() {
    let folder = TempDir::new().expect("a temporary directory");
    let refused = |options: &[&str], said: &[&str]| {
        let output = run(&folder).args(options).args(["--", "/bin/true"]).output().expect("it runs");
        let text = text(&output);
        assert!(!output.status.success() && said.iter().all(|word| text.contains(word)), "{options:?}: {text}");
    };
    refused(&["--ram", "1MiB"], &["1 MiB", "16 MiB"]);
    refused(&["--ram", "much"], &["much"]);
    refused(&["--device", "soft0"], &["uhmm up"]);
    refused(&["--far", "64MiB:/nonexistent/far0"], &["/nonexistent/far0", "--far"]);
    refused(&["--far", "64MiB", "--soft", "64MiB"], &["--soft"]);
    let bed = TestBed::start("16MiB");
    let mut other = run(&folder);
    other.env("UHMM_RUN_DIR", bed.run_dir()).args(["--device", "gpu7", "--", "/bin/true"]);
    let output = other.output().expect("it runs");
    assert!(text(&output).contains("gpu7") && text(&output).contains("soft0"), "{}", text(&output));
}

/// A system of its own ends with its program, and leaves nothing.
#[test]
fn integration_run_leaves_nothing_behind() {
    let folder = TempDir::new().expect("a temporary directory");
    let temporary = folder.path().join("tmp");
    std::fs::create_dir(&temporary).expect("a folder");
    let mut child = run(&folder)
        .env("TMPDIR", &temporary)
        .args(["--far", &format!("64MiB:{}", folder.path().join("far0").display()), "--", "/bin/sh", "-c", "exit 5"])
        .spawn()
        .expect("it starts");
    let begun = Instant::now();
    let status = child.wait().expect("it ends");
    assert_eq!((status.code(), status.signal()), (Some(5), None));
    assert!(begun.elapsed() < PATIENCE);
    let left: Vec<_> = std::fs::read_dir(&temporary).expect("the folder").flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "{left:?}");
}
