//! The way of a CPU fault: userfaultfd -> region -> core -> (revoke) -> UFFDIO_COPY from the aperture -> publish.
//!
//! The descriptor is read until it is empty before anything is retried: the kernel hands out faults before older events,
//! and while an event is unread every fill in that process answers EAGAIN (paging-floors.md, section 5).

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_kernel_hook::uffd::UffdEvent;
use uhmm_pager_core::{Event, Pages, RegionId};

use crate::service::Pager;
use crate::space::Phase;

impl Pager {
    /// Reads everything the space's userfaultfd has to say.
    pub(crate) fn read_uffd(&mut self, space_id: u64) {
        loop {
            let Some(space) = self.spaces.get(&space_id) else { return };
            let mut events = std::mem::take(&mut self.uffd_events);
            events.clear();
            let read = space.uffd.read_events(&mut events);
            let full_read = matches!(read, Ok(count) if count > 0);
            if let Err(error) = read {
                tracing::warn!(%error, space = space_id, "Reading userfaultfd failed");
            }
            for event in events.drain(..) {
                self.on_uffd_event(space_id, event);
            }
            self.uffd_events = events;
            self.drain();
            if !full_read {
                return;
            }
            self.stay_hot();
        }
    }

    fn on_uffd_event(&mut self, space_id: u64, event: UffdEvent) {
        match event {
            UffdEvent::Fault { addr, write, wp, minor, .. } => self.on_cpu_fault(space_id, addr, write, wp, minor),
            UffdEvent::Unmap { start, end } => self.on_unmapped(space_id, start, end),
            UffdEvent::Remove { start, end } => self.on_removed(space_id, start, end),
            UffdEvent::Remap { from, to, len } => self.on_remapped(space_id, from, to, len),
            // Never asked for: managed ranges carry MADV_DONTFORK. Dropping the descriptor is all that is needed.
            UffdEvent::Fork { .. } => {}
        }
    }

    fn on_cpu_fault(&mut self, space_id: u64, addr: u64, write: bool, wp: bool, minor: bool) {
        let Some(space) = self.spaces.get(&space_id) else { return };
        let Some(region_id) = space.region_at(addr, &self.regions) else {
            tracing::warn!(space = space_id, addr = format_args!("{addr:#x}"), "Fault outside every region");
            return;
        };
        let Some(region) = self.regions.get(region_id) else { return };
        let page = (addr - region.addr) / PAGE_SIZE;
        self.push(Event::CpuFault { region: RegionId(region_id), page, write, wp, minor });
    }

    /// Pieces of live regions that lie in an address range, as (region, whole region?, pages).
    fn pieces(&self, space_id: u64, start: u64, end: u64) -> Vec<(u64, bool, Pages)> {
        let Some(space) = self.spaces.get(&space_id) else { return Vec::new() };
        let regions = space.regions.values().filter_map(|id| self.regions.get(*id));
        let touched = regions.filter(|region| region.phase == Phase::Live);
        touched
            .filter_map(|region| {
                let range = region.range();
                let (from, to) = (start.max(range.start), end.min(range.end()));
                if from >= to {
                    return None;
                }
                let pages = Pages { first: (from - range.start) / PAGE_SIZE, count: (to - from) / PAGE_SIZE };
                Some((region.id, pages.count == region.page_count, pages))
            })
            .collect()
    }

    /// munmap: the content is gone; a region that is gone as a whole is freed.
    fn on_unmapped(&mut self, space_id: u64, start: u64, end: u64) {
        for (region, whole, pages) in self.pieces(space_id, start, end) {
            if whole {
                self.begin_free(region);
            } else {
                self.push(Event::Unmapped { region: RegionId(region), pages });
            }
        }
    }

    /// MADV_DONTNEED keeps the content of shared memory, MADV_REMOVE punches it; the event is the same, so the backing is asked.
    /// Pages on a device are not the backing's to lose and stay.
    fn on_removed(&mut self, space_id: u64, start: u64, end: u64) {
        for (region, _, pages) in self.pieces(space_id, start, end) {
            self.push(Event::Removed { region: RegionId(region), pages });
        }
    }

    /// mremap of a whole region: it goes on at its new address. A part that moves away is content unmapped from the region.
    fn on_remapped(&mut self, space_id: u64, from: u64, to: u64, len: u64) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let whole = space.regions.get(&from).and_then(|id| self.regions.get_mut(*id));
        let Some(region) = whole.filter(|region| region.page_count * PAGE_SIZE == len) else {
            tracing::error!(
                space = space_id,
                from = format_args!("{from:#x}"),
                len,
                "Part of a region was moved: bring it home first"
            );
            return;
        };
        if let Err(error) = region.directory.set_addr(to) {
            tracing::error!(%error, "The directory header could not be changed");
        }
        region.addr = to;
        let id = region.id;
        space.regions.remove(&from);
        space.regions.insert(to, id);
    }
}
