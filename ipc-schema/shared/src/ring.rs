//! Rings of 64-byte descriptors in shared memory: one producer, one consumer, in two processes that do not trust each other.
//!
//! Two lanes, one a direction. Lane 0 is filled by the side that made the memory, lane 1 by the other one; a one-way use leaves the
//! other lane alone.
//!
//! ```text
//!   words:  0 magic+version | 1 entries | ...                       (line 0, written once by the creator)
//!           8 head | 16 tail | 24 armed                             (lane 0, a cache line each)
//!          32 head | 40 tail | 48 armed                             (lane 1)
//!          56 ...  entries * 8 words of lane 0, then of lane 1
//!
//!   producer: slot <- descriptor; head <- head + 1; FENCE; armed? clear it and signal
//!   consumer: take all there is; armed <- 1; FENCE; head moved meanwhile? then disarm and go on, else sleep
//! ```
//! Without the consumer's re-check behind its fence the wake-up between "nothing there" and "armed" is lost; the loom test
//! `a_wake_up_is_never_lost` explores every interleaving of this very code.
//!
//! Head and tail only ever increase (they wrap at 2^64, so never); the slot is the index modulo the entry count. Each end keeps
//! its own index privately and merely publishes it; the peer's index is checked every time: it may not go back and may not be
//! more than the ring's size away. A peer that breaks this gets [`RingFault::Corrupt`] and the ring is useless from then on, while
//! nothing was read or written outside it. Descriptors are copied out before anybody looks at them.
//!
//! **After a crash** of an end its successor begins where the published index is: what was pushed and not published is pushed again,
//! what was taken ([`Consumer::advance`]) is not seen again.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use crate::words::Words;

/// Words of a descriptor.
pub const DESCRIPTOR_WORDS: usize = 8;
/// Most entries of a lane.
pub const MAX_ENTRIES: u64 = 1 << 16;
/// "uhmmring" and layout version 1.
pub const MAGIC: u64 = 0x7568_6d6d_7269_0001;
/// Index of the word with the entry count.
pub const ENTRIES: usize = 1;
/// Where the lanes' words begin; [`HEAD`], [`TAIL`] and [`ARMED`] count from there.
pub const LANE: [usize; 2] = [8, 32];
/// Descriptors pushed.
pub const HEAD: usize = 0;
/// Descriptors taken.
pub const TAIL: usize = 8;
/// The consumer sleeps, or is about to.
pub const ARMED: usize = 16;
/// First slot of lane 0.
pub const SLOTS: usize = 56;

/// What a ring cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFault {
    /// No free slot: try again after the consumer has taken something.
    Full,
    /// The peer wrote an impossible index. Both are as read: the peer's and ours.
    Corrupt {
        /// What the peer wrote.
        peer: u64,
        /// Where we are.
        own: u64,
    },
}

/// One slot.
pub type Descriptor = [u64; DESCRIPTOR_WORDS];

/// Whether a ring of so many entries can be.
pub fn is_entry_count(entries: u64) -> bool {
    entries.is_power_of_two() && entries <= MAX_ENTRIES
}

/// Words of a ring.
pub fn word_count(entries: u64) -> u64 {
    SLOTS as u64 + 2 * entries * DESCRIPTOR_WORDS as u64
}

/// Makes an empty ring of zero words.
pub fn format<W: Words>(words: &W, entries: u64) {
    words.store(ENTRIES, entries, Relaxed);
    words.store(0, MAGIC, Release);
}

/// What both ends have in common. `own` is the authority for our index, `peer` the last good value of the other's.
struct End<W: Words> {
    words: W,
    lane: usize,
    slots: usize,
    entries: u64,
    own: u64,
    peer: u64,
}

impl<W: Words> End<W> {
    /// `published`: the word of the lane with this end's index. `entries` was checked.
    fn open(words: W, lane: usize, entries: u64, published: usize) -> Self {
        let base = if lane == 0 { LANE[0] } else { LANE[1] };
        let slots = SLOTS + lane.min(1) * entries as usize * DESCRIPTOR_WORDS;
        let own = words.load(base + published, Acquire);
        Self { words, lane: base, slots, entries, own, peer: own }
    }

    fn slot(&self, index: u64) -> usize {
        self.slots + (index & (self.entries.wrapping_sub(1))) as usize * DESCRIPTOR_WORDS
    }

    fn read(&self, index: u64) -> Descriptor {
        let slot = self.slot(index);
        let mut descriptor = [0; DESCRIPTOR_WORDS];
        for (offset, word) in descriptor.iter_mut().enumerate() {
            *word = self.words.load(slot + offset, Relaxed);
        }
        descriptor
    }
}

/// Pushes descriptors.
pub struct Producer<W: Words> {
    end: End<W>,
}

impl<W: Words> Producer<W> {
    /// The pushing end of a lane. After a crash of the one before, it goes on where that one was.
    pub fn open(words: W, lane: usize, entries: u64) -> Self {
        let mut end = End::open(words, lane, entries, HEAD);
        // As if the ring were full: what the consumer has taken is looked up before anything is pushed over it.
        end.peer = end.own.saturating_sub(entries);
        Self { end }
    }

    /// Index of the next descriptor: how many were ever pushed.
    pub fn index(&self) -> u64 {
        self.end.own
    }

    /// The descriptor that was pushed last, if any was.
    pub fn last(&self) -> Option<Descriptor> {
        (self.end.own > 0).then(|| self.end.read(self.end.own - 1))
    }

    /// The n-th descriptor from the end (1: the last one), as long as its slot was not used again.
    pub fn nth_last(&self, n: u64) -> Option<Descriptor> {
        let index = self.end.own.checked_sub(n)?;
        (n >= 1 && n <= self.end.entries).then(|| self.end.read(index))
    }

    /// How many of those pushed the consumer has not taken, as far as it says.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn unread(&mut self) -> Result<u64, RingFault> {
        let end = &mut self.end;
        let tail = end.words.load(end.lane + TAIL, Acquire);
        // The consumer may have taken at most all that we have pushed, and no more than a ring is unread.
        if tail > end.own || end.own - tail > end.entries {
            return Err(RingFault::Corrupt { peer: tail, own: end.own });
        }
        Ok(end.own - tail)
    }

    /// Appends a descriptor. True: the consumer sleeps or is about to, signal it now (only this call says so).
    ///
    /// # Errors
    /// `Full`, `Corrupt`.
    pub fn push(&mut self, descriptor: &Descriptor) -> Result<bool, RingFault> {
        let end = &mut self.end;
        if end.own.wrapping_sub(end.peer) >= end.entries {
            let tail = end.words.load(end.lane + TAIL, Acquire);
            // The consumer may have taken at most all that we have pushed, and cannot give anything back.
            if tail < end.peer || tail > end.own {
                return Err(RingFault::Corrupt { peer: tail, own: end.own });
            }
            end.peer = tail;
            if end.own - end.peer >= end.entries {
                return Err(RingFault::Full);
            }
        }
        let slot = end.slot(end.own);
        for (offset, word) in descriptor.iter().enumerate() {
            end.words.store(slot + offset, *word, Relaxed);
        }
        end.own += 1;
        end.words.store(end.lane + HEAD, end.own, Release);
        end.words.fence(SeqCst);
        let armed = end.lane + ARMED;
        Ok(end.words.load(armed, Relaxed) != 0 && end.words.swap(armed, 0, Relaxed) != 0)
    }
}

/// Takes descriptors.
pub struct Consumer<W: Words> {
    end: End<W>,
}

impl<W: Words> Consumer<W> {
    /// The taking end of a lane. After a crash of the one before, it goes on where that one was.
    pub fn open(words: W, lane: usize, entries: u64) -> Self {
        Self { end: End::open(words, lane, entries, TAIL) }
    }

    /// Index of the next descriptor: how many were ever taken.
    pub fn index(&self) -> u64 {
        self.end.own
    }

    /// The oldest descriptor, which stays; `None` when there is nothing now.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn peek(&mut self) -> Result<Option<Descriptor>, RingFault> {
        Ok(self.filled()?.then(|| self.end.read(self.end.own)))
    }

    /// Takes what [`peek`](Self::peek) has shown.
    pub fn advance(&mut self) {
        let end = &mut self.end;
        if end.own < end.peer {
            end.own += 1;
            end.words.store(end.lane + TAIL, end.own, Release);
        }
    }

    /// Takes the oldest descriptor, `None` when there is nothing now. Before sleeping call [`arm`](Self::arm).
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn pop(&mut self) -> Result<Option<Descriptor>, RingFault> {
        let found = self.peek()?;
        if found.is_some() {
            self.advance();
        }
        Ok(found)
    }

    /// Asks the producer for a signal with its next push. True: nothing has come meanwhile, sleep. False: do not sleep, `pop`.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        let armed = self.end.lane + ARMED;
        // Exchanges and not stores: they fall into one order with the producer's exchange whatever the memory model makes of
        // two plain stores to one word.
        self.end.words.swap(armed, 1, Relaxed);
        self.end.words.fence(SeqCst);
        if self.filled()? {
            self.end.words.swap(armed, 0, Relaxed);
            return Ok(false);
        }
        Ok(true)
    }

    fn filled(&mut self) -> Result<bool, RingFault> {
        let end = &mut self.end;
        if end.peer == end.own {
            let head = end.words.load(end.lane + HEAD, Acquire);
            if head < end.own || head - end.own > end.entries {
                return Err(RingFault::Corrupt { peer: head, own: end.own });
            }
            end.peer = head;
        }
        Ok(end.peer != end.own)
    }
}
