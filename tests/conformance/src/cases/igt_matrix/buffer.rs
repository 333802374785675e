//! Memory of every kind behind one face: made, put under management, read and written by the CPU, given back.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use uhmm_sdk::{Advice, Region};

use super::super::mirror::file_with;
use super::{Kind, Moves};
use crate::case::{CaseResult, During, Failure, ensure_eq, not_applicable};
use crate::ctx::{Ctx, PMD, may_lock_blocks};
use crate::mem::{Mem, PAGE, Remap};
use crate::pattern;

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The program's allocator.
    Heap,
    /// Private anonymous mapping.
    Mmap,
    /// The same, of 2 MiB pages.
    Huge,
    /// Shared anonymous mapping.
    Shared,
    /// Shared mapping of a file.
    File,
    /// Allocated by the SDK.
    Region,
}

/// Some of it.
pub(super) enum Buffer {
    /// The whole pages inside an allocation.
    Heap { words: Vec<AtomicU64>, skipped: usize, len: u64 },
    /// A mapping.
    Mapped(Mem),
    /// A region of the SDK.
    Region(Region),
}

/// Memory as the kind wants it, under management.
pub(super) fn make(ctx: &Ctx, kind: &Kind, len: u64) -> CaseResult<Buffer> {
    let buffer = match kind.source {
        Source::Heap => heap(len),
        Source::Mmap => Buffer::Mapped(Mem::small(len)?),
        Source::Huge => Buffer::Mapped(Mem::huge(len.next_multiple_of(PMD))?),
        Source::Shared => Buffer::Mapped(Mem::shared(len)?),
        Source::File => {
            let file = file_with(&vec![0; len as usize])?;
            Buffer::Mapped(Mem::file_shared(file.as_fd(), len, true)?)
        }
        Source::Region => Buffer::Region(ctx.session.allocate(len).during("Allocate")?),
    };
    if kind.lock {
        buffer.lock()?;
    }
    if !matches!(buffer, Buffer::Region(_)) {
        ctx.adopt_at(buffer.addr(), buffer.len())?;
    }
    buffer.advise(ctx, kind)?;
    Ok(buffer)
}

fn heap(len: u64) -> Buffer {
    let mut words = Vec::new();
    words.resize_with(((len + PAGE) / 8) as usize, AtomicU64::default);
    let addr = words.as_ptr().addr() as u64;
    let skipped = (addr.next_multiple_of(PAGE) - addr) as usize / 8;
    Buffer::Heap { words, skipped, len }
}

impl Buffer {
    pub(super) fn addr(&self) -> u64 {
        match self {
            Buffer::Heap { words, skipped, .. } => (words.as_ptr().addr() + 8 * skipped) as u64,
            Buffer::Mapped(mem) => mem.addr(),
            Buffer::Region(region) => region.addr(),
        }
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Buffer::Heap { len, .. } => *len,
            Buffer::Mapped(mem) => mem.len(),
            Buffer::Region(region) => region.len_bytes(),
        }
    }

    fn advise(&self, ctx: &Ctx, kind: &Kind) -> CaseResult {
        if !kind.advise {
            return Ok(());
        }
        let advice = Advice::PreferredLocation(Some(ctx.device(0)?.target()));
        ctx.session.advise(self.addr(), self.len(), advice).during("Advise the location")
    }

    fn lock(&self) -> CaseResult {
        match self {
            // A program locks its heap with everything else that it has.
            Buffer::Heap { .. } | Buffer::Region(_) => match uhmm_kernel_hook::process::lock_memory_best_effort() {
                // What the account may lock is no property of a driver.
                Err(error) if [Errno::NOMEM, Errno::PERM].iter().any(|no| error.errno() == Some(no.raw_os_error())) => {
                    not_applicable!("This account may not lock all of a program's memory: {error}")
                }
                locked => locked.during("Lock the program's memory"),
            },
            Buffer::Mapped(mem) => {
                may_lock_blocks()?;
                mem.lock(0, mem.len())
            }
        }
    }

    fn word(words: &[AtomicU64], skipped: usize, off: u64) -> CaseResult<&AtomicU64> {
        words.get(skipped + off as usize / 8).ok_or_else(|| Failure::Failed("Outside the allocation".into()))
    }

    pub(super) fn load(&self, off: u64) -> CaseResult<u64> {
        match self {
            Buffer::Heap { words, skipped, .. } => Ok(Self::word(words, *skipped, off)?.load(Ordering::Acquire)),
            Buffer::Mapped(mem) => mem.load(off),
            Buffer::Region(region) => region.read_u64(off).during("Read a region"),
        }
    }

    pub(super) fn store(&self, off: u64, value: u64) -> CaseResult {
        match self {
            Buffer::Heap { words, skipped, .. } => Self::word(words, *skipped, off)?.store(value, Ordering::Release),
            Buffer::Mapped(mem) => mem.store(off, value)?,
            Buffer::Region(region) => region.write_u64(off, value).during("Write a region")?,
        }
        Ok(())
    }

    /// The CPU writes the pattern.
    pub(super) fn fill(&self, off: u64, len: u64, seed: u64) -> CaseResult {
        (0..len / 8).try_for_each(|index| self.store(off + 8 * index, pattern::word(seed, index)))
    }

    /// The CPU finds the pattern, every word of it.
    pub(super) fn expect(&self, off: u64, len: u64, seed: u64) -> CaseResult {
        for index in 0..len / 8 {
            let at = off + 8 * index;
            ensure_eq!(self.load(at)?, pattern::word(seed, index), "The CPU's word at offset {at:#x}");
        }
        Ok(())
    }

    /// The same memory at another address.
    pub(super) fn moved(self, moves: Moves) -> CaseResult<Self> {
        let Buffer::Mapped(mem) = self else {
            return Err(Failure::Failed("Only mappings can be moved".into()));
        };
        let how = if moves.keep_old { Remap::KeepOld } else { Remap::Move };
        let to = mem.remap(0, mem.len(), how)?;
        if moves.keep_old && mem.is_private() {
            // The old place is still mapped, and empty.
            mem.expect_zero(0, mem.len())?;
        }
        Ok(Buffer::Mapped(to))
    }

    /// Ends its management and its life.
    pub(super) fn give_back(self, ctx: &Ctx) -> CaseResult {
        match self {
            Buffer::Heap { .. } => ctx.session.release(self.addr(), self.len()).during("Release the heap"),
            Buffer::Mapped(mem) => mem.unmap(0, mem.len()),
            Buffer::Region(region) => region.free().during("Free a region"),
        }
    }
}
