//! Where the threads of a device say that they are using device mappings.
//!
//! One 64-byte slot a thread in a memfd, its first word a counter: odd inside, even outside.
//!
//! ```text
//!   thread: enter (even -> odd) -> load entry -> touch -> access the page -> leave (odd -> even)
//!   revoker: revoke entries -> fence -> for every odd slot: wait until the counter changes
//! ```
//! A thread that entered again has a larger counter and entered after the revocation: it is not waited for. A thread never
//! blocks inside, so waiting is short: spin, then yield, then short naps. A thread that stays inside past the deadline belongs
//! to a broken (or killed) driver; the revoker names the slot and has the driver fenced.

use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

use super::words::{SharedWords, Words, WordsError};

/// Words between two slots: one cache line, so that threads do not slow each other down.
const SLOT_WORDS: usize = 8;
const SPINS: u32 = 200;
const YIELDS: u32 = 200;
const NAP: Duration = Duration::from_micros(50);

/// A wait that did not end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// A thread did not leave in time.
    #[error("The device thread of slot {slot} did not leave the gate in time: its driver must be fenced")]
    StillInside {
        /// Its slot.
        slot: usize,
    },
}

/// The gate of one device. Clones see the same memory.
pub struct Gate<W: Words = SharedWords> {
    words: Arc<W>,
    slot_count: usize,
}

impl<W: Words> Clone for Gate<W> {
    fn clone(&self) -> Self {
        Self { words: self.words.clone(), slot_count: self.slot_count }
    }
}

impl Gate {
    /// A new gate with everybody outside. Called by the driver, which passes [`fd`](Self::fd) to the pager (`DriverLogin`).
    pub fn create(slot_count: u32) -> Result<Self, WordsError> {
        let slot_count = slot_count as usize;
        let words = SharedWords::create("uhmm-gate", (slot_count * SLOT_WORDS) as u64)?;
        Ok(Self { words: Arc::new(words), slot_count })
    }

    /// Somebody else's gate, with as many slots as its size says; refused unless it is sealed against resizing.
    pub fn open(fd: impl AsFd) -> Result<Self, WordsError> {
        let words = SharedWords::open_whole(fd)?;
        let slot_count = words.word_count() / SLOT_WORDS;
        Ok(Self { words: Arc::new(words), slot_count })
    }

    /// The memfd.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        self.words.fd()
    }
}

impl<W: Words> Gate<W> {
    /// A gate over any words (for models and tests).
    pub fn over(words: W) -> Self {
        let slot_count = words.word_count() / SLOT_WORDS;
        Self { words: Arc::new(words), slot_count }
    }

    /// Slots, at least as many as were asked for at creation.
    pub fn slot_count(&self) -> usize {
        self.slot_count
    }

    /// The slot for one device thread; `None` outside the gate. The caller gives each slot to one thread only.
    pub fn slot(&self, index: usize) -> Option<Slot<W>> {
        (index < self.slot_count).then(|| {
            // A former owner that died inside left an odd counter: go on behind it, outside.
            let counter = self.words.load(index * SLOT_WORDS, Relaxed);
            let counter = counter.wrapping_add(counter & 1);
            self.words.store(index * SLOT_WORDS, counter, Release);
            Slot { gate: self.clone(), index, counter }
        })
    }

    /// Waits until every thread that was inside when this was called has left. Call it after `Table::revoke`; then nobody uses
    /// the revoked mappings. Never waits longer than `limit` in all.
    pub fn wait(&self, limit: Duration) -> Result<(), GateError> {
        self.words.fence(SeqCst);
        let mut deadline = None;
        for slot in 0..self.slot_count {
            let seen = self.words.load(slot * SLOT_WORDS, SeqCst);
            if seen & 1 == 1 {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + limit);
                self.wait_slot(slot, seen, deadline)?;
            }
        }
        Ok(())
    }

    /// One look, without waiting: the slots whose threads are inside now.
    pub fn inside(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.fence(SeqCst);
        (0..self.slot_count).filter(|slot| self.words.load(slot * SLOT_WORDS, SeqCst) & 1 == 1)
    }

    fn wait_slot(&self, slot: usize, seen: u64, deadline: Instant) -> Result<(), GateError> {
        let mut tries: u32 = 0;
        while self.words.load(slot * SLOT_WORDS, Acquire) == seen {
            tries = tries.saturating_add(1);
            if tries <= SPINS {
                std::hint::spin_loop();
                continue;
            }
            if Instant::now() >= deadline {
                return Err(GateError::StillInside { slot });
            }
            if tries <= SPINS + YIELDS {
                std::thread::yield_now();
            } else {
                // No event exists: a futex here would cost every device thread a system call on leaving.
                std::thread::sleep(NAP);
            }
        }
        Ok(())
    }
}

/// One device thread's slot.
pub struct Slot<W: Words = SharedWords> {
    gate: Gate<W>,
    index: usize,
    counter: u64,
}

impl<W: Words> Slot<W> {
    /// Goes inside. Entries loaded while the guard lives stay usable until it is dropped, provided that they were VALID when
    /// loaded. Never block while holding it.
    pub fn enter(&mut self) -> Inside<'_, W> {
        self.counter = self.counter.wrapping_add(1);
        self.gate.words.store(self.index * SLOT_WORDS, self.counter, SeqCst);
        self.gate.words.fence(SeqCst);
        Inside { slot: self, not_send: PhantomData }
    }
}

/// A device thread is inside; leaves when dropped.
pub struct Inside<'a, W: Words = SharedWords> {
    slot: &'a mut Slot<W>,
    /// The thread that entered must leave.
    not_send: PhantomData<*const ()>,
}

impl<W: Words> Drop for Inside<'_, W> {
    fn drop(&mut self) {
        self.slot.counter = self.slot.counter.wrapping_add(1);
        self.slot.gate.words.store(self.slot.index * SLOT_WORDS, self.slot.counter, Release);
    }
}

#[cfg(test)]
mod tests {
    use loom::sync::Arc as LoomArc;
    use loom::sync::atomic::AtomicBool;

    use super::*;
    use crate::shared::model::ModelWords;
    use crate::shared::table::{Begin, Pte, Table};

    /// Every interleaving of one device access with one revocation: a revoker that finds nobody inside may give the frame away.
    #[test]
    fn a_frame_is_never_given_away_while_a_thread_uses_it() {
        loom::model(|| {
            let table = LoomArc::new(Table::over(ModelWords::new(1), 1));
            assert_eq!(table.begin(0, 1), Begin::Started);
            assert!(table.install(0, 1, Pte::frame(5, true)));
            // Marked already, so that the access is by load alone: no exchange of the entry orders the two threads.
            assert!(table.touch(0, Pte::frame(5, true), true).is_some());
            let gate = Gate::over(ModelWords::new(SLOT_WORDS as u64));
            let mut slot = gate.slot(0).expect("a slot");
            let given_away = LoomArc::new(AtomicBool::new(false));
            let device = {
                let (table, given_away) = (table.clone(), given_away.clone());
                loom::thread::spawn(move || {
                    let _inside = slot.enter();
                    let entry = table.load(0);
                    if table.touch(0, entry, true).is_some() {
                        assert!(!given_away.load(Acquire), "the device used a frame that was given away");
                    }
                })
            };
            table.revoke(0, 1);
            if gate.inside().next().is_none() {
                given_away.store(true, Release);
            }
            device.join().expect("the device thread");
        });
    }

    #[test]
    fn a_slot_whose_owner_died_inside_begins_outside_with_a_larger_counter() {
        let gate = Gate::create(1).expect("a gate");
        let mut slot = gate.slot(0).expect("a slot");
        std::mem::forget(slot.enter());
        let seen = gate.words.load(0, SeqCst);
        assert_eq!(seen & 1, 1);
        let mut again = gate.slot(0).expect("the slot again");
        assert_eq!(gate.inside().count(), 0);
        let inside = again.enter();
        assert!(gate.words.load(0, SeqCst) > seen);
        drop(inside);
        assert!(gate.slot(gate.slot_count()).is_none());
    }
}
