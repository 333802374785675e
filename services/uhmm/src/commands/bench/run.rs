//! One run of `uhmm bench`: what it was asked for, and what it has found so far.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::BenchArgs;
use super::bed::{Bed, Device, Spec};
use super::benches::ways::Measured;
use super::figure::{Figure, Reach};
use super::plot::Plot;

/// A case that has taken so long has enough rounds, if it has a few.
const LONG: Duration = Duration::from_secs(5);
const FEW: u32 = 3;

/// See [`Run::rounds`].
pub(super) struct Rounds {
    next: u32,
    most: u32,
    few: u32,
    begun: Instant,
}

impl Iterator for Rounds {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let round = self.next;
        self.next += 1;
        let enough = round > self.few && self.begun.elapsed() > LONG;
        (round <= self.most && !enough).then_some(round)
    }
}

/// What benches are given.
pub(super) struct Run<'a> {
    /// Whose devices.
    pub driver: Device,
    pub short: bool,
    /// Rounds that were asked for.
    pub asked_rounds: Option<u32>,
    /// Only cases with this text.
    pub only: Option<&'a str>,
    /// A private folder for everything that needs a path.
    pub folder: PathBuf,
    pub names: AtomicU32,
    /// Which bench it is now.
    pub bench: &'static str,
    pub figures: Vec<Figure>,
    /// What does not apply, and why.
    pub left_out: Vec<(String, String)>,
    pub plots: Vec<Plot>,
    /// `out` and `home` are measured together.
    pub ways: Option<Vec<Measured>>,
}

impl<'a> Run<'a> {
    pub fn new(driver: Device, args: &'a BenchArgs, folder: PathBuf) -> Self {
        Self {
            driver,
            short: args.short,
            asked_rounds: args.rounds,
            only: args.only.as_deref(),
            folder,
            names: AtomicU32::new(0),
            bench: "",
            figures: Vec::new(),
            left_out: Vec::new(),
            plots: Vec::new(),
            ways: None,
        }
    }

    /// Rounds of a case: those asked for, one of a short run, else so many, and fewer on a slow machine. The first one (0) only touches
    /// everything for the first time.
    pub fn rounds(&self, usual: u32) -> Rounds {
        let most = self.most_rounds(usual);
        let few = if self.asked_rounds.is_some() { most } else { most.min(FEW) };
        Rounds { next: 0, most, few, begun: Instant::now() }
    }

    pub fn most_rounds(&self, usual: u32) -> u32 {
        self.asked_rounds.unwrap_or(if self.short { 1 } else { usual })
    }

    /// The usual size, or what a short run and a slow device can do: whole pieces of 2 MiB.
    pub fn bytes(&self, usual: u64) -> u64 {
        let part = match (self.short, self.driver) {
            (true, _) => 64,
            (false, Device::Soft) => 1,
            (false, _) => 8,
        };
        (usual / part).clamp(usual.min(8 << 20), usual).next_multiple_of(2 << 20)
    }

    /// Whether a case is asked for.
    pub fn wants(&self, case: &str) -> bool {
        self.only.is_none_or(|text| case.contains(text))
    }

    /// A path that nothing has yet.
    pub fn path(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{what}-{}", self.names.fetch_add(1, Ordering::Relaxed)))
    }

    pub fn figure(&mut self, case: impl Into<String>, unit: &'static str, reach: Reach, rounds: Vec<(f64, f64)>) {
        self.figures.push(Figure { bench: self.bench, case: case.into(), unit, reach, rounds });
    }

    pub fn leave_out(&mut self, case: impl Into<String>, why: impl Into<String>) {
        let case = case.into();
        let name = if case.is_empty() { self.bench.to_owned() } else { format!("{}, {case}", self.bench) };
        self.left_out.push((name, why.into()));
    }

    /// A system as wanted; `None`, and said so, where the driver or the machine has none.
    pub fn bed(&mut self, spec: Spec, case: &str) -> anyhow::Result<Option<Bed>> {
        match Bed::start(self, spec)? {
            Ok(bed) => Ok(Some(bed)),
            Err(why) => {
                self.leave_out(case, why);
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_case_has_a_few_rounds_and_a_quick_one_all() {
        let begun = Instant::now();
        let long_ago = begun.checked_sub(2 * LONG).expect("the machine has run for ten seconds");
        let count = |begun| Rounds { next: 0, most: 9, few: FEW, begun }.count();
        assert_eq!((count(begun), count(long_ago)), (10, 4));
    }
}
