//! What the pager works with of a client's agent (its orders are no messages: `uhmm_shared::agent`), and what it asks of the client about
//! frames of coherent devices. Part of the pager's messages.

use super::Fd;

/// Which memory the client shall map at pages of an allocated region. Both are absolute and repeatable: the pager asks again after a
/// restart. The client does them one after the other and answers each with [`Call::FramesDone`](super::pager::Call::FramesDone).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FramesOp {
    /// Frames of a coherent device.
    MapDevice {
        /// Device.
        device: u8,
        /// Frame of the first page.
        frame: u32,
        /// Of the device's memory: what was given with the queue is no good when it is another.
        generation: u64,
    },
    /// The region's own memory again, watched by the pager. Not done: ask again.
    UnmapDevice,
}

/// Descriptors of a client that the pager works with. Kept in the vault. None of them gives a right over the client that its
/// userfaultfd does not give.
#[derive(Clone, Debug)]
pub struct AgentMemory {
    /// /proc/self/maps of the client, opened by the client: PROCMAP_QUERY works on it without any right over the process.
    pub maps: Fd,
    /// /proc/self/pagemap, likewise: PAGEMAP_SCAN.
    pub pagemap: Fd,
    /// /proc/self/smaps, likewise: what a forked child finds empty (MADV_WIPEONFORK).
    pub smaps: Fd,
    /// Staging memory, sealed: [`SLOTS`](uhmm_shared::agent::SLOTS) slots of 2 MiB.
    pub staging: Fd,
    /// Orders and answers, sealed: [`WORDS`](uhmm_shared::agent::WORDS) words.
    pub orders: Fd,
    /// The eventfd by which the agent tells that there are answers.
    pub done: Fd,
    /// Pidfd of the agent; `None`: it is a thread of the client.
    pub agent: Option<Fd>,
}
