//! Giving things up: content that nobody wants any more, mappings that devices may not keep. (Whole regions: `ending`.)
//!
//! When private memory is unmapped or discarded (munmap, MADV_DONTNEED, MADV_FREE) the kernel has dropped the system pages when the
//! event is read, or does so right then, and the program may touch the range again at once: it must find zeros. So nothing of that
//! range may come home any more from this instant on (the shell has the client's agent stand still while it reads, and tells it
//! which orders are void):
//!
//! ```text
//!   System        a hole reads as zero already                          -
//!   Device        drop at once; faults are parked until it is done      Drop
//!   on the way    noted with its transfer: dropped where it arrives     `discards`
//!   waits for a forking parent's: it waits no more, a hole is right     -
//! ```
//!
//! Until it is done the entries say so ([`Entry::discarded`]): the event was told once, and a pager that dies meanwhile leaves it to the next.

use crate::core::Core;
use crate::entry::{Entry, PageState};
use crate::event::{Action, Directory, PageStatus, Pages, RegionId, Ticket};
use crate::policy::Policy;
use crate::transfer::{Kind, Phase, Transfer};

impl<P: Policy> Core<P> {
    /// The program dropped the content of private pages.
    pub(crate) fn discard_now(&mut self, dir: &impl Directory, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let page_count = self.regions.get(&region).map_or(0, |info| info.page_count);
        let end = pages.end().min(page_count);
        let mut left = Pages { first: pages.first, count: end.saturating_sub(pages.first) };
        let moving: Vec<(Ticket, Pages)> = self.transfers.iter().filter(|(_, t)| t.region == region).map(of).collect();
        for (ticket, of) in moving {
            if let Some(overlap) = of.overlap(left) {
                self.note_discard(ticket, overlap);
            }
        }
        for waiting in self.take_waits(left, |wait| wait.child == region) {
            Self::publish_same(region, waiting.pages, Entry::SYSTEM, out);
            out.push(Action::Wake { region, pages: waiting.pages });
        }
        self.discard_lost(region, left, out);
        while left.count > 0 {
            let first = Self::entry(dir, region, left.first);
            let busy = self.busy(region, left.first, first);
            if first.owns_frame() && !busy {
                let (run, first, mask) = self.frame_run(dir, region, left);
                self.split_huge(dir, region, run, out);
                self.start_drop(region, run, first, mask, None, out);
                left = left.after(run.count);
                continue;
            }
            // For the next pager, and for what a dead one has begun and nobody goes on with until its device is there. What is in
            // system memory the kernel has dropped by then.
            let is_waiting = first.state() == PageState::MovingOut && first.shared();
            if busy && !is_waiting && !first.discarded() && (first.is_moving() || first.owns_frame()) {
                Self::publish_same(region, Pages::one(left.first), first.with_discarded(true), out);
            }
            // Pages that are known to be alike name no frame and are not on the move.
            left = left.after(dir.alike(region, left.first).max(1));
        }
    }

    /// Pages that a dead pager had not dropped yet are dropped where this transfer, which has just begun, brings them.
    pub(crate) fn discard_as_marked(&mut self, ticket: Ticket, first: Entry) {
        if let Some(transfer) = self.transfers.get(&ticket).filter(|_| first.discarded()) {
            self.discards.insert(ticket, vec![transfer.pages]);
        }
    }

    /// Each page once, however often it was dropped: its frame is given back once.
    pub(crate) fn note_discard(&mut self, ticket: Ticket, mut pages: Pages) {
        while pages.count > 0 {
            let (count, known) = self.alike_in_front(ticket, pages);
            if !known {
                self.discards.entry(ticket).or_default().push(Pages { count, ..pages });
            }
            pages = pages.after(count);
        }
    }

    /// A transfer that goes on as several: each may meet a part of what was discarded.
    pub(crate) fn inherit_discards(&mut self, from: Ticket, to: Ticket) {
        let Some(transfer) = self.transfers.get(&to) else { return };
        let pages = transfer.pages;
        let of = |all: &Vec<Pages>| all.iter().filter_map(|part| part.overlap(pages)).collect::<Vec<_>>();
        let mine = self.discards.get(&from).map(of).unwrap_or_default();
        if !mine.is_empty() {
            self.discards.insert(to, mine);
        }
    }

    /// How many of the first pages were all discarded with this transfer, or all not; and which. The shell asks when an order for its
    /// agent was overtaken.
    #[must_use]
    pub fn alike_in_front(&self, ticket: Ticket, pages: Pages) -> (u64, bool) {
        let parts = self.discards.get(&ticket).map_or(&[][..], Vec::as_slice);
        let gone = |page: u64| parts.iter().any(|part| part.contains(page));
        let first = gone(pages.first);
        (pages.iter().take_while(|page| gone(*page) == first).count() as u64, first)
    }

    /// What a ticket is about, if it is about pages.
    #[must_use]
    pub fn pages_of(&self, ticket: Ticket) -> Option<(RegionId, Pages)> {
        self.transfers.get(&ticket).map(|transfer| (transfer.region, transfer.pages))
    }

    /// How many pages at the front of a transfer the shell may put in place now. It asks when bytes that a driver fetched have
    /// arrived: what was discarded since [`Action::Fill`] is not wanted any more. After 0 the answer is `FillDone` of no page.
    #[must_use]
    pub fn fill_limit(&self, ticket: Ticket) -> u64 {
        let Some(transfer) = self.transfers.get(&ticket) else { return 0 };
        match self.alike_in_front(ticket, transfer.pages) {
            (_, true) => 0,
            (count, false) => count,
        }
    }

    /// Before a fill: what was discarded at the front of the transfer is dropped. Returns how many pages may be filled now, `None`
    /// when the transfer is over.
    pub(crate) fn drop_discarded_prefix(&mut self, ticket: Ticket, out: &mut Vec<Action>) -> Option<u64> {
        loop {
            let transfer = self.transfers.get(&ticket).copied()?;
            let pages = transfer.pages;
            let Some(discards) = self.discards.get(&ticket) else { return Some(pages.count) };
            let in_front = discards.iter().filter_map(|part| part.overlap(pages)).min_by_key(|part| part.first);
            let Some(part) = in_front else { return Some(pages.count) };
            if part.first > pages.first {
                return Some(part.first - pages.first);
            }
            Self::publish_same(transfer.region, part, Entry::ABSENT, out);
            self.give_back(&transfer, part.count);
            out.push(Action::Wake { region: transfer.region, pages: part });
            self.note(transfer.owner, part, PageStatus::Gone);
            if let Some(transfer) = self.transfers.get_mut(&ticket) {
                transfer.skip(part.count);
                if transfer.pages.count == 0 {
                    self.end(ticket);
                    return None;
                }
            }
        }
    }

    /// A transfer has brought pages to a device; what was discarded meanwhile is dropped there, before anybody can fault on it.
    pub(crate) fn drop_discarded(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        for part in self.discards.remove(&ticket).unwrap_or_default() {
            let Some(part) = part.overlap(transfer.pages) else { continue };
            let into = (part.first - transfer.pages.first) as u32;
            let ahead = Transfer { frame: transfer.frame + into, ..transfer };
            self.start_drop(transfer.region, part, ahead.entry_on_device(), 0, None, out);
        }
    }

    /// Starts dropping a run: device pages in consecutive frames, or system pages that devices map in place.
    pub(crate) fn start_drop(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u16,
        owner: Option<u64>,
        out: &mut Vec<Action>,
    ) {
        let frames = first.owns_frame();
        if frames {
            let moving = first.with_state(PageState::MovingHome).with_huge(false).with_mapped_mask(mask);
            let moving = moving.with_discarded(self.is_private(region));
            Self::publish_frames(region, pages, moving, out);
        } else {
            Self::publish_same(region, pages, first.with_state(PageState::MovingOut).with_mapped_mask(mask), out);
        }
        let transfer = Transfer { owner, ..Transfer::of(region, pages, first, mask, Kind::Drop { frames }) };
        let ticket = self.begin(transfer, out);
        self.revoke_or(ticket, out, Self::finish_drop);
    }

    pub(crate) fn finish_drop(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, kind, phase, .. } = transfer;
        if kind == (Kind::Drop { frames: false }) && phase != Phase::Punch {
            // The content goes before anybody may take the page for untouched.
            self.hold_for_punch(ticket);
            out.push(Action::Punch { ticket, region, pages });
            return;
        }
        self.dropped(ticket, out);
    }

    /// Nothing is left of the content.
    pub(crate) fn dropped(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, kind, owner, .. } = transfer;
        Self::publish_same(region, pages, Entry::ABSENT, out);
        if kind != (Kind::Drop { frames: false }) {
            self.give_back(&transfer, pages.count);
        }
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Gone);
        self.end(ticket);
    }

    /// Starts taking mappings away from pages that stay where they are.
    pub(crate) fn start_revoke(
        &mut self,
        region: RegionId,
        pages: Pages,
        mask: u16,
        devices: u16,
        owner: u64,
        out: &mut Vec<Action>,
    ) {
        let (owner, mask) = (Some(owner), mask & devices);
        let transfer = Transfer { owner, mask, ..Transfer::new(region, pages, Kind::Revoke { devices }) };
        let ticket = self.begin(transfer, out);
        self.revoke_or(ticket, out, |core, ticket, _| core.end(ticket));
    }

    pub(crate) fn finish_revoke(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, kind, owner, .. } = transfer;
        let Kind::Revoke { devices } = kind else { return };
        self.clear_mapped_of(dir, region, pages, devices, out);
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Ok);
        self.end_and_discard(dir, ticket, out);
    }

    /// Ends a transfer that has moved nothing: what was discarded meanwhile is dropped where it is.
    pub(crate) fn end_and_discard(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(region) = self.transfers.get(&ticket).map(|transfer| transfer.region) else { return };
        let discarded = self.discards.remove(&ticket).unwrap_or_default();
        self.end(ticket);
        for part in discarded {
            self.discard_now(dir, region, part, out);
        }
    }

    /// Takes devices out of the entries of pages that they do not map any more. A page that loses its only device is not exclusive.
    pub(crate) fn clear_mapped_of(
        &self,
        dir: &impl Directory,
        region: RegionId,
        pages: Pages,
        devices: u16,
        out: &mut Vec<Action>,
    ) {
        for (run, entry) in Self::alike_parts(dir, region, pages) {
            let mask = entry.mapped_mask() & !devices;
            if entry.is_moving() || mask == entry.mapped_mask() && entry.state() != PageState::Exclusive {
                continue;
            }
            let state = if entry.state() == PageState::Exclusive { PageState::Device } else { entry.state() };
            Self::publish_same(region, run, entry.with_state(state).with_mapped_mask(mask), out);
        }
    }
}

fn of((ticket, transfer): (&Ticket, &Transfer)) -> (Ticket, Pages) {
    (*ticket, transfer.pages)
}
