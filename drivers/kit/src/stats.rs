//! The driver's counters: what `uhmm stats` shows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use uhmm_ipc::message::Metric;
use uhmm_kit::record::{self, Each, Kind};

/// Longest fault wait that the histogram tells apart: one minute.
const LONGEST_WAIT_NS: u64 = 60_000_000_000;

/// What the copy thread counts; shared with the loop.
#[derive(Debug, Default)]
pub struct CopyCounters {
    /// Requests done.
    pub copies: AtomicU64,
    /// Requests refused or failed.
    pub failed_copies: AtomicU64,
    /// Bytes moved or scrubbed.
    pub bytes: AtomicU64,
}

impl CopyCounters {
    pub(crate) fn count(&self, ok: bool, bytes: u64) {
        // Counters order nothing.
        if ok {
            self.copies.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            self.failed_copies.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// All counters of a driver.
#[derive(Debug)]
pub(crate) struct Stats {
    pub(crate) copy: Arc<CopyCounters>,
    pub(crate) device_faults: u64,
    pub(crate) fault_asks: u64,
    pub(crate) failed_faults: u64,
    pub(crate) installed_pages: u64,
    pub(crate) refused_pages: u64,
    pub(crate) jobs: u64,
    pub(crate) failed_jobs: u64,
    pub(crate) invalidations: u64,
    pub(crate) invalidated_pages: u64,
    fault_wait_ns: Option<Histogram<u64>>,
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            copy: Arc::default(),
            device_faults: 0,
            fault_asks: 0,
            failed_faults: 0,
            installed_pages: 0,
            refused_pages: 0,
            jobs: 0,
            failed_jobs: 0,
            invalidations: 0,
            invalidated_pages: 0,
            // The bounds are constants that the crate accepts; without a histogram the percentiles are left out.
            fault_wait_ns: Histogram::new_with_bounds(1, LONGEST_WAIT_NS, 2).ok(),
        }
    }

    pub(crate) fn fault_waited(&mut self, wait: Duration) {
        if let Some(histogram) = &mut self.fault_wait_ns {
            histogram.saturating_record(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    pub(crate) fn tell(&self, suspended_faults: usize, running_jobs: usize, each: &mut Each<'_>) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (counter, gauge) = (Kind::Counter, Kind::Gauge);
        for (name, kind, value) in [
            ("device_faults", counter, self.device_faults),
            ("device_fault_asks", counter, self.fault_asks),
            ("failed_device_faults", counter, self.failed_faults),
            ("suspended_faults", gauge, suspended_faults as u64),
            ("installed_pages", counter, self.installed_pages),
            ("refused_pages", counter, self.refused_pages),
            ("jobs", counter, self.jobs),
            ("failed_jobs", counter, self.failed_jobs),
            ("running_jobs", gauge, running_jobs as u64),
            ("invalidations", counter, self.invalidations),
            ("invalidated_pages", counter, self.invalidated_pages),
            ("copies", counter, load(&self.copy.copies)),
            ("failed_copies", counter, load(&self.copy.failed_copies)),
            ("copied_bytes", counter, load(&self.copy.bytes)),
        ] {
            each(format_args!("{name}"), kind, value);
        }
    }

    /// With percentiles, which a record does not have: it has the histogram.
    pub(crate) fn metrics(&self, suspended_faults: usize, running_jobs: usize) -> Vec<Metric> {
        let mut metrics = record::metrics(|each| self.tell(suspended_faults, running_jobs, each));
        if let Some(histogram) = &self.fault_wait_ns {
            for (name, quantile) in [("fault_wait_p50_ns", 0.5), ("fault_wait_p99_ns", 0.99)] {
                metrics.push(Metric { name: name.to_owned(), value: histogram.value_at_quantile(quantile) });
            }
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_come_from_the_recorded_waits() {
        let mut stats = Stats::new();
        for micros in 1..=100 {
            stats.fault_waited(Duration::from_micros(micros));
        }
        let metrics = stats.metrics(0, 0);
        let value = |name: &str| metrics.iter().find(|m| m.name == name).map(|m| m.value).unwrap_or(0);
        assert!((49_000..=52_000).contains(&value("fault_wait_p50_ns")), "{}", value("fault_wait_p50_ns"));
        assert!((98_000..=101_000).contains(&value("fault_wait_p99_ns")), "{}", value("fault_wait_p99_ns"));
    }

    #[test]
    fn a_failed_copy_counts_no_bytes() {
        let stats = Stats::new();
        stats.copy.count(true, 4096);
        stats.copy.count(false, 4096);
        let metrics = stats.metrics(0, 0);
        let value = |name: &str| metrics.iter().find(|m| m.name == name).map(|m| m.value);
        assert_eq!((value("copies"), value("failed_copies"), value("copied_bytes")), (Some(1), Some(1), Some(4096)));
    }
}
