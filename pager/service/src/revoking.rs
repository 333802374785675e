//! Carrying out revocations; the idea and the bookkeeping are in `revoke.rs`.

use std::time::{Duration, Instant};

use uhmm_ipc::message::pager;
use uhmm_kit::record::{Place, What};
use uhmm_pager_core::{CPU, Event, Pages, RegionId, StepResult, Ticket};

use crate::revoke::{PendingRevoke, Purpose};
use crate::service::{Pager, REVOKE_DEADLINE_MS, TIMER_GATE};
use crate::space::DEVICE_SLOTS;

/// How long the pager looks at a gate in place: device threads stay inside for some microseconds unless they lose their CPU.
const GATE_PATIENCE: Duration = Duration::from_micros(200);
/// After that, how often it looks again between other work.
const GATE_RETRY: Duration = Duration::from_millis(1);

/// A gate that was not empty after a direct revocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateWatch {
    /// Revocation.
    id: u64,
    /// Device.
    device: u8,
    /// When its entries were swapped.
    since: Instant,
}

impl Pager {
    /// Revokes on every device of the mask, directly where page table and gate are shared; and the program's own mappings of frames.
    pub(crate) fn revoke(&mut self, ticket: Ticket, region: RegionId, pages: Pages, mask: u16) {
        let (direct_mask, messages) = self.swap_shared_entries(region, pages, mask as u8);
        let inside = |device: &u8| direct_mask & (1 << device) != 0 && !self.gate_is_empty(*device);
        let inside: Vec<u8> = (0..DEVICE_SLOTS as u8).filter(inside).collect();
        let cpu_parts = if mask & CPU != 0 { self.unmap_cpu(ticket, region, pages) } else { 0 };
        let parts = messages.len() + usize::from(!inside.is_empty()) + cpu_parts;
        if parts == 0 {
            self.stats.revokes_direct += 1;
            self.push(Event::RevokeDone { ticket, result: StepResult::Ok });
            return;
        }
        self.stats.revokes_by_message += 1;
        self.begin_step(What::Invalidate, ticket.0, region, pages, Place::None);
        self.revoke_parts.insert(ticket.0, parts as u32);
        for revoke in messages {
            self.start_revoke(PendingRevoke { purpose: Purpose::Ticket(ticket.0), ..revoke });
        }
        if inside.is_empty() {
            return;
        }
        let mask = inside.iter().fold(0u8, |mask, device| mask | 1 << device);
        let watched = PendingRevoke {
            purpose: Purpose::Ticket(ticket.0),
            space: 0,
            segment: 0,
            first_page: 0,
            page_count: 0,
            waiting_mask: mask,
            fenced_mask: mask,
        };
        let id = self.start_revoke(watched);
        for device in inside {
            self.watch_gate(GateWatch { id, device, since: Instant::now() });
        }
    }

    /// First pass, for all devices before anybody is waited for. Returns the devices that were reached, and what must go by
    /// message: one for each segment with devices that do not share a table of it.
    fn swap_shared_entries(&self, region: RegionId, pages: Pages, device_mask: u8) -> (u8, Vec<PendingRevoke>) {
        let mut direct_mask = 0;
        let mut messages = Vec::new();
        for (segment, part) in self.regions.with_tables(region.0, pages) {
            let mut by_message = device_mask & segment.granted_mask;
            let first_page = part.first - segment.first_page;
            for (id, table) in segment.tables.iter().enumerate() {
                let gated = self.devices[id].as_ref().is_some_and(|device| device.gate.is_some());
                if let Some(table) = table.as_ref().filter(|_| gated && by_message & (1 << id) != 0) {
                    table.revoke(first_page, part.count);
                    direct_mask |= 1 << id;
                    by_message &= !(1 << id);
                }
            }
            if by_message != 0 {
                messages.push(PendingRevoke {
                    purpose: Purpose::Ticket(0),
                    space: segment.space,
                    segment: segment.id,
                    first_page,
                    page_count: part.count,
                    waiting_mask: by_message,
                    fenced_mask: 0,
                });
            }
        }
        (direct_mask, messages)
    }

    /// Second pass: every device thread that was inside before the swap has left, or its process is dead.
    fn gate_is_empty(&self, device: u8) -> bool {
        let Some(device) = self.devices[usize::from(device)].as_ref() else { return true };
        device.gate.as_ref().is_none_or(|gate| gate.wait(GATE_PATIENCE).is_ok())
            || device.pidfd.exited().unwrap_or(false)
    }

    fn watch_gate(&mut self, watch: GateWatch) {
        if self.gate_watches.is_empty() {
            self.service.reactor.add_timer(GATE_RETRY, TIMER_GATE);
        }
        self.gate_watches.push(watch);
    }

    /// Looks again at the gates that were not empty. A thread that stays inside for too long costs its driver the process.
    pub(crate) fn check_gates(&mut self) {
        for watch in std::mem::take(&mut self.gate_watches) {
            if self.gate_is_empty(watch.device) {
                if let Some(revoke) = self.revokes.device_done(watch.id, watch.device) {
                    self.revoke_through(revoke);
                }
            } else if self.revokes.get(watch.id).is_some() {
                if watch.since.elapsed() > Duration::from_millis(u64::from(REVOKE_DEADLINE_MS)) {
                    self.fence(watch.device, "a device thread does not leave a revoked page");
                }
                self.watch_gate(watch);
            }
        }
    }

    pub(crate) fn start_revoke_message(
        &mut self,
        purpose: Purpose,
        space: u64,
        segment: u64,
        first_page: u64,
        page_count: u64,
        waiting_mask: u8,
    ) {
        let revoke = PendingRevoke { purpose, space, segment, first_page, page_count, waiting_mask, fenced_mask: 0 };
        self.start_revoke(revoke);
    }

    fn start_revoke(&mut self, revoke: PendingRevoke) -> u64 {
        let id = self.revokes.insert(revoke);
        if revoke.waiting_mask & !revoke.fenced_mask != 0 {
            self.send_invalidate(id, &revoke);
        }
        id
    }

    pub(crate) fn send_invalidate(&mut self, id: u64, revoke: &PendingRevoke) {
        self.tell_mirror(pager::Event::Invalidate {
            id,
            space: revoke.space,
            region: revoke.segment,
            first_page: revoke.first_page,
            page_count: revoke.page_count,
            device_mask: revoke.waiting_mask & !revoke.fenced_mask,
            unmap: matches!(revoke.purpose, Purpose::Unmap { .. }),
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
            Purpose::Ticket(ticket) => self.revoke_part_through(ticket),
            Purpose::Unmap { region } => self.unmap_through(region, revoke.segment),
        }
    }

    pub(crate) fn revoke_part_through(&mut self, ticket: u64) {
        let Some(left) = self.revoke_parts.get_mut(&ticket) else { return };
        *left -= 1;
        if *left == 0 {
            self.revoke_parts.remove(&ticket);
            self.end_step(What::Invalidate, ticket, true);
            self.push(Event::RevokeDone { ticket: Ticket(ticket), result: StepResult::Ok });
        }
    }
}
