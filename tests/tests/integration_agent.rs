//! The agent lives in programs that do to a library what they are free to do: they adopt what it lives on, block and send signals, change their user and
//! root, install filters, close descriptors, lock memory, fork, exec, unload it, kill its agent, and end. Each test is a part of `tests/c/agent*.c`, run as
//! a process of its own against a system of its own, with and without an aperture; the field situation and what is expected stand there.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_sdk::{AgentKind, Session};
use uhmm_tests::c::{compile, compile_to, top};
use uhmm_tests::process::Process;
use uhmm_tests::{PATIENCE, TestBed, manifest};

const SOURCES: [&str; 5] = ["agent.c", "agent_memory.c", "agent_signals.c", "agent_barriers.c", "agent_life.c"];

/// A program that says nothing for so long hangs.
const HANGS: Duration = Duration::from_secs(25);

/// The agent of a program that has ended is gone after this.
const GONE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// A system and a program that is in the middle of a part.
struct Stage {
    bed: TestBed,
    process: Process,
    about: String,
    /// Of the program; also a folder that is empty.
    _dir: tempfile::TempDir,
}

impl Stage {
    fn begin(program: &Path, part: &str, aperture: bool) -> Self {
        let bed = TestBed::with_manifest(&manifest("64MiB", &format!("aperture = {aperture}")));
        let dir = tempfile::tempdir().expect("a temporary directory");
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).expect("an empty folder");
        let mut command = Command::new(program);
        command.arg(bed.run_dir()).arg(part).env("UHMM_TEST_FOLDER", empty);
        let process = Process::start(part, &mut command, dir.path()).with_patience(HANGS);
        Self { bed, process, about: format!("{part}, aperture = {aperture}"), _dir: dir }
    }

    /// The next line that means something to the test: what the program asks for, or that it is done.
    fn next(&mut self, answer: &str) -> String {
        let means = |line: &str| line.starts_with("ask ") || line.starts_with("ok ");
        let lines = self.process.ask(answer, means).unwrap_or_else(|text| panic!("{}: {text}", self.about));
        lines.lines().last().expect("a line that was asked for").to_owned()
    }

    /// Does what it asks for until it is done.
    fn play(&mut self) {
        let mut answer = "";
        loop {
            let line = self.next(answer);
            let Some(asked) = line.strip_prefix("ask ") else { break };
            self.do_what(asked);
            answer = "\n";
        }
        self.process.end().unwrap_or_else(|text| panic!("{}: {text}", self.about));
    }

    fn do_what(&self, asked: &str) {
        match asked {
            "kill pager" => {
                let killed = self.bed.kill("pager");
                self.bed.wait_ready("pager", killed);
            }
            "look" => drop(self.bed.operator().regions().expect("regions")),
            "no spaces are left" => self.no_spaces_are_left(),
            "open to others" => open_to_others(self.bed.run_dir()),
            _ => panic!("{}: asks for {asked:?}", self.about),
        }
    }

    /// Each look is a question to the pager, which does its work in between.
    fn no_spaces_are_left(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.bed.metric("pager", "spaces") > 0 {
            assert!(Instant::now() < deadline, "{}: a program that is gone still has its space", self.about);
        }
    }
}

/// Every user may connect.
fn open_to_others(run_dir: &Path) {
    let set = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    set(run_dir, 0o755);
    for entry in std::fs::read_dir(run_dir).expect("the run directory").flatten() {
        if entry.path().extension() == Some(OsStr::new("sock")) {
            set(&entry.path(), 0o666);
        }
    }
}

/// The program of all parts.
fn program() -> (PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    (compile(&SOURCES, dir.path()), dir)
}

fn pass(parts: &[&str]) {
    let (program, _dir) = program();
    for part in parts {
        for aperture in [true, false] {
            Stage::begin(&program, part, aperture).play();
        }
    }
}

#[test]
fn integration_a_program_that_adopts_its_own_heap_goes_on() {
    pass(&["own_heap"]);
}

#[test]
fn integration_a_program_that_adopts_a_malloc_arena_goes_on() {
    pass(&["own_arena"]);
}

#[test]
fn integration_memory_is_freed_while_it_moves_in_24_threads() {
    pass(&["free_while_moving"]);
}

#[test]
fn integration_memory_that_is_mapped_where_other_memory_was_on_its_way_out_keeps_its_bytes() {
    pass(&["unmap_while_moving"]);
}

#[test]
fn integration_a_blocked_sigterm_is_read_from_its_signalfd() {
    pass(&["signalfd_term"]);
}

#[test]
fn integration_a_blocked_handler_that_touches_adopted_memory_waits() {
    pass(&["alarm_handler"]);
}

#[test]
fn integration_ctrl_c_runs_the_programs_handler_once() {
    pass(&["ctrl_c"]);
}

#[test]
fn integration_memory_comes_home_after_setuid() {
    pass(&["set_user"]);
}

#[test]
fn integration_memory_comes_home_and_moves_after_chroot() {
    pass(&["change_root"]);
}

#[test]
fn integration_memory_comes_home_when_connect_is_forbidden() {
    pass(&["no_connect"]);
}

#[test]
fn integration_memory_comes_home_and_moves_when_ioctl_kills() {
    pass(&["killed_on_ioctl"]);
}

#[test]
fn integration_memory_comes_home_and_moves_when_madvise_kills() {
    pass(&["killed_on_madvise"]);
}

#[test]
fn integration_memory_comes_home_and_moves_without_any_descriptor() {
    pass(&["descriptors_closed"]);
}

#[test]
fn integration_nothing_is_written_to_files_that_take_the_numbers() {
    pass(&["descriptors_reused"]);
}

#[test]
fn integration_memory_comes_home_and_moves_when_no_descriptor_is_left() {
    pass(&["descriptors_limit"]);
}

#[test]
fn integration_calls_end_with_an_error_when_a_filter_kills_the_sdks_thread() {
    pass(&["sdk_killed_in_send", "sdk_killed_in_receive", "sdk_killed_in_wait"]);
}

#[test]
fn integration_memory_locked_by_mlockall_moves_and_no_more_is_locked() {
    pass(&["mlockall_after", "mlockall_onfault", "mlockall_before"]);
}

#[test]
fn integration_memory_locked_up_to_the_limit_is_pinned() {
    pass(&["memlock_limit"]);
}

#[test]
fn integration_connect_names_the_limit_on_addresses() {
    pass(&["address_space_limit"]);
}

#[test]
fn integration_a_limit_of_processes_is_named_and_may_pass() {
    pass(&["process_limit"]);
}

#[test]
fn integration_in_a_pid_namespace_bytes_are_right() {
    pass(&["pid_namespace"]);
}

#[test]
fn integration_a_program_forks_while_threads_are_inside_the_sdk() {
    pass(&["fork_inside"]);
}

#[test]
fn integration_exec_in_the_middle_of_migrations_gives_device_memory_back() {
    // The second program says that it is done.
    pass(&["exec_inside"]);
}

#[test]
fn integration_memory_is_served_after_dlclose() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let source = top().join("tests/c/agent_dlopen.c");
    // It names nothing of the library's, which is left out then.
    let program = compile_to(dir.path().join("program"), &[source], &["-Wl,--as-needed"]);
    for aperture in [true, false] {
        let bed = TestBed::with_manifest(&manifest("64MiB", &format!("aperture = {aperture}")));
        let mut process = Process::start("dlopen", Command::new(&program).arg(bed.run_dir()), dir.path());
        process = process.with_patience(HANGS);
        let done = process.ask("", |line| line == "ok dlopen").and_then(|_| process.end());
        done.unwrap_or_else(|text| panic!("aperture = {aperture}: {text}"));
    }
}

#[test]
fn integration_an_agent_that_is_killed_has_a_successor() {
    pass(&["agent_killed"]);
}

#[test]
fn integration_without_a_successor_calls_say_so_and_memory_comes_home() {
    pass(&["agent_killed_for_good"]);
}

#[test]
fn integration_where_clone_is_forbidden_a_thread_does_the_work() {
    pass(&["clone_forbidden"]);
}

/// Run directory for the test below, when it is started under a filter.
const ROLE: &str = "UHMM_TEST_AGENT_RUN_DIR";

#[test]
fn integration_a_session_says_who_its_agent_is() {
    const NAME: &str = "integration_a_session_says_who_its_agent_is";
    if let Some(run_dir) = std::env::var_os(ROLE) {
        let session = Session::connect(Some(Path::new(&run_dir))).expect("a session");
        assert_eq!(session.agent().expect("an answer"), AgentKind::Thread);
        return;
    }
    let bed = TestBed::start("64MiB");
    let session = bed.session();
    let AgentKind::Process { pid } = session.agent().expect("an answer") else { panic!("no process") };
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("it runs");
    assert_eq!(comm.trim(), "uhmm-agent");
    let (program, _dir) = program();
    let mut command = Command::new(program);
    command.arg(bed.run_dir()).arg("clone_forbidden_exec").env(ROLE, bed.run_dir());
    command.env("UHMM_TEST_PROGRAM", std::env::current_exe().expect("exe")).env("UHMM_TEST_NAME", NAME);
    let output = uhmm_tests::c::run(&mut command);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("1 passed"), "{text}");
}

/// How a program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Exit,
    Kill,
}

/// The agent is gone within a second, whatever it or the pager is doing, and so is the program's space when the pager has looked.
fn ends(part: &str, end: End, pager_stands: bool) {
    let (program, _dir) = program();
    for aperture in [true, false] {
        let mut stage = Stage::begin(&program, part, aperture);
        let line = stage.next("");
        let agent = line.strip_prefix("ask agent ").and_then(|pid| pid.parse().ok());
        let agent = agent.unwrap_or_else(|| panic!("{}: {line:?}", stage.about));
        let agent = PidFd::open(agent).expect("the agent runs");
        let pager = PidFd::open(stage.bed.status("pager").pid).expect("the pager runs");
        if pager_stands {
            assert!(pager.signal(Signal::STOP).expect("kill -STOP"));
        }
        match end {
            End::Kill => {
                let program = PidFd::open(stage.process.id()).expect("the program runs");
                assert!(program.signal(Signal::KILL).expect("kill -9"));
            }
            End::Exit => {
                stage.next("\n");
                stage.process.end().unwrap_or_else(|text| panic!("{}: {text}", stage.about));
            }
        }
        let gone = rustix::event::poll(&mut [PollFd::new(&agent, PollFlags::IN)], Some(&GONE)).expect("poll");
        if pager_stands {
            assert!(pager.signal(Signal::CONT).expect("kill -CONT"));
        }
        assert_eq!(gone, 1, "{}, {end:?}: the agent has outlived its program by a second", stage.about);
        stage.no_spaces_are_left();
    }
}

#[test]
fn integration_the_agent_ends_with_a_program_that_exits() {
    ends("stays", End::Exit, false);
    ends("stays_paused", End::Exit, false);
    ends("stays", End::Exit, true);
    ends("stays_moving", End::Exit, false);
    ends("stays_moving", End::Exit, true);
}

#[test]
fn integration_the_agent_ends_with_a_program_that_is_killed() {
    ends("stays", End::Kill, false);
    ends("stays_paused", End::Kill, false);
    ends("stays", End::Kill, true);
    ends("stays_moving", End::Kill, false);
    ends("stays_moving", End::Kill, true);
}

#[test]
fn integration_a_process_that_shares_the_programs_memory_outlives_it() {
    pass(&["memory_outlives"]);
}
