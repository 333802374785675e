//! Rings of 64-byte descriptors in shared memory: one producer, one consumer, in two processes that do not trust each other.
//!
//! A memfd holds two lanes, one a direction. Lane 0 is filled by the side that created the memfd, lane 1 by the side that
//! opened it; a one-way use leaves the other lane alone.
//!
//! ```text
//!   words:  0 magic+version | 1 entries | ...                       (line 0, written once by the creator)
//!           8 head | 16 tail | 24 armed                             (lane 0, a cache line each)
//!          32 head | 40 tail | 48 armed                             (lane 1)
//!          56 ...  entries * 8 words of lane 0, then of lane 1
//!
//!   producer: slot <- descriptor; head <- head + 1; FENCE; armed? clear it and signal (eventfd)
//!   consumer: take all there is; armed <- 1; FENCE; head moved meanwhile? then disarm and go on, else sleep
//! ```
//! Without the consumer's re-check behind its fence the wake-up between "nothing there" and "armed" is lost; the loom test
//! `a_wake_up_is_never_lost` explores every interleaving of this very code.
//!
//! Head and tail only ever increase (they wrap at 2^64, so never); the slot is the index modulo the entry count. Each end keeps
//! its own index privately and merely publishes it; the peer's index is checked every time: it may not go back and may not be
//! more than the ring's size away. A peer that breaks this gets [`RingError::Corrupt`] and the ring is useless from then on, while
//! nothing was read or written outside it. Descriptors are copied out before anybody looks at them.
//!
//! After a crash of either end the ring is not reused: the session that replaces the dead one brings a new ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use crate::shared::words::{SharedWords, Words, WordsError};

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 64;
/// Most entries of a lane.
pub const MAX_ENTRIES: u32 = 1 << 16;

const DESCRIPTOR_WORDS: usize = DESCRIPTOR_BYTES / 8;
/// "uhmmring" and layout version 1.
const MAGIC: u64 = 0x7568_6d6d_7269_0001;
const ENTRIES: usize = 1;
const LANE: [usize; 2] = [8, 32];
const HEAD: usize = 0;
const TAIL: usize = 8;
const ARMED: usize = 16;
const SLOTS: usize = 56;

/// What a ring cannot do.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// No free slot: try again after the consumer has taken something.
    #[error("The ring is full: wait until the peer has taken something")]
    Full,
    /// The peer wrote an impossible index. End the session with it.
    #[error("The ring is corrupt: the peer moved its index to {peer} where ours is {own} and {entries} entries exist")]
    Corrupt {
        /// What the peer wrote.
        peer: u64,
        /// Where we are.
        own: u64,
        /// Size.
        entries: u64,
    },
    /// Entry count out of range.
    #[error("A ring of {entries} entries cannot be: choose a power of two up to 65536")]
    Entries {
        /// What was asked, or read from the memfd.
        entries: u64,
    },
    /// The memfd is no ring of this version.
    #[error(
        "The shared memory holds no ring of this version (found {found:#x}): both ends must be of the same version"
    )]
    Magic {
        /// First word.
        found: u64,
    },
    /// The memory itself.
    #[error("The ring's memory cannot be used")]
    Words(#[from] WordsError),
}

/// Which end of the memfd this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Made it; produces into lane 0.
    Creator,
    /// Got it from the peer; produces into lane 1.
    Opener,
}

/// A mapped ring memfd. [`into_ends`](Self::into_ends) gives the two ends that this process has.
pub struct Ring<W: Words = SharedWords> {
    words: Arc<W>,
    entries: u64,
    side: Side,
}

impl Ring {
    /// A new, empty ring; `entries` is a power of two, for each direction.
    pub fn create(entries: u32) -> Result<Self, RingError> {
        check_entries(u64::from(entries))?;
        let words = SharedWords::create("uhmm-ring", word_count(u64::from(entries)))?;
        Ok(Self::format(words, u64::from(entries)))
    }

    /// The peer's ring. Refused unless it is sealed against resizing and as large as it says.
    pub fn open(fd: impl AsFd) -> Result<Self, RingError> {
        let words = SharedWords::open_whole(fd)?;
        let found = words.load(0, Acquire);
        if found != MAGIC {
            return Err(RingError::Magic { found });
        }
        // Read once: the peer may change it, but our copy is what counts.
        let entries = words.load(ENTRIES, Relaxed);
        check_entries(entries)?;
        let (have, need) = (words.word_count() as u64, word_count(entries));
        if have < need {
            return Err(WordsError::TooSmall { have, need }.into());
        }
        Ok(Self { words: Arc::new(words), entries, side: Side::Opener })
    }

    /// The memfd, to be passed to the peer.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        self.words.fd()
    }
}

impl<W: Words> Ring<W> {
    fn format(words: W, entries: u64) -> Self {
        words.store(ENTRIES, entries, Relaxed);
        words.store(0, MAGIC, Release);
        Self { words: Arc::new(words), entries, side: Side::Creator }
    }

    /// The end into which this process pushes and the end from which it pops.
    pub fn into_ends(self) -> (Producer<W>, Consumer<W>) {
        let own = usize::from(self.side == Side::Opener);
        let end = |lane: usize, published: usize| End {
            words: self.words.clone(),
            lane: LANE[lane],
            slots: SLOTS + lane * self.entries as usize * DESCRIPTOR_WORDS,
            entries: self.entries,
            own: self.words.load(LANE[lane] + published, Acquire),
            peer: self.words.load(LANE[lane] + published, Acquire),
        };
        (Producer { end: end(own, HEAD) }, Consumer { end: end(1 - own, TAIL) })
    }
}

fn check_entries(entries: u64) -> Result<(), RingError> {
    if entries.is_power_of_two() && entries <= u64::from(MAX_ENTRIES) {
        Ok(())
    } else {
        Err(RingError::Entries { entries })
    }
}

fn word_count(entries: u64) -> u64 {
    SLOTS as u64 + 2 * entries * DESCRIPTOR_WORDS as u64
}

/// What both ends have in common. `own` is the authority for our index, `peer` the last good value of the other's.
struct End<W: Words> {
    words: Arc<W>,
    lane: usize,
    slots: usize,
    entries: u64,
    own: u64,
    peer: u64,
}

impl<W: Words> End<W> {
    fn slot(&self) -> usize {
        self.slots + (self.own & (self.entries - 1)) as usize * DESCRIPTOR_WORDS
    }
}

/// Pushes descriptors.
pub struct Producer<W: Words = SharedWords> {
    end: End<W>,
}

impl<W: Words> Producer<W> {
    /// Appends a descriptor. True: the consumer sleeps or is about to, signal it now (only this call says so).
    pub fn push(&mut self, descriptor: &[u8; DESCRIPTOR_BYTES]) -> Result<bool, RingError> {
        let end = &mut self.end;
        if end.own.wrapping_sub(end.peer) >= end.entries {
            let tail = end.words.load(end.lane + TAIL, Acquire);
            // The consumer may have taken at most all that we have pushed, and cannot give anything back.
            if tail < end.peer || tail > end.own {
                return Err(RingError::Corrupt { peer: tail, own: end.own, entries: end.entries });
            }
            end.peer = tail;
            if end.own - end.peer >= end.entries {
                return Err(RingError::Full);
            }
        }
        let slot = end.slot();
        for (index, bytes) in descriptor.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
            end.words.store(slot + index, word, Relaxed);
        }
        end.own += 1;
        end.words.store(end.lane + HEAD, end.own, Release);
        end.words.fence(SeqCst);
        let armed = end.lane + ARMED;
        Ok(end.words.load(armed, Relaxed) != 0 && end.words.swap(armed, 0, Relaxed) != 0)
    }
}

/// Pops descriptors.
pub struct Consumer<W: Words = SharedWords> {
    end: End<W>,
}

impl<W: Words> Consumer<W> {
    /// Takes the oldest descriptor, `None` when there is nothing now. Before sleeping call [`arm`](Self::arm).
    pub fn pop(&mut self) -> Result<Option<[u8; DESCRIPTOR_BYTES]>, RingError> {
        if !self.filled()? {
            return Ok(None);
        }
        let end = &mut self.end;
        let slot = end.slot();
        let mut descriptor = [0; DESCRIPTOR_BYTES];
        for (index, bytes) in descriptor.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&end.words.load(slot + index, Relaxed).to_le_bytes());
        }
        end.own += 1;
        end.words.store(end.lane + TAIL, end.own, Release);
        Ok(Some(descriptor))
    }

    /// Asks the producer for a signal with its next push. True: nothing has come meanwhile, sleep. False: do not sleep, `pop`.
    pub fn arm(&mut self) -> Result<bool, RingError> {
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

    fn filled(&mut self) -> Result<bool, RingError> {
        let end = &mut self.end;
        if end.peer == end.own {
            let head = end.words.load(end.lane + HEAD, Acquire);
            if head < end.own || head - end.own > end.entries {
                return Err(RingError::Corrupt { peer: head, own: end.own, entries: end.entries });
            }
            end.peer = head;
        }
        Ok(end.peer != end.own)
    }
}

#[cfg(test)]
mod tests;
