//! Touching pages one by one, in an order that nobody can guess, and noting how long each touch took.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use uhmm_kernel_hook::{ManagedMapping, PAGE_SIZE};

use super::super::place;
use crate::rng::Rng;

/// Every number below `count` once, the same each time.
pub(in super::super) fn shuffled(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut rng = Rng::new(1);
    for last in (1..order.len()).rev() {
        order.swap(last, rng.below(last as u64 + 1) as usize);
    }
    order
}

/// Up to 10 s with two digits, in nanoseconds.
pub(in super::super) fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 10_000_000_000, 2)?)
}

/// Who touches what.
pub(in super::super) struct Touch<'a> {
    /// Pages, which the threads share out.
    pub order: &'a [u64],
    pub threads: usize,
    /// Work of the program between two touches.
    pub pause: Option<Duration>,
    /// Where the threads are.
    pub cpus: Vec<usize>,
}

impl Touch<'_> {
    /// All of it, all threads at once. With `write` pages are written, else read.
    pub fn all(&self, memory: &ManagedMapping, write: bool) -> anyhow::Result<Histogram<u64>> {
        self.from(memory, 0, write)
    }

    /// The same for pages that begin at an offset; they are read.
    pub fn at(&self, memory: &ManagedMapping, off: u64) -> anyhow::Result<Histogram<u64>> {
        self.from(memory, off, false)
    }

    fn from(&self, memory: &ManagedMapping, off: u64, write: bool) -> anyhow::Result<Histogram<u64>> {
        let part = self.order.len().div_ceil(self.threads);
        let parts = self.order.chunks(part);
        std::thread::scope(|scope| {
            let work: Vec<_> = parts.map(|pages| scope.spawn(move || self.part(memory, (off, pages), write))).collect();
            let mut all = histogram()?;
            for thread in work {
                let part = thread.join().map_err(|_| anyhow::anyhow!("A thread of the bench panicked"))??;
                all.add(part)?;
            }
            Ok(all)
        })
    }

    fn part(
        &self,
        memory: &ManagedMapping,
        (off, pages): (u64, &[u64]),
        write: bool,
    ) -> anyhow::Result<Histogram<u64>> {
        place::stay_on(&self.cpus)?;
        let mut took = histogram()?;
        for page in pages {
            let begun = Instant::now();
            if write {
                memory.store_u64(off + page * PAGE_SIZE, *page)?;
            } else {
                memory.load_u64(off + page * PAGE_SIZE)?;
            }
            took.saturating_record(u64::try_from(begun.elapsed().as_nanos())?);
            if let Some(pause) = self.pause {
                let until = Instant::now() + pause;
                while Instant::now() < until {
                    std::hint::spin_loop();
                }
            }
        }
        Ok(took)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once_and_no_walk_is_seen() {
        let order = shuffled(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        let walks = order.windows(2).filter(|two| two[0] + 1 == two[1]).count();
        assert!(walks < 10, "{walks} pages are met just after the one before them");
    }
}
