//! A thread that faults again and again wakes the pager each time, and the scheduler wakes it on an idle core: five times what the same wake
//! costs on the core of the faulting thread, which waits anyway. So the pager goes there:
//!
//! ```text
//!            16 faults in a row of one thread, each answered soon: where does it run?
//!   Apart ------------------------------------------------------------------------> Beside it, on its CPU alone
//!     ^                                                                                | asks again after 1, 2, 4 .. 64 faults,
//!     |                                                                                | and after 1 when the thread has moved
//!     +------- others fault, long work, bulk work: no credit left | 20 ms of quiet ----+
//! ```
//! Threads on several CPUs are answered best by a pager that is on neither's way (and looks again, `hot.rs`), long answers (a window of
//! neighbours) run beside the program, and so does everything that is no fault. It never leaves the CPUs that it was allowed, and a mask
//! that somebody else gives it meanwhile stands: it is read before each move, and followed from then on.

use std::time::{Duration, Instant};

use uhmm_kernel_hook::cpus::{Cpus, ThreadCpu};
use uhmm_kernel_hook::uffd::UffdEvent;

use crate::service::Pager;
use crate::space::PID_UNSEEN;

/// Faults in a row of one thread, before it is followed.
const STREAK: u32 = 16;
/// A fault of the thread gives one, anything else takes some.
const CREDIT_MAX: u32 = 32;
const OTHER_COSTS: u32 = 4;
/// An answer that takes longer fills more than a page or two: the program had better run meanwhile.
const SOON: Duration = Duration::from_micros(30);
/// Faults between two questions, at most.
const ASK_EVERY_MAX: u32 = 64;
/// Without a fault for so long it is where the scheduler likes.
const QUIET: Duration = Duration::from_millis(20);
/// Faults until the next try, after one that failed or did not last.
const REST: std::ops::RangeInclusive<u32> = 64..=16_384;

/// Process and thread, in `/proc`'s numbers.
type ThreadName = (u32, u32);

/// What the pager shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Find out where this thread runs, and say so with `runs_on` or `cannot`.
    Ask(ThreadName),
    /// Go to this CPU.
    Move(u32),
    /// Back to all CPUs.
    Leave,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Apart { streak: u32, last: Instant },
    Beside { cpu: u32, credit: u32, faults: u32, ask_every: u32, unasked: u32, until: Instant },
}

/// Where to be: the decisions. See the module head.
#[derive(Debug)]
struct Follow {
    place: Place,
    thread: ThreadName,
    /// Faults that are not looked at.
    resting: u32,
    rest: u32,
}

impl Follow {
    fn new(now: Instant) -> Self {
        Self { place: Place::Apart { streak: 0, last: now }, thread: (0, 0), resting: 0, rest: *REST.start() }
    }

    /// Faults were answered: by whom, if it was one; and how long that took.
    fn answered(&mut self, now: Instant, thread: Option<ThreadName>, took: Duration) -> Step {
        if self.resting > 0 {
            self.resting -= 1;
            return Step::Nothing;
        }
        let its = thread == Some(self.thread) && took <= SOON;
        match &mut self.place {
            Place::Apart { streak, last } => {
                let goes_on = its && now.saturating_duration_since(*last) < QUIET;
                *streak = if goes_on { *streak + 1 } else { 0 };
                *last = now;
                self.thread = thread.unwrap_or_default();
                if *streak < STREAK { Step::Nothing } else { Step::Ask(self.thread) }
            }
            Place::Beside { credit, faults, ask_every, unasked, until, .. } if its => {
                *credit = (*credit + 1).min(CREDIT_MAX);
                (*faults, *unasked, *until) = (faults.saturating_add(1), *unasked + 1, now + QUIET);
                if *unasked < *ask_every { Step::Nothing } else { Step::Ask(self.thread) }
            }
            Place::Beside { .. } => self.other_work(now),
        }
    }

    /// Something else than a fault of this thread is to be done.
    fn other_work(&mut self, now: Instant) -> Step {
        let Place::Beside { credit, faults, .. } = &mut self.place else { return Step::Nothing };
        *credit = credit.saturating_sub(OTHER_COSTS);
        if *credit > 0 {
            return Step::Nothing;
        }
        let lasted = *faults > 4 * CREDIT_MAX;
        self.leave(now, lasted)
    }

    /// The answer to `Ask`.
    fn runs_on(&mut self, now: Instant, its_cpu: u32) -> Step {
        match &mut self.place {
            Place::Beside { cpu, ask_every, unasked, .. } if *cpu == its_cpu => {
                (*unasked, *ask_every) = (0, (*ask_every * 2).min(ASK_EVERY_MAX));
                Step::Nothing
            }
            Place::Beside { cpu, ask_every, unasked, .. } => {
                (*cpu, *unasked, *ask_every) = (its_cpu, 0, 1);
                Step::Move(its_cpu)
            }
            Place::Apart { .. } => {
                let until = now + QUIET;
                self.place = Place::Beside { cpu: its_cpu, credit: STREAK, faults: 0, ask_every: 1, unasked: 0, until };
                Step::Move(its_cpu)
            }
        }
    }

    /// The thread is not found, or runs where the pager may not.
    fn cannot(&mut self, now: Instant) -> Step {
        match self.place {
            Place::Apart { .. } => {
                self.rest_longer();
                self.place = Place::Apart { streak: 0, last: now };
                Step::Nothing
            }
            Place::Beside { .. } => self.leave(now, false),
        }
    }

    /// When it leaves if nothing happens.
    fn leaves_at(&self) -> Option<Instant> {
        match self.place {
            Place::Apart { .. } => None,
            Place::Beside { until, .. } => Some(until),
        }
    }

    fn is_beside(&self) -> bool {
        matches!(self.place, Place::Beside { .. })
    }

    fn is_due(&mut self, now: Instant) -> Step {
        if self.leaves_at().is_some_and(|until| until <= now) { self.leave(now, true) } else { Step::Nothing }
    }

    fn leave(&mut self, now: Instant, lasted: bool) -> Step {
        self.place = Place::Apart { streak: 0, last: now };
        if lasted {
            self.rest = *REST.start();
        } else {
            self.rest_longer();
        }
        Step::Leave
    }

    fn rest_longer(&mut self) {
        self.resting = self.rest;
        self.rest = (self.rest * 2).min(*REST.end());
    }
}

/// The decisions, and what they are about.
#[derive(Debug)]
pub(crate) struct Follower {
    follow: Follow,
    /// Of the thread that is followed or was last.
    source: Option<(ThreadName, ThreadCpu)>,
    /// What the pager may use when it is not beside anybody.
    all: Option<Cpus>,
    /// The CPU that it has put itself on.
    on: Option<Cpus>,
    /// Moves to another CPU, for the record.
    pub moves: u64,
}

impl Follower {
    pub(crate) fn new() -> Self {
        Self { follow: Follow::new(Instant::now()), source: None, all: None, on: None, moves: 0 }
    }

    /// It is on the CPU of a program: looking again for faults would stand in its way.
    pub(crate) fn is_beside(&self) -> bool {
        self.follow.is_beside()
    }

    /// No later than this it wants a turn.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        self.follow.leaves_at().map(|until| until.saturating_duration_since(now))
    }

    fn act(&mut self, now: Instant, step: Step) {
        let next = match step {
            Step::Nothing => return,
            Step::Ask(thread) => match self.cpu_of(thread) {
                Some(cpu) => self.follow.runs_on(now, cpu),
                None => self.follow.cannot(now),
            },
            Step::Move(cpu) => match self.go_to(cpu) {
                Some(()) => return,
                None => {
                    self.source = None;
                    self.follow.cannot(now)
                }
            },
            Step::Leave => {
                // Its process may end meanwhile: no descriptor outlives that.
                self.source = None;
                return self.go_back();
            }
        };
        self.act(now, next);
    }

    fn cpu_of(&mut self, thread: ThreadName) -> Option<u32> {
        if self.source.as_ref().is_none_or(|(name, _)| *name != thread) {
            self.source = Some((thread, ThreadCpu::of(thread.0, thread.1).ok()?));
        }
        let now = self.source.as_ref().and_then(|(_, cpu)| cpu.now().ok());
        if now.is_none() {
            self.source = None;
        }
        now
    }

    /// Somebody else may have set the mask since: then that is all there is.
    fn go_to(&mut self, cpu: u32) -> Option<()> {
        let own = Cpus::own().ok()?;
        if self.on.is_none_or(|on| on != own) {
            (self.all, self.on) = (Some(own), None);
        }
        let all = self.all.filter(|all| all.count() > 1 && all.contains(cpu))?;
        let to = Cpus::only(cpu)?;
        if let Err(error) = to.stay() {
            tracing::debug!(%error, cpu, ?all, "Not beside the program");
            return None;
        }
        self.on = Some(to);
        self.moves += 1;
        Some(())
    }

    fn go_back(&mut self) {
        let Some(on) = self.on.take() else { return };
        let is_ours = Cpus::own().is_ok_and(|own| own == on);
        if let Some(all) = self.all.filter(|_| is_ours)
            && let Err(error) = all.stay()
        {
            tracing::warn!(%error, ?all, "The pager stays on one CPU");
        }
    }
}

impl Pager {
    /// Faults of a space were answered: how to wait for the next ones.
    pub(crate) fn after_faults(&mut self, space_id: u64, events: &[UffdEvent], begun: Instant) {
        let now = Instant::now();
        let thread = match events {
            [UffdEvent::Fault { thread_id, .. }] if *thread_id != 0 => self.process_of(space_id).zip(Some(*thread_id)),
            _ => None,
        };
        let step = self.follower.follow.answered(now, thread, now - begun);
        self.follower.act(now, step);
        if !self.follower.is_beside() {
            self.hot.fault(now);
        }
    }

    /// Bulk work begins or goes on.
    pub(crate) fn works_apart(&mut self) {
        if self.follower.is_beside() {
            let now = Instant::now();
            let step = self.follower.follow.other_work(now);
            self.follower.act(now, step);
        }
    }

    /// Nobody has faulted for a while.
    pub(crate) fn leave_if_quiet(&mut self) {
        if self.follower.is_beside() {
            let now = Instant::now();
            let step = self.follower.follow.is_due(now);
            self.follower.act(now, step);
        }
    }

    fn process_of(&self, space_id: u64) -> Option<u32> {
        let pid = self.spaces.get(&space_id)?.state.pid;
        (pid != 0 && pid != PID_UNSEEN).then_some(pid)
    }
}

#[cfg(test)]
mod tests;
