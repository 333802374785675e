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
use uhmm_kit::record::{self, Place, What};
use uhmm_pager_core::{CopyRun, Event, FillStop, Pages, RegionId, StepResult, Ticket};

use crate::bounce::NOT_BOUNCED;
use crate::devices::{CopyEngine, EngineJob};
use crate::fill::FillFrom;
use crate::service::Pager;

/// Frames scrubbed in one turn of the loop (4 MiB): nobody waits for them, and others wait for the turn.
const SCRUB_FRAMES_PER_TURN: u32 = 1024;
/// Scrubs that a driver has to do at a time, beside the copies that somebody waits for.
const SCRUBS_AT_DRIVER: usize = 2;

/// The pager's own copies of so many pages are events.
const TOLD_PAGES: u64 = 64;

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
    Staged {
        ticket: Ticket,
        region: RegionId,
        space: u64,
        pages: Pages,
        frame: u32,
        staging_page: u64,
        zero: bool,
        run: CopyRun,
    },
    /// Frames of one device to frames of another: the first half brings them to the bounce buffer.
    Across { ticket: Ticket, from_frame: u32, to: u8, frame: u32, count: u32 },
    /// The second half of a copy from device to device: the pager's own buffer to frames.
    Bounced { ticket: Ticket, buffer: u64, frame: u32, count: u32 },
    /// Zero some frames: all of a zero fill, or a part of a scrub.
    Zero { ticket: Ticket, frame: u32, count: u32, scrub: bool },
}

impl Copy {
    /// Whose pages, where that is known.
    fn region(self) -> Option<(RegionId, Pages)> {
        match self {
            Self::Out { region, pages, .. }
            | Self::Home { region, pages, .. }
            | Self::HomeHuge { region, pages, .. } => Some((region, pages)),
            Self::Staged { .. } | Self::Across { .. } | Self::Bounced { .. } | Self::Zero { .. } => None,
        }
    }
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
        // What takes no time to speak of is not told.
        let told = deferred.copy.region().filter(|(_, pages)| pages.count >= TOLD_PAGES);
        let Some((region, pages)) = told else { return self.copy_here(deferred) };
        let begun_ns = record::now_ns();
        self.copy_here(deferred);
        self.note_copy(region, pages, deferred.device, begun_ns);
    }

    fn copy_here(&mut self, deferred: Deferred) {
        match deferred.copy {
            Copy::Out { ticket, region, pages, frame } => {
                self.out_by_aperture(deferred.device, ticket, region, pages, frame);
            }
            Copy::Staged { ticket, pages, run, .. } => {
                let ok = self.staged_by_aperture(deferred);
                self.staged_done(ticket, pages, run, ok);
            }
            Copy::Bounced { ticket, buffer, frame, count } => {
                let (to, len) = (u64::from(frame) * PAGE_SIZE, u64::from(count) * PAGE_SIZE);
                let (from, aperture) = (self.bounces.get(&buffer), self.aperture(deferred.device));
                let ok = from.zip(aperture).is_some_and(|(from, aperture)| from.copy_to(0, aperture, to, len).is_ok());
                if !ok {
                    self.note_failure_of(ticket, NOT_BOUNCED);
                }
                self.bounced(ticket, buffer, ok);
            }
            Copy::Across { .. } => self.across_by_aperture(deferred),
            Copy::Home { ticket, region, pages, frame } => {
                if self.injected((region, pages), FaultPoint::CopyHome, StepResult::Ok) != StepResult::Ok {
                    return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
                }
                if self.no_system_pages(region, pages) {
                    return self.push(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Again) });
                }
                let (done_pages, stop) = self.fill_from_device(deferred.device, region, pages, frame);
                self.push(Event::FillDone { ticket, done_pages, stop });
            }
            Copy::HomeHuge { ticket, region, pages, frame } => {
                self.private_fill_huge(ticket, region, pages, deferred.device, frame);
            }
            Copy::Zero { ticket, frame, count, scrub } => {
                let (from, len) = (u64::from(frame) * PAGE_SIZE, u64::from(count) * PAGE_SIZE);
                let zeroed = match scrub {
                    true => self.scrub_here(deferred.device, from, len),
                    false => self.aperture(deferred.device).map(|aperture| aperture.fill(from, len, 0)),
                };
                if let Some(Err(error)) = &zeroed {
                    tracing::error!(%error, device = deferred.device, frame, "Zeroing device memory failed");
                }
                let result = if matches!(zeroed, Some(Ok(()))) { StepResult::Ok } else { StepResult::Io };
                self.zero_done(ticket, scrub, result);
            }
        }
    }

    /// After a restart everything that is free is scrubbed: what nobody has ever used of a memfd takes neither time nor memory.
    fn scrub_here(&self, device: u8, from: u64, len: u64) -> Option<Result<(), HookError>> {
        let device = self.devices[usize::from(device)].as_ref()?;
        let aperture = device.aperture.as_ref()?;
        let used = device.file.as_ref().and_then(|file| {
            let used = memfd::data_ranges(file.fd.as_fd(), file.offset_bytes + from, len).ok()?;
            Some(used.into_iter().map(|(at, len)| (at - file.offset_bytes, len)).collect())
        });
        let used: Vec<(u64, u64)> = used.unwrap_or_else(|| vec![(from, len)]);
        Some(used.into_iter().try_for_each(|(at, len)| aperture.fill(at, len, 0)))
    }

    fn aperture(&self, device: u8) -> Option<&Window> {
        self.devices[usize::from(device)].as_ref()?.aperture.as_ref()
    }

    fn out_by_aperture(&mut self, device: u8, ticket: Ticket, region: RegionId, pages: Pages, frame: u32) {
        let memory = self.regions.get(region.0).and_then(|target| target.memory.as_ref());
        let copied = memory.zip(self.aperture(device)).map(|(memory, aperture)| {
            let (from, to) = (pages.first * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
            memfd::read_to_window(memory.fd.as_fd(), from, aperture, to, pages.count * PAGE_SIZE)
        });
        let result = self.step_result(copied, region, pages);
        let result = self.injected((region, pages), FaultPoint::CopyOut, result);
        self.push(Event::CopyDone { ticket, result });
    }

    /// What the agent has put into staging memory goes to its frames.
    fn staged_by_aperture(&mut self, deferred: Deferred) -> bool {
        let Copy::Staged { region, space, pages, frame, staging_page, zero, .. } = deferred.copy else { return false };
        let staging = self.spaces.get(&space).and_then(|space| space.agent.as_ref()).map(|agent| &agent.staging);
        let Some(aperture) = self.aperture(deferred.device) else { return false };
        let (from, to) = (staging_page * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
        let len = pages.count * PAGE_SIZE;
        let copied = match staging {
            _ if zero => aperture.fill(to, len, 0),
            Some(staging) => staging.copy_to(from, aperture, to, len),
            None => return false,
        };
        let result = self.step_result(Some(copied), region, pages);
        self.injected((region, pages), FaultPoint::CopyOut, result) == StepResult::Ok
    }

    fn across_by_aperture(&mut self, deferred: Deferred) {
        let Copy::Across { ticket, from_frame, to, frame, count } = deferred.copy else { return };
        let (aperture, target) = (self.aperture(deferred.device), self.aperture(to));
        let Some((aperture, target)) = aperture.zip(target) else { return self.bounce(deferred) };
        let (from, to) = (u64::from(from_frame) * PAGE_SIZE, u64::from(frame) * PAGE_SIZE);
        let copied = aperture.copy_to(from, target, to, u64::from(count) * PAGE_SIZE);
        if let Err(error) = &copied {
            tracing::error!(%error, from = deferred.device, "Copying from device to device failed");
            self.note_failure_of(ticket, format!("Copying from device to device failed: {error}"));
        }
        let result = if copied.is_ok() { StepResult::Ok } else { StepResult::Io };
        self.push(Event::CopyDone { ticket, result });
    }

    /// What copying pages to a device comes to; nothing: there is nothing to copy from any more.
    fn step_result(&mut self, copied: Option<Result<(), HookError>>, region: RegionId, pages: Pages) -> StepResult {
        match copied {
            None => StepResult::Gone,
            Some(Ok(())) => StepResult::Ok,
            Some(Err(error)) => {
                tracing::warn!(%error, region = region.0, first_page = pages.first, "Copying pages to the device failed");
                self.note_failure(region, pages, format!("Copying pages to the device failed: {error}"));
                StepResult::Io
            }
        }
    }

    /// Why a copy will not be made.
    fn note_copy_failure(&mut self, deferred: &Deferred, why: &str) {
        let why = format!("A copy of device {} failed: {why}", deferred.device);
        match deferred.copy {
            Copy::Out { region, pages, .. }
            | Copy::Home { region, pages, .. }
            | Copy::HomeHuge { region, pages, .. }
            | Copy::Staged { region, pages, .. } => self.note_failure(region, pages, why),
            Copy::Across { ticket, .. } | Copy::Bounced { ticket, .. } | Copy::Zero { ticket, .. } => {
                self.note_failure_of(ticket, why);
            }
        }
    }

    /// The system has no page for what comes home: somebody has ordered that.
    fn no_system_pages(&mut self, region: RegionId, pages: Pages) -> bool {
        self.injected((region, pages), FaultPoint::SystemPages, StepResult::Ok) != StepResult::Ok
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

    fn zero_done(&mut self, ticket: Ticket, scrub: bool, result: StepResult) {
        if !scrub {
            return self.push(Event::ZeroDone { ticket, result });
        }
        if let Some(result) = self.scrubs_begun.ended(ticket, result) {
            self.push(Event::ScrubDone { ticket, result });
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
                Copy::Zero { ticket, scrub, .. } => self.zero_done(ticket, scrub, StepResult::Io),
                Copy::Staged { ticket, pages, run, .. } => self.staged_done(ticket, pages, run, false),
                Copy::Across { ticket, .. } => self.push(Event::CopyDone { ticket, result: StepResult::Io }),
                Copy::Bounced { ticket, buffer, .. } => self.bounced(ticket, buffer, false),
            }
        }
    }

    /// `false`: not now.
    fn submit_copy(&mut self, deferred: Deferred) -> bool {
        let (op, frame, count, staged) = order_of(deferred.copy);
        let Some(engine) = self.engine(deferred.device) else { return false };
        let staging_page = match staged.then(|| engine.take_staging(count)) {
            Some(None) => return false,
            Some(Some(page)) => page,
            None => 0,
        };
        let staged_count = if staged { count } else { 0 };
        if !self.put_into_staging(deferred, staging_page) {
            if let Some(engine) = self.engine(deferred.device) {
                engine.give_staging(staging_page, staged_count);
            }
            return true;
        }
        let id = self.next_engine_job;
        let job = EngineJob { ticket: id, op, staging_page, count: staged_count };
        let Some(engine) = self.engine(deferred.device) else { return false };
        let submitted = engine.submit(job, frame, count);
        if !matches!(submitted, Ok(true)) {
            engine.give_staging(staging_page, staged_count);
        }
        match submitted {
            Ok(true) => {
                self.next_engine_job += 1;
                self.engine_jobs.insert(id, deferred);
                if let Some((region, pages)) = deferred.copy.region() {
                    self.begin_step(What::Copy, id, region, pages, Place::Device(deferred.device));
                }
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::error!(%error, device = deferred.device, "The driver's copy ring is broken");
                self.fence(deferred.device, "its copy ring is broken");
                false
            }
        }
    }

    fn engine(&mut self, device: u8) -> Option<&mut CopyEngine> {
        self.devices[usize::from(device)].as_mut()?.engine.as_mut()
    }

    /// What a driver shall bring to its device lies in its staging area then. `false`: it cannot, and that has been told.
    fn put_into_staging(&mut self, deferred: Deferred, staging_page: u32) -> bool {
        let to = u64::from(staging_page) * PAGE_SIZE;
        let engine = self.devices[usize::from(deferred.device)].as_ref().and_then(|device| device.engine.as_ref());
        let Some(into) = engine.map(|engine| &engine.staging) else { return false };
        match deferred.copy {
            Copy::Staged { ticket, region, space, pages, staging_page: from, zero: false, run, .. } => {
                let staging =
                    self.spaces.get(&space).and_then(|space| space.agent.as_ref()).map(|agent| &agent.staging);
                let copied =
                    staging.map(|staging| staging.copy_to(from * PAGE_SIZE, into, to, pages.count * PAGE_SIZE));
                let ok = self.step_result(copied, region, pages) == StepResult::Ok;
                if !ok {
                    self.staged_done(ticket, pages, run, false);
                }
                ok
            }
            Copy::Bounced { ticket, buffer, count, .. } => {
                let len = u64::from(count) * PAGE_SIZE;
                let ok = self.bounces.get(&buffer).is_some_and(|from| from.copy_to(0, into, to, len).is_ok());
                if !ok {
                    self.note_failure_of(ticket, NOT_BOUNCED);
                    self.bounced(ticket, buffer, false);
                }
                ok
            }
            Copy::Out { ticket, region, pages, .. } => {
                let memory = self.regions.get(region.0).and_then(|target| target.memory.as_ref());
                let copied = memory.map(|memory| {
                    let len = pages.count * PAGE_SIZE;
                    memfd::read_to_window(memory.fd.as_fd(), pages.first * PAGE_SIZE, into, to, len)
                });
                let result = self.step_result(copied, region, pages);
                if result != StepResult::Ok {
                    self.push(Event::CopyDone { ticket, result });
                }
                result == StepResult::Ok
            }
            _ => true,
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
        self.end_step(What::Copy, job.ticket, ok);
        let result = if ok { StepResult::Ok } else { StepResult::Io };
        if !ok {
            self.note_copy_failure(&deferred, "its driver's copy engine has failed it: see the driver's log");
        }
        let result = match deferred.copy {
            Copy::Out { region, pages, .. } | Copy::Staged { region, pages, .. } => {
                self.injected((region, pages), FaultPoint::CopyOut, result)
            }
            Copy::Home { region, pages, .. } | Copy::HomeHuge { region, pages, .. } => {
                self.injected((region, pages), FaultPoint::CopyHome, result)
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
            Copy::Zero { ticket, scrub, .. } => self.zero_done(ticket, scrub, result),
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
        if self.no_system_pages(region, pages) {
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

/// What a driver is asked for a copy: operation, frames, and whether they go through its staging area.
fn order_of(copy: Copy) -> (CopyOp, u32, u32, bool) {
    match copy {
        Copy::Out { frame, pages, .. } => (CopyOp::CopyIn, frame, pages.count as u32, true),
        Copy::Home { frame, pages, .. } | Copy::HomeHuge { frame, pages, .. } => {
            (CopyOp::CopyOut, frame, pages.count as u32, true)
        }
        Copy::Zero { frame, count, .. } => (CopyOp::Scrub, frame, count, false),
        Copy::Staged { frame, pages, zero: true, .. } => (CopyOp::Scrub, frame, pages.count as u32, false),
        Copy::Staged { frame, pages, .. } => (CopyOp::CopyIn, frame, pages.count as u32, true),
        Copy::Across { from_frame, count, .. } => (CopyOp::CopyOut, from_frame, count, true),
        Copy::Bounced { frame, count, .. } => (CopyOp::CopyIn, frame, count, true),
    }
}
