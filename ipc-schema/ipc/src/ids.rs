//! Names of the things a [`Reactor`](crate::Reactor) holds. Slots are reused, names are not: each carries the slot's
//! generation, so a name that outlived its connection finds nothing instead of a stranger.

use std::fmt;
use std::time::Instant;

/// An accepted connection. Never reused by the reactor that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// An outgoing link; survives reconnects. Never reused by the reactor that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// A call. On outgoing links unique for the life of the reactor; on accepted connections chosen by the caller and unique
/// among the connection's unanswered calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u64);

/// A running timer, for [`cancel_timer`](crate::Reactor::cancel_timer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerId {
    pub(crate) at: Instant,
    pub(crate) sequence: u64,
}

/// The owner's name for a timer, given back by [`Wake::Timer`](crate::Wake::Timer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerToken(pub u64);

/// The owner's name for a descriptor, given back by [`Wake::Fd`](crate::Wake::Fd).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdToken(pub u64);

impl fmt::Display for ConnId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conn {}.{}", self.index, self.generation)
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}.{}", self.index, self.generation)
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "call {}", self.0)
    }
}
