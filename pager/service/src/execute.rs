//! Carrying out what the core decides: every system call of the pager's data path is in this file.
//!
//! Actions of one decision run in order. Those with a ticket end in exactly one event for the core: at once, or later when a
//! driver or the mirror has to act (`CopyOut`, `Fill`, `Scrub`, `ZeroFrames` without an aperture; `Revoke` by message).

use std::collections::VecDeque;
use std::os::fd::AsFd;

use uhmm_ipc::shared::copy_ring::CopyOp;
use uhmm_kernel_hook::uffd::{CopyMode, FillOutcome, FillStop as HookStop, WpOutcome};
use uhmm_kernel_hook::{HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{Action, DeviceId, EntryRun, Event, FillStop, Pages, RegionId, ReqId, StepResult, Ticket};

use crate::devices::EngineJob;
use crate::service::Pager;

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
            Action::Punch { ticket, region, pages } => {
                let result = self.punch(region, pages);
                self.push(Event::PunchDone { ticket, result });
            }
            Action::Wake { region, pages } => self.wake(region, pages),
            Action::Poison { region, pages } => self.poison(region, pages),
            Action::Revoke { ticket, region, pages, devices } => self.revoke(ticket, region, pages, devices),
            Action::CopyOut { ticket, region, pages, device, frame, req } => {
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
                let outcome = self.with_uffd(region, pages, |uffd, range| uffd.zeropage(range, false));
                self.cpu_fill_done(ticket, region, pages, outcome);
            }
            Action::Continue { ticket, region, pages } => {
                let outcome = self.with_uffd(region, pages, |uffd, range| uffd.cont(range, false, false));
                self.cpu_fill_done(ticket, region, pages, outcome);
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

    /// Runs a userfaultfd call on the client addresses of some pages. A region that is gone counts as a dead process.
    fn with_uffd<T>(
        &self,
        region: RegionId,
        pages: Pages,
        call: impl FnOnce(&uhmm_kernel_hook::uffd::Userfaultfd, uhmm_kernel_hook::AddrRange) -> Result<T, HookError>,
    ) -> Option<Result<T, HookError>> {
        let region = self.regions.get(region.0)?;
        let space = self.spaces.get(&region.space)?;
        Some(call(&space.uffd, region.addresses(pages.first, pages.count)))
    }

    fn write_protect(&mut self, region: RegionId, pages: Pages, on: bool) -> StepResult {
        match self.with_uffd(region, pages, |uffd, range| uffd.write_protect(range, on, false)) {
            Some(Ok(WpOutcome::Done)) => StepResult::Ok,
            Some(Ok(WpOutcome::Again)) => {
                self.note_again(region);
                StepResult::Again
            }
            Some(Ok(WpOutcome::NoProcess | WpOutcome::Gone)) | None => StepResult::Gone,
            Some(Err(error)) => {
                tracing::warn!(%error, region = region.0, "Write-protect failed");
                StepResult::Io
            }
        }
    }

    fn punch(&mut self, region: RegionId, pages: Pages) -> StepResult {
        let Some(target) = self.regions.get(region.0) else { return StepResult::Gone };
        let (offset, len) = (pages.first * PAGE_SIZE, pages.count * PAGE_SIZE);
        match memfd::punch_hole(target.memory.as_fd(), offset, len) {
            Ok(()) => StepResult::Ok,
            Err(error) => {
                tracing::warn!(%error, region = region.0, "Punching system pages failed");
                StepResult::Io
            }
        }
    }

    fn wake(&mut self, region: RegionId, pages: Pages) {
        if let Some(Err(error)) = self.with_uffd(region, pages, |uffd, range| uffd.wake(range)) {
            tracing::debug!(%error, region = region.0, "Wake failed");
        }
    }

    fn poison(&mut self, region: RegionId, pages: Pages) {
        tracing::error!(region = region.0, first_page = pages.first, page_count = pages.count, "Pages are poisoned");
        if let Some(Err(error)) = self.with_uffd(region, pages, |uffd, range| uffd.poison(range)) {
            tracing::warn!(%error, region = region.0, "Poisoning failed");
        }
    }

    /// An answer of EAGAIN means that an event of the space is unread: read on before anything is tried again.
    pub(crate) fn note_again(&mut self, region: RegionId) {
        if let Some(region) = self.regions.get(region.0) {
            self.reread.insert(region.space);
        }
    }

    fn cpu_fill_done(
        &mut self,
        ticket: Ticket,
        region: RegionId,
        pages: Pages,
        outcome: Option<Result<FillOutcome, HookError>>,
    ) {
        let (done_pages, stop) = self.interpret(region, pages, outcome);
        self.push(Event::CpuFillDone { ticket, done_pages, stop });
    }

    fn interpret(
        &mut self,
        region: RegionId,
        pages: Pages,
        outcome: Option<Result<FillOutcome, HookError>>,
    ) -> (u64, Option<FillStop>) {
        let outcome = match outcome {
            None => return (0, Some(FillStop::NoProcess)),
            Some(Err(error)) => {
                tracing::warn!(%error, region = region.0, first_page = pages.first, "Filling pages failed");
                return (0, Some(FillStop::Io));
            }
            Some(Ok(outcome)) => outcome,
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
    fn start_copy(&mut self, deferred: Deferred) {
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
                let copied = self.regions.get(region.0).map(|target| {
                    let (from, to) = (pages.first * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
                    memfd::read_to_window(target.memory.as_fd(), from, aperture, to, pages.count * PAGE_SIZE)
                });
                let result = step_result(copied, region);
                self.push(Event::CopyDone { ticket, result });
            }
            Copy::Home { ticket, region, pages, frame } => {
                let (from, len) = (u64::from(frame) * PAGE_SIZE, pages.count * PAGE_SIZE);
                let outcome = self.with_uffd(region, pages, |uffd, range| {
                    uffd.copy(range.start, aperture, from, len, CopyMode::default())
                });
                let (done_pages, stop) = self.interpret(region, pages, outcome);
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
        };
        let staging_page = if staged {
            let Some(page) = engine.take_staging(count) else { return false };
            page
        } else {
            0
        };
        let staged_count = if staged { count } else { 0 };
        if let Copy::Out { ticket, region, pages, .. } = deferred.copy {
            let copied = self.regions.get(region.0).map(|target| {
                let to = u64::from(staging_page) * PAGE_SIZE;
                let len = pages.count * PAGE_SIZE;
                memfd::read_to_window(target.memory.as_fd(), pages.first * PAGE_SIZE, &engine.staging, to, len)
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
        match engine.submit(job, frame) {
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
        match deferred.copy {
            Copy::Out { ticket, .. } => self.push(Event::CopyDone { ticket, result }),
            Copy::Zero { ticket, scrub, last, .. } => self.zero_done(ticket, scrub, last, result),
            Copy::Home { ticket, region, pages, .. } if ok => {
                let Some(engine) = self.devices[usize::from(device_id)].as_ref().and_then(|d| d.engine.as_ref()) else {
                    return;
                };
                let from = u64::from(job.staging_page) * PAGE_SIZE;
                let outcome = self.with_uffd(region, pages, |uffd, range| {
                    uffd.copy(range.start, &engine.staging, from, pages.count * PAGE_SIZE, CopyMode::default())
                });
                let (done_pages, stop) = self.interpret(region, pages, outcome);
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
