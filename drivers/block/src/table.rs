//! Which block a frame's page lies in, and how to tell that it is still that page: in memory that the vault keeps.
//!
//! ```text
//!   page 0    magic, version | frames, blocks | life | owner | sealed, key
//!   4096      block of frame 0, 1, ...         4 bytes each: block + 1, or 0 = the frame is zero
//!             generation and tag of block 0, 1, ...   8 + 16 bytes each
//!             marks of block 0, 1, ...                4 bytes each: a write has begun and was not answered; replicas that do not have it
//! ```
//! A driver may be killed between any two stores. A page is written to a block that nobody refers to: its generation is counted, then its tag
//! noted, then it is written, and when the medium has acknowledged it **one store** makes the frame refer to it. So a successor finds each frame
//! as it was before or after, and every block that no frame refers to is free.

use uhmm_driver_kit::PAGE_BYTES;
use uhmm_driver_kit::seal::{KEY_BYTES, TAG_BYTES};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{HookError, Prot, Window, memfd, random_bytes};

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"uhmmblck");
const VERSION: u64 = 2;
const AT_MAGIC: u64 = 0;
const AT_VERSION: u64 = 8;
const AT_FRAMES: u64 = 16;
const AT_BLOCKS: u64 = 24;
const AT_LIFE: u64 = 32;
const AT_OWNER: u64 = 40;
const AT_SEALED: u64 = 56;
const AT_KEY: u64 = 64;
const ENTRY_BYTES: u64 = 8 + TAG_BYTES as u64;
/// A write of this block has begun, and nobody has answered.
const OPEN: u32 = 1;
/// From here on: a bit for each replica that does not have what the block holds.
const MISSING_SHIFT: u32 = 8;

/// Whose bytes a medium holds, and which life of this memory they belong to. Drawn at a cold start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// Who took the medium.
    pub owner: [u64; 2],
    /// Which life.
    pub number: u64,
}

impl Life {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn draw() -> Result<Self, HookError> {
        let mut bytes = [0; 24];
        random_bytes(&mut bytes)?;
        let word = |at: usize| bytes[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        Ok(Self { owner: [word(0), word(8)], number: word(16) })
    }
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Table {
    window: Arc<Window>,
    frames: u32,
    blocks: u32,
}

fn len_bytes(frames: u32, blocks: u32) -> u64 {
    (marks_at(frames, blocks) + 4 * u64::from(blocks)).next_multiple_of(PAGE_BYTES)
}

fn entries_at(frames: u32) -> u64 {
    (PAGE_BYTES + 4 * u64::from(frames)).next_multiple_of(64)
}

fn marks_at(frames: u32, blocks: u32) -> u64 {
    entries_at(frames) + u64::from(blocks) * ENTRY_BYTES
}

impl Table {
    /// New memory for the vault: every frame is zero. `sealed`: with a new key.
    ///
    /// # Errors
    /// Out of memory.
    pub fn create(frames: u32, blocks: u32, life: Life, sealed: bool) -> Result<(Self, Fd), HookError> {
        let len = len_bytes(frames, blocks);
        let fd: Fd = Arc::new(memfd::create_sealed("uhmm-block-table", len)?);
        let window = Arc::new(Window::map(fd.as_fd(), 0, len, Prot::ReadWrite)?);
        let table = Self { window, frames, blocks };
        let mut key = [0; KEY_BYTES];
        random_bytes(&mut key)?;
        table.window.write(AT_KEY, &key)?;
        let words = [
            (AT_FRAMES, u64::from(frames)),
            (AT_BLOCKS, u64::from(blocks)),
            (AT_LIFE, life.number),
            (AT_OWNER, life.owner[0]),
            (AT_OWNER + 8, life.owner[1]),
            (AT_SEALED, u64::from(sealed)),
            (AT_VERSION, VERSION),
            (AT_MAGIC, MAGIC),
        ];
        for (at, word) in words {
            table.window.store_u64(at, word)?;
        }
        Ok((table, fd))
    }

    /// What an earlier incarnation has left; `None` when it is not of this shape.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn adopt(fd: &Fd, frames: u32, blocks: u32, sealed: bool) -> Result<Option<Self>, HookError> {
        let len = len_bytes(frames, blocks);
        if memfd::check_sealed(fd.as_fd(), len).is_err() {
            return Ok(None);
        }
        let window = Arc::new(Window::map(fd.as_fd(), 0, len, Prot::ReadWrite)?);
        let expected = [
            (AT_MAGIC, MAGIC),
            (AT_VERSION, VERSION),
            (AT_FRAMES, u64::from(frames)),
            (AT_BLOCKS, u64::from(blocks)),
            (AT_SEALED, u64::from(sealed)),
        ];
        for (at, word) in expected {
            if window.load_u64(at)? != word {
                return Ok(None);
            }
        }
        Ok(Some(Self { window, frames, blocks }))
    }

    /// Frames.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Blocks: more than frames, since a page is never written over the one before.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whose it is.
    ///
    /// # Errors
    /// As all of these: a number beyond the table's end.
    pub fn life(&self) -> Result<Life, HookError> {
        let owner = [self.window.load_u64(AT_OWNER)?, self.window.load_u64(AT_OWNER + 8)?];
        Ok(Life { owner, number: self.window.load_u64(AT_LIFE)? })
    }

    /// The seal's key, if frames are sealed.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn key(&self) -> Result<Option<[u8; KEY_BYTES]>, HookError> {
        let mut key = [0; KEY_BYTES];
        self.window.read(AT_KEY, &mut key)?;
        Ok((self.window.load_u64(AT_SEALED)? == 1).then_some(key))
    }

    /// Where a frame's page lies; `None`: it is zero.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn block_of(&self, frame: u32) -> Result<Option<u32>, HookError> {
        Ok(self.window.load_u32(PAGE_BYTES + 4 * u64::from(frame))?.checked_sub(1))
    }

    /// From now on the frame's page lies there.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn set_block(&self, frame: u32, block: Option<u32>) -> Result<(), HookError> {
        self.window.store_u32(PAGE_BYTES + 4 * u64::from(frame), block.map_or(0, |block| block + 1))
    }

    fn entry(&self, block: u32) -> u64 {
        entries_at(self.frames) + u64::from(block) * ENTRY_BYTES
    }

    /// Which generation a block holds.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn generation(&self, block: u32) -> Result<u64, HookError> {
        self.window.load_u64(self.entry(block))
    }

    /// The block gets its next generation, which no page has had. Called before anything of it leaves.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn next_generation(&self, block: u32) -> Result<u64, HookError> {
        let next = self.generation(block)? + 1;
        self.marks(block)?.store(OPEN, Ordering::SeqCst);
        self.window.store_u64(self.entry(block), next)?;
        Ok(next)
    }

    fn marks(&self, block: u32) -> Result<&AtomicU32, HookError> {
        self.window.atomic_u32(marks_at(self.frames, self.blocks) + 4 * u64::from(block))
    }

    /// A write of this block has begun and was not answered.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn is_open(&self, block: u32) -> Result<bool, HookError> {
        Ok(self.marks(block)?.load(Ordering::SeqCst) & OPEN != 0)
    }

    /// It was answered, or nothing of it lands any more.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn settle(&self, block: u32) -> Result<(), HookError> {
        let marks = self.marks(block)?;
        if marks.load(Ordering::SeqCst) & OPEN != 0 {
            marks.fetch_and(!OPEN, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Replicas that do not have what a block holds, a bit each.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn missing(&self, block: u32) -> Result<u32, HookError> {
        Ok(self.marks(block)?.load(Ordering::SeqCst) >> MISSING_SHIFT)
    }

    /// A replica has it, or does not.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn set_missing(&self, block: u32, replica: u32, missing: bool) -> Result<(), HookError> {
        let (marks, bit) = (self.marks(block)?, 1 << (MISSING_SHIFT + replica));
        if missing {
            marks.fetch_or(bit, Ordering::SeqCst)
        } else {
            marks.fetch_and(!bit, Ordering::SeqCst)
        };
        Ok(())
    }

    /// The tag of what a block holds.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn tag(&self, block: u32) -> Result<[u8; TAG_BYTES], HookError> {
        let mut tag = [0; TAG_BYTES];
        self.window.read(self.entry(block) + 8, &mut tag)?;
        Ok(tag)
    }

    /// Notes it.
    ///
    /// # Errors
    /// As [`Table::life`].
    pub fn set_tag(&self, block: u32, tag: &[u8; TAG_BYTES]) -> Result<(), HookError> {
        self.window.write(self.entry(block) + 8, tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_finds_what_was_noted_and_only_in_a_table_of_its_shape() {
        let life = Life::draw().unwrap();
        let (table, fd) = Table::create(100, 130, life, true).unwrap();
        table.set_block(99, Some(129)).unwrap();
        table.set_block(0, Some(0)).unwrap();
        assert_eq!((table.next_generation(129).unwrap(), table.next_generation(129).unwrap()), (1, 2));
        table.set_tag(129, &[9; TAG_BYTES]).unwrap();
        let key = table.key().unwrap();
        let next = Table::adopt(&fd, 100, 130, true).unwrap().expect("of this shape");
        assert_eq!((next.life().unwrap(), next.key().unwrap()), (life, key));
        assert_eq!(
            (next.block_of(99).unwrap(), next.block_of(0).unwrap(), next.block_of(1).unwrap()),
            (Some(129), Some(0), None)
        );
        assert_eq!((next.generation(129).unwrap(), next.tag(129).unwrap()), (2, [9; TAG_BYTES]));
        assert!(next.generation(2000).is_err() && next.missing(2000).is_err());
        table.set_missing(129, 1, true).unwrap();
        assert_eq!((next.is_open(129).unwrap(), next.missing(129).unwrap(), next.missing(128).unwrap()), (true, 2, 0));
        table.settle(129).unwrap();
        assert_eq!((next.is_open(129).unwrap(), next.missing(129).unwrap()), (false, 2));
        table.next_generation(129).unwrap();
        assert_eq!((next.is_open(129).unwrap(), next.missing(129).unwrap()), (true, 0), "it is written anew");
        table.set_missing(129, 0, true).unwrap();
        table.set_missing(129, 0, false).unwrap();
        assert_eq!(next.missing(129).unwrap(), 0);
        for (frames, blocks, sealed) in [(101, 130, true), (100, 131, true), (100, 130, false), (100_000, 130, true)] {
            assert!(Table::adopt(&fd, frames, blocks, sealed).unwrap().is_none(), "{frames} {blocks} {sealed}");
        }
        let (open, _) = Table::create(1, 1, life, false).unwrap();
        assert_eq!(open.key().unwrap(), None);
        let (other, _) = Table::create(1, 1, life, true).unwrap();
        assert!(other.key().unwrap() != key && other.key().unwrap() != Some([0; KEY_BYTES]), "a key is drawn");
    }
}
