//! fork: what a process does before it forks; and for programs that test uhmm, a closure that runs in the child, which then exits
//! without destructors.

use std::io;
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, Signal};

use crate::error::HookError;
use crate::process::PidFd;
use crate::sys::errno_of;

/// What runs before every fork of this process, and whether that could be arranged (an errno otherwise).
static BEFORE: OnceLock<(fn(), i32)> = OnceLock::new();

/// From now on `before` runs in every thread that forks through the C library, before the child exists; also in children, when they
/// fork. A panic of it ends the process. Only the first call counts: a process has one such thing to do. Not for vfork, posix_spawn and
/// bare system calls.
///
/// # Errors
/// `Call`: ENOMEM.
pub fn before_fork(before: fn()) -> Result<(), HookError> {
    extern "C" fn prepare() {
        if let Some((before, _)) = BEFORE.get() {
            before();
        }
    }
    let (_, error) = BEFORE.get_or_init(|| {
        // SAFETY: the handler is a function of this program, which stays as long as the process.
        (before, unsafe { libc::pthread_atfork(Some(prepare), None, None) })
    });
    match *error {
        0 => Ok(()),
        error => Err(HookError::failed("pthread_atfork", io::Error::from_raw_os_error(error))),
    }
}

/// A fork that the kernel gives up when the address space was copied already, as with a full control group of pids: there is no room
/// for the child's pidfd. Returns the error number.
///
/// # Errors
/// `Call` when the limit of descriptors cannot be set; `Strange` when a child was made after all (it has ended).
pub fn fork_in_vain() -> Result<i32, HookError> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let set = |limit| {
        rustix::process::setrlimit(Resource::Nofile, limit)
            .map_err(|error| HookError::failed("setrlimit(NOFILE)", error))
    };
    set(Rlimit { current: Some(0), ..limit })?;
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: a fork without a stack of its own. A child that exists ends at once; `pidfd` outlives the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    let error = io::Error::last_os_error();
    if pid == 0 {
        // SAFETY: ends this process at once.
        unsafe { libc::_exit(0) };
    }
    set(limit)?;
    if pid > 0 {
        reap(pid as libc::pid_t)?;
        return Err(HookError::Strange { call: "clone(CLONE_PIDFD)", detail: "a child was made".into() });
    }
    Ok(errno_of(&error))
}

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
    // The child is ours and not reaped, so its number means it.
    match PidFd::open(pid as u32) {
        Ok(pidfd) => Ok(Child { pid: pid as u32, pidfd, reaped: false }),
        Err(error) => {
            // Nobody would ever wait for it.
            // SAFETY: a system call without pointers, on a child of ours that is not reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            reap(pid).map_or_else(Err, |_| Err(error))
        }
    }
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

    /// Ends it at once (SIGKILL). One that has ended already is no error.
    ///
    /// # Errors
    /// `Call`.
    pub fn kill(&self) -> Result<(), HookError> {
        self.pidfd.signal(Signal::KILL).map(drop)
    }

    /// Waits for its end and reaps it.
    ///
    /// # Errors
    /// `Call`: ECHILD when it was reaped already.
    pub fn wait(mut self) -> Result<Ended, HookError> {
        self.reaped = true;
        reap(self.pid as libc::pid_t)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Where it could not be killed, waiting could take for ever.
        if !self.reaped && self.kill().is_ok() {
            drop(reap(self.pid as libc::pid_t));
        }
    }
}

fn reap(pid: libc::pid_t) -> Result<Ended, HookError> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int.
        let rc = unsafe { libc::waitpid(pid, &mut status, 0) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_runs_its_body_and_tells_how_it_ended() {
        assert_eq!(fork_child(|| 7).unwrap().wait().unwrap(), Ended::Code(7));
        assert_eq!(fork_child(|| std::process::abort()).unwrap().wait().unwrap(), Ended::Signal(libc::SIGABRT));
    }

    #[test]
    fn a_panic_in_the_body_ends_the_child_with_101_and_not_the_parent() {
        let child = fork_child(|| panic!("on purpose")).unwrap();
        assert_eq!(child.wait().unwrap(), Ended::Code(101));
    }

    #[test]
    fn a_killed_child_tells_the_signal_and_killing_it_twice_is_no_error() {
        let child = fork_child(wait_for_ever).unwrap();
        child.kill().unwrap();
        while !child.pidfd().exited().unwrap() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap(), Ended::Signal(libc::SIGKILL));
    }

    #[test]
    fn a_dropped_child_is_killed() {
        let child = fork_child(wait_for_ever).unwrap();
        let pidfd = child.pidfd().try_clone().unwrap();
        assert!(!pidfd.exited().unwrap());
        drop(child);
        assert!(pidfd.exited().unwrap());
        assert_eq!(pidfd.pid().unwrap(), None, "nothing is left to wait for");
    }

    fn wait_for_ever() -> i32 {
        loop {
            std::thread::park();
        }
    }
}
