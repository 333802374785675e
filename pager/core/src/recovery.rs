//! After a crash: what the directories say is what is. Nothing else is known, and nothing else is needed. Which pages' turn it is:
//! [`crate::recovering`].
//!
//! ```text
//!   MovingOut     the system copy is valid        publish System, unprotect, wake; private: MoveBack first; a forked child's that
//!                                                 waited for its parent's: poison, where no page is
//!   discarded     nobody wants the content        MovingOut: what was taken out is freed instead of moved back;
//!                                                 with a frame: dropped as soon as the frame is claimed
//!   Device        the system pages must be gone   punch (again), claim the frame; private: only what is known to be there still, so
//!                                                 that faults on all others are answered at once
//!   MovingHome    the fill may have happened      claim the frame, revoke, fill; Exists: the system page is newer;
//!                                                 fill impossible: probe for the system page
//!   any other     settled                         -
//! ```
//!
//! Frames are claimed when their device logs in (`walk`), because only then its size is known.

use crate::core::Core;
use crate::entry::{DEVICE_COUNT_MAX, Entry, PageState, PoisonReason};
use crate::event::{Action, Backing, DeviceId, Directory, PageStatus, Pages, RegionId};
use crate::frames::FrameTable;
use crate::policy::Policy;
use crate::transfer::{Kind, Phase, Transfer};

/// A page that a dead pager left on its way home.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Homecoming {
    pub region: RegionId,
    pub page: u64,
    pub entry: Entry,
    /// The frame holds nothing any more.
    pub lost: bool,
}

impl Homecoming {
    /// What the page `offset` further on would be if it belonged to the same run.
    pub fn plus(self, offset: usize) -> Self {
        let frames = if self.lost { 0 } else { offset as u32 };
        Self { page: self.page + offset as u64, entry: self.entry.plus_frames(frames), ..self }
    }
}

impl<P: Policy> Core<P> {
    /// Some pages of a region of the vault.
    pub(crate) fn recover_pages(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        pages: Pages,
        strays: &[Pages],
        out: &mut Vec<Action>,
    ) {
        let private = self.is_private(region);
        // Neighbours that the program may write again, and those that it may only ask for again.
        let mut fates: Vec<(Pages, bool)> = Vec::new();
        let mut left = pages;
        while left.count > 0 {
            let first = Self::entry(dir, region, left.first);
            let wide = self.wide_run(dir, region, left);
            let narrow = |_, entry: Entry| {
                let alike = entry.state() == first.state() && (!entry.is_moving() || entry.shared() == first.shared());
                let alike = alike && entry.discarded() == first.discarded();
                alike && (!entry.is_moving() || entry.mapped_mask() == first.mapped_mask())
            };
            let by_chunks = first.is_moving() || first.state() == PageState::Poisoned || private && !strays.is_empty();
            let run = wide.unwrap_or_else(|| match by_chunks {
                true => Self::run_while(dir, region, left, narrow),
                false => Self::whole_run(dir, region, left, |entry| narrow(0, entry)),
            });
            let run = Pages { count: run.count.max(1), ..run };
            let here = !private && (first.is_settled_system() || first.state() == PageState::MovingOut);
            match fates.last_mut() {
                Some((before, is_here)) if *is_here == here => before.count += run.count,
                _ => fates.push((run, here)),
            }
            match first.state() {
                // What the parent's agent had taken out for it goes back to the parent.
                PageState::MovingOut if first.shared() => self.lost_to_child(region, run, out),
                PageState::MovingOut if private => self.put_back(region, run, first, out),
                PageState::MovingOut => {
                    let back = Entry::SYSTEM.with_mapped_mask(first.mapped_mask());
                    Self::publish_same(region, run, back, out);
                    self.stats.recovered_transfers += 1;
                }
                PageState::Device | PageState::Exclusive if private => {
                    for stray in strays.iter().filter_map(|stray| stray.overlap(run)) {
                        self.punch_again(region, stray, out);
                    }
                }
                PageState::MovingHome if private && !first.discarded() => {
                    for stray in strays.iter().filter_map(|stray| stray.overlap(run)) {
                        self.back_on_device(dir, region, stray, out);
                    }
                }
                PageState::Device | PageState::Exclusive => self.punch_again(region, run, out),
                PageState::Poisoned => self.recover_poisoned(dir, region, run, out),
                _ => {}
            }
            left = left.after(run.count);
        }
        if self.backing(region) == Some(Backing::File) {
            return;
        }
        // Whatever was protected is writable again, and every fault that the dead pager had read is raised anew.
        for (pages, here) in fates {
            if here {
                self.unprotect(region, pages, out);
            } else {
                out.push(Action::Wake { region, pages });
            }
        }
    }

    /// A dead pager had met stray pages on the way home, and they may be taken away at any instant from now on: what its frames hold is
    /// the content still.
    fn back_on_device(&mut self, dir: &impl Directory, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        for page in pages.iter() {
            let entry = Self::entry(dir, region, page).with_state(PageState::Device);
            Self::publish_same(region, Pages::one(page), entry, out);
        }
        self.stats.recovered_transfers += 1;
        self.punch_again(region, pages, out);
    }

    /// A dead pager may have had private pages taken out: where they are only the client's agent knows.
    fn put_back(&mut self, region: RegionId, pages: Pages, first: Entry, out: &mut Vec<Action>) {
        let kind = Kind::Out { zero: false, keep: false };
        let phase = Phase::MoveBack(PageStatus::Busy);
        // `lost`: frames that no entry names are free already.
        let transfer = Transfer { phase, lost: true, ..Transfer::of(region, pages, first, first.mapped_mask(), kind) };
        let ticket = self.begin(transfer, &mut Vec::new());
        self.discard_as_marked(ticket, first);
        self.stats.recovered_transfers += 1;
        out.push(Action::MoveBack { ticket, region, pages });
    }

    fn recover_poisoned(&mut self, dir: &impl Directory, region: RegionId, run: Pages, out: &mut Vec<Action>) {
        for page in run.iter().filter(|page| Entry::decode(dir.load(region, *page)).is_err()) {
            self.stats.poisoned += 1;
            Self::publish_same(region, Pages::one(page), Entry::poisoned(PoisonReason::BadEntry), out);
        }
        let mut left = run;
        while left.count > 0 {
            let mapped = |page| Self::entry(dir, region, page).cpu_mapped();
            let hidden = mapped(left.first);
            let part = Self::run_while(dir, region, left, |_, entry| entry.cpu_mapped() == hidden);
            if hidden {
                self.hide_poisoned(region, part, out);
            } else {
                out.push(Action::Poison { region, pages: part });
            }
            left = left.after(part.count);
        }
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
            self.device_void(dir, device, out);
        }
        self.unblock_all();
    }
}
