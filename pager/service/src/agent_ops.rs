//! Private memory: what the core asks of the agent, and what becomes of the answers.
//!
//! ```text
//!   CopyOut   -> MoveOut{slot} -> runs: bytes in the slot -> frames (aperture, or the copy engine); zeros -> frames are zeroed
//!                             \-> ReadOnly: write-protect, then CopyOut{slot}, and later Drop{in_place}
//!             -> CopiedRuns when the last part is in its frames
//!   Punch     -> Drop           MoveBack -> MoveBack           Continue -> Probe           FillHuge -> slot, FillHuge
//! ```
//! A ticket whose pages lie in several segments is asked in parts; it is answered when all parts are.

use uhmm_ipc::ConnId;
use uhmm_ipc::message::pager::{AgentMemory, AgentRun, AgentStatus, DIARY_BYTES, Event as WireEvent, FaultPoint};
use uhmm_ipc::message::{ErrorCode, Event as AnyEvent, TraceId};
use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_kernel_hook::window::Window;
use uhmm_pager_core::{Backing, CopyRun, CopyStatus, Event, FillStop, Pages, RegionId, StepResult, Ticket};

use crate::agent::{Agent, Job, Order, Purpose, SLOT_PAGES};
use crate::calls::{Answer, refuse};
use crate::copies::{Copy, Deferred};
use crate::segments::hidden;
use crate::service::Pager;

/// A ticket that several parts work for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Parts {
    /// Parts that are not done.
    left: u32,
    /// What became of pages, by first page.
    runs: Vec<(u64, CopyRun)>,
    /// Slots to free at the end.
    slots: Vec<u32>,
    space: u64,
    /// How often pages were asked back again.
    again: u32,
}

/// After so many answers that a place is not there the space's record of its addresses is wrong (an event was lost).
const PUT_BACK_TRIES: u32 = 1000;

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
    fn ask_parts(&mut self, space_id: u64, region: RegionId, pages: Pages, order: Order, purpose: Purpose) {
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

    /// Pages that moved while they were taken out are back, at their new addresses.
    fn not_taken_out(&mut self, space_id: u64, job: &Job, runs: &[AgentRun]) {
        let ticket = job.purpose.ticket();
        let status = if job.order == Order::MoveBack { CopyStatus::Busy } else { CopyStatus::Gone };
        let mut at = 0;
        let mut fates = Vec::new();
        for run in runs {
            let count = run.page_count.min(job.pages.count - at);
            let again = job.order == Order::MoveBack && matches!(run.status, AgentStatus::Gone | AgentStatus::Failed);
            if count > 0 && !again {
                fates.push((job.pages.first + at, CopyRun { count, status }));
            }
            at += count;
        }
        if at < job.pages.count {
            // The process is gone.
            fates.push((job.pages.first + at, CopyRun { count: job.pages.count - at, status: CopyStatus::Gone }));
        }
        if let Some(parts) = self.parts.get_mut(&ticket.0) {
            parts.runs.extend(fates);
        }
        if job.order == Order::MoveBack {
            self.put_back_again(space_id, job, runs);
            self.send_to_agent(space_id);
        }
        self.part_done(ticket, job.purpose);
    }

    /// What could not be put back is in scratch still: moved to other addresses meanwhile (mremap), or not possible just now.
    fn put_back_again(&mut self, space_id: u64, job: &Job, runs: &[AgentRun]) {
        let mut at = 0;
        for run in runs {
            let pages = Pages { first: job.pages.first + at, count: run.page_count.min(job.pages.count - at) };
            at += pages.count;
            if pages.count == 0 || !matches!(run.status, AgentStatus::Gone | AgentStatus::Failed) {
                continue;
            }
            let Some(parts) = self.parts.get_mut(&job.purpose.ticket().0) else { return };
            parts.again += 1;
            let given_up = parts.again >= PUT_BACK_TRIES;
            if run.status == AgentStatus::Failed || given_up {
                tracing::warn!(space = space_id, ?pages, given_up, status = ?run.status, "Pages could not be put back");
            }
            self.put_back_wanted(space_id, job, pages, given_up);
        }
    }

    /// What was dropped since the order was given is not put back.
    fn put_back_wanted(&mut self, space_id: u64, job: &Job, mut pages: Pages, given_up: bool) {
        while pages.count > 0 {
            let (count, discarded) = self.core.alike_in_front(job.purpose.ticket(), pages);
            let order = if discarded || given_up { Order::Drop { in_place: false } } else { Order::MoveBack };
            self.ask_parts(space_id, job.region, Pages { count, ..pages }, order, job.purpose);
            pages = pages.after(count);
        }
    }

    /// Sends what can be sent.
    pub(crate) fn send_to_agent(&mut self, space_id: u64) {
        let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) else { return };
        let Some(conn) = agent.conn else { return };
        let mut overtaken = Vec::new();
        for (id, job) in agent.ready() {
            if job.overtaken {
                overtaken.push(id);
            } else {
                self.send_job(conn, id, &job);
            }
        }
        for id in overtaken {
            let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
            let Some(job) = agent.and_then(|agent| agent.answered(id)) else { continue };
            // Never sent: its pages may lie in several places by now.
            let gone = [AgentRun { page_count: job.pages.count, status: AgentStatus::Gone }];
            self.job_done(space_id, job, &gone);
        }
    }

    fn send_job(&mut self, conn: ConnId, id: u64, job: &Job) {
        let shown = self.regions.showing(job.region.0, job.pages).next();
        let addr = if job.is_about_frames() {
            // Also at the end of a region, when nothing shows it any more.
            self.cpu_home(job.region, job.pages.first).map_or(0, |(_, addr)| addr)
        } else {
            shown.map_or(0, |(segment, part)| segment.addr_of(part.first))
        };
        let (region, first_page, page_count) = (job.region.0, job.pages.first, job.pages.count);
        let event = WireEvent::Agent { id, region, first_page, addr, page_count, op: job.op() };
        self.service.reactor.event(conn, AnyEvent::Pager(event), TraceId::default());
    }

    /// The client's connection is (again) there: what was not answered is asked again.
    pub(crate) fn agent_connected(&mut self, space_id: u64, conn: ConnId) {
        let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) else { return };
        agent.conn = Some(conn);
        for (id, job) in agent.unanswered() {
            self.send_job(conn, id, &job);
        }
        self.send_to_agent(space_id);
    }

    /// The connection is lost; the process may live on.
    pub(crate) fn agent_disconnected(&mut self, space_id: u64, conn: ConnId) {
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        if let Some(agent) = agent.filter(|agent| agent.conn == Some(conn)) {
            agent.conn = None;
        }
    }

    /// The process is gone.
    pub(crate) fn agent_died(&mut self, space_id: u64) {
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        for job in agent.map(Agent::give_up).unwrap_or_default() {
            self.job_done(space_id, job, &[]);
        }
    }

    /// A space's agent memory as it came from the client, checked.
    pub(crate) fn open_agent(&self, conn: Option<ConnId>, memory: &AgentMemory) -> Result<Agent, String> {
        use std::os::fd::AsFd;
        let len = uhmm_kernel_hook::memfd::len(memory.staging.as_fd()).map_err(|error| error.to_string())?;
        let slots_bytes = len.saturating_sub(DIARY_BYTES);
        if slots_bytes == 0 || !slots_bytes.is_multiple_of(SLOT_PAGES * PAGE_SIZE) {
            return Err(format!(
                "Staging memory has {len} bytes, it must have a multiple of 2 MiB and {DIARY_BYTES} bytes"
            ));
        }
        uhmm_kernel_hook::memfd::check_sealed(memory.staging.as_fd(), len).map_err(|error| error.to_string())?;
        let staging = uhmm_kernel_hook::window::Window::map(
            memory.staging.as_fd(),
            0,
            len,
            uhmm_kernel_hook::window::Prot::ReadWrite,
        );
        let staging = staging.map_err(|error| error.to_string())?;
        let first_id = u64::from(self.service.incarnation) << 32 | 1;
        Agent::new(conn, memory.maps.clone(), staging, memory.staging.clone(), first_id)
            .map_err(|error| error.to_string())
    }

    pub(crate) fn agent_done(&mut self, conn: ConnId, id: u64, runs: &[AgentRun]) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut());
        let Some(agent) = agent else { return refuse(ErrorCode::NotFound, "The space has no agent") };
        // Answered twice after a reconnect, or meant for a dead pager: both are fine.
        if let Some(job) = agent.answered(id) {
            tracing::debug!(space = space_id, region = job.region.0, order = ?job.order, pages = ?job.pages, overtaken = job.overtaken, ?runs, "The agent's answer");
            self.job_done(space_id, job, runs);
            self.send_to_agent(space_id);
        }
        Some(Ok(uhmm_ipc::message::pager::Reply::Done))
    }

    fn job_done(&mut self, space_id: u64, job: Job, runs: &[AgentRun]) {
        let ticket = job.purpose.ticket();
        match job.purpose {
            Purpose::Out { device, frame, .. } => {
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
                } else if runs.iter().any(|run| run.status == AgentStatus::ReadOnly) && job.order == Order::MoveOut {
                    self.copy_in_place(space_id, job);
                } else {
                    self.taken_out(space_id, &job, runs, device, frame);
                }
            }
            Purpose::FillHuge { .. } => {
                if let Order::FillHuge { slot } = job.order {
                    self.free_slot(space_id, slot);
                }
                let stop = match runs.first().map(|run| run.status) {
                    Some(AgentStatus::Moved | AgentStatus::MovedHuge) => None,
                    Some(AgentStatus::Gone) if !job.overtaken => Some(FillStop::Gone),
                    Some(_) => Some(FillStop::NotHuge),
                    None => Some(FillStop::NoProcess),
                };
                let done_pages = if stop.is_none() { job.pages.count } else { 0 };
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Purpose::Probe { .. } => {
                let stop = match runs.first().map(|run| run.status) {
                    Some(AgentStatus::Zero) => FillStop::NoPage,
                    Some(AgentStatus::Gone) => FillStop::Gone,
                    Some(_) => FillStop::Exists,
                    None => FillStop::NoProcess,
                };
                self.push(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(stop) });
            }
            Purpose::MoveBack { .. } => {
                if job.order == Order::MoveBack {
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
            let busy = [AgentRun { page_count: job.pages.count, status: AgentStatus::Busy }];
            if let Purpose::Out { device, frame, .. } = job.purpose {
                self.taken_out(space_id, &job, &busy, device, frame);
            }
            return;
        }
        let again = Job { order: Order::CopyOut, ..job };
        if let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
            agent.ask(again);
        }
        self.send_to_agent(space_id);
    }

    /// The agent has put what it could into the slot.
    fn taken_out(&mut self, space_id: u64, job: &Job, runs: &[AgentRun], device: u8, frame: u32) {
        let Purpose::Out { ticket, .. } = job.purpose else { return };
        let moved = job.order == Order::MoveOut;
        let slot = job.slot.unwrap_or(0);
        let mut at = 0;
        let mut copies = Vec::new();
        let mut fates = Vec::new();
        for run in runs {
            let count = run.page_count.min(job.pages.count - at);
            let status = match run.status {
                AgentStatus::Moved | AgentStatus::Zero => CopyStatus::Ok,
                AgentStatus::MovedHuge => CopyStatus::OkHuge,
                AgentStatus::Busy | AgentStatus::ReadOnly => CopyStatus::Busy,
                // Moved to other addresses meanwhile (mremap), or its unmapping has not been read yet: to be looked at again.
                AgentStatus::Gone if self.is_shown(job.region, job.pages.first + at) => CopyStatus::Busy,
                AgentStatus::Gone => CopyStatus::Gone,
                AgentStatus::Failed => CopyStatus::Io,
            };
            let (pages, frame) = (Pages { first: job.pages.first + at, count }, frame + at as u32);
            let run = CopyRun { count, status };
            match (count, status) {
                (0, _) => {}
                (_, CopyStatus::Ok | CopyStatus::OkHuge) => {
                    let zero = runs_zero(runs, at);
                    let staging_page = u64::from(slot) * SLOT_PAGES + at;
                    copies.push(Copy::Staged { ticket, space: space_id, pages, frame, staging_page, zero, run });
                    if moved {
                        self.taken.push((job.region, pages));
                    }
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
    fn part_done(&mut self, ticket: Ticket, purpose: Purpose) {
        let Some(parts) = self.parts.get_mut(&ticket.0) else { return };
        parts.left -= 1;
        if parts.left > 0 {
            return;
        }
        let mut parts = self.parts.remove(&ticket.0).unwrap_or_default();
        for slot in std::mem::take(&mut parts.slots) {
            self.free_slot(parts.space, slot);
        }
        match purpose {
            Purpose::Out { .. } => {
                parts.runs.sort_unstable_by_key(|(first, _)| *first);
                let runs = parts.runs.into_iter().map(|(_, run)| run).collect();
                self.push(Event::CopiedRuns { ticket, runs });
            }
            Purpose::Punch { .. } => self.push(Event::PunchDone { ticket, result: StepResult::Ok }),
            Purpose::MoveBack { .. } => self.push(Event::MoveBackDone { ticket, result: StepResult::Ok }),
            Purpose::Probe { .. } => {
                self.push(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(FillStop::NoProcess) });
            }
            Purpose::FillHuge { .. } => {
                self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
            }
            // Never in parts.
            Purpose::Show { .. } | Purpose::Hide { .. } => {}
        }
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

    /// What is known to have been taken out is only given back; after a restart nobody knows, and nothing of these pages may be left
    /// in the address space.
    pub(crate) fn private_punch(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        let known = |(of, part): &(RegionId, Pages)| *of == region && part.overlap(pages).is_some();
        let taken: u64 =
            self.taken.iter().filter(|entry| known(entry)).filter_map(|(_, p)| p.overlap(pages)).map(|p| p.count).sum();
        self.taken.retain(|entry| !known(entry));
        let in_place = taken < pages.count;
        self.ask_agent(region, pages, Order::Drop { in_place }, Purpose::Punch { ticket });
    }

    pub(crate) fn private_move_back(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        self.taken.retain(|(of, part)| *of != region || part.overlap(pages).is_none());
        self.ask_agent(region, pages, Order::MoveBack, Purpose::MoveBack { ticket });
    }

    pub(crate) fn private_probe(&mut self, ticket: Ticket, region: RegionId, pages: Pages) {
        let first = Pages::one(pages.first);
        self.parts.remove(&ticket.0);
        let shown = self.regions.showing(region.0, first).next().is_some();
        if !shown {
            self.push(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(FillStop::Gone) });
            return;
        }
        self.ask_single(region, first, Order::Probe, Purpose::Probe { ticket });
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
        let whole = self.regions.showing(region.0, pages).any(|(_, part)| part == pages);
        let space = self.regions.get(region.0).and_then(|region| self.spaces.get(&region.space));
        let connected = space.and_then(|space| space.agent.as_ref()).is_some_and(|agent| agent.conn.is_some());
        if !whole || !connected {
            return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
        }
        let Some(aperture) = self.devices[usize::from(device)].as_mut().and_then(|device| device.aperture.take())
        else {
            let copy = Copy::HomeHuge { ticket, region, pages, frame };
            return self.start_copy(Deferred { device, copy });
        };
        if self.injected(region, FaultPoint::CopyHome, StepResult::Ok) == StepResult::Ok {
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
        let space_id = self.regions.get(region.0).map_or(0, |region| region.space);
        let whole = self.regions.showing(region.0, pages).any(|(_, part)| part == pages);
        let connected = |agent: &&mut Agent| agent.conn.is_some();
        let agent = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()).filter(connected);
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

/// Whether the run that begins `at` pages from the start holds nothing but zeros.
fn runs_zero(runs: &[AgentRun], at: u64) -> bool {
    let mut first = 0;
    for run in runs {
        if first == at {
            return run.status == AgentStatus::Zero;
        }
        first += run.page_count;
    }
    false
}
