//! Scratch blocks: what is empty, what holds something, what is one huge page.
//!
//! ```text
//!   free (not registered, empty) --take_block--> in use (registered) --last page gone--> free, or kept as a huge page
//! ```

use std::os::fd::AsFd;

use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::{AddrRange, Advice, HookError, PAGE_SIZE, RegisterMode, Window, own_memory};

use super::{Executor, HUGE_BYTES};

/// Huge pages kept for arrivals.
const KEPT_HUGE_MAX: usize = 4;

/// 2 MiB of scratch.
pub(super) struct Block {
    pub(super) memory: Window,
    /// Offset of the aligned part.
    pub(super) head: u64,
    /// Pages of it that are taken.
    pub(super) used: u64,
    /// All of it is one huge page.
    pub(super) huge: bool,
    /// Locked like the memory that it holds: UFFDIO_MOVE wants both alike.
    pub(super) locked: bool,
}

impl Block {
    pub(super) fn range(&self) -> AddrRange {
        AddrRange { start: self.memory.addr() + self.head, len: HUGE_BYTES }
    }

    pub(super) fn addr_of(&self, page: u64) -> u64 {
        self.range().start + page * PAGE_SIZE
    }
}

impl Executor {
    /// An empty, registered block.
    pub(super) fn take_block(&mut self) -> Result<usize, HookError> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let memory = Window::anonymous(2 * HUGE_BYTES)?;
                memory.advise(0, memory.len(), Advice::DontFork)?;
                let head = memory.addr().next_multiple_of(HUGE_BYTES) - memory.addr();
                self.blocks.push(Block { memory, head, used: 0, huge: false, locked: false });
                self.blocks.len() - 1
            }
        };
        self.uffd.register(self.blocks[index].range(), RegisterMode::WP)?;
        Ok(index)
    }

    /// A block that is one huge page, if the kernel has one.
    pub(super) fn huge_block(&mut self) -> Result<Option<usize>, HookError> {
        if let Some(block) = self.kept_huge.pop() {
            return Ok(Some(block));
        }
        let block = self.take_block()?;
        let Block { memory, head, .. } = &self.blocks[block];
        memory.advise(*head, HUGE_BYTES, Advice::HugePage)?;
        memory.advise(*head, HUGE_BYTES, Advice::PopulateWrite)?;
        let range = self.blocks[block].range();
        let runs = pagemap::scan(self.pagemap.as_fd(), range, Categories::HUGE)?;
        if runs.iter().map(|run| run.end - run.start).sum::<u64>() == HUGE_BYTES {
            return Ok(Some(block));
        }
        self.empty(block)?;
        Ok(None)
    }

    pub(super) fn free_if_empty(&mut self, block: usize) -> Result<(), HookError> {
        if self.blocks[block].used > 0 {
            return Ok(());
        }
        if std::mem::take(&mut self.blocks[block].huge)
            && !self.blocks[block].locked
            && self.kept_huge.len() < KEPT_HUGE_MAX
        {
            self.kept_huge.push(block);
            return Ok(());
        }
        self.empty(block)
    }

    pub(super) fn lock(&mut self, block: usize, on: bool) -> Result<(), HookError> {
        own_memory::lock(self.blocks[block].range(), on)?;
        self.blocks[block].locked = on;
        Ok(())
    }

    /// Gives a block's memory back to the kernel, without an event.
    pub(super) fn empty(&mut self, block: usize) -> Result<(), HookError> {
        if self.blocks[block].locked {
            self.lock(block, false)?;
        }
        let Block { memory, head, .. } = &self.blocks[block];
        self.uffd.unregister(self.blocks[block].range())?;
        memory.advise(*head, HUGE_BYTES, Advice::DontNeed)?;
        self.free.push(block);
        Ok(())
    }
}

impl Drop for Executor {
    /// Unmapping a registered range would wait until the pager has read of it.
    fn drop(&mut self) {
        for block in &self.blocks {
            if let Err(error) = self.uffd.unregister(block.range()) {
                tracing::debug!(%error, "A scratch block stays registered");
            }
        }
    }
}
