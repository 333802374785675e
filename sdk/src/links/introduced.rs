//! How the link thread introduces this process to the pager, and who works for it there: a new client, a forked child, an agent that
//! was started again.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use uhmm_ipc::Wake;
use uhmm_ipc::message::{Call, ErrorCode, Fd, Reply, Role, TraceId, WireError, pager};
use uhmm_kernel_hook::{HookError, Userfaultfd, uffd};

use super::{AGENT, AGENT_ROOM, Loop, Space, client_reactor, endpoint};
use crate::Error;
use crate::agent::is_limit;
use crate::session::OPEN_DEADLINE;

/// How often room for another agent is looked for.
const ROOM_PAUSE: Duration = Duration::from_millis(500);

impl Loop {
    pub(super) fn watch_agent(&mut self) -> Result<(), Error> {
        if let Some(pidfd) = self.agent.pidfd() {
            self.reactor.add_fd(pidfd, AGENT)?;
        }
        Ok(())
    }

    /// Somebody has killed the agent alone: another one is started where the program still may.
    pub(super) fn agent_ended(&mut self) {
        let Some(pidfd) = self.agent.pidfd().filter(|pidfd| pidfd.exited().unwrap_or(true)) else { return };
        if let Err(error) = self.reactor.remove_fd(pidfd) {
            tracing::debug!(%error, "The agent was not watched");
        }
        self.start_agent_again();
    }

    /// Where there are as many processes as may be: again and again until there is room, since nothing tells of that.
    pub(super) fn start_agent_again(&mut self) {
        match self.agent.start_again() {
            Ok(()) => {}
            Err(error) if is_limit(&error) => {
                tracing::warn!(%error, "The agent was killed, and there is no room for another one yet");
                self.reactor.add_timer(ROOM_PAUSE, AGENT_ROOM);
                return;
            }
            Err(error) => {
                tracing::error!(%error, "The agent has ended and no other one can be started: private memory moves to no device any more");
                return;
            }
        }
        if let Err(error) = self.watch_agent().and_then(|()| self.tell_of_agent()) {
            tracing::error!(%error, "The pager does not hear of the new agent");
        }
    }

    pub(super) fn tell_of_agent(&mut self) -> Result<(), Error> {
        let started = Call::Pager(pager::Call::AgentStarted { agent: self.agent.memory()?.agent });
        self.reactor.call(self.pager, started, TraceId::default(), None);
        Ok(())
    }

    /// The pager knows us: from now on connections begin with `AttachSpace`.
    pub(super) fn on_introduced(&mut self, result: Result<Reply, WireError>) {
        let result = match result {
            Ok(Reply::Pager(pager::Reply::SpaceOpened { space, token, features })) => {
                self.attach_from_now_on(space, token.clone());
                Ok(Space { id: space, token, features })
            }
            Ok(Reply::Pager(pager::Reply::ChildAttached { uffd, features })) => self.on_child_attached(uffd, features),
            Ok(Reply::Pager(pager::Reply::Done)) => {
                self.standing.refused = false;
                return;
            }
            Ok(_) => Err(Error::StrangeReply { question: "OpenSpace" }),
            Err(error) => {
                tracing::error!(%error, "The pager refused this session");
                Err(error.into())
            }
        };
        self.standing.refused = result.is_err();
        self.standing.was_known |= result.is_ok();
        if let Some(opening) = self.opening.take() {
            opening.complete(result);
        }
    }

    pub(super) fn attach_from_now_on(&mut self, space: u64, token: Vec<u8>) {
        let attach = pager::Call::AttachSpace { space, token, agent: None };
        self.reactor.set_preamble(self.pager, vec![Call::Pager(attach)]);
    }

    /// The pager had this process's userfaultfd, from the kernel; now we keep one too.
    pub(super) fn on_child_attached(&mut self, uffd: Fd, features: u64) -> Result<Space, Error> {
        let Some((space, token)) = self.child.clone() else {
            return Err(Error::StrangeReply { question: "OpenSpace" });
        };
        let keeping = || Error::kernel("Keeping the userfaultfd");
        let own = uffd.try_clone().map_err(|source| keeping()(HookError::call("dup", None, source)))?;
        let uffd = Userfaultfd::from_fd(own).map_err(keeping())?;
        self.frames.know_uffd(clone_of(&uffd)?);
        self.agent.start(&uffd)?;
        self.uffd = Some(uffd);
        self.attach_from_now_on(space, token.clone());
        self.watch_agent()?;
        self.tell_of_agent()?;
        Ok(Space { id: space, token, features })
    }
}

/// The device that makes userfaultfds: opened here or, where this account or container may not, by the pager. `None`: by neither.
pub(super) fn userfaultfd_device(run_dir: &Path) -> Result<Option<OwnedFd>, Error> {
    if let Ok(device) = uffd::open_device() {
        return Ok(Some(device));
    }
    // A connection of its own: the one that stays begins with what is made here.
    let mut reactor = client_reactor(Role::Client)?;
    let pager = reactor.link(endpoint(run_dir, "pager"));
    let ask = Call::Pager(pager::Call::UserfaultfdDevice);
    let asked = reactor.call(pager, ask, TraceId::default(), Some(OPEN_DEADLINE));
    let mut wakes = Vec::new();
    loop {
        reactor.poll(None, &mut wakes)?;
        let answer = wakes.drain(..).find_map(|wake| match wake {
            Wake::Done { call, result, .. } if call == asked => Some(result),
            _ => None,
        });
        match answer {
            None => {}
            Some(Ok(Reply::Pager(pager::Reply::UserfaultfdDevice { device }))) => return Ok(device.try_clone().ok()),
            Some(Err(error)) if error.code == ErrorCode::NotFound => return Ok(None),
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(_)) => return Err(Error::StrangeReply { question: "UserfaultfdDevice" }),
        }
    }
}

pub(super) fn clone_of(uffd: &Userfaultfd) -> Result<Userfaultfd, Error> {
    uffd.try_clone().map_err(Error::kernel("Duplicating the userfaultfd"))
}
