//! Sleeping, and knowing when the program has ended.
//!
//! The SDK's thread holds a robust mutex for its whole life. When it ends, by exit, exec, a signal or alone, the kernel marks the mutex
//! and wakes whoever waits for it: us. Then the kernel is asked whether anybody else uses this address space (`sys::is_shared`); that
//! may take an instant, and for a process that the program has made with CLONE_VM it takes as long as that lives.
//!
//! ```text
//!   Living --mutex marked--> Doubting --shared--> (ask again, ever more slowly, and serve meanwhile)
//!                                   `--not shared--> end
//! ```

use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};

use uhmm_shared::agent::{BELL, PAUSE_UNTIL_NS, STOP};
use uhmm_shared::words::Words;

use crate::memory::Orders;
use crate::{Config, End, sys};

/// The kernel wakes who waits for the mutex only with this bit.
const FUTEX_WAITERS: u32 = 1 << 31;
/// The kernel's mark: whoever held it has died.
const FUTEX_OWNER_DIED: u32 = 1 << 30;
const DOUBT_FIRST_NS: u64 = 200_000;
const DOUBT_LAST_NS: u64 = 1_000_000_000;

pub(crate) struct Life {
    bell: u64,
    life: u64,
    only_one: bool,
    /// Pause before the next question; 0 while nothing is doubted.
    doubt_ns: u64,
}

impl Life {
    pub(crate) fn new(config: &Config, words: Orders) -> Self {
        let Config { life, only_one, .. } = *config;
        Self { bell: words.addr_of(BELL), life, only_one, doubt_ns: 0 }
    }

    /// The value of the mutex to wait on; `None` when its holder is dead.
    fn held(&self) -> Option<u32> {
        if self.life == 0 {
            return Some(0);
        }
        // SAFETY: the SDK's word, see `Config`.
        let word = unsafe { &*(self.life as *const AtomicU32) };
        let value = word.load(Acquire);
        if value & FUTEX_OWNER_DIED != 0 {
            return None;
        }
        // An unlocked one belongs to a thread that is about to end the session or has not begun: the bell will tell.
        let waited = if value == 0 { 0 } else { value | FUTEX_WAITERS };
        if waited != value && word.compare_exchange(value, waited, AcqRel, Relaxed).is_err() {
            return self.held();
        }
        Some(waited)
    }

    /// Sleeps until the bell is rung (its value is not `bell` any more), something happens to the program, or `until_ns`. `Some`: the end.
    pub(crate) fn sleep(&mut self, words: &Orders, bell: u32, until_ns: Option<u64>) -> Option<End> {
        let until = |ns: u64| Some(until_ns.map_or(ns, |until| until.min(ns)));
        match self.held() {
            Some(value) => {
                let life = (if value == 0 { 0 } else { self.life }, value);
                let _ = sys::wait([(self.bell, bell), life], until_ns);
            }
            None if self.is_alone() => return Some(End::Alone),
            None => {
                self.doubt_ns = self.doubt_ns.saturating_mul(2).clamp(DOUBT_FIRST_NS, DOUBT_LAST_NS);
                let next = sys::now_ns().saturating_add(self.doubt_ns);
                let _ = sys::wait([(self.bell, bell), (0, 0)], until(next));
            }
        }
        self.is_told(words)
    }

    pub(crate) fn is_told(&self, words: &Orders) -> Option<End> {
        (words.load(STOP, Acquire) != 0).then_some(End::Told)
    }

    /// Nobody needs what the agent is waiting for.
    pub(crate) fn is_over(&self, words: &Orders) -> bool {
        self.is_told(words).is_some() || self.held().is_none() && self.is_alone()
    }

    fn is_alone(&self) -> bool {
        match sys::is_shared().filter(|_| self.only_one) {
            Some(shared) => !shared,
            // Others like us keep the memory too, or the question is forbidden. A thread that was killed alone looks like this as well:
            // there is nobody then who would start another agent, and what is out comes home without one.
            None => true,
        }
    }

    /// Test hook: stands still as long as it was told to, but not beyond the program's end.
    pub(crate) fn pause(&mut self, words: &Orders) -> Option<End> {
        loop {
            let until_ns = words.load(PAUSE_UNTIL_NS, Acquire);
            if until_ns <= sys::now_ns() {
                return None;
            }
            let bell = words.load(BELL, Acquire) as u32;
            if let Some(end) = self.sleep(words, bell, Some(until_ns)) {
                return Some(end);
            }
        }
    }
}
