//! Carrying out what the core decides: with `copies`, every system call of the pager's data path.
//!
//! Actions of one decision run in order. Those with a ticket end in exactly one event for the core: at once, or later when a
//! driver or the mirror has to act (`CopyOut`, `Fill`, `Scrub`, `ZeroFrames` without an aperture; `Revoke` by message).

use std::os::fd::AsFd;

use uhmm_kernel_hook::uffd::{FillOutcome, FillStop as HookStop, Userfaultfd, WpOutcome};
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd};
use uhmm_pager_core::{Action, DeviceId, Entry, EntryRun, Event, FillStop, Pages, RegionId, ReqId, StepResult, Ticket};

use crate::copies::{Copy, Deferred};
use crate::service::Pager;
use crate::space::Segment;

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
            Action::MapCpu { ticket, region, pages, device, frame } => {
                self.map_cpu(ticket, region, pages, device.0, frame);
            }
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
            let page = first + offset as u64;
            let before = Entry::decode(region.directory.load(page)).unwrap_or(entry);
            region.directory.store(page, before.followed_by(entry).bits());
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
    pub(crate) fn fill(
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

    pub(crate) fn poison(&mut self, region: RegionId, pages: Pages) {
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
}
