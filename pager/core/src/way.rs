//! Bringing a run of pages to a device, wherever they are: room is made, and the first leg of their way begins.

use crate::core::Core;
use crate::entry::PageState;
use crate::event::{Action, Cause, DeviceId, Directory, PageStatus, Pages, RegionId, SpaceId};
use crate::evict::Room;
use crate::frames::{HUGE_PAGES, Owner};
use crate::out::Way;
use crate::policy::Policy;
use crate::walk::Walk;

/// Where to, how and why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub device: DeviceId,
    /// The system pages stay valid (read-mostly).
    pub keep: bool,
    pub cause: Cause,
}

/// What has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// These pages will be on the device when their transfer ends.
    Started(Pages),
    /// These pages do something else first: look at them again.
    First(Pages),
    /// Room is being made, or the device is not there yet.
    Wait,
    /// Room is being looked for: ask again at the next step.
    Again,
    /// There is no room for these pages and none can be made.
    Full(Pages),
}

/// Frames, none, or a failure that somebody ordered.
enum Allocated {
    Frames(u32, u32),
    None,
    Injected,
    /// The program's group has as many as it may have.
    OverQuota,
}

impl<P: Policy> Core<P> {
    /// `pages` begins with a page that is not busy, not pinned, not poisoned and not on the device already.
    #[allow(clippy::too_many_arguments, reason = "one decision's own inputs")]
    pub(crate) fn bring_here(
        &mut self,
        dir: &impl Directory,
        order: u64,
        region: RegionId,
        pages: Pages,
        wish: Wish,
        out: &mut Vec<Action>,
    ) -> Leg {
        let first = Self::entry(dir, region, pages.first);
        if first.state() == PageState::Duplicated {
            let (run, first, mask) = self.frame_run(dir, region, pages);
            self.start_collapse(region, run, first, mask, Some(order), out);
            return Leg::First(run);
        }
        let Some(space) = self.regions.get(&region).map(|info| info.space) else { return Leg::Full(pages) };
        if self.is_failed(wish.device) {
            return Leg::Full(pages);
        }
        if self.table(wish.device).is_none() {
            return Leg::Wait;
        }
        if first.lives_on_device() {
            let source_is_up = !self.is_failed(first.device()) && self.table(first.device()).is_some();
            let (run, first, mask) = self.frame_run(dir, region, pages);
            let allocated = if source_is_up { self.allocate(wish.device, region, run, space) } else { Allocated::None };
            self.split_huge(dir, region, run, out);
            if let Allocated::Frames(frame, count) = allocated {
                let run = Pages { count: u64::from(count), ..run };
                self.start_across(region, run, first, mask, (wish.device, frame), order, wish.cause, out);
                return Leg::Started(run);
            }
            // Home first, where it waits for room.
            self.start_home(region, run, first, mask, Some(order), wish.cause, out);
            return Leg::First(run);
        }
        self.send_out(dir, order, region, pages, space, wish, out)
    }

    /// Why pages find no frames on a device ([`Leg::Full`]).
    pub(crate) fn no_room_status(&self, device: DeviceId) -> PageStatus {
        if self.is_failed(device) { PageStatus::Io } else { PageStatus::NoMemory }
    }

    #[allow(clippy::too_many_arguments, reason = "one decision's own inputs")]
    fn send_out(
        &mut self,
        dir: &impl Directory,
        order: u64,
        region: RegionId,
        pages: Pages,
        space: SpaceId,
        wish: Wish,
        out: &mut Vec<Action>,
    ) -> Leg {
        // A copy of what was never touched is a copy of a hole.
        let untouched = Self::entry(dir, region, pages.first).state() == PageState::Absent;
        let zero = untouched && !wish.keep;
        let pages = Self::to_huge_boundary(dir, region, pages);
        let mut mask = 0;
        let run = Self::run_while(dir, region, pages, |offset, entry| {
            let same = entry.is_settled_system() && (entry.state() == PageState::Absent) == untouched;
            let free = !entry.pinned() && !self.busy(region, pages.first + offset, entry);
            if same && free {
                mask |= entry.mapped_mask();
            }
            same && free
        });
        match self.allocate(wish.device, region, run, space) {
            Allocated::Frames(frame, count) => {
                let run = Pages { count: u64::from(count), ..run };
                let Wish { device, keep, cause } = wish;
                self.start_out(region, run, Way { device, frame, mask, zero, keep, cause }, order, out);
                return Leg::Started(run);
            }
            Allocated::Injected => return Leg::Full(Pages::one(run.first)),
            // Nobody else's pages make room for it.
            Allocated::OverQuota => return Leg::Full(run),
            Allocated::None => {}
        }
        let soon = !self.transfers.is_empty() || self.scrubbing() || self.something_dies();
        let leg = match self.evict(dir, wish.device, run.count, order, out) {
            Room::Looking => Leg::Again,
            Room::Coming(_) => Leg::Wait,
            Room::None if soon => Leg::Wait,
            Room::None => Leg::Full(pages),
        };
        if matches!(leg, Leg::Wait) && wish.cause == Cause::DeviceFault && self.frame_waits.insert(order) {
            self.stats.faults_waited_for_frame += 1;
        }
        leg
    }

    fn allocate(&mut self, device: DeviceId, region: RegionId, run: Pages, space: SpaceId) -> Allocated {
        let first = Owner { region, page: run.first };
        if self.allocation_fails(space, false) {
            return Allocated::Injected;
        }
        let left = self.left_of_group(space, device);
        let run = Pages { count: run.count.min(left), ..run };
        if run.count == 0 {
            return Allocated::OverQuota;
        }
        let huge = run.count == u64::from(HUGE_PAGES) && self.is_private(region);
        if huge && !self.allocation_fails(space, true) {
            let frame = self.table(device).and_then(|table| table.allocate_huge(first, space));
            if let Some(frame) = frame {
                return Allocated::Frames(frame, HUGE_PAGES);
            }
        }
        let frames = self.table(device).and_then(|table| table.allocate(run.count as u32, first, space));
        frames.map_or(Allocated::None, |(frame, count)| Allocated::Frames(frame, count))
    }

    pub(crate) fn set_group(&mut self, space: SpaceId, group: Option<(u16, u64)>) {
        match group {
            Some((group, limit_pages)) => {
                self.groups.insert(space, group);
                self.group_limits.insert(group, limit_pages);
            }
            None => drop(self.groups.remove(&space)),
        }
        let number = group.map_or(0, |(group, _)| group);
        self.all_tables_mut().for_each(|table| table.set_group(space, number));
    }

    /// How many frames of a device more a space may have, with all others of its group.
    pub fn left_of_group(&self, space: SpaceId, device: DeviceId) -> u64 {
        let Some(group) = self.groups.get(&space) else { return u64::MAX };
        let limit = self.group_limits.get(group).copied().unwrap_or(u64::MAX);
        let charged = self.all_tables().map(|table| u64::from(table.charged(*group)));
        let left = limit.saturating_sub(charged.sum());
        let here = self.device_limits.get(&(*group, device)).copied().unwrap_or(u64::MAX);
        left.min(here.saturating_sub(self.charged_to(*group, device)))
    }

    /// Frames of a device that a group has.
    pub fn charged_to(&self, group: u16, device: DeviceId) -> u64 {
        let claimed = self.walks.iter().filter(|walk| walk.is_of(device)).find_map(Walk::table);
        let table = claimed.or_else(|| self.frames.get(usize::from(device.0))?.as_ref());
        table.map_or(0, |table| u64::from(table.charged(group)))
    }

    /// The test hook's countdown.
    fn allocation_fails(&mut self, space: SpaceId, huge: bool) -> bool {
        let Some(left) = self.failing_allocation.get_mut(&(space, huge)) else { return false };
        let fails = *left == 1;
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.failing_allocation.remove(&(space, huge));
        }
        fails
    }
}
