//! What a run came to: for the program's owner, when it has ended.

use std::time::Duration;

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_shared::record::bucket_bound_ns;
use uhmm_watch::events::{bytes, duration};
use uhmm_watch::record::Times;
use uhmm_watch::sample::Sample;

use super::limit::Tally;

/// Faults on what had left, by the pager's own kinds of them.
const AWAY: [&str; 2] = ["device", "moving"];

/// Numbers of one program with its children.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub ran: Duration,
    /// What `--ram` says.
    pub ram_bytes: Option<u64>,
    pub peak_resident_bytes: u64,
    /// Of all devices, at the worst sample.
    pub peak_away_bytes: u64,
    pub limit: Tally,
    /// Waits for pages that had left, since the program began.
    pub waits: Waits,
}

/// Times by bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    pub sum_ns: u64,
    pub buckets: Vec<u64>,
}

impl Waits {
    /// All that the pager has counted so far, for all programs.
    pub fn of(sample: &Sample) -> Self {
        let mut all = Self::default();
        let is_away = |times: &&Times| {
            times.name == "fault" && times.labels.iter().any(|(_, kind)| AWAY.contains(&kind.as_str()))
        };
        for times in sample.service("pager").into_iter().flat_map(|pager| &pager.times).filter(is_away) {
            all.sum_ns += times.sum_ns;
            all.buckets.resize(all.buckets.len().max(times.buckets.len()), 0);
            all.buckets.iter_mut().zip(&times.buckets).for_each(|(sum, count)| *sum += count);
        }
        all
    }

    /// What came since.
    pub fn since(mut self, before: &Self) -> Self {
        self.sum_ns = self.sum_ns.saturating_sub(before.sum_ns);
        self.buckets.iter_mut().zip(&before.buckets).for_each(|(count, old)| *count = count.saturating_sub(*old));
        self
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The bound below which so many percent of them are; `None`: there were none, or they are longer than the last bound.
    pub fn percentile_ns(&self, percent: u64) -> Option<u64> {
        let wanted = (self.count() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        bucket_bound_ns(bucket)
    }
}

impl Summary {
    /// Lines for a person.
    pub fn text(&self) -> String {
        let seconds = self.ran.as_secs_f64();
        let mut text = format!("uhmm run: {seconds:.2} s, at most {} in memory", bytes(self.peak_resident_bytes));
        if let Some(ram) = self.ram_bytes {
            text += &format!(" (--ram {})", bytes(ram));
        }
        text += &format!(" and {} away\n", bytes(self.peak_away_bytes));
        if self.ram_bytes.is_some() {
            let Tally { sent_pages, looks_over, looks, .. } = self.limit;
            text += &format!(
                "  left because of the limit: {}; looks that found more than it: {looks_over} of {looks}\n",
                bytes(sent_pages * PAGE_SIZE)
            );
        }
        let waits = &self.waits;
        let bound = |percent| waits.percentile_ns(percent).map_or_else(|| "-".to_owned(), duration);
        text += &format!(
            "  what the limit cost: {} waits for pages that were away, {} of all threads together ({:.1} % of the time), half of them below {}, 99 % below {}\n",
            waits.count(),
            duration(waits.sum_ns),
            waits.sum_ns as f64 / 1e7 / seconds.max(1e-9),
            bound(50),
            bound(99)
        );
        text
    }

    /// The same for programs. Times in ns; `null` where there was no wait.
    pub fn json(&self) -> serde_json::Value {
        let Tally { sent_pages, looks_over, looks, laps_stuck, touched_pieces, strange_answers } = self.limit;
        serde_json::json!({
            "ran_s": self.ran.as_secs_f64(),
            "ram_bytes": self.ram_bytes,
            "peak_resident_bytes": self.peak_resident_bytes,
            "peak_away_bytes": self.peak_away_bytes,
            "sent_bytes": sent_pages * PAGE_SIZE,
            "looks": looks,
            "looks_over": looks_over,
            "laps_stuck": laps_stuck,
            "touched_pieces": touched_pieces,
            "strange_answers": strange_answers,
            "waits": self.waits.count(),
            "waited_ns": self.waits.sum_ns,
            "wait_p50_ns": self.waits.percentile_ns(50),
            "wait_p99_ns": self.waits.percentile_ns(99),
        })
    }

    /// What its owner must know although nobody asked.
    pub fn warning(&self) -> Option<String> {
        let ram = self.ram_bytes?;
        (self.limit.laps_stuck > 0 && self.peak_resident_bytes > ram).then(|| {
            format!(
                "uhmm run: the limit of {} could not be held ({} at most): the device was full, or what was left could not leave. See --far, and --stats",
                bytes(ram),
                bytes(self.peak_resident_bytes)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_bounds_of_buckets() {
        let waits = Waits { sum_ns: 0, buckets: vec![0, 90, 0, 9, 1] };
        assert_eq!(waits.count(), 100);
        assert_eq!([50, 90, 99, 100].map(|percent| waits.percentile_ns(percent)), [1, 1, 3, 4].map(bucket_bound_ns));
        assert_eq!(Waits::default().percentile_ns(50), None);
    }

    #[test]
    fn what_was_before_does_not_count() {
        let (before, now) = (Waits { sum_ns: 10, buckets: vec![1, 2] }, Waits { sum_ns: 25, buckets: vec![1, 5] });
        assert_eq!(now.since(&before), Waits { sum_ns: 15, buckets: vec![0, 3] });
    }

    #[test]
    fn a_limit_that_held_is_no_warning() {
        let held = Summary {
            ram_bytes: Some(1 << 20),
            peak_resident_bytes: 1 << 20,
            limit: Tally { laps_stuck: 3, ..Tally::default() },
            ..Summary::default()
        };
        assert_eq!(held.warning(), None);
        let text = Summary { peak_resident_bytes: 2 << 20, ..held }.warning().unwrap();
        assert!(text.contains("1 MiB") && text.contains("2 MiB") && text.contains("--far"), "{text}");
    }
}
