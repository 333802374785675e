//! Who may act on an address space now: its agent, which fills pages of it, or the pager, which reads what the program did to it.
//!
//! The kernel lets `madvise(MADV_DONTNEED)` go on as soon as its event is read, and drops the pages then. What the pager fills itself
//! comes before the reading or knows of it. An agent has its order since some time, and a page that it fills after the drop would
//! show the program bytes that it gave up. So one of the two acts at a time, and an order that a change has overtaken is refused:
//!
//! ```text
//!   agent:  nobody reads? -> FILLING -> order refused? -> no: fill -> not FILLING
//!   pager:  READING -> somebody fills? -> no: read the events, decide -> refuse orders up to now -> not READING
//!                                    `-> yes: later; READING stays, so that no other fill begins
//! ```
//!
//! Two words in the agent's staging memory, behind its diary: the state, and the last order that is refused (ids grow, also from one
//! pager to the next). A pager that dies while it reads leaves READING: fills wait for the next one, which refuses every order of
//! its predecessor. A program that writes nonsense here harms nobody but itself.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use uhmm_kernel_hook::HookError;

use super::words::{SharedWords, Words, WordsError};
use crate::message::pager::{DIARY_BYTES, DIARY_ENTRIES};

const STATE: usize = 0;
const REFUSED: usize = 1;
const FILLING: u64 = 1;
const READING: u64 = 2;

/// What became of a fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill<T> {
    /// It was done, with this result.
    Done(T),
    /// Not now: the pager is reading. Nothing was done.
    Reading,
    /// Never: the program has changed the place since the order was given. Nothing was done.
    Refused,
}

/// See the module head.
pub struct FillGate<W: Words = SharedWords> {
    words: W,
    /// Index of the first of the two words.
    first: usize,
}

impl FillGate {
    /// The gate in an agent's staging memory. Both sides call it.
    ///
    /// # Errors
    /// Memory that is not sealed or too short for a diary.
    pub fn open(staging: impl AsFd) -> Result<Self, HookError> {
        let words = SharedWords::open(staging, DIARY_BYTES / 8).map_err(|error| match error {
            WordsError::Hook(error) => error,
            other => HookError::Strange { call: "staging memory", detail: other.to_string() },
        })?;
        let first = words.word_count() - (DIARY_BYTES / 8) as usize + 2 * DIARY_ENTRIES as usize;
        Ok(Self { words, first })
    }
}

impl<W: Words> FillGate<W> {
    /// The agent's side: does `fill` for an order unless it is refused.
    pub fn fill<T>(&self, order: u64, fill: impl FnOnce() -> T) -> Fill<T> {
        let state = self.first + STATE;
        if self.words.compare_exchange(state, 0, FILLING, AcqRel, Relaxed).is_err() {
            return Fill::Reading;
        }
        let _filling = Filling(self);
        if order <= self.words.load(self.first + REFUSED, Acquire) {
            return Fill::Refused;
        }
        Fill::Done(fill())
    }

    /// The pager's side: `true` when it may read events now. Otherwise an agent fills, no other fill begins, and the pager asks again.
    pub fn begin_reading(&self) -> bool {
        self.change(|state| state | READING) & FILLING == 0
    }

    /// All that was read is decided; the agent's orders up to `refused` are refused for good. Also what a new pager begins with, for
    /// the orders of the dead one.
    pub fn end_reading(&self, refused: u64) {
        let refused = refused.max(self.words.load(self.first + REFUSED, Relaxed));
        self.words.store(self.first + REFUSED, refused, Release);
        self.change(|state| state & !READING);
    }

    /// Returns the state before.
    fn change(&self, to: impl Fn(u64) -> u64) -> u64 {
        let index = self.first + STATE;
        let mut state = self.words.load(index, Relaxed);
        loop {
            match self.words.compare_exchange(index, state, to(state), AcqRel, Relaxed) {
                Ok(before) => return before,
                Err(now) => state = now,
            }
        }
    }
}

impl<W: Words> std::fmt::Debug for FillGate<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = |word: usize| self.words.load(self.first + word, Relaxed);
        f.debug_struct("FillGate").field("state", &word(STATE)).field("refused", &word(REFUSED)).finish_non_exhaustive()
    }
}

/// Ends the fill also when it panics.
struct Filling<'a, W: Words>(&'a FillGate<W>);

impl<W: Words> Drop for Filling<'_, W> {
    fn drop(&mut self) {
        self.0.change(|state| state & !FILLING);
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::Arc as LoomArc;
    use loom::sync::atomic::AtomicBool;
    use uhmm_kernel_hook::memfd;

    use super::*;
    use crate::shared::model::ModelWords;

    #[test]
    fn model_nothing_is_filled_after_a_change_was_read() {
        loom::model(|| {
            let gate = LoomArc::new(FillGate { words: ModelWords::new(2), first: 0 });
            let dropped = LoomArc::new(AtomicBool::new(false));
            let agent = {
                let (gate, dropped) = (gate.clone(), dropped.clone());
                loom::thread::spawn(move || {
                    gate.fill(1, || assert!(!dropped.load(Acquire), "filled after the program had dropped the page"))
                })
            };
            let may_read = gate.begin_reading();
            if may_read {
                // From here on the program goes on.
                dropped.store(true, Release);
                gate.end_reading(1);
            }
            let filled = agent.join().expect("the agent");
            assert!(may_read || filled == Fill::Done(()), "nobody got anywhere");
            if !may_read {
                assert_eq!(gate.fill(1, || ()), Fill::Reading, "READING stays, so that the pager's turn comes");
                assert!(gate.begin_reading());
                gate.end_reading(1);
            }
            assert_eq!(gate.fill(1, || ()), Fill::Refused);
            assert_eq!(gate.fill(2, || ()), Fill::Done(()));
        });
    }

    #[test]
    fn fills_wait_for_the_next_pager_when_one_dies_while_it_reads_and_its_orders_are_refused() {
        let staging = memfd::create_sealed("uhmm-test-staging", DIARY_BYTES).expect("memory");
        let agent = FillGate::open(&staging).expect("the agent's gate");
        assert!(FillGate::open(&staging).expect("the dead pager's gate").begin_reading());
        assert_eq!(agent.fill(7, || ()), Fill::Reading);
        FillGate::open(&staging).expect("the next pager's gate").end_reading(8);
        assert_eq!(agent.fill(7, || ()), Fill::Refused);
        assert_eq!(agent.fill(9, || ()), Fill::Done(()));
        FillGate::open(&staging).expect("a later pager's gate").end_reading(3);
        assert_eq!(agent.fill(8, || ()), Fill::Refused, "what is refused stays refused");
    }

    #[test]
    fn a_fill_that_panics_does_not_keep_the_pager_from_reading() {
        let staging = memfd::create_sealed("uhmm-test-staging", DIARY_BYTES).expect("memory");
        let gate = FillGate::open(&staging).expect("a gate");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gate.fill(1, || panic!("as asked"))));
        assert!(panicked.is_err() && gate.begin_reading());
    }
}
