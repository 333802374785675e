//! Carrying out what the core decides: every system call of the pager's data path is in this file.
//!
//! Actions of one decision run in order. Those with a ticket end in exactly one event for the core: at once, or later when a
//! driver or the mirror has to act (`CopyOut`, `Fill`, `Scrub`, `ZeroFrames` without an aperture; `Revoke` by message).

use std::collections::VecDeque;
use std::os::fd::AsFd;

use uhmm_ipc::message::pager::FaultPoint;
use uhmm_ipc::shared::copy_ring::CopyOp;
use uhmm_kernel_hook::uffd::{CopyMode, FillOutcome, FillStop as HookStop, Userfaultfd, WpOutcome};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{
    Action, CopyRun, DeviceId, EntryRun, Event, FillStop, Pages, RegionId, ReqId, StepResult, Ticket,
};

use crate::devices::EngineJob;
use crate::service::Pager;
use crate::space::Segment;

/// A copy that cannot start yet: the ring or the staging area is full, or the driver is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deferred {
    /// Device.
    pub device: u8,
    /// Copy.
    pub copy: Copy,
}

/// A copy between the client and a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// System pages to frames.
    Out { ticket: Ticket, region: RegionId, pages: Pages, frame: u32 },
    /// Frames to the client.
    Home { ticket: Ticket, region: RegionId, pages: Pages, frame: u32 },
    /// A run of private pages that the agent has put into the staging memory of its space (or found to be zeros) to frames.
    Staged { ticket: Ticket, space: u64, pages: Pages, frame: u32, staging_page: u64, zero: bool, run: CopyRun },
    /// Frames of one device to frames of another: the first half brings them to the bounce buffer.
    Across { ticket: Ticket, from_frame: u32, to: u8, frame: u32, count: u32 },
    /// The second half of a copy from device to device: the pager's own buffer to frames.
    Bounced { ticket: Ticket, buffer: u64, frame: u32, count: u32 },
    /// Zero some frames; the last part of a scrub or a zero fill completes the ticket.
    Zero { ticket: Ticket, frame: u32, count: u32, scrub: bool, last: bool },
}

impl Pager {
    /// Runs the decisions of the core until there are none left.
    pub(crate) fn drain(&mut self) {
        while let Some(event) = self.events.pop_front() {
            let now_us = self.now_us();
            let mut actions = std::mem::take(&mut self.actions);
            self.core.handle(&self.regions, now_us, event, &mut actions);
            for action in actions.drain(..) {
                self.execute(action);
            }
            self.actions = actions;
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Publish { region, first, entries } => self.publish(region, first, entries),
            Action::WriteProtect { ticket, region, pages, on } => {
                let result = self.write_protect(region, pages, on);
                self.push(Event::WpDone { ticket, result });
            }
            Action::Punch { ticket, region, pages } if self.is_private(region) => {
                self.private_punch(ticket, region, pages);
            }
            Action::Punch { ticket, region, pages } => {
                let result = self.punch(region, pages);
                self.push(Event::PunchDone { ticket, result });
            }
            Action::Wake { region, pages } => self.wake(region, pages),
            Action::Poison { region, pages } => self.poison(region, pages),
            Action::Revoke { ticket, region, pages, devices } => self.revoke(ticket, region, pages, devices),
            Action::CopyOut { ticket, region, pages, device, frame, keep, req } if self.is_private(region) => {
                self.log_copy(req, region, pages, device);
                self.private_out(ticket, region, pages, (device.0, frame), keep);
            }
            Action::MoveBack { ticket, region, pages } => self.private_move_back(ticket, region, pages),
            Action::FillHuge { ticket, region, pages, device, frame } => {
                self.private_fill_huge(ticket, region, pages, device.0, frame);
            }
            Action::CopyAcross { ticket, from, from_frame, to, frame, count } => {
                let copy = Copy::Across { ticket, from_frame, to: to.0, frame, count };
                self.start_copy(Deferred { device: from.0, copy });
            }
            Action::ForkReady { region } => self.fork_ready(region),
            Action::Trace { kind, cause, region, pages, from, to } => self.trace(kind, cause, region, pages, from, to),
            Action::CopyOut { ticket, region, pages, device, frame, req, .. } => {
                self.log_copy(req, region, pages, device);
                self.start_copy(Deferred { device: device.0, copy: Copy::Out { ticket, region, pages, frame } });
            }
            Action::Fill { ticket, region, pages, device, frame } => {
                self.start_copy(Deferred { device: device.0, copy: Copy::Home { ticket, region, pages, frame } });
            }
            Action::ZeroFrames { ticket, device, frame, count } => {
                let copy = Copy::Zero { ticket, frame, count, scrub: false, last: true };
                self.start_copy(Deferred { device: device.0, copy });
            }
            Action::Scrub { ticket, device, runs } => self.scrub(ticket, device, &runs),
            Action::ZeroFill { ticket, region, pages } => {
                let (done_pages, stop) = self.fill(region, pages, true, |uffd, range, _| uffd.zeropage(range, false));
                self.push(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Continue { ticket, region, pages } if self.is_private(region) => {
                self.private_probe(ticket, region, pages);
            }
            Action::Continue { ticket, region, pages } => {
                let (done_pages, stop) =
                    self.fill(region, pages, true, |uffd, range, _| uffd.cont(range, false, false));
                self.push(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Reply { req, outcome } => self.answer_request(req, outcome),
            Action::DropRegion { region } => self.drop_region(region),
        }
    }

    pub(crate) fn push(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// The client's request id, at the place where its bytes move.
    fn log_copy(&self, req: ReqId, region: RegionId, pages: Pages, device: DeviceId) {
        let trace = self.requests.get(&req).map_or(0, |request| request.trace.0);
        let (region, first_page, page_count) = (region.0, pages.first, pages.count);
        tracing::debug!(request = trace, region, first_page, page_count, device = device.0, "Copy to the device");
    }

    fn publish(&mut self, region: RegionId, first: u64, entries: EntryRun) {
        let Some(region) = self.regions.get(region.0) else { return };
        for (offset, entry) in entries.iter().enumerate() {
            region.directory.store(first + offset as u64, entry.bits());
        }
    }

    /// Runs a userfaultfd call on every mapping of some pages. Returns what they said; none when nothing shows the pages.
    fn everywhere<T>(
        &self,
        region: RegionId,
        pages: Pages,
        call: impl Fn(&Userfaultfd, AddrRange) -> Result<T, HookError>,
    ) -> Vec<Result<T, HookError>> {
        let on = |(segment, part): (&Segment, Pages)| {
            let space = self.spaces.get(&segment.space)?;
            Some(call(&space.uffd, AddrRange { start: segment.addr_of(part.first), len: part.count * PAGE_SIZE }))
        };
        self.regions.showing(region.0, pages).filter_map(on).collect()
    }

    /// Fills pages in order through a mapping that shows them; `call` gets the addresses and the offset from the first page. Stops
    /// at the first page that cannot be filled. Other mappings of the same memory are served with what is there then: whose fault
    /// it was is not known any more.
    fn fill(
        &mut self,
        region: RegionId,
        pages: Pages,
        serves_others: bool,
        call: impl Fn(&Userfaultfd, AddrRange, u64) -> Result<FillOutcome, HookError>,
    ) -> (u64, Option<FillStop>) {
        let mut done = 0;
        // Segments whose process is gone, or that were unmapped and nobody has read it yet: after a fork another may show the pages.
        let mut gone: Vec<u64> = Vec::new();
        while done < pages.count {
            let left = pages.after(done);
            let fits = |(segment, part): &(&Segment, Pages)| part.first == left.first && !gone.contains(&segment.id);
            let shown = self.regions.showing(region.0, left).find(fits);
            let Some((segment, part)) = shown else { return (done, Some(self.nothing_shows(region))) };
            let segment_id = segment.id;
            let Some(space) = self.spaces.get(&segment.space) else { return (done, Some(FillStop::NoProcess)) };
            let range = AddrRange { start: segment.addr_of(part.first), len: part.count * PAGE_SIZE };
            let others: Vec<_> = self.regions.showing(region.0, part).filter(|(s, _)| s.id != segment.id).collect();
            let outcome = call(&space.uffd, range, done * PAGE_SIZE);
            let mut served = 0;
            for (other, shown) in others.iter().filter(|(_, shown)| shown.first == part.first) {
                let Some(space) = self.spaces.get(&other.space) else { continue };
                let range = AddrRange { start: other.addr_of(shown.first), len: shown.count * PAGE_SIZE };
                if let Ok(outcome) = space.uffd.cont(range, false, false) {
                    served = served.max(outcome.done_bytes / PAGE_SIZE);
                }
            }
            let (mut filled, mut stop) = self.interpret(region, part, outcome);
            if filled == 0 && stop == Some(FillStop::Exists) && served > 0 && serves_others {
                (filled, stop) = (served, None);
            }
            done += filled;
            if filled == 0 && matches!(stop, Some(FillStop::Gone | FillStop::NoProcess)) {
                gone.push(segment_id);
                let another =
                    |(segment, part): (&Segment, Pages)| part.contains(left.first) && !gone.contains(&segment.id);
                if self.regions.showing(region.0, left).any(another) {
                    continue;
                }
            }
            if filled < part.count {
                return (done, stop);
            }
        }
        (done, None)
    }

    fn nothing_shows(&self, region: RegionId) -> FillStop {
        if self.regions.get(region.0).is_some() { FillStop::Gone } else { FillStop::NoProcess }
    }

    pub(crate) fn write_protect(&mut self, region: RegionId, pages: Pages, on: bool) -> StepResult {
        let outcomes = self.everywhere(region, pages, |uffd, range| uffd.write_protect(range, on, false));
        let mut result = StepResult::Gone;
        for outcome in outcomes {
            match outcome {
                Ok(WpOutcome::Done) if result == StepResult::Gone => result = StepResult::Ok,
                Ok(WpOutcome::Done | WpOutcome::NoProcess | WpOutcome::Gone) => {}
                Ok(WpOutcome::Again) => {
                    self.note_again(region);
                    return StepResult::Again;
                }
                Err(error) => {
                    tracing::warn!(%error, region = region.0, "Write-protect failed");
                    return StepResult::Io;
                }
            }
        }
        result
    }

    fn punch(&mut self, region: RegionId, pages: Pages) -> StepResult {
        // Only memfds that were made for this: never a hole in anybody's file.
        let shared = self.regions.get(region.0).filter(|target| target.backing == uhmm_pager_core::Backing::Shared);
        let Some(memory) = shared.and_then(|target| target.memory.as_ref()) else { return StepResult::Gone };
        let (offset, len) = (pages.first * PAGE_SIZE, pages.count * PAGE_SIZE);
        match memfd::punch_hole(memory.fd.as_fd(), offset, len) {
            Ok(()) => StepResult::Ok,
            Err(error) => {
                tracing::warn!(%error, region = region.0, "Punching system pages failed");
                StepResult::Io
            }
        }
    }

    fn wake(&mut self, region: RegionId, pages: Pages) {
        for error in self.everywhere(region, pages, |uffd, range| uffd.wake(range)).into_iter().filter_map(Result::err)
        {
            tracing::debug!(%error, region = region.0, "Wake failed");
        }
    }

    fn poison(&mut self, region: RegionId, pages: Pages) {
        tracing::error!(region = region.0, first_page = pages.first, page_count = pages.count, "Pages are poisoned");
        for error in
            self.everywhere(region, pages, |uffd, range| uffd.poison(range)).into_iter().filter_map(Result::err)
        {
            tracing::warn!(%error, region = region.0, "Poisoning failed");
        }
    }

    /// An answer of EAGAIN means that an event of the space is unread: read on before anything is tried again.
    pub(crate) fn note_again(&mut self, region: RegionId) {
        let all = self.all_pages(region.0);
        let spaces: Vec<u64> = self.regions.showing(region.0, all).map(|(segment, _)| segment.space).collect();
        self.reread.extend(spaces);
    }

    fn interpret(
        &mut self,
        region: RegionId,
        pages: Pages,
        outcome: Result<FillOutcome, HookError>,
    ) -> (u64, Option<FillStop>) {
        let outcome = match outcome {
            Err(error) => {
                tracing::warn!(%error, region = region.0, first_page = pages.first, "Filling pages failed");
                return (0, Some(FillStop::Io));
            }
            Ok(outcome) => outcome,
        };
        let stop = outcome.stop.map(|stop| match stop {
            HookStop::Again => {
                self.note_again(region);
                FillStop::Again
            }
            HookStop::Exists => FillStop::Exists,
            HookStop::NoProcess => FillStop::NoProcess,
            HookStop::Gone => FillStop::Gone,
            HookStop::NoPage => FillStop::NoPage,
            // The client's memory limit is reached: the pages stay where they are and the fault is raised again.
            HookStop::NoMemory | HookStop::Busy => FillStop::Again,
            HookStop::Other(errno) => {
                tracing::warn!(errno, region = region.0, first_page = pages.first, "Filling pages failed");
                FillStop::Io
            }
        });
        (outcome.done_bytes / PAGE_SIZE, stop)
    }

    fn scrub(&mut self, ticket: Ticket, device: DeviceId, runs: &[(u32, u32)]) {
        if runs.is_empty() {
            self.push(Event::ScrubDone { ticket, result: StepResult::Ok });
        }
        for (index, (frame, count)) in runs.iter().enumerate() {
            let copy = Copy::Zero { ticket, frame: *frame, count: *count, scrub: true, last: index + 1 == runs.len() };
            self.start_copy(Deferred { device: device.0, copy });
        }
    }

    /// Copies through the aperture at once, or hands the copy to the driver.
    pub(crate) fn start_copy(&mut self, deferred: Deferred) {
        let has_aperture =
            self.devices[usize::from(deferred.device)].as_ref().is_some_and(|device| device.aperture.is_some());
        if has_aperture {
            self.copy_by_aperture(deferred);
        } else {
            self.copies.push_back(deferred);
            self.submit_copies();
        }
    }

    fn copy_by_aperture(&mut self, deferred: Deferred) {
        let Some(device) = &self.devices[usize::from(deferred.device)] else { return };
        let Some(aperture) = &device.aperture else { return };
        match deferred.copy {
            Copy::Out { ticket, region, pages, frame } => {
                let memory = self.regions.get(region.0).and_then(|target| target.memory.as_ref());
                let copied = memory.map(|memory| {
                    let (from, to) = (pages.first * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
                    memfd::read_to_window(memory.fd.as_fd(), from, aperture, to, pages.count * PAGE_SIZE)
                });
                let result = step_result(copied, region);
                let result = self.injected(region, FaultPoint::CopyOut, result);
                self.push(Event::CopyDone { ticket, result });
            }
            Copy::Staged { ticket, space, pages, frame, staging_page, zero, run } => {
                let staging =
                    self.spaces.get(&space).and_then(|space| space.agent.as_ref()).map(|agent| &agent.staging);
                let (from, to) = (staging_page * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
                let len = pages.count * PAGE_SIZE;
                let copied = match staging {
                    _ if zero => aperture.fill(to, len, 0),
                    Some(staging) => staging.copy_to(from, aperture, to, len),
                    None => return self.staged_done(ticket, pages, run, false),
                };
                if let Err(error) = &copied {
                    tracing::error!(%error, device = deferred.device, frame, "Copying staged pages failed");
                }
                let result = if copied.is_ok() { StepResult::Ok } else { StepResult::Io };
                let result = self.injected_in_space(space, FaultPoint::CopyOut, result);
                self.staged_done(ticket, pages, run, result == StepResult::Ok);
            }
            Copy::Bounced { ticket, buffer, frame, count } => {
                let (to, len) = (u64::from(frame) * PAGE_SIZE, u64::from(count) * PAGE_SIZE);
                let ok = self.bounces.get(&buffer).is_some_and(|from| from.copy_to(0, aperture, to, len).is_ok());
                self.bounced(ticket, buffer, ok);
            }
            Copy::Across { ticket, from_frame, to, frame, count } => {
                let target = self.devices[usize::from(to)].as_ref().and_then(|device| device.aperture.as_ref());
                let Some(target) = target else { return self.bounce(deferred) };
                let (from, to) = (u64::from(from_frame) * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
                let copied = aperture.copy_to(from, target, to, u64::from(count) * PAGE_SIZE);
                if let Err(error) = &copied {
                    tracing::error!(%error, from = deferred.device, "Copying from device to device failed");
                }
                let result = if copied.is_ok() { StepResult::Ok } else { StepResult::Io };
                self.push(Event::CopyDone { ticket, result });
            }
            Copy::Home { ticket, region, pages, frame } => {
                if self.injected(region, FaultPoint::CopyHome, StepResult::Ok) != StepResult::Ok {
                    return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
                }
                let (done_pages, stop) = self.fill_from_device(deferred.device, region, pages, frame);
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Copy::Zero { ticket, frame, count, scrub, last } => {
                let (from, len) = (u64::from(frame) * PAGE_SIZE, u64::from(count) * PAGE_SIZE);
                let result = match aperture.fill(from, len, 0) {
                    Ok(()) => StepResult::Ok,
                    Err(error) => {
                        tracing::error!(%error, device = deferred.device, frame, "Zeroing device memory failed");
                        StepResult::Io
                    }
                };
                self.zero_done(ticket, scrub, last, result);
            }
        }
    }

    /// UFFDIO_COPY straight from the aperture.
    fn fill_from_device(&mut self, device: u8, region: RegionId, pages: Pages, frame: u32) -> (u64, Option<FillStop>) {
        // Taken out for the call: the aperture is read while the fill's bookkeeping changes.
        let Some(aperture) = self.devices[usize::from(device)].as_mut().and_then(|device| device.aperture.take())
        else {
            return (0, Some(FillStop::Io));
        };
        let from = u64::from(frame) * PAGE_SIZE;
        let filled = self.fill(region, pages, false, |uffd, range, offset| {
            uffd.copy(range.start, &aperture, from + offset, range.len, CopyMode::default())
        });
        if let Some(device) = self.devices[usize::from(device)].as_mut() {
            device.aperture = Some(aperture);
        }
        filled
    }

    fn zero_done(&mut self, ticket: Ticket, scrub: bool, last: bool, result: StepResult) {
        match (scrub, last) {
            (true, true) => self.push(Event::ScrubDone { ticket, result }),
            (true, false) => {}
            (false, _) => self.push(Event::ZeroDone { ticket, result }),
        }
    }

    /// Gives waiting copies to their drivers, in order, as far as staging and rings allow.
    pub(crate) fn submit_copies(&mut self) {
        // A device that came back with an aperture needs no driver for what waited for it.
        let mut waiting = std::mem::take(&mut self.copies);
        let mut blocked_mask = 0u8;
        while let Some(deferred) = waiting.pop_front() {
            let bit = 1u8 << deferred.device;
            let device = self.devices[usize::from(deferred.device)].as_ref();
            if device.is_some_and(|device| device.aperture.is_some()) {
                self.copy_by_aperture(deferred);
            } else if blocked_mask & bit != 0 || !self.submit_copy(deferred) {
                blocked_mask |= bit;
                self.copies.push_back(deferred);
            }
        }
    }

    /// The device will not come back: whoever waits for a copy is told.
    pub(crate) fn fail_copies(&mut self, device_id: u8) {
        let mine = |deferred: &Deferred| deferred.device == device_id;
        let in_flight: Vec<u64> = self.engine_jobs.iter().filter(|(_, job)| mine(job)).map(|(id, _)| *id).collect();
        let started = in_flight.into_iter().filter_map(|id| self.engine_jobs.remove(&id)).collect::<Vec<_>>();
        let (waiting, others) = std::mem::take(&mut self.copies).into_iter().partition::<VecDeque<_>, _>(mine);
        self.copies = others;
        for deferred in started.into_iter().chain(waiting) {
            match deferred.copy {
                Copy::Out { ticket, .. } => self.push(Event::CopyDone { ticket, result: StepResult::Io }),
                Copy::Home { ticket, .. } => {
                    self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
                }
                Copy::Zero { ticket, scrub, last, .. } => self.zero_done(ticket, scrub, last, StepResult::Io),
                Copy::Staged { ticket, pages, run, .. } => self.staged_done(ticket, pages, run, false),
                Copy::Across { ticket, .. } => self.push(Event::CopyDone { ticket, result: StepResult::Io }),
                Copy::Bounced { ticket, buffer, .. } => self.bounced(ticket, buffer, false),
            }
        }
    }

    /// `false`: not now.
    fn submit_copy(&mut self, deferred: Deferred) -> bool {
        let Some(device) = &mut self.devices[usize::from(deferred.device)] else { return false };
        let Some(engine) = &mut device.engine else { return false };
        let (op, frame, count, staged) = match deferred.copy {
            Copy::Out { frame, pages, .. } => (CopyOp::CopyIn, frame, pages.count as u32, true),
            Copy::Home { frame, pages, .. } => (CopyOp::CopyOut, frame, pages.count as u32, true),
            Copy::Zero { frame, count, .. } => (CopyOp::Scrub, frame, count, false),
            Copy::Staged { frame, pages, zero: true, .. } => (CopyOp::Scrub, frame, pages.count as u32, false),
            Copy::Staged { frame, pages, .. } => (CopyOp::CopyIn, frame, pages.count as u32, true),
            Copy::Across { from_frame, count, .. } => (CopyOp::CopyOut, from_frame, count, true),
            Copy::Bounced { frame, count, .. } => (CopyOp::CopyIn, frame, count, true),
        };
        let staging_page = if staged {
            let Some(page) = engine.take_staging(count) else { return false };
            page
        } else {
            0
        };
        let staged_count = if staged { count } else { 0 };
        if let Copy::Staged { ticket, space, pages, staging_page: from, zero: false, run, .. } = deferred.copy {
            let staging = self.spaces.get(&space).and_then(|space| space.agent.as_ref()).map(|agent| &agent.staging);
            let to = u64::from(staging_page) * PAGE_SIZE;
            let len = pages.count * PAGE_SIZE;
            if staging.is_none_or(|staging| staging.copy_to(from * PAGE_SIZE, &engine.staging, to, len).is_err()) {
                engine.give_staging(staging_page, staged_count);
                self.staged_done(ticket, pages, run, false);
                return true;
            }
        }
        if let Copy::Bounced { ticket, buffer, count, .. } = deferred.copy {
            let (to, len) = (u64::from(staging_page) * PAGE_SIZE, u64::from(count) * PAGE_SIZE);
            if self.bounces.get(&buffer).is_none_or(|from| from.copy_to(0, &engine.staging, to, len).is_err()) {
                engine.give_staging(staging_page, staged_count);
                self.bounced(ticket, buffer, false);
                return true;
            }
        }
        if let Copy::Out { ticket, region, pages, .. } = deferred.copy {
            let memory = self.regions.get(region.0).and_then(|target| target.memory.as_ref());
            let copied = memory.map(|memory| {
                let to = u64::from(staging_page) * PAGE_SIZE;
                let len = pages.count * PAGE_SIZE;
                memfd::read_to_window(memory.fd.as_fd(), pages.first * PAGE_SIZE, &engine.staging, to, len)
            });
            let result = step_result(copied, region);
            if result != StepResult::Ok {
                engine.give_staging(staging_page, staged_count);
                self.push(Event::CopyDone { ticket, result });
                return true;
            }
        }
        let id = self.next_engine_job;
        let job = EngineJob { ticket: id, op, staging_page, count: staged_count };
        match engine.submit(job, frame, count) {
            Ok(true) => {
                self.next_engine_job += 1;
                self.engine_jobs.insert(id, deferred);
                true
            }
            Ok(false) => {
                engine.give_staging(staging_page, staged_count);
                false
            }
            Err(error) => {
                engine.give_staging(staging_page, staged_count);
                tracing::error!(%error, device = deferred.device, "The driver's copy ring is broken");
                let device = deferred.device;
                self.fence(device, "its copy ring is broken");
                false
            }
        }
    }

    /// The driver rang: its finished copies complete their tickets.
    pub(crate) fn reap_copies(&mut self, device_id: u8) {
        loop {
            let Some(device) = &mut self.devices[usize::from(device_id)] else { return };
            let Some(engine) = &mut device.engine else { return };
            let popped = engine.completed();
            match popped {
                Ok(None) => break,
                Ok(Some((job, ok))) => self.finish_engine_job(device_id, job, ok),
                Err(error) => {
                    tracing::error!(%error, device = device_id, "The driver completed nonsense");
                    self.fence(device_id, "it completed a copy that was never asked for");
                    return;
                }
            }
        }
        self.submit_copies();
    }

    fn finish_engine_job(&mut self, device_id: u8, job: EngineJob, ok: bool) {
        let Some(deferred) = self.engine_jobs.remove(&job.ticket) else { return };
        let result = if ok { StepResult::Ok } else { StepResult::Io };
        let result = match deferred.copy {
            Copy::Out { region, .. } => self.injected(region, FaultPoint::CopyOut, result),
            Copy::Staged { space, .. } => self.injected_in_space(space, FaultPoint::CopyOut, result),
            Copy::Home { region, .. } => self.injected(region, FaultPoint::CopyHome, result),
            _ => result,
        };
        let ok = result == StepResult::Ok;
        match deferred.copy {
            Copy::Out { ticket, .. } => self.push(Event::CopyDone { ticket, result }),
            Copy::Zero { ticket, scrub, last, .. } => self.zero_done(ticket, scrub, last, result),
            Copy::Staged { ticket, pages, run, .. } => self.staged_done(ticket, pages, run, ok),
            Copy::Across { .. } => self.bounce_read(device_id, job, deferred, ok),
            Copy::Bounced { ticket, buffer, .. } => self.bounced(ticket, buffer, ok),
            Copy::Home { ticket, region, pages, .. } if ok => {
                let engine = self.devices[usize::from(device_id)].as_mut().and_then(|device| device.engine.take());
                let Some(engine) = engine else { return };
                let from = u64::from(job.staging_page) * PAGE_SIZE;
                let (done_pages, stop) = self.fill(region, pages, false, |uffd, range, offset| {
                    uffd.copy(range.start, &engine.staging, from + offset, range.len, CopyMode::default())
                });
                if let Some(device) = self.devices[usize::from(device_id)].as_mut() {
                    device.engine = Some(engine);
                }
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Copy::Home { ticket, .. } => {
                self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
            }
        }
        let engine = self.devices[usize::from(device_id)].as_mut().and_then(|device| device.engine.as_mut());
        if let Some(engine) = engine {
            engine.give_staging(job.staging_page, job.count);
        }
    }
}

fn step_result(copied: Option<Result<(), HookError>>, region: RegionId) -> StepResult {
    match copied {
        None => StepResult::Gone,
        Some(Ok(())) => StepResult::Ok,
        Some(Err(error)) => {
            tracing::warn!(%error, region = region.0, "Copying pages to the device failed");
            StepResult::Io
        }
    }
}
