//! Private memory: what the kernel does with it on the program's word, and what the client's agent does for the pager.
//!
//! ```text
//!   MADV_DONTNEED, munmap:  told --> until the pager reads it nothing is filled, taken or protected there
//!                             `--> read: holes, and zero is what was "written" last, from this very instant on (`given_up` until the
//!                                  pager has handled it; a pager that dies before that leaves it to the next one)
//!   guards:                 told to nobody; what is in place goes at once, what is elsewhere when a fill meets the guard (`Dropped`)
//!   agent:                  CopyOut takes pages out of the address space into scratch, MoveBack, Punch
//! ```
//! Guards are put where the kernel's word decides: not on pages that are copied just now, nor on read-only copies (docs/kernel-view.md
//! says what nobody can know there).

use super::machine::{PageModel, World};
use crate::{
    Backing, CopyRun, CopyStatus, Core, DefaultPolicy, DeviceId, Entry, Event, FillStop, PageState, Pages, RegionId,
    Ticket,
};

/// What became of a page that was to be taken out, and its bytes.
pub(super) type Taken = (CopyStatus, u64);

impl PageModel {
    /// Nothing is in the address space.
    fn vacate(&mut self) {
        (self.cache, self.mapped) = (None, false);
    }
}

impl World {
    pub(super) fn is_private(&self, region: RegionId) -> bool {
        self.regions.get(&region).is_some_and(|region| region.backing == Backing::Private)
    }

    /// The kernel has something to say about the address space that nobody has read.
    pub(super) fn is_changing(&self, region: RegionId) -> bool {
        let concerns = |event: &Event| match *event {
            Event::Removed { region: of, .. } | Event::Unmapped { region: of, .. } => of == region,
            Event::Forked { parent, .. } => parent == region,
            _ => false,
        };
        self.is_private(region) && self.events.iter().any(concerns)
    }

    /// The pager reads that the program dropped content: the kernel goes on with it.
    pub(super) fn drop_content(&mut self, region: RegionId, pages: Pages) {
        for page in pages.iter().filter(|_| self.is_private(region)).collect::<Vec<_>>() {
            if let Some(model) = self.page(region, page) {
                model.vacate();
                (model.expected, model.given_up, model.met_guard, model.poisoned) = (0, true, None, false);
            }
        }
    }

    /// The pager has handled that.
    pub(super) fn content_is_dropped(&mut self, region: RegionId, pages: Pages) {
        for page in pages.iter() {
            if let Some(model) = self.page(region, page) {
                model.given_up = false;
            }
        }
    }

    /// The program puts guards on pages, or takes them away.
    pub(super) fn guard(&mut self, region: RegionId, pages: Pages, on: bool) {
        for page in pages.iter().filter(|_| self.is_private(region)).collect::<Vec<_>>() {
            let state = self.entry(region, page).state();
            let Some(model) = self.page(region, page) else { continue };
            let decides = match state {
                PageState::Absent | PageState::System | PageState::Device | PageState::Exclusive => true,
                PageState::MovingHome => model.cache.is_none(),
                PageState::MovingOut => model.scratch.is_some(),
                PageState::Duplicated | PageState::Poisoned => false,
            };
            if !on {
                model.guard = false;
            } else if decides && !model.gone {
                model.guard = true;
                if model.cache.is_some() || model.poisoned {
                    model.vacate();
                    (model.expected, model.poisoned) = (0, false);
                }
            }
        }
    }

    /// A fill meets guards: their content is not wanted any more.
    pub(super) fn met_guards(&mut self, region: RegionId, pages: Pages) -> FillStop {
        let mut page_count = 0;
        for page in pages.iter() {
            let Some(model) = self.page(region, page).filter(|model| model.guard) else { break };
            model.met_guard = model.met_guard.or(Some(model.expected));
            model.expected = 0;
            page_count += 1;
        }
        FillStop::Dropped { page_count }
    }

    /// The agent takes pages out, or (`keep`) only reads them.
    pub(super) fn take_out(&mut self, region: RegionId, pages: Pages, keep: bool) -> Vec<Taken> {
        let mut taken = Vec::new();
        for page in pages.iter() {
            let is_pinned = self.rng.chance(self.faults.io);
            let Some(model) = self.page(region, page) else {
                taken.push((CopyStatus::Gone, 0));
                continue;
            };
            // Poison is no hole: the kernel refuses to move it, and to read it.
            let stays = match (model.guard, model.poisoned) {
                (true, _) => Some(CopyStatus::Gone),
                (_, true) => Some(CopyStatus::Io),
                _ => is_pinned.then_some(CopyStatus::Busy),
            };
            if let Some(status) = stays {
                taken.push((status, 0));
                continue;
            }
            let bytes = model.cache.unwrap_or(0);
            if !keep {
                (model.scratch, model.taken) = (model.cache, true);
                model.vacate();
            }
            taken.push((CopyStatus::Ok, bytes));
        }
        taken
    }

    /// What was taken out goes into frames, page by page.
    pub(super) fn taken_to_frames(
        &mut self,
        device: DeviceId,
        frame: u32,
        taken: &[Taken],
        broken: bool,
    ) -> Vec<CopyRun> {
        let mut runs = Vec::new();
        for (offset, (status, bytes)) in taken.iter().enumerate() {
            let mut status = *status;
            if status == CopyStatus::Ok {
                if broken || self.rng.chance(self.faults.io) {
                    status = CopyStatus::Io;
                } else {
                    self.devices[usize::from(device.0)].frames[frame as usize + offset] = *bytes;
                }
            }
            runs.push(CopyRun { count: 1, status });
        }
        runs
    }

    /// The agent puts back what it has taken; what was dropped meanwhile is freed instead.
    pub(super) fn move_back(&mut self, core: &Core<DefaultPolicy>, ticket: Ticket, region: RegionId, pages: Pages) {
        for page in pages.iter() {
            let (_, is_dropped) = core.alike_in_front(ticket, Pages::one(page));
            let Some(model) = self.page(region, page) else { continue };
            model.taken = false;
            let Some(bytes) = model.scratch.take() else { continue };
            if model.guard {
                model.expected = 0;
            } else if !is_dropped {
                (model.cache, model.mapped, model.protected) = (Some(bytes), true, false);
            }
        }
    }

    /// The agent frees what it has taken; of pages that it has not, what is in place.
    pub(super) fn punch_private(&mut self, region: RegionId, pages: Pages) {
        for page in pages.iter() {
            if let Some(model) = self.page(region, page) {
                if !model.taken {
                    model.vacate();
                }
                (model.scratch, model.taken) = (None, false);
            }
        }
    }

    /// The pager has died, and with it what it knew of scratch. The next one tidies: what no entry says is on its way out is freed.
    pub(super) fn tidy_scratch(&mut self) {
        for region in self.regions.values_mut() {
            for (model, bits) in region.pages.iter_mut().zip(&region.directory) {
                let entry = Entry::decode(*bits).unwrap_or(Entry::ABSENT);
                model.taken = false;
                if entry.state() != PageState::MovingOut {
                    model.scratch = None;
                }
                // Nobody knows any more that the guard was met.
                if let Some(before) = model.met_guard.take()
                    && entry.state() == PageState::MovingHome
                    && !entry.discarded()
                {
                    model.expected = before;
                }
            }
        }
    }
}
