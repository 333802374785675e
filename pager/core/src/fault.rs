//! CPU faults: the hot path. One decision, no request, no waiting.
//!
//! ```text
//!   entry            what the kernel saw     answer
//!   Absent, System   nothing in the backing  ZeroFill (System is published first: a crash in between leaves a hole, which is zero)
//!   System           backing has the page    Continue
//!   System           write-protected         unprotect
//!   Duplicated       anything                the read-only copies end, then unprotected
//!   Device, cpu bit  anything                show the frame (again); the fault is raised again when that is done
//!   Device           anything                start the way home, with the neighbours that policy lets ride along
//!   Moving*          anything                nothing: the end of the transfer wakes, and the fault is raised again
//!   Poisoned         write-protected         punch what is left, then as below
//!   Poisoned         anything else           Poison: SIGBUS
//! ```

use crate::core::{CHUNK_PAGES, Core};
use crate::entry::{Entry, PageState};
use crate::event::{Action, Cause, Directory, FillStop, Pages, RegionId, StepResult, Ticket};
use crate::frames::HUGE_PAGES;
use crate::policy::{CpuFault, Policy};
use crate::request::Request;

/// How often one fault changes its mind between zero fill and continue before it is simply raised again.
const TURNS_MAX: u8 = 4;
/// Pages that come home behind a huge page whose reader goes on.
const HUGE_AHEAD: u64 = 4 * HUGE_PAGES as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Zero,
    Continue,
    Unprotect,
}

impl Kind {
    /// A fill needs an entry that says `System`: `Absent` would be taken for empty later.
    fn is_legal_on(self, entry: Entry) -> bool {
        match self {
            Self::Zero | Self::Continue => entry.state() == PageState::System,
            Self::Unprotect => entry.is_settled_system(),
        }
    }
}

/// An answer to a CPU fault that is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuOp {
    pub region: RegionId,
    pages: Pages,
    kind: Kind,
    turns: u8,
    /// How long it waited when it found no memory last.
    pub pause_us: u64,
}

impl<P: Policy> Core<P> {
    pub(crate) fn cpu_fault(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        page: u64,
        wp: bool,
        minor: bool,
        out: &mut Vec<Action>,
    ) {
        self.stats.cpu_faults += 1;
        let Some(info) = self.regions.get(&region).filter(|info| page < info.page_count && !info.dying).copied() else {
            return;
        };
        let rest = Pages { first: page, count: info.page_count - page };
        let rest = self.recovered_part(region, page, rest);
        let entry = Self::entry(dir, region, page);
        match entry.state() {
            _ if self.busy(region, page, entry) => self.stats.parked += 1,
            PageState::MovingOut | PageState::MovingHome => self.stats.parked += 1,
            PageState::Device if entry.cpu_mapped() => self.missed_a_frame(dir, rest, region, out),
            PageState::Device | PageState::Exclusive => {
                let take_used = || dir.take_used(region, page, entry.device());
                match self.policy.cpu_waits_until_us(region, page, self.now_us, take_used) {
                    Some(until_us) => self.wake_later(region, page, until_us),
                    None => self.bring_home(dir, region, page, info.page_count, out),
                }
            }
            // Whatever it wants, a page that was read-mostly is an ordinary one again.
            PageState::Duplicated => {
                let (run, first, mask) = self.frame_run(dir, region, Pages::one(page));
                self.start_collapse(region, run, first, mask, None, out);
            }
            // The old system page is in the way of the poison.
            PageState::Poisoned if wp => self.punch_again(region, Pages::one(page), out),
            PageState::Poisoned => out.push(Action::Poison { region, pages: Pages::one(page) }),
            PageState::Absent | PageState::System if wp => {
                self.unprotect(region, Pages::one(page), out);
            }
            PageState::System if minor => {
                let window = self.policy.fault_around_zero(region, page).clamp(1, rest.count);
                let run = Self::run_while(dir, region, Pages { count: window, ..rest }, |_, entry| {
                    entry.state() == PageState::System
                });
                self.start_cpu_op(region, run, Kind::Continue, out);
            }
            PageState::Absent | PageState::System => {
                let window = self.policy.fault_around_zero(region, page).clamp(1, rest.count);
                let run = Self::run_while(dir, region, Pages { count: window, ..rest }, |_, other| other == entry);
                let run = if run.count == 0 { Pages::one(page) } else { run };
                if entry.state() == PageState::Absent {
                    Self::publish_same(region, run, entry.with_state(PageState::System), out);
                }
                self.start_cpu_op(region, run, if minor { Kind::Continue } else { Kind::Zero }, out);
            }
        }
    }

    /// Nothing now; the kernel raises the fault again when it is woken.
    fn wake_later(&mut self, region: RegionId, page: u64, until_us: u64) {
        self.stats.parked += 1;
        let wake = (until_us, region, page);
        if !self.late_wakes.contains(&wake) {
            self.late_wakes.push(wake);
        }
    }

    /// Faults whose timeslice is over.
    pub(crate) fn wake_late(&mut self, out: &mut Vec<Action>) {
        let now_us = self.now_us;
        self.late_wakes.retain(|(until_us, region, page)| {
            if *until_us <= now_us {
                out.push(Action::Wake { region: *region, pages: Pages::one(*page) });
            }
            *until_us > now_us
        });
    }

    /// The window that policy names, the faulting page first: the program waits for that one only.
    fn bring_home(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        page: u64,
        page_count: u64,
        out: &mut Vec<Action>,
    ) {
        let entry = Self::entry(dir, region, page);
        let (attr, huge_phase) = (dir.attr(region, page), dir.huge_phase(region));
        let window = self.policy.cpu_fault(CpuFault { region, page, attr, huge: entry.huge(), huge_phase });
        let all = Pages { first: 0, count: page_count };
        let whole = window.overlap(all).filter(|window| window.contains(page)).unwrap_or(Pages::one(page));
        let whole = self.recovered_part(region, page, whole);
        if entry.huge() && self.bring_huge_home(dir, region, page, whole, out) {
            return;
        }
        let most = CHUNK_PAGES.min(self.budget);
        let window = match whole.count > most {
            // The rest follows, after whoever else has something to be done.
            true => Pages { first: page, count: most.min(whole.end() - page) },
            false => whole,
        };
        self.split_huge(dir, region, window, out);
        let from_page = Pages { first: page, count: window.end() - page };
        let before_page = Pages { first: window.first, count: page - window.first };
        for part in [from_page, before_page] {
            let mut left = part;
            while left.count > 0 {
                let entry = Self::entry(dir, region, left.first);
                let (run, first, mask) = self.frame_run(dir, region, left);
                let first = first.with_huge(false);
                if entry.lives_on_device() && run.count > 0 {
                    self.start_home(region, run, first, mask, None, Cause::CpuFault, out);
                }
                let alike = dir.alike(region, left.first).max(1);
                left = left.after(if run.count > 0 { run.count } else { alike });
            }
        }
        if window.count < whole.count {
            self.follow(region, whole, out);
        }
    }

    /// A huge page that comes home whole stays one, and the fault is answered with it: less work than 512 small ones are. Only where the
    /// last one did not find that there are none.
    fn bring_huge_home(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        page: u64,
        window: Pages,
        out: &mut Vec<Action>,
    ) -> bool {
        let size = u64::from(HUGE_PAGES);
        let into = u64::from(Self::entry(dir, region, page).frame()) % size;
        let whole = page.checked_sub(into).map(|first| Pages { first, count: size });
        let Some(whole) = whole.filter(|whole| window.overlap(*whole) == Some(*whole)) else { return false };
        let until_us = self.no_huge_until_us.get(&region).copied().unwrap_or_default();
        if self.now_us < until_us || !self.is_private(region) {
            return false;
        }
        let (run, first, mask) = self.frame_run(dir, region, whole);
        let comes = run == whole && first.huge() && first.lives_on_device();
        if comes {
            self.start_home(region, run, first, mask, None, Cause::CpuFault, out);
            if window.count > size {
                // Advice names more: the rest follows.
                self.follow(region, window, out);
            } else {
                self.bring_huge_ahead(dir, region, run, out);
            }
        }
        comes
    }

    /// Who reads on from huge page to huge page finds the next ones there. It has come so far by faults that were that far apart at most.
    fn bring_huge_ahead(&mut self, dir: &impl Directory, region: RegionId, now: Pages, out: &mut Vec<Action>) {
        let before = std::mem::replace(&mut self.last_huge, (region, now.end()));
        let apart = now.first.checked_sub(before.1).filter(|_| before.0 == region);
        if apart.is_none_or(|pages| pages > HUGE_AHEAD) {
            return;
        }
        let end = (now.end() + HUGE_AHEAD).min(dir.page_count(region));
        // After a pager's death: no further than to what nobody has looked at yet.
        let end = self.recovered_part(region, now.first, Pages { count: end - now.first, ..now }).end().max(now.end());
        let ahead = (now.end()..end).step_by(HUGE_PAGES as usize);
        let come = ahead.take_while(|page| {
            let entry = Self::entry(dir, region, *page);
            entry.huge() && entry.lives_on_device()
        });
        let count = come.count() as u64 * u64::from(HUGE_PAGES);
        if count > 0 {
            self.follow(region, Pages { first: now.end(), count }, out);
        }
    }

    /// What did not come with a fault comes later, as if it were asked for.
    fn follow(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let key = (region, pages.first, pages.count);
        if !self.follows.contains_key(&key) {
            let order = self.accept(Request::follow(region, pages), out);
            self.follows.insert(key, order);
        }
    }

    /// Whoever sends pages away wants them to stay there.
    pub(crate) fn stop_following(&mut self, region: RegionId) {
        let mine: Vec<_> = self.follows.range((region, 0, 0)..=(region, u64::MAX, u64::MAX)).collect();
        let mine: Vec<_> = mine.into_iter().map(|(key, order)| (*key, *order)).collect();
        for (key, order) in mine {
            self.follows.remove(&key);
            self.requests.remove(&order);
            if let Some(info) = self.regions.get_mut(&region) {
                info.requests -= 1;
            }
        }
    }

    fn start_cpu_op(&mut self, region: RegionId, pages: Pages, kind: Kind, out: &mut Vec<Action>) {
        if pages.count == 0 {
            return;
        }
        let ticket = self.ticket();
        self.emit_cpu_op(ticket, CpuOp { region, pages, kind, turns: 0, pause_us: 0 }, out);
    }

    /// Lets the CPU write again, and wakes.
    pub(crate) fn unprotect(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        self.start_cpu_op(region, pages, Kind::Unprotect, out);
    }

    /// Brings an answer again. What was settled when the fault was raised may be on the move by now, and then neither a fill nor
    /// an unprotect may touch it: those faults are only raised anew.
    pub(crate) fn repeat_cpu_op(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(op) = self.cpu_ops.remove(&ticket) else { return };
        let mut left = op.pages;
        while left.count > 0 {
            let legal = op.kind.is_legal_on(Self::entry(dir, op.region, left.first));
            let pages = Self::run_while(dir, op.region, left, |_, entry| op.kind.is_legal_on(entry) == legal);
            if legal {
                let ticket = self.ticket();
                self.emit_cpu_op(ticket, CpuOp { pages, ..op }, out);
            } else {
                out.push(Action::Wake { region: op.region, pages });
            }
            left = left.after(pages.count);
        }
    }

    fn emit_cpu_op(&mut self, ticket: Ticket, op: CpuOp, out: &mut Vec<Action>) {
        let CpuOp { region, pages, .. } = op;
        self.cpu_ops.insert(ticket, op);
        out.push(match op.kind {
            Kind::Zero => Action::ZeroFill { ticket, region, pages },
            Kind::Continue => Action::Continue { ticket, region, pages },
            Kind::Unprotect => Action::WriteProtect { ticket, region, pages, on: false },
        });
    }

    pub(crate) fn unprotect_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        if result == StepResult::Again {
            self.again.push(ticket);
            return;
        }
        if let Some(op) = self.cpu_ops.remove(&ticket) {
            out.push(Action::Wake { region: op.region, pages: op.pages });
        }
    }

    pub(crate) fn cpu_fill_done(
        &mut self,
        dir: &impl Directory,
        ticket: Ticket,
        done_pages: u64,
        stop: Option<FillStop>,
        out: &mut Vec<Action>,
    ) {
        let Some(op) = self.cpu_ops.get_mut(&ticket) else {
            self.probe_done(ticket, done_pages, stop, out);
            return;
        };
        let first_was_done = done_pages > 0;
        op.pages = op.pages.after(done_pages);
        let (region, page) = (op.region, Pages::one(op.pages.first));
        let counter = if op.kind == Kind::Zero { &mut self.stats.zero_filled } else { &mut self.stats.continues };
        *counter += done_pages;
        if op.pages.count == 0 || first_was_done && stop != Some(FillStop::Again) {
            // The page that faulted is served; neighbours are a courtesy.
            self.cpu_ops.remove(&ticket);
            return;
        }
        op.turns += 1;
        let turn = op.turns < TURNS_MAX;
        match (stop, op.kind) {
            (Some(FillStop::Again), _) if first_was_done => {
                self.cpu_ops.remove(&ticket);
            }
            (Some(FillStop::Again), _) => {
                op.turns = 0;
                self.again.push(ticket);
            }
            (Some(FillStop::NoMemory), _) => {
                op.turns = 0;
                self.found_no_memory(ticket);
            }
            // The backing has the page, only the mapping is missing.
            (Some(FillStop::Exists), Kind::Zero) if turn => {
                (op.kind, op.pages) = (Kind::Continue, page);
                self.repeat_cpu_op(dir, ticket, out);
            }
            (Some(FillStop::NoPage), Kind::Continue) if turn => {
                (op.kind, op.pages) = (Kind::Zero, page);
                self.repeat_cpu_op(dir, ticket, out);
            }
            // Mapped already: somebody was faster.
            _ => {
                self.cpu_ops.remove(&ticket);
                out.push(Action::Wake { region, pages: page });
            }
        }
    }
}
