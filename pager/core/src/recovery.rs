//! After a crash: what the directories say is what is. Nothing else is known, and nothing else is needed.
//!
//! ```text
//!   MovingOut     the system copy is valid        publish System, unprotect, wake
//!   Device        the system pages must be gone   punch (again), claim the frame
//!   MovingHome    the fill may have happened      claim the frame, revoke, fill; Exists: the system page is newer;
//!                                                 fill impossible: probe for the system page
//!   any other     settled                         -
//! ```
//!
//! Frames are claimed when their device logs in, because only then its size is known.

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{DEVICE_COUNT_MAX, Entry, PageState, PoisonReason};
use crate::event::{Action, DeviceId, Directory, Pages, RegionId};
use crate::frames::{FrameTable, Owner};
use crate::policy::Policy;

/// A page that a dead pager left on its way home.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Homecoming {
    region: RegionId,
    page: u64,
    entry: Entry,
    /// The frame holds nothing any more.
    lost: bool,
}

impl Homecoming {
    /// What the page `offset` further on would be if it belonged to the same run.
    fn plus(self, offset: usize) -> Self {
        let frames = if self.lost { 0 } else { offset as u32 };
        Self { page: self.page + offset as u64, entry: self.entry.plus_frames(frames), ..self }
    }
}

impl<P: Policy> Core<P> {
    /// One region of the vault.
    pub(crate) fn recover_region(&mut self, dir: &impl Directory, region: RegionId, out: &mut Vec<Action>) {
        let all = Pages { first: 0, count: dir.page_count(region) };
        let mut left = all;
        while left.count > 0 {
            let first = Self::entry(dir, region, left.first);
            let run = Self::run_while(dir, region, left, |_, entry| {
                entry.state() == first.state() && (!entry.is_moving() || entry.mapped_mask() == first.mapped_mask())
            });
            match first.state() {
                PageState::MovingOut => {
                    let back = Entry::SYSTEM.with_mapped_mask(first.mapped_mask());
                    Self::publish_same(region, run, back, out);
                    self.stats.recovered_transfers += 1;
                }
                PageState::Device => {
                    self.punch_again(region, run, out);
                }
                PageState::Poisoned => self.recover_poisoned(dir, region, run, out),
                _ => {}
            }
            left = left.after(run.count.max(1));
        }
        // Whatever was protected is writable again, and every fault that the dead pager had read is raised anew.
        let mut left = all;
        while left.count > 0 {
            let at_home = |entry: Entry| entry.is_settled_system() || entry.state() == PageState::MovingOut;
            let here = at_home(Self::entry(dir, region, left.first));
            let run = Self::run_while(dir, region, left, |_, entry| at_home(entry) == here);
            if here {
                self.unprotect(region, run, out);
            } else {
                out.push(Action::Wake { region, pages: run });
            }
            left = left.after(run.count);
        }
    }

    fn recover_poisoned(&mut self, dir: &impl Directory, region: RegionId, run: Pages, out: &mut Vec<Action>) {
        for page in run.iter().filter(|page| Entry::decode(dir.load(region, *page)).is_err()) {
            self.stats.poisoned += 1;
            Self::publish_same(region, Pages::one(page), Entry::poisoned(PoisonReason::BadEntry), out);
        }
        out.push(Action::Poison { region, pages: run });
    }

    /// A driver logged in.
    #[allow(clippy::too_many_arguments, reason = "the event's own fields")]
    pub(crate) fn device_up(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        frame_count: u32,
        fresh_mappings: bool,
        memory_known: bool,
        memory_lost: bool,
        out: &mut Vec<Action>,
    ) {
        if device.0 >= DEVICE_COUNT_MAX {
            return;
        }
        let was_failed = self.is_failed(device);
        self.failed_mask &= !(1 << device.0);
        let known = self.frames[usize::from(device.0)].as_ref().map(FrameTable::frame_count);
        let has_old_bytes = memory_known && !memory_lost;
        // A device of another size, or one that was given up, holds no page that anybody still counts on.
        let lost = memory_lost || was_failed || known.is_some_and(|known| known != frame_count);
        if known.is_none() || lost {
            self.rebuild_frames(dir, device, frame_count, has_old_bytes, lost, fresh_mappings, out);
        } else if fresh_mappings {
            self.clear_mapped(dir, device, out);
        }
        self.unblock_all();
    }

    #[allow(clippy::too_many_arguments, reason = "the event's own fields")]
    fn rebuild_frames(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        frame_count: u32,
        has_old_bytes: bool,
        memory_lost: bool,
        fresh_mappings: bool,
        out: &mut Vec<Action>,
    ) {
        let mut table = FrameTable::new(frame_count);
        self.forget_scrubs(device);
        if memory_lost {
            self.mark_lost(device);
        }
        // A CPU fault may have come before the device: those pages are on their way already.
        let leaving = self.leaving(device);
        if !has_old_bytes {
            table.mark_all_clean();
        }
        let bit = 1u8 << device.0;
        let regions: Vec<_> = self.regions.iter().map(|(id, info)| (*id, info.space, info.page_count)).collect();
        let mut homecomings = Vec::new();
        for (region, space, page_count) in regions {
            for page in 0..page_count {
                let entry = Self::entry(dir, region, page);
                let mine = entry.owns_frame() && entry.device() == device;
                let lost = mine && (memory_lost || !table.claim(entry.frame(), Owner { region, page }, space));
                let cleared = if fresh_mappings { entry.with_mapped_mask(entry.mapped_mask() & !bit) } else { entry };
                if mine && entry.state() == PageState::MovingHome {
                    let entry = if lost { cleared.without_frame() } else { cleared };
                    if lost {
                        Self::publish_same(region, Pages::one(page), entry, out);
                    }
                    if !leaving.iter().any(|(of, pages)| *of == region && pages.contains(page)) {
                        homecomings.push(Homecoming { region, page, entry, lost });
                    }
                } else if lost {
                    self.poison(region, Pages::one(page), out);
                } else if cleared != entry {
                    Self::publish_same(region, Pages::one(page), cleared, out);
                }
            }
        }
        if has_old_bytes {
            self.note_unknown(device);
        }
        self.frames[usize::from(device.0)] = Some(table);
        self.finish_homecomings(&homecomings, out);
    }

    /// Transfers that a dead pager had begun: consecutive pages in consecutive frames go on together.
    fn finish_homecomings(&mut self, pages: &[Homecoming], out: &mut Vec<Action>) {
        let mut rest = pages;
        while let Some(first) = rest.first().copied() {
            let limit = rest.iter().take(CHUNK_PAGES as usize);
            let count = limit.enumerate().take_while(|(offset, next)| **next == first.plus(*offset)).count();
            rest = &rest[count..];
            let Homecoming { region, page, entry, lost } = first;
            // What dies is not brought home: the teardown takes the frames.
            if !self.is_dying(region) {
                let run = Pages { first: page, count: count as u64 };
                self.continue_home(region, run, entry, true, lost, None, out);
            }
        }
    }

    /// The device's process is dead: it maps nothing any more. Pages on the move clear their own bits when they arrive.
    pub(crate) fn clear_mapped(&mut self, dir: &impl Directory, device: DeviceId, out: &mut Vec<Action>) {
        let bit = 1u8.checked_shl(u32::from(device.0)).unwrap_or(0);
        let regions: Vec<_> = self.regions.iter().map(|(id, info)| (*id, info.page_count)).collect();
        for (region, page_count) in regions {
            for page in 0..page_count {
                let entry = Self::entry(dir, region, page);
                if entry.mapped_mask() & bit != 0 && !entry.is_moving() {
                    let cleared = entry.with_mapped_mask(entry.mapped_mask() & !bit);
                    Self::publish_same(region, Pages::one(page), cleared, out);
                }
            }
        }
    }

    /// The device will not return and nobody else reaches its memory.
    pub(crate) fn device_failed(&mut self, dir: &impl Directory, device: DeviceId, out: &mut Vec<Action>) {
        if device.0 >= DEVICE_COUNT_MAX {
            return;
        }
        self.failed_mask |= 1 << device.0;
        let regions: Vec<_> = self.regions.iter().map(|(id, info)| (*id, info.page_count)).collect();
        let mut orphans = Vec::new();
        for (region, page_count) in regions {
            for page in 0..page_count {
                let entry = Self::entry(dir, region, page);
                if entry.state() == PageState::Device && entry.device() == device {
                    self.poison(region, Pages::one(page), out);
                    self.release(device, entry.frame(), 1);
                } else if entry.state() == PageState::MovingHome && entry.device() == device {
                    let mask = entry.mapped_mask() & !(1 << device.0);
                    orphans.push(Homecoming {
                        region,
                        page,
                        entry: entry.with_mapped_mask(mask).without_frame(),
                        lost: true,
                    });
                }
            }
        }
        orphans.retain(|orphan| {
            let in_flight = |t: &crate::transfer::Transfer| t.region == orphan.region && t.pages.contains(orphan.page);
            !self.transfers.values().any(in_flight)
        });
        self.finish_homecomings(&orphans, out);
        self.unblock_all();
    }
}
