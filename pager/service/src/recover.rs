//! What a new incarnation does before it serves: adopt spaces, regions and device records from the vault.
//!
//! Everything the dead pager knew is in the directories. The core finishes or rolls back what was in flight, and wakes every
//! range, because the kernel does not repeat a fault that the dead pager had already read.

use std::collections::BTreeMap;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::process::PidFd;
use uhmm_kernel_hook::uffd::Userfaultfd;
use uhmm_pager_core::{Event, RegionId, SpaceId};

use crate::directory::DirectoryFile;
use crate::service::{Pager, PagerError};
use crate::space::{Phase, Region, Space, SpaceState};

/// Vault entries of one space, by the rest of their name.
type Entries = BTreeMap<String, Fd>;

impl Pager {
    /// Adopts the vault's content. Half-made spaces and regions are forgotten; their clients ask again.
    pub(crate) fn recover(&mut self) -> Result<(), PagerError> {
        let mut spaces: BTreeMap<u64, Entries> = BTreeMap::new();
        for (name, fd) in self.service.vault.take("space/") {
            let mut parts = name.splitn(3, '/').skip(1);
            let id = parts.next().and_then(|id| id.parse::<u64>().ok());
            if let (Some(id), Some(rest)) = (id, parts.next()) {
                spaces.entry(id).or_default().insert(rest.to_owned(), fd);
            }
        }
        for (id, entries) in spaces {
            self.next_space = self.next_space.max(id + 1);
            if !self.recover_space(id, entries)? {
                tracing::info!(space = id, "Space in the vault is incomplete or its process is gone: forgotten");
                self.service.vault.remove(&mut self.service.reactor, &Space::vault_prefix(id));
            }
        }
        self.push(Event::Recovered);
        self.drain();
        Ok(())
    }

    fn recover_space(&mut self, id: u64, mut entries: Entries) -> Result<bool, PagerError> {
        let (Some(state), Some(uffd), Some(pidfd)) =
            (entries.remove("state"), entries.remove("uffd"), entries.remove("pidfd"))
        else {
            return Ok(false);
        };
        let Some(state) = SpaceState::from_memfd(&state)? else { return Ok(false) };
        let own = |fd: &Fd| fd.try_clone().map_err(|source| uhmm_kernel_hook::HookError::call("dup", None, source));
        let pidfd = PidFd::from_fd(own(&pidfd)?);
        if pidfd.exited()? {
            return Ok(false);
        }
        let uffd = Userfaultfd::from_fd(own(&uffd)?)?;
        let space = Space { state, uffd, pidfd, regions: BTreeMap::new(), dying: false };
        self.watch_space(&space)?;
        self.spaces.insert(id, space);
        self.stats.recovered_spaces += 1;
        let mut regions: BTreeMap<u64, Entries> = BTreeMap::new();
        for (name, fd) in entries {
            let mut parts = name.splitn(3, '/').skip(1);
            let region = parts.next().and_then(|id| id.parse::<u64>().ok());
            if let (Some(region), Some(rest)) = (region, parts.next()) {
                regions.entry(region).or_default().insert(rest.to_owned(), fd);
            }
        }
        for (region, entries) in regions {
            self.next_region = self.next_region.max(region + 1);
            if let Err(error) = self.recover_region(id, region, entries) {
                tracing::warn!(%error, space = id, region, "Region in the vault is forgotten");
                self.service.vault.remove(&mut self.service.reactor, &Space::region_prefix(id, region));
            }
        }
        Ok(true)
    }

    fn recover_region(
        &mut self,
        space: u64,
        id: u64,
        mut entries: Entries,
    ) -> Result<(), crate::directory::DirectoryError> {
        let not_live = crate::directory::DirectoryError::NotLive { region: id };
        let (Some(directory), Some(memory)) = (entries.remove("dir"), entries.remove("mem")) else {
            return Err(not_live);
        };
        let (directory, header) = DirectoryFile::adopt(directory)?;
        if header.region != id || header.space != space {
            return Err(not_live);
        }
        let region = Region {
            id,
            space,
            addr: header.addr,
            page_count: header.page_count,
            memory,
            directory,
            phase: Phase::Live,
            tables: Default::default(),
            // Drivers may know the region from before: they are told when it goes.
            granted_mask: self.plan_device_mask(),
        };
        self.stats.recovered_regions += 1;
        if let Some(space) = self.spaces.get_mut(&space) {
            space.regions.insert(header.addr, id);
        }
        self.regions.insert(region);
        self.push(Event::RecoverRegion { region: RegionId(id), space: SpaceId(space), page_count: header.page_count });
        Ok(())
    }

    /// Bit d: the plan has a device d.
    pub(crate) fn plan_device_mask(&self) -> u8 {
        (0..8u8).filter(|id| self.service.plan.device(*id).is_some()).fold(0, |mask, id| mask | 1 << id)
    }
}
