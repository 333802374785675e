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
//! The same goes for what takes pages out: munmap returns when its event is read, and the program may map other memory there at once. What an
//! agent takes then is none of the old pages. Which orders that concerns their senders tell one by one, before they end reading
//! ([`crate::agent::CHANGED`]): dropped content may be taken out, it is dropped where it arrives.
//!
//! Two words in the memory of the orders: the state, and the last order that is refused (ids grow, also from one pager to the next).
//! A pager that dies while it reads leaves READING: fills wait for the next one, which refuses every order of its predecessor. An
//! agent that is killed while it fills leaves its number, which is taken away by whoever knows of the death. A program that writes
//! nonsense here harms nobody but itself.

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::words::Words;

const STATE: usize = 0;
const REFUSED: usize = 1;
const READING: u64 = 1;
/// Above it: the number of the agent that fills, 0 for none.
const FILLER_SHIFT: u32 = 1;

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
pub struct FillGate<W: Words> {
    words: W,
    /// Index of the first of the two words.
    first: usize,
}

impl<W: Words> FillGate<W> {
    /// The gate whose two words begin at `first`. Both sides call it.
    pub fn at(words: W, first: usize) -> Self {
        Self { words, first }
    }

    /// The last order that is refused.
    pub fn refused(&self) -> u64 {
        self.words.load(self.first + REFUSED, Acquire)
    }

    /// The process of the agent of this number has ended: it fills nothing.
    pub fn agent_is_gone(&self, agent: u32) {
        self.change(|state| if state >> FILLER_SHIFT == u64::from(agent) { state & READING } else { state });
    }

    /// No agent is left, whatever its number was.
    pub fn nobody_fills(&self) {
        self.change(|state| state & READING);
    }

    /// The agent's side: does `fill` for an order unless it is refused. `agent`: this agent's number, not 0; no two of an address
    /// space have the same one.
    pub fn fill<T>(&self, agent: u32, order: u64, fill: impl FnOnce() -> T) -> Fill<T> {
        let unless_refused = || match order <= self.refused() {
            true => Fill::Refused,
            false => Fill::Done(fill()),
        };
        self.act(agent, unless_refused).unwrap_or(Fill::Reading)
    }

    /// The same for what is refused by other means. `None`: not now, the pager is reading; nothing was done.
    pub fn act<T>(&self, agent: u32, act: impl FnOnce() -> T) -> Option<T> {
        let state = self.first + STATE;
        self.words.compare_exchange(state, 0, u64::from(agent) << FILLER_SHIFT, AcqRel, Relaxed).ok()?;
        let _filling = Filling(self, agent);
        Some(act())
    }

    /// The pager's side: `true` when it may read events now. Otherwise an agent fills, no other fill begins, and the pager asks again.
    pub fn begin_reading(&self) -> bool {
        self.change(|state| state | READING) >> FILLER_SHIFT == 0
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

impl<W: Words> core::fmt::Debug for FillGate<W> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let word = |word: usize| self.words.load(self.first + word, Relaxed);
        f.debug_struct("FillGate").field("state", &word(STATE)).field("refused", &word(REFUSED)).finish_non_exhaustive()
    }
}

/// Ends the fill also when it panics.
struct Filling<'a, W: Words>(&'a FillGate<W>, u32);

impl<W: Words> Drop for Filling<'_, W> {
    fn drop(&mut self) {
        self.0.agent_is_gone(self.1);
    }
}
