//! What becomes of an answer of the core.

use uhmm_ipc::message::pager::Rest;

use crate::home::Whose;

/// What an answer of the core is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// The client (or mirror) is told.
    Tell,
    /// Device mappings: page numbers count from the segment's first page; `read_only` pages are mapped so.
    Map {
        /// The client may not write there either, or advice says so.
        read_only: bool,
    },
    /// As `Tell`; private pages rest on their way.
    Rested(Rest),
    /// As `Tell`; the client only thinks that the pages will be needed.
    Prefetched,
    /// Evicted pages are counted.
    CountEvicted,
    /// Devices have lost what they may not do any more: answered when they have let go of what ended there, too.
    LetGo {
        /// First address.
        addr: u64,
        /// Bytes; 0: nothing ended.
        len_bytes: u64,
        /// Told what devices have mappings of.
        tells: bool,
    },
    /// Every page of a process is at home.
    Home {
        /// Whose.
        who: Whose,
        /// Pages that have come before.
        before: u64,
    },
    /// Every page of a space is at home: it ends, and its process goes on.
    Close {
        /// Which.
        space: u64,
    },
    /// The range is at home: it is not managed any more.
    Release {
        /// First address.
        addr: u64,
        /// Bytes.
        len_bytes: u64,
    },
}

impl Then {
    /// Of one of several requests behind a call: the call's own turn comes when all are through.
    pub(crate) fn of_a_piece(self) -> Self {
        if matches!(self, Self::Rested(_)) { self } else { Self::Tell }
    }
}
