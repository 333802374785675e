//! Fork: the kernel copies the address space at once; the event, and with it what is on devices, comes when the pager reads it.
//!
//! ```text
//!   fork() --> copy of what is in place ........ event unread: nothing is filled or taken out
//!                 `-- read --> child's region: in place as copied; elsewhere as the parent's is now
//!                                 `-- ForkReady --> the child's faults are served
//! ```
//! Until then the parent's devices may still write what both share, and the child reads that. After it nobody may.

use super::check::Violation;
use super::machine::{CpuAccess, PageModel, RegionModel, World};
use super::simulator::Simulator;
use crate::{DeviceId, Event, Pages, RegionId, SpaceId};

/// Clients and their children, living and dead.
const SLOTS_MAX: usize = 4;

impl World {
    /// The parent's pages as the kernel has copied them.
    fn copied(&self, parent: RegionId) -> Vec<PageModel> {
        let pages = self.regions.get(&parent).map_or(&[][..], |region| &region.pages);
        pages.to_vec()
    }

    /// The pager reads that a process has forked.
    pub(super) fn bear(&mut self, parent: RegionId, child: RegionId, space: SpaceId) {
        let (Some(copied), Some(region)) = (self.copies.get(&child), self.regions.get(&parent)) else { return };
        let of = |(copy, now): (&PageModel, &PageModel)| PageModel {
            // What was not in place cannot have been filled since.
            expected: if copy.cache.is_some() { copy.expected } else { now.expected },
            may_be_lost: copy.may_be_lost || now.may_be_lost,
            scratch: None,
            taken: false,
            given_up: false,
            met_guard: None,
            ..*copy
        };
        let pages: Vec<_> = copied.iter().zip(&region.pages).map(of).collect();
        let (directory, parent) = (vec![0; pages.len()], Some(parent));
        let (complete, ready, freeing) = (false, false, false);
        let model = RegionModel { space, pages, directory, freeing, parent, complete, ready, ..region.clone() };
        self.regions.insert(child, model);
    }

    /// The child's entries say everything.
    pub(super) fn is_born(&mut self, child: RegionId) {
        self.copies.remove(&child);
        if let Some(region) = self.regions.get_mut(&child) {
            region.complete = true;
        }
    }

    /// The pager has died in the middle of it: the child's region is made anew.
    pub(super) fn unborn(&mut self, child: RegionId) {
        self.regions.remove(&child);
        self.blocked.retain(|access: &CpuAccess| access.region != child);
    }

    /// The child's faults are served from now on.
    pub(super) fn serve(&mut self, child: RegionId) -> Result<(), Violation> {
        let Some(region) = self.regions.get_mut(&child) else { return Ok(()) };
        region.ready = true;
        let all = Pages { first: 0, count: region.pages.len() as u64 };
        self.wake(child, all)
    }

    /// A device has written a frame: who shares it?
    pub(super) fn others_see(
        &mut self,
        device: DeviceId,
        frame: u32,
        (region, page): (RegionId, u64),
        token: u64,
    ) -> Result<(), Violation> {
        for (id, other) in &mut self.regions {
            for (at, (model, bits)) in (0..).zip(other.pages.iter_mut().zip(&other.directory)) {
                let entry = crate::Entry::decode(*bits).unwrap_or(crate::Entry::ABSENT);
                let same = entry.owns_frame() && (entry.device(), entry.frame()) == (device, frame);
                if !same || (*id, at) == (region, page) || entry.discarded() {
                    continue;
                }
                if other.ready {
                    let text = format!("{device:?} writes {region:?} page {page}, and {id:?} page {at} shares it");
                    return Err(Violation::new("inv1", text));
                }
                model.expected = token;
            }
        }
        Ok(())
    }
}

impl Simulator {
    /// The client forks. Its thread waits until the pager has read so.
    pub(super) fn fork(&mut self, slot: u8) {
        let parent = self.region(slot);
        if !self.usable(parent) || !self.world.is_private(parent) || self.slots.len() == SLOTS_MAX {
            return;
        }
        let (child, space) = (RegionId(self.new_id()), SpaceId(self.new_id()));
        let pages = self.world.copied(parent);
        self.config.page_counts.push(pages.len() as u64);
        self.slots.push(child);
        self.spaces.push(space);
        let parents_space = self.world.regions[&parent].space;
        self.world.forked.insert(parents_space);
        self.world.copies.insert(child, pages);
        self.world.events.push_back(Event::Forked { parent, child, space });
    }

    /// Children of a dead pager, once those whose event it had not dealt with are left out.
    pub(super) fn finish_births(&mut self) {
        let held: Vec<_> = self.world.regions.iter().filter(|(_, region)| !region.ready).collect();
        let events: Vec<_> = held.into_iter().filter_map(|(child, region)| Some((region.parent?, *child))).collect();
        for (parent, child) in events {
            self.world.events.push_back(Event::ForkedBefore { parent, child });
        }
    }
}
