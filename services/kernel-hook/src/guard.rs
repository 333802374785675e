//! A process that watches over one child and can be told from anywhere to end it.
//!
//! A process of another pid namespace, user or user namespace cannot be killed by a signal, and neither can the container engine be asked by
//! everybody who must be sure that a process is dead. A socket goes everywhere:
//!
//! ```text
//!   guard --fork--> child, which gives `far` to whoever may end it (in a message)
//!     | near: one byte --> SIGKILL      SIGTERM, SIGINT --> SIGTERM      child ended --> ends too, with its status
//! ```
//! In a container the guard is process 1, so its own death ends the child; elsewhere the kernel is asked to do that.

use std::io;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Signal;

use crate::error::HookError;
use crate::process::PidFd;
use crate::signal::StopSignals;
use crate::socket::{RecvStatus, SeqPacket};

/// Splits this process in two: the parent stays as the guard and never returns, the child goes on with what ends it when it is sent a byte.
/// Call it before there are other threads: they exist in the guard only.
///
/// # Errors
/// `Call`: EAGAIN, ENOMEM, EMFILE.
pub fn stand() -> Result<SeqPacket, HookError> {
    let (near, far) = SeqPacket::pair()?;
    let guard = std::process::id();
    // SAFETY: there is one thread, so the child has a whole copy of this process.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(HookError::failed("fork", io::Error::last_os_error())),
        0 => {
            drop(near);
            die_with(guard)?;
            Ok(far)
        }
        child => {
            drop(far);
            let code = watch(child, &near).unwrap_or_else(|_| {
                // A child that nobody watches must not go on: whoever has `far` relies on it.
                // SAFETY: a system call without pointers, on a child that is not reaped.
                unsafe { libc::kill(child, libc::SIGKILL) };
                reap(child)
            });
            // SAFETY: ends this process at once; exit handlers and buffers are the child's.
            unsafe { libc::_exit(code) }
        }
    }
}

fn die_with(guard: u32) -> Result<(), HookError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| HookError::failed("prctl(PR_SET_PDEATHSIG)", error))?;
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get() as u32);
    if parent == guard { Ok(()) } else { Err(HookError::failed("fork", Errno::SRCH)) }
}

/// Until the child has ended; its status as a shell gives it.
fn watch(child: libc::pid_t, near: &SeqPacket) -> Result<i32, HookError> {
    let pidfd = PidFd::open(child as u32)?;
    // Orphans of a container come to its first process.
    let signals = if std::process::id() == 1 { StopSignals::block_with_children()? } else { StopSignals::block()? };
    let mut asked = true;
    loop {
        let mut entries = vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        if asked {
            entries.push(PollFd::from_borrowed_fd(near.as_fd(), PollFlags::IN));
        }
        match poll(&mut entries, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(HookError::failed("poll", error)),
        }
        let ready: Vec<bool> = entries.iter().map(|entry| !entry.revents().is_empty()).collect();
        drop(entries);
        if ready[0] {
            return Ok(reap(child));
        }
        match ready[1].then(|| signals.take()).transpose()?.flatten() {
            Some(libc::SIGCHLD) => {
                if let Some(code) = reap_all(child) {
                    return Ok(code);
                }
            }
            Some(_) => drop(pidfd.signal(Signal::TERM)?),
            None => {}
        }
        if ready.get(2) == Some(&true) {
            match near.recv(&mut [0], &mut Vec::new(), 0)? {
                RecvStatus::Message { .. } => drop(pidfd.signal(Signal::KILL)?),
                RecvStatus::WouldBlock => {}
                // Nobody can ask any more, the child neither: it is about to end.
                RecvStatus::Closed => asked = false,
            }
        }
    }
}

fn reap(child: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: the kernel writes one int, which is a local.
    while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return 1;
        }
    }
    code_of(status)
}

/// Whoever has ended; the status of the child, if it was among them.
fn reap_all(child: libc::pid_t) -> Option<i32> {
    loop {
        let mut status = 0;
        // SAFETY: the kernel writes one int, which is a local.
        match unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) } {
            ended if ended == child => return Some(code_of(status)),
            ended if ended <= 0 => return None,
            _ => {}
        }
    }
}

fn code_of(status: libc::c_int) -> i32 {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::event::Timespec;

    use super::*;
    use crate::fork::{Child, Ended, fork_child};
    use crate::socket::SendStatus;

    const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

    /// A guard whose child does that; what ends the child, and the child's pidfd.
    fn guarded(work: impl FnOnce() -> i32) -> (Child, SeqPacket, PidFd) {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let guard = fork_child(move || {
            let far = stand().unwrap();
            let own = PidFd::open(std::process::id()).unwrap();
            drop(theirs.send(b"x", &[far.as_fd(), own.as_fd()]));
            drop(far);
            work()
        });
        let mut fds: Vec<OwnedFd> = Vec::new();
        assert_eq!(poll(&mut [PollFd::new(&ours, PollFlags::IN)], Some(&PATIENCE)), Ok(1));
        let RecvStatus::Message { .. } = ours.recv(&mut [0], &mut fds, 2).unwrap() else { panic!("no message") };
        let pidfd = PidFd::from_fd(fds.pop().unwrap());
        (guard.unwrap(), SeqPacket::from_fd(fds.pop().unwrap()).unwrap(), pidfd)
    }

    fn sleep_for_ever() -> i32 {
        loop {
            let _ = poll(&mut [], None);
        }
    }

    fn ends(pidfd: &PidFd) -> bool {
        poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&PATIENCE)) == Ok(1)
    }

    #[test]
    fn one_byte_ends_the_child_and_the_guard_says_how() {
        let (guard, far, child) = guarded(sleep_for_ever);
        assert!(!child.exited().unwrap());
        assert_eq!(far.send(b"k", &[]).unwrap(), SendStatus::Sent);
        assert!(ends(&child));
        assert_eq!(guard.wait().unwrap(), Ended::Code(128 + libc::SIGKILL));
    }

    #[test]
    fn a_childs_own_end_is_the_guards() {
        let (guard, far, _) = guarded(|| 7);
        drop(far);
        assert_eq!(guard.wait().unwrap(), Ended::Code(7));
    }

    #[test]
    fn stopping_the_guard_stops_the_child_and_killing_it_too() {
        let (guard, _far, child) = guarded(sleep_for_ever);
        guard.pidfd().signal(Signal::TERM).unwrap();
        assert!(ends(&child));
        assert_eq!(guard.wait().unwrap(), Ended::Code(128 + libc::SIGTERM));
        let (guard, _far, child) = guarded(sleep_for_ever);
        guard.kill().unwrap();
        assert!(ends(&child));
        guard.wait().unwrap();
    }

    #[test]
    fn nobody_left_who_could_ask_is_no_order() {
        let (guard, far, child) = guarded(sleep_for_ever);
        drop(far);
        assert_eq!(
            poll(&mut [PollFd::new(&child, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 })),
            Ok(0)
        );
        guard.kill().unwrap();
        assert!(ends(&child));
    }
}
