//! The supervisor's side of the [holder](crate::holder): started, watched, started again, and asked for everything by a supervisor that
//! takes over.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use uhmm_ipc::message::{Call, Fd, Interface, Reply, TraceId, common, supervisor};
use uhmm_ipc::{CallId, Endpoint, FdToken, LinkId, Reactor, TimerToken, Wake};
use uhmm_kernel_hook::{HookError, PidFd, SendStatus, SeqListener, SeqPacket, memfd};
use uhmm_kit::record::{RECORD_NAME, What};
use uhmm_kit::{HOLDER_SOCKET, WHOLE_NAME};

use crate::holder::keys_text;
use crate::joining::Outside;
use crate::manager::not_for_children;
use crate::service::{Supervisor, SupervisorError};
use crate::state::{Fate, HOLDER};
use crate::vault::{Vault, split};

/// Name of the saved state among the supervisor's own entries.
const STATE_NAME: &str = "state";
/// Longest state that is believed.
const STATE_BYTES_MAX: u64 = 1 << 20;
/// A holder that has not told everything by then is of no use.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(5);
/// Pauses between holders that die at once.
const PAUSE_MS: (u64, u64) = (1, 200);
/// One that has lived so long did not die at once.
const LONG_LIFE: Duration = Duration::from_secs(5);

pub(crate) const TIMER_HOLDER: TimerToken = TimerToken(2);
pub(crate) const TIMER_HOLDER_PING: TimerToken = TimerToken(3);
pub(crate) const TOKEN_HOLDER: FdToken = FdToken(u64::MAX - 1);

/// What the supervisor knows of the holder.
#[derive(Default)]
pub(crate) struct Keeping {
    link: Option<LinkId>,
    up: bool,
    pidfd: Option<PidFd>,
    child: Option<Child>,
    pid: u32,
    since: Option<Instant>,
    pause_ms: u64,
    asked: Option<CallId>,
    missed: u32,
    last_exit: String,
}

/// What a holder of an older supervisor has told.
struct Told {
    vault: Vault,
    state: Option<String>,
    /// The supervisor's own entries.
    own: BTreeMap<String, Fd>,
    record: Option<Fd>,
    pid: u32,
}

impl<F: FnOnce()> Supervisor<F> {
    /// Adopts a holder that runs, with all that it has; or starts one.
    pub(crate) fn find_holder(&mut self) -> Result<(), SupervisorError> {
        // Before the link, which would complain of a socket that is not there yet.
        let found = if self.options.adopt { self.saved.fate(HOLDER) } else { Fate::Dead };
        // It may run all the same: the older supervisor had no time to write it down.
        let answers = || SeqPacket::connect(&self.options.run_dir.join(HOLDER_SOCKET)).is_ok();
        let runs = matches!(found, Fate::Alive(..)) || self.options.adopt && answers();
        if !runs {
            if self.options.adopt {
                if let Some((vault, state)) = self.manager.take_left() {
                    tracing::warn!(
                        "The holder has died with the older supervisor: the service manager's descriptor store has what it kept"
                    );
                    self.vault = vault;
                    if let Some(state) = state.as_ref().and_then(read_state) {
                        self.saved.replace_by_younger(&state);
                    }
                    // As below; what dead services had given, the store alone knows.
                    let alive = |name: &String| matches!(self.saved.fate(name), Fate::Alive(..));
                    for name in self.plan.services.iter().map(|service| &service.name).filter(|name| alive(name)) {
                        self.vault.doubt(name);
                    }
                } else {
                    tracing::warn!(
                        "The holder has died with the older supervisor: what dead services had kept is lost"
                    );
                }
            }
            self.start_holder()?;
        }
        let link = self.reactor.link(Endpoint {
            path: self.options.run_dir.join(HOLDER_SOCKET),
            interface: Interface::Supervisor,
            key: self.saved.key("supervisor", HOLDER),
        });
        let register = supervisor::Call::Register { service: "supervisor".to_owned(), incarnation: 1 };
        self.reactor.set_preamble(link, vec![Call::Supervisor(register)]);
        self.keeping.link = Some(link);
        self.ping_holder();
        if !runs {
            return Ok(());
        }
        self.confined_before(self.plan.services.len());
        if let Fate::Alive(pid, pidfd) = found {
            self.watch_holder(pid, pidfd, None)?;
        }
        match take_over(&mut self.reactor, link)? {
            Some(Told { vault, state, own, record, pid }) => {
                self.begin_record(record);
                self.vault = vault;
                self.joins.remember(&own);
                // Services that live have given more since, and hand it over; what dead ones had given the holder knows for sure.
                self.vault.doubt_all();
                if let Some(state) = state {
                    self.saved.replace_by_younger(&state);
                }
                self.know_holder(pid)?;
                self.holder_up();
            }
            None => {
                tracing::error!("The holder does not tell what it has: it is killed, and another one is started");
                if self.kill_holder().1 == 0 {
                    // Which one it was nobody knows: another one begins as soon as its socket is free.
                    self.holder_later();
                }
            }
        }
        Ok(())
    }

    /// One that runs and has told what it has is watched.
    fn know_holder(&mut self, pid: u32) -> Result<(), SupervisorError> {
        if self.keeping.pidfd.is_some() {
            return Ok(());
        }
        if self.plan.holder_join.is_none() {
            // It may have died since.
            let Ok(pidfd) = PidFd::open(pid) else { return self.start_holder() };
            self.saved.started(HOLDER, pid);
            return self.watch_holder(pid, pidfd, None);
        }
        match self.joins.inside.get(HOLDER).map(|inside| inside.pidfd.try_clone()) {
            Some(pidfd) => self.watch_holder(u32::MAX, pidfd?, None),
            // It was let in by a supervisor that died at once: its connection tells when it ends.
            None => {
                (self.keeping.pid, self.keeping.since) = (u32::MAX, Some(Instant::now()));
                Ok(())
            }
        }
    }

    /// Whether there is one.
    pub(crate) fn holder_runs(&self) -> bool {
        self.keeping.pid != 0
    }

    /// The number of the next one.
    pub(crate) fn next_holder(&mut self) -> u32 {
        let incarnation = self.saved.incarnations.get(HOLDER).copied().unwrap_or(0) + 1;
        self.saved.incarnations.insert(HOLDER.to_owned(), incarnation);
        incarnation
    }

    /// Whatever is wrong now may be right later: the system goes on with one keeper.
    fn start_holder(&mut self) -> Result<(), SupervisorError> {
        if self.plan.holder_join.is_some() {
            return self.admit_holder();
        }
        if let Err(error) = self.spawn_holder() {
            tracing::error!(error = %text_of(&error), "No holder can be started: when the supervisor dies with another service now, memory is lost");
            self.holder_later();
        }
        Ok(())
    }

    /// What a holder begins with: its socket, and the keys of those who may come.
    pub(crate) fn holder_inheritance(&self) -> Result<(SeqListener, String), SupervisorError> {
        let path = self.options.run_dir.join(HOLDER_SOCKET);
        let listener = SeqListener::bind(&path).map_err(|source| SupervisorError::Socket { path, source })?;
        let names = self.plan.services.iter().map(|service| (service.name.clone(), "supervisor"));
        let mut keys: BTreeMap<String, String> =
            names.map(|(name, to)| (name.clone(), crate::state::hex(&self.saved.key(&name, to)))).collect();
        keys.insert("supervisor".to_owned(), crate::state::hex(&self.saved.key("supervisor", HOLDER)));
        Ok((listener, keys_text(&keys)))
    }

    fn spawn_holder(&mut self) -> Result<(), SupervisorError> {
        let (listener, keys) = self.holder_inheritance()?;
        self.open_doors()?;
        let (near, far) = SeqPacket::pair()?;
        let SendStatus::Sent = near.send(keys.as_bytes(), &[listener.as_fd()])? else {
            return Err(SupervisorError::NotStartedBySupervisor { problem: "its keys cannot be sent".to_owned() });
        };
        let incarnation = self.next_holder();
        let mut command = Command::new(&self.options.exe);
        command.arg("holder").arg("--run-dir").arg(&self.options.run_dir);
        command.args(["--name", HOLDER, "--incarnation", &incarnation.to_string(), "--log", self.log_name()]);
        not_for_children(&mut command);
        command.stdin(Stdio::from(far.into_fd())).stdout(Stdio::null()).process_group(0);
        let pending = self.confine_holder(&mut command)?;
        let child = command.spawn().map_err(|source| HookError::call("spawn", None, source))?;
        self.holder_confined(pending);
        let pid = child.id();
        self.saved.started(HOLDER, pid);
        self.save_state();
        self.watch_holder(pid, PidFd::open(pid)?, Some(child))
    }

    pub(crate) fn watch_holder(&mut self, pid: u32, pidfd: PidFd, child: Option<Child>) -> Result<(), SupervisorError> {
        self.reactor.add_fd(&pidfd, TOKEN_HOLDER)?;
        let keeping = &mut self.keeping;
        (keeping.pid, keeping.pidfd, keeping.child) = (pid, Some(pidfd), child);
        (keeping.since, keeping.asked, keeping.missed) = (Some(Instant::now()), None, 0);
        Ok(())
    }

    /// Its pidfd became readable.
    pub(crate) fn check_holder(&mut self) -> Result<(), SupervisorError> {
        let Some(pidfd) = &self.keeping.pidfd else { return Ok(()) };
        if !pidfd.exited()? {
            return Ok(());
        }
        self.reactor.remove_fd(pidfd)?;
        let how = match self.keeping.child.take().map(|mut child| child.wait()) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => format!("cannot be reaped: {error}"),
            None => "ended (adopted process)".to_owned(),
        };
        self.note(What::ServiceDied, HOLDER, self.saved.incarnations.get(HOLDER).copied().unwrap_or(0).into());
        tracing::warn!(how, "The holder died: the next one is filled by supervisor and services");
        (self.keeping.pidfd, self.keeping.pid, self.keeping.last_exit) = (None, 0, how);
        self.holder_later();
        Ok(())
    }

    fn holder_later(&mut self) {
        let keeping = &mut self.keeping;
        let lived_long = keeping.since.take().is_some_and(|since| since.elapsed() > LONG_LIFE);
        let pause_ms = if lived_long { PAUSE_MS.0 } else { keeping.pause_ms.clamp(PAUSE_MS.0, PAUSE_MS.1) };
        keeping.pause_ms = pause_ms * 2;
        self.reactor.add_timer(Duration::from_millis(pause_ms), TIMER_HOLDER);
    }

    /// Its pause is over.
    pub(crate) fn holder_due(&mut self) -> Result<(), SupervisorError> {
        if self.keeping.pid == 0 && !self.done {
            self.start_holder()?;
        }
        Ok(())
    }

    /// `true` when the wake was about the holder.
    pub(crate) fn is_about_holder(&mut self, wake: &Wake) -> bool {
        match wake {
            Wake::LinkUp { link, .. } if Some(*link) == self.keeping.link => self.holder_up(),
            Wake::LinkDown { link } if Some(*link) == self.keeping.link => {
                self.keeping.up = false;
                if self.keeping.pid != 0 && self.keeping.pidfd.is_none() {
                    self.keeping.pid = 0;
                    self.holder_later();
                }
            }
            Wake::Preamble { link, result: Err(error), .. } if Some(*link) == self.keeping.link => {
                tracing::error!(%error, "The holder refuses the supervisor");
                self.kill_holder();
            }
            Wake::Done { link, call, .. } if Some(*link) == self.keeping.link => {
                if self.keeping.asked == Some(*call) {
                    (self.keeping.asked, self.keeping.missed) = (None, 0);
                }
            }
            _ => return false,
        }
        true
    }

    fn holder_up(&mut self) {
        self.keeping.up = true;
        self.keep_state();
    }

    /// The holder has the saved state too. (One that is not there gets it when it comes.)
    pub(crate) fn keep_state(&mut self) {
        self.manager.keep_state(self.saved.text());
        let Some(link) = self.keeping.link.filter(|_| self.keeping.up) else { return };
        match text_file("uhmm-state", &self.saved.text()) {
            Ok(fd) => {
                // The mark that it is all there comes last.
                let mut entries = self.joins.entries();
                entries.extend(self.record.fd().map(|record| (RECORD_NAME.to_owned(), Fd::clone(record))));
                entries.extend([STATE_NAME, WHOLE_NAME].map(|name| (name.to_owned(), Fd::clone(&fd))));
                for (name, fd) in entries {
                    let put = supervisor::Call::VaultPut { name, fd };
                    self.reactor.call(link, Call::Supervisor(put), TraceId::default(), None);
                }
            }
            Err(error) => tracing::error!(%error, "The holder cannot be given the state"),
        }
    }

    /// A holder that hangs is no holder.
    pub(crate) fn ping_holder(&mut self) {
        let limits = &self.plan.supervisor;
        self.reactor.add_timer(Duration::from_millis(limits.heartbeat_ms), TIMER_HOLDER_PING);
        let keeping = &mut self.keeping;
        let Some(link) = keeping.link.filter(|_| keeping.pid != 0 && !self.done) else { return };
        if !keeping.up {
            let late = Duration::from_millis(limits.start_timeout_ms);
            if keeping.since.is_some_and(|since| since.elapsed() > late) {
                tracing::error!("The holder does not listen: it is killed");
                self.kill_holder();
            }
        } else if keeping.asked.is_some() {
            keeping.missed += 1;
            if keeping.missed == limits.missed_limit {
                tracing::error!("The holder does not answer: it is killed");
                self.kill_holder();
            }
        } else {
            let stats = Call::Common(common::Call::Stats);
            keeping.asked = Some(self.reactor.call(link, stats, TraceId::default(), None));
        }
    }

    /// Its incarnation and pid; 0: it does not run.
    pub(crate) fn kill_holder(&mut self) -> (u32, u32) {
        let joined = self.joins.inside.get(HOLDER);
        if let Some(pidfd) = &self.keeping.pidfd
            && let Err(error) = pidfd.signal(Signal::KILL)
            && !joined.is_some_and(Outside::end)
        {
            tracing::error!(%error, "Killing the holder failed");
        }
        (self.saved.incarnations.get(HOLDER).copied().unwrap_or(0), self.keeping.pid)
    }

    /// Everything has ended in order, and nobody wants what it keeps. It is dead when this returns.
    pub(crate) fn end_holder(&mut self) {
        self.kill_holder();
        if let Some(Err(error)) = self.keeping.child.take().map(|mut child| child.wait()) {
            tracing::warn!(%error, "The holder cannot be reaped");
        }
        if let Some(pidfd) = self.keeping.pidfd.take() {
            // An adopted one: init reaps it.
            let mut entry = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            if let Err(error) = rustix::event::poll(&mut entry, None) {
                tracing::warn!(%error, "The holder's end cannot be waited for");
            }
        }
    }

    /// Its line of `uhmm status`.
    pub(crate) fn holder_status(&self) -> supervisor::ServiceStatus {
        let keeping = &self.keeping;
        let state = match (keeping.pid, keeping.up) {
            (0, _) => "backoff",
            (_, false) => "starting",
            (_, true) => "ready",
        };
        let uptime = keeping.since.map_or(0, |since| since.elapsed().as_millis());
        supervisor::ServiceStatus {
            name: HOLDER.to_owned(),
            pid: keeping.pid,
            incarnation: self.saved.incarnations.get(HOLDER).copied().unwrap_or(0),
            state: state.to_owned(),
            last_exit: keeping.last_exit.clone(),
            uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
            missed_heartbeats: keeping.missed,
            last_recovery_ms: 0,
            vault_entries: 0,
        }
    }
}

/// Everything that a holder has; `None`: it does not tell. Nobody else is listened to meanwhile.
fn take_over(reactor: &mut Reactor, link: LinkId) -> Result<Option<Told>, SupervisorError> {
    let until = Instant::now() + TAKE_OVER_PATIENCE;
    let stats = answer(reactor, link, Call::Common(common::Call::Stats), until)?;
    let Some(Reply::Common(common::Reply::Stats(metrics))) = stats else { return Ok(None) };
    let pid = metrics.iter().find(|metric| metric.name == "pid").map_or(0, |metric| metric.value as u32);
    let (mut told, mut after) =
        (Told { vault: Vault::default(), state: None, own: BTreeMap::new(), record: None, pid }, String::new());
    loop {
        let get = supervisor::Call::VaultGet { prefix: String::new(), after: after.clone() };
        let Some(Reply::Supervisor(supervisor::Reply::Vault { entries, more })) =
            answer(reactor, link, Call::Supervisor(get), until)?
        else {
            return Ok(None);
        };
        after = entries.last().map(|(name, _)| name.clone()).unwrap_or_default();
        for (name, fd) in entries {
            match split(&name) {
                Some(("supervisor", STATE_NAME)) => told.state = read_state(&fd),
                Some(("supervisor", RECORD_NAME)) => told.record = Some(fd),
                Some(("supervisor", name)) => drop(told.own.insert(name.to_owned(), fd)),
                None => {}
                Some((owner, name)) => {
                    if let Err(text) = told.vault.put(owner, name.to_owned(), fd) {
                        tracing::error!(text, owner, "An entry of the holder is not taken over");
                    }
                }
            }
        }
        if !more {
            return Ok(Some(told));
        }
    }
}

/// What comes meanwhile is for the loop: that the holder has died, above all, is told once.
fn answer(reactor: &mut Reactor, link: LinkId, call: Call, until: Instant) -> Result<Option<Reply>, SupervisorError> {
    let left = until.saturating_duration_since(Instant::now());
    let asked = reactor.call(link, call, TraceId::default(), Some(left));
    let (mut wakes, mut others, mut answer) = (Vec::new(), Vec::new(), None);
    while answer.is_none() {
        reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            match wake {
                Wake::Done { call, result, .. } if call == asked => answer = Some(result.ok()),
                other => others.push(other),
            }
        }
    }
    others.into_iter().for_each(|wake| reactor.put_back(wake));
    Ok(answer.flatten())
}

/// A memory file with this in it.
pub(crate) fn text_file(name: &str, text: &str) -> Result<Fd, HookError> {
    let file = std::fs::File::from(memfd::create_sealed(name, text.len() as u64)?);
    file.write_all_at(text.as_bytes(), 0).map_err(|source| HookError::call("write", None, source))?;
    Ok(Arc::new(std::os::fd::OwnedFd::from(file)))
}

fn read_state(fd: &Fd) -> Option<String> {
    let len = memfd::len(fd.as_fd()).ok().filter(|len| *len <= STATE_BYTES_MAX)?;
    let file = std::fs::File::from(fd.try_clone().ok()?);
    let mut text = vec![0; len as usize];
    file.read_exact_at(&mut text, 0).ok()?;
    String::from_utf8(text).ok()
}

fn text_of(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

#[cfg(test)]
mod tests {
    use uhmm_ipc::message::Role;
    use uhmm_ipc::{Identity, Limits};

    use super::*;

    /// A holder that is there and never answers.
    #[test]
    fn what_is_told_while_the_holder_is_asked_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("holder.sock");
        let _silent = SeqListener::bind(&path).unwrap();
        let limits = Limits::default();
        let identity =
            Identity { name: "supervisor".into(), role: Role::Supervisor, incarnation: 1, interface: None, limits };
        let mut reactor = Reactor::new(identity).unwrap();
        let link = reactor.link(Endpoint { path, interface: Interface::Supervisor, key: Vec::new() });
        reactor.add_timer(Duration::ZERO, TIMER_HOLDER);
        let until = Instant::now() + Duration::from_millis(50);
        let answered = answer(&mut reactor, link, Call::Common(common::Call::Stats), until).unwrap();
        assert!(answered.is_none(), "it ends at the deadline: {answered:?}");
        let mut wakes = Vec::new();
        reactor.poll(Some(Duration::ZERO), &mut wakes).unwrap();
        assert!(wakes.iter().any(|wake| matches!(wake, Wake::Timer(TIMER_HOLDER))), "{wakes:?}");
    }
}
