//! Which addresses show which pages, and how that changes under munmap and release (mremap: `moved`).
//!
//! ```text
//!   [----------- segment 7 -----------]        munmap of the middle:  [-- 8 --]          [---- 9 ----]
//!   id 7 is retired: devices are told to drop it (Invalidate, unmap), and its tables are kept until they have;
//!   8 and 9 are new: devices look the addresses up at their next fault
//! ```
//! A segment never changes while devices know it, so neither mirror nor drivers need any notion of parts.

use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Event, Pages, RegionId};

use crate::agent::Changed;
use crate::directory::{SegmentRecord, segments_max};
use crate::revoke::Purpose;
use crate::service::Pager;
use crate::space::{Phase, Segment};

/// A part of a region that lost its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub region: u64,
    pub pages: Pages,
    /// Where it was.
    pub range: AddrRange,
}

/// The pages that none of the parts has.
pub(crate) fn hidden(all: Pages, shown: &mut [Pages]) -> Vec<Pages> {
    shown.sort_unstable_by_key(|pages| pages.first);
    let mut hidden = Vec::new();
    let mut next = all.first;
    for part in shown.iter().copied().chain([Pages { first: all.end(), count: 0 }]) {
        if part.first > next {
            hidden.push(Pages { first: next, count: part.first - next });
        }
        next = next.max(part.end());
    }
    hidden
}

impl Pager {
    /// A fresh segment.
    pub(crate) fn show(&mut self, space: u64, region: u64, addr: u64, pages: Pages) {
        let id = self.next_segment;
        self.next_segment += 1;
        let (first_page, page_count) = (pages.first, pages.count);
        let (tables, granted) = Default::default();
        let segment = Segment { id, space, region, addr, first_page, page_count, tables, granted_mask: 0, granted };
        if let Some(space) = self.spaces.get_mut(&space) {
            space.segments.insert(addr, id);
        }
        self.regions.show(segment);
    }

    /// Writes a region's list of segments to its directory.
    pub(crate) fn keep_segments(&mut self, region_id: u64) {
        let all = Pages { first: 0, count: u64::MAX };
        let mut list: Vec<_> = self.regions.showing(region_id, all).map(|(segment, _)| segment.record()).collect();
        let Some(region) = self.regions.get(region_id) else { return };
        list.extend(region.retired.iter().map(|segment| SegmentRecord { retired: true, ..segment.record() }));
        let (count, max) = (list.len(), segments_max(region.page_count));
        if count > max {
            // Only a region that hundreds of forked children show: a process cannot have that many mappings.
            tracing::error!(
                region = region_id,
                count,
                max,
                "A region is shown too often: a restart will forget some of it"
            );
        }
        if let Err(error) = region.directory.set_segments(&list) {
            tracing::error!(%error, region = region_id, "A directory's segments could not be written");
        }
    }

    /// Takes a segment away: nobody can look it up any more, and devices drop it.
    fn retire(&mut self, id: u64) -> Option<(u64, Pages, u64)> {
        let segment = self.regions.hide(id)?;
        if let Some(space) = self.spaces.get_mut(&segment.space) {
            space.segments.remove(&segment.addr);
        }
        let (region_id, pages, addr) = (segment.region, segment.pages(), segment.addr);
        // At once where it can be: from now on the program may map something else there. The rest is told, and waited for by who
        // gives the pages away.
        for table in segment.tables.iter().flatten() {
            table.revoke(0, pages.count);
        }
        if segment.granted_mask != 0 {
            let (space, granted_mask) = (segment.space, segment.granted_mask);
            self.regions.retire(segment);
            let purpose = Purpose::Unmap { region: region_id };
            self.start_revoke_message(purpose, space, id, 0, pages.count, granted_mask);
        }
        Some((region_id, pages, addr))
    }

    /// Devices have dropped a retired segment.
    pub(crate) fn unmap_through(&mut self, region_id: u64, segment: u64) {
        let was_last = self.regions.retired_is_dropped(region_id, segment);
        let Some(region) = self.regions.get(region_id) else { return };
        let free_now = region.phase == Phase::Dying && was_last;
        if region.phase == Phase::Live {
            self.keep_segments(region_id);
        }
        if free_now {
            self.push(Event::RegionFree { req: None, region: RegionId(region_id) });
        }
        self.make_waiting_regions();
        self.answer_who_waited();
    }

    /// First step of freeing a region: nothing new is mapped, devices drop their tables.
    pub(crate) fn begin_free(&mut self, region_id: u64) {
        let Some(region) = self.regions.get_mut(region_id) else { return };
        if region.phase == Phase::Dying {
            return;
        }
        let was_live = region.phase == Phase::Live;
        tracing::debug!(region = region_id, was_live, "A region goes");
        let shown = region.segments.clone();
        self.regions.dies(region_id);
        for id in shown {
            self.retire(id);
        }
        if !was_live {
            self.drop_region(RegionId(region_id));
        } else if self.regions.get(region_id).is_some_and(|region| region.retired.is_empty()) {
            self.push(Event::RegionFree { req: None, region: RegionId(region_id) });
        }
    }

    /// Whether another process (after a fork) shows the region too.
    pub(crate) fn shown_elsewhere(&self, region_id: u64, space_id: u64) -> bool {
        self.regions.showing(region_id, self.all_pages(region_id)).any(|(segment, _)| segment.space != space_id)
    }

    /// One of several processes that show a region frees it: it goes on for the others.
    pub(crate) fn hide_from(&mut self, region_id: u64, space_id: u64) {
        let all = self.all_pages(region_id);
        let mine = self.regions.showing(region_id, all).filter(|(segment, _)| segment.space == space_id);
        let ranges: Vec<AddrRange> = mine.map(|(segment, _)| segment.range()).collect();
        for range in &ranges {
            for cut in self.cut(space_id, range.start, range.end()) {
                self.settle_cut(cut);
            }
        }
        self.unmanage(space_id, ranges);
        if self.regions.get(region_id).is_some_and(|region| region.space == space_id) {
            self.free_or_pass_on(region_id);
        }
    }

    /// Takes an address range out of a space. What is left of the segments goes on under new ids.
    pub(crate) fn cut(&mut self, space_id: u64, start: u64, end: u64) -> Vec<Cut> {
        let cuts = self.cut_unkept(space_id, start, end);
        for cut in &cuts {
            self.keep_segments(cut.region);
        }
        cuts
    }

    /// The same, for who shows the pages elsewhere: the directory is the caller's to write, once for both.
    pub(crate) fn cut_unkept(&mut self, space_id: u64, start: u64, end: u64) -> Vec<Cut> {
        let mut cuts = Vec::new();
        self.not_registered(space_id, AddrRange { start, len: end - start });
        for id in self.touched(space_id, start, end) {
            let Some((region, pages, addr)) = self.retire(id) else { continue };
            let segment_end = addr + pages.count * PAGE_SIZE;
            let (from, to) = (start.max(addr), end.min(segment_end));
            let before = Pages { first: pages.first, count: (from - addr) / PAGE_SIZE };
            let gone = Pages { first: before.end(), count: (to - from) / PAGE_SIZE };
            let after = Pages { first: gone.end(), count: (segment_end - to) / PAGE_SIZE };
            if before.count > 0 {
                self.show(space_id, region, addr, before);
            }
            if after.count > 0 {
                self.show(space_id, region, to, after);
            }
            cuts.push(Cut { region, pages: gone, range: AddrRange { start: from, len: to - from } });
        }
        cuts
    }

    /// Live segments of a space that lie in an address range, in order.
    pub(crate) fn touched(&self, space_id: u64, start: u64, end: u64) -> Vec<u64> {
        let live = |id: &u64| {
            let segment = self.regions.segment(*id);
            segment.and_then(|s| self.regions.get(s.region)).is_some_and(|region| region.phase == Phase::Live)
        };
        let mut ids = self.at_addresses(space_id, start, end);
        ids.retain(live);
        ids
    }

    /// The same, of regions of any phase.
    pub(crate) fn at_addresses(&self, space_id: u64, start: u64, end: u64) -> Vec<u64> {
        let Some(space) = self.spaces.get(&space_id) else { return Vec::new() };
        let before = space.segments.range(..=start).next_back().map(|(_, id)| *id);
        let inside = space.segments.range(start..end).map(|(_, id)| *id);
        let mut ids: Vec<u64> = before.into_iter().chain(inside).collect();
        ids.dedup();
        ids.retain(|id| self.regions.segment(*id).is_some_and(|s| s.addr < end && s.range().end() > start));
        ids
    }

    /// The segment at an address.
    pub(crate) fn segment_at(&self, space_id: u64, addr: u64) -> Option<&Segment> {
        let space = self.spaces.get(&space_id)?;
        let (_, id) = space.segments.range(..=addr).next_back()?;
        self.regions.segment(*id).filter(|segment| addr < segment.range().end())
    }

    /// Parts of live regions that lie in an address range.
    pub(crate) fn pieces(&self, space_id: u64, start: u64, end: u64) -> Vec<(u64, Pages)> {
        let segments = self.touched(space_id, start, end);
        let piece = |id: &u64| {
            let segment = self.regions.segment(*id)?;
            let (from, to) = (start.max(segment.addr), end.min(segment.range().end()));
            let first = segment.first_page + (from - segment.addr) / PAGE_SIZE;
            Some((segment.region, Pages { first, count: (to - from) / PAGE_SIZE }))
        };
        segments.iter().filter_map(piece).collect()
    }

    /// munmap: the addresses are gone. The content too, unless another mapping shows it; a region without addresses is freed.
    pub(crate) fn on_unmapped(&mut self, space_id: u64, start: u64, end: u64) {
        let parts = self.spaces.get_mut(&space_id).map(|space| space.vacated.unmapped(start, end));
        let parts = parts.unwrap_or_default();
        let parts: Vec<_> = parts.iter().flat_map(|part| self.unmapped_by_program(space_id, *part)).collect();
        for part in parts {
            for cut in self.cut(space_id, part.start, part.end()) {
                self.overtaken.push((RegionId(cut.region), cut.pages, Changed::Unmapped));
                self.settle_cut(cut);
            }
        }
    }

    /// Addresses are no region's any more, also not of one that is on its end.
    pub(crate) fn not_registered(&mut self, space_id: u64, range: AddrRange) {
        let shown = self.at_addresses(space_id, range.start, range.end());
        let regions = shown.iter().filter_map(|id| Some(self.regions.segment(*id)?.region)).collect::<Vec<_>>();
        self.regions.not_registered(space_id, range, regions.into_iter());
    }

    pub(crate) fn settle_cut(&mut self, cut: Cut) {
        // The end of the region takes the pages along.
        if self.regions.get(cut.region).is_some_and(|region| region.segments.is_empty()) {
            return self.begin_free(cut.region);
        }
        let still_shown = self.regions.showing(cut.region, cut.pages).next().is_some();
        if !still_shown {
            self.push(Event::Unmapped { region: RegionId(cut.region), pages: cut.pages });
        }
    }

    /// MADV_DONTNEED drops private content; it keeps that of shared memory, and MADV_REMOVE punches it: the backing is asked anyway,
    /// and pages on a device are not the backing's to lose.
    pub(crate) fn on_removed(&mut self, space_id: u64, start: u64, end: u64) {
        let addrs = AddrRange { start, len: end - start };
        for (region, pages) in self.pieces(space_id, start, end) {
            let agent = self.spaces.get(&space_id).and_then(|space| space.agent.as_ref());
            if !agent.is_some_and(|agent| agent.is_dropping(RegionId(region), pages, addrs)) {
                self.overtaken.push((RegionId(region), pages, Changed::Dropped));
                self.push(Event::Removed { region: RegionId(region), pages });
            }
        }
    }

    /// A range that shows nothing any more.
    fn unmanage(&mut self, space_id: u64, ranges: Vec<AddrRange>) {
        let Some(space) = self.spaces.get(&space_id) else { return };
        for range in ranges {
            if let Err(error) = space.uffd.unregister(range) {
                tracing::debug!(%error, %range, "A range that is not managed any more was not registered");
            }
        }
    }
}
