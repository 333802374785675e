//! fork, for programs that test uhmm: a closure runs in the child, which then exits without destructors.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::error::HookError;
use crate::process::PidFd;

/// A child made by [`fork_child`]. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: PidFd,
    reaped: bool,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Forks. `body` runs in the child, whose only thread is this one; its result is the exit code, 101 after a panic.
///
/// The body should do little: locks that other threads of the parent held at this instant are held for ever in the child (the
/// allocator's are not: the C library takes care of them).
///
/// # Errors
/// `Call`: EAGAIN, ENOMEM.
pub fn fork_child(body: impl FnOnce() -> i32) -> Result<Child, HookError> {
    // SAFETY: the child runs `body` and exits; it never returns into the parent's frames and runs none of their destructors.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(HookError::failed("fork", io::Error::last_os_error()));
    }
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
        // SAFETY: ends this process at once, without exit handlers of the parent's program.
        unsafe { libc::_exit(code) };
    }
    // SAFETY: a system call without pointers; the child is ours and not reaped, so its number means it.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(HookError::failed("pidfd_open", io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made this descriptor for us.
    let pidfd = PidFd::from_fd(unsafe { OwnedFd::from_raw_fd(raw as libc::c_int) });
    Ok(Child { pid: pid as u32, pidfd, reaped: false })
}

impl Child {
    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// For signals and for waiting without reaping.
    #[must_use]
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Waits for its end and reaps it.
    ///
    /// # Errors
    /// `Call`: ECHILD when it was reaped already.
    pub fn wait(mut self) -> Result<Ended, HookError> {
        self.reap()
    }

    fn reap(&mut self) -> Result<Ended, HookError> {
        self.reaped = true;
        let mut status = 0;
        loop {
            // SAFETY: the kernel writes one int.
            let rc = unsafe { libc::waitpid(self.pid as libc::pid_t, &mut status, 0) };
            if rc >= 0 {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(HookError::failed("waitpid", error));
            }
        }
        if libc::WIFEXITED(status) {
            Ok(Ended::Code(libc::WEXITSTATUS(status)))
        } else {
            Ok(Ended::Signal(libc::WTERMSIG(status)))
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // SAFETY: a system call without pointers, on a child of ours that is not reaped.
            unsafe { libc::kill(self.pid as libc::pid_t, libc::SIGKILL) };
            drop(self.reap());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_runs_its_body_and_tells_how_it_ended() {
        assert_eq!(fork_child(|| 7).unwrap().wait().unwrap(), Ended::Code(7));
        assert_eq!(fork_child(|| std::process::abort()).unwrap().wait().unwrap(), Ended::Signal(libc::SIGABRT));
    }

    #[test]
    fn a_dropped_child_is_killed() {
        let child = fork_child(|| loop {
            std::thread::park();
        })
        .unwrap();
        let pidfd = child.pidfd().try_clone().unwrap();
        assert!(!pidfd.exited().unwrap());
        drop(child);
        assert!(pidfd.exited().unwrap());
    }
}
