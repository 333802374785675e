//! Short waits: the reactor's are whole milliseconds, rounded up, in which a hundred faults are answered. A timer's descriptor, watched as
//! any other, ends a wait of microseconds. It costs a system call, and is asked for such waits alone.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use uhmm_ipc::{FdToken, Reactor};

/// From here on a millisecond more or less does not matter.
const SHORT: Duration = Duration::from_millis(5);

/// See the module head. Without a timer waits are as long as the reactor makes them.
#[derive(Debug)]
pub(crate) struct ShortWait(Option<OwnedFd>);

impl ShortWait {
    pub(crate) fn new(reactor: &mut Reactor, token: FdToken) -> Self {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.inspect_err(|error| tracing::warn!(%error, "No timer: short waits take a millisecond")).ok();
        let watched = timer.filter(|timer| {
            let watched = reactor.add_fd(timer, token);
            watched.inspect_err(|error| tracing::warn!(%error, "The timer is not watched")).is_ok()
        });
        Self(watched)
    }

    /// What the reactor is to wait for at most. The timer wakes it sooner, once.
    pub(crate) fn exactly(&self, wait: Duration) -> Duration {
        if let Some(timer) = self.0.as_ref().filter(|_| !wait.is_zero() && wait < SHORT) {
            let it_value = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
            if let Err(error) = rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &once) {
                tracing::debug!(%error, "A short wait takes a millisecond");
            }
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    #[test]
    fn a_short_wait_ends_in_time_again_and_again() {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let short = ShortWait(Some(rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).unwrap()));
        let timer = short.0.as_ref().unwrap();
        let mut best = Duration::MAX;
        for _ in 0..200 {
            let begun = Instant::now();
            assert_eq!(short.exactly(Duration::from_micros(100)), Duration::from_micros(100));
            // Nobody reads it: setting it anew takes the last time's expiry away.
            poll(&mut [PollFd::new(timer, PollFlags::IN)], None).unwrap();
            assert!(begun.elapsed() >= Duration::from_micros(100));
            best = best.min(begun.elapsed());
        }
        assert!(best < Duration::from_millis(1), "{best:?} at best of 200");
    }
}
