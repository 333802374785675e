//! Carrying out revocations; the idea and the bookkeeping are in `revoke.rs`.

use std::time::Duration;

use uhmm_ipc::message::pager;
use uhmm_pager_core::{Event, Pages, RegionId, StepResult, Ticket};

use crate::revoke::{PendingRevoke, Purpose};
use crate::service::{Pager, REVOKE_DEADLINE_MS};
use crate::space::DEVICE_SLOTS;

impl Pager {
    /// Revokes on every device of the mask; directly where page table and gate are shared.
    pub(crate) fn revoke(&mut self, ticket: Ticket, region: RegionId, pages: Pages, device_mask: u8) {
        let direct_mask = self.swap_shared_entries(region, pages, device_mask);
        let mut left_mask = device_mask & !direct_mask;
        let mut stuck_mask = 0u8;
        for device in (0..DEVICE_SLOTS as u8).filter(|device| direct_mask & (1 << device) != 0) {
            if !self.wait_for_gate(device) {
                self.fence(device, "a device thread does not leave a revoked page");
                stuck_mask |= 1 << device;
            }
        }
        left_mask |= stuck_mask;
        if left_mask == 0 {
            self.stats.revokes_direct += 1;
            self.push(Event::RevokeDone { ticket, result: StepResult::Ok });
            return;
        }
        self.stats.revokes_by_message += 1;
        let Some(space) = self.regions.get(region.0).map(|region| region.space) else {
            self.push(Event::RevokeDone { ticket, result: StepResult::Gone });
            return;
        };
        let revoke = PendingRevoke {
            purpose: Purpose::Ticket(ticket.0),
            space,
            region: region.0,
            first_page: pages.first,
            page_count: pages.count,
            waiting_mask: left_mask,
            fenced_mask: stuck_mask,
        };
        self.start_revoke(revoke);
    }

    /// First pass, for all devices before anybody is waited for. Returns the devices that were reached.
    fn swap_shared_entries(&self, region: RegionId, pages: Pages, device_mask: u8) -> u8 {
        let Some(region) = self.regions.get(region.0) else { return 0 };
        let mut direct_mask = 0;
        for (id, table) in region.tables.iter().enumerate() {
            let gated = self.devices[id].as_ref().is_some_and(|device| device.gate.is_some());
            if let Some(table) = table.as_ref().filter(|_| gated && device_mask & (1 << id) != 0) {
                table.revoke(pages.first, pages.count);
                direct_mask |= 1 << id;
            }
        }
        direct_mask
    }

    /// Second pass: a device thread that was inside before the swap has left.
    fn wait_for_gate(&self, device: u8) -> bool {
        let gate = self.devices[usize::from(device)].as_ref().and_then(|device| device.gate.as_ref());
        gate.is_none_or(|gate| gate.wait(Duration::from_millis(u64::from(REVOKE_DEADLINE_MS))).is_ok())
    }

    pub(crate) fn start_revoke_message(
        &mut self,
        purpose: Purpose,
        space: u64,
        region: u64,
        first_page: u64,
        page_count: u64,
        waiting_mask: u8,
    ) {
        let revoke = PendingRevoke { purpose, space, region, first_page, page_count, waiting_mask, fenced_mask: 0 };
        self.start_revoke(revoke);
    }

    fn start_revoke(&mut self, revoke: PendingRevoke) {
        let id = self.revokes.insert(revoke);
        if revoke.waiting_mask & !revoke.fenced_mask != 0 {
            self.send_invalidate(id, &revoke);
        }
    }

    pub(crate) fn send_invalidate(&mut self, id: u64, revoke: &PendingRevoke) {
        self.tell_mirror(pager::Event::Invalidate {
            id,
            space: revoke.space,
            region: revoke.region,
            first_page: revoke.first_page,
            page_count: revoke.page_count,
            device_mask: revoke.waiting_mask & !revoke.fenced_mask,
            unmap: revoke.purpose == Purpose::Unmap,
            deadline_ms: REVOKE_DEADLINE_MS,
        });
    }

    /// The mirror's answer. Late devices are fenced; their death completes what is left.
    pub(crate) fn invalidate_done(&mut self, id: u64, late_mask: u8) {
        let known = self.revokes.get(id).map_or(0, |revoke| revoke.waiting_mask);
        for device in (0..DEVICE_SLOTS as u8).filter(|device| late_mask & known & (1 << device) != 0) {
            self.fence(device, "it did not acknowledge an invalidation in time");
        }
        if let Some(revoke) = self.revokes.done(id, late_mask) {
            self.revoke_through(revoke);
        }
    }

    pub(crate) fn revoke_through(&mut self, revoke: PendingRevoke) {
        match revoke.purpose {
            Purpose::Ticket(ticket) => {
                self.push(Event::RevokeDone { ticket: Ticket(ticket), result: StepResult::Ok });
            }
            Purpose::Unmap => self.unmap_through(revoke.region),
        }
    }
}
