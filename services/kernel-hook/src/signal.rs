//! Signals as a readable descriptor, so that one event loop hears of them like of everything else.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::HookError;

/// SIGTERM and SIGINT of this process, blocked and readable. Children started through `std` get an empty mask.
#[derive(Debug)]
pub struct StopSignals {
    fd: OwnedFd,
}

impl StopSignals {
    /// Blocks both signals in the calling thread: call it in `main`, before any other thread exists.
    pub fn block() -> Result<Self, HookError> {
        let call = |name| move || HookError::call(name, None, std::io::Error::last_os_error());
        // SAFETY: `set` is a local, fully initialised by sigemptyset before any other use; the calls have no other memory effects.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::sigaddset(&mut set, libc::SIGINT);
            if libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
                return Err(call("pthread_sigmask")());
            }
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(call("signalfd")());
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }
}

/// Ends this process when nobody reads its output any more (`uhmm status | head`), as other tools do: Rust's runtime ignores SIGPIPE.
/// For programs that only print; sockets are not concerned, their sends ask for no signal.
pub fn end_when_output_is_closed() {
    // SAFETY: sets the default action, which no other code of this process relies on being another.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
