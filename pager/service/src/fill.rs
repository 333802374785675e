//! Pages are put in place for the CPU: UFFDIO_COPY, UFFDIO_ZEROPAGE and UFFDIO_CONTINUE through a mapping that shows them.
//!
//! ```text
//!   pages -- a segment shows the first -- in front: guards? --> private: their content is gone (Dropped)
//!                |                                              shared: the bytes go to the memfd, the guards stay
//!                `-- up to the next guard --> one call --ENOENT--> a mapping ends inside: up to there
//!                                                            `--> nothing of ours: the segment ends, another one or Dropped
//! ```
//! The program may have split its mapping at any page and at any time (advice, mprotect, mlock), and one call fills within one
//! mapping only. That is tried first and looked up when it fails: the kernel is asked, see `kernel_view`.

use std::os::fd::AsFd;

use uhmm_kernel_hook::uffd::{CopyMode, FillOutcome, FillStop as HookStop, Userfaultfd};
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{AddrRange, HookError, PAGE_SIZE, memfd};
use uhmm_kit::record::What;
use uhmm_pager_core::{Backing, FillStop, Pages, RegionId, StepResult};

use crate::kernel_view::{Ended, Front};
use crate::service::Pager;
use crate::space::{Phase, Segment};

/// What pages are filled with.
#[derive(Clone, Copy)]
pub(crate) enum FillFrom<'a> {
    /// The bytes of a window, from an offset on.
    Bytes(&'a Window, u64),
    /// Nothing has ever been written.
    Zeros,
    /// The memfd has them.
    PageCache,
}

impl FillFrom<'_> {
    /// `done_bytes`: what was filled before.
    fn put(self, uffd: &Userfaultfd, range: AddrRange, done_bytes: u64) -> Result<FillOutcome, HookError> {
        match self {
            Self::Bytes(window, offset) => {
                uffd.copy(range.start, window, offset + done_bytes, range.len, CopyMode::default())
            }
            Self::Zeros => uffd.zeropage(range, false),
            Self::PageCache => uffd.cont(range, false, false),
        }
    }

    /// Other mappings of the same memory are served by the way: whose fault it was is not known any more.
    fn serves_others(self) -> bool {
        !matches!(self, Self::Bytes(..))
    }
}

/// A part of a fill: some pages where one segment shows them.
#[derive(Clone, Copy)]
struct Place {
    segment: u64,
    space: u64,
    pages: Pages,
    addr: u64,
}

impl Place {
    fn of(segment: &Segment, pages: Pages) -> Self {
        Self { segment: segment.id, space: segment.space, pages, addr: segment.addr_of(pages.first) }
    }

    fn first(self, count: u64) -> Self {
        Self { pages: Pages { count, ..self.pages }, ..self }
    }

    fn after(self, count: u64) -> Self {
        Self { pages: self.pages.after(count), addr: self.addr + count * PAGE_SIZE, ..self }
    }

    fn range(self) -> AddrRange {
        AddrRange { start: self.addr, len: self.pages.count * PAGE_SIZE }
    }
}

impl Pager {
    /// Fills pages in order. Stops at the first page that cannot be filled.
    pub(crate) fn fill(&mut self, region: RegionId, pages: Pages, from: FillFrom<'_>) -> (u64, Option<FillStop>) {
        let mut done = 0;
        // Segments whose process is gone: after a fork another may show the pages.
        let mut gone: Vec<u64> = Vec::new();
        while done < pages.count {
            let left = pages.after(done);
            let fits = |(segment, part): &(&Segment, Pages)| part.first == left.first && !gone.contains(&segment.id);
            let shown = self.regions.showing(region.0, left).find(fits);
            let Some(place) = shown.map(|(segment, part)| Place::of(segment, part)) else {
                return (done, Some(self.nothing_shows(region, left)));
            };
            let place = match self.in_front(place.space, region, place.pages, place.range()) {
                Front::Clear(count) => place.first(count),
                Front::Guards(count) => match self.fill_under_guards(region, place.first(count), from, done) {
                    None => {
                        self.note_served(region, Pages { count, ..left }, false);
                        done += count;
                        continue;
                    }
                    stop => return (done, stop),
                },
            };
            let (filled, stop) = self.fill_place(region, place, from, done);
            self.note_served(region, Pages { count: filled, ..left }, false);
            done += filled;
            let ended = self.regions.segment(place.segment).is_none();
            if filled == 0 && (ended || matches!(stop, Some(FillStop::Gone | FillStop::NoProcess))) {
                gone.push(place.segment);
                let another =
                    |(segment, part): (&Segment, Pages)| part.contains(left.first) && !gone.contains(&segment.id);
                if ended || self.regions.showing(region.0, left).any(another) {
                    continue;
                }
            }
            if stop.is_some() {
                return (done, stop);
            }
        }
        (done, None)
    }

    /// Nothing shows the first of some pages: nobody can ever see them, nor those up to the next one that is shown.
    fn nothing_shows(&self, region: RegionId, pages: Pages) -> FillStop {
        let Some(known) = self.regions.get(region.0) else { return FillStop::NoProcess };
        if known.phase != Phase::Live {
            return FillStop::Gone;
        }
        let next = self.regions.showing(region.0, pages).map(|(_, part)| part.first).min();
        FillStop::Dropped { page_count: next.unwrap_or(pages.end()) - pages.first }
    }

    /// One segment's part, mapping by mapping.
    fn fill_place(
        &mut self,
        region: RegionId,
        place: Place,
        from: FillFrom<'_>,
        done_before: u64,
    ) -> (u64, Option<FillStop>) {
        let mut count = place.pages.count;
        loop {
            let now = place.first(count);
            let (filled, stop) = self.fill_once(region, now, from, done_before);
            if filled > 0 || stop != Some(FillStop::Gone) {
                // A fill up to a border is no reason to stop.
                return (filled, stop);
            }
            match self.mapping_end(now) {
                Some(shorter) => count = shorter,
                // Not a border: there is no such place.
                None => return (0, Some(self.place_is_gone(now))),
            }
        }
    }

    /// How many pages of a place lie in the mapping of the first one, if that is not all of them; half, where the kernel cannot be asked.
    fn mapping_end(&self, place: Place) -> Option<u64> {
        if place.pages.count == 1 {
            return None;
        }
        let Some(vmas) = self.vmas(place.space, place.range()) else { return Some(place.pages.count / 2) };
        let end = vmas.first().filter(|vma| vma.start <= place.addr)?.end;
        Some((end - place.addr) / PAGE_SIZE).filter(|count| *count < place.pages.count)
    }

    fn place_is_gone(&mut self, place: Place) -> FillStop {
        match self.end_what_is_gone(place.space, place.range(), false) {
            Ended::Yes => FillStop::Gone,
            Ended::NotYet => FillStop::Again,
        }
    }

    fn fill_once(
        &mut self,
        region: RegionId,
        place: Place,
        from: FillFrom<'_>,
        done_before: u64,
    ) -> (u64, Option<FillStop>) {
        let Some(space) = self.spaces.get(&place.space) else { return (0, Some(FillStop::NoProcess)) };
        let outcome = from.put(&space.uffd, place.range(), done_before * PAGE_SIZE);
        let shows_too =
            |(segment, part): &(&Segment, Pages)| segment.id != place.segment && part.first == place.pages.first;
        let mut served = 0;
        for (other, shown) in self.regions.showing(region.0, place.pages).filter(shows_too) {
            let Some(space) = self.spaces.get(&other.space) else { continue };
            let range = AddrRange { start: other.addr_of(shown.first), len: shown.count * PAGE_SIZE };
            if let Ok(outcome) = space.uffd.cont(range, false, false) {
                served = served.max(outcome.done_bytes / PAGE_SIZE);
            }
        }
        let (filled, stop) = self.interpret(region, place.pages, outcome);
        if filled == 0 && stop == Some(FillStop::Exists) && served > 0 && from.serves_others() {
            return (served, None);
        }
        (filled, stop)
    }

    /// Nothing may take a guard's place. Private content went when the guard came; shared content belongs to the memfd, which
    /// gets the bytes itself: whoever removes the guard finds them there.
    fn fill_under_guards(
        &mut self,
        region: RegionId,
        place: Place,
        from: FillFrom<'_>,
        done_before: u64,
    ) -> Option<FillStop> {
        let shared = self.regions.get(region.0).filter(|region| region.backing == Backing::Shared);
        let Some(memory) = shared.and_then(|region| region.memory.as_ref()) else {
            return Some(FillStop::Dropped { page_count: place.pages.count });
        };
        let FillFrom::Bytes(window, offset) = from else { return None };
        for (index, page) in place.pages.iter().enumerate() {
            let (to, at) = (page * PAGE_SIZE, offset + (done_before + index as u64) * PAGE_SIZE);
            let written = match memfd::has_page(memory.fd.as_fd(), to) {
                // Newer than what the device has, as everywhere.
                Ok(true) => Ok(()),
                Ok(false) => memfd::write_from_window(memory.fd.as_fd(), to, window, at, PAGE_SIZE),
                Err(error) => Err(error),
            };
            if let Err(error) = written {
                tracing::warn!(%error, region = region.0, page, "A page behind a guard cannot be written");
                self.note_failure(
                    region,
                    Pages::one(page),
                    format!("Bringing a page home behind a guard failed: {error}"),
                );
                return Some(FillStop::Io);
            }
        }
        None
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
                self.note_failure(region, pages, format!("Bringing pages home failed: {error}"));
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
            // The client's memory limit is reached: the pages stay where they are.
            HookStop::NoMemory => FillStop::NoMemory,
            HookStop::Busy => FillStop::Again,
            HookStop::Other(errno) => {
                tracing::warn!(errno, region = region.0, first_page = pages.first, "Filling pages failed");
                let error = std::io::Error::from_raw_os_error(errno);
                self.note_failure(region, pages, format!("Bringing pages home failed: {error}"));
                FillStop::Io
            }
        });
        self.note_room(region, outcome.done_bytes > 0, stop == Some(FillStop::NoMemory));
        (outcome.done_bytes / PAGE_SIZE, stop)
    }

    /// Once a time that a client is full, however often it is tried.
    pub(crate) fn note_room(&mut self, region: RegionId, filled: bool, full: bool) {
        if self.without_memory.is_empty() && !full {
            return;
        }
        let space_id = self.regions.get(region.0).map_or(0, |region| region.space);
        let pid = self.spaces.get(&space_id).map_or(0, |space| space.state.pid);
        if full && !filled && self.without_memory.insert(space_id) {
            tracing::warn!(
                space = space_id,
                pid,
                "The process may have no more memory (the limit of its control group): its pages stay where they are, and who touches them waits until there is room"
            );
        } else if filled && !full && self.without_memory.remove(&space_id) {
            tracing::info!(space = space_id, pid, "The process has room for its pages again");
        }
    }

    /// Touches of what is not there raise SIGBUS from now on, through every mapping; what cannot be done before events are read is done then.
    pub(crate) fn poison(&mut self, region: RegionId, pages: Pages) {
        if self.poison_now(region, pages) == StepResult::Again {
            self.poisons_due.push((region, pages));
        }
    }

    /// `Ok`: nobody can touch any more of these pages than what is there.
    pub(crate) fn poison_now(&mut self, region: RegionId, pages: Pages) -> StepResult {
        if self.is_recovering {
            self.note_again(region);
            return StepResult::Again;
        }
        let places: Vec<Place> =
            self.regions.showing(region.0, pages).map(|(segment, part)| Place::of(segment, part)).collect();
        let (mut page_count, mut result) = (0, StepResult::Ok);
        for place in places {
            let (poisoned, ended) = self.poison_place(region, place);
            page_count += poisoned;
            result = if result == StepResult::Ok { ended } else { result };
        }
        // Where a page is it is the valid one, and a process that is gone misses none.
        if page_count > 0 {
            tracing::error!(region = region.0, first_page = pages.first, page_count, "Pages are poisoned");
            let event = self.event_at(What::PagesLost, region, pages);
            self.service.record.event(&event);
        }
        result
    }

    /// Page by page where some are there, mapping by mapping. Returns how many were poisoned now.
    fn poison_place(&mut self, region: RegionId, mut left: Place) -> (u64, StepResult) {
        let (mut count, mut poisoned) = (left.pages.count, 0);
        while left.pages.count > 0 {
            let now = left.first(count.min(left.pages.count));
            let Some(space) = self.spaces.get(&now.space) else { break };
            let outcome = match space.uffd.poison(now.range()) {
                Ok(outcome) => outcome,
                Err(error) => {
                    tracing::warn!(%error, region = region.0, "Poisoning failed");
                    return (poisoned, StepResult::Later);
                }
            };
            let done = outcome.done_bytes / PAGE_SIZE;
            poisoned += done;
            let skipped = match outcome.stop {
                None => 0,
                Some(HookStop::Exists) => 1,
                Some(HookStop::Again) if done > 0 => 0,
                Some(HookStop::Again) => {
                    self.note_again(region);
                    return (poisoned, StepResult::Again);
                }
                Some(HookStop::NoMemory) => {
                    self.note_room(region, false, true);
                    return (poisoned, StepResult::Later);
                }
                Some(HookStop::Gone) => match self.mapping_end(now) {
                    Some(shorter) => {
                        count = shorter;
                        continue;
                    }
                    // Nothing of ours is there.
                    None => 1,
                },
                Some(HookStop::NoProcess) => break,
                Some(stop) => {
                    tracing::warn!(?stop, region = region.0, "Poisoning failed");
                    return (poisoned, StepResult::Later);
                }
            };
            left = left.after(done + skipped);
            count = left.pages.count;
        }
        (poisoned, StepResult::Ok)
    }

    /// Before faults are served: what could not be poisoned while events were unread.
    pub(crate) fn poison_what_is_due(&mut self) {
        for (region, pages) in std::mem::take(&mut self.poisons_due) {
            self.poison(region, pages);
        }
    }
}
