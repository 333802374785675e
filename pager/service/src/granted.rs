//! What devices were allowed to do with the pages of a segment since the last time that all of it was taken back: an upper bound,
//! because no device tells what it keeps. It is compared with what the program itself may do, see `revalidate`.

use std::collections::BTreeMap;
use std::ops::Range;

/// Pages, as runs: few, because answers are for neighbouring pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// End by first page; runs never touch.
    runs: BTreeMap<u64, u64>,
}

impl PageSet {
    /// Adds pages.
    pub fn add(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let before = self.runs.range(..=pages.start).next_back().filter(|(_, end)| **end >= pages.start);
        let (mut first, mut end) =
            before.map_or((pages.start, pages.end), |(first, old)| (*first, pages.end.max(*old)));
        let within: Vec<u64> = self.runs.range(first..=end).map(|(first, _)| *first).collect();
        for run in within {
            end = end.max(self.runs.remove(&run).unwrap_or(end));
            first = first.min(run);
        }
        self.runs.insert(first, end);
    }

    /// Takes pages away.
    pub fn remove(&mut self, pages: Range<u64>) {
        for run in self.within(pages.clone()) {
            let (first, end) = self.run_of(run.start);
            self.runs.remove(&first);
            for rest in [first..run.start, run.end..end] {
                if !rest.is_empty() {
                    self.runs.insert(rest.start, rest.end);
                }
            }
        }
    }

    fn run_of(&self, page: u64) -> (u64, u64) {
        self.runs.range(..=page).next_back().map_or((page, page), |(first, end)| (*first, *end))
    }

    /// What there is of some pages.
    pub fn within(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        let before = self.runs.range(..pages.start).next_back();
        let inside = self.runs.range(pages.clone());
        let cut = |(first, end): (&u64, &u64)| (*first).max(pages.start)..(*end).min(pages.end);
        before.into_iter().chain(inside).map(cut).filter(|run| !run.is_empty()).collect()
    }
}

/// See the module head; pages count from the segment's first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Granted {
    /// Mapped, or may be.
    pub readable: PageSet,
    /// Mapped writable, or may be.
    pub writable: PageSet,
}

impl Granted {
    /// Everything, for whoever does not know.
    pub fn all(page_count: u64) -> Self {
        let mut all = Self::default();
        all.add(0..page_count, true);
        all
    }

    /// A device is answered.
    pub fn add(&mut self, pages: Range<u64>, writable: bool) {
        if writable {
            self.writable.add(pages.clone());
        }
        self.readable.add(pages);
    }

    /// Every device has lost its mappings of these pages.
    pub fn remove(&mut self, pages: Range<u64>) {
        self.writable.remove(pages.clone());
        self.readable.remove(pages);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_are_one_run() {
        let mut set = PageSet::default();
        [4..6, 0..2, 2..4, 9..10].into_iter().for_each(|pages| set.add(pages));
        assert_eq!(set.within(0..100), [0..6, 9..10]);
        set.remove(3..10);
        assert_eq!(set.within(1..100), vec![1..3; 1]);
    }

    proptest! {
        #[test]
        fn a_set_is_the_pages_that_were_added_and_not_removed(ops in proptest::collection::vec((any::<bool>(), 0u64..40, 0u64..12), 0..40)) {
            let mut set = PageSet::default();
            let mut pages = [false; 64];
            for (add, first, count) in ops {
                let range = first..first + count;
                if add { set.add(range.clone()) } else { set.remove(range.clone()) }
                pages[first as usize..(first + count) as usize].fill(add);
            }
            for (page, there) in pages.iter().enumerate() {
                let page = page as u64;
                prop_assert_eq!(!set.within(page..page + 1).is_empty(), *there);
            }
            let whole = set.within(0..64);
            prop_assert!(whole.windows(2).all(|pair| pair[0].end < pair[1].start), "runs that touch: {:?}", whole);
        }
    }
}
