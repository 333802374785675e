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

/// A child's address space, until its entries are complete.
#[derive(Debug)]
pub(super) struct Copied {
    parent: RegionId,
    pages: Vec<PageModel>,
    /// A pager has read of the fork: what was elsewhere is from then on what only devices change.
    is_read: bool,
}

/// Clients and their children, living and dead.
const SLOTS_MAX: usize = 4;

impl World {
    /// The parent's pages as the kernel has copied them.
    fn copied(&self, parent: RegionId) -> Copied {
        let pages = self.regions.get(&parent).map_or(&[][..], |region| &region.pages);
        Copied { parent, pages: pages.to_vec(), is_read: false }
    }

    /// The pager reads that a process has forked; perhaps not the first one that does.
    pub(super) fn bear(&mut self, parent: RegionId, child: RegionId, space: SpaceId) {
        let (Some(copied), Some(region)) = (self.copies.get_mut(&child), self.regions.get(&parent)) else { return };
        if !std::mem::replace(&mut copied.is_read, true) {
            // What was not in place cannot have been filled since.
            for (copy, now) in copied.pages.iter_mut().zip(&region.pages) {
                copy.expected = if copy.cache.is_some() { copy.expected } else { now.expected };
                copy.may_be_lost |= now.may_be_lost;
            }
        }
        let of =
            |copy: &PageModel| PageModel { scratch: None, taken: false, given_up: false, met_guard: None, ..*copy };
        let pages: Vec<_> = copied.pages.iter().map(of).collect();
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

    /// A device has lost what children will find there that have not got all of their entries.
    pub(super) fn lost_to_the_unborn(&mut self, device: DeviceId) {
        let mine = |bits: &u64| {
            let entry = crate::Entry::decode(*bits).unwrap_or(crate::Entry::ABSENT);
            entry.owns_frame() && entry.device() == device && !entry.discarded()
        };
        let regions = &self.regions;
        let there = |parent: &RegionId| regions.get(parent).map_or(&[][..], |parent| &parent.directory);
        let of = |(child, copied): (&RegionId, &Copied)| {
            (*child, there(&copied.parent).iter().map(mine).collect::<Vec<bool>>())
        };
        let lost: Vec<_> = self.copies.iter().filter(|(_, copied)| copied.is_read).map(of).collect();
        for (child, lost) in lost {
            let copied = self.copies.get_mut(&child).map(|copied| &mut copied.pages);
            let born = self.regions.get_mut(&child).map(|region| &mut region.pages);
            for pages in copied.into_iter().chain(born) {
                for (model, _) in pages.iter_mut().zip(&lost).filter(|(_, lost)| **lost) {
                    model.may_be_lost |= model.cache.is_none();
                }
            }
        }
    }

    /// Children that a dead pager has not given all of their entries: their forks are told again.
    pub(super) fn unfinished_forks(&self) -> Vec<Event> {
        let unfinished = self.regions.iter().filter(|(_, region)| !region.complete);
        let fork = |(child, region): (&RegionId, &RegionModel)| {
            Some(Event::Forked { parent: region.parent?, child: *child, space: region.space })
        };
        unfinished.filter_map(fork).collect()
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
        for copied in self.copies.values_mut().filter(|copied| copied.parent == region && copied.is_read) {
            if let Some(model) = copied.pages.get_mut(page as usize).filter(|model| model.cache.is_none()) {
                model.expected = token;
            }
        }
        for (id, other) in &mut self.regions {
            for (at, (model, bits)) in (0..).zip(other.pages.iter_mut().zip(&other.directory)) {
                let entry = crate::Entry::decode(*bits).unwrap_or(crate::Entry::ABSENT);
                let same = entry.owns_frame() && (entry.device(), entry.frame()) == (device, frame);
                // A child that has not got this page of its parent's yet will find there what is there then.
                let will = other.parent == Some(region) && !other.complete && at == page && model.cache.is_none();
                let same = same || will && !entry.owns_frame();
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
        let copied = self.world.copied(parent);
        self.config.page_counts.push(copied.pages.len() as u64);
        self.slots.push(child);
        self.spaces.push(space);
        let parents_space = self.world.regions[&parent].space;
        self.world.forked.insert(parents_space);
        self.world.copies.insert(child, copied);
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
