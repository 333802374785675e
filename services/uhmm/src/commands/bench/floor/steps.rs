//! The steps of a migration, by one thread of this process and with nothing around them: what the kernel takes for them.
//!
//! ```text
//!   pages                   out                                        home
//!   4 KiB, shared           write-protect, copy, punch                 UFFDIO_COPY
//!   4 KiB, private          UFFDIO_MOVE aside, copy, MADV_DONTNEED     UFFDIO_COPY
//!   2 MiB, private          the same                                   a fresh huge page, copy, UFFDIO_MOVE
//! ```

use std::os::fd::{AsFd, OwnedFd};

use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_kernel_hook::{
    AddrRange, CopyMode, Features, FillOutcome, FillStop, HookError, ManagedMapping, RegisterMode, Userfaultfd, Window,
    WpOutcome, memfd,
};

use super::super::benches::managed::Kind;
use super::copies::{PIECE, resident};

enum Pages {
    Shared {
        mapping: ManagedMapping,
        memory: OwnedFd,
    },
    /// `aside`: where pages are moved to, registered. `fresh`: where they come from.
    Private {
        memory: ProgramMemory,
        aside: ProgramMemory,
        fresh: ProgramMemory,
        out: Vec<u8>,
    },
}

/// Memory, and the device that it goes to: resident memory of this process.
pub(in super::super) struct Steps {
    kind: Kind,
    len: u64,
    uffd: Userfaultfd,
    pages: Pages,
    device: Window,
}

fn private(len: u64, huge: bool) -> Result<ProgramMemory, HookError> {
    let memory = ProgramMemory::private_aligned(len)?;
    memory.advise(0, len, if huge { ProgramAdvice::HugePage } else { ProgramAdvice::NoHugePage })?;
    Ok(memory)
}

/// Everything, however often the kernel stops on its way.
fn whole(len: u64, mut some: impl FnMut(u64) -> Result<FillOutcome, HookError>) -> anyhow::Result<()> {
    let mut done = 0;
    while done < len {
        let outcome = some(done)?;
        done += outcome.done_bytes;
        anyhow::ensure!(
            outcome.stop.is_none_or(|stop| stop == FillStop::Again),
            "The kernel stopped the floor's steps: {:?}",
            outcome.stop
        );
    }
    Ok(())
}

impl Steps {
    /// Resident memory of `len` bytes, a multiple of 2 MiB.
    pub fn new(kind: Kind, len: u64) -> anyhow::Result<Self> {
        let (uffd, _) = Userfaultfd::create(None)?;
        let pages = if kind == Kind::Shared {
            uffd.api(Features::MISSING_SHMEM | Features::WP_HUGETLBFS_SHMEM)?;
            let memory = memfd::create_sealed("uhmm-bench-steps", len)?;
            let mapping = ManagedMapping::map(memory.as_fd(), len, None)?;
            mapping.fill(0, len, 1)?;
            uffd.register(mapping.range(), RegisterMode::MISSING | RegisterMode::WP)?;
            Pages::Shared { mapping, memory }
        } else {
            uffd.api(Features::MOVE)?;
            let huge = kind == Kind::Huge;
            let (memory, aside, fresh) = (private(len, huge)?, private(PIECE, huge)?, private(PIECE, huge)?);
            let out = vec![1; PIECE as usize];
            for off in (0..len).step_by(PIECE as usize) {
                memory.write(off, &out)?;
            }
            uffd.register(AddrRange { start: memory.addr(), len }, RegisterMode::MISSING)?;
            uffd.register(AddrRange { start: aside.addr(), len: PIECE }, RegisterMode::MISSING)?;
            Pages::Private { memory, aside, fresh, out: vec![1; len as usize] }
        };
        Ok(Self { kind, len, uffd, pages, device: resident(len, true)? })
    }

    /// All of it leaves.
    pub fn out(&mut self) -> anyhow::Result<()> {
        for off in (0..self.len).step_by(PIECE as usize) {
            self.piece_out(off)?;
        }
        Ok(())
    }

    fn piece_out(&mut self, off: u64) -> anyhow::Result<()> {
        match &mut self.pages {
            Pages::Shared { mapping, memory } => {
                let range = AddrRange { start: mapping.addr() + off, len: PIECE };
                let protected = self.uffd.write_protect(range, true, true)?;
                anyhow::ensure!(protected == WpOutcome::Done, "Write protection of the floor's pages: {protected:?}");
                mapping.copy_to(off, &self.device, off, PIECE)?;
                memfd::punch_hole(memory.as_fd(), off, PIECE)?;
            }
            Pages::Private { memory, aside, out, .. } => {
                let (from, to) = (memory.addr() + off, aside.addr());
                whole(PIECE, |done| self.uffd.move_pages(to + done, from + done, PIECE - done, false))?;
                aside.read(0, &mut out[off as usize..(off + PIECE) as usize])?;
                aside.advise(0, PIECE, ProgramAdvice::DontNeed)?;
            }
        }
        Ok(())
    }

    /// All of it comes home, piece by piece; `done` is told after each how much there is.
    pub fn home(&self, mut done: impl FnMut(u64)) -> anyhow::Result<()> {
        for off in (0..self.len).step_by(PIECE as usize) {
            self.piece_home(off)?;
            done(off + PIECE);
        }
        Ok(())
    }

    fn piece_home(&self, off: u64) -> anyhow::Result<()> {
        let to = self.addr() + off;
        match &self.pages {
            Pages::Private { fresh, out, .. } if self.kind == Kind::Huge => {
                fresh.advise(0, PIECE, ProgramAdvice::PopulateWrite)?;
                fresh.write(0, &out[off as usize..(off + PIECE) as usize])?;
                whole(PIECE, |done| self.uffd.move_pages(to + done, fresh.addr() + done, PIECE - done, false))
            }
            _ => whole(PIECE, |done| {
                self.uffd.copy(to + done, &self.device, off + done, PIECE - done, CopyMode::default())
            }),
        }
    }

    fn addr(&self) -> u64 {
        match &self.pages {
            Pages::Shared { mapping, .. } => mapping.addr(),
            Pages::Private { memory, .. } => memory.addr(),
        }
    }

    /// Reads what is there.
    pub fn read(&self, off: u64, into: &mut [u8]) -> anyhow::Result<()> {
        match &self.pages {
            Pages::Shared { mapping, .. } => mapping.read(off, into)?,
            Pages::Private { memory, .. } => memory.read(off, into)?,
        }
        Ok(())
    }
}
