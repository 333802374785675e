//! Recovery in turns: how much a dead pager has left makes nobody wait for the first answer.
//!
//! ```text
//!   RecoverRegion    everybody who waits is woken: who still has something to ask asks again. As much as one step looks at is done at once
//!   each turn        a share of what is left, in the order of regions and pages
//!   a CPU fault      on a page that is left: its neighbourhood at once, and the wake-up at its end raises the fault anew
//!   requests         wait until their region is done; walks, and with them what a device's free frames are, until all are
//!   what cannot wait (the program has dropped or cloned pages, a device's memory is lost): `first` names what is done before
//! ```
//! Until a page's turn has come nothing is begun with it, so it is as the dead pager has left it: what its entry says is what is.

use std::collections::BTreeMap;

use crate::core::{CHUNK_PAGES, Core};
use crate::event::{Action, Backing, DeviceId, Directory, Event, Pages, RegionId};
use crate::policy::Policy;

/// Regions that are not recovered yet.
#[derive(Debug, Default)]
pub(crate) struct Recovering {
    regions: BTreeMap<RegionId, Left>,
    /// What was done at once.
    begun: u64,
}

/// What is left of one.
#[derive(Debug)]
struct Left {
    /// All pages before this one are done.
    at: u64,
    page_count: u64,
    /// And these, which somebody has met: first page and end.
    met: BTreeMap<u64, u64>,
    strays: Vec<Pages>,
}

impl Left {
    /// Pages around this one that are all done.
    fn done_around(&self, page: u64) -> Option<Pages> {
        if page < self.at {
            return Some(Pages { first: 0, count: self.at });
        }
        let (first, end) = self.met.range(..=page).next_back().filter(|(_, end)| **end > page)?;
        Some(Pages { first: *first, count: end - first })
    }

    /// The first pages that are not done, up to those that are, or the end.
    fn next(&mut self) -> Option<Pages> {
        while let Some(end) = self.met.remove(&self.at) {
            self.at = end;
        }
        let end = self.met.keys().next().copied().unwrap_or(self.page_count);
        (self.at < end).then_some(Pages { first: self.at, count: end - self.at })
    }

    /// Of the pages around one that is not done: those next to it that are not, either.
    fn not_done(&self, page: u64, around: Pages) -> Pages {
        let before = self.met.range(..=page).next_back().map_or(0, |(_, end)| *end);
        let first = around.first.max(self.at).max(before);
        let behind = self.met.range(page..).next().map_or(self.page_count, |(first, _)| *first);
        Pages { first, count: around.end().min(behind) - first }
    }
}

impl Recovering {
    /// Something is left.
    pub fn any(&self) -> bool {
        !self.regions.is_empty()
    }

    /// Something of the region is.
    pub fn has(&self, region: RegionId) -> bool {
        self.regions.contains_key(&region)
    }
}

impl<P: Policy> Core<P> {
    /// What must be handled before this event: it looks at pages, at once, that are as a dead pager has left them. To be asked again then.
    #[must_use]
    pub fn first(&self, event: &Event) -> Option<Event> {
        let left = |region: &RegionId| self.recovering.has(*region);
        let any = || self.recovering.regions.keys().next().copied();
        let region = match event {
            Event::Unmapped { region, .. } | Event::Removed { region, .. } | Event::RegionFree { region, .. } => {
                Some(*region).filter(left)
            }
            Event::Forked { parent, child, .. } | Event::ForkedBefore { parent, child } => {
                [*parent, *child].into_iter().find(left)
            }
            Event::DeviceFailed { .. } => any(),
            Event::DeviceUp { device, memory_lost, .. } if *memory_lost || self.was_seen(*device) => any(),
            _ => None,
        };
        region.map(|region| Event::RecoverNow { region })
    }

    /// It has logged in or failed since this pager began.
    fn was_seen(&self, device: DeviceId) -> bool {
        let known = self.frames.get(usize::from(device.0)).is_none_or(Option::is_some);
        known || self.is_failed(device) || self.walks_for(device)
    }

    /// One region of the vault.
    pub(crate) fn begin_recovery(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        strays: Vec<Pages>,
        out: &mut Vec<Action>,
    ) {
        let page_count = dir.page_count(region);
        let all = Pages { first: 0, count: page_count };
        if self.backing(region) == Some(Backing::File) {
            self.recover_pages(dir, region, all, &strays, out);
            return;
        }
        let met = strays.iter().filter_map(|stray| stray.overlap(all)).collect::<Vec<_>>();
        self.recovering.regions.insert(region, Left { at: 0, page_count, met: BTreeMap::new(), strays });
        // The program reaches these without asking.
        for page in met.into_iter().flat_map(Pages::iter) {
            self.recover_met(dir, region, page, out);
        }
        let left = self.budget.saturating_sub(self.recovering.begun);
        let looked_at = self.recover_some(dir, left, out);
        self.recovering.begun += looked_at;
        if self.recovering.has(region) {
            // Whom the dead pager had heard asks again, and is answered.
            out.push(Action::Wake { region, pages: all });
        }
    }

    /// All that is left of a region.
    pub(crate) fn recover_now(&mut self, dir: &impl Directory, region: RegionId, out: &mut Vec<Action>) {
        let Some(mut left) = self.recovering.regions.remove(&region) else { return };
        while let Some(pages) = left.next() {
            self.recover_pages(dir, region, pages, &left.strays, out);
            left.at = pages.end();
        }
        self.unblock_all();
    }

    /// A share of what is left: entries that one step looks at. Returns how many it has looked at.
    pub(crate) fn recover_some(&mut self, dir: &impl Directory, budget: u64, out: &mut Vec<Action>) -> u64 {
        let mut looked_at = 0;
        while looked_at < budget
            && let Some((region, mut left)) = self.recovering.regions.pop_first()
        {
            while looked_at < budget
                && let Some(pages) = left.next()
            {
                let mut share = Pages { count: 0, ..pages };
                while looked_at < budget && share.count < pages.count {
                    let alike = dir.alike(region, share.end());
                    // Page by page, or all in one look.
                    let looks = if alike > 1 { 1 } else { CHUNK_PAGES.min(budget - looked_at) };
                    let count = (pages.count - share.count).min(looks.max(alike));
                    (share.count, looked_at) = (share.count + count, looked_at + looks.min(count));
                }
                self.recover_pages(dir, region, share, &left.strays, out);
                left.at = share.end();
            }
            if left.next().is_some() {
                self.recovering.regions.insert(region, left);
            } else {
                self.unblock_all();
            }
            // Regions are looked at, too.
            looked_at += 1;
        }
        looked_at
    }

    /// Somebody has met a page: whether it was left, and is recovered now with those around it.
    pub(crate) fn recover_met(
        &mut self,
        dir: &impl Directory,
        region: RegionId,
        page: u64,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some(mut left) = self.recovering.regions.remove(&region) else { return false };
        let is_left = page < left.page_count && left.done_around(page).is_none();
        if is_left {
            let size = CHUNK_PAGES.min(self.budget);
            let around = Pages { first: page / size * size, count: size };
            let pages = left.not_done(page, around);
            self.recover_pages(dir, region, pages, &left.strays, out);
            left.met.insert(pages.first, pages.end());
        }
        self.recovering.regions.insert(region, left);
        is_left
    }

    /// Of pages that may be taken along with one that is recovered: those that are, too.
    pub(crate) fn recovered_part(&self, region: RegionId, page: u64, pages: Pages) -> Pages {
        let Some(left) = self.recovering.regions.get(&region) else { return pages };
        left.done_around(page).and_then(|done| done.overlap(pages)).unwrap_or(Pages::one(page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_neither_the_turns_nor_anybody_else_has_come_to() {
        let met = BTreeMap::from([(4, 8), (8, 12), (20, 24)]);
        let mut left = Left { at: 2, page_count: 30, met, strays: Vec::new() };
        let pages = |first, count| Pages { first, count };
        assert_eq!(left.done_around(1), Some(pages(0, 2)));
        assert_eq!([2, 3, 12, 19, 24].map(|page| left.done_around(page)), [None; 5]);
        assert_eq!((left.done_around(7), left.done_around(23)), (Some(pages(4, 4)), Some(pages(20, 4))));
        assert_eq!(left.not_done(3, pages(0, 4)), pages(2, 2));
        assert_eq!(left.not_done(18, pages(10, 12)), pages(12, 8));
        assert_eq!(left.not_done(29, pages(24, 8)), pages(24, 6));
        let mut turns = Vec::new();
        while let Some(pages) = left.next() {
            turns.push((pages.first, pages.end()));
            left.at = pages.end();
        }
        assert_eq!(turns, [(2, 4), (12, 20), (24, 30)]);
    }
}
