//! Transfers: one run of pages of one region on its way out, home, or into nothing.
//!
//! ```text
//!  out:   Protect -> [Revoke] -> Copy -> (publish Device) -> Punch -> wake, end
//!                       \-- failed --> (publish System), unprotect, end
//!  home:  [Revoke] -> Fill -> (publish System, free frames) -> end     what else can happen: home.rs
//!  drop:  [Revoke] -> (publish Absent), scrub the frames, end
//!  teardown: [Revoke] -> DropRegion -> scrub the frames
//! ```
//!
//! While a transfer is under way its pages are `Moving*` and nobody else touches them. CPU faults on them are ignored: the wake
//! at the end (or the fill itself) makes the kernel raise them again.

use crate::core::{Core, KEEPER};
use crate::entry::{DEVICE_COUNT_MAX, Entry, PageState, PoisonReason};
use crate::event::{Action, DeviceId, Directory, Outcome, PageStatus, Pages, RegionId, ReqId, StepResult, Ticket};
use crate::frames::Owner;
use crate::policy::Policy;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// System to device; `zero`: nothing to copy.
    Out { zero: bool },
    /// Device to system. `recovering`: an earlier pager may have filled some pages.
    Home { recovering: bool },
    /// The content is gone; `frames`: it was on a device.
    Drop { frames: bool },
    /// The whole region goes.
    Teardown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Protect,
    Revoke,
    Copy,
    Punch,
    PunchStray,
    Fill,
    /// Asks whether the system page exists: `Continue`.
    Probe,
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
    /// Devices that map the pages, until revoked.
    pub mask: u8,
    /// The pages are pinned (they can only be on their way home).
    pub pinned: bool,
    /// Request that is told.
    pub owner: Option<u64>,
    /// Request that made room by this eviction: it looks first when the room is there.
    pub sponsor: Option<u64>,
    /// What a log line about the copy names.
    pub req: ReqId,
    pub tries: u8,
    /// The frames are gone: the device's memory was replaced. Nothing is read from them or given back.
    pub lost: bool,
}

impl<P: Policy> Core<P> {
    fn begin(&mut self, transfer: Transfer) -> Ticket {
        let ticket = self.ticket();
        if let Some(info) = self.regions.get_mut(&transfer.region) {
            info.transfers += 1;
        }
        if let Some(request) = transfer.owner.and_then(|order| self.requests.get_mut(&order)) {
            request.outstanding += 1;
        }
        self.transfers.insert(ticket, transfer);
        ticket
    }

    pub(crate) fn end(&mut self, ticket: Ticket) {
        let Some(transfer) = self.transfers.remove(&ticket) else { return };
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

    /// Starts a run of settled system pages on its way to frames that were just allocated.
    #[allow(clippy::too_many_arguments, reason = "one transfer's own fields")]
    pub(crate) fn start_out(
        &mut self,
        region: RegionId,
        pages: Pages,
        device: DeviceId,
        frame: u32,
        mask: u8,
        zero: bool,
        owner: u64,
        out: &mut Vec<Action>,
    ) {
        // The mask stays in the entries until the revocation is done: a crash must not forget who maps the system page.
        let moving = Entry::SYSTEM.with_state(PageState::MovingOut).with_mapped_mask(mask);
        Self::publish_same(region, pages, moving, out);
        let kind = Kind::Out { zero };
        let owner = Some(owner);
        let ticket = self.begin(Transfer {
            region,
            pages,
            device,
            frame,
            kind,
            phase: Phase::Protect,
            mask,
            pinned: false,
            owner,
            sponsor: None,
            req: ReqId(0),
            tries: 0,
            lost: false,
        });
        out.push(Action::WriteProtect { ticket, region, pages, on: true });
    }

    /// Starts a run of device pages on its way home. `first` is the entry of its first page.
    pub(crate) fn start_home(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u8,
        owner: Option<u64>,
        out: &mut Vec<Action>,
    ) {
        let moving = first.with_state(PageState::MovingHome).with_mapped_mask(mask);
        Self::publish_frames(region, pages, moving, out);
        self.continue_home(region, pages, moving, false, false, owner, out);
    }

    /// The part of `start_home` that a new pager repeats. `lost`: the frames hold nothing, only a system page can be found.
    #[allow(clippy::too_many_arguments, reason = "one transfer's own fields")]
    pub(crate) fn continue_home(
        &mut self,
        region: RegionId,
        pages: Pages,
        moving: Entry,
        recovering: bool,
        lost: bool,
        owner: Option<u64>,
        out: &mut Vec<Action>,
    ) {
        let mask = moving.mapped_mask();
        let transfer = Transfer {
            region,
            pages,
            device: moving.device(),
            frame: moving.frame(),
            kind: Kind::Home { recovering },
            phase: Phase::Revoke,
            mask,
            pinned: moving.pinned(),
            owner,
            sponsor: None,
            req: ReqId(0),
            tries: 0,
            lost,
        };
        let ticket = self.begin(transfer);
        self.revoke_or(ticket, out, Self::fill);
    }

    /// Starts dropping a run: device pages in consecutive frames, or system pages that devices map in place.
    pub(crate) fn start_drop(
        &mut self,
        region: RegionId,
        pages: Pages,
        first: Entry,
        mask: u8,
        owner: Option<u64>,
        out: &mut Vec<Action>,
    ) {
        let frames = first.owns_frame();
        if frames {
            Self::publish_frames(region, pages, first.with_state(PageState::MovingHome).with_mapped_mask(mask), out);
        } else {
            Self::publish_same(region, pages, first.with_state(PageState::MovingOut).with_mapped_mask(mask), out);
        }
        let ticket = self.begin(Transfer {
            region,
            pages,
            device: first.device(),
            frame: first.frame(),
            kind: Kind::Drop { frames },
            phase: Phase::Revoke,
            mask,
            pinned: false,
            owner,
            sponsor: None,
            req: ReqId(0),
            tries: 0,
            lost: false,
        });
        self.revoke_or(ticket, out, Self::finish_drop);
    }

    /// Starts the end of a region, once nothing of it moves.
    pub(crate) fn start_teardown(&mut self, region: RegionId, pages: Pages, mask: u8, out: &mut Vec<Action>) {
        let ticket = self.begin(Transfer {
            region,
            pages,
            device: DeviceId(0),
            frame: 0,
            kind: Kind::Teardown,
            phase: Phase::Revoke,
            mask,
            pinned: false,
            owner: None,
            sponsor: None,
            req: ReqId(0),
            tries: 0,
            lost: false,
        });
        self.revoke_or(ticket, out, Self::finish_teardown);
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
            out.push(Action::Revoke { ticket, region, pages, devices: mask });
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
            StepResult::Gone => self.roll_back(ticket, PageStatus::Gone, out),
            StepResult::Io => self.roll_back(ticket, PageStatus::Io, out),
        }
    }

    pub(crate) fn revoke_done(&mut self, _dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.mask = 0;
        match transfer.kind {
            Kind::Out { .. } => self.copy(ticket, out),
            Kind::Home { .. } => self.fill(ticket, out),
            Kind::Drop { .. } => self.finish_drop(ticket, out),
            Kind::Teardown => self.finish_teardown(ticket, out),
        }
    }

    fn copy(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        transfer.phase = Phase::Copy;
        let Transfer { region, pages, device, frame, kind, req, lost, .. } = *transfer;
        if lost || self.is_failed(device) {
            self.doomed.push(ticket);
            return;
        }
        if kind == (Kind::Out { zero: true }) {
            out.push(Action::ZeroFrames { ticket, device, frame, count: pages.count as u32 });
        } else {
            out.push(Action::CopyOut { ticket, region, pages, device, frame, req });
        }
    }

    pub(crate) fn copy_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get_mut(&ticket) else { return };
        let Transfer { region, pages, device, frame, lost, .. } = *transfer;
        match result {
            _ if lost => self.roll_back(ticket, PageStatus::Io, out),
            StepResult::Ok => {
                transfer.phase = Phase::Punch;
                self.punching += 1;
                self.stats.pages_out += pages.count;
                Self::publish_frames(region, pages, Entry::on_device(device, frame), out);
                out.push(Action::Punch { ticket, region, pages });
            }
            StepResult::Again => self.again.push(ticket),
            StepResult::Gone => self.roll_back(ticket, PageStatus::Gone, out),
            StepResult::Io => {
                self.stats.copy_failures += 1;
                self.roll_back(ticket, PageStatus::Io, out);
            }
        }
    }

    /// The system copy stays the authority.
    pub(crate) fn roll_back(&mut self, ticket: Ticket, status: PageStatus, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, device, frame, mask, owner, lost, .. } = transfer;
        Self::publish_same(region, pages, Entry::SYSTEM.with_mapped_mask(mask), out);
        if !lost {
            self.release_torn(device, frame, pages.count);
        }
        self.unprotect(region, pages, out);
        self.note(owner, pages, status);
        self.end(ticket);
    }

    pub(crate) fn punch_done(&mut self, ticket: Ticket, result: StepResult, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        if transfer.phase == Phase::PunchStray {
            self.fill(ticket, out);
            return;
        }
        if matches!(result, StepResult::Io | StepResult::Again) {
            // Some of the system pages may be gone already: the only way is forward.
            self.again.push(ticket);
            return;
        }
        let Transfer { region, pages, owner, .. } = transfer;
        self.punching -= 1;
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Ok);
        self.end(ticket);
    }

    pub(crate) fn poison(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        self.stats.poisoned += pages.count;
        Self::publish_same(region, pages, Entry::poisoned(PoisonReason::DeviceLost), out);
        out.push(Action::Poison { region, pages });
    }

    fn finish_drop(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let Transfer { region, pages, kind, owner, .. } = transfer;
        Self::publish_same(region, pages, Entry::ABSENT, out);
        if kind == (Kind::Drop { frames: true }) {
            self.give_back(&transfer, pages.count);
        }
        out.push(Action::Wake { region, pages });
        self.note(owner, pages, PageStatus::Gone);
        self.end(ticket);
    }

    fn finish_teardown(&mut self, ticket: Ticket, out: &mut Vec<Action>) {
        let Some(transfer) = self.transfers.get(&ticket).copied() else { return };
        let region = transfer.region;
        // First nothing names the frames any more, then they are scrubbed: a crash in between must not find zeroed pages.
        out.push(Action::DropRegion { region });
        for device in (0..DEVICE_COUNT_MAX).map(DeviceId) {
            let runs = self.table(device).map(|table| table.hand_over(region, KEEPER)).unwrap_or_default();
            self.start_scrub(device, runs, out);
        }
        self.end(ticket);
        self.regions.remove(&region);
        self.policy.region_gone(region);
        let order = self.requests.iter().find(|(_, request)| request.is_teardown_of(region)).map(|(order, _)| *order);
        if let Some(request) = order.and_then(|order| self.requests.remove(&order)) {
            self.reply(request.id, Outcome::Done, out);
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
            Phase::Fill => self.fill(ticket, out),
            Phase::Probe => self.probe(ticket, out),
            Phase::Punch => out.push(Action::Punch { ticket, region, pages }),
            Phase::Revoke | Phase::PunchStray => {}
        }
    }

    /// The system pages are not valid any more and are punched (again), as the end of the way out.
    pub(crate) fn punch_again(&mut self, region: RegionId, pages: Pages, out: &mut Vec<Action>) {
        let ticket = self.begin(Transfer {
            region,
            pages,
            device: DeviceId(0),
            frame: 0,
            kind: Kind::Out { zero: false },
            phase: Phase::Punch,
            mask: 0,
            pinned: false,
            owner: None,
            sponsor: None,
            req: ReqId(0),
            tries: 0,
            lost: false,
        });
        self.punching += 1;
        out.push(Action::Punch { ticket, region, pages });
    }

    /// The memory of a device was replaced: whatever moves to it or from it knows.
    pub(crate) fn mark_lost(&mut self, device: DeviceId) {
        for transfer in self.transfers.values_mut().filter(|transfer| transfer.device == device) {
            let has_left = transfer.phase == Phase::Punch || transfer.kind == Kind::Teardown;
            transfer.lost |= !has_left;
        }
    }

    /// Pages on their way from a device.
    pub(crate) fn leaving(&self, device: DeviceId) -> Vec<(RegionId, Pages)> {
        let leaves =
            |t: &&Transfer| t.device == device && matches!(t.kind, Kind::Home { .. } | Kind::Drop { frames: true });
        self.transfers.values().filter(leaves).map(|t| (t.region, t.pages)).collect()
    }

    /// Takes a run that a device must give up for the request `order`: starts it home. Returns false when there is nothing to take.
    #[allow(clippy::too_many_arguments, reason = "one decision's own inputs")]
    pub(crate) fn evict(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        want: u64,
        spare: impl Fn(Owner) -> bool,
        order: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let due = self.transfers.values().filter(|transfer| transfer.phase == Phase::Punch);
        let punching: Vec<_> = due.map(|transfer| (transfer.region, transfer.pages)).collect();
        let dying: Vec<_> = self.regions.iter().filter(|(_, info)| info.dying).map(|(id, _)| *id).collect();
        let settled = |owner: Owner| {
            let entry = Self::entry(dir, owner.region, owner.page);
            entry.state() == PageState::Device
                && entry.device() == device
                && !dying.contains(&owner.region)
                && !punching.iter().any(|(region, pages)| *region == owner.region && pages.contains(owner.page))
        };
        let Some(table) = self.table(device) else { return false };
        let Some((owner, count)) = table.victims(want as u32, |owner| !settled(owner) || spare(owner)) else {
            return false;
        };
        let pages = Pages { first: owner.page, count: u64::from(count) };
        let (run, first, mask) = self.device_run(dir, owner.region, pages);
        self.stats.evicted += run.count;
        self.start_home(owner.region, run, first, mask, None, out);
        let started = self.transfers.last_entry();
        started.into_iter().for_each(|mut eviction| eviction.get_mut().sponsor = Some(order));
        true
    }
}
