//! What clients do with their address spaces, and what they say about them.

use super::machine::{CpuAccess, Open};
use super::simulator::{Op, Simulator};
use crate::{DeviceId, Event, Pages, RegionId, SpaceId};

impl Simulator {
    pub(super) fn unmap(&mut self, region: RegionId, pages: Pages) {
        if !self.usable(region) {
            return;
        }
        let gone = |access: &CpuAccess| access.region == region && pages.contains(access.page);
        self.world.blocked.retain(|access| !gone(access));
        for page in pages.iter() {
            if let Some(model) = self.world.page(region, page) {
                (model.gone, model.mapped) = (true, false);
            }
        }
        self.world.events.push_back(Event::Unmapped { region, pages });
    }

    pub(super) fn free(&mut self, slot: u8, end_space: bool) {
        let slot = usize::from(slot) % self.slots.len();
        let region = self.slots[slot];
        if !self.usable(region) {
            return;
        }
        self.world.blocked.retain(|access| access.region != region);
        if let Some(model) = self.world.regions.get_mut(&region) {
            model.freeing = true;
        }
        self.ask_to_free(region);
        if end_space {
            self.world.gone_spaces.insert(self.spaces[slot]);
        }
    }

    pub(super) fn ask_to_free(&mut self, region: RegionId) {
        let pages = Pages { first: 0, count: 0 };
        let req = self.world.request(Open { region, pages, job: None });
        self.world.events.push_back(Event::RegionFree { req: Some(req), region });
    }

    pub(super) fn create(&mut self, slot: u8) {
        let slot = usize::from(slot) % self.slots.len();
        let (region, world) = (self.slots[slot], &self.world);
        if world.regions.contains_key(&region) || world.copies.contains_key(&region) {
            return;
        }
        self.slots[slot] = RegionId(self.new_id());
        if self.world.gone_spaces.contains(&self.spaces[slot]) {
            self.spaces[slot] = SpaceId(self.new_id());
        }
        self.make_region(slot);
    }

    /// MADV_DONTNEED. The thread waits in the kernel until the pager has read so; all others go on.
    pub(super) fn dont_need(&mut self, region: RegionId, pages: Pages) {
        if self.usable(region) && self.world.is_private(region) {
            self.world.events.push_back(Event::Removed { region, pages });
        }
    }

    /// What a client says about its memory.
    pub(super) fn advise(&mut self, op: Op) {
        match op {
            Op::ReadMostly { region, on } => {
                let (region, pages) = self.pages(region, 0, u8::MAX);
                if let Some(model) = self.world.regions.get_mut(&region) {
                    model.attr = model.attr.with_read_mostly(on);
                }
                self.revoke(region, pages, u8::MAX);
            }
            Op::Revoke { region, page, count, devices } => {
                let (region, pages) = self.pages(region, page, count);
                self.revoke(region, pages, devices);
            }
            Op::Evict { region, device, count } => {
                let (region, _) = self.pages(region, 0, 1);
                let Some(space) = self.world.regions.get(&region).map(|region| region.space) else { return };
                let (pages, device) = (Pages { first: 0, count: 0 }, DeviceId(self.device(device)));
                let req = self.world.request(Open { region, pages, job: None });
                self.world.events.push_back(Event::Evict { req, space, device, page_count: u64::from(count) });
            }
            _ => {}
        }
    }

    fn revoke(&mut self, region: RegionId, pages: Pages, devices: u8) {
        if self.usable(region) {
            let req = self.world.request(Open { region, pages, job: None });
            self.world.events.push_back(Event::RevokeMappings { req, region, pages, devices });
        }
    }
}
