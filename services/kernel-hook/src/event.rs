//! A counter that wakes an event loop of another process: signal as often as you like, the reader sees it once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use crate::error::HookError;

/// A non-blocking, close-on-exec eventfd. Send its descriptor to share it; it has no state that a crash could break.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// Makes one that is not signalled.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn new() -> Result<Self, HookError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = rustix::event::eventfd(0, flags)
            .map_err(|error| HookError::hinted("eventfd", error, "Raise the descriptor limit (ulimit -n)"))?;
        Ok(Self { fd })
    }

    /// Takes one that came over a socket. The peer may have changed its blocking flag, so it is set again.
    ///
    /// # Errors
    /// `Call` when the descriptor's flags cannot be set.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HookError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| HookError::failed("FIONBIO", error))?;
        Ok(Self { fd })
    }

    /// Wakes the reader. Never blocks; a counter that is full is already signalled.
    ///
    /// # Errors
    /// `Call` when the descriptor is not an eventfd.
    pub fn signal(&self) -> Result<(), HookError> {
        match rustix::io::write(&self.fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(HookError::failed("write(eventfd)", error)),
        }
    }

    /// Takes all signals: how many there were since the last time, 0 for none.
    ///
    /// # Errors
    /// `Call` when the descriptor is not an eventfd.
    pub fn drain(&self) -> Result<u64, HookError> {
        let mut count = [0u8; 8];
        match rustix::io::read(&self.fd, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(HookError::failed("read(eventfd)", error)),
        }
    }

    /// A second handle of the same counter.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, HookError> {
        let fd = self.fd.try_clone().map_err(|error| HookError::failed("dup(eventfd)", error))?;
        Ok(Self { fd })
    }

    /// Gives the descriptor away.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_takes_every_signal_once() {
        let event = EventFd::new().unwrap();
        let peer = event.try_clone().unwrap();
        assert_eq!(event.drain().unwrap(), 0);
        peer.signal().unwrap();
        peer.signal().unwrap();
        assert_eq!(event.drain().unwrap(), 2);
        assert_eq!(event.drain().unwrap(), 0);
    }
}
