//! What became of each page of a large range, as runs: a terabyte of one fate is one entry.

use std::collections::BTreeMap;

use crate::event::{PageStatus, Pages, StatusRun};

/// Fates by first page; runs do not overlap.
#[derive(Debug, Default)]
pub(crate) struct Fates(BTreeMap<u64, (u64, PageStatus)>);

impl Fates {
    /// Whatever was said about these pages before.
    pub fn set(&mut self, pages: Pages, status: PageStatus) {
        if pages.count == 0 {
            return;
        }
        let overlap = self.0.range(..pages.end()).rev().take_while(|(first, (count, _))| *first + count > pages.first);
        let old: Vec<(u64, u64, PageStatus)> =
            overlap.map(|(first, (count, status))| (*first, *count, *status)).collect();
        for (first, count, other) in old {
            self.0.remove(&first);
            if first < pages.first {
                self.0.insert(first, (pages.first - first, other));
            }
            if first + count > pages.end() {
                self.0.insert(pages.end(), (first + count - pages.end(), other));
            }
        }
        // Runs come in order mostly: the last one grows.
        match self.0.range_mut(..pages.first).next_back() {
            Some((first, (count, last))) if *last == status && first + *count == pages.first => *count += pages.count,
            _ => drop(self.0.insert(pages.first, (pages.count, status))),
        }
    }

    /// All of `pages`, in order; those that nothing was said about have lost a race.
    pub fn of(&self, pages: Pages) -> Vec<StatusRun> {
        let mut runs: Vec<StatusRun> = Vec::new();
        let mut add = |first: u64, count: u64, status: PageStatus| match runs.last_mut() {
            _ if count == 0 => {}
            Some(run) if run.status == status => run.count += count,
            _ => runs.push(StatusRun { first, count, status }),
        };
        let mut next = pages.first;
        for (first, (count, status)) in &self.0 {
            add(next, first - next, PageStatus::Busy);
            add(*first, *count, *status);
            next = first + count;
        }
        add(next, pages.end() - next, PageStatus::Busy);
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates_are_those_of_an_array_of_pages() {
        let statuses = [PageStatus::Ok, PageStatus::Busy, PageStatus::Io];
        let mut seed = 1u64;
        for _ in 0..500 {
            let mut random = |below: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) % below
            };
            let all = Pages { first: 7, count: 40 };
            let (mut fates, mut array) = (Fates::default(), vec![PageStatus::Busy; 40]);
            for _ in 0..random(12) {
                let first = random(40);
                let count = random(40 - first + 1);
                let status = statuses[random(3) as usize];
                fates.set(Pages { first: all.first + first, count }, status);
                array[first as usize..(first + count) as usize].fill(status);
            }
            let runs = fates.of(all);
            let told: Vec<PageStatus> = runs.iter().flat_map(|run| vec![run.status; run.count as usize]).collect();
            assert_eq!(told, array);
            assert!(runs.windows(2).all(|two| two[0].first + two[0].count == two[1].first));
        }
    }
}
