//! What the demo measures itself against, in the same run: plain memcpy, and the bare userfaultfd floor.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, poll};
use uhmm_kernel_hook::{
    CopyMode, Features, ManagedMapping, PAGE_SIZE, RegisterMode, UffdEvent, Userfaultfd, Window, memfd,
};

const MIB: u64 = 1 << 20;
const POLL_MS: i64 = 20;

/// Latencies in nanoseconds.
pub struct Latency(Histogram<u64>);

impl Latency {
    /// Empty; up to 10 s with two digits.
    pub fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 10_000_000_000, 2).unwrap_or_else(|_| unreachable!("the bounds are legal")))
    }

    /// One measurement.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Quantile in microseconds.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// Counts below each of the bounds (microseconds), the last one open.
    pub fn bins(&self, bounds_us: &[u64]) -> Vec<u64> {
        let mut from = 0;
        let mut bins: Vec<u64> = Vec::new();
        for bound_us in bounds_us {
            let to = bound_us * 1000;
            bins.push(self.0.count_between(from, to - 1));
            from = to;
        }
        bins.push(self.0.count_between(from, u64::MAX));
        bins
    }
}

/// Middle value.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Two buffers for the plain copy, touched once so that no round pays for the first touch.
pub struct Memcpy {
    from: Window,
    to: Window,
}

impl Memcpy {
    /// 128 MiB each.
    pub fn new() -> anyhow::Result<Self> {
        let (from, to) = (Window::anonymous(128 * MIB)?, Window::anonymous(128 * MIB)?);
        from.fill(0, from.len(), 1)?;
        to.fill(0, to.len(), 2)?;
        Ok(Self { from, to })
    }

    /// Bytes per second of one copy in pieces of 2 MiB, the size in which pages migrate.
    pub fn round(&self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        for offset in (0..self.from.len()).step_by(2 * MIB as usize) {
            self.from.copy_to(offset, &self.to, offset, 2 * MIB)?;
        }
        Ok(self.from.len() as f64 / begun.elapsed().as_secs_f64())
    }
}

/// A memfd mapping whose missing pages a second thread fills with UFFDIO_COPY, with nothing else around it.
pub struct Floor {
    mapping: ManagedMapping,
    uffd: Userfaultfd,
    touched_pages: u64,
}

impl Floor {
    /// Room for `page_count` faults.
    pub fn new(page_count: u64) -> anyhow::Result<Self> {
        let len_bytes = page_count * PAGE_SIZE;
        let memory = memfd::create_sealed("uhmm-demo-floor", len_bytes)?;
        let mapping = ManagedMapping::map(memory.as_fd(), len_bytes, None)?;
        let (uffd, _) = Userfaultfd::create(None)?;
        uffd.api(Features::MISSING_SHMEM)?;
        uffd.register(mapping.range(), RegisterMode::MISSING)?;
        Ok(Self { mapping, uffd, touched_pages: 0 })
    }

    /// Meets `page_count` more pages one by one and notes how long each took.
    pub fn round(&mut self, page_count: u64, latency: &mut Latency) -> anyhow::Result<()> {
        let stop = AtomicBool::new(false);
        let (first, mapping, uffd) = (self.touched_pages, &self.mapping, &self.uffd);
        self.touched_pages += page_count;
        std::thread::scope(|scope| {
            let filler = scope.spawn(|| fill_until(uffd, &stop));
            for page in first..first + page_count {
                let begun = Instant::now();
                mapping.load_u64(page * PAGE_SIZE)?;
                latency.record(begun.elapsed());
            }
            stop.store(true, Ordering::Release);
            filler.join().map_err(|_| anyhow::anyhow!("The floor's filler thread panicked"))?
        })
    }
}

fn fill_until(uffd: &Userfaultfd, stop: &AtomicBool) -> anyhow::Result<()> {
    let source = Window::anonymous(PAGE_SIZE)?;
    source.fill(0, PAGE_SIZE, 0x5a)?;
    let mut events = Vec::new();
    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: POLL_MS * 1_000_000 };
    while !stop.load(Ordering::Acquire) {
        poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&timeout)).context("poll")?;
        events.clear();
        uffd.read_events(&mut events)?;
        for event in &events {
            if let UffdEvent::Fault { addr, .. } = event {
                let outcome = uffd.copy(addr & !(PAGE_SIZE - 1), &source, 0, PAGE_SIZE, CopyMode::default())?;
                anyhow::ensure!(outcome.done_bytes == PAGE_SIZE, "The floor could not fill a page: {:?}", outcome.stop);
            }
        }
    }
    Ok(())
}
