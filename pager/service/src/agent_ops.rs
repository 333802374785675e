//! Private memory: what the core asks of the agent, and what becomes of the answers.
//!
//! ```text
//!   CopyOut   -> MoveOut{slot} -> runs: bytes in the slot -> frames (aperture, or the copy engine); zeros -> frames are zeroed
//!                             \-> ReadOnly: write-protect, then CopyOut{slot}, and later Drop{in_place}
//!             -> CopiedRuns when the last part is in its frames
//!   Punch     -> Drop           MoveBack -> MoveBack           FillHuge -> slot, FillHuge
//! ```
//! A ticket whose pages lie in several segments is asked in parts; it is answered when all parts are.

use uhmm_ipc::ConnId;
use uhmm_ipc::message::pager::{Event as WireEvent, FaultPoint};
use uhmm_ipc::message::{ErrorCode, Event as AnyEvent, TraceId};
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Backing, CopyRun, CopyStatus, Event, FillStop, Pages, RegionId, StepResult, Ticket};
use uhmm_shared::agent::{Order as RingOrder, Status};

use crate::agent::{Agent, AgentRun, Job, Life, Order, Purpose, SLOT_PAGES, Taken};
use crate::calls::{Answer, refuse};
use crate::copies::{Copy, Deferred};
use crate::rest::cut_at;
use crate::segments::hidden;
use crate::service::Pager;

/// A ticket that several parts work for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    /// Parts that are not done.
    pub left: u32,
    /// What became of pages, by first page.
    pub runs: Vec<(u64, CopyRun)>,
    /// Slots to free at the end.
    slots: Vec<u32>,
    space: u64,
    /// How often pages were asked back again.
    pub again: u32,
    /// Some could not be put back now, and nobody tells when they can.
    pub later: bool,
    /// Pages that were to be punched and are still in the address space.
    left_in_place: Vec<Pages>,
}

impl Pager {
    pub(crate) fn is_private(&self, region: RegionId) -> bool {
        self.regions.get(region.0).is_some_and(|region| region.backing == Backing::Private)
    }

    /// Asks the agent for something on pages of a private region; parts without an address are gone.
    fn ask_agent(&mut self, region: RegionId, pages: Pages, order: Order, purpose: Purpose) {
        let ticket = purpose.ticket();
        let Some(space_id) = self.regions.get(region.0).map(|region| region.space) else {
            self.parts.insert(ticket.0, Parts { left: 1, ..Parts::default() });
            return self.part_done(ticket, purpose);
        };
        self.parts.insert(ticket.0, Parts { left: 1, space: space_id, ..Parts::default() });
        self.ask_parts(space_id, region, pages, order, purpose);
        self.part_done(ticket, purpose);
        self.send_to_agent(space_id);
    }

    /// One job for every part that has an address. What scratch holds of addresses that are gone is given up.
    pub(crate) fn ask_parts(&mut self, space_id: u64, region: RegionId, pages: Pages, order: Order, purpose: Purpose) {
        let mut shown: Vec<Pages> = self.regions.showing(region.0, pages).map(|(_, part)| part).collect();
        let mut jobs: Vec<(Pages, Order)> = shown.iter().map(|part| (*part, order)).collect();
        if matches!(order, Order::Drop { .. } | Order::MoveBack) {
            let gone = hidden(pages, &mut shown);
            jobs.extend(gone.into_iter().map(|part| (part, Order::Drop { in_place: false })));
        }
        jobs.sort_unstable_by_key(|(part, _)| part.first);
        let Some(space) = self.spaces.get_mut(&space_id).filter(|space| !space.dying) else { return };
        let (Some(agent), Some(parts)) = (space.agent.as_mut(), self.parts.get_mut(&purpose.ticket().0)) else {
            return;
        };
        for (part, order) in jobs {
            let purpose = match purpose {
                Purpose::Out { ticket, device, frame } => {
                    Purpose::Out { ticket, device, frame: frame + (part.first - pages.first) as u32 }
                }
                other => other,
            };
            parts.left += 1;
            agent.ask(Job::new(region, part, order, purpose));
        }
    }

    /// Gives the agent what it can be given.
    pub(crate) fn send_to_agent(&mut self, space_id: u64) {
        if self.is_recovering {
            return;
        }
        let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) else { return };
        if agent.life == Life::Lost {
            return self.answer_for_agent(space_id);
        }
        for (id, job) in agent.ready() {
            if job.overtaken || !self.is_in_one_place(&job) {
                self.never_sent(space_id, id);
            } else {
                self.send_job(space_id, id, &job);
            }
        }
    }

    /// Its pages may lie in several places by now.
    fn never_sent(&mut self, space_id: u64, id: u64) {
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        let Some(job) = agent.and_then(|agent| agent.answered(id)) else { return };
        let job = Job { overtaken: true, ..job };
        let gone = [AgentRun { page_count: job.pages.count, status: Status::Gone }];
        self.job_done(space_id, job, &gone);
    }

    /// An order names one address for all of its pages.
    fn is_in_one_place(&self, job: &Job) -> bool {
        let mut shown = self.regions.showing(job.region.0, job.pages);
        !job.is_about_a_place() || shown.next().is_some_and(|(_, part)| part == job.pages)
    }

    fn send_job(&mut self, space_id: u64, id: u64, job: &Job) {
        if job.is_about_frames() {
            return self.send_frames(space_id, id, job);
        }
        let shown = self.regions.showing(job.region.0, job.pages).next();
        let addr = shown.map_or(0, |(segment, part)| segment.addr_of(part.first));
        let (region, first_page, page_count) = (job.region.0, job.pages.first, job.pages.count);
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        let (Some(agent), Some(op)) = (agent, job.op()) else { return };
        if !agent.send(&RingOrder { id, region, first_page, addr, page_count, op }) {
            self.ring_is_corrupt(space_id);
        }
    }

    /// Also at the end of a region, when nothing shows it any more.
    fn send_frames(&mut self, space_id: u64, id: u64, job: &Job) {
        let addr = self.cpu_home(job.region, job.pages.first).map_or(0, |(_, addr)| addr);
        let conn = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref()).and_then(|agent| agent.conn);
        let (Some(conn), Some(op)) = (conn, job.frames_op()) else { return };
        let (region, first_page, page_count) = (job.region.0, job.pages.first, job.pages.count);
        let event = WireEvent::Frames { id, region, first_page, addr, page_count, op };
        self.service.reactor.event(conn, AnyEvent::Pager(event), TraceId::default());
    }

    /// The client's connection is (again) there: what was not answered about frames is asked again.
    pub(crate) fn client_connected(&mut self, space_id: u64, conn: ConnId) {
        let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) else { return };
        agent.conn = Some(conn);
        for (id, job) in agent.unanswered_frames() {
            self.send_frames(space_id, id, &job);
        }
        self.send_to_agent(space_id);
    }

    /// The connection is lost; the process may live on.
    pub(crate) fn client_disconnected(&mut self, space_id: u64, conn: ConnId) {
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        if let Some(agent) = agent.filter(|agent| agent.conn == Some(conn)) {
            agent.conn = None;
        }
    }

    /// The process is gone.
    pub(crate) fn agent_died(&mut self, space_id: u64) {
        self.end_rest_of_space(space_id);
        self.unwatch_agent(space_id);
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        for job in agent.map(Agent::give_up).unwrap_or_default() {
            self.job_done(space_id, job, &[]);
        }
    }

    /// The agent has told of answers.
    pub(crate) fn take_answers(&mut self, space_id: u64) {
        if let Some(agent) = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref())
            && let Err(error) = agent.done_event.drain()
        {
            tracing::debug!(%error, space = space_id, "The agent's eventfd cannot be read");
        }
        loop {
            let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
            let Some(agent) = agent.filter(|agent| agent.life != Life::Lost) else { return };
            match agent.next_answer() {
                Ok(Some((job, runs))) => {
                    tracing::debug!(space = space_id, region = job.region.0, order = ?job.order, pages = ?job.pages, overtaken = job.overtaken, ?runs, "The agent's answer");
                    note_taken(agent, &job, &runs);
                    self.job_done(space_id, job, &runs);
                }
                Ok(None) => break,
                Err(_) => return self.ring_is_corrupt(space_id),
            }
        }
        self.send_to_agent(space_id);
    }

    pub(crate) fn frames_answered(&mut self, conn: ConnId, id: u64, done: bool) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        let Some(agent) = agent else { return refuse(ErrorCode::NotFound, "The space has no agent") };
        // Answered twice after a reconnect, or meant for a dead pager: both are fine. What went into the ring is answered there.
        if agent.unanswered_frames().iter().any(|(known, _)| *known == id)
            && let Some(job) = agent.answered(id)
        {
            let status = if done { Status::Moved } else { Status::Failed };
            tracing::debug!(space = space_id, region = job.region.0, order = ?job.order, pages = ?job.pages, done, "The client's answer");
            self.job_done(space_id, job, &[AgentRun { page_count: job.pages.count, status }]);
            self.send_to_agent(space_id);
        }
        Some(Ok(uhmm_ipc::message::pager::Reply::Done))
    }

    pub(crate) fn job_done(&mut self, space_id: u64, job: Job, runs: &[AgentRun]) {
        let ticket = job.purpose.ticket();
        match job.purpose {
            Purpose::Out { .. } => {
                if matches!(job.order, Order::MoveBack | Order::Drop { .. }) {
                    self.not_taken_out(space_id, &job, runs);
                } else if job.overtaken {
                    // Holes at the old addresses are no zero pages. What was taken out goes to the new ones, and all is asked anew.
                    if let Some(parts) = self.parts.get_mut(&ticket.0) {
                        parts.slots.extend(job.slot);
                    }
                    self.ask_parts(space_id, job.region, job.pages, Order::MoveBack, job.purpose);
                    self.send_to_agent(space_id);
                    self.part_done(ticket, job.purpose);
                } else if runs.iter().any(|run| run.status == Status::ReadOnly) && job.order == Order::MoveOut {
                    self.copy_in_place(space_id, job);
                } else {
                    self.rest(space_id, job, runs);
                }
            }
            Purpose::FillHuge { .. } => {
                if let Order::FillHuge { slot } = job.order {
                    self.free_slot(space_id, slot);
                }
                let (done_pages, stop) = match runs.first().map(|run| (run.status, run.page_count)) {
                    Some((Status::Moved | Status::MovedHuge, count)) if count >= job.pages.count => (count, None),
                    Some((Status::Moved, count)) => (count, Some(FillStop::NotHuge)),
                    Some((Status::Gone, _)) if !job.overtaken => (0, Some(FillStop::Gone)),
                    Some(_) => (0, Some(FillStop::NotHuge)),
                    None => (0, Some(FillStop::NoProcess)),
                };
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Purpose::Tidy => {}
            Purpose::MoveBack { .. } => {
                if job.order == Order::MoveBack {
                    self.note_put_back(&job, runs);
                    self.put_back_again(space_id, &job, runs);
                    self.send_to_agent(space_id);
                }
                self.part_done(ticket, job.purpose);
            }
            Purpose::Show { .. } | Purpose::Hide { .. } => self.frames_done(space_id, job, runs),
            Purpose::Punch { .. } => {
                if job.overtaken && job.order == (Order::Drop { in_place: true }) {
                    self.ask_parts(space_id, job.region, job.pages, job.order, job.purpose);
                    self.send_to_agent(space_id);
                }
                self.part_done(ticket, job.purpose);
            }
        }
        self.drain();
    }

    /// The pages may not be written by the program either: they are protected, copied where they are, and dropped later.
    fn copy_in_place(&mut self, space_id: u64, job: Job) {
        if self.write_protect(job.region, job.pages, true) != StepResult::Ok {
            let busy = [AgentRun { page_count: job.pages.count, status: Status::Busy }];
            return self.taken_out(space_id, &job, &busy, &[]);
        }
        let again = Job { order: Order::CopyOut, sent_at: None, ..job };
        if let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
            agent.ask(again);
        }
        self.send_to_agent(space_id);
    }

    /// The agent has put what it could into the slot. What of it goes `back` where it was, and why.
    pub(crate) fn taken_out(&mut self, space_id: u64, job: &Job, runs: &[AgentRun], back: &[(Pages, CopyStatus)]) {
        let Purpose::Out { ticket, device, frame } = job.purpose else { return };
        self.tell_limits(space_id, runs);
        self.note_not_taken(space_id, job, runs);
        let slot = job.slot.unwrap_or(0);
        let mut at = 0;
        let mut copies = Vec::new();
        let mut fates = Vec::new();
        for (run, goes_back) in cut_at(runs, job.pages.first, back) {
            let count = run.page_count.min(job.pages.count - at);
            let status = match run.status {
                Status::Moved | Status::Zero => goes_back.unwrap_or(CopyStatus::Ok),
                Status::MovedHuge => goes_back.unwrap_or(CopyStatus::OkHuge),
                Status::Busy | Status::ReadOnly => CopyStatus::Busy,
                // Moved to other addresses meanwhile (mremap), or its unmapping has not been read yet: to be looked at again.
                Status::Gone if self.is_shown(job.region, job.pages.first + at) => CopyStatus::Busy,
                Status::Gone | Status::Guard => CopyStatus::Gone,
                Status::LockLimit => CopyStatus::Locked,
                Status::MapLimit | Status::NoMemory => CopyStatus::NoMemory,
                Status::Failed => CopyStatus::Io,
            };
            let (pages, frame) = (Pages { first: job.pages.first + at, count }, frame + at as u32);
            let zero = run.status == Status::Zero;
            let run = CopyRun { count, status };
            match (count, status) {
                (0, _) => {}
                (_, CopyStatus::Ok | CopyStatus::OkHuge) => {
                    let staging_page = u64::from(slot) * SLOT_PAGES + at;
                    let (region, space) = (job.region, space_id);
                    copies.push(Copy::Staged { ticket, region, space, pages, frame, staging_page, zero, run });
                }
                _ => fates.push((pages.first, run)),
            }
            at += count;
        }
        if at < job.pages.count {
            let rest = CopyRun { count: job.pages.count - at, status: CopyStatus::Gone };
            fates.push((job.pages.first + at, rest));
        }
        if let Some(parts) = self.parts.get_mut(&ticket.0) {
            parts.left += copies.len() as u32;
            parts.runs.extend(fates);
            parts.slots.extend(job.slot);
        }
        for copy in copies {
            self.start_copy(Deferred { device, copy });
        }
        self.part_done(ticket, job.purpose);
    }

    fn is_shown(&self, region: RegionId, page: u64) -> bool {
        self.regions.showing(region.0, Pages::one(page)).next().is_some()
    }

    /// A run that the agent has staged is in its frames, or is not.
    pub(crate) fn staged_done(&mut self, ticket: Ticket, pages: Pages, run: CopyRun, ok: bool) {
        if let Some(parts) = self.parts.get_mut(&ticket.0) {
            let status = if ok { run.status } else { CopyStatus::Io };
            parts.runs.push((pages.first, CopyRun { status, ..run }));
        }
        self.part_done(ticket, Purpose::Out { ticket, device: 0, frame: 0 });
    }

    /// One part of a ticket's work is through; the last one answers the core.
    pub(crate) fn part_done(&mut self, ticket: Ticket, purpose: Purpose) {
        let Some(parts) = self.parts.get_mut(&ticket.0) else { return };
        parts.left -= 1;
        if parts.left > 0 {
            return;
        }
        let mut parts = self.parts.remove(&ticket.0).unwrap_or_default();
        self.resting.forget(ticket);
        for slot in std::mem::take(&mut parts.slots) {
            self.free_slot(parts.space, slot);
        }
        match purpose {
            Purpose::Out { .. } => {
                parts.runs.sort_unstable_by_key(|(first, _)| *first);
                let runs = parts.runs.into_iter().map(|(_, run)| run).collect();
                self.push(Event::CopiedRuns { ticket, runs });
            }
            Purpose::Punch { .. } if !parts.left_in_place.is_empty() => {
                self.push(Event::NotPunched { ticket, left: parts.left_in_place });
            }
            Purpose::Punch { .. } => self.push(Event::PunchDone { ticket, result: StepResult::Ok }),
            Purpose::MoveBack { .. } => {
                let result = if parts.later { StepResult::Later } else { StepResult::Ok };
                self.push(Event::MoveBackDone { ticket, result });
            }
            Purpose::FillHuge { .. } => {
                self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
            }
            // Never in parts.
            Purpose::Show { .. } | Purpose::Hide { .. } | Purpose::Tidy => {}
        }
    }

    /// A part of a ticket's pages that nobody can punch.
    pub(crate) fn not_punched(&mut self, ticket: Ticket, left: Vec<Pages>) {
        if let Some(parts) = self.parts.get_mut(&ticket.0) {
            parts.left_in_place.extend(left);
        }
        self.part_done(ticket, Purpose::Punch { ticket });
        self.drain();
    }

    fn free_slot(&mut self, space_id: u64, slot: u32) {
        if let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
            agent.free_slot(slot);
        }
        self.send_to_agent(space_id);
    }

    pub(crate) fn private_out(&mut self, ticket: Ticket, region: RegionId, pages: Pages, to: (u8, u32), keep: bool) {
        let order = if keep { Order::CopyOut } else { Order::MoveOut };
        let (device, frame) = to;
        self.ask_agent(region, pages, order, Purpose::Out { ticket, device, frame });
    }

    /// What is known to have been taken out is only given back; otherwise nothing of these pages may be left in the address space.
    pub(crate) fn private_punch(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        let space = self.regions.get(region.0).and_then(|region| self.spaces.get(&region.space));
        let taken = space.and_then(|space| space.agent.as_ref()).map_or(0, |agent| agent.taken_of(region, pages));
        let in_place = taken < pages.count;
        self.ask_agent(region, pages, Order::Drop { in_place }, Purpose::Punch { ticket });
    }

    pub(crate) fn private_move_back(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        // What a dead pager left behind that the program gave up: only what was taken out is freed, the place has been empty since.
        let discarded = self.core.alike_in_front(ticket, pages) == (pages.count, true);
        let order = if discarded { Order::Drop { in_place: false } } else { Order::MoveBack };
        self.ask_agent(region, pages, order, Purpose::MoveBack { ticket });
    }

    /// Whether the first page is in the address space: the kernel is asked, and nobody else is needed for that.
    pub(crate) fn private_probe(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        let stop = match self.in_place(region, Pages::one(pages.first)) {
            None => FillStop::Gone,
            Some(found) if found.is_empty() => FillStop::NoPage,
            Some(_) => FillStop::Exists,
        };
        self.push(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(stop) });
    }

    /// Asks for something that is one job and whose answer says everything.
    fn ask_single(&mut self, region: RegionId, pages: Pages, order: Order, purpose: Purpose) {
        let space_id = self.regions.get(region.0).map_or(0, |region| region.space);
        let job = Job::new(region, pages, order, purpose);
        let space = self.spaces.get_mut(&space_id).filter(|space| !space.dying);
        match space.and_then(|space| space.agent.as_mut()) {
            Some(agent) => agent.ask(job),
            None => return self.job_done(space_id, job, &[]),
        }
        self.send_to_agent(space_id);
    }

    /// The frames' bytes go to a slot, from where the agent makes them a huge page.
    pub(crate) fn private_fill_huge(&mut self, ticket: Ticket, region: RegionId, pages: Pages, device: u8, frame: u32) {
        let place = self.regions.showing(region.0, pages).find(|(_, part)| *part == pages);
        let place =
            place.map(|(s, _)| (s.space, AddrRange { start: s.addr_of(pages.first), len: pages.count * PAGE_SIZE }));
        let whole = place.is_some_and(|(space, range)| self.guards(space, range).is_empty());
        let space = self.regions.get(region.0).and_then(|region| self.spaces.get(&region.space));
        let works = space.and_then(|space| space.agent.as_ref()).is_some_and(|agent| agent.life == Life::Lives);
        if !whole || !works {
            return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
        }
        let Some(aperture) = self.devices[usize::from(device)].as_mut().and_then(|device| device.aperture.take())
        else {
            let copy = Copy::HomeHuge { ticket, region, pages, frame };
            return self.start_copy(Deferred { device, copy });
        };
        if self.injected((region, pages), FaultPoint::CopyHome, StepResult::Ok) == StepResult::Ok {
            self.fill_huge_from(ticket, region, pages, &aperture, u64::from(frame) * PAGE_SIZE);
        } else {
            self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
        }
        if let Some(device) = self.devices[usize::from(device)].as_mut() {
            device.aperture = Some(aperture);
        }
    }

    pub(crate) fn fill_huge_from(
        &mut self,
        ticket: Ticket,
        region: RegionId,
        pages: Pages,
        from: &Window,
        offset: u64,
    ) {
        let not_huge = Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) };
        if self.injected((region, pages), FaultPoint::SystemHuge, StepResult::Ok) != StepResult::Ok {
            return self.push(not_huge);
        }
        let space_id = self.regions.get(region.0).map_or(0, |region| region.space);
        let whole = self.regions.showing(region.0, pages).any(|(_, part)| part == pages);
        let works = |agent: &&mut Agent| agent.life == Life::Lives;
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()).filter(works);
        let (Some(agent), true) = (agent, whole) else { return self.push(not_huge) };
        let Some(slot) = agent.take_slot() else { return self.push(not_huge) };
        let to = u64::from(slot) * SLOT_PAGES * PAGE_SIZE;
        if let Err(error) = from.copy_to(offset, &agent.staging, to, pages.count * PAGE_SIZE) {
            tracing::warn!(%error, "Staging a huge page failed");
            agent.free_slot(slot);
            return self.push(not_huge);
        }
        self.ask_single(region, pages, Order::FillHuge { slot }, Purpose::FillHuge { ticket });
    }
}

/// What an answer says about scratch, before anything becomes of it.
fn note_taken(agent: &mut Agent, job: &Job, runs: &[AgentRun]) {
    let mut at = 0;
    for run in runs {
        let pages = Pages { first: job.pages.first + at, count: run.page_count.min(job.pages.count - at) };
        at += pages.count;
        let is_moved = matches!(run.status, Status::Moved | Status::MovedHuge | Status::Zero);
        match (job.order, job.slot) {
            _ if pages.count == 0 => {}
            (Order::MoveOut, Some(slot)) if is_moved => agent.take(Taken { region: job.region, pages, slot }),
            (Order::Drop { .. }, _) => agent.untake(job.region, pages),
            // What could not be put back is there still.
            (Order::MoveBack, _) if is_moved => agent.untake(job.region, pages),
            _ => {}
        }
    }
}
