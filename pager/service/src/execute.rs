//! Carrying out what the core decides: with `copies`, every system call of the pager's data path.
//!
//! Actions of one decision run in order. Those with a ticket end in exactly one event for the core: at once, or later when a
//! driver or the mirror has to act (`CopyOut`, `Fill`, `Scrub`, `ZeroFrames` without an aperture; `Revoke` by message).

use std::os::fd::AsFd;

use uhmm_kernel_hook::uffd::{Userfaultfd, WpOutcome};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{Action, DeviceId, Entry, EntryRun, Event, Pages, RegionId, ReqId, StepResult, Ticket};

use crate::copies::{Copy, Deferred};
use crate::fill::FillFrom;
use crate::service::Pager;
use crate::space::Segment;

impl Pager {
    /// Runs the decisions of the core until there are none left.
    pub(crate) fn drain(&mut self) {
        while let Some(event) = self.events.pop_front() {
            let event = match self.core.first(&event) {
                Some(first) => {
                    self.events.push_front(event);
                    first
                }
                None => event,
            };
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
                if !on && result == StepResult::Ok {
                    self.note_served(region, pages, false);
                }
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
            Action::PoisonLost { ticket, region, pages } => {
                let result = self.poison_now(region, pages);
                self.push(Event::PoisonDone { ticket, result });
            }
            Action::Revoke { ticket, region, pages, devices } => self.revoke(ticket, region, pages, devices),
            Action::MapCpu { ticket, region, pages, device, frame } => {
                self.map_cpu(ticket, region, pages, device.0, frame);
            }
            Action::CopyOut { ticket, region, pages, device, frame, keep, req } if self.is_private(region) => {
                self.log_copy(req, region, pages, device);
                self.note_rest(ticket, req, keep);
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
            Action::Trace { kind, cause, req, region, pages, from, to } => {
                self.trace(kind, cause, req, region, pages, from, to);
            }
            Action::CopyOut { ticket, region, pages, device, frame, req, .. } => {
                self.log_copy(req, region, pages, device);
                self.start_copy(Deferred { device: device.0, copy: Copy::Out { ticket, region, pages, frame } });
            }
            Action::Fill { ticket, region, pages, device, frame } => {
                self.start_copy(Deferred { device: device.0, copy: Copy::Home { ticket, region, pages, frame } });
            }
            Action::ZeroFrames { ticket, device, frame, count } => {
                let copy = Copy::Zero { ticket, frame, count, scrub: false };
                self.start_copy(Deferred { device: device.0, copy });
            }
            Action::Scrub { ticket, device, runs } => self.scrub(ticket, device, &runs),
            Action::ZeroFill { ticket, region, pages } => {
                let (done_pages, stop) = self.fill(region, pages, FillFrom::Zeros);
                self.push(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Continue { ticket, region, pages } if self.is_private(region) => {
                self.private_probe(ticket, region, pages);
            }
            Action::Continue { ticket, region, pages } => {
                let (done_pages, stop) = self.fill(region, pages, FillFrom::PageCache);
                self.push(Event::CpuFillDone { ticket, done_pages, stop });
            }
            Action::Reply { req, outcome } => self.answer_request(req, outcome),
            Action::DropRegion { region } => self.drop_region(region),
        }
    }

    pub(crate) fn push(&mut self, event: Event) {
        let freed = if let Event::RegionFree { region, .. } = event { Some(region) } else { None };
        self.events.push_back(event);
        // The core is told first: what rests is not wanted back any more.
        if let Some(region) = freed {
            self.end_rest_of_region(region);
        }
    }

    /// The client's request id, at the place where its bytes move.
    fn log_copy(&self, req: ReqId, region: RegionId, pages: Pages, device: DeviceId) {
        let trace = self.requests.get(&req).map_or(0, |request| request.trace.0);
        let (region, first_page, page_count) = (region.0, pages.first, pages.count);
        tracing::debug!(request = trace, region, first_page, page_count, device = device.0, "Copy to the device");
    }

    fn publish(&mut self, region: RegionId, first: u64, entries: EntryRun) {
        let RegionId(region) = region;
        let Some(known) = self.regions.get(region) else { return };
        if let Err(error) = known.directory.publish(first, entries) {
            tracing::error!(%error, region, first, "A directory cannot be written");
        }
        self.note_published(RegionId(region), first, entries);
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
                    self.note_failure(region, pages, format!("Protecting pages failed: {error}"));
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
            Ok(()) => {
                self.forget_protection(region, pages);
                StepResult::Ok
            }
            Err(error) => {
                tracing::warn!(%error, region = region.0, "Punching system pages failed");
                self.note_failure(region, pages, format!("Giving system pages back failed: {error}"));
                StepResult::Io
            }
        }
    }

    /// Where a protected page was, Linux keeps a mark in the page table, and MADV_GUARD_INSTALL tries for ever to get rid of it.
    fn forget_protection(&mut self, region: RegionId, pages: Pages) {
        let outcomes = self.everywhere(region, pages, |uffd, range| uffd.write_protect(range, false, true));
        if outcomes.iter().any(|outcome| matches!(outcome, Ok(WpOutcome::Again))) {
            self.note_again(region);
            self.marks_due.push((region, pages));
        }
    }

    /// Events have been read: marks of pages that are on a device still.
    pub(crate) fn forget_protection_that_is_due(&mut self) {
        for (region, pages) in std::mem::take(&mut self.marks_due) {
            for page in pages.iter() {
                let raw = self.regions.get(region.0).map_or(0, |region| region.directory.load(page));
                if Entry::decode(raw).is_ok_and(Entry::lives_on_device) {
                    self.forget_protection(region, Pages::one(page));
                }
            }
        }
    }

    pub(crate) fn wake(&mut self, region: RegionId, pages: Pages) {
        self.note_woken(region, pages);
        for error in self.everywhere(region, pages, |uffd, range| uffd.wake(range)).into_iter().filter_map(Result::err)
        {
            tracing::debug!(%error, region = region.0, "Wake failed");
        }
    }

    /// An answer of EAGAIN means that an event of the space is unread: read on before anything is tried again.
    pub(crate) fn note_again(&mut self, region: RegionId) {
        let all = self.all_pages(region.0);
        let spaces: Vec<u64> = self.regions.showing(region.0, all).map(|(segment, _)| segment.space).collect();
        self.reread.extend(spaces);
    }

    fn scrub(&mut self, ticket: Ticket, device: DeviceId, runs: &[(u32, u32)]) {
        if runs.is_empty() {
            return self.push(Event::ScrubDone { ticket, result: StepResult::Ok });
        }
        self.scrubs_begun.begin(ticket, runs.len());
        for (frame, count) in runs {
            let copy = Copy::Zero { ticket, frame: *frame, count: *count, scrub: true };
            self.scrubs.push_back(Deferred { device: device.0, copy });
        }
    }
}
