//! What the pager asks of a client's agent, and the memory that the two share. Part of the pager's messages.

use super::Fd;

/// What the client's agent is asked to do: what Linux lets only the process itself do. All are absolute and repeatable: the pager
/// asks again after a restart. The agent does them one after the other and answers each with [`Call::AgentDone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgentOp {
    /// Take private pages out of the address space (UFFDIO_MOVE to scratch memory) and copy them to the staging slot, page i to
    /// offset i. Pages that cannot be taken stay; so do all pages of a mapping without write permission (answer `ReadOnly`).
    MoveOut {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// Copy pages to the staging slot and leave them where they are: the pager has write-protected them.
    CopyOut {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// The copies are valid elsewhere: give back the scratch pages of `MoveOut`, and with `in_place` the pages that `CopyOut`
    /// left in the address space (MADV_DONTNEED).
    Drop {
        /// See above.
        in_place: bool,
    },
    /// Put the scratch pages of `MoveOut` back where they were. Pages that are not in scratch are where they belong.
    MoveBack,
    /// Bring 512 pages home as one huge page: scratch huge page, copy from the staging slot, UFFDIO_MOVE. Answer `Moved`, or
    /// `Failed` when there is no huge page or the range is not one (the pager then fills small pages).
    FillHuge {
        /// Staging slot of 512 pages.
        slot: u32,
    },
    /// Tell which pages exist in the address space: `Moved` for those that do, `Zero` for holes.
    Probe,
    /// Map frames of a coherent device over the pages of an allocated region. Answer `Moved` when all of them are, else `Failed`.
    MapDevice {
        /// Device.
        device: u8,
        /// Frame of the first page.
        frame: u32,
        /// Of the device's memory: what was given with the queue is no good when it is another.
        generation: u64,
    },
    /// Map the region's own memory again, watched by the pager. `Moved` when no page is a frame any more, `Failed`: ask again.
    UnmapDevice,
}

/// What became of pages under an [`AgentOp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AgentStatus {
    /// Done; for `MoveOut` and `CopyOut` the bytes are in the staging slot.
    Moved,
    /// As `Moved`, and part of a page that was mapped huge.
    MovedHuge,
    /// Nothing but zeros (a hole or the zero page): taken out, nothing in the staging slot.
    Zero,
    /// Pinned, or shared copy-on-write and not separable: stays where it is.
    Busy,
    /// No mapping there.
    Gone,
    /// The mapping may not be written: nothing was done, ask for `CopyOut` under write protection.
    ReadOnly,
    /// It failed for another reason; pages are where they were.
    Failed,
}

/// Neighbouring pages of one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgentRun {
    /// Pages.
    pub page_count: u64,
    /// What became of them.
    pub status: AgentStatus,
}

/// Memory of the agent that the pager works with. Kept in the vault.
#[derive(Clone, Debug)]
pub struct AgentMemory {
    /// /proc/self/maps of the client, opened by the client: PROCMAP_QUERY works on it without any right over the process.
    pub maps: Fd,
    /// Staging memory, sealed: some slots of 2 MiB, and [`DIARY_BYTES`] behind them, which also hold the
    /// [`FillGate`](crate::shared::fill_gate::FillGate).
    pub staging: Fd,
}

/// The agent's diary, at the end of its staging memory: the ranges that it last began to drop with madvise. The event of that names no
/// author, and a new pager must not take it for the program's. [`DIARY_ENTRIES`] times two words, first byte and end.
pub const DIARY_BYTES: u64 = 4096;
/// The agent is never more than one ahead of the event that is being dealt with: madvise returns when its event is read.
pub const DIARY_ENTRIES: u64 = 8;
