//! Device to device, and the end of a read-only copy.
//!
//! A page that moves across is `MovingHome` meanwhile: its old frame is the authority, and a pager that dies leaves a page that
//! comes home. The new frame is named by nobody until the copy is done, so nothing has to be undone.

use crate::core::Core;
use crate::entry::{Entry, PageState};
use crate::event::{Action, Cause, DeviceId, PageStatus, Pages, RegionId, Ticket, TraceKind};
use crate::policy::Policy;
use crate::transfer::{Kind, Transfer};

impl<P: Policy> Core<P> {
    /// Starts a run of device pages on its way to frames of another device that were just allocated.
    #[allow(clippy::too_many_arguments, reason = "one transfer's own fields")]
    pub(crate) fn start_across(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u16,
        to: (DeviceId, u32),
        owner: u64,
        cause: Cause,
        out: &mut Vec<Action>,
    ) {
        let moving = first.with_state(PageState::MovingHome).with_huge(false).with_mapped_mask(mask);
        Self::publish_frames(region, pages, moving, out);
        let kind = Kind::Across { to: to.0, to_frame: to.1, target_lost: false };
        let owner = Some(owner);
        let transfer = Transfer { owner, cause, ..Transfer::of(region, pages, moving, mask, kind) };
        let ticket = self.begin(transfer, out);
        self.discard_as_marked(ticket, first);
        self.revoke_or(ticket, out, Self::copy);
    }

    pub(crate) fn across_copied(&mut self, ticket: Ticket, failed: Option<PageStatus>, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, kind, owner, .. } = transfer;
        let Kind::Across { to, to_frame, target_lost } = kind else { return };
        let status = if target_lost { Some(PageStatus::Io) } else { failed };
        if let Some(status) = status {
            if !target_lost {
                self.release_torn(to, to_frame, pages.count, transfer.first_owner());
            }
            self.stay_on_device(ticket, status, out);
            return;
        }
        self.stats.pages_across += pages.count;
        self.trace(TraceKind::MigrateEnd, &transfer, out);
        let entry = self.arrived_entry(region, to, to_frame);
        Self::publish_frames(region, pages, entry, out);
        self.show_frames(region, pages, entry, out);
        self.give_back(&transfer, pages.count);
        self.policy.moved_out(region, pages, to, transfer.time_us(self.now_us));
        if let Some(transfer) = self.transfers.get_mut(&ticket) {
            (transfer.device, transfer.frame, transfer.lost) = (to, to_frame, false);
        }
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Ok);
        self.drop_discarded(ticket, out);
        self.end(ticket);
    }

    /// Starts the end of read-only copies: devices are revoked, then the CPU may write again.
    pub(crate) fn start_collapse(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u16,
        owner: Option<u64>,
        out: &mut Vec<Action>,
    ) -> Ticket {
        // A pager that dies now finds the system page there when it fills: that is the end of the way home.
        let moving = first.with_state(PageState::MovingHome).with_mapped_mask(mask);
        Self::publish_frames(region, pages, moving, out);
        let transfer = Transfer { owner, ..Transfer::of(region, pages, moving, mask, Kind::Collapse) };
        let ticket = self.begin(transfer, out);
        self.revoke_or(ticket, out, Self::finish_collapse);
        ticket
    }

    pub(crate) fn finish_collapse(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, owner, .. } = transfer;
        Self::publish_same(region, pages, Entry::SYSTEM, out);
        self.give_back(&transfer, pages.count);
        self.stats.collapsed += pages.count;
        self.unprotect(region, pages, out);
        self.note(owner, pages, PageStatus::Ok);
        self.end(ticket);
    }
}
