//! Transfers: one run of pages of one region on its way out, home, across, or into nothing.
//!
//! ```text
//!  out:      [Protect] -> [Revoke] -> Copy -> (publish Device) -> Punch -> wake, end          out.rs
//!                             \-- failed --> [MoveBack] -> (publish System), unprotect, end
//!  copy:     Protect -> [Revoke] -> Copy -> (publish Duplicated) -> wake, end                 out.rs, `keep`
//!  home:     [Revoke] -> Fill -> (publish System, free frames) -> end                         home.rs
//!  across:   [Revoke] -> Copy -> (publish Device there, free frames here) -> wake, end        across.rs
//!  collapse: [Revoke] -> (publish System, free frames), unprotect, end                        across.rs
//!  drop:     [Revoke] -> (publish Absent, free frames) -> wake, end                           discard.rs
//!  revoke:   Revoke -> (publish unmapped) -> wake, end                                        discard.rs
//!  fork:     [Revoke] -> (publish unmapped) -> ForkReady, wake, end                           fork.rs
//!  lost:     Poison -> (publish System) -> wake, end                                           fork.rs
//!  teardown: [Revoke] -> DropRegion -> scrub the frames                                       discard.rs
//! ```
//!
//! While a transfer is under way its pages are `Moving*`, or held ([`Transfer::holds`]), and nobody else touches them. CPU faults
//! on them are ignored: the wake at the end (or the fill itself) makes the kernel raise them again.

use std::ops::Range;

use crate::core::Core;
use crate::entry::{Entry, PoisonReason};
use crate::event::{
    Action, Cause, DeviceId, Directory, PageStatus, Pages, RegionId, ReqId, StepResult, Target, Ticket, TraceKind,
};
use crate::frames::Owner;
use crate::policy::Policy;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// System to device; `zero`: nothing to copy. `keep`: the system page stays valid, write-protected.
    Out { zero: bool, keep: bool },
    /// Device to system. `recovering`: an earlier pager may have filled some pages.
    Home { recovering: bool },
    /// Device to device; the frames there are named by nobody until the copy is done.
    Across { to: DeviceId, to_frame: u32, target_lost: bool },
    /// The read-only copy on a device goes, the system page stays.
    Collapse,
    /// The content is gone; `frames`: it was on a device.
    Drop { frames: bool },
    /// Some devices lose their mappings, the pages stay where they are.
    Revoke { devices: u16 },
    /// The process forked: what both own must not be written by devices.
    Fork { child: RegionId, devices: u16 },
    /// What a forked child waited for does not come.
    Lost,
    /// The whole region goes.
    Teardown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Protect,
    Revoke,
    Copy,
    /// Private pages go back where they were.
    MoveBack(PageStatus),
    Punch,
    PunchStray,
    FillHuge,
    Fill,
    /// Asks whether the system page exists: `Continue`.
    Probe,
    Poison,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub region: RegionId,
    /// What is left.
    pub pages: Pages,
    pub device: DeviceId,
    /// Frame of the first page that is left.
    pub frame: u32,
    pub kind: Kind,
    pub phase: Phase,
    /// Who maps the pages, until revoked.
    pub mask: u16,
    /// The pages are pinned (they can only be on their way home).
    pub pinned: bool,
    /// Other entries may name the frames too.
    pub shared: bool,
    /// A huge page that shall come home as one.
    pub huge: bool,
    /// Request that is told.
    pub owner: Option<u64>,
    /// Request that made room by this eviction: it looks first when the room is there.
    pub sponsor: Option<u64>,
    pub cause: Cause,
    /// What a log line about the copy names.
    pub req: ReqId,
    pub tries: u8,
    /// How long it waited when it found no memory last.
    pub pause_us: u64,
    /// Since when it is under way; parts of it keep that.
    pub begun_us: Option<u64>,
    /// The frames are gone: the device's memory was replaced. Nothing is read from them or given back.
    pub lost: bool,
}

impl Transfer {
    /// One that begins with its revocation and belongs to no request.
    pub fn new(region: RegionId, pages: Pages, kind: Kind) -> Self {
        Self {
            region,
            pages,
            device: DeviceId(0),
            frame: 0,
            kind,
            phase: Phase::Revoke,
            mask: 0,
            pinned: false,
            shared: false,
            huge: false,
            owner: None,
            sponsor: None,
            cause: Cause::AddressSpace,
            req: ReqId(0),
            tries: 0,
            pause_us: 0,
            begun_us: None,
            lost: false,
        }
    }

    /// As `new`, of pages whose frames (or mappings) the entry of the first one names.
    pub fn of(region: RegionId, pages: Pages, first: Entry, mask: u16, kind: Kind) -> Self {
        let (device, frame) = (first.device(), first.frame());
        let (pinned, shared) = (first.pinned(), first.shared());
        Self { device, frame, mask, pinned, shared, ..Self::new(region, pages, kind) }
    }

    /// From its beginning to now.
    pub fn time_us(&self, now_us: u64) -> Range<u64> {
        self.begun_us.unwrap_or(now_us)..now_us
    }

    /// Nobody may begin anything with its pages although their entries are settled.
    pub fn holds(&self) -> bool {
        self.phase == Phase::Punch || matches!(self.kind, Kind::Revoke { .. } | Kind::Fork { .. })
    }

    /// Owner of the first frame that is left.
    pub fn first_owner(&self) -> Owner {
        Owner { region: self.region, page: self.pages.first }
    }

    /// The entry of the first page as it is while the frames are the authority.
    pub fn entry_on_device(&self) -> Entry {
        Entry::on_device(self.device, self.frame).with_pinned(self.pinned).with_shared(self.shared)
    }

    /// Goes on without its first `count` pages.
    pub fn skip(&mut self, count: u64) {
        self.pages = self.pages.after(count);
        self.frame = self.frame.wrapping_add(count as u32);
    }
}

impl<P: Policy> Core<P> {
    pub(crate) fn begin(&mut self, mut transfer: Transfer, out: &mut Vec<Action>) -> Ticket {
        let ticket = self.ticket();
        transfer.begun_us.get_or_insert(self.now_us);
        if transfer.req == ReqId(0) {
            transfer.req = self.stepping;
        }
        if let Some(info) = self.regions.get_mut(&transfer.region) {
            info.transfers += 1;
        }
        if let Some(request) = transfer.owner.and_then(|order| self.requests.get_mut(&order)) {
            request.outstanding += 1;
        }
        self.holding += u32::from(transfer.holds());
        self.trace(TraceKind::MigrateStart, &transfer, out);
        self.transfers.insert(ticket, transfer);
        ticket
    }

    pub(crate) fn end(&mut self, ticket: Ticket) {
        let Some(transfer) = self.transfers.remove(&ticket) else { return };
        self.ended += 1;
        self.discards.remove(&ticket);
        self.holding -= u32::from(transfer.holds());
        if let Some(info) = self.regions.get_mut(&transfer.region) {
            info.transfers -= 1;
        }
        if let Some(request) = transfer.owner.and_then(|order| self.requests.get_mut(&order)) {
            request.outstanding -= 1;
        }
        self.unblock_all();
        if let Some(order) = transfer.owner.or(transfer.sponsor) {
            self.prefer(order);
        }
    }

    /// A transfer goes into its last step, in which its pages are settled but not free for anybody.
    pub(crate) fn hold_for_punch(&mut self, ticket: Ticket) {
        if let Some(transfer) = self.transfers.get_mut(&ticket).filter(|transfer| !transfer.holds()) {
            transfer.phase = Phase::Punch;
            self.holding += 1;
        }
    }

    /// For profilers: what moves from where to where.
    pub(crate) fn trace(&self, kind: TraceKind, transfer: &Transfer, out: &mut Vec<Action>) {
        let here = Target::Device(transfer.device);
        let (from, to) = match transfer.kind {
            Kind::Out { .. } => (Target::Home, here),
            Kind::Home { recovering: false } => (here, Target::Home),
            Kind::Across { to, .. } => (here, Target::Device(to)),
            _ => return,
        };
        let Transfer { region, pages, cause, req, .. } = *transfer;
        if pages.count > 0 {
            out.push(Action::Trace { kind, cause, req, region, pages, from, to });
        }
    }

    pub(crate) fn revoke_or(
        &mut self,
        ticket: Ticket,
        out: &mut Vec<Action>,
        next: fn(&mut Self, Ticket, &mut Vec<Action>),
    ) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.phase = Phase::Revoke;
        let Transfer { region, pages, mask, .. } = *transfer;
        if mask == 0 {
            next(self, ticket, out);
        } else {
            self.stats.revokes += 1;
            self.not_mapped(region, pages, mask);
            out.push(Action::Revoke { ticket, region, pages, devices: mask });
        }
    }

    pub(crate) fn revoke_done(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.mask = 0;
        match transfer.kind {
            Kind::Out { .. } | Kind::Across { .. } => self.copy(ticket, out),
            Kind::Home { .. } => self.fill(ticket, out),
            Kind::Collapse => self.finish_collapse(ticket, out),
            Kind::Drop { .. } => self.finish_drop(ticket, out),
            Kind::Revoke { .. } => self.finish_revoke(dir, ticket, out),
            Kind::Fork { .. } => self.finish_fork(dir, ticket, out),
            Kind::Teardown => self.finish_teardown(ticket, out),
            // Nobody maps what has never been there.
            Kind::Lost => {}
        }
    }

    pub(crate) fn copy(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.phase = Phase::Copy;
        let Transfer { region, pages, device, frame, kind, req, lost, .. } = *transfer;
        let count = pages.count as u32;
        if lost || self.is_failed(device) {
            self.doomed.push(ticket);
            return;
        }
        match kind {
            Kind::Out { zero: true, .. } => out.push(Action::ZeroFrames { ticket, device, frame, count }),
            Kind::Out { keep, .. } => out.push(Action::CopyOut { ticket, region, pages, device, frame, keep, req }),
            Kind::Across { to, target_lost, .. } if target_lost || self.is_failed(to) => self.doomed.push(ticket),
            Kind::Across { to, to_frame, .. } => {
                out.push(Action::CopyAcross { ticket, from: device, from_frame: frame, to, frame: to_frame, count });
            }
            _ => {}
        }
    }

    /// Answer to a copy that succeeds or fails as a whole.
    pub(crate) fn copy_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let failed = match result {
            StepResult::Again => return self.again.push(ticket),
            StepResult::Later => return self.found_no_memory(ticket),
            _ if transfer.lost => Some(PageStatus::Io),
            StepResult::Ok => None,
            StepResult::Gone => Some(PageStatus::Gone),
            StepResult::Io => {
                self.stats.copy_failures += 1;
                Some(PageStatus::Io)
            }
        };
        match (transfer.kind, failed) {
            (Kind::Across { .. }, failed) => self.across_copied(ticket, failed, out),
            (_, Some(status)) => self.roll_back(ticket, status, out),
            (_, None) => self.copied(ticket, false, out),
        }
    }

    /// Brings the step that met EAGAIN again.
    pub(crate) fn repeat_step(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        if self.cpu_ops.contains_key(&ticket) {
            self.repeat_cpu_op(dir, ticket, out);
            return;
        }
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, .. } = transfer;
        match transfer.phase {
            Phase::Protect => out.push(Action::WriteProtect { ticket, region, pages, on: true }),
            Phase::Copy => self.copy(ticket, out),
            Phase::MoveBack(status) => self.repeat_move_back(ticket, status, out),
            Phase::FillHuge | Phase::Fill => self.fill(ticket, out),
            Phase::Probe => self.probe(ticket, out),
            Phase::Punch => out.push(Action::Punch { ticket, region, pages }),
            Phase::Poison => out.push(Action::PoisonLost { ticket, region, pages }),
            Phase::Revoke | Phase::PunchStray => {}
        }
    }

    pub(crate) fn poison(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        self.stats.poisoned += pages.count;
        Self::publish_same(region, pages, Entry::poisoned(PoisonReason::DeviceLost), out);
        out.push(Action::Poison { region, pages });
    }

    /// The frames of the first `count` pages are free. In replaced memory they are so already.
    pub(crate) fn give_back(&mut self, transfer: &Transfer, count: u64) {
        if !transfer.lost {
            self.release(transfer.device, transfer.frame, count, transfer.first_owner());
        }
    }

    /// The memory of a device was replaced: whatever moves to it or from it knows.
    pub(crate) fn mark_lost(&mut self, device: DeviceId) {
        for transfer in self.transfers.values_mut() {
            if let Kind::Across { to, target_lost, .. } = &mut transfer.kind {
                *target_lost |= *to == device;
            }
            let has_left = transfer.phase == Phase::Punch
                || matches!(transfer.kind, Kind::Teardown | Kind::Revoke { .. } | Kind::Fork { .. });
            transfer.lost |= transfer.device == device && !has_left;
        }
    }
}
