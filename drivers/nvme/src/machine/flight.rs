//! What a command in flight is for.

use std::time::Duration;

use crate::machine::{Request, RequestId, Step};

/// A command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flight {
    pub(crate) owner: Owner,
    /// Late from then on.
    pub(crate) until: Duration,
    /// An abort was sent.
    pub(crate) aborting: bool,
}

impl Flight {
    pub(crate) fn new(owner: Owner, until: Duration) -> Self {
        Self { owner, until, aborting: false }
    }

    /// The request that it is for.
    pub(crate) fn work(&self) -> Option<Work> {
        match self.owner {
            Owner::Request(work) => Some(work),
            _ => None,
        }
    }

    /// A command of the last incarnation.
    pub fn orphan() -> Self {
        Self::new(Owner::Orphan, Duration::ZERO)
    }
}

/// Who waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The setup.
    Setup(Step),
    /// A request.
    Request(Work),
    /// A late command.
    Abort,
    /// Nobody any more.
    Orphan,
    /// The adoption: it shows that the queue works, and moves the doorbell by one in any case.
    Probe,
}

/// A request that has not ended: it is in flight or waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    /// How often it failed by its own fault.
    pub(crate) attempts: u8,
}
