//! Mirror interface, for drivers: open a mirror on a process, ask for device faults, acknowledge invalidations.

use super::pager::{MapRun, Memory};

/// Requests to the mirror. All are idempotent.
#[derive(Clone, Debug)]
pub enum Call {
    /// First call of a driver's session.
    Login {
        /// Device id from the plan.
        device: u8,
    },
    /// Mirror a client's space. After the mirror's restart a driver opens all its spaces again.
    Open {
        /// Space.
        space: u64,
        /// The client's token.
        token: Vec<u8>,
    },
    /// Stop mirroring.
    Close {
        /// Space.
        space: u64,
    },
    /// Which region holds this address. ENOENT when none does.
    Lookup {
        /// Space.
        space: u64,
        /// Any address.
        addr: u64,
    },
    /// A device fault: one request resolves as much of the window as it can, `fault_page` at least.
    /// EBUSY: an invalidation of the window ran meanwhile; ask again (HMM's read_begin / read_retry).
    Fault {
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// First page of the window.
        first_page: u64,
        /// Pages of the window.
        page_count: u64,
        /// The page the job stands on.
        fault_page: u64,
        /// The access was a write.
        write: bool,
        /// See the pager's `Resolve`.
        whole: bool,
        /// See the pager's `Resolve`.
        exclusive: bool,
    },
    /// The device has really stopped using the range of this invalidation.
    Ack {
        /// From [`Event::Invalidate`].
        id: u64,
    },
}

/// Answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// Answer to `Lookup`.
    Region {
        /// Region id.
        region: u64,
        /// First address.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
        /// Devices may not write.
        device_read_only: bool,
        /// The backing, granted for in-place mappings.
        memory: Memory,
    },
    /// Answer to `Fault`.
    Mapped {
        /// Sequence number of the space at `read_begin`.
        sequence: u64,
        /// What to install.
        runs: Vec<MapRun>,
    },
}

/// Downward events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Remove these device mappings, wait until the device has stopped using them, then call `Ack`.
    Invalidate {
        /// Echo it.
        id: u64,
        /// Space.
        space: u64,
        /// Region.
        region: u64,
        /// First page inside the region.
        first_page: u64,
        /// Pages.
        page_count: u64,
        /// Drop the region's table altogether.
        unmap: bool,
        /// Sequence number of the space from now on.
        sequence: u64,
    },
    /// The client is gone: drop its mirror, fail its jobs.
    SpaceGone {
        /// Space.
        space: u64,
    },
}
