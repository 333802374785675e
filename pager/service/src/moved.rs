//! mremap. The kernel tells of it twice: REMAP, then, when the old place is unmapped, UNMAP. Between the two another thread can have
//! moved something of its own to the old place, and both its events may be read first:
//!
//! ```text
//!  thread A: mremap(P -> Q)   REMAP P->Q ................................. UNMAP P
//!  thread B:                              mremap(R -> P)   REMAP R->P
//! ```
//!
//! A's UNMAP says nothing about what B shows at P. With MREMAP_DONTUNMAP P stays mapped, and no UNMAP follows. A shared mapping of
//! a file has no userfaultfd, so nobody tells when it moves: it is looked for when a device asks for an address that shows nothing.

use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};
use uhmm_pager_core::{Backing, Pages, RegionId};

use crate::agent::Changed;
use crate::service::Pager;
use crate::space::{Phase, Segment};

/// Ranges that REMAP events have emptied and whose UNMAP events have not been read.
#[derive(Debug, Default)]
pub struct Vacated {
    /// `true`: an UNMAP follows for certain. Otherwise the range is mapped, which may be DONTUNMAP's doing.
    ranges: Vec<(AddrRange, bool)>,
}

impl Vacated {
    fn add(&mut self, range: AddrRange, certain: bool) {
        self.ranges.push((range, certain));
    }

    /// Something was moved into the range while it is still waited for.
    fn moved_into(&mut self, range: AddrRange) {
        self.ranges.iter_mut().filter(|(vacated, _)| vacated.overlaps(&range)).for_each(|(_, certain)| *certain = true);
    }

    /// New memory was put under management there: the program knows that the range is its own.
    pub fn made(&mut self, range: AddrRange) {
        self.ranges.retain(|(vacated, certain)| *certain || !vacated.overlaps(&range));
    }

    /// An UNMAP event. Returns the parts of it that are about what is there now.
    pub fn unmapped(&mut self, start: u64, end: u64) -> Vec<AddrRange> {
        let range = AddrRange { start, len: end - start };
        let mut old = Vec::new();
        self.ranges.retain(|(vacated, certain)| {
            let inside = vacated.start >= start && vacated.end() <= end;
            if *certain && inside {
                old.push(*vacated);
            }
            if *certain { !inside } else { !vacated.overlaps(&range) }
        });
        old.sort_unstable_by_key(|vacated| vacated.start);
        let mut parts = Vec::new();
        let mut next = start;
        for vacated in old {
            if vacated.start > next {
                parts.push(AddrRange { start: next, len: vacated.start - next });
            }
            next = next.max(vacated.end());
        }
        if end > next {
            parts.push(AddrRange { start: next, len: end - next });
        }
        parts
    }
}

fn same_file(one: &Vma, other: &Vma) -> bool {
    one.shared && other.shared && (one.device, one.inode) == (other.device, other.inode)
}

impl Pager {
    /// mremap: pages go on at their new addresses. What DONTUNMAP leaves stays registered and is nobody's: a fault there gets the
    /// empty page that the kernel would give. It is not unregistered, because by now it may be another thread's.
    pub(crate) fn on_remapped(&mut self, space_id: u64, from: u64, to: u64, len: u64) {
        let (old, new) = (AddrRange { start: from, len }, AddrRange { start: to, len });
        if self.is_return_of_memory(space_id, old, new) {
            return;
        }
        // Shown there still: its own UNMAP event comes later than this one.
        self.not_registered(space_id, old);
        let replaced = self.cut(space_id, to, to + len);
        let gone = self.vmas(space_id, old).is_none_or(|vmas| vmas.first().is_none_or(|vma| vma.start >= old.end()));
        if let Some(space) = self.spaces.get_mut(&space_id) {
            space.vacated.moved_into(new);
            replaced.iter().for_each(|cut| space.vacated.add(cut.range, true));
            space.vacated.add(old, gone);
        }
        for cut in replaced {
            self.overtaken.push((RegionId(cut.region), cut.pages, Changed::Unmapped));
            self.settle_cut(cut);
        }
        let moved = self.cut_unkept(space_id, from, from + len);
        for cut in &moved {
            if let Some(agent) = self.spaces.get_mut(&space_id).and_then(|space| space.agent.as_mut()) {
                agent.moved(RegionId(cut.region), cut.pages);
            }
            self.show(space_id, cut.region, to + (cut.range.start - from), cut.pages);
        }
        for cut in moved {
            let addr = to + (cut.range.start - from);
            self.keep_segments(cut.region);
            if let Some(region) = self.regions.get_mut(cut.region) {
                region.registered.add(space_id, AddrRange { start: addr, len: cut.range.len });
            }
        }
    }

    /// Looks for a managed file that is mapped at an address now. `true`: it is shown there from now on.
    pub(crate) fn follow_file(&mut self, space_id: u64, addr: u64) -> bool {
        let page = AddrRange { start: addr & !(PAGE_SIZE - 1), len: PAGE_SIZE };
        let vma = self.vmas(space_id, page).and_then(|vmas| vmas.first().copied());
        let Some(vma) = vma.filter(|vma| vma.shared && vma.inode != 0 && vma.start <= addr) else { return false };
        let found = self.regions.of_space(space_id).filter_map(|id| self.regions.get(id)).find_map(|region| {
            let memory = region.memory.as_ref()?;
            let ours = region.backing == Backing::File && region.phase == Phase::Live;
            let at = vma.offset + (page.start - vma.start);
            let behind = at.checked_sub(memory.offset_bytes)? / PAGE_SIZE;
            if !ours || behind >= region.page_count {
                return None;
            }
            memory.is_in(&vma)?.then_some((region.id, behind, region.page_count))
        });
        let Some((region, page_index, page_count)) = found else { return false };
        let first = page_index - page_index.min((page.start - vma.start) / PAGE_SIZE);
        let count = (page_count - first).min((vma.end - page.start) / PAGE_SIZE + (page_index - first));
        let pages = Pages { first, count };
        self.hide_moved(space_id, region, pages, &vma);
        self.show(space_id, region, page.start - (page_index - first) * PAGE_SIZE, pages);
        self.keep_segments(region);
        true
    }

    /// Ends segments of a moved file whose addresses show something else, or nothing.
    fn hide_moved(&mut self, space_id: u64, region: u64, pages: Pages, vma: &Vma) {
        let here = |(segment, _): &(&Segment, Pages)| segment.space == space_id;
        let shown: Vec<AddrRange> = self.regions.showing(region, pages).filter(here).map(|(s, _)| s.range()).collect();
        for range in shown {
            let still = self.vmas(space_id, range).is_some_and(|vmas| {
                vmas.first()
                    .is_some_and(|now| now.start <= range.start && now.end >= range.end() && same_file(now, vma))
            });
            if !still {
                self.cut(space_id, range.start, range.end());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange { start, len: end - start }
    }

    #[test]
    fn an_unmap_that_belongs_to_a_remap_is_not_about_what_was_moved_there_since() {
        let mut vacated = Vacated::default();
        vacated.add(range(5, 7), true);
        assert_eq!(vacated.unmapped(5, 7), []);
        assert_eq!(vacated.unmapped(5, 7), [range(5, 7)]);
    }

    #[test]
    fn the_rest_of_a_larger_unmap_counts() {
        let mut vacated = Vacated::default();
        vacated.add(range(6, 7), true);
        vacated.add(range(2, 3), true);
        assert_eq!(vacated.unmapped(1, 9), [range(1, 2), range(3, 6), range(7, 9)]);
        assert!(vacated.ranges.is_empty());
    }

    #[test]
    fn what_dontunmap_left_and_was_adopted_again_can_be_unmapped() {
        let mut vacated = Vacated::default();
        vacated.add(range(5, 7), false);
        vacated.made(range(5, 6));
        assert_eq!(vacated.unmapped(5, 7), [range(5, 7)]);
        vacated.add(range(5, 7), false);
        assert_eq!(vacated.unmapped(6, 8), [range(6, 8)], "a place that was only left");
        assert!(vacated.ranges.is_empty());
    }

    #[test]
    fn a_range_that_was_moved_into_was_unmapped_and_not_only_left() {
        let mut vacated = Vacated::default();
        vacated.add(range(5, 7), false);
        vacated.moved_into(range(5, 7));
        vacated.made(range(5, 7));
        assert_eq!(vacated.unmapped(5, 7), []);
    }
}
