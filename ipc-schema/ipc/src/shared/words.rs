//! Shared memory as atomic 64-bit words: everything in a memfd that another process may write at any time is read and written
//! through this, one word at a time, never by reference.
//!
//! The algorithms of [`table`](super::table), [`gate`](super::gate) and [`ring`](crate::ring) are generic over [`Words`], so
//! that the same code runs over a mapped memfd in production and over loom's atomics in the model tests.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uhmm_kernel_hook::{HookError, PAGE_SIZE, Prot, Window, memfd};
pub use uhmm_shared::words::Words;

/// Why shared words are not to be had.
#[derive(Debug, thiserror::Error)]
pub enum WordsError {
    /// Nothing was asked for, or more than memory can be.
    #[error("Shared memory of {word_count} words cannot be made: ask for at least one and fewer than 2^40")]
    Count {
        /// What was asked.
        word_count: u64,
    },
    /// The peer's memfd is too small.
    #[error("The shared memory holds {have} words where {need} are needed: the peer passed the wrong descriptor")]
    TooSmall {
        /// Words there are.
        have: u64,
        /// Words needed.
        need: u64,
    },
    /// The kernel hook refused: not a memfd, not sealed, not mappable.
    #[error("The shared memory cannot be used")]
    Hook(#[from] HookError),
}

/// Words of a range that are looked at without asking for its holes: a page table of 32 MiB.
const ASK_WORDS: usize = 8192;

/// A mapped, sealed memfd. Sealed, so that no peer can shrink it under us (SIGBUS). Clones share the mapping.
#[derive(Clone, Debug)]
pub struct SharedWords {
    window: Arc<Window>,
    fd: Arc<OwnedFd>,
    word_count: usize,
}

impl SharedWords {
    /// A new memfd of at least `word_count` zero words, rounded up to pages. `name` is for /proc.
    pub fn create(name: &str, word_count: u64) -> Result<Self, WordsError> {
        if word_count == 0 || word_count >= 1 << 40 {
            return Err(WordsError::Count { word_count });
        }
        let page_bytes = PAGE_SIZE;
        let len_bytes = (word_count * 8).next_multiple_of(page_bytes);
        Self::map(memfd::create_sealed(name, len_bytes)?)
    }

    /// A peer's memfd that must hold `word_count` words at least.
    pub fn open(fd: impl AsFd, word_count: u64) -> Result<Self, WordsError> {
        let words = Self::open_whole(fd)?;
        let have = words.word_count as u64;
        if have < word_count {
            return Err(WordsError::TooSmall { have, need: word_count });
        }
        Ok(words)
    }

    /// A peer's memfd, whatever its size.
    pub fn open_whole(fd: impl AsFd) -> Result<Self, WordsError> {
        Self::map(memfd::try_clone(fd.as_fd())?)
    }

    fn map(fd: OwnedFd) -> Result<Self, WordsError> {
        let len_bytes = memfd::len(fd.as_fd())?;
        memfd::check_sealed(fd.as_fd(), len_bytes)?;
        let window = Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?;
        let word_count = (len_bytes / 8) as usize;
        if word_count > 0 {
            // Takes the mapping for atomics now, so that no later access can fail.
            window.atomic_u64(0)?;
        }
        Ok(Self { window: Arc::new(window), fd: Arc::new(fd), word_count })
    }

    /// The memfd, to be passed on.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Address of a word in this process, for whoever works on the mapping by number.
    pub fn addr_of(&self, index: usize) -> u64 {
        self.window.addr() + 8 * index as u64
    }

    /// Wakes who sleeps on the low half of a word, in whatever process (a futex).
    pub fn wake(&self, index: usize) {
        if let Err(error) = self.window.wake_futex(8 * index as u64) {
            tracing::error!(%error, index, "A futex in shared memory cannot be woken");
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        match self.window.atomic_u64(index as u64 * 8) {
            Ok(word) => word,
            // Every user of `Words` bounds its indices by word_count: a bug here, never a peer's doing.
            Err(error) => panic!("Word {index} of {}: {error}", self.word_count),
        }
    }
}

impl Words for SharedWords {
    fn word_count(&self) -> usize {
        self.word_count
    }

    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.word(index).load(order)
    }

    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word(index).store(value, order);
    }

    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
        self.word(index).swap(value, order)
    }

    fn compare_exchange(
        &self,
        index: usize,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.word(index).compare_exchange(current, new, success, failure)
    }

    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }

    fn in_use(&self, range: Range<usize>, each: &mut dyn FnMut(Range<usize>)) {
        let range = range.start..range.end.min(self.word_count);
        let bytes = range.len() as u64 * 8;
        // The kernel is asked where that costs less than to look.
        let parts =
            (range.len() >= ASK_WORDS).then(|| memfd::data_ranges(self.fd.as_fd(), range.start as u64 * 8, bytes));
        match parts {
            Some(Ok(parts)) => {
                for (offset, len) in parts {
                    let (first, end) = ((offset / 8) as usize, (offset + len).div_ceil(8) as usize);
                    each(first.max(range.start)..end.min(range.end));
                }
            }
            _ => each(range),
        }
    }
}
