//! `--auto`: the limit is found while the program runs. A pure state machine: what was measured, now -> the limit.
//!
//! ```text
//!   lowers: a little less than what is in memory, step by step
//!      |  share of time spent waiting for pages > LITTLE                   > MUCH
//!      |-----> holds: the limit stays where it is, until it is quiet --------|
//!      |                                                                     v
//!      `<------------ the pause is over <------------ gives back: no limit; each time in short order twice as long
//! ```
//! Waits are those of all threads for pages that had left or were on their way, from the pager's counters; PSI is not needed, which many
//! kernels have switched off.

use std::time::{Duration, Instant};

use uhmm_watch::events::bytes;

/// Where the share of waits is aimed at, and from where on the program is given all it wants, in millionths.
const LITTLE_PPM: u64 = 5_000;
const MUCH_PPM: u64 = 20_000;
/// A step: this part of what is in memory, at least so much.
const STEP_PART: u64 = 64;
const STEP_MIN_BYTES: u64 = 2 << 20;
/// Between two decisions.
pub const STEP_EVERY: Duration = Duration::from_millis(200);
/// How long nothing is taken after the program wanted much: at first, at most, and the quiet time that halves it again.
const PAUSE_MIN: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(120);
/// Nothing is held to less.
const FLOOR_BYTES: u64 = 16 << 20;
/// Waits are a share of at least so much time: a single one is no tendency.
const WINDOW: Duration = Duration::from_secs(1);

/// What is known at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    pub resident_bytes: u64,
    /// All waits since the program began.
    pub waited_ns: u64,
}

/// Finds the limit.
#[derive(Debug)]
pub struct Auto {
    limit_bytes: Option<u64>,
    /// What was measured, oldest first, over [`WINDOW`].
    past: Vec<(Instant, u64)>,
    paused_until: Option<Instant>,
    pause: Duration,
    /// Since when it was quiet.
    quiet_since: Option<Instant>,
    /// What was in memory at each step, together, and the most.
    sum_bytes: u128,
    most_bytes: u64,
    steps: u64,
    gave_back: u64,
}

impl Default for Auto {
    fn default() -> Self {
        Self {
            limit_bytes: None,
            past: Vec::new(),
            paused_until: None,
            pause: PAUSE_MIN,
            quiet_since: None,
            sum_bytes: 0,
            most_bytes: 0,
            steps: 0,
            gave_back: 0,
        }
    }
}

impl Auto {
    /// The limit from now on; `None`: the program has what it wants.
    pub fn step(&mut self, measured: Measured, now: Instant) -> Option<u64> {
        self.steps += 1;
        self.sum_bytes += u128::from(measured.resident_bytes);
        self.most_bytes = self.most_bytes.max(measured.resident_bytes);
        let share_ppm = self.share_ppm(measured.waited_ns, now);
        if share_ppm > MUCH_PPM {
            self.give_back(now);
            return None;
        }
        if self.paused_until.is_some_and(|until| now < until) {
            return None;
        }
        if self.paused_until.take().is_some() {
            self.past.clear();
        }
        if share_ppm > LITTLE_PPM {
            self.quiet_since = None;
            return self.limit_bytes;
        }
        let quiet_since = *self.quiet_since.get_or_insert(now);
        if now.saturating_duration_since(quiet_since) > self.pause {
            self.pause = (self.pause / 2).max(PAUSE_MIN);
            self.quiet_since = Some(now);
        }
        // Before a window is full nothing is known of how the program takes it.
        if self.past.first().is_none_or(|(at, _)| now.saturating_duration_since(*at) < WINDOW / 2) {
            return self.limit_bytes;
        }
        let resident_bytes = measured.resident_bytes.min(self.limit_bytes.unwrap_or(u64::MAX));
        let step_bytes = (resident_bytes / STEP_PART).max(STEP_MIN_BYTES);
        self.limit_bytes = Some(resident_bytes.saturating_sub(step_bytes).max(FLOOR_BYTES));
        self.limit_bytes
    }

    fn give_back(&mut self, now: Instant) {
        // What is waited for in one go is one reason.
        if self.paused_until.is_none_or(|until| now >= until) {
            self.paused_until = Some(now + self.pause);
            self.pause = (self.pause * 2).min(PAUSE_MAX);
            self.gave_back += 1;
        }
        self.limit_bytes = None;
        self.quiet_since = None;
    }

    /// A line for a person.
    pub fn text(&self) -> String {
        let mean_bytes = (self.sum_bytes / u128::from(self.steps.max(1))) as u64;
        let limit = self.limit_bytes.map_or_else(|| "none".to_owned(), bytes);
        format!(
            "  --auto: {} in memory on average, {} at most; gave back {} times; its limit was {limit} at the end\n",
            bytes(mean_bytes),
            bytes(self.most_bytes),
            self.gave_back
        )
    }

    /// Waits of the last second as a share of it.
    fn share_ppm(&mut self, waited_ns: u64, now: Instant) -> u64 {
        self.past.push((now, waited_ns));
        let old = self.past.iter().rposition(|(at, _)| now.saturating_duration_since(*at) >= WINDOW).unwrap_or(0);
        self.past.drain(..old);
        let (_, before) = self.past[0];
        waited_ns.saturating_sub(before).saturating_mul(1_000_000) / WINDOW.as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A program of which `used` must be in memory: it waits for so much in a second when it is short of it.
    struct Model {
        auto: Auto,
        now: Instant,
        resident: u64,
        all: u64,
        waited_ns: u64,
        gave_back: u32,
    }

    impl Model {
        fn new(all: u64) -> Self {
            let (auto, now) = (Auto::default(), Instant::now());
            Self { auto, now, resident: all, all, waited_ns: 0, gave_back: 0 }
        }

        fn step(&mut self, used: u64) {
            self.now += STEP_EVERY;
            let missing = used.saturating_sub(self.resident);
            // 64 KiB at a time, 200 us each, as much as fits into the time.
            self.waited_ns += (missing / (64 << 10) * 200_000).min(STEP_EVERY.as_nanos() as u64);
            self.resident = self.resident.max(used.min(self.all));
            let before = self.auto.limit_bytes;
            let limit = self.auto.step(Measured { resident_bytes: self.resident, waited_ns: self.waited_ns }, self.now);
            self.gave_back += u32::from(before.is_some() && limit.is_none());
            self.resident = self.resident.min(limit.unwrap_or(u64::MAX));
        }

        fn run(&mut self, seconds: u32, used: u64) -> u64 {
            let before = self.waited_ns;
            (0..5 * seconds).for_each(|_| self.step(used));
            self.waited_ns - before
        }
    }

    #[test]
    fn idle_memory_is_taken_and_what_is_used_stays_at_hardly_a_wait() {
        let mut model = Model::new(1024 * MIB);
        model.run(60, 512 * MIB);
        let waited = model.run(240, 512 * MIB);
        assert!(model.resident < 700 * MIB, "{} MiB", model.resident / MIB);
        assert!(waited < 240 * 10_000_000, "{} ms of 240 s", waited / 1_000_000);
    }

    #[test]
    fn what_is_used_all_the_time_is_not_taken_again_and_again() {
        let mut model = Model::new(1024 * MIB);
        let waited = model.run(600, 1024 * MIB);
        assert!(waited < 600 * 10_000_000, "{} ms of 600 s", waited / 1_000_000);
    }

    #[test]
    fn who_needs_it_again_has_no_limit_at_once() {
        let mut model = Model::new(1024 * MIB);
        model.run(60, 64 * MIB);
        assert!(model.resident < 300 * MIB, "{} MiB", model.resident / MIB);
        model.gave_back = 0;
        model.step(1024 * MIB);
        model.step(1024 * MIB);
        assert_eq!((model.auto.limit_bytes, model.resident), (None, 1024 * MIB));
        assert!(model.gave_back <= 1, "{} times", model.gave_back);
    }

    #[test]
    fn nobody_is_held_to_less_than_the_floor() {
        let mut model = Model::new(64 * MIB);
        model.run(600, 0);
        assert_eq!(model.resident, FLOOR_BYTES);
    }
}
