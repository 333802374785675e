//! Rings of 64-byte descriptors in shared memory: one producer, one consumer, in two processes that do not trust each other. The
//! algorithm is `uhmm_shared::ring`; here are the memfd, and descriptors as bytes.
//!
//! After a crash of either end the ring of a session is not reused: the session that replaces the dead one brings a new ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use uhmm_shared::ring::{self, Descriptor, ENTRIES, MAGIC, RingFault, word_count};

use crate::shared::words::{SharedWords, Words, WordsError};

/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 8 * ring::DESCRIPTOR_WORDS;
/// Most entries of a lane.
pub const MAX_ENTRIES: u32 = ring::MAX_ENTRIES as u32;

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
        ring::format(&words, entries);
        Self { words: Arc::new(words), entries, side: Side::Creator }
    }

    /// The end into which this process pushes and the end from which it pops.
    pub fn into_ends(self) -> (Producer<W>, Consumer<W>) {
        let own = usize::from(self.side == Side::Opener);
        let (words, entries) = (self.words, self.entries);
        let producer = ring::Producer::open(words.clone(), own, entries);
        let consumer = ring::Consumer::open(words, 1 - own, entries);
        (Producer { end: producer, entries }, Consumer { end: consumer, entries })
    }
}

fn check_entries(entries: u64) -> Result<(), RingError> {
    if ring::is_entry_count(entries) { Ok(()) } else { Err(RingError::Entries { entries }) }
}

fn error_of(fault: RingFault, entries: u64) -> RingError {
    match fault {
        RingFault::Full => RingError::Full,
        RingFault::Corrupt { peer, own } => RingError::Corrupt { peer, own, entries },
    }
}

/// Pushes descriptors.
pub struct Producer<W: Words = SharedWords> {
    end: ring::Producer<Arc<W>>,
    entries: u64,
}

impl<W: Words> Producer<W> {
    /// Appends a descriptor. True: the consumer sleeps or is about to, signal it now (only this call says so).
    pub fn push(&mut self, descriptor: &[u8; DESCRIPTOR_BYTES]) -> Result<bool, RingError> {
        let word = |index: usize| u64::from_le_bytes(std::array::from_fn(|i| descriptor[8 * index + i]));
        let words: Descriptor = std::array::from_fn(word);
        self.end.push(&words).map_err(|fault| error_of(fault, self.entries))
    }
}

/// Pops descriptors.
pub struct Consumer<W: Words = SharedWords> {
    end: ring::Consumer<Arc<W>>,
    entries: u64,
}

impl<W: Words> Consumer<W> {
    /// Takes the oldest descriptor, `None` when there is nothing now. Before sleeping call [`arm`](Self::arm).
    pub fn pop(&mut self) -> Result<Option<[u8; DESCRIPTOR_BYTES]>, RingError> {
        let found = self.end.pop().map_err(|fault| error_of(fault, self.entries))?;
        Ok(found.map(|words| std::array::from_fn(|at| words[at / 8].to_le_bytes()[at % 8])))
    }

    /// Asks the producer for a signal with its next push. True: nothing has come meanwhile, sleep. False: do not sleep, `pop`.
    pub fn arm(&mut self) -> Result<bool, RingError> {
        self.end.arm().map_err(|fault| error_of(fault, self.entries))
    }
}

#[cfg(test)]
mod tests;
