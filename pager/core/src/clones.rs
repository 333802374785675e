//! A fork takes as many turns as the region is large: the child gets a share of its entries each turn.
//!
//! ```text
//!   Forked -> [Revoke what devices map of the next pages] -> share some -> share some -> ... -> Cloned, ForkReady
//!             `------------------------------- again and again ------------------------'
//! ```
//! Until the child has all of them, its parent's region stands still, so that each page is what it was when the process forked, also for
//! the next pager, which begins again: nobody begins anything there ([`Transfer::holds`]), and what is told of it, answers too, is put off
//! in its order. The shell reads nothing of the parent's address space meanwhile ([`Core::stands_still`]): its threads wait, and nobody
//! else. What is never touched costs nothing.

use crate::core::Core;
use crate::event::{Action, CopyRun, CopyStatus, Directory, Event, Pages, RegionId, SpaceId, StepResult, Ticket};
use crate::policy::Policy;
use crate::transfer::{Kind, Transfer};

/// To give a frame one more owner takes as long as to look at so many entries.
const LOOKS_PER_SHARE: u64 = 8;

/// A child's region that has not got all of its entries.
#[derive(Debug)]
pub(crate) struct Cloning {
    /// Holds the parent's pages.
    ticket: Ticket,
    parent: RegionId,
    child: RegionId,
    /// The first page that the child has no entry of.
    next: u64,
    /// Up to here no device maps what both will own.
    unmapped: u64,
    /// Devices are letting go.
    is_revoking: bool,
}

/// The answer's ticket.
fn ticket_of(event: &Event) -> Option<Ticket> {
    Some(match event {
        Event::WpDone { ticket, .. }
        | Event::RevokeDone { ticket, .. }
        | Event::CpuMapped { ticket, .. }
        | Event::CopyDone { ticket, .. }
        | Event::CopiedRuns { ticket, .. }
        | Event::MoveBackDone { ticket, .. }
        | Event::ZeroDone { ticket, .. }
        | Event::PunchDone { ticket, .. }
        | Event::NotPunched { ticket, .. }
        | Event::PoisonDone { ticket, .. }
        | Event::FillDone { ticket, .. }
        | Event::CpuFillDone { ticket, .. } => *ticket,
        _ => return None,
    })
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
            out.push(Action::Cloned { region: child });
            out.push(Action::ForkReady { region: child });
            return;
        };
        if !self.regions.contains_key(&child) {
            self.add_region(child, space, info.page_count, info.backing);
        }
        let all = Pages { first: 0, count: info.page_count };
        let ticket = self.begin(Transfer::new(parent, all, Kind::Fork { child, devices: 0 }), out);
        self.clones.push_front(Cloning { ticket, parent, child, next: 0, unmapped: 0, is_revoking: false });
        // What is small is done at once.
        self.clone_some(dir, out);
    }

    /// A child is being made of the region, or what was put off meanwhile is not dealt with: nothing that its address space has to say is
    /// to be read.
    #[must_use]
    pub fn stands_still(&self, region: RegionId) -> bool {
        self.is_cloned(region) || self.put_off.iter().any(|event| self.is_told(event) == Some(region))
    }

    fn is_cloned(&self, region: RegionId) -> bool {
        self.clones.iter().any(|clone| clone.parent == region)
    }

    /// The region that a fact is about, if facts about it can be put off.
    fn is_told(&self, event: &Event) -> Option<RegionId> {
        match *event {
            Event::CpuFault { region, .. } | Event::Unmapped { region, .. } | Event::Removed { region, .. } => {
                Some(region)
            }
            Event::Forked { parent, .. } | Event::ForkedBefore { parent, .. } => Some(parent),
            ref answer => self.region_of(ticket_of(answer)?),
        }
    }

    fn region_of(&self, ticket: Ticket) -> Option<RegionId> {
        let op = || self.cpu_ops.get(&ticket).map(|op| op.region);
        self.transfers.get(&ticket).map(|transfer| transfer.region).or_else(op)
    }

    /// The region stands still: this is kept for later.
    pub(crate) fn puts_off(&mut self, event: &Event) -> bool {
        if self.clones.is_empty() && self.put_off.is_empty() {
            return false;
        }
        // The clone's own revocation.
        let own = |clone: &Cloning| ticket_of(event) == Some(clone.ticket);
        if self.clones.iter().any(own) || self.is_told(event).is_none_or(|region| !self.stands_still(region)) {
            return false;
        }
        if let Event::Forked { parent, child, space } = *event
            && let Some(info) = self.regions.get(&parent).copied()
        {
            // It can end before it has begun.
            self.add_region(child, space, info.page_count, info.backing);
        }
        self.put_off.push_back(event.clone());
        true
    }

    /// What was put off and is due now, the oldest first.
    pub(crate) fn take_put_off(&mut self) -> Option<Event> {
        loop {
            let place = self.put_off.iter().position(|event| self.is_due(event))?;
            let event = self.put_off.remove(place)?;
            let has_ended = |child: &RegionId| !self.regions.contains_key(child);
            if !matches!(&event, Event::Forked { child, .. } if has_ended(child)) {
                return Some(self.as_it_is_now(event));
            }
        }
    }

    /// A copy to a device that has been given up since has come to nothing.
    fn as_it_is_now(&self, event: Event) -> Event {
        let is_lost = |ticket: &Ticket| {
            self.transfers.get(ticket).is_some_and(|transfer| match transfer.kind {
                Kind::Across { to, .. } => self.is_failed(to),
                _ => self.is_failed(transfer.device),
            })
        };
        match event {
            Event::CopyDone { ticket, result: StepResult::Ok } if is_lost(&ticket) => {
                Event::CopyDone { ticket, result: StepResult::Io }
            }
            Event::ZeroDone { ticket, result: StepResult::Ok } if is_lost(&ticket) => {
                Event::ZeroDone { ticket, result: StepResult::Io }
            }
            Event::CopiedRuns { ticket, mut runs } if is_lost(&ticket) => {
                let copied = |run: &&mut CopyRun| matches!(run.status, CopyStatus::Ok | CopyStatus::OkHuge);
                runs.iter_mut().filter(copied).for_each(|run| run.status = CopyStatus::Io);
                Event::CopiedRuns { ticket, runs }
            }
            event => event,
        }
    }

    /// A step that waits to be tried again belongs to a region that stands still.
    pub(crate) fn waits_for_a_clone(&self, ticket: Ticket) -> bool {
        !self.clones.is_empty() && self.region_of(ticket).is_some_and(|region| self.is_cloned(region))
    }

    /// Something can be done for a child, or was put off and is due.
    pub(crate) fn has_clone_work(&self) -> bool {
        self.clones.iter().any(|clone| !clone.is_revoking) || self.put_off.iter().any(|event| self.is_due(event))
    }

    fn is_due(&self, event: &Event) -> bool {
        self.is_told(event).is_none_or(|region| !self.is_cloned(region))
    }

    /// A share of the first clone that can go on.
    pub(crate) fn clone_some(&mut self, dir: &impl Directory, out: &mut Vec<Action>) -> bool {
        let Some(place) = self.clones.iter().position(|clone| !clone.is_revoking) else { return false };
        let Some(mut clone) = self.clones.remove(place) else { return false };
        let page_count = self.regions.get(&clone.parent).map_or(0, |info| info.page_count);
        // Who is gone needs nothing more.
        let end = if self.is_dying(clone.child) { clone.next } else { page_count };
        // What was dropped meanwhile is looked at in a call of its own.
        let has_shared = clone.next < end && self.discards.contains_key(&clone.ticket);
        if clone.unmapped < end && clone.next == clone.unmapped {
            self.unmap_ahead(dir, &mut clone, end, out);
        }
        if !clone.is_revoking {
            self.share_some(dir, &mut clone, end, out);
        }
        if clone.next >= end && !has_shared {
            out.push(Action::Cloned { region: clone.child });
            self.end_and_discard(dir, clone.ticket, out);
            out.push(Action::ForkReady { region: clone.child });
        } else {
            self.clones.push_back(clone);
        }
        true
    }

    /// Devices let go of the next pages that both will own.
    fn unmap_ahead(&mut self, dir: &impl Directory, clone: &mut Cloning, end: u64, out: &mut Vec<Action>) {
        let ahead = Pages { first: clone.next, count: end - clone.next };
        let (mut looks, mut mask) = (self.budget, 0);
        clone.unmapped = ahead.first;
        for (run, entry) in Self::alike_parts(dir, clone.parent, ahead) {
            if looks == 0 {
                break;
            }
            looks -= 1;
            if self.is_shared_at_fork(clone.parent, run.first, entry) {
                mask |= entry.mapped_mask();
            }
            clone.unmapped = run.end();
        }
        if mask != 0 {
            let pages = Pages { first: ahead.first, count: clone.unmapped - ahead.first };
            clone.is_revoking = true;
            self.stats.revokes += 1;
            self.not_mapped(clone.parent, pages, mask);
            out.push(Action::Revoke { ticket: clone.ticket, region: clone.parent, pages, devices: mask });
        }
    }

    fn share_some(&mut self, dir: &impl Directory, clone: &mut Cloning, end: u64, out: &mut Vec<Action>) {
        let end = clone.unmapped.min(end);
        let mut left = Pages { first: clone.next, count: end.saturating_sub(clone.next) };
        let mut shares = (self.budget / LOOKS_PER_SHARE).max(1);
        while left.count > 0 && shares > 0 {
            let (count, cost) = self.fork_run(dir, clone.parent, clone.child, left, shares, out);
            left = left.after(count);
            shares = shares.saturating_sub(cost);
        }
        clone.next = left.first.max(clone.next);
    }

    /// Devices have let go of some pages of a region that is being cloned; `false`: it is not.
    pub(crate) fn clone_goes_on(&mut self, dir: &impl Directory, ticket: Ticket, out: &mut Vec<Action>) -> bool {
        let Some(place) = self.clones.iter().position(|clone| clone.ticket == ticket) else { return false };
        if let Some(clone) = self.clones.remove(place) {
            self.clones.push_front(Cloning { is_revoking: false, ..clone });
        }
        self.clone_some(dir, out)
    }
}
