//! Events of a userfaultfd that outlive their reader: the kernel writes the messages straight into memory that somebody else keeps
//! too, so a reader that is killed between reading an event and acting on it leaves the event for its successor.
//!
//! ```text
//!  0       8       16       64        96        ...      64 + 32 * 64        ...
//!  | owner | batch | reader | message | message | ...    | fork | fork |     a message or fork whose first word is zero is none
//! ```

use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::{READ_BATCH, UffdEvent, Userfaultfd, abi, decode};
use crate::error::HookError;
use crate::range::PAGE_SIZE;
use crate::window::Window;

const BATCH: u64 = 8;
const READER: u64 = 16;
const MESSAGES: u64 = 64;
const MESSAGE_BYTES: u64 = size_of::<abi::UffdMsg>() as u64;
const FORKS: u64 = MESSAGES + READ_BATCH as u64 * MESSAGE_BYTES;
const FORK_BYTES: u64 = 32;
const FORKS_MAX: u64 = (PAGE_SIZE - FORKS) / FORK_BYTES;

/// See the module head. One for a reader, whatever the number of its userfaultfds: events of one are dealt with before those of
/// another are read.
#[derive(Debug)]
pub struct EventJournal {
    window: Window,
    reader: u32,
}

/// An event that was read and perhaps not acted on.
#[derive(Debug, PartialEq, Eq)]
pub struct KeptEvent {
    /// For [`EventJournal::handled`].
    pub slot: usize,
    /// As [`EventJournal::id`] has told its reader.
    pub id: u64,
    /// As read.
    pub event: Change,
}

/// A forked child's userfaultfd that nobody but its reader has yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptFork {
    /// Whose event it was.
    pub owner: u64,
    /// The event, see [`EventJournal::id`].
    pub id: u64,
    /// Which reader has it.
    pub reader: u32,
    /// Number of the descriptor there.
    pub fd: i32,
}

/// What the address space has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// mremap.
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// fork. The descriptor was made in the reader, see [`FdKeeper`](crate::fd_keeper::FdKeeper).
    Fork {
        /// Which reader.
        reader: u32,
        /// Its number there.
        fd: i32,
    },
    /// madvise.
    Remove {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// munmap.
    Unmap {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
}

impl EventJournal {
    /// Length of its memory.
    pub const LEN_BYTES: u64 = PAGE_SIZE;

    /// A journal in that memory, with what an earlier reader may have left in it. `reader`: the number of this one, which no other has.
    pub fn new(window: Window, reader: u32) -> Self {
        Self { window, reader }
    }

    /// Appends the waiting messages, at most 64, and returns how many; 0 when there are none. Call until it returns 0. The n-th
    /// event's slot is n. `owner` is told by [`Self::kept`].
    ///
    /// # Errors
    /// As [`Userfaultfd::read_events`].
    pub fn read(&self, uffd: &Userfaultfd, owner: u64, out: &mut Vec<UffdEvent>) -> Result<usize, HookError> {
        self.window.store_u64(0, owner)?;
        self.window.store_u64(READER, u64::from(self.reader))?;
        self.window.store_u64(BATCH, self.window.load_u64(BATCH)?.wrapping_add(1))?;
        let len = READ_BATCH as u64 * MESSAGE_BYTES;
        let place = self.window.at_mut(MESSAGES, len)?;
        let read_bytes = loop {
            // SAFETY: `at_mut` checked that this many bytes lie in the window, and its owner writes nothing meanwhile.
            let rc = unsafe { libc::read(uffd.fd.as_raw_fd(), place.cast(), len as usize) };
            if rc >= 0 {
                break rc as u64;
            }
            match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::AGAIN) => return Ok(0),
                Some(Errno::INTR) => {}
                error => return Err(HookError::failed("read(userfaultfd)", error.unwrap_or(Errno::IO))),
            }
        };
        let count = (read_bytes / MESSAGE_BYTES) as usize;
        let mut answer = Ok(count);
        for slot in 0..count {
            let message = self.message(slot)?;
            // SAFETY: the kernel wrote these messages for this process in this read, and each is decoded once.
            match unsafe { decode(&message) } {
                Ok(event) => out.push(event),
                Err(error) => answer = Err(error),
            }
        }
        answer
    }

    fn message(&self, slot: usize) -> Result<abi::UffdMsg, HookError> {
        let word = |index: u64| self.window.load_u64(MESSAGES + slot as u64 * MESSAGE_BYTES + 8 * index);
        // The first byte of memory: x86 and arm64 are little-endian.
        Ok(abi::UffdMsg { event: word(0)? as u8, arg: [word(1)?, word(2)?, word(3)?], ..Default::default() })
    }

    /// A name of an event of the last batch that no earlier one had.
    ///
    /// # Errors
    /// `OutOfWindow` for memory that is too short.
    pub fn id(&self, slot: usize) -> Result<u64, HookError> {
        Ok(self.window.load_u64(BATCH)?.wrapping_mul(READ_BATCH as u64).wrapping_add(slot as u64))
    }

    /// An event was acted on: nobody has to repeat it.
    ///
    /// # Errors
    /// `OutOfWindow` for a slot that does not exist.
    pub fn handled(&self, slot: usize) -> Result<(), HookError> {
        self.window.store_u64(MESSAGES + slot as u64 * MESSAGE_BYTES, 0)
    }

    /// Notes where a forked child's userfaultfd is, until it is kept elsewhere ([`Self::fork_is_kept`]). `false`: no room, and nothing
    /// is noted.
    ///
    /// # Errors
    /// `OutOfWindow` for memory that is too short.
    pub fn note_fork(&self, fork: KeptFork) -> Result<bool, HookError> {
        for place in 0..FORKS_MAX {
            let at = FORKS + place * FORK_BYTES;
            if self.window.load_u64(at)? == 0 {
                self.window.store_u64(at + 8, fork.owner)?;
                self.window.store_u64(at + 16, u64::from(fork.reader) << 32 | u64::from(fork.fd.cast_unsigned()))?;
                self.window.store_u64(at, fork.id)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Forgets a noted child.
    ///
    /// # Errors
    /// `OutOfWindow` for memory that is too short.
    pub fn fork_is_kept(&self, owner: u64, id: u64) -> Result<(), HookError> {
        for place in 0..FORKS_MAX {
            let at = FORKS + place * FORK_BYTES;
            if self.window.load_u64(at)? == id && self.window.load_u64(at + 8)? == owner {
                self.window.store_u64(at, 0)?;
            }
        }
        Ok(())
    }

    /// Children that an earlier reader has noted.
    ///
    /// # Errors
    /// `OutOfWindow` for memory that is too short.
    pub fn noted_forks(&self) -> Result<Vec<KeptFork>, HookError> {
        let mut forks = Vec::new();
        for at in (0..FORKS_MAX).map(|place| FORKS + place * FORK_BYTES) {
            let word = |index: u64| self.window.load_u64(at + 8 * index);
            if word(0)? != 0 {
                let place = word(2)?;
                let (reader, fd) = ((place >> 32) as u32, (place as u32).cast_signed());
                forks.push(KeptFork { id: word(0)?, owner: word(1)?, reader, fd });
            }
        }
        Ok(forks)
    }

    /// What an earlier reader has left, in order, and whose it is. Faults are left out: they are raised again after a wake.
    ///
    /// # Errors
    /// `OutOfWindow` for memory that is too short.
    pub fn kept(&self) -> Result<(u64, Vec<KeptEvent>), HookError> {
        let owner = self.window.load_u64(0)?;
        let reader = self.window.load_u64(READER)? as u32;
        let mut kept = Vec::new();
        for slot in 0..READ_BATCH {
            let abi::UffdMsg { event, arg: [first, second, third], .. } = self.message(slot)?;
            let event = match event {
                abi::EVENT_FORK => Change::Fork { reader, fd: (first as u32).cast_signed() },
                abi::EVENT_REMAP => Change::Remap { from: first, to: second, len: third },
                abi::EVENT_UNMAP => Change::Unmap { start: first, end: second },
                abi::EVENT_REMOVE => Change::Remove { start: first, end: second },
                _ => continue,
            };
            kept.push(KeptEvent { slot, id: self.id(slot)?, event });
        }
        Ok((owner, kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_handled_is_not_kept() {
        let journal = EventJournal::new(Window::anonymous(EventJournal::LEN_BYTES).unwrap(), 5);
        assert_eq!(journal.kept().unwrap(), (0, Vec::new()));
        let put = |slot: u64, kind: u8, words: [u64; 3]| {
            let at = MESSAGES + slot * MESSAGE_BYTES;
            journal.window.store_u64(at, u64::from(kind)).unwrap();
            (1..4).zip(words).for_each(|(n, word)| journal.window.store_u64(at + 8 * n, word).unwrap());
        };
        journal.window.store_u64(0, 9).unwrap();
        journal.window.store_u64(READER, 4).unwrap();
        put(0, abi::EVENT_PAGEFAULT, [1, 2, 3]);
        put(1, abi::EVENT_REMAP, [1, 2, 3]);
        put(2, abi::EVENT_UNMAP, [4, 5, 0]);
        put(3, abi::EVENT_REMOVE, [6, 7, 0]);
        put(63, abi::EVENT_FORK, [7, 0, 0]);
        journal.window.store_u64(BATCH, 3).unwrap();
        let remap = KeptEvent { slot: 1, id: 193, event: Change::Remap { from: 1, to: 2, len: 3 } };
        let unmap = KeptEvent { slot: 2, id: 194, event: Change::Unmap { start: 4, end: 5 } };
        let remove = KeptEvent { slot: 3, id: 195, event: Change::Remove { start: 6, end: 7 } };
        let fork = KeptEvent { slot: 63, id: 255, event: Change::Fork { reader: 4, fd: 7 } };
        assert_eq!(journal.kept().unwrap(), (9, vec![remap, unmap, remove, fork]));
        assert_eq!(journal.id(63).unwrap(), 255);
        journal.handled(1).unwrap();
        journal.handled(63).unwrap();
        let kept = journal.kept().unwrap().1;
        assert_eq!(kept.iter().map(|kept| kept.slot).collect::<Vec<_>>(), [2, 3]);
        assert!(journal.handled(1000).is_err());
    }

    #[test]
    fn a_forked_child_is_noted_until_it_is_kept_elsewhere() {
        let journal = EventJournal::new(Window::anonymous(EventJournal::LEN_BYTES).unwrap(), 5);
        let fork = |id: u64| KeptFork { owner: 3, id, reader: 5, fd: id as i32 };
        assert!((1..=FORKS_MAX).all(|id| journal.note_fork(fork(id)).unwrap()));
        assert!(!journal.note_fork(fork(999)).unwrap(), "no room");
        journal.fork_is_kept(4, 7).unwrap();
        assert_eq!(journal.noted_forks().unwrap().len(), FORKS_MAX as usize, "another owner's");
        (1..=FORKS_MAX).filter(|id| *id != 7).for_each(|id| journal.fork_is_kept(3, id).unwrap());
        assert_eq!(journal.noted_forks().unwrap(), [fork(7)]);
    }
}
