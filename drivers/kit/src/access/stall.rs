//! An access that stands on one page: every second try is a pause, up to a limit.

use std::time::{Duration, Instant};

/// How long an access may stand on one page.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(1);
/// First pause of one that does; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// Standing on one page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stall {
    pub(super) page: u64,
    pub(super) since: Instant,
    pub(super) tries: u32,
    /// The pause before the next try is over.
    pub(super) rested: bool,
}

/// What an access that cannot go on does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Try,
    Pause(Duration),
    GiveUp,
}

impl Stall {
    /// The page is out of reach, now.
    pub(super) fn at(stall: &mut Option<Self>, page: u64, now: Instant) -> Next {
        match stall {
            Some(same) if same.page == page => same.again(now),
            _ => {
                *stall = Some(Self { page, since: now, tries: 0, rested: false });
                Next::Try
            }
        }
    }

    fn again(&mut self, now: Instant) -> Next {
        if self.rested {
            self.rested = false;
            return Next::Try;
        }
        if now.saturating_duration_since(self.since) >= STALL_LIMIT {
            return Next::GiveUp;
        }
        self.rested = true;
        self.tries += 1;
        Next::Pause(FIRST_PAUSE.saturating_mul(1 << (self.tries - 1).min(16)).min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_second_try_of_one_page_is_a_pause_until_the_limit() {
        let (mut stall, start) = (None, Instant::now());
        assert_eq!(Stall::at(&mut stall, 4, start), Next::Try);
        let mut now = start;
        let mut pauses = Vec::new();
        loop {
            match Stall::at(&mut stall, 4, now) {
                Next::Pause(pause) => {
                    pauses.push(pause);
                    now += pause;
                    assert_eq!(Stall::at(&mut stall, 4, now), Next::Try, "after a pause it is tried");
                }
                Next::GiveUp => break,
                Next::Try => panic!("no pause between two tries"),
            }
        }
        assert!(pauses.is_sorted() && pauses[0] == FIRST_PAUSE && pauses.last() == Some(&LONGEST_PAUSE));
        assert!(now - start >= STALL_LIMIT && now - start < STALL_LIMIT + LONGEST_PAUSE);
        assert_eq!(Stall::at(&mut stall, 5, now), Next::Try, "another page is progress");
    }
}
