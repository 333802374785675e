//! Timers of one loop, ordered by time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::{ConnId, LinkId, TimerId, TimerToken};

/// What to do when time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The owner's timer.
    Owner(TimerToken),
    /// Try to connect again.
    Reconnect(LinkId),
    /// A call's deadline has passed.
    Deadline(LinkId, u64),
    /// An accepted connection should have said hello by now.
    Greeting(ConnId),
    /// Accepting failed (descriptors ran out); try again.
    Accept(usize),
}

#[derive(Default)]
pub(super) struct Timers {
    due: BTreeMap<TimerId, Due>,
    sequence: u64,
}

impl Timers {
    pub(super) fn add(&mut self, at: Instant, due: Due) -> TimerId {
        self.sequence += 1;
        let id = TimerId { at, sequence: self.sequence };
        self.due.insert(id, due);
        id
    }

    pub(super) fn add_after(&mut self, after: Duration, due: Due) -> TimerId {
        let now = Instant::now();
        // A time that cannot be represented never comes; a century is never, too.
        let at = now.checked_add(after).unwrap_or(now + Duration::from_secs(100 * 365 * 24 * 3600));
        self.add(at, due)
    }

    /// False when it fired or was cancelled before.
    pub(super) fn cancel(&mut self, id: TimerId) -> bool {
        self.due.remove(&id).is_some()
    }

    /// Time until the next one, zero when it is due.
    pub(super) fn wait(&self) -> Option<Duration> {
        self.due.first_key_value().map(|(id, _)| id.at.saturating_duration_since(Instant::now()))
    }

    /// Takes the next one that is due at `now`.
    pub(super) fn take(&mut self, now: Instant) -> Option<Due> {
        let (id, due) = self.due.first_key_value().map(|(id, due)| (*id, *due))?;
        (id.at <= now).then(|| {
            self.due.remove(&id);
            due
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_in_order_of_time_and_cancelled_ones_never() {
        let mut timers = Timers::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        timers.add(at(30), Due::Owner(TimerToken(3)));
        let second = timers.add(at(20), Due::Owner(TimerToken(2)));
        timers.add(at(10), Due::Owner(TimerToken(1)));
        assert!(timers.cancel(second));
        assert!(!timers.cancel(second));
        assert_eq!(timers.take(at(5)), None);
        assert_eq!(timers.take(at(40)), Some(Due::Owner(TimerToken(1))));
        assert_eq!(timers.take(at(40)), Some(Due::Owner(TimerToken(3))));
        assert_eq!(timers.take(at(40)), None);
        assert_eq!(timers.wait(), None);
    }

    #[test]
    fn a_timer_beyond_representable_time_is_kept_and_does_not_fire() {
        let mut timers = Timers::default();
        timers.add_after(Duration::MAX, Due::Accept(0));
        assert_eq!(timers.take(Instant::now()), None);
        assert!(timers.wait().is_some_and(|wait| wait > Duration::from_secs(3600)));
    }
}
