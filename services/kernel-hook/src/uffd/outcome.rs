//! What became of a fill: how much was done, and why it stopped.
//!
//! The kernel answers with an error number and a count field, and EAGAIN has three meanings: an event must be read first, the
//! fill stopped in the middle, or (before 6.15) the count was not written at all. Here they are told apart once and for all:
//!
//! ```text
//!   rc 0                          everything done
//!   rc -1, count > 0              that many bytes done; the next call tells why the rest was not    -> Again
//!   rc -1, count <= 0             nothing done, errno says why (count is 0 or -errno)
//! ```

use std::io;

use crate::sys::errno_of;

/// Why a fill did not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillStop {
    /// Events must be read first, or the rest must be asked for again to learn its reason: read events, then go on.
    Again,
    /// Somebody was faster: the next page is there already. Wake its waiters, go on behind it.
    Exists,
    /// The process is gone (ESRCH).
    NoProcess,
    /// The range is not mapped or not registered any more (ENOENT).
    Gone,
    /// CONTINUE over a hole of the page cache (EFAULT).
    NoPage,
    /// Memory (of the client's cgroup, or all) is exhausted.
    NoMemory,
    /// A page is pinned or shared (EBUSY), for `move_pages`.
    Busy,
    /// Any other error number.
    Other(i32),
}

/// How far a fill came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct FillOutcome {
    /// Bytes done from the start of the range, a multiple of the page size.
    pub done_bytes: u64,
    /// None when all is done.
    pub stop: Option<FillStop>,
}

/// Which call's error numbers these are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Copy,
    Continue,
    Other,
}

impl FillOutcome {
    /// Whether the whole range was filled.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.stop.is_none()
    }

    pub(super) fn interpret(answer: io::Result<i32>, count: i64, len: u64, kind: Kind) -> Self {
        match answer {
            Ok(_) => Self { done_bytes: len, stop: None },
            Err(_) if count > 0 => Self { done_bytes: (count as u64).min(len), stop: Some(FillStop::Again) },
            Err(error) => Self { done_bytes: 0, stop: Some(stop_of(errno_of(&error), kind)) },
        }
    }
}

fn stop_of(errno: i32, kind: Kind) -> FillStop {
    match errno {
        libc::EAGAIN => FillStop::Again,
        libc::EEXIST => FillStop::Exists,
        libc::ESRCH => FillStop::NoProcess,
        libc::ENOENT => FillStop::Gone,
        libc::ENOMEM | libc::ENOSPC => FillStop::NoMemory,
        libc::EBUSY => FillStop::Busy,
        libc::EFAULT if kind == Kind::Continue => FillStop::NoPage,
        other => FillStop::Other(other),
    }
}

/// What became of a change of write protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum WpOutcome {
    /// The whole range is changed.
    Done,
    /// Events must be read first; part may be changed. Repeat.
    Again,
    /// The process is gone.
    NoProcess,
    /// The range is not mapped or not registered any more.
    Gone,
}

impl WpOutcome {
    pub(super) fn of_errno(errno: i32) -> Option<Self> {
        match errno {
            libc::EAGAIN => Some(Self::Again),
            libc::ESRCH => Some(Self::NoProcess),
            libc::ENOENT => Some(Self::Gone),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(errno: i32, count: i64, kind: Kind) -> FillOutcome {
        FillOutcome::interpret(Err(io::Error::from_raw_os_error(errno)), count, 16384, kind)
    }

    fn nothing(stop: FillStop) -> FillOutcome {
        FillOutcome { done_bytes: 0, stop: Some(stop) }
    }

    #[test]
    fn the_three_meanings_of_eagain_are_told_apart() {
        assert_eq!(failed(libc::EAGAIN, -11, Kind::Copy), nothing(FillStop::Again));
        assert_eq!(failed(libc::EAGAIN, 0, Kind::Copy), nothing(FillStop::Again));
        let partial = FillOutcome { done_bytes: 8192, stop: Some(FillStop::Again) };
        assert_eq!(failed(libc::EAGAIN, 8192, Kind::Copy), partial);
    }

    #[test]
    fn success_is_the_whole_length_whatever_the_count_says() {
        let done = FillOutcome::interpret(Ok(0), 0, 16384, Kind::Other);
        assert_eq!(done, FillOutcome { done_bytes: 16384, stop: None });
        assert!(done.is_complete());
    }

    #[test]
    fn error_numbers_keep_their_meaning_per_call() {
        assert_eq!(failed(libc::EEXIST, -17, Kind::Copy), nothing(FillStop::Exists));
        assert_eq!(failed(libc::EFAULT, -14, Kind::Continue), nothing(FillStop::NoPage));
        assert_eq!(failed(libc::EFAULT, -14, Kind::Copy), nothing(FillStop::Other(libc::EFAULT)));
        assert_eq!(failed(libc::ESRCH, 0, Kind::Copy), nothing(FillStop::NoProcess));
        assert_eq!(failed(libc::ENOENT, -2, Kind::Copy), nothing(FillStop::Gone));
        assert_eq!(failed(libc::ENOMEM, -12, Kind::Copy), nothing(FillStop::NoMemory));
        assert_eq!(failed(libc::EBUSY, -16, Kind::Other), nothing(FillStop::Busy));
        assert_eq!(failed(libc::EINVAL, 0, Kind::Other), nothing(FillStop::Other(libc::EINVAL)));
        assert_eq!(WpOutcome::of_errno(libc::EAGAIN), Some(WpOutcome::Again));
        assert_eq!(WpOutcome::of_errno(libc::EINVAL), None);
    }
}
