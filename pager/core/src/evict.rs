//! Making room: pages leave a device because others want its frames, or because somebody says so. The clock of the frame table
//! picks them: what was not used since it last came by goes first. Used is what a device was given lately, and what it has marked
//! in its page table since ([`Directory::take_used`], [`crate::Event::Used`]).

use crate::clock::Found;
use crate::core::Core;
use crate::entry::PageState;
use crate::event::{Action, Cause, CoreError, DeviceId, Directory, Outcome, Pages, RegionId, ReqId, SpaceId, Ticket};
use crate::frames::Owner;
use crate::policy::Policy;
use crate::request::{Next, OUTSTANDING_MAX, Request};

/// What has come of a search for somebody who makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// Pages have begun to leave.
    Coming(Ticket),
    /// The search goes on at the next step.
    Looking,
    /// There is nothing to take.
    None,
}

impl<P: Policy> Core<P> {
    /// Takes a run that a device must give up for the request `order`: starts it home.
    pub(crate) fn evict(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        want: u64,
        order: u64,
        out: &mut Vec<Action>,
    ) -> Room {
        let room = self.evict_run(dir, device, want, order, None, out);
        if let Room::Coming(ticket) = room
            && let Some(transfer) = self.transfers.get_mut(&ticket)
        {
            transfer.sponsor = Some(order);
        }
        room
    }

    /// `only`: of this space, and the request is the owner of what it starts.
    fn evict_run(
        &mut self,
        dir: &impl Directory,
        device: DeviceId,
        want: u64,
        order: u64,
        only: Option<SpaceId>,
        out: &mut Vec<Action>,
    ) -> Room {
        let held: Vec<(RegionId, Pages)> =
            self.transfers.values().filter(|transfer| transfer.holds()).map(|t| (t.region, t.pages)).collect();
        let regions = &self.regions;
        let may_go = |owner: Owner| {
            let info = regions.get(&owner.region).filter(|info| !info.dying);
            info.is_some_and(|info| only.is_none_or(|space| info.space == space))
        };
        let settled = |owner: Owner| {
            let entry = Self::entry(dir, owner.region, owner.page);
            (entry.lives_on_device() || entry.state() == PageState::Duplicated)
                && entry.device() == device
                && may_go(owner)
                && !held.iter().any(|(region, pages)| *region == owner.region && pages.contains(owner.page))
        };
        let Some(table) = self.frames.get_mut(usize::from(device.0)).and_then(Option::as_mut) else {
            return Room::None;
        };
        let used = |owner: Owner| dir.take_used(owner.region, owner.page, device);
        let want = want.min(u64::from(u32::MAX)) as u32;
        let mut search = self.searches.remove(&order).unwrap_or_default();
        let before = search.chances;
        let found = table.victims(want, &mut search, |owner| !settled(owner), used);
        self.stats.second_chances += u64::from(search.chances - before);
        let (first, count) = match found {
            Found::Victim(first, count) => (first, count),
            Found::Nothing => return Room::None,
            Found::NotYet => {
                self.searches.insert(order, search);
                return Room::Looking;
            }
        };
        let owner = only.map(|_| order);
        let region = first.region;
        let (run, entry, mask) = self.frame_run(dir, region, Pages { first: first.page, count: u64::from(count) });
        self.stats.evicted += run.count;
        if entry.state() == PageState::Duplicated {
            return Room::Coming(self.start_collapse(region, run, entry, mask, owner, out));
        }
        self.split_huge(dir, region, run, out);
        Room::Coming(self.start_home(region, run, entry, mask, owner, Cause::Eviction, out))
    }

    /// Marks that somebody else has taken off the device's page table.
    pub(crate) fn used(&mut self, dir: &impl Directory, region: RegionId, pages: Pages, device: DeviceId) {
        let Some(table) = self.table(device) else { return };
        for page in pages.iter() {
            let entry = Self::entry(dir, region, page);
            if entry.owns_frame() && entry.device() == device {
                table.touch(entry.frame());
            }
        }
    }

    pub(crate) fn accept_evict(
        &mut self,
        req: ReqId,
        space: SpaceId,
        device: DeviceId,
        page_count: u64,
        out: &mut Vec<Action>,
    ) {
        let request = Request::evict(req, space, device, page_count);
        if !request.target_is_inside() {
            let error = CoreError::NoSuchDevice { device: device.0 };
            self.reply(Some(req), Outcome::Failed(error), out);
            return;
        }
        let order = self.next_request_order();
        self.queue(order, request);
    }

    /// One run of the space's pages leaves the device.
    pub(crate) fn step_evict(
        &mut self,
        dir: &impl Directory,
        order: u64,
        request: &mut Request,
        (space, device, left): (SpaceId, DeviceId, u64),
        out: &mut Vec<Action>,
    ) -> Next {
        // What is there nobody knows before the device has logged in; of one that is given up nothing is left.
        let is_awaited = self.table(device).is_none() && !self.is_failed(device);
        if request.outstanding >= OUTSTANDING_MAX || is_awaited {
            return Next::Wait;
        }
        if left > 0 {
            match self.evict_run(dir, device, left.min(crate::CHUNK_PAGES), order, Some(space), out) {
                Room::Coming(ticket) => {
                    let count = self.transfers.get(&ticket).map_or(0, |transfer| transfer.pages.count);
                    request.take_from_eviction(count);
                    return Next::Again;
                }
                Room::Looking => return Next::Again,
                Room::None => {}
            }
        }
        if request.outstanding > 0 {
            return Next::Wait;
        }
        Next::Reply(Outcome::Migrated { runs: Vec::new(), moved_pages: request.moved_pages })
    }
}
