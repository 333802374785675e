//! Copies between clients and devices: through the aperture at once, or by the driver.
//!
//! ```text
//!   start_copy --aperture--> copied here, the ticket completes
//!       `------ else ------> waits for staging and ring -> driver copies -> completion -> put in place, the ticket completes
//! ```

use std::collections::VecDeque;
use std::os::fd::AsFd;

use uhmm_ipc::message::pager::FaultPoint;
use uhmm_ipc::shared::copy_ring::{CopyOp, CopyStatus};
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{CopyRun, Event, FillStop, Pages, RegionId, StepResult, Ticket};

use crate::devices::EngineJob;
use crate::fill::FillFrom;
use crate::service::Pager;

/// Frames scrubbed in one turn of the loop (4 MiB): nobody waits for them, and others wait for the turn.
const SCRUB_FRAMES_PER_TURN: u32 = 1024;
/// Scrubs that a driver has to do at a time, beside the copies that somebody waits for.
const SCRUBS_AT_DRIVER: usize = 2;

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
    /// Frames to a huge page that the client's agent makes.
    HomeHuge { ticket: Ticket, region: RegionId, pages: Pages, frame: u32 },
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

    /// A turn's share of the frames that are to be scrubbed. Copies that somebody waits for go first.
    pub(crate) fn scrub_some(&mut self) {
        let mut left = SCRUB_FRAMES_PER_TURN;
        let mut kept = VecDeque::new();
        while left > 0
            && let Some(deferred) = self.scrubs.pop_front()
        {
            let device = self.devices[usize::from(deferred.device)].as_ref();
            let by_driver = device.is_none_or(|device| device.aperture.is_none());
            if by_driver && self.driver_is_busy(deferred.device) {
                kept.push_back(deferred);
            } else if let Copy::Zero { count, .. } = deferred.copy {
                left = left.saturating_sub(count);
                self.start_copy(deferred);
            }
        }
        kept.append(&mut self.scrubs);
        self.scrubs = kept;
    }

    fn driver_is_busy(&self, device: u8) -> bool {
        let is_scrub = |job: &&Deferred| job.device == device && matches!(job.copy, Copy::Zero { scrub: true, .. });
        self.copies.iter().any(|waiting| waiting.device == device)
            || self.engine_jobs.values().filter(is_scrub).count() >= SCRUBS_AT_DRIVER
    }

    /// Frames wait to be scrubbed here, now.
    pub(crate) fn has_scrubs(&self) -> bool {
        let here = |deferred: &Deferred| {
            self.devices[usize::from(deferred.device)].as_ref().is_some_and(|device| device.aperture.is_some())
        };
        self.scrubs.iter().any(here)
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
                if let Some(Err(error)) = &copied {
                    self.note_failure(region, format!("Copying pages to the device failed: {error}"));
                }
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
                    self.note_failure_in(space, format!("Copying pages to the device failed: {error}"));
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
                if self.no_system_pages(region) {
                    return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Again) });
                }
                let (done_pages, stop) = self.fill_from_device(deferred.device, region, pages, frame);
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Copy::HomeHuge { ticket, region, pages, frame } => {
                self.private_fill_huge(ticket, region, pages, deferred.device, frame);
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

    /// Why a copy will not be made.
    fn note_copy_failure(&mut self, deferred: &Deferred, why: &str) {
        let why = format!("A copy of device {} failed: {why}", deferred.device);
        match deferred.copy {
            Copy::Out { region, .. } | Copy::Home { region, .. } | Copy::HomeHuge { region, .. } => {
                self.note_failure(region, why);
            }
            Copy::Staged { space, .. } => self.note_failure_in(space, why),
            Copy::Across { .. } | Copy::Bounced { .. } | Copy::Zero { .. } => {}
        }
    }

    /// The system has no page for what comes home: somebody has ordered that.
    fn no_system_pages(&mut self, region: RegionId) -> bool {
        self.injected(region, FaultPoint::SystemPages, StepResult::Ok) != StepResult::Ok
    }

    /// UFFDIO_COPY straight from the aperture.
    fn fill_from_device(&mut self, device: u8, region: RegionId, pages: Pages, frame: u32) -> (u64, Option<FillStop>) {
        // Taken out for the call: the aperture is read while the fill's bookkeeping changes.
        let Some(aperture) = self.devices[usize::from(device)].as_mut().and_then(|device| device.aperture.take())
        else {
            return (0, Some(FillStop::Io));
        };
        let from = u64::from(frame) * PAGE_SIZE;
        let filled = self.fill(region, pages, FillFrom::Bytes(&aperture, from));
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
        let (scrubs, others) = std::mem::take(&mut self.scrubs).into_iter().partition::<VecDeque<_>, _>(mine);
        self.scrubs = others;
        for deferred in started.into_iter().chain(waiting).chain(scrubs) {
            self.note_copy_failure(&deferred, "the device is lost");
            match deferred.copy {
                Copy::Out { ticket, .. } => self.push(Event::CopyDone { ticket, result: StepResult::Io }),
                Copy::Home { ticket, .. } | Copy::HomeHuge { ticket, .. } => {
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
            Copy::Home { frame, pages, .. } | Copy::HomeHuge { frame, pages, .. } => {
                (CopyOp::CopyOut, frame, pages.count as u32, true)
            }
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
            let failure = copied.as_ref().and_then(|copied| copied.as_ref().err()).map(ToString::to_string);
            let result = step_result(copied, region);
            if result != StepResult::Ok {
                engine.give_staging(staging_page, staged_count);
                if let Some(error) = failure {
                    self.note_failure(region, format!("Copying pages to the device failed: {error}"));
                }
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
                Ok(Some((job, status))) => self.finish_engine_job(device_id, job, status),
                Err(error) => {
                    tracing::error!(%error, device = device_id, "The driver completed nonsense");
                    self.fence(device_id, "it completed a copy that was never asked for");
                    return;
                }
            }
        }
        self.submit_copies();
    }

    fn finish_engine_job(&mut self, device_id: u8, job: EngineJob, status: CopyStatus) {
        let Some(deferred) = self.engine_jobs.remove(&job.ticket) else { return };
        let ok = status == CopyStatus::Ok;
        let result = if ok { StepResult::Ok } else { StepResult::Io };
        if !ok {
            self.note_copy_failure(&deferred, "its driver's copy engine has failed it: see the driver's log");
        }
        let result = match deferred.copy {
            Copy::Out { region, .. } => self.injected(region, FaultPoint::CopyOut, result),
            Copy::Staged { space, .. } => self.injected_in_space(space, FaultPoint::CopyOut, result),
            Copy::Home { region, .. } | Copy::HomeHuge { region, .. } => {
                self.injected(region, FaultPoint::CopyHome, result)
            }
            _ => result,
        };
        let ok = result == StepResult::Ok;
        let lost = match status {
            CopyStatus::Lost { good, lost } => Some((u64::from(good), u64::from(lost))),
            _ => None,
        };
        match deferred.copy {
            Copy::Home { ticket, region, pages, .. } if lost.is_some() => {
                self.with_staging(device_id, |pager, staging| {
                    pager.fetched_in_part(ticket, region, pages, staging, job.staging_page, lost.unwrap_or_default());
                });
            }
            // Page by page it shows which ones.
            Copy::HomeHuge { ticket, .. } if lost.is_some() => {
                self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
            }
            Copy::Out { ticket, .. } => self.push(Event::CopyDone { ticket, result }),
            Copy::Zero { ticket, scrub, last, .. } => self.zero_done(ticket, scrub, last, result),
            Copy::Staged { ticket, pages, run, .. } => self.staged_done(ticket, pages, run, ok),
            Copy::Across { .. } => self.bounce_read(device_id, job, deferred, ok),
            Copy::Bounced { ticket, buffer, .. } => self.bounced(ticket, buffer, ok),
            Copy::Home { ticket, region, pages, .. } if ok => {
                self.with_staging(device_id, |pager, staging| {
                    pager.fetched(ticket, region, pages, staging, job.staging_page)
                });
            }
            Copy::HomeHuge { ticket, region, pages, .. } if ok => {
                self.with_staging(device_id, |pager, staging| {
                    pager.fetched_huge(ticket, region, pages, staging, job.staging_page);
                });
            }
            Copy::Home { ticket, .. } | Copy::HomeHuge { ticket, .. } => {
                self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
            }
        }
        let engine = self.devices[usize::from(device_id)].as_mut().and_then(|device| device.engine.as_mut());
        if let Some(engine) = engine {
            engine.give_staging(job.staging_page, job.count);
        }
    }
    /// Lends the staging area of a device's engine.
    fn with_staging(&mut self, device_id: u8, body: impl FnOnce(&mut Self, &Window)) {
        let engine = self.devices[usize::from(device_id)].as_mut().and_then(|device| device.engine.take());
        let Some(engine) = engine else { return };
        body(self, &engine.staging);
        if let Some(device) = self.devices[usize::from(device_id)].as_mut() {
            device.engine = Some(engine);
        }
    }

    /// A driver has fetched what comes home.
    fn fetched(&mut self, ticket: Ticket, region: RegionId, pages: Pages, staging: &Window, staging_page: u32) {
        let from = u64::from(staging_page) * PAGE_SIZE;
        if self.no_system_pages(region) {
            return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Again) });
        }
        let pages = Pages { count: pages.count.min(self.core.fill_limit(ticket)), ..pages };
        let (done_pages, stop) = self.fill(region, pages, FillFrom::Bytes(staging, from));
        self.push(Event::FillDone { ticket, done_pages, stop });
    }

    /// A driver has fetched what it has still: `good` pages, and the `lost` ones behind them nobody has any more. Numbers of a driver's are not believed.
    fn fetched_in_part(
        &mut self,
        ticket: Ticket,
        region: RegionId,
        pages: Pages,
        staging: &Window,
        staging_page: u32,
        (good, lost): (u64, u64),
    ) {
        let good = good.min(pages.count - 1);
        if good == 0 {
            let stop = Some(FillStop::Lost { page_count: lost });
            return self.push(Event::FillDone { ticket, done_pages: 0, stop });
        }
        // What lies behind the good ones comes in the next round.
        self.fetched(ticket, region, Pages { count: good, ..pages }, staging, staging_page);
    }

    /// The same, for the agent.
    fn fetched_huge(&mut self, ticket: Ticket, region: RegionId, pages: Pages, staging: &Window, staging_page: u32) {
        if self.core.fill_limit(ticket) < pages.count {
            return self.push(Event::FillDone { ticket, done_pages: 0, stop: None });
        }
        self.fill_huge_from(ticket, region, pages, staging, u64::from(staging_page) * PAGE_SIZE);
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
