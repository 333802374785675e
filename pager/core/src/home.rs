//! The second half of the way home: the fill, and what its failures mean.
//!
//! ```text
//!   FillHuge -- not huge ----------------------> Fill
//!   Fill -- done -------------------------------> System, frames free
//!    |-- Again --------------------------------> Fill at the next tick
//!    |-- NoMemory -----------------------------> Fill later: in 1 ms, 2 ms ... 256 ms
//!    |-- Exists, after a restart --------------> System: it came home before the crash and is newer
//!    |-- Dropped ------------------------------> Absent, and Fill of what comes behind
//!    |-- Exists otherwise ---------------------> a stray page: PunchStray, Fill, three times
//!    |-- Lost ---------------------------------> Poisoned, exactly these, and Fill of what comes behind
//!    |-- failed -------------------------------> Device again; poisoned when the device is given up
//!    `-- failed after a restart, or memory lost: Probe (Continue of one page)
//!                                                |-- there --> System, and on with the next page
//!                                                `-- hole ---> as failed; poisoned when the memory is lost
//! ```

use crate::core::Core;
use crate::entry::{Entry, PageState};
use crate::event::{Action, Cause, FillStop, PageStatus, Pages, RegionId, Ticket, TraceKind};
use crate::policy::Policy;
use crate::transfer::{Kind, Phase, Transfer};

const STRAY_TRIES: u8 = 3;
/// CPU faults in a region that found no huge page do without for so long.
const WITHOUT_HUGE_US: u64 = 100_000;

impl<P: Policy> Core<P> {
    /// Starts a run of device pages on its way home. `first` is the entry of its first page.
    #[allow(clippy::too_many_arguments, reason = "one transfer's own fields")]
    pub(crate) fn start_home(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u16,
        owner: Option<u64>,
        cause: Cause,
        out: &mut Vec<Action>,
    ) -> Ticket {
        let moving = first.with_state(PageState::MovingHome).with_huge(false).with_mapped_mask(mask);
        Self::publish_frames(region, pages, moving, out);
        // For whoever wants the pages here, and not for whoever wants them gone from the device.
        let huge = first.huge() && matches!(cause, Cause::Prefetch | Cause::CpuFault) && self.is_private(region);
        let kind = Kind::Home { recovering: false };
        let transfer = Transfer { owner, cause, huge, ..Transfer::of(region, pages, moving, mask, kind) };
        let ticket = self.begin(transfer, out);
        self.discard_as_marked(ticket, first);
        self.revoke_or(ticket, out, Self::fill);
        ticket
    }

    /// What a dead pager had begun. `lost`: the frames hold nothing, only a system page can be found.
    pub(crate) fn continue_home(
        &mut self,
        region: RegionId,
        pages: Pages,
        moving: Entry,
        lost: bool,
        out: &mut Vec<Action>,
    ) {
        let kind = Kind::Home { recovering: true };
        let transfer = Transfer { lost, ..Transfer::of(region, pages, moving, moving.mapped_mask(), kind) };
        let ticket = self.begin(transfer, out);
        self.discard_as_marked(ticket, moving);
        self.revoke_or(ticket, out, Self::fill);
    }

    pub(crate) fn fill(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(wanted) = self.drop_discarded_prefix(ticket, out) else { return };
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let whole = wanted == transfer.pages.count;
        let Transfer { region, device, frame, lost, .. } = *transfer;
        let pages = Pages { count: wanted, ..transfer.pages };
        let huge = transfer.huge && whole;
        transfer.phase = if huge { Phase::FillHuge } else { Phase::Fill };
        if lost {
            self.probe(ticket, out);
            return;
        }
        if self.is_failed(device) {
            self.doomed.push(ticket);
            return;
        }
        out.push(if huge {
            Action::FillHuge { ticket, region, pages, device, frame }
        } else {
            Action::Fill { ticket, region, pages, device, frame }
        });
    }

    pub(crate) fn fill_done(&mut self, ticket: Ticket, done: u64, stop: Option<FillStop>, out: &mut Vec<Action>) {
        if !self.transfers.contains_key(&ticket) {
            return;
        }
        self.came_home(ticket, done, out);
        let left = self.transfers.get(&ticket).map_or(0, |transfer| transfer.pages.count);
        if left == 0 {
            self.end(ticket);
            return;
        }
        match stop {
            // A fill may stop early without a reason: go on.
            None => self.fill(ticket, out),
            Some(FillStop::Again) => self.again.push(ticket),
            Some(FillStop::NoMemory) => self.found_no_memory(ticket),
            Some(FillStop::NotHuge) => {
                if let Some(transfer) = self.transfers.get_mut(&ticket) {
                    transfer.huge = false;
                    // A thread is not kept waiting each time for what is not to be had.
                    self.no_huge_until_us.insert(transfer.region, self.now_us + WITHOUT_HUGE_US);
                }
                self.fill(ticket, out);
            }
            Some(FillStop::Exists) => self.fill_met_a_page(ticket, out),
            Some(FillStop::Dropped { page_count }) => self.drop_in_front(ticket, page_count, out),
            Some(FillStop::Lost { page_count }) => self.lost_in_front(ticket, page_count, out),
            Some(FillStop::NoProcess | FillStop::Gone) => self.stay_on_device(ticket, PageStatus::Gone, out),
            Some(FillStop::Io | FillStop::NoPage) => {
                self.stats.copy_failures += 1;
                self.fill_failed(ticket, out);
            }
        }
    }

    /// As if the program had dropped them: what comes next is filled.
    fn drop_in_front(&mut self, ticket: Ticket, page_count: u64, out: &mut Vec<Action>) {
        let Some(pages) = self.transfers.get(&ticket).map(|transfer| transfer.pages) else { return };
        self.note_discard(ticket, Pages { count: page_count.clamp(1, pages.count), ..pages });
        self.fill(ticket, out);
    }

    /// The device works, and has the first pages no more. What was discarded meanwhile is no loss.
    fn lost_in_front(&mut self, ticket: Ticket, page_count: u64, out: &mut Vec<Action>) {
        self.stats.copy_failures += 1;
        let Some(transfer) = self.transfers.get(&ticket) else { return };
        if transfer.lost || transfer.kind == (Kind::Home { recovering: true }) {
            return self.probe(ticket, out);
        }
        let end = transfer.pages.first + page_count.clamp(1, transfer.pages.count);
        let Some(wanted) = self.drop_discarded_prefix(ticket, out) else { return };
        if let Some(transfer) = self.transfers.get_mut(&ticket) {
            let before = *transfer;
            let count = end.saturating_sub(before.pages.first).min(wanted);
            if count > 0 {
                transfer.skip(count);
                let pages = Pages { count, ..before.pages };
                self.poison(before.region, pages, out);
                self.give_back(&before, count);
                self.note(before.owner, pages, PageStatus::Poisoned);
                out.push(Action::Wake { region: before.region, pages });
            }
        }
        self.fill_or_end(ticket, out);
    }

    /// A failed copy says nothing about the system page, and after a restart that may be the newer one.
    fn fill_failed(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket) else { return };
        if transfer.lost || transfer.kind == (Kind::Home { recovering: true }) {
            self.probe(ticket, out);
        } else {
            self.stay_on_device(ticket, PageStatus::Io, out);
        }
    }

    pub(crate) fn probe(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.phase = Phase::Probe;
        let (region, pages) = (transfer.region, Pages::one(transfer.pages.first));
        out.push(Action::Continue { ticket, region, pages });
    }

    /// The answer to a probe of one page.
    pub(crate) fn probe_done(&mut self, ticket: Ticket, done: u64, stop: Option<FillStop>, out: &mut Vec<Action>) {
        if self.transfers.get(&ticket).is_none_or(|transfer| transfer.phase != Phase::Probe) {
            return;
        }
        match stop {
            _ if done > 0 => self.found_at_home(ticket, out),
            Some(FillStop::Exists) => self.found_at_home(ticket, out),
            Some(FillStop::NoPage) => {
                let first = self.transfers.get(&ticket).map(|transfer| Pages::one(transfer.pages.first));
                let dropped = first.is_some_and(|first| self.alike_in_front(ticket, first).1);
                if !dropped {
                    self.leave_on_device(ticket, 1, PageStatus::Io, out);
                }
                self.fill_or_end(ticket, out);
            }
            Some(FillStop::NoProcess | FillStop::Gone) => self.stay_on_device(ticket, PageStatus::Gone, out),
            Some(FillStop::Dropped { page_count }) => self.drop_in_front(ticket, page_count, out),
            // Without an answer nothing can be decided.
            None | Some(FillStop::Again | FillStop::Io | FillStop::Lost { .. } | FillStop::NotHuge) => {
                self.again.push(ticket);
            }
            Some(FillStop::NoMemory) => self.found_no_memory(ticket),
        }
    }

    /// The system page exists: it came home before, and is newer.
    fn found_at_home(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket) else { return };
        let (region, page) = (transfer.region, Pages::one(transfer.pages.first));
        self.stats.recovered_transfers += 1;
        self.came_home(ticket, 1, out);
        out.push(Action::Wake { region, pages: page });
        self.fill_or_end(ticket, out);
    }

    fn fill_or_end(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        match self.transfers.get(&ticket).map(|transfer| transfer.pages.count) {
            Some(0) | None => self.end(ticket),
            Some(_) => self.fill(ticket, out),
        }
    }

    /// Ends a transfer whose device is gone.
    pub(crate) fn end_doomed(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket) else { return };
        self.stats.copy_failures += 1;
        match transfer.kind {
            Kind::Out { .. } => self.roll_back(ticket, PageStatus::Io, out),
            Kind::Across { .. } => self.across_copied(ticket, Some(PageStatus::Io), out),
            _ => self.fill_failed(ticket, out),
        }
    }

    /// The first `count` pages are the CPU's now.
    fn came_home(&mut self, ticket: Ticket, count: u64, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let pages = Pages { count: count.min(transfer.pages.count), ..transfer.pages };
        if pages.count == 0 {
            return;
        }
        let before = *transfer;
        let Transfer { region, pinned, owner, device, .. } = before;
        transfer.skip(pages.count);
        (transfer.tries, transfer.pause_us) = (0, 0);
        Self::publish_same(region, pages, Entry::SYSTEM.with_pinned(pinned), out);
        self.give_back(&before, pages.count);
        self.stats.pages_home += pages.count;
        self.policy.moved_home(region, pages, device, before.time_us(self.now_us));
        self.trace(TraceKind::MigrateEnd, &Transfer { pages, ..before }, out);
        self.note(owner, pages, PageStatus::Ok);
    }

    fn fill_met_a_page(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let Transfer { region, kind, .. } = *transfer;
        let page = Pages::one(transfer.pages.first);
        if kind == (Kind::Home { recovering: true }) {
            self.found_at_home(ticket, out);
        } else if transfer.tries < STRAY_TRIES {
            transfer.tries += 1;
            transfer.phase = Phase::PunchStray;
            out.push(Action::Punch { ticket, region, pages: page });
        } else {
            self.stay_on_device(ticket, PageStatus::Io, out);
        }
    }

    /// The frames stay the authority; if their device is lost for good, the pages are.
    pub(crate) fn stay_on_device(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        // What was discarded meanwhile is dropped, its neighbours stay.
        while let Some(count) = self.drop_discarded_prefix(ticket, out) {
            if count == 0 {
                self.end(ticket);
                return;
            }
            self.leave_on_device(ticket, count, status, out);
        }
    }

    /// As `stay_on_device`, for the first `count` pages that are left.
    pub(crate) fn leave_on_device(&mut self, ticket: Ticket, count: u64, status: PageStatus, out: &mut Vec<Action>) {
        let failed = self.transfers.get(&ticket).is_some_and(|transfer| self.is_failed(transfer.device));
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let before = *transfer;
        let Transfer { region, owner, lost, .. } = before;
        let pages = Pages { count, ..transfer.pages };
        transfer.skip(count);
        if lost || (status == PageStatus::Io && failed) {
            self.poison(region, pages, out);
            self.give_back(&before, pages.count);
            self.note(owner, pages, PageStatus::Poisoned);
        } else {
            Self::publish_frames(region, pages, before.entry_on_device(), out);
            self.note(owner, pages, status);
        }
        out.push(Action::Wake { region, pages });
    }
}
