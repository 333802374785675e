//! Services are confined before their programs run (`uhmm_sandbox` says to what); what is not in force is said, and so are calls that are
//! refused.

use std::collections::BTreeSet;
use std::process::Command;

use uhmm_ipc::FdToken;
use uhmm_ipc::message::Metric;
use uhmm_kernel_hook::confine::{DeniedCalls, Outcome, Pending, Taken, calls};
use uhmm_manifest::SandboxMode;
use uhmm_sandbox::Profile;

use crate::service::{Supervisor, SupervisorError};
use crate::state::HOLDER;

/// In tokens: refused calls of a service.
pub(crate) const KIND_DENIED: u64 = 1 << 40;
/// Refused calls that are answered by hand. Whoever goes on is answered by the kernel alone (ENOSYS): it shall not keep the supervisor busy.
const DENIED_MAX: u64 = 256;
/// Refused calls that one look takes.
const DENIED_A_LOOK: usize = 16;

/// What is in force for a service.
#[derive(Debug, Default)]
pub(crate) struct Confined {
    /// Bits of [`Step`]; `None`: it was asked to be off.
    pub in_force: Option<u32>,
    denied: Option<DeniedCalls>,
    /// Names that were said.
    said: BTreeSet<i32>,
    pub denied_calls: u64,
}

fn bits(outcome: &Outcome) -> u32 {
    outcome.in_force().fold(0, |all, step| all | 1 << (step as u32))
}

/// For people: `network (Operation not permitted), ...`.
fn missing(outcome: &Outcome) -> String {
    let words: Vec<String> = outcome.missing().map(|(step, error)| format!("{} ({error})", step.name())).collect();
    words.join(", ")
}

impl<F: FnOnce()> Supervisor<F> {
    /// The child of this command will confine itself.
    pub(crate) fn confine(&mut self, service: usize, command: &mut Command) -> Result<Pending, SupervisorError> {
        self.make_view(service)?;
        let profile = Profile::of(&self.plan, &self.plan.services[service], &self.place())?;
        Ok(profile.confinement()?.install(command)?)
    }

    /// The same of the holder.
    pub(crate) fn confine_holder(&mut self, command: &mut Command) -> Result<Pending, SupervisorError> {
        Ok(Profile::of_holder(&self.place()).confinement()?.install(command)?)
    }

    /// What has become of it.
    pub(crate) fn holder_confined(&mut self, pending: Pending) {
        if let Err(error) = self.note_outcome(self.plan.services.len(), pending, SandboxMode::On) {
            tracing::warn!(%error, "What confines the holder is not known");
        }
    }

    /// The holder, which is in no plan, comes behind the services.
    fn confined_name(&self, service: usize) -> &str {
        self.plan.services.get(service).map_or(HOLDER, |service| service.name.as_str())
    }

    /// What an older supervisor has started is as it was.
    pub(crate) fn confined_before(&mut self, service: usize) {
        let in_force = self.saved.sandboxes.get(self.confined_name(service)).copied();
        self.confined.insert(service, Confined { in_force, ..Confined::default() });
    }

    /// The child was spawned, or could not be: what is in force.
    pub(crate) fn confined_now(&mut self, service: usize, pending: Pending) -> Result<(), SupervisorError> {
        let mode = self.plan.services[service].sandbox.mode;
        self.note_outcome(service, pending, mode)
    }

    fn note_outcome(&mut self, service: usize, pending: Pending, mode: SandboxMode) -> Result<(), SupervisorError> {
        let name = self.confined_name(service).to_owned();
        self.stop_listening(service);
        let outcome = pending.outcome()?;
        let lacking = outcome.as_ref().map_or_else(|| "nothing was told".to_owned(), missing);
        let mut confined = Confined::default();
        if mode == SandboxMode::Off {
            tracing::warn!(service = name, "Started without sandbox, as its manifest says");
        } else if !lacking.is_empty() {
            tracing::warn!(
                service = name,
                missing = lacking,
                "The sandbox is not whole: this kernel or account does not offer all of it"
            );
        }
        if let Some(outcome) = outcome {
            confined.in_force = (mode != SandboxMode::Off).then(|| bits(&outcome));
            confined.denied = outcome.denied;
        }
        if let Some(denied) = &confined.denied {
            self.reactor.add_fd(denied, FdToken(KIND_DENIED | service as u64))?;
        }
        match confined.in_force {
            Some(in_force) => drop(self.saved.sandboxes.insert(name, in_force)),
            None => drop(self.saved.sandboxes.remove(&name)),
        }
        self.confined.insert(service, confined);
        if mode == SandboxMode::Required && !lacking.is_empty() {
            return Err(SupervisorError::NotConfined { missing: lacking });
        }
        Ok(())
    }

    /// A service has made calls that its filter refuses.
    pub(crate) fn calls_denied(&mut self, service: usize) -> Result<(), SupervisorError> {
        let name = self.confined_name(service).to_owned();
        let Some(confined) = self.confined.get_mut(&service) else { return Ok(()) };
        for _ in 0..DENIED_A_LOOK {
            let Some(denied) = &confined.denied else { return Ok(()) };
            match denied.take() {
                Ok(Taken::Call(call)) => {
                    confined.denied_calls += 1;
                    if confined.said.insert(call.number) {
                        let call_name = calls::name(call.number);
                        tracing::warn!(service = name, call = call_name, args = ?call.args, "A system call was refused (EPERM); if the service needs it: sandbox.syscalls");
                    }
                }
                Ok(Taken::Nothing) => return Ok(()),
                Ok(Taken::Ended) => {
                    self.stop_listening(service);
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(%error, service = name, "Refused calls are not told any more");
                    self.stop_listening(service);
                    return Ok(());
                }
            }
        }
        if confined.denied_calls > DENIED_MAX {
            tracing::warn!(service = name, "Too many refused calls: further ones get ENOSYS and are not told");
            self.stop_listening(service);
        } else if let Some(denied) = &confined.denied {
            // By edge: what is left would not wake this loop again.
            self.reactor.remove_fd(denied)?;
            self.reactor.add_fd(denied, FdToken(KIND_DENIED | service as u64))?;
        }
        Ok(())
    }

    pub(crate) fn stop_listening(&mut self, service: usize) {
        let denied = self.confined.get_mut(&service).and_then(|confined| confined.denied.take());
        if let Some(denied) = denied
            && let Err(error) = self.reactor.remove_fd(&denied)
        {
            tracing::debug!(%error, "Refused calls were not watched");
        }
    }

    /// `sandbox_NAME`: what is in force, a bit for each step; 0: asked to be off.
    pub(crate) fn sandbox_metrics(&self) -> Vec<Metric> {
        let of = |(service, confined): (&usize, &Confined)| Metric {
            name: format!("sandbox_{}", self.confined_name(*service)),
            value: u64::from(confined.in_force.unwrap_or(0)),
        };
        let mut metrics: Vec<Metric> = self.confined.iter().map(of).collect();
        metrics.sort_by(|one, other| one.name.cmp(&other.name));
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_kernel_hook::confine::Step;

    #[test]
    fn tokens_of_refused_calls_are_no_others() {
        assert!(Step::ALL.len() < 32);
        assert_ne!(crate::keeping::TOKEN_HOLDER.0 & KIND_DENIED, 0, "which is why it is looked for first");
    }
}
