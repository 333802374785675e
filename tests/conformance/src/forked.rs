//! Children that a case forks: a body that runs there, its verdict brought back, and latches that work across fork.
//!
//! ```text
//!   parent: fork(body) --+-- Forked::join: waits, reads the verdict, passes a failure on
//!                        `-- child: body -> verdict into the pipe -> exit without destructors of the parent's values
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use uhmm_kernel_hook::fork::{Child, fork_child};
use uhmm_kernel_hook::process::PidFd;

use crate::case::{CaseArgs, CaseResult, During, Failure, Outcome, OutcomeStatus, ensure, guarded};
use crate::ctx::Ctx;

/// A running child.
pub(crate) struct Forked {
    child: Child,
    verdict: File,
}

/// A pipe that one side opens and another waits for; both may be in any process of the case.
pub(crate) struct Latch {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// Longest wait for another process of the case.
const LATCH_PATIENCE: Duration = Duration::from_secs(15);
/// A verdict is cut to this length, which always fits into a pipe.
const VERDICT_CHARS: usize = 8000;

fn pipe(flags: PipeFlags) -> CaseResult<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC | flags).map_err(|error| Failure::Failed(format!("pipe: {error}")))
}

impl Latch {
    pub(crate) fn new() -> CaseResult<Self> {
        let (reader, writer) = pipe(PipeFlags::empty())?;
        Ok(Self { reader, writer })
    }

    /// Lets one waiter go on.
    pub(crate) fn open(&self) -> CaseResult {
        rustix::io::write(&self.writer, &[1]).map(|_| ()).map_err(|error| Failure::Failed(format!("write: {error}")))
    }

    /// Waits for one `open`. The one who should open it may have failed: then waiting fails too, after a while.
    pub(crate) fn wait(&self) -> CaseResult {
        wait_readable(&self.reader)?;
        let failed = |error: Errno| Failure::Failed(format!("Waiting for another process: {error}"));
        rustix::io::read(&self.reader, &mut [0; 1]).map(|_| ()).map_err(failed)
    }
}

/// Waits until a process has exited.
pub(crate) fn exit_of(process: &PidFd) -> CaseResult {
    wait_readable(process)
}

fn wait_readable(fd: &impl AsFd) -> CaseResult {
    let end = Instant::now() + LATCH_PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Err(Failure::Failed("Another process did not do its part in time".into())),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::Failed(format!("Waiting for another process: {error}"))),
        }
    }
}

/// Forks; the body runs in the child, which then exits.
pub(crate) fn fork(body: impl FnOnce() -> CaseResult) -> CaseResult<Forked> {
    // Not blocking: the child's own children may hold the writing end when the child has long ended.
    let (reader, writer) = pipe(PipeFlags::NONBLOCK)?;
    let child = fork_child(|| {
        let mut outcome = Outcome::from(guarded(body));
        outcome.why = outcome.why.chars().take(VERDICT_CHARS).collect();
        let text = serde_json::to_vec(&outcome).unwrap_or_default();
        // Without its verdict the parent takes the child for dead, which is then the truth.
        i32::from(File::from(writer).write_all(&text).is_err())
    });
    Ok(Forked { child: child.during("Fork")?, verdict: File::from(reader) })
}

impl Forked {
    /// Waits for the child's end; its failure is the caller's.
    pub(crate) fn join(mut self) -> CaseResult {
        let status = self.child.wait().during("Wait for the child")?;
        let mut text = Vec::new();
        // What there is, is there by now; the end may be "would block" (see `fork`).
        let read = self.verdict.read_to_end(&mut text);
        tracing::trace!(?read, "Read a child's verdict");
        let Ok(outcome) = serde_json::from_slice::<Outcome>(&text) else {
            return Err(Failure::Failed(format!("The child ended without a verdict: {status:?}")));
        };
        match outcome.status {
            OutcomeStatus::Passed => Ok(()),
            OutcomeStatus::Failed => Err(Failure::Failed(format!("In the child: {}", outcome.why))),
            OutcomeStatus::NotApplicable => Err(Failure::NotApplicable(outcome.why)),
        }
    }

    /// kill -9 and wait.
    pub(crate) fn kill(self) -> CaseResult {
        ensure!(self.child.pidfd().signal(Signal::KILL)?, "The child had ended by itself");
        self.child.wait().map(|_| ()).during("Wait for the killed child")
    }
}

impl Ctx {
    /// In a forked child: a context over the child's own session. The parent's must not be used or dropped there.
    pub(crate) fn in_child(&self) -> CaseResult<Ctx> {
        let session = self.session.in_child().during("Open the child's own session")?;
        let args = CaseArgs { pause_agent: false, ..self.args.clone() };
        Ctx::with_session(Arc::new(session), args)
    }

    /// For cases that need fork events.
    pub(crate) fn needs_fork(&self) -> CaseResult {
        if self.session.fork_supported() {
            return Ok(());
        }
        Err(Failure::NotApplicable("The kernel does not grant userfaultfd fork events to this account".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_failure_is_the_parents_and_latches_work_across_fork() {
        let latch = Latch::new().unwrap();
        let child = fork(|| {
            latch.wait()?;
            ensure!(1 + 1 == 3, "arithmetic");
            Ok(())
        });
        let child = child.unwrap();
        latch.open().unwrap();
        assert_eq!(child.join().unwrap_err(), Failure::Failed("In the child: arithmetic".into()));
        assert!(fork(|| Ok(())).unwrap().join().is_ok());
        let Err(Failure::Failed(why)) = fork(|| panic!("lost page")).unwrap().join() else { panic!("no failure") };
        assert!(why.contains("lost page"), "{why}");
        let Err(Failure::Failed(why)) = fork(|| std::process::abort()).unwrap().join() else { panic!("no failure") };
        assert!(why.contains("without a verdict"), "{why}");
    }

    #[test]
    fn a_child_that_waits_for_ever_can_be_killed() {
        let never = Latch::new().unwrap();
        fork(|| never.wait()).unwrap().kill().unwrap();
        let ended = fork(|| Ok(())).unwrap();
        while !ended.child.pidfd().exited().unwrap() {
            std::thread::yield_now();
        }
        assert!(ended.join().is_ok());
    }
}
