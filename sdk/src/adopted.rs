//! Which private ranges this session has adopted.

use uhmm_kernel_hook::AddrRange;

/// Adopted ranges, apart from each other. Memory that the program has unmapped without releasing it stays in here.
#[derive(Clone, Debug, Default)]
pub(crate) struct AdoptedRanges {
    ranges: Vec<AddrRange>,
}

impl AdoptedRanges {
    pub(crate) fn insert(&mut self, range: AddrRange) {
        // Adopting the same range again must not count twice.
        self.remove(range);
        self.ranges.push(range);
    }

    pub(crate) fn remove(&mut self, range: AddrRange) {
        let parts = std::mem::take(&mut self.ranges).into_iter().flat_map(|old| {
            let before = (old.start, old.end().min(range.start));
            let behind = (old.start.max(range.end()), old.end());
            [before, behind]
        });
        let kept = parts.filter(|(start, end)| start < end);
        self.ranges = kept.map(|(start, end)| AddrRange { start, len: end - start }).collect();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// All ranges, in no order.
    pub(crate) fn all(&self) -> Vec<AddrRange> {
        self.ranges.clone()
    }

    /// Whether any page of `range` is in here.
    pub(crate) fn overlaps(&self, range: AddrRange) -> bool {
        self.ranges.iter().any(|own| own.overlaps(&range))
    }

    /// What is in here of `range`.
    pub(crate) fn parts_in(&self, range: AddrRange) -> Vec<AddrRange> {
        self.ranges.iter().filter_map(|own| own.intersection(&range)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> AddrRange {
        AddrRange { start: first << 12, len: count << 12 }
    }

    fn pages(adopted: &AdoptedRanges) -> u64 {
        adopted.ranges.iter().map(|range| range.len >> 12).sum()
    }

    #[test]
    fn every_page_counts_once_until_it_is_released() {
        let mut adopted = AdoptedRanges::default();
        adopted.insert(range(10, 10));
        adopted.insert(range(10, 10));
        adopted.insert(range(15, 10));
        assert_eq!(pages(&adopted), 15);
        adopted.remove(range(12, 2));
        adopted.remove(range(0, 11));
        assert_eq!((pages(&adopted), adopted.ranges.len()), (12, 3));
        adopted.remove(range(0, 100));
        assert!(adopted.is_empty());
    }

    #[test]
    fn parts_of_a_range_are_found() {
        let mut adopted = AdoptedRanges::default();
        [range(10, 5), range(1, 2)].into_iter().for_each(|range| adopted.insert(range));
        assert!(adopted.overlaps(range(14, 3)) && !adopted.overlaps(range(3, 7)));
        assert_eq!(adopted.parts_in(range(2, 9)), [range(10, 1), range(2, 1)]);
    }

    #[test]
    fn ranges_that_only_touch_do_not_hurt_each_other() {
        let mut adopted = AdoptedRanges::default();
        adopted.insert(range(10, 10));
        adopted.remove(range(20, 5));
        adopted.remove(range(5, 5));
        assert_eq!(pages(&adopted), 10);
    }
}
