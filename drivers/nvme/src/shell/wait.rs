//! Waiting for completions: look for a while, then sleep until an interrupt.
//!
//! Any number of threads look, each for its own batch, and take whatever there is; one of those that sleep sleeps for all of them.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use uhmm_pci::PciError;

use crate::error::NvmeError;
use crate::machine::{Event, Phase};
use crate::protocol::ControllerStatus;
use crate::protocol::registers::{CSTS, GONE};
use crate::shell::{Inner, Shared};
use crate::start::STATUS_PAUSE;

/// Looking costs a core, sleeping costs an interrupt. Whoever waits for bulk looks for so long before it sleeps, and whoever waits for a
/// single command, which somebody's access may stand still for; on devices that are slower they sleep at once.
const LOOK_FOR: [Duration; 2] = [Duration::from_micros(250), Duration::from_millis(1)];
/// Sleep while something is in flight that raises no interrupt.
const NAP: Duration = Duration::from_micros(200);
/// A device is slower when so many looks in a row were in vain. One hiccup says little.
const VAIN_MAX: u32 = 3;
/// On slower devices it still looks once in so many batches: they may have become fast.
const LOOK_EVERY: u32 = 32;
/// Looks between two looks at the clock, which may be a device too.
const LOOKS: u32 = 16;
/// Longest sleep: CSTS is read after it.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// Whether looking pays. Only looking tells: a sleep takes what the interrupt takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    /// Looks in vain since the last one that found something.
    vain: u32,
    batches: u32,
}

impl Patience {
    /// Whether the next batch is looked for.
    pub(super) fn next_batch(&mut self) -> bool {
        self.batches = self.batches.wrapping_add(1);
        self.vain < VAIN_MAX || self.batches.is_multiple_of(LOOK_EVERY)
    }

    pub(super) fn looked(&mut self, found: bool) {
        self.vain = if found { 0 } else { self.vain.saturating_add(1) };
    }
}

impl Shared {
    /// Returns when the batch has ended. Any number of threads look; one of those that sleep sleeps for all.
    pub(super) fn wait<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        batch: u64,
    ) -> Result<MutexGuard<'a, Inner>, NvmeError> {
        let shape = inner.batch(batch).map(|batch| (batch.single, batch.looks));
        let Some((single, mut looks)) = shape else { return Ok(inner) };
        // A single command was submitted just now and is not there yet; bulk may have been under way for long.
        if !single {
            self.look_at_clock(&mut inner);
            self.reap(&mut inner)?;
        }
        let mut since = inner.now;
        while inner.has_open(batch) {
            if looks {
                let found;
                (inner, found) = self.look(inner, batch)?;
                looks = found || inner.now.saturating_sub(since) < LOOK_FOR[usize::from(single)];
                if found && inner.has_open(batch) {
                    self.look_at_clock(&mut inner);
                    since = inner.now;
                }
                if found || !looks {
                    inner.patience(single).looked(found);
                }
            } else if inner.watched {
                inner.waiters += 1;
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                inner.waiters -= 1;
            } else {
                inner = self.rest_for_all(inner)?;
            }
        }
        Ok(inner)
    }

    fn rest_for_all<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> Result<MutexGuard<'a, Inner>, NvmeError> {
        inner.watched = true;
        let (mut inner, rested) = match self.rest(inner) {
            Ok(inner) => (inner, Ok(())),
            Err(error) => (self.lock(), Err(error)),
        };
        inner.watched = false;
        self.wake(&inner);
        rested.map(|()| inner)
    }

    /// Whoever waits without looking looks whether its batch has ended.
    pub(super) fn wake(&self, inner: &Inner) {
        if inner.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Looks for completions for a while. True: there were some, or somebody else has found those of the batch.
    fn look<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        batch: u64,
    ) -> Result<(MutexGuard<'a, Inner>, bool), NvmeError> {
        for _ in 0..LOOKS {
            drop(inner);
            std::hint::spin_loop();
            inner = self.lock();
            if self.reap(&mut inner)? || !inner.has_open(batch) {
                return Ok((inner, true));
            }
        }
        self.look_at_clock(&mut inner);
        Ok((inner, false))
    }

    /// Sleeps until an interrupt, a deadline, or for a while; then looks at the time and, if nothing happened, at CSTS.
    pub(super) fn rest<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> Result<MutexGuard<'a, Inner>, NvmeError> {
        self.look_at_clock(&mut inner);
        let now = inner.now;
        let changing = matches!(inner.machine.phase(), Phase::Disabling(_) | Phase::Enabling);
        let longest = if changing { STATUS_PAUSE } else { SLEEP_MAX };
        let until = inner.machine.next_deadline().map_or(longest, |until| until.saturating_sub(now));
        let sleep = if inner.machine.needs_looking() { NAP } else { until.clamp(STATUS_PAUSE, longest) };
        inner.counters.sleeps += 1;
        drop(inner);
        let woken = self.sleep(sleep)?;
        let mut inner = self.lock();
        self.look_at_clock(&mut inner);
        let any = self.reap(&mut inner)?;
        if any {
            inner.status_at = inner.now;
        } else if changing || (!woken && inner.now.saturating_sub(inner.status_at) >= SLEEP_MAX / 2) {
            inner.status_at = inner.now;
            let status = ControllerStatus(self.read_status()?);
            self.step(&mut inner, Event::Status(status))?;
        }
        self.step(&mut inner, Event::Tick)?;
        self.ring(&mut inner)?;
        Ok(inner)
    }

    /// A device that is unplugged may answer with an error instead of ones.
    fn read_status(&self) -> Result<u32, NvmeError> {
        match self.bar.load_u32(CSTS) {
            Err(PciError::Gone { .. }) => Ok(GONE),
            other => Ok(other?),
        }
    }

    /// True: an interrupt came.
    fn sleep(&self, longest: Duration) -> Result<bool, NvmeError> {
        let mut fds: Vec<PollFd<'_>> = self.events.iter().map(|event| PollFd::new(event, PollFlags::IN)).collect();
        let limit =
            rustix::event::Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: i64::from(longest.subsec_nanos()) };
        let woken = match poll(&mut fds, Some(&limit)) {
            Ok(count) => count > 0,
            Err(rustix::io::Errno::INTR) => true,
            Err(error) => return Err(error.into()),
        };
        for event in &self.events {
            event.drain()?;
        }
        Ok(woken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hiccup_is_forgiven_a_slow_device_is_slept_for_and_a_fast_one_is_noticed() {
        let mut patience = Patience::default();
        patience.looked(false);
        patience.looked(false);
        assert!(patience.next_batch(), "two hiccups");
        patience.looked(true);
        for _ in 0..VAIN_MAX {
            patience.looked(false);
        }
        let looked = (0..3 * LOOK_EVERY).filter(|_| patience.next_batch()).count();
        assert_eq!(looked, 3, "once in a while");
        patience.looked(true);
        assert!((0..LOOK_EVERY).all(|_| patience.next_batch()));
    }
}
