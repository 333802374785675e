//! Services (and a holder) that the supervisor does not start: they come from containers or units of their own, prove themselves as the manifest
//! says, and are let in one after the other.
//!
//! ```text
//!   Join --> is it who it says? --> waits its turn --> Joined: watched by its pidfd, ended by a signal or, where none reaches it, by its guard
//!   pidfd and guard of whoever was let in lie in the holder too: the next supervisor knows for sure whether it lives
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::process::Signal;
use uhmm_ipc::message::supervisor::{KEY_OF_USER, join_name, joining};
use uhmm_ipc::message::{ErrorCode, Fd, Reply, Role, WireError, supervisor};
use uhmm_ipc::{CallId, ConnId, Peer};
use uhmm_kernel_hook::{PidFd, SendStatus, SeqPacket};
use uhmm_manifest::{Join, Plan};

use crate::core::State;
use crate::service::{Supervisor, SupervisorError};
use crate::state::HOLDER;

/// The number of a process that has none here.
const PID_UNSEEN: u32 = u32::MAX;
/// Names of the supervisor's own entries at the holder.
const PROCESS_PREFIX: &str = "process/";

/// A process that was let in.
#[derive(Clone)]
pub(crate) struct Outside {
    pub(crate) pidfd: Arc<PidFd>,
    guard: Option<Fd>,
}

impl Outside {
    fn is(&self, peer: &Peer) -> bool {
        let name = self.pidfd.name().ok();
        name.is_some() && name == peer.process.as_ref().map(|process| process.name)
    }

    /// From anywhere. `false`: nothing reaches it.
    pub(crate) fn end(&self) -> bool {
        if self.pidfd.signal(Signal::KILL).is_ok() {
            return true;
        }
        let told = self.guard.as_ref().and_then(|guard| {
            let socket = SeqPacket::from_fd(guard.try_clone().ok()?).ok()?;
            socket.send(b"k", &[]).ok()
        });
        told.is_some_and(|status| status != SendStatus::PeerGone)
    }
}

/// One that asks.
struct Asking {
    conn: ConnId,
    call: CallId,
    pid: u32,
    outside: Outside,
}

/// See the module head. Services are named; the holder is one of them.
#[derive(Default)]
pub(crate) struct JoinBook {
    asking: BTreeMap<String, VecDeque<Asking>>,
    pub(crate) inside: BTreeMap<String, Outside>,
}

impl JoinBook {
    /// What the holder keeps of it.
    pub(crate) fn entries(&self) -> Vec<(String, Fd)> {
        let mut entries = Vec::new();
        for (name, outside) in &self.inside {
            if let Ok(pidfd) = outside.pidfd.try_clone() {
                entries.push((format!("{PROCESS_PREFIX}{name}/pidfd"), Arc::new(pidfd.into_fd())));
            }
            entries.extend(outside.guard.clone().map(|guard| (format!("{PROCESS_PREFIX}{name}/guard"), guard)));
        }
        entries
    }

    /// Takes entries that the holder has kept; others are none of this.
    pub(crate) fn remember(&mut self, entries: &BTreeMap<String, Fd>) {
        for (entry, fd) in entries {
            let name = entry.strip_prefix(PROCESS_PREFIX).and_then(|rest| rest.strip_suffix("/pidfd"));
            let Some((name, own)) = name.zip(fd.try_clone().ok()) else { continue };
            let guard = entries.get(&format!("{PROCESS_PREFIX}{name}/guard")).cloned();
            self.inside.insert(name.to_owned(), Outside { pidfd: Arc::new(PidFd::from_fd(own)), guard });
        }
    }
}

/// How whoever joins proves itself.
pub(crate) fn rule<'a>(plan: &'a Plan, name: &str) -> Option<&'a Join> {
    match name {
        HOLDER => plan.holder_join.as_ref(),
        name => plan.service(name)?.join.as_ref(),
    }
}

/// The keys that those who join show, by name.
pub(crate) fn tokens(plan: &Plan) -> Result<Vec<(String, Vec<u8>)>, SupervisorError> {
    let names = plan.services.iter().map(|service| service.name.as_str()).chain([HOLDER]);
    let rules = names.filter_map(|name| Some((name, rule(plan, name)?)));
    let token = |(name, rule): (&str, &Join)| {
        let key = rule.token_file.as_deref().map_or_else(|| Ok(KEY_OF_USER.to_vec()), secret)?;
        Ok((name.to_owned(), key))
    };
    rules.map(token).collect()
}

fn secret(path: &Path) -> Result<Vec<u8>, SupervisorError> {
    let token = uhmm_kit::read_token(path)?;
    let open = std::fs::metadata(path).is_ok_and(|meta| meta.mode() & 0o007 != 0);
    if open {
        let problem = "every user can read it: chmod o= that file".to_owned();
        return Err(uhmm_kit::KitError::Token { path: path.to_owned(), problem }.into());
    }
    Ok(token)
}

impl<F: FnOnce()> Supervisor<F> {
    /// Who shows what is let in as what.
    pub(crate) fn expect_joins(&mut self, tokens: Vec<(String, Vec<u8>)>) {
        for (name, token) in tokens {
            let role = if name == HOLDER { Role::Supervisor } else { Role::Driver };
            self.reactor.set_channel_key(&join_name(&name), token);
            self.reactor.set_channel_role(&join_name(&name), role);
        }
    }

    /// A process asks to be a service. It is answered when its turn has come.
    pub(crate) fn asks_to_join(
        &mut self,
        conn: ConnId,
        call: CallId,
        guard: Option<Fd>,
    ) -> Result<(), SupervisorError> {
        let peer = self.sessions.get(&conn).cloned();
        let judged = peer.ok_or_else(|| WireError::new(ErrorCode::Protocol, "The connection is gone"));
        let judged = judged.and_then(|peer| Ok((self.judge_join(&peer)?, peer)));
        let (name, asking) = match judged {
            Err(error) => {
                tracing::warn!(error = error.text, "A process was not let in");
                self.reactor.reply(conn, call, Err(error));
                return Ok(());
            }
            Ok(((name, pidfd), peer)) => {
                let pid = if peer.pid == 0 { PID_UNSEEN } else { peer.pid };
                if self.joins.inside.get(&name).is_some_and(|inside| inside.is(&peer)) {
                    // It was let in already, and then the supervisor died.
                    self.answer_joined(conn, call, &name);
                    return Ok(());
                }
                (name, Asking { conn, call, pid, outside: Outside { pidfd, guard } })
            }
        };
        tracing::info!(service = name, pid = asking.pid, "A process asks to be this service");
        self.joins.asking.entry(name.clone()).or_default().push_back(asking);
        match self.core.index_of(&name) {
            Some(service) => {
                let now_ms = self.now_ms();
                self.core.asks(service, now_ms, &mut self.actions);
                Ok(())
            }
            None => self.admit_holder(),
        }
    }

    fn judge_join(&self, peer: &Peer) -> Result<(String, Arc<PidFd>), WireError> {
        let refused = |text: String| Err(WireError::new(ErrorCode::Permission, text));
        let name = joining(&peer.name).unwrap_or_default();
        let Some(rule) = rule(&self.plan, name) else {
            return refused(format!("Nothing in the manifest says that {:?} joins (`join = {{ ... }}`)", peer.name));
        };
        if let Some(uid) = rule.uid.filter(|uid| *uid != peer.uid) {
            let text = format!(
                "{name} must run as user {uid}, and this process runs as user {} as the supervisor sees it: see `join` in the manifest",
                peer.uid
            );
            return refused(text);
        }
        if self.core.is_stopping() {
            return Err(WireError::new(
                ErrorCode::Busy,
                "The system is about to end: start it again first (`uhmm up`)",
            ));
        }
        let held = self.core.index_of(name).is_some_and(|service| self.core.services()[service].state == State::Held);
        if held {
            let text =
                format!("{name} has died too often and is held: see why (`uhmm status`), then start the system again");
            return Err(WireError::new(ErrorCode::Busy, text));
        }
        match &peer.process {
            Some(process) => Ok((name.to_owned(), Arc::clone(&process.pidfd))),
            None => Err(WireError::new(ErrorCode::NotFound, "The process has ended")),
        }
    }

    /// Whoever has asked first is the service from now on.
    pub(crate) fn admit(&mut self, service: usize) -> Result<(), SupervisorError> {
        let name = self.plan.services[service].name.clone();
        let now_ms = self.now_ms();
        let Some(asking) = self.joins.asking.get_mut(&name).and_then(VecDeque::pop_front) else {
            self.core.exited(service, "has gone before it was let in", now_ms, &mut self.actions);
            return Ok(());
        };
        self.make_listener(&name)?;
        let incarnation = self.core.services()[service].incarnation;
        self.saved.incarnations.insert(name.clone(), incarnation);
        self.restarts += u64::from(incarnation > 1);
        self.core.spawned(service, asking.pid, now_ms);
        self.joins.inside.insert(name.clone(), asking.outside.clone());
        self.watch(service, asking.outside.pidfd.try_clone()?)?;
        self.save_state();
        tracing::info!(service = name, pid = asking.pid, incarnation, "Let in");
        self.answer_joined(asking.conn, asking.call, &name);
        Ok(())
    }

    fn answer_joined(&mut self, conn: ConnId, call: CallId, name: &str) {
        let incarnation = self.saved.incarnations.get(name).copied().unwrap_or(0);
        let key = self.saved.key(name, "supervisor");
        let joined = supervisor::Reply::Joined { incarnation, key, listener: None, keys_toml: String::new() };
        self.reactor.reply(conn, call, Ok(Reply::Supervisor(joined)));
    }

    /// The same for a holder, if there is none and one has asked.
    pub(crate) fn admit_holder(&mut self) -> Result<(), SupervisorError> {
        if self.holder_runs() {
            return Ok(());
        }
        let Some(asking) = self.joins.asking.get_mut(HOLDER).and_then(VecDeque::pop_front) else { return Ok(()) };
        let (listener, keys_toml) = self.holder_inheritance()?;
        let listener: Fd = Arc::new(listener.into_fd());
        let incarnation = self.next_holder();
        self.joins.inside.insert(HOLDER.to_owned(), asking.outside.clone());
        self.watch_holder(asking.pid, asking.outside.pidfd.try_clone()?, None)?;
        self.save_state();
        self.open_doors()?;
        let joined = supervisor::Reply::Joined { incarnation, key: Vec::new(), listener: Some(listener), keys_toml };
        self.reactor.reply(asking.conn, asking.call, Ok(Reply::Supervisor(joined)));
        Ok(())
    }

    /// A connection is gone: if it had asked for something, it does not any more.
    pub(crate) fn asks_no_more(&mut self, conn: ConnId) {
        for (name, asking) in &mut self.joins.asking {
            let before = asking.len();
            asking.retain(|asking| asking.conn != conn);
            if asking.len() < before
                && let Some(service) = self.core.index_of(name)
            {
                self.core.asks_no_more(service);
            }
        }
    }

    /// Nobody will be let in as this service any more.
    pub(crate) fn refuse_joins(&mut self, service: usize) {
        let name = self.plan.services[service].name.clone();
        for asking in self.joins.asking.remove(&name).unwrap_or_default() {
            self.core.asks_no_more(service);
            let text = format!("{name} is held or the system ends: see `uhmm status`");
            self.reactor.reply(asking.conn, asking.call, Err(WireError::new(ErrorCode::Busy, text)));
        }
    }

    /// The number under which the core knows the process of a service that joins; `Err`: it is another process.
    pub(crate) fn number_of(&self, service: usize, peer: &Peer) -> Result<u32, String> {
        let plan = &self.plan.services[service];
        let this = &self.core.services()[service];
        if plan.join.is_none() {
            return Ok(peer.pid);
        }
        match self.joins.inside.get(&plan.name) {
            Some(inside) if inside.is(peer) => Ok(this.pid),
            _ if matches!(this.state, State::Adopting { .. }) => Ok(if peer.pid == 0 { PID_UNSEEN } else { peer.pid }),
            _ => Err(format!("Another process is {} now (incarnation {})", plan.name, this.incarnation)),
        }
    }

    /// One that had joined an older supervisor, of which nobody knows more than that it is there.
    pub(crate) fn joined_before(&mut self, service: usize, peer: &Peer) {
        let name = &self.plan.services[service].name;
        if let Some(process) = peer.process.as_ref().filter(|_| self.plan.services[service].join.is_some()) {
            let outside = Outside { pidfd: Arc::clone(&process.pidfd), guard: None };
            self.joins.inside.insert(name.clone(), outside);
        }
    }
}
