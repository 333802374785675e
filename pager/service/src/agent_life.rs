//! The life of agents: opened, found again after a restart, ended, followed by another, lost.
//!
//! ```text
//!   Lives --its process has ended--> Ended --AgentStarted--> Lives        (goes on with what is in the ring)
//!                                      `----one second----> Lost --AgentStarted--> Lives
//! ```
//! While an agent is `Ended` its orders wait. When it is `Lost` they are answered here, so that nothing waits for ever: pages that are on a device
//! come home by `UFFDIO_COPY`, new migrations fail with a reason, and what nobody can put back is poisoned.

use std::os::fd::AsFd;
use std::time::Duration;

use uhmm_ipc::message::pager::AgentMemory;
use uhmm_ipc::message::{ErrorCode, Fd, WireError};
use uhmm_ipc::{ConnId, FdToken, TimerToken};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Entry, PageState, Pages, RegionId, StepResult};
use uhmm_shared::agent::{Op, Status};

use crate::agent::{Agent, AgentRun, Begun, Job, Life, Order, Purpose};
use crate::calls::Answer;
use crate::requests::Piece;
use crate::service::{KIND_AGENT, KIND_DONE, Pager};

/// How long a client has to start another agent.
const GRACE: Duration = Duration::from_secs(1);
/// Kind of the timer that waits for it; the rest of the token is the space.
pub(crate) const TIMER_AGENT: u64 = 5 << 56;

impl Pager {
    /// A space's agent as it came from the client, checked.
    pub(crate) fn open_agent(&self, conn: Option<ConnId>, memory: &AgentMemory) -> Result<Agent, String> {
        let first_id = u64::from(self.service.incarnation) << 32 | 1;
        Agent::open(conn, memory, first_id)
    }

    /// Listens to what the agent of a space tells.
    pub(crate) fn watch_agent(&mut self, space_id: u64) {
        let Some(agent) = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref()) else { return };
        let mut watched = self.service.reactor.add_fd(&agent.done_event.as_fd(), FdToken(KIND_DONE | space_id));
        if let Some(pidfd) = &agent.pidfd {
            watched = watched.and(self.service.reactor.add_fd(pidfd, FdToken(KIND_AGENT | space_id)));
        }
        if let Err(error) = watched {
            tracing::warn!(%error, space = space_id, "An agent cannot be watched");
        }
        // Answers for the pager before, and the next one shall be told.
        self.take_answers(space_id);
        self.agent_ended(space_id);
    }

    pub(crate) fn unwatch_agent(&mut self, space_id: u64) {
        let Some(agent) = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref()) else { return };
        let mut removed = self.service.reactor.remove_fd(&agent.done_event.as_fd());
        if let Some(pidfd) = &agent.pidfd {
            removed = removed.and(self.service.reactor.remove_fd(pidfd));
        }
        if let Err(error) = removed {
            tracing::debug!(%error, space = space_id, "An agent was not watched");
        }
    }

    /// Its process has ended, as all do with their program; else its orders wait a while for another one.
    pub(crate) fn agent_ended(&mut self, space_id: u64) {
        let Some(space) = self.spaces.get_mut(&space_id).filter(|space| !space.dying) else { return };
        let Some(agent) = space.agent.as_mut().filter(|agent| agent.life == Life::Lives && agent.has_ended()) else {
            return;
        };
        agent.life = Life::Ended;
        if space.pidfd.as_ref().is_some_and(|pidfd| pidfd.exited().unwrap_or(false)) {
            self.client_exited(space_id);
            return;
        }
        // Exec ends it too, and the space is found empty then.
        self.check_children_soon();
        self.service.reactor.add_timer(GRACE, TimerToken(TIMER_AGENT | space_id));
    }

    /// No other agent has come.
    pub(crate) fn agent_is_late(&mut self, space_id: u64) {
        // One that was killed just before it could tell of its last answer.
        self.take_answers(space_id);
        let agent = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref());
        if agent.is_some_and(|agent| agent.life == Life::Ended) {
            self.lose_agent(space_id, "was killed, and the program has started no other one");
        }
    }

    pub(crate) fn ring_is_corrupt(&mut self, space_id: u64) {
        self.lose_agent(space_id, "or its program has written nonsense into its ring");
    }

    fn lose_agent(&mut self, space_id: u64, why: &str) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let pid = space.state.pid;
        tracing::error!(
            space = space_id,
            pid,
            "The agent of process {pid} {why}: its private memory moves to no device any more, what is on one comes home"
        );
        let Some(agent) = space.agent.as_mut() else { return };
        let jobs = agent.lose();
        jobs.into_iter().for_each(|job| self.answer_lost(space_id, job));
    }

    /// What is asked of an agent that is lost is answered at once.
    pub(crate) fn answer_for_agent(&mut self, space_id: u64) {
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        let jobs = agent.map(Agent::lose).unwrap_or_default();
        jobs.into_iter().for_each(|job| self.answer_lost(space_id, job));
    }

    /// As if the agent had answered.
    fn answer_lost(&mut self, space_id: u64, job: Job) {
        let (region, pages) = (job.region, job.pages);
        let all = |status| [AgentRun { page_count: pages.count, status }];
        match (job.purpose, job.order) {
            // Those in place are where they belong. What is in scratch nobody can put back: loud, and never zeros.
            (_, Order::MoveBack) => {
                let missing = self.missing(region, pages);
                let mut poisoned = true;
                missing.into_iter().for_each(|lost| poisoned &= self.poison_now(region, lost) == StepResult::Ok);
                // Until it is there the pages wait: a hole would read as zero.
                self.job_done(space_id, job, &all(if poisoned { Status::Moved } else { Status::NoMemory }));
            }
            (Purpose::Punch { ticket }, Order::Drop { in_place: true }) => {
                let left = self.in_place(region, pages).unwrap_or_default();
                self.not_punched(ticket, left);
            }
            // Scratch is the program's own: nobody reads it.
            (Purpose::Punch { .. } | Purpose::Tidy, _) => self.job_done(space_id, job, &all(Status::Moved)),
            _ => self.job_done(space_id, job, &all(Status::Failed)),
        }
    }

    /// Checks that somebody can take private pages out of a client's address space.
    pub(crate) fn can_take_out(&self, conn: ConnId, pieces: &[Piece]) -> Result<(), WireError> {
        let space = self.spaces.get(&self.space_of(conn)?);
        let agent = space.and_then(|space| space.agent.as_ref());
        let is_private = |piece: &Piece| self.is_private(RegionId(piece.located.region));
        if agent.is_none_or(|agent| agent.life != Life::Lost) || !pieces.iter().any(is_private) {
            return Ok(());
        }
        let text = "This process's agent was killed and no other one has been started (the program's log says why: a seccomp filter, or a limit of \
                    processes): its private memory moves to no device any more. What is on a device comes home when it is touched";
        Err(WireError::new(ErrorCode::Io, text))
    }

    /// Another agent has begun.
    pub(crate) fn agent_started(&mut self, conn: ConnId, agent: Option<&Fd>) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        let pidfd = match agent.map(|fd| fd.try_clone()).transpose() {
            Ok(pidfd) => pidfd.map(PidFd::from_fd),
            Err(error) => return Some(Err(WireError::new(ErrorCode::NoMemory, error.to_string()))),
        };
        self.unwatch_agent(space_id);
        if let Some(known) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
            known.begin_again(pidfd);
            known.memory.agent = agent.cloned();
        }
        self.watch_agent(space_id);
        self.keep_agent(space_id);
        self.send_to_agent(space_id);
        Some(Ok(uhmm_ipc::message::pager::Reply::Done))
    }

    /// Which of some private pages are in their address space, by asking the kernel; `None`: nothing shows them.
    pub(crate) fn in_place(&self, region: RegionId, pages: Pages) -> Option<Vec<Pages>> {
        let mut found = Vec::new();
        let mut shown = false;
        for (segment, part) in self.regions.showing(region.0, pages) {
            shown = true;
            let agent = self.spaces.get(&segment.space).and_then(|space| space.agent.as_ref());
            // A forked child that never attached: nothing was ever asked of it.
            let Some(agent) = agent else { continue };
            let range = AddrRange { start: segment.addr_of(part.first), len: part.count * PAGE_SIZE };
            let any = Categories::PRESENT | Categories::SWAPPED | Categories::PFNZERO | Categories::HUGE;
            match pagemap::scan(agent.memory.pagemap.as_fd(), range, any) {
                Ok(runs) => found.extend(runs.iter().map(|run| {
                    let start = run.start.max(range.start);
                    let first = part.first + (start - range.start) / PAGE_SIZE;
                    Pages { first, count: (run.end.min(range.end()) - start) / PAGE_SIZE }
                })),
                Err(error) => tracing::debug!(%error, %range, "A client's pages cannot be asked for"),
            }
        }
        shown.then_some(found)
    }

    /// Which of some pages are neither in place nor holes: a scratch block has them.
    fn missing(&self, region: RegionId, pages: Pages) -> Vec<Pages> {
        let present = self.in_place(region, pages).unwrap_or_default();
        let agent = self.regions.get(region.0).and_then(|region| self.spaces.get(&region.space)?.agent.as_ref());
        let is_missing = |page: &u64| {
            !present.iter().any(|run| run.contains(*page)) && agent.is_some_and(|a| a.claims(region, *page))
        };
        pages.iter().filter(is_missing).map(Pages::one).collect()
    }

    /// Pages of a recovered private region that may be in the address space although their entries say that they are on a device.
    pub(crate) fn strays(&self, region_id: u64) -> Vec<Pages> {
        let Some(region) = self.regions.get(region_id) else { return Vec::new() };
        let state = |page: u64| Entry::decode(region.directory.load(page)).ok().map(Entry::state);
        let on_device = |page: u64| matches!(state(page), Some(PageState::Device | PageState::Exclusive));
        // A stray page on the way home: what the dead pager was taking away is not what came home.
        let comes_home = |page: u64| state(page) == Some(PageState::MovingHome);
        let all = Pages { first: 0, count: region.page_count };
        let mut page = 0;
        while page < all.count && !on_device(page) && !comes_home(page) {
            page += region.directory.alike(page);
        }
        if page >= all.count {
            return Vec::new();
        }
        let mut strays: Vec<Pages> = Vec::new();
        let begun = self.spaces.get(&region.space).and_then(|space| space.begun);
        let begun =
            begun.filter(|begun| begun.region.0 == region_id && matches!(begun.op, Op::Drop { in_place: true }));
        let begun = begun.and_then(|begun: Begun| begun.pages.overlap(all));
        let present = self.in_place(RegionId(region_id), all).unwrap_or_default();
        let present = present.into_iter().flat_map(Pages::iter).filter(|page| on_device(*page));
        let begun = begun.into_iter().flat_map(Pages::iter).filter(|page| on_device(*page) || comes_home(*page));
        for page in present.chain(begun) {
            match strays.last_mut() {
                Some(run) if run.end() == page => run.count += 1,
                _ => strays.push(Pages::one(page)),
            }
        }
        strays
    }

    /// After a restart: what dead pagers had taken out and not given back. What is on its way out is put back by the core.
    pub(crate) fn tidy_scratch(&mut self) {
        let spaces: Vec<u64> = self.spaces.keys().copied().collect();
        for space_id in spaces {
            let Some(space) = self.spaces.get_mut(&space_id) else { continue };
            let begun = space.begun.take();
            let Some(agent) = space.agent.as_mut() else { continue };
            for taken in agent.find_taken(begun) {
                self.tidy(space_id, taken.region, taken.pages);
            }
            self.send_to_agent(space_id);
        }
    }

    fn tidy(&mut self, space_id: u64, region: RegionId, pages: Pages) {
        let leaves = |page: u64| {
            let entry = self.regions.get(region.0).and_then(|region| Entry::decode(region.directory.load(page)).ok());
            entry.is_some_and(|entry| entry.state() == PageState::MovingOut)
        };
        let mut runs: Vec<Pages> = Vec::new();
        for page in pages.iter().filter(|page| !leaves(*page)) {
            match runs.last_mut() {
                Some(run) if run.end() == page => run.count += 1,
                _ => runs.push(Pages::one(page)),
            }
        }
        let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) else { return };
        for run in runs {
            agent.ask(Job::new(region, run, Order::Drop { in_place: false }, Purpose::Tidy));
        }
    }
}
