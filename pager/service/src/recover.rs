//! What a new incarnation does before it serves: adopt spaces, regions and device records from the vault.
//!
//! Everything the dead pager knew is in the directories. The core finishes or rolls back what was in flight, and wakes every
//! range, because the kernel does not repeat a fault that the dead pager had already read.
//!
//! ```text
//!   vault -> spaces, regions -> core: what was in flight -> journal: what was read and not dealt with -> cuts -> orders, poison
//!                               `--------------- nothing is put in place (`is_recovering`) -------------'
//! ```
//! The program has gone on behind what a dead pager had read: what it dropped, unmapped or moved must be known before anything of it is put
//! back, and its forked children must have what was there when they were made.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use uhmm_ipc::message::Fd;
use uhmm_ipc::message::pager::AgentMemory;
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::uffd::Userfaultfd;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, memfd};
use uhmm_pager_core::{Backing, Event, Pages, RegionId, SpaceId};

use crate::agent::Agent;
use crate::directory::{DirectoryFile, SegmentRecord};
use crate::granted::Granted;
use crate::revoke::Purpose;
use crate::segments::hidden;
use crate::service::{Pager, PagerError};
use crate::space::{Memory, Phase, Region, Segment, Space, SpaceState};

/// Vault entries of one space, by the rest of their name.
type Entries = BTreeMap<String, Fd>;

/// What is left of a space's entries, by region.
fn regions_of(entries: Entries) -> BTreeMap<u64, Entries> {
    let mut regions: BTreeMap<u64, Entries> = BTreeMap::new();
    for (name, fd) in entries {
        let mut parts = name.splitn(3, '/').skip(1);
        let region = parts.next().and_then(|id| id.parse::<u64>().ok());
        if let (Some(region), Some(rest)) = (region, parts.next()) {
            regions.entry(region).or_default().insert(rest.to_owned(), fd);
        }
    }
    regions
}

/// What the vault has for a space's agent.
fn agent_memory(entries: &mut Entries) -> Option<AgentMemory> {
    let agent = entries.remove("agent");
    let mut take = |name| entries.remove(name);
    let (maps, pagemap, smaps) = (take("maps")?, take("pagemap")?, take("smaps")?);
    let (staging, orders, done) = (take("staging")?, take("orders")?, take("done")?);
    Some(AgentMemory { maps, pagemap, smaps, staging, orders, done, agent })
}

impl Pager {
    /// Adopts the vault's content. Half-made spaces and regions are forgotten; their clients ask again.
    pub(crate) fn recover(&mut self) -> Result<(), PagerError> {
        self.is_recovering = true;
        let mut spaces: BTreeMap<u64, Entries> = BTreeMap::new();
        for (name, fd) in self.service.vault.take("space/") {
            let mut parts = name.splitn(3, '/').skip(1);
            let id = parts.next().and_then(|id| id.parse::<u64>().ok());
            if let (Some(id), Some(rest)) = (id, parts.next()) {
                spaces.entry(id).or_default().insert(rest.to_owned(), fd);
            }
        }
        let mut forgotten = Vec::new();
        let mut regions = Vec::new();
        for (id, mut entries) in spaces {
            self.next_space = self.next_space.max(id + 1);
            if !self.recover_space(id, &mut entries)? {
                tracing::info!(space = id, "Space in the vault is incomplete or its process is gone: forgotten");
                forgotten.push(id);
            }
            if self.spaces.get(&id).is_some_and(Space::is_half_made) {
                // What there is of its own regions is made again, under other names.
                for region in regions_of(entries).into_keys() {
                    self.next_region = self.next_region.max(region + 1);
                    self.service.vault.remove(&mut self.service.reactor, &Space::region_prefix(id, region));
                }
                continue;
            }
            regions.extend(regions_of(entries).into_iter().map(|(region, entries)| (id, region, entries)));
        }
        for (space, region, entries) in regions {
            self.next_region = self.next_region.max(region + 1);
            if let Err(error) = self.recover_region(space, region, entries) {
                if self.regions.get(region).is_some_and(|known| known.space == space) {
                    // Found under a former owner's name too, and kept under this one by now.
                    continue;
                }
                tracing::info!(%error, space, region, "Region in the vault is forgotten");
                self.service.vault.remove(&mut self.service.reactor, &Space::region_prefix(space, region));
            }
        }
        // After the regions that a forked child still shows are kept under the child's name.
        for id in forgotten {
            self.service.vault.remove(&mut self.service.reactor, &Space::vault_prefix(id));
        }
        if !self.spaces.is_empty() {
            self.check_children_soon();
        }
        self.recover_segments();
        self.tell_core_of_regions();
        self.push(Event::Recovered);
        self.drain();
        self.tidy_scratch();
        self.repeat_kept_events()?;
        self.finish_cuts();
        self.drain();
        self.is_recovering = false;
        for id in self.spaces.keys().copied().collect::<Vec<_>>() {
            self.send_to_agent(id);
        }
        self.poison_what_is_due();
        self.drain();
        Ok(())
    }

    /// Pages that lost their addresses just before the pager died: what the core was about to be told.
    fn finish_cuts(&mut self) {
        let ids: Vec<u64> = self.regions.iter().map(|region| region.id).collect();
        for id in ids {
            let all = self.all_pages(id);
            let mut shown: Vec<Pages> = self.regions.showing(id, all).map(|(_, pages)| pages).collect();
            if shown.is_empty() {
                self.begin_free(id);
                continue;
            }
            for pages in hidden(all, &mut shown) {
                self.push(Event::Unmapped { region: RegionId(id), pages });
            }
        }
    }

    fn recover_space(&mut self, id: u64, entries: &mut Entries) -> Result<bool, PagerError> {
        let (Some(state), Some(uffd)) = (entries.remove("state"), entries.remove("uffd")) else { return Ok(false) };
        let pidfd = entries.remove("pidfd");
        let memory = agent_memory(entries);
        let Some(state) = SpaceState::from_memfd(&state)? else { return Ok(false) };
        let own = |fd: &Fd| fd.try_clone().map_err(|source| uhmm_kernel_hook::HookError::call("dup", None, source));
        let pidfd = pidfd.map(|pidfd| own(&pidfd)).transpose()?.map(PidFd::from_fd);
        if pidfd.is_none() && state.pid != 0 || pidfd.as_ref().map(PidFd::exited).transpose()?.unwrap_or(false) {
            return Ok(false);
        }
        let uffd = Userfaultfd::from_fd(own(&uffd)?)?;
        let agent = memory.map(|memory| self.open_agent(None, &memory)).transpose();
        let mut agent = agent.unwrap_or_else(|text| {
            tracing::warn!(text, space = id, "The agent's memory in the vault cannot be used");
            None
        });
        let begun = agent.as_mut().and_then(Agent::begun);
        let segments = BTreeMap::new();
        let space = Space {
            state,
            uffd,
            pidfd,
            segments,
            agent,
            begun,
            dying: false,
            unready_regions: 0,
            vacated: Default::default(),
        };
        if space.is_born() {
            self.watch_space(&space)?;
        }
        self.spaces.insert(id, space);
        self.tell_core_of_rule(id);
        self.watch_agent(id);
        self.stats.recovered_spaces += 1;
        Ok(true)
    }

    /// All spaces are there. `found_in`: the space under whose name the vault has it.
    fn recover_region(
        &mut self,
        found_in: u64,
        id: u64,
        mut entries: Entries,
    ) -> Result<(), crate::directory::DirectoryError> {
        let not_live = crate::directory::DirectoryError::NotLive { region: id };
        let Some(directory) = entries.remove("dir") else { return Err(not_live) };
        let memory = entries.remove("mem");
        let (directory, header) = DirectoryFile::adopt(directory)?;
        let complete = memory.is_some() == (header.backing != Backing::Private);
        let records = directory.segments()?;
        // Whoever made it may be gone, while a forked child still shows it.
        let shows = |record: &&SegmentRecord| {
            !record.retired && header.backing != Backing::Private && self.spaces.contains_key(&record.space)
        };
        let heir = || records.iter().find(shows).map(|record| record.space);
        let owner = if self.spaces.contains_key(&header.space) { Some(header.space) } else { heir() };
        let Some(space) = owner.filter(|_| header.region == id && complete && self.regions.get(id).is_none()) else {
            return Err(not_live);
        };
        let memory = memory.map(|fd| {
            let sealed = memfd::len(fd.as_fd()).is_ok_and(|len| memfd::check_sealed(fd.as_fd(), len).is_ok());
            Memory::new(fd, header.offset_bytes, sealed)
        });
        let range = |record: &SegmentRecord| AddrRange { start: record.addr, len: record.page_count * PAGE_SIZE };
        let registered = records.iter().filter(|r| !r.retired).map(|record| (record.space, range(record))).collect();
        let (page_count, backing) = (header.page_count, header.backing);
        // Allocated memory does not move; segments of others (forked children) lie at the same addresses.
        let first = records.iter().find(|record| record.space == header.space).or(records.first());
        let page_0 = |record: &SegmentRecord| (record.space, record.addr.wrapping_sub(record.first_page * PAGE_SIZE));
        let cpu_home = first.filter(|_| backing == Backing::Shared).map(page_0);
        self.regions.insert(Region {
            id,
            space,
            backing,
            page_count,
            memory,
            directory,
            phase: Phase::Live,
            segments: Vec::new(),
            retired: Vec::new(),
            registered,
            cpu_home,
        });
        if space != found_in {
            self.keep_under(space, id);
            self.service.vault.remove(&mut self.service.reactor, &Space::region_prefix(found_in, id));
        }
        self.stats.recovered_regions += 1;
        self.recovered_segments.extend(records.into_iter().map(|record| (id, record)));
        Ok(())
    }

    /// All segments are there.
    fn tell_core_of_regions(&mut self) {
        let known = |region: &Region| (region.id, region.space, region.page_count, region.backing);
        let regions: Vec<_> = self.regions.iter().map(known).collect();
        for (id, space, page_count, backing) in regions {
            let strays = if backing == Backing::Private { self.strays(id) } else { Vec::new() };
            let (region, space) = (RegionId(id), SpaceId(space));
            self.push(Event::RecoverRegion { region, space, page_count, backing, strays });
        }
    }

    /// Region entries are kept under another space's name from now on.
    pub(crate) fn keep_under(&mut self, space: u64, region_id: u64) {
        self.regions.pass_on(region_id, space);
        let Some(region) = self.regions.get(region_id) else { return };
        let prefix = Space::region_prefix(space, region_id);
        let memory = region.memory.as_ref().map(|memory| ("mem", memory.fd.clone()));
        for (name, fd) in memory.into_iter().chain([("dir", region.directory.fd())]) {
            self.service.vault.put(&mut self.service.reactor, &format!("{prefix}{name}"), fd);
        }
        if let Err(error) = region.directory.set_space(space) {
            tracing::error!(%error, region = region_id, "A directory cannot be written");
        }
    }

    /// All spaces are there: segments, which may lie in any of them, are shown again under their old ids.
    fn recover_segments(&mut self) {
        // Drivers may know them from before: they are told when they go.
        let granted_mask = self.plan_device_mask();
        for (region, record) in std::mem::take(&mut self.recovered_segments) {
            let SegmentRecord { id, space, addr, first_page, page_count, retired } = record;
            self.next_segment = self.next_segment.max(id + 1);
            if retired {
                let tables = Default::default();
                let granted = Granted::default();
                let segment =
                    Segment { id, space, region, addr, first_page, page_count, tables, granted_mask, granted };
                self.regions.retire(segment);
                // The dead pager's invalidation may not have got through.
                self.start_revoke_message(Purpose::Unmap { region }, space, id, 0, page_count, granted_mask);
                continue;
            }
            let Some(owner) = self.spaces.get_mut(&space).filter(|owner| !owner.is_half_made()) else { continue };
            owner.segments.insert(addr, id);
            let tables = Default::default();
            // And nobody knows what the dead pager has answered them.
            let granted = Granted::all(page_count);
            self.regions.show(Segment {
                id,
                space,
                region,
                addr,
                first_page,
                page_count,
                tables,
                granted_mask,
                granted,
            });
        }
    }

    /// Bit d: the plan has a device d.
    pub(crate) fn plan_device_mask(&self) -> u8 {
        (0..8u8).filter(|id| self.service.plan.device(*id).is_some()).fold(0, |mask, id| mask | 1 << id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_without_an_address_are_those_between_the_segments() {
        let pages = |first, count| Pages { first, count };
        assert_eq!(
            hidden(pages(0, 10), &mut [pages(6, 2), pages(1, 3), pages(2, 3)]),
            [pages(0, 1), pages(5, 1), pages(8, 2)]
        );
        assert_eq!(hidden(pages(0, 10), &mut [pages(0, 10)]), []);
    }

    #[test]
    fn regions_are_found_by_their_vault_names() {
        let fd: Fd = std::sync::Arc::new(memfd::create_sealed("uhmm-test", PAGE_SIZE).unwrap());
        let names = ["region/7/dir", "region/7/mem", "region/8/dir", "region/x/dir", "uffd"];
        let regions = regions_of(names.into_iter().map(|name| (name.to_owned(), fd.clone())).collect());
        assert_eq!(regions.keys().copied().collect::<Vec<_>>(), [7, 8]);
        assert_eq!(regions[&7].keys().map(String::as_str).collect::<Vec<_>>(), ["dir", "mem"]);
    }
}
