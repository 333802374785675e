//! Consecutive blocks, and which of them are free. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First block.
    pub first: u32,
    /// Blocks.
    pub count: u32,
}

impl Run {
    /// One past the last block.
    pub fn end(self) -> u32 {
        self.first + self.count
    }

    /// The two have a block in common.
    pub fn meets(self, other: Run) -> bool {
        self.first < other.end() && other.first < self.end()
    }
}

/// Free blocks as runs that do not touch each other. A request gets the smallest run that is long enough, so that long ones stay for who needs them.
#[derive(Clone, Debug, Default)]
pub struct FreeRuns {
    by_start: BTreeMap<u32, u32>,
    by_count: BTreeSet<(u32, u32)>,
    total: u32,
}

impl FreeRuns {
    /// Free blocks.
    pub fn total(&self) -> u32 {
        self.total
    }

    fn add(&mut self, run: Run) {
        self.by_start.insert(run.first, run.count);
        self.by_count.insert((run.count, run.first));
        self.total += run.count;
    }

    fn remove(&mut self, run: Run) {
        self.by_start.remove(&run.first);
        self.by_count.remove(&(run.count, run.first));
        self.total -= run.count;
    }

    /// Blocks that were not free become so.
    pub fn free(&mut self, mut run: Run) {
        if run.count == 0 {
            return;
        }
        let before =
            self.by_start.range(..run.first).next_back().map(|(first, count)| Run { first: *first, count: *count });
        if let Some(before) = before.filter(|before| before.end() == run.first) {
            self.remove(before);
            run = Run { first: before.first, count: before.count + run.count };
        }
        if let Some(count) = self.by_start.get(&run.end()).copied() {
            let after = Run { first: run.end(), count };
            self.remove(after);
            run.count += after.count;
        }
        self.add(run);
    }

    /// Up to `wanted` blocks in a row: all of them where a run is that long, else the longest run there is. `None`: nothing is free.
    pub fn take(&mut self, wanted: u32) -> Option<Run> {
        let fits = self.by_count.range((wanted, 0)..).next();
        let (count, first) = *fits.or_else(|| self.by_count.last())?;
        self.remove(Run { first, count });
        let taken = count.min(wanted);
        if taken < count {
            self.add(Run { first: first + taken, count: count - taken });
        }
        Some(Run { first, count: taken })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_become_one_and_the_smallest_that_fits_is_taken() {
        let mut free = FreeRuns::default();
        for (first, count) in [(0, 4), (8, 2), (4, 4), (20, 3), (40, 100)] {
            free.free(Run { first, count });
        }
        assert_eq!(free.total(), 113);
        assert_eq!(free.take(3), Some(Run { first: 20, count: 3 }));
        assert_eq!(free.take(10), Some(Run { first: 0, count: 10 }));
        assert_eq!(free.take(64), Some(Run { first: 40, count: 64 }));
        assert_eq!(free.take(64), Some(Run { first: 104, count: 36 }), "the longest there is");
        assert_eq!((free.take(1), free.total()), (None, 0));
    }

    proptest! {
        #[test]
        fn no_block_is_given_twice_or_forgotten(steps in prop::collection::vec((1u32..40, any::<prop::sample::Index>()), 1..200)) {
            let mut free = FreeRuns::default();
            free.free(Run { first: 0, count: 256 });
            let mut taken: Vec<Run> = Vec::new();
            for (wanted, index) in steps {
                if wanted % 3 == 0 && !taken.is_empty() {
                    free.free(taken.swap_remove(index.index(taken.len())));
                } else if let Some(run) = free.take(wanted) {
                    prop_assert!(run.count >= 1 && run.count <= wanted);
                    prop_assert!(taken.iter().all(|other| !other.meets(run)), "{run:?} of {taken:?}");
                    taken.push(run);
                }
                prop_assert_eq!(free.total() + taken.iter().map(|run| run.count).sum::<u32>(), 256);
            }
            taken.into_iter().for_each(|run| free.free(run));
            prop_assert_eq!(free.take(256), Some(Run { first: 0, count: 256 }));
        }
    }
}
