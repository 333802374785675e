//! `uhmm run`: what knows of use (policies, ages, the limit that finds itself), with programs that know nothing of uhmm.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uhmm_kernel_hook::PidFd;
use uhmm_sdk::{AddrRange, Operator, Rest};
use uhmm_tests::process::Process;
use uhmm_tests::{PATIENCE, TestBed, c, manifest, uhmm_exe};

const MIB: u64 = 96;

struct Stage {
    folder: TempDir,
    bed: TestBed,
}

/// An answer of hot_set.
#[derive(Clone, Copy, Debug)]
struct Round {
    resident_kib: u64,
}

impl Stage {
    fn new() -> Self {
        Self {
            folder: TempDir::new().expect("a temporary directory"),
            bed: TestBed::with_manifest(&manifest("256MiB", "")),
        }
    }

    /// A program of tests/programs, linked with nothing of uhmm's.
    fn build(&self, name: &str) -> PathBuf {
        let source = c::top().join("tests/programs").join(name).with_extension("c");
        let into = self.folder.path().join(name);
        let mut cc = Command::new("cc");
        c::run(cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]).arg(source).arg("-o").arg(&into));
        into
    }

    fn run(&self, options: &[&str], program: &Path, arguments: &[&str]) -> Command {
        let library = c::library_dir().join("libuhmm_preload.so");
        assert!(library.exists(), "{} is missing: run `cargo build -p uhmm-preload`", library.display());
        let mut command = Command::new(uhmm_exe());
        command.env("UHMM_RUN_DIR", self.bed.run_dir()).env("UHMM_RUN_LIBRARY", library).env_remove("LD_PRELOAD");
        command.arg("run").args(options).arg("--").arg(program).args(arguments);
        command
    }

    fn start(&self, command: &mut Command) -> Process {
        let mut program = Process::start("run", command, self.folder.path());
        program.ask("", |line| line == "built").expect("it begins");
        program
    }

    /// What it has said on standard error.
    fn said(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("run.errors")).expect("what it said")
    }

    fn policy(&self, text: &str) -> String {
        let path = self.folder.path().join("policy.toml");
        std::fs::write(&path, text).expect("a policy file");
        path.display().to_string()
    }

    fn pages_home(&self) -> u64 {
        self.bed.metric("pager", "pages_home")
    }
}

fn round(program: &mut Process, line: &str) -> Round {
    let answer = program.ask(&format!("{line}\n"), |_| true).expect("an answer");
    let numbers: Vec<u64> = answer.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [_, _, resident_kib] = numbers[..] else { panic!("a strange answer: {answer}") };
    Round { resident_kib }
}

/// Pages that came back from the device in the rounds of a program that has less memory than it touches, and more than it uses.
fn refaults(stage: &Stage, program: &Path, policy: &str, lines: &[&str]) -> u64 {
    let file = stage.policy(policy);
    let mut run = stage.run(&["--ram", "56MiB", "--policy", &file], program, &["96", "3000"]);
    let mut program = stage.start(&mut run);
    for _ in 0..3 {
        round(&mut program, "go");
    }
    let before = stage.pages_home();
    for line in lines {
        round(&mut program, line);
    }
    stage.pages_home() - before
}

/// What is used stays, whether it was chosen by chance at first or is another quarter now: less comes back than with a policy that finds that out by
/// sending it away. The two run in turns.
#[test]
fn integration_run_age_of_what_is_used_saves_faults() {
    let stage = Stage::new();
    let program = stage.build("hot_set");
    for (name, lines) in
        [("stays", ["go"; 8]), ("shifts", ["shift", "go", "shift", "go", "shift", "go", "shift", "go"])]
    {
        let (mut clock, mut aged) = (0, 0);
        for _ in 0..2 {
            clock += refaults(&stage, &program, "policy = \"clock\"", &lines);
            aged += refaults(&stage, &program, "policy = \"aged\"", &lines);
        }
        println!("hot set {name}: {clock} pages came back with the clock, {aged} with ages");
        assert!(aged < clock, "hot set {name}: {clock} pages came back with the clock, {aged} with ages");
    }
    assert!(stage.bed.metric("pager", "rest_touched_pages") > 0, "nothing was ever touched while it rested");
    assert!(stage.bed.metric("pager", "rested_pages") > 0, "nothing ever rested to its end");
}

/// Policies that answer as none should, and one for which nearly everything rests, and a death of pager and driver in the middle of it: every
/// word is right.
#[test]
fn integration_run_age_policies_cost_time_and_no_bytes() {
    let stage = Stage::new();
    let program = stage.build("working_set");
    let rounds = ["go", "fork", "go", "go"];
    let mut plain = Command::new(&program);
    let mut alone = Process::start("plain", plain.arg("64"), stage.folder.path());
    alone.ask("", |line| line == "built").expect("it begins");
    let hash = |program: &mut Process, line: &str| {
        let answer = program.ask(&format!("{line}\n"), |_| true).expect("an answer");
        answer.split_once(' ').map(|(hash, _)| hash.to_owned()).unwrap_or_else(|| panic!("a strange answer: {answer}"))
    };
    let expected = rounds.map(|line| hash(&mut alone, line));
    for name in ["random", "always", "never", "nonsense", "aged"] {
        let file = stage.policy(&format!("policy = \"{name}\"\nrest_ms = 400\n"));
        let out = stage.bed.metric("pager", "pages_out");
        let mut run = stage.run(&["--ram", "32MiB", "--policy", &file], &program, &["64"]);
        let mut program = stage.start(&mut run);
        for (nth, (line, expected)) in rounds.iter().zip(&expected).enumerate() {
            if name == "random" || name == "aged" {
                stage.bed.kill(if nth % 2 == 0 { "pager" } else { "soft0" });
            }
            assert_eq!(&hash(&mut program, line), expected, "{name}, round {nth}");
        }
        assert!(
            name == "random" || name == "aged" || stage.bed.metric("pager", "pages_out") > out,
            "{name}: nothing left"
        );
    }
}

#[test]
fn integration_run_age_tells_what_could_be_taken_and_takes_nothing() {
    let stage = Stage::new();
    let program = stage.build("hot_set");
    let mut run = stage.run(&["--age", "--every", "1"], &program, &[&MIB.to_string(), "3000"]);
    let mut program = stage.start(&mut run);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        round(&mut program, "go");
    }
    let text = stage.said();
    drop(program);
    assert_eq!(stage.bed.metric("pager", "pages_out"), 0, "something left: {text}");
    // How much it is is an estimate by some looks, and in a debug build a wrong one (open): here it is that some are made, and nothing is taken.
    let share = |table: &str| -> Option<u64> {
        let line = table.lines().find(|line| line.contains("100 ms:"))?;
        line.split_once('%')?.0.rsplit(' ').find(|word| !word.is_empty())?.parse().ok()
    };
    let shares: Vec<u64> = text.split("uhmm run --age").filter_map(share).collect();
    assert!(shares.iter().any(|share| (1..=100).contains(share)), "three quarters are cold: {text}");
}

#[test]
fn integration_run_age_files_that_cannot_be_meant_are_refused() {
    let stage = Stage::new();
    let refused = |options: &[&str], said: &[&str]| {
        let output = stage.run(options, Path::new("/bin/true"), &[]).stdin(Stdio::null()).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.iter().all(|word| text.contains(word)), "{options:?}: {text}");
    };
    let file = stage.policy("policy = \"aged\"\nrest_ms = 9999\n");
    refused(&["--ram", "64MiB", "--policy", &file], &["policy.toml", "line 2", "9999", "1000"]);
    refused(&["--policy", &file], &["--ram", "--auto"]);
    refused(&["--ram", "64MiB", "--policy", "/nonexistent/p.toml"], &["/nonexistent/p.toml"]);
    refused(&["--ram", "64MiB", "--auto"], &["--auto"]);
    refused(&["--age", "--ram", "64MiB"], &["--age"]);
}

/// Idle memory leaves by itself, and who needs it again has it.
#[test]
fn integration_run_age_finds_the_limit_itself_and_gives_memory_back() {
    let stage = Stage::new();
    let program = stage.build("hot_set");
    let mut run = stage.run(&["--auto", "--stats"], &program, &[&MIB.to_string(), "3000"]);
    let mut program = stage.start(&mut run);
    let first = round(&mut program, "go").resident_kib;
    let begun = Instant::now();
    let mut least = first;
    while least > first * 4 / 5 {
        least = least.min(round(&mut program, "idle").resident_kib);
        assert!(
            begun.elapsed() < Duration::from_secs(90),
            "it never had less than {least} of {first} KiB: {}",
            stage.said()
        );
    }
    // All of it, again and again.
    let needs = Instant::now();
    let mut most = 0;
    while most < first * 9 / 10 {
        for _ in 0..8 {
            most = most.max(round(&mut program, "shift").resident_kib);
        }
        assert!(
            needs.elapsed() < Duration::from_secs(90),
            "it never had more than {most} of {first} KiB: {}",
            stage.said()
        );
    }
}

/// What rests is back as soon as anybody wants it, the program or somebody else, and only what was wanted.
#[test]
fn integration_run_age_what_rests_is_back_when_it_is_wanted() {
    const PIECE: u64 = 2 << 20;
    let stage = Stage::new();
    let program = stage.build("hot_set");
    let mut program = stage.start(&mut stage.run(&[], &program, &["32", "3000"]));
    let mut operator = Operator::connect(Some(stage.bed.run_dir())).expect("it runs");
    let device = operator.device_id("soft0").expect("a device");
    let large = || {
        let regions =
            Operator::connect(Some(stage.bed.run_dir())).and_then(|mut operator| operator.regions()).expect("regions");
        regions.into_iter().find(|region| region.page_count * 4096 >= 32 << 20)
    };
    let begun = Instant::now();
    while large().is_none() {
        round(&mut program, "go");
        assert!(begun.elapsed() < PATIENCE, "its memory is never managed: {}", stage.said());
    }
    let region = large().expect("managed");
    let process = PidFd::open(region.pid).expect("it runs");
    let piece = |nth: u64| AddrRange { start: (region.addr + PIECE).next_multiple_of(PIECE) + nth * PIECE, len: PIECE };
    let rest = |ms| Some(Rest { ms, stays: true });
    let ended = |operator: &mut Operator| {
        let mut done = operator.moves_done(Duration::from_secs(60)).expect("an answer");
        assert_eq!(done.len(), 1, "{done:?}");
        done.remove(0).1.expect("it rested")
    };
    // Nobody wants it, and somebody moves its neighbour meanwhile.
    operator.begin_move(&process, piece(0), device, rest(1000)).expect("it is asked");
    let begun = Instant::now();
    assert_eq!(operator.move_range(&process, piece(1), Some(device)).expect("it moves"), PIECE / 4096);
    let rested = ended(&mut operator);
    assert!(begun.elapsed() >= Duration::from_millis(1000) && rested.untouched_pages == PIECE / 4096, "{rested:?}");
    // Somebody wants it at home, and the program wants all.
    operator.begin_move(&process, piece(0), device, rest(60_000)).expect("it is asked");
    let _ = operator.move_range(&process, piece(0), None).expect("it is at home");
    assert!(ended(&mut operator).busy_pages > 0);
    operator.begin_move(&process, piece(0), device, rest(60_000)).expect("it is asked");
    round(&mut program, "go");
    assert!(ended(&mut operator).busy_pages > 0);
    assert!(begun.elapsed() < Duration::from_secs(60), "it waited for its time to be over");
    // What rests for a while and may go, goes.
    operator.begin_move(&process, piece(2), device, Some(Rest { ms: 20, stays: false })).expect("it is asked");
    assert_eq!(ended(&mut operator).moved_pages, PIECE / 4096);
    round(&mut program, "shift");
}
