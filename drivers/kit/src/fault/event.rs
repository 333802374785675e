//! What the fault book is told, and what it says.

use std::time::Duration;

use uhmm_ipc::message::WireError;
use uhmm_ipc::message::pager::MapRun;

use crate::device::{FaultId, JobId, PageRange, RegionKey};

/// An outstanding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WindowId(pub u64);

/// What a pause was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Ask for a window again.
    Window(WindowId),
    /// Look up in this space again.
    Lookup(u64),
}

/// What a range fault wants beside the page it stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FaultRange {
    /// First address behind the range.
    pub end: u64,
    /// The pages shall be the device's alone.
    pub exclusive: bool,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum FaultEvent {
    /// A job stands on an address.
    Fault {
        /// What to resume.
        fault: FaultId,
        /// Its job.
        job: JobId,
        /// Space.
        space: u64,
        /// Address.
        addr: u64,
        /// The access was a write.
        write: bool,
        /// A range fault: everything from the address on.
        range: Option<FaultRange>,
    },
    /// Answer to [`FaultAction::Lookup`].
    Found {
        /// The region.
        key: RegionKey,
        /// Its first address.
        addr: u64,
        /// Its pages.
        page_count: u64,
    },
    /// Answer to [`FaultAction::Lookup`].
    LookupFailed {
        /// Space that was asked about.
        space: u64,
        /// Why.
        error: WireError,
    },
    /// Answer to [`FaultAction::Attach`]: faults of the region may be sent now.
    Attached {
        /// The region.
        key: RegionKey,
    },
    /// Answer to [`FaultAction::Attach`]: the device cannot map the region.
    AttachFailed {
        /// The region.
        key: RegionKey,
        /// Why.
        error: WireError,
    },
    /// Answer to [`FaultAction::Ask`], after the install.
    Installed {
        /// The window.
        window: WindowId,
        /// What the mirror answered.
        runs: Vec<MapRun>,
        /// Pages that lost a race meanwhile.
        refused: Vec<u64>,
    },
    /// Answer to [`FaultAction::Ask`].
    Failed {
        /// The window.
        window: WindowId,
        /// Why.
        error: WireError,
    },
    /// The pause of [`FaultAction::RetryAfter`] is over.
    RetryDue(Retry),
    /// The region is gone; its table has been dropped.
    Unmapped {
        /// The region.
        key: RegionKey,
    },
    /// The space is gone, and its jobs with it.
    SpaceGone {
        /// Space.
        space: u64,
    },
    /// The job was cancelled: its faults need no answer.
    JobGone {
        /// Job.
        job: JobId,
    },
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// Ask the mirror which region holds the address.
    Lookup {
        /// Whose fault it is for.
        job: JobId,
        /// Space.
        space: u64,
        /// Address.
        addr: u64,
    },
    /// Make the device's table of the region, and show it to the pager.
    Attach {
        /// The region that was found.
        key: RegionKey,
    },
    /// The region is not there any more: revoke, quiesce, drop its table. No answer expected.
    Drop {
        /// The region.
        key: RegionKey,
    },
    /// Begin the pages under the nonce, then ask the mirror.
    Ask {
        /// Names the answer.
        window: WindowId,
        /// Whose fault it is for.
        job: JobId,
        /// Region.
        key: RegionKey,
        /// The window.
        pages: PageRange,
        /// The page that must be mapped.
        fault_page: u64,
        /// It will be written.
        write: bool,
        /// The whole window from the page on is wanted.
        range: Option<FaultRange>,
        /// Never 0, never the one before.
        nonce: u32,
    },
    /// Pages that the answer did not cover become invalid again.
    Abandon {
        /// Region.
        key: RegionKey,
        /// The window.
        pages: PageRange,
        /// Of the question.
        nonce: u32,
    },
    /// The fault is over.
    Resume {
        /// Which.
        fault: FaultId,
        /// Touch the page again, or fail.
        outcome: Result<(), WireError>,
    },
    /// Come back with [`FaultEvent::RetryDue`].
    RetryAfter {
        /// With this.
        retry: Retry,
        /// After this time.
        after: Duration,
    },
}
