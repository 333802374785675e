//! How the link thread introduces this process to the pager, and who works for it there: a new client, a forked child, an agent that
//! was started again.

use uhmm_ipc::message::{Call, Fd, Reply, TraceId, WireError, pager};
use uhmm_kernel_hook::{HookError, Userfaultfd};

use super::{AGENT, Loop, Space};
use crate::Error;

impl Loop {
    pub(super) fn watch_agent(&mut self) -> Result<(), Error> {
        if let Some(pidfd) = self.agent.pidfd() {
            self.reactor.add_fd(pidfd, AGENT)?;
        }
        Ok(())
    }

    /// Somebody has killed the agent alone: another one is started where the program still may.
    pub(super) fn agent_ended(&mut self) -> Result<(), Error> {
        let Some(pidfd) = self.agent.pidfd().filter(|pidfd| pidfd.exited().unwrap_or(true)) else { return Ok(()) };
        self.reactor.remove_fd(pidfd)?;
        self.agent.start_again()?;
        self.watch_agent()?;
        self.tell_of_agent()
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
            Ok(Reply::Pager(pager::Reply::Done)) => return,
            Ok(_) => Err(Error::StrangeReply { question: "OpenSpace" }),
            Err(error) => {
                tracing::error!(%error, "The pager refused this session");
                Err(error.into())
            }
        };
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

pub(super) fn clone_of(uffd: &Userfaultfd) -> Result<Userfaultfd, Error> {
    uffd.try_clone().map_err(Error::kernel("Duplicating the userfaultfd"))
}
