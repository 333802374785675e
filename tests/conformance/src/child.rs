//! One case in a process of its own: started, watched until its deadline, its whole process group ended.

use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::signal::StopSignals;

use crate::case::{CaseArgs, Outcome, OutcomeStatus};
use crate::error::ConformanceError;

/// Marks the line of a case's standard output that holds its outcome.
pub(crate) const OUTCOME_MARK: &str = "@outcome ";
/// So much of what a failed case said on standard error is shown.
const SHOWN_STDERR_BYTES: usize = 600;
/// A process that has nothing more to do may take this long to be gone.
const REAP_PATIENCE: Duration = Duration::from_secs(1);

/// Command line of a case.
pub(crate) fn command(exe: &Path, args: &CaseArgs) -> Command {
    let mut command = Command::new(exe);
    command.arg("--run-dir").arg(&args.run_dir).arg("conformance-case").arg(&args.name);
    command.arg("--devices").arg(args.devices.join(",")).arg("--seed").arg(args.seed.to_string());
    for (flag, on) in [("--coherent", args.coherent), ("--chaos", args.chaos), ("--pause-agent", args.pause_agent)] {
        if on {
            command.arg(flag);
        }
    }
    for word in &args.role {
        command.arg("--role").arg(word);
    }
    // The place of a panic is enough in a table.
    command.env("RUST_BACKTRACE", "0");
    command
}

/// Runs one case to its end, its deadline, or until somebody wants the whole suite to stop.
pub(crate) fn run(
    exe: &Path,
    args: &CaseArgs,
    deadline: Duration,
    stop: &StopSignals,
) -> Result<Outcome, ConformanceError> {
    let mut command = command(exe, args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(ConformanceError::process("Starting a case"))?;
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let waited = wait(&child, deadline, stop);
    let in_time = matches!(waited, Ok(true));
    let left_behind = end_group(&mut child, in_time);
    waited?;
    let status = child.wait().map_err(ConformanceError::process("Waiting for a case"))?;
    let said = stdout.and_then(|thread| thread.join().ok()).unwrap_or_default();
    let complained = stderr.and_then(|thread| thread.join().ok()).unwrap_or_default();
    let failed = |why: String| Outcome { status: OutcomeStatus::Failed, why };
    let spoken = said.lines().rev().find_map(|line| line.strip_prefix(OUTCOME_MARK));
    let outcome = match spoken.and_then(|line| serde_json::from_str::<Outcome>(line).ok()) {
        _ if !in_time => failed(format!("Hangs: not ended after {} s", deadline.as_secs())),
        Some(outcome) if status.success() => outcome,
        _ => match status.signal() {
            Some(signal) => failed(format!("Died of signal {signal}")),
            None => failed(format!("Ended with {status} and said nothing")),
        },
    };
    if outcome.status == OutcomeStatus::Failed && !complained.trim().is_empty() {
        return Ok(failed(format!("{}; stderr: {}", outcome.why, tail(complained.trim()))));
    }
    if outcome.status == OutcomeStatus::Passed && left_behind {
        return Ok(failed("Left a process behind".into()));
    }
    Ok(outcome)
}

fn tail(text: &str) -> &str {
    let mut start = text.len().saturating_sub(SHOWN_STDERR_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

fn drain(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        let read = from.read_to_end(&mut bytes);
        tracing::trace!(?read, "A case's output ended");
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// True when the process ended before the deadline.
fn wait(child: &Child, deadline: Duration, stop: &StopSignals) -> Result<bool, ConformanceError> {
    let process = PidFd::open(child.id())?;
    let end = Instant::now() + deadline;
    loop {
        let Some(left) = end.checked_duration_since(Instant::now()) else { return Ok(false) };
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut sources = [PollFd::new(&process, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut sources, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) if !sources[1].revents().is_empty() => return Err(ConformanceError::Interrupted),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(ConformanceError::process("Waiting for a case")(error.into())),
        }
    }
}

/// Ends what is left of the case's process group; true when a process outlived the case.
fn end_group(child: &mut Child, in_time: bool) -> bool {
    let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return false };
    if in_time {
        // Reaps the leader, so that only others can be found in the group. Its number stays the group's while it has members.
        if let Err(error) = child.wait() {
            tracing::warn!(%error, "A case could not be waited for");
        }
    }
    let alive = group_has_running(group);
    if alive || !in_time {
        let killed = rustix::process::kill_process_group(group, Signal::KILL);
        tracing::debug!(?killed, "Ended the process group of a case");
    }
    alive && in_time
}

/// A member that is just ending gets a moment; one that is dead and waits for init to reap it does not count.
fn group_has_running(group: Pid) -> bool {
    let end = Instant::now() + REAP_PATIENCE;
    while rustix::process::test_kill_process_group(group).is_ok() {
        if !crate::leaks::runs_in_group(group.as_raw_nonzero().get()) {
            return false;
        }
        if Instant::now() > end {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    /// What the runner makes of a program that is a shell script.
    fn verdict(name: &str, script: &str, deadline: Duration) -> Outcome {
        let path = std::env::temp_dir().join(format!("uhmm-child-test-{name}-{}", std::process::id()));
        let mut file = std::fs::File::options().write(true).create_new(true).mode(0o700).open(&path).unwrap();
        write!(file, "#!/bin/sh\n{script}\n").unwrap();
        drop(file);
        let args = CaseArgs {
            name: name.into(),
            run_dir: "/".into(),
            devices: Vec::new(),
            coherent: false,
            chaos: false,
            pause_agent: false,
            seed: 0,
            role: Vec::new(),
        };
        let outcome = run(&path, &args, deadline, &StopSignals::block().unwrap());
        std::fs::remove_file(&path).unwrap();
        outcome.unwrap()
    }

    const PASSED: &str = r#"echo '@outcome {"status":"Passed","why":""}'"#;
    const SOON: Duration = Duration::from_secs(30);

    #[test]
    fn the_last_words_of_a_case_are_its_outcome() {
        assert_eq!(verdict("good", PASSED, SOON).status, OutcomeStatus::Passed);
        let silent = verdict("silent", "echo nothing >&2", SOON);
        assert_eq!(silent.status, OutcomeStatus::Failed);
        assert!(silent.why.contains("said nothing") && silent.why.ends_with("stderr: nothing"), "{}", silent.why);
        let liar = verdict("liar", &format!("{PASSED}; exit 3"), SOON);
        assert_eq!(liar.status, OutcomeStatus::Failed);
    }

    #[test]
    fn a_case_that_dies_or_hangs_is_failed_by_name() {
        let died = verdict("died", "kill -11 $$", SOON);
        assert!(died.why.contains("Died of signal 11"), "{}", died.why);
        let hung = verdict("hung", "sleep 1000", Duration::from_millis(200));
        assert!(hung.why.contains("Hangs"), "{}", hung.why);
    }

    #[test]
    fn a_process_that_a_case_leaves_behind_is_found_and_ended() {
        let left = verdict("left", &format!("sleep 1000 >/dev/null 2>&1 &\n{PASSED}"), SOON);
        assert_eq!((left.status, left.why.as_str()), (OutcomeStatus::Failed, "Left a process behind"));
    }
}
