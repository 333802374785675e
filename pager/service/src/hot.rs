//! After a fault the pager looks again for a while instead of sleeping: waking an idle core costs five times a fault. That pays where
//! the next fault comes soon, and where the program can run meanwhile. On the only core of a container, or behind a quota of CPU time,
//! the pager would stand in the way of the program that it waits for. No mask of CPUs tells all of that, so what looking brings is counted:
//!
//! ```text
//!   fault --> look --the next one comes--> credit + 1 --> look again
//!                `---nothing came--------> credit - 1 --> 0: the next faults are waited for asleep, then one more try;
//!                                                         twice as many faults each time that was in vain
//! ```
//! An idle system costs nothing, and a program that looking does not help costs one look in a thousand faults.

use std::time::{Duration, Instant};

/// How long it looks.
const LOOK: Duration = Duration::from_micros(60);
/// Looks in vain in a row before it sleeps.
const CREDIT_MAX: u32 = 4;
/// Faults between two tries: at first, and at most.
const REST: std::ops::RangeInclusive<u32> = 16..=1024;

/// See the module head.
#[derive(Debug)]
pub(crate) struct HotPoll {
    allowed: bool,
    until: Option<Instant>,
    credit: u32,
    /// Faults that are still waited for asleep.
    resting: u32,
    /// How many it will be the next time.
    rest: u32,
}

/// More than one CPU is there for this process, now.
pub(crate) fn several_cpus() -> bool {
    std::thread::available_parallelism().map_or(true, |count| count.get() > 1)
}

impl HotPoll {
    pub(crate) fn new(allowed: bool) -> Self {
        Self { allowed, until: None, credit: CREDIT_MAX, resting: 0, rest: *REST.start() }
    }

    /// Faults have been read.
    pub(crate) fn fault(&mut self, now: Instant) {
        match self.until.take() {
            Some(until) if now < until => {
                self.credit = (self.credit + 1).min(CREDIT_MAX);
                self.rest = *REST.start();
            }
            Some(_) => self.in_vain(),
            None => self.resting = self.resting.saturating_sub(1),
        }
        if self.allowed && self.resting == 0 {
            self.until = Some(now + LOOK);
        }
    }

    /// Whether to look again, instead of sleeping.
    pub(crate) fn looks(&mut self, now: Instant) -> bool {
        let Some(until) = self.until else { return false };
        if now < until {
            return true;
        }
        self.until = None;
        self.in_vain();
        false
    }

    fn in_vain(&mut self) {
        self.credit = self.credit.saturating_sub(1);
        if self.credit == 0 {
            self.resting = self.rest;
            self.rest = (self.rest * 2).min(*REST.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults that come `gap` after the one before was answered. Where the core is shared the program goes on only when the pager sleeps.
    /// Returns how long it was kept waiting in all.
    fn kept_waiting(hot: &mut HotPoll, faults: u32, gap: Duration, shares_core: bool) -> Duration {
        let (mut now, mut waited) = (Instant::now(), Duration::ZERO);
        for _ in 0..faults {
            hot.fault(now);
            let (answered, step) = (now, Duration::from_micros(1));
            while hot.looks(now) && (shares_core || now < answered + gap) {
                now += step;
            }
            if shares_core {
                waited += now - answered;
                now += gap;
            } else {
                now = now.max(answered + gap);
            }
        }
        waited
    }

    #[test]
    fn a_program_on_the_same_core_is_kept_waiting_a_few_times_and_not_with_every_fault() {
        let mut hot = HotPoll::new(true);
        let waited = kept_waiting(&mut hot, 10_000, Duration::from_micros(50), true);
        assert!(waited <= LOOK * 24, "{waited:?} of {:?}", LOOK * 10_000);
        assert_eq!(kept_waiting(&mut HotPoll::new(false), 1000, Duration::ZERO, true), Duration::ZERO, "the only core");
    }

    #[test]
    fn faults_that_come_soon_are_looked_for_again_and_again() {
        let mut hot = HotPoll::new(true);
        kept_waiting(&mut hot, 1000, Duration::from_micros(50), false);
        assert!(hot.looks(hot.until.unwrap() - LOOK) && hot.credit == CREDIT_MAX);
    }

    #[test]
    fn a_program_that_comes_back_to_frequent_faults_is_looked_for_again() {
        let mut hot = HotPoll::new(true);
        kept_waiting(&mut hot, 100, Duration::from_millis(5), false);
        assert!(hot.credit == 0 && hot.until.is_none());
        kept_waiting(&mut hot, 600, Duration::from_micros(20), false);
        assert_eq!((hot.credit, hot.resting), (CREDIT_MAX, 0));
    }
}
