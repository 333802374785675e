//! The way out: system pages to a device, with or without leaving the system page behind.
//!
//! ```text
//!   shared:   Protect -> [Revoke] -> Copy -------------------> (Device) -> Punch
//!   private:             [Revoke] -> Copy (takes them out) --> (Device) -> Punch (frees what was taken out)
//!                                      \-- some pages stayed --> MoveBack -> (System)
//!   keep:     Protect -> [Revoke] -> Copy -------------------> (Duplicated)
//! ```
//! A private run may come back in pieces: each piece goes on as a transfer of its own.

use crate::core::Core;
use crate::entry::{Entry, PageState};
use crate::event::{
    Action, Cause, CopyRun, CopyStatus, DeviceId, Directory, PageStatus, Pages, RegionId, StepResult, Ticket, TraceKind,
};
use crate::frames::{HUGE_PAGES, Owner};
use crate::policy::Policy;
use crate::transfer::{Kind, Phase, Transfer};

/// What a run of system pages is sent to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub device: DeviceId,
    /// Frame of the first page.
    pub frame: u32,
    /// Devices that map the system pages.
    pub mask: u16,
    /// Nothing to copy.
    pub zero: bool,
    /// The system pages stay valid.
    pub keep: bool,
    pub cause: Cause,
}

impl<P: Policy> Core<P> {
    /// Starts a run of settled system pages on its way to frames that were just allocated.
    pub(crate) fn start_out(&mut self, region: RegionId, pages: Pages, way: Way, owner: u64, out: &mut Vec<Action>) {
        let Way { device, frame, mask, zero, keep, cause } = way;
        // The mask stays in the entries until the revocation is done: a crash must not forget who maps the system page.
        let moving = Entry::SYSTEM.with_state(PageState::MovingOut).with_mapped_mask(mask);
        Self::publish_same(region, pages, moving, out);
        let kind = Kind::Out { zero, keep };
        let owner = Some(owner);
        let transfer = Transfer { device, frame, mask, owner, cause, ..Transfer::new(region, pages, kind) };
        let ticket = self.begin(transfer, out);
        if self.is_private(region) && !keep {
            // Taking the pages out is atomic towards the CPU: nothing has to be protected.
            self.revoke_or(ticket, out, Self::copy);
        } else {
            if let Some(transfer) = self.transfers.get_mut(&ticket) {
                transfer.phase = Phase::Protect;
            }
            out.push(Action::WriteProtect { ticket, region, pages, on: true });
        }
    }

    pub(crate) fn wp_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        if self.cpu_ops.contains_key(&ticket) {
            self.unprotect_done(ticket, result, out);
            return;
        }
        if !self.transfers.contains_key(&ticket) {
            return;
        }
        match result {
            StepResult::Ok => self.revoke_or(ticket, out, Self::copy),
            StepResult::Again => self.again.push(ticket),
            StepResult::Later => self.found_no_memory(ticket),
            StepResult::Gone => self.roll_back(ticket, PageStatus::Gone, out),
            StepResult::Io => self.roll_back(ticket, PageStatus::Io, out),
        }
    }

    /// All pages of the transfer are in the frames.
    pub(crate) fn copied(&mut self, ticket: Ticket, huge: bool, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, device, frame, kind, owner, .. } = transfer;
        self.stats.pages_out += pages.count;
        self.trace(TraceKind::MigrateEnd, &transfer, out);
        if kind == (Kind::Out { zero: false, keep: true }) {
            self.finish_copy(ticket, out);
            return;
        }
        let aligned = frame.is_multiple_of(HUGE_PAGES) && pages.count == u64::from(HUGE_PAGES);
        let entry = self.arrived_entry(region, device, frame).with_huge(huge && aligned);
        Self::publish_frames(region, pages, entry, out);
        self.policy.moved_out(region, pages, device, transfer.time_us(self.now_us));
        self.share_with_children(region, pages, device, frame, out);
        let nothing_was_taken = kind == (Kind::Out { zero: true, keep: false }) && self.is_private(region);
        if nothing_was_taken {
            out.push(Action::Wake { region, pages });
            self.note(owner, pages, PageStatus::Ok);
            self.drop_discarded(ticket, out);
            self.end(ticket);
            return;
        }
        self.hold_for_punch(ticket);
        out.push(Action::Punch { ticket, region, pages });
        self.show_frames(region, pages, entry, out);
    }

    /// The copies are made and the system pages stay: devices may read, nobody may write.
    fn finish_copy(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, device, frame, owner, .. } = transfer;
        if self.discards.contains_key(&ticket) {
            // Some system pages are gone meanwhile; a copy of what is not there any more is worth nothing.
            self.roll_back(ticket, PageStatus::Busy, out);
            return;
        }
        let entry = Entry::on_device(device, frame).with_state(PageState::Duplicated);
        Self::publish_frames(region, pages, entry, out);
        self.stats.duplicated += pages.count;
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Ok);
        self.end(ticket);
    }

    /// The answer to the copy of private pages: what could be taken out goes on, the rest goes back.
    pub(crate) fn copied_runs(&mut self, ticket: Ticket, runs: &[CopyRun], out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let pieces = pieces(runs, transfer.pages.count);
        let all_huge = runs.iter().all(|run| run.status == CopyStatus::OkHuge);
        if transfer.lost {
            self.roll_back(ticket, PageStatus::Io, out);
            return;
        }
        if let [(_, status)] = pieces[..] {
            match status {
                PageStatus::Ok => self.copied(ticket, all_huge, out),
                status => self.roll_back(ticket, status, out),
            }
            return;
        }
        let mut rest = transfer;
        for (count, status) in pieces {
            let piece = Transfer { pages: Pages { count, ..rest.pages }, ..rest };
            rest.skip(count);
            let split = self.begin(piece, &mut Vec::new());
            self.inherit_discards(ticket, split);
            match status {
                PageStatus::Ok => self.copied(split, false, out),
                status => self.roll_back(split, status, out),
            }
        }
        self.end(ticket);
    }

    /// The system copy stays the authority.
    pub(crate) fn roll_back(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let Transfer { region, pages, kind, phase, .. } = *transfer;
        let moved = phase == Phase::Copy && matches!(kind, Kind::Out { zero: false, keep: false });
        if !moved || !self.is_private(region) {
            self.rolled_back(ticket, status, out);
            return;
        }
        let (count, discarded) = self.alike_in_front(ticket, pages);
        if count < pages.count {
            self.roll_back_in_parts(ticket, status, out);
            return;
        }
        if let Some(transfer) = self.transfers.get_mut(&ticket) {
            transfer.phase = Phase::MoveBack(status);
        }
        if discarded {
            // What was taken out is not wanted back: it is dropped, and what is in place is newer.
            out.push(Action::Punch { ticket, region, pages });
        } else {
            out.push(Action::MoveBack { ticket, region, pages });
        }
    }

    /// Only some of the pages were discarded: their neighbours are wanted back.
    fn roll_back_in_parts(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        let Some(mut rest) = self.transfers.get(&ticket).copied() else { return };
        while rest.pages.count > 0 {
            let (count, _) = self.alike_in_front(ticket, rest.pages);
            let piece = Transfer { pages: Pages { count, ..rest.pages }, ..rest };
            rest.skip(count);
            let split = self.begin(piece, &mut Vec::new());
            self.inherit_discards(ticket, split);
            self.roll_back(split, status, out);
        }
        self.end(ticket);
    }

    /// The way back met EAGAIN; more may have been discarded since.
    pub(crate) fn repeat_move_back(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        if let Some(transfer) = self.transfers.get_mut(&ticket) {
            transfer.phase = Phase::Copy;
        }
        self.roll_back(ticket, status, out);
    }

    pub(crate) fn move_back_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Phase::MoveBack(status) = transfer.phase else { return };
        match result {
            StepResult::Again => self.again.push(ticket),
            StepResult::Later | StepResult::Io => self.found_no_memory(ticket),
            StepResult::Ok => self.rolled_back(ticket, status, out),
            StepResult::Gone => self.rolled_back(ticket, PageStatus::Gone, out),
        }
    }

    fn rolled_back(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, device, frame, mask, owner, lost, .. } = transfer;
        let zero = matches!(transfer.kind, Kind::Out { zero: true, .. });
        self.fail_children(region, pages, zero, out);
        Self::publish_same(region, pages, Entry::SYSTEM.with_mapped_mask(mask), out);
        if !lost {
            self.release_torn(device, frame, pages.count, transfer.first_owner());
        }
        self.unprotect(region, pages, out);
        self.note(owner, pages, status);
        self.end(ticket);
    }

    pub(crate) fn punch_done(
        &mut self,
        dir: &impl Directory,
        ticket: Ticket,
        result: StepResult,
        out: &mut Vec<Action>,
    ) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        match transfer.phase {
            Phase::PunchStray => return self.fill(ticket, out),
            Phase::MoveBack(_) => return self.move_back_done(ticket, result, out),
            _ => {}
        }
        if matches!(result, StepResult::Io | StepResult::Again | StepResult::Later) {
            // Some of the system pages may be gone already: the only way is forward.
            self.again.push(ticket);
            return;
        }
        if matches!(transfer.kind, Kind::Drop { .. }) {
            return self.dropped(ticket, out);
        }
        let Transfer { region, pages, owner, .. } = transfer;
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Ok);
        // Where they are the entries say: after a restart a run is punched again wherever its frames are.
        let discarded = self.discards.remove(&ticket).unwrap_or_default();
        self.end(ticket);
        for part in discarded {
            self.discard_now(dir, region, part, out);
        }
    }

    /// Nobody can take pages out of the address space any more. Those that are still there hold what their frames hold, since nobody was
    /// given the frames before they were punched: they are the valid copy again.
    pub(crate) fn not_punched(&mut self, dir: &impl Directory, ticket: Ticket, left: &[Pages], out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, .. } = transfer;
        if transfer.phase == Phase::Punch && matches!(transfer.kind, Kind::Out { .. }) {
            for page in left.iter().filter_map(|run| run.overlap(pages)).flat_map(Pages::iter) {
                let entry = Self::entry(dir, region, page);
                if entry.lives_on_device() {
                    Self::publish_same(region, Pages::one(page), Entry::SYSTEM.with_pinned(entry.pinned()), out);
                    self.release(entry.device(), entry.frame(), 1, Owner { region, page });
                    self.unprotect(region, Pages::one(page), out);
                }
            }
        }
        self.punch_done(dir, ticket, StepResult::Ok, out);
    }

    /// The system pages are not valid any more and are punched (again), as the end of the way out.
    pub(crate) fn punch_again(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let kind = Kind::Out { zero: false, keep: false };
        let transfer = Transfer { phase: Phase::Punch, ..Transfer::new(region, pages, kind) };
        let ticket = self.begin(transfer, &mut Vec::new());
        out.push(Action::Punch { ticket, region, pages });
    }
}

/// Neighbouring runs of one fate, cut or padded to exactly `count` pages: what the shell does not mention stayed where it was.
fn pieces(runs: &[CopyRun], count: u64) -> Vec<(u64, PageStatus)> {
    let mut pieces: Vec<(u64, PageStatus)> = Vec::new();
    let mut left = count;
    let rest = CopyRun { count, status: CopyStatus::Io };
    for run in runs.iter().chain([&rest]) {
        let status = match run.status {
            CopyStatus::Ok | CopyStatus::OkHuge => PageStatus::Ok,
            CopyStatus::Busy => PageStatus::Busy,
            CopyStatus::Gone => PageStatus::Gone,
            CopyStatus::Locked => PageStatus::Pinned,
            CopyStatus::NoMemory => PageStatus::NoMemory,
            CopyStatus::Io => PageStatus::Io,
            CopyStatus::Kept => PageStatus::NotSelected,
        };
        let count = run.count.min(left);
        left -= count;
        match pieces.last_mut() {
            _ if count == 0 => {}
            Some(piece) if piece.1 == status => piece.0 += count,
            _ => pieces.push((count, status)),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(count: u64, status: CopyStatus) -> CopyRun {
        CopyRun { count, status }
    }

    #[test]
    fn an_answer_of_any_length_covers_every_page_once() {
        let runs = [run(2, CopyStatus::Ok), run(1, CopyStatus::OkHuge), run(1, CopyStatus::Busy)];
        assert_eq!(pieces(&runs, 4), [(3, PageStatus::Ok), (1, PageStatus::Busy)]);
        assert_eq!(pieces(&runs, 2), [(2, PageStatus::Ok)], "too long");
        assert_eq!(pieces(&runs, 9), [(3, PageStatus::Ok), (1, PageStatus::Busy), (5, PageStatus::Io)], "too short");
        assert_eq!(pieces(&[], 1), [(1, PageStatus::Io)]);
    }
}
