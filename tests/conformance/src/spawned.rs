//! Helper processes of a case: the same case in another process, told by its role what part it plays.

use std::process::{Child, Stdio};
use std::time::Instant;

use uhmm_sdk::Operator;

use crate::case::{CaseArgs, CaseResult, During, Failure, Outcome, OutcomeStatus, ensure};
use crate::child::{OUTCOME_MARK, command};
use crate::ctx::{Ctx, RETRY_PATIENCE, SETTLE_POLL};

/// A running helper; killed when it is dropped before its end.
pub(crate) struct Spawned {
    child: Option<Child>,
}

impl Ctx {
    /// This process's part; `None` in the case proper.
    pub(crate) fn role(&self) -> Option<&str> {
        self.args.role.first().map(String::as_str)
    }

    /// A word of the role behind the first.
    pub(crate) fn role_number(&self, index: usize) -> CaseResult<u64> {
        let word = self.args.role.get(index).and_then(|word| word.parse().ok());
        word.ok_or_else(|| Failure::Failed(format!("The helper's role has no number at {index}")))
    }

    /// Starts the same case in another process of this process group.
    pub(crate) fn spawn(&self, role: &[String]) -> CaseResult<Spawned> {
        let exe = std::env::current_exe().during("Find this program")?;
        let args = CaseArgs { role: role.to_vec(), ..self.args.clone() };
        let mut command = command(&exe, &args);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command.spawn().during("Start a helper process")?;
        Ok(Spawned { child: Some(child) })
    }
}

impl Spawned {
    /// Waits for its end; its failure is the caller's.
    pub(crate) fn join(mut self) -> CaseResult {
        let Some(child) = self.child.take() else { return Ok(()) };
        let output = child.wait_with_output().during("Wait for a helper process")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let line = said.lines().rev().find_map(|line| line.strip_prefix(OUTCOME_MARK));
        match line.and_then(|line| serde_json::from_str::<Outcome>(line).ok()) {
            Some(Outcome { status: OutcomeStatus::Passed, .. }) => Ok(()),
            Some(Outcome { status: OutcomeStatus::Failed, why }) => {
                Err(Failure::Failed(format!("In a helper process: {why}")))
            }
            Some(Outcome { why, .. }) => Err(Failure::NotApplicable(why)),
            None => Err(Failure::Failed(format!("A helper process ended with {} and said nothing", output.status))),
        }
    }

    /// Waits for an end without an outcome: the helper exits or becomes another program. It must not die of a signal.
    pub(crate) fn join_silent(mut self) -> CaseResult {
        let Some(child) = self.child.take() else { return Ok(()) };
        let output = child.wait_with_output().during("Wait for a helper process")?;
        let said = String::from_utf8_lossy(&output.stdout);
        if let Some(line) = said.lines().rev().find_map(|line| line.strip_prefix(OUTCOME_MARK)) {
            return Err(Failure::Failed(format!("A helper process did not go away: {line}")));
        }
        if output.status.success() {
            return Ok(());
        }
        Err(Failure::Failed(format!("A helper process ended with {}", output.status)))
    }

    /// kill -9 and wait.
    pub(crate) fn kill(mut self) -> CaseResult {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill().and_then(|()| child.wait()).map(|_| ()).during("Kill a helper process")
    }

    /// The same, and waits until the pager has let go of its memory: until then what it had begun may still take room on a device from others.
    /// The end of a process is known to the pager by an event, of which nobody else is told.
    pub(crate) fn kill_and_reclaim(self, ctx: &Ctx) -> CaseResult {
        let pid = self.child.as_ref().map_or(0, std::process::Child::id);
        self.kill()?;
        let mut operator = Operator::connect(Some(ctx.run_dir()))?;
        let end = Instant::now() + RETRY_PATIENCE;
        while operator.regions()?.iter().any(|region| region.pid == pid) {
            ensure!(Instant::now() < end, "A killed process still has regions after {RETRY_PATIENCE:?}");
            std::thread::sleep(SETTLE_POLL);
        }
        Ok(())
    }

    /// Waits for the helper's first line on standard output, which it prints when it has reached a certain point.
    pub(crate) fn wait_for_line(&mut self) -> CaseResult {
        use std::io::Read;
        let output = self.child.as_mut().and_then(|child| child.stdout.as_mut());
        let output = output.ok_or_else(|| Failure::Failed("A helper process has no output".into()))?;
        let mut byte = [0];
        loop {
            let count = output.read(&mut byte).during("Read a helper's output")?;
            if count == 0 {
                return Err(Failure::Failed("A helper process ended before it was ready".into()));
            }
            if byte[0] == b'\n' {
                return Ok(());
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let ended = child.kill().and_then(|()| child.wait());
            tracing::debug!(?ended, "Ended a helper process of a failed case");
        }
    }
}
