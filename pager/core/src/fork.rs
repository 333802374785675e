//! Fork: both processes keep their bytes.
//!
//! The kernel has copied the address space (copy on write) when the event is read. What it cannot copy is what is not there:
//! pages that live on a device. Their frames get a second owner, and devices may only read them until one of the two has gone.
//!
//! ```text
//!   parent's page          child's entry
//!   Absent, System         System (its page tables hold a copy, or a hole that reads as zero)
//!   Duplicated             System
//!   Device, Exclusive      Device shared, and the parent's becomes Device shared
//!   MovingHome             Device shared: nothing of it was filled before the event (fills fail while it is unread)
//!                          since an earlier pager: on its way home too, since a page that is there already wins
//!   discarded              Absent, or a hole
//!   MovingOut, only copied System: it never leaves its place
//!   MovingOut              waits for the parent's transfer: taken out before the fork, or after it? Then home, where a page that
//!                          is there already wins. So does a grandchild, if the child forks meanwhile
//!   lost to a child        lost to its child too: poison is a page table's, and the kernel copied that before it was there
//!   Poisoned               Poisoned
//! ```
//! The parent's device mappings are revoked before the child's faults are served ([`Action::ForkReady`]): what a device writes
//! from then on meets a shared frame, goes home first and gets a frame of its own.

use crate::core::Core;
use crate::entry::{Entry, LOST_FRAME, PageState};
use crate::event::{Action, DeviceId, Directory, Pages, RegionId, SpaceId, StepResult, Ticket};
use crate::frames::Owner;
use crate::policy::Policy;
use crate::transfer::{Kind, Phase, Transfer};

/// What a page of the parent is for the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Nothing,
    Present,
    Shared,
    Waits,
    /// On its way home since an earlier pager: what is in place already is newer than the frame.
    Returns,
    /// The parent itself waits for its own parent's.
    WaitsToo,
    /// The parent itself has waited in vain, and its poison is not there yet.
    LostToo,
    Lost,
}

/// Pages of a child that wait for what becomes of the parent's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkWait {
    pub parent: RegionId,
    pub child: RegionId,
    pub pages: Pages,
}

impl<P: Policy> Core<P> {
    pub(crate) fn forked(
        &mut self,
        dir: &impl Directory,
        parent: RegionId,
        child: RegionId,
        space: SpaceId,
        out: &mut Vec<Action>,
    ) {
        let Some(info) = self.regions.get(&parent).copied() else {
            out.push(Action::ForkReady { region: child });
            return;
        };
        self.add_region(child, space, info.page_count, info.backing);
        let all = Pages { first: 0, count: info.page_count };
        let mut mask = 0;
        let mut left = all;
        while left.count > 0 {
            let run = self.fork_run(dir, parent, child, left, &mut mask, out);
            left = left.after(run);
        }
        let transfer = Transfer { mask, ..Transfer::new(parent, all, Kind::Fork { child, devices: mask }) };
        let ticket = self.begin(transfer, out);
        self.revoke_or(ticket, out, Self::fork_is_done);
    }

    /// See [`crate::Event::ForkedBefore`].
    pub(crate) fn forked_before(
        &mut self,
        dir: &impl Directory,
        parent: RegionId,
        child: RegionId,
        out: &mut Vec<Action>,
    ) {
        let Some(info) = self.regions.get(&parent).copied() else {
            out.push(Action::ForkReady { region: child });
            return;
        };
        let all = Pages { first: 0, count: info.page_count };
        let entries = Self::alike_parts(dir, parent, all).map(|(_, entry)| entry);
        let shared = entries.filter(|entry| entry.lives_on_device() && entry.shared());
        let mask = shared.fold(0, |mask, entry| mask | entry.mapped_mask());
        let transfer = Transfer { mask, ..Transfer::new(parent, all, Kind::Fork { child, devices: mask }) };
        let ticket = self.begin(transfer, out);
        self.revoke_or(ticket, out, Self::fork_is_done);
    }

    fn fork_is_done(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(Transfer { kind: Kind::Fork { child, .. }, .. }) = self.transfers.get(&ticket).copied() else {
            return;
        };
        self.end(ticket);
        out.push(Action::ForkReady { region: child });
    }

    /// Gives the child the first pages of `left` that are alike; returns how many.
    fn fork_run(
        &mut self,
        dir: &impl Directory,
        parent: RegionId,
        child: RegionId,
        left: Pages,
        mask: &mut u16,
        out: &mut Vec<Action>,
    ) -> u64 {
        let first = Self::entry(dir, parent, left.first);
        let fate = |page: u64, entry: Entry| self.fate_at_fork(parent, page, entry);
        let first_fate = fate(left.first, first);
        let narrow = |offset, entry: Entry| {
            let follows = !entry.owns_frame()
                || entry.device() == first.device() && entry.frame().wrapping_sub(first.frame()) as u64 == offset;
            follows && fate(left.first + offset, entry) == first_fate
        };
        let alike = dir.alike(parent, left.first).min(left.count);
        // Pages that are known to be alike name no frame and are not on the move: one fate.
        let run = match alike > 1 {
            true => Pages { count: alike, ..left },
            false => Self::run_while(dir, parent, left, narrow),
        };
        if matches!(first_fate, Fate::Shared | Fate::Returns) {
            *mask |= run.iter().fold(0, |mask, page| mask | Self::entry(dir, parent, page).mapped_mask());
        }
        let shared = Entry::on_device(first.device(), first.frame()).with_shared(true);
        match first_fate {
            Fate::Nothing => {}
            Fate::Present => Self::publish_same(child, run, Entry::SYSTEM, out),
            Fate::Lost => Self::publish_same(child, run, first, out),
            Fate::Waits => {
                Self::publish_same(child, run, Entry::WAITS_FOR_PARENT, out);
                self.fork_waits.push(ForkWait { parent, child, pages: run });
            }
            Fate::WaitsToo => {
                Self::publish_same(child, run, Entry::WAITS_FOR_PARENT, out);
                let of = self.fork_waits.iter().filter(|wait| wait.child == parent);
                let too = |wait: &ForkWait| Some(ForkWait { child, pages: wait.pages.overlap(run)?, ..*wait });
                let waits: Vec<_> = of.filter_map(too).collect();
                self.fork_waits.extend(waits);
            }
            Fate::LostToo => {
                Self::publish_same(child, run, Entry::WAITS_FOR_PARENT, out);
                self.lost_to_child(child, run, out);
            }
            Fate::Returns => {
                self.share_frames(child, run, first.device(), first.frame());
                self.mark_shared(dir, parent, run, out);
                let moving = shared.with_state(PageState::MovingHome);
                Self::publish_frames(child, run, moving, out);
                // Otherwise it goes on when the device has logged in.
                if self.table(first.device()).is_some() || self.is_failed(first.device()) {
                    self.continue_home(child, run, moving, first.frame() == LOST_FRAME, out);
                }
            }
            Fate::Shared => {
                self.share_frames(child, run, first.device(), first.frame());
                self.mark_shared(dir, parent, run, out);
                Self::publish_frames(child, run, shared, out);
                self.stats.shared += run.count;
            }
        }
        run.count
    }

    /// The parent's entries say that their frames have other owners too; they are marked before the child names them.
    fn mark_shared(&mut self, dir: &impl Directory, parent: RegionId, pages: Pages, out: &mut Vec<Action>) {
        for page in pages.iter() {
            let entry = Self::entry(dir, parent, page);
            let state = if entry.state() == PageState::Exclusive { PageState::Device } else { entry.state() };
            let marked = entry.with_state(state).with_shared(true);
            if marked != entry {
                Self::publish_same(parent, Pages::one(page), marked, out);
            }
        }
        for transfer in self.transfers.values_mut().filter(|transfer| transfer.region == parent) {
            transfer.shared |= transfer.pages.overlap(pages).is_some();
        }
    }

    fn share_frames(&mut self, child: RegionId, pages: Pages, device: DeviceId, frame: u32) {
        let Some(table) = self.named_table(device) else { return };
        for offset in 0..pages.count {
            table.share(frame + offset as u32, Owner { region: child, page: pages.first + offset });
        }
    }

    fn fate_at_fork(&self, region: RegionId, page: u64, entry: Entry) -> Fate {
        match entry.state() {
            PageState::Device | PageState::Exclusive | PageState::MovingHome if entry.discarded() => Fate::Nothing,
            PageState::Absent => Fate::Nothing,
            PageState::System | PageState::Duplicated => Fate::Present,
            PageState::Poisoned => Fate::Lost,
            PageState::MovingOut if entry.discarded() => Fate::Present,
            PageState::MovingOut if entry.shared() && self.waits(region, page) => Fate::WaitsToo,
            PageState::MovingOut if entry.shared() => Fate::LostToo,
            PageState::MovingOut if !self.is_taken_out(region, page) => Fate::Present,
            PageState::MovingOut => Fate::Waits,
            PageState::Device | PageState::Exclusive => Fate::Shared,
            PageState::MovingHome => {
                let transfer =
                    self.transfers.values().find(|t| t.region == region && t.pages.contains(page) && !t.holds());
                let lost = entry.frame() == LOST_FRAME || transfer.is_some_and(|transfer| transfer.lost);
                match transfer.map(|transfer| transfer.kind) {
                    Some(Kind::Collapse) => Fate::Present,
                    _ if lost => Fate::Returns,
                    None | Some(Kind::Home { recovering: true }) => Fate::Returns,
                    Some(_) => Fate::Shared,
                }
            }
        }
    }

    /// A child's page whose parent's is still on the way.
    fn waits(&self, child: RegionId, page: u64) -> bool {
        self.fork_waits.iter().any(|wait| wait.child == child && wait.pages.contains(page))
    }

    /// On its way out in earnest: neither is it only copied, nor dropped where it is.
    fn is_taken_out(&self, region: RegionId, page: u64) -> bool {
        let takes = |t: &Transfer| matches!(t.kind, Kind::Out { keep: false, .. });
        self.transfers.values().any(|t| takes(t) && t.region == region && t.pages.contains(page))
    }

    pub(crate) fn finish_fork(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, .. } = transfer;
        let Kind::Fork { child, devices } = transfer.kind else { return };
        self.clear_mapped_of(dir, region, pages, devices, out);
        out.push(Action::Wake { region, pages });
        self.end_and_discard(dir, ticket, out);
        out.push(Action::ForkReady { region: child });
    }

    /// Pages that were on their way out when the process forked have arrived: children that wait get a share. Whether they need
    /// it nobody knows: they come home at once, and a page that is there already wins.
    pub(crate) fn share_with_children(
        &mut self,
        parent: RegionId,
        pages: Pages,
        device: DeviceId,
        frame: u32,
        out: &mut Vec<Action>,
    ) {
        for ForkWait { child, pages: part, .. } in self.take_waits(pages, |wait| wait.parent == parent) {
            let frame = frame + (part.first - pages.first) as u32;
            self.share_frames(child, part, device, frame);
            let shared = Entry::on_device(device, frame).with_shared(true);
            let ahead = Pages { first: part.first, count: part.count };
            Self::publish_frames(parent, ahead, shared, out);
            for transfer in self.transfers.values_mut().filter(|transfer| transfer.region == parent) {
                transfer.shared |= transfer.pages.overlap(part).is_some();
            }
            let moving = shared.with_state(PageState::MovingHome);
            Self::publish_frames(child, part, moving, out);
            self.continue_home(child, part, moving, false, out);
        }
    }

    /// Pages on their way out have gone back to the parent. Those that were taken out before the fork are lost to the child. `zero`:
    /// there was nothing to take.
    pub(crate) fn fail_children(&mut self, parent: RegionId, pages: Pages, zero: bool, out: &mut Vec<Action>) {
        for ForkWait { child, pages: part, .. } in self.take_waits(pages, |wait| wait.parent == parent) {
            if zero {
                Self::publish_same(child, part, Entry::SYSTEM, out);
                out.push(Action::Wake { region: child, pages: part });
            } else {
                self.lost_to_child(child, part, out);
            }
        }
    }

    /// Loudly: the poison stays only where no page is. Until it is there the pages wait: whoever looks before (the next pager, a fork of the
    /// child) must not take them for holes, which read as zero.
    pub(crate) fn lost_to_child(&mut self, child: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let transfer = Transfer { phase: Phase::Poison, ..Transfer::new(child, pages, Kind::Lost) };
        let ticket = self.begin(transfer, out);
        out.push(Action::PoisonLost { ticket, region: child, pages });
    }

    pub(crate) fn poison_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        let Some(Transfer { region, pages, .. }) = self.transfers.get(&ticket).copied() else { return };
        match result {
            StepResult::Again => self.again.push(ticket),
            StepResult::Later | StepResult::Io => self.found_no_memory(ticket),
            StepResult::Ok | StepResult::Gone => {
                Self::publish_same(region, pages, Entry::SYSTEM, out);
                out.push(Action::Wake { region, pages });
                self.end(ticket);
            }
        }
    }

    /// A child has dropped pages that are not poisoned yet: a hole is right.
    pub(crate) fn discard_lost(&mut self, child: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let lost = self.transfers.iter().filter(|(_, t)| t.region == child && t.kind == Kind::Lost);
        let lost: Vec<_> = lost.filter_map(|(ticket, t)| Some((*ticket, t.pages, t.pages.overlap(pages)?))).collect();
        for (ticket, all, part) in lost {
            self.end(ticket);
            Self::publish_same(child, part, Entry::SYSTEM, out);
            out.push(Action::Wake { region: child, pages: part });
            for rest in around(all, part) {
                self.lost_to_child(child, rest, out);
            }
        }
    }

    /// Those of `mine` that wait for some of these pages, cut to them: they wait no more.
    pub(crate) fn take_waits(&mut self, pages: Pages, mine: impl Fn(&ForkWait) -> bool) -> Vec<ForkWait> {
        let mut taken = Vec::new();
        let mut kept = Vec::new();
        for wait in std::mem::take(&mut self.fork_waits) {
            let Some(part) = wait.pages.overlap(pages).filter(|_| mine(&wait)) else {
                kept.push(wait);
                continue;
            };
            taken.push(ForkWait { pages: part, ..wait });
            kept.extend(around(wait.pages, part).map(|pages| ForkWait { pages, ..wait }));
        }
        self.fork_waits = kept;
        taken
    }
}

/// What is left of some pages without a part of them.
fn around(pages: Pages, part: Pages) -> impl Iterator<Item = Pages> {
    let before = Pages { first: pages.first, count: part.first - pages.first };
    let after = Pages { first: part.end(), count: pages.end() - part.end() };
    [before, after].into_iter().filter(|rest| rest.count > 0)
}
