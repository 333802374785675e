//! Signals as a readable descriptor, so that one event loop hears of them like of everything else.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::HookError;

/// SIGTERM and SIGINT of this process, blocked and readable. Children started through `std` inherit the mask: see
/// [`StopSignals::not_for`].
#[derive(Debug)]
pub struct StopSignals {
    fd: OwnedFd,
    before: Mask,
}

/// Of a thread.
#[derive(Clone, Copy)]
struct Mask(libc::sigset_t);

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mask")
    }
}

impl StopSignals {
    /// Blocks both signals in the calling thread: call it in `main`, before any other thread exists.
    pub fn block() -> Result<Self, HookError> {
        Self::block_these(&[libc::SIGTERM, libc::SIGINT])
    }

    /// What a program is sent to end, reload or report, for who stands before it and passes it on: and SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2.
    pub fn block_to_pass_on() -> Result<Self, HookError> {
        Self::block_these(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2])
    }

    /// And SIGCHLD: children that nobody else waits for.
    pub(crate) fn block_with_children() -> Result<Self, HookError> {
        Self::block_these(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD])
    }

    fn block_these(signals: &[libc::c_int]) -> Result<Self, HookError> {
        let call = |name| move || HookError::call(name, None, std::io::Error::last_os_error());
        // SAFETY: both sets are locals; `set` is fully initialised by sigemptyset before any other use, the kernel writes `before`, which all
        // zeros is valid for; the calls have no other memory effects.
        let (fd, before) = unsafe {
            let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, *signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut before) != 0 {
                return Err(call("pthread_sigmask")());
            }
            (libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK), Mask(before))
        };
        if fd < 0 {
            return Err(call("signalfd")());
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, before })
    }

    /// The child that the command starts takes its signals as this thread did before: what is blocked here is this process's own affair.
    pub fn not_for(&self, command: &mut Command) {
        let Mask(before) = self.before;
        let unblock = move || {
            // SAFETY: a mask that the kernel gave; the call may be made between fork and exec.
            match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) } {
                0 => Ok(()),
                number => Err(std::io::Error::from_raw_os_error(number)),
            }
        };
        // SAFETY: the closure makes one system call on a copy of its own: no allocation, no lock.
        unsafe { command.pre_exec(unblock) };
    }

    /// One that came, if there is one.
    pub(crate) fn take(&self) -> Result<Option<libc::c_int>, HookError> {
        Ok(self.take_one()?.map(|came| came.number))
    }

    /// One that came, if there is one, and who it is from.
    ///
    /// # Errors
    /// `Call`.
    pub fn take_one(&self) -> Result<Option<Came>, HookError> {
        const SI_KERNEL: i32 = 0x80;
        let mut one = [0; size_of::<libc::signalfd_siginfo>()];
        let word = |one: &[u8], at: usize| i32::from_ne_bytes([one[at], one[at + 1], one[at + 2], one[at + 3]]);
        match rustix::io::read(&self.fd, &mut one) {
            // `ssi_signo`, `ssi_errno`, `ssi_code`.
            Ok(_) => Ok(Some(Came { number: word(&one, 0), by_kernel: word(&one, 8) == SI_KERNEL })),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(HookError::failed("read(signalfd)", error)),
        }
    }
}

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Came {
    /// Its number.
    pub number: i32,
    /// A terminal sent it to the whole process group (Ctrl-C), so that the others there have got it too.
    pub by_kernel: bool,
}

/// Runs `act` with every signal blocked in the calling thread, then puts the mask back. A thread that `act` starts inherits the blocked
/// mask and so never runs a handler of the program. (The C library keeps the two signals that it needs itself.)
///
/// # Errors
/// `Call`; `act` has not run then.
pub fn with_all_blocked<T>(act: impl FnOnce() -> T) -> Result<T, HookError> {
    /// Puts the mask back, also when `act` panics.
    struct Before(libc::sigset_t);
    impl Drop for Before {
        fn drop(&mut self) {
            // SAFETY: a mask that the kernel gave; no other memory is touched.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
        }
    }
    // SAFETY: both sets are locals; sigfillset initialises the first, the kernel writes the second, which all zeros is valid for.
    let (rc, before) = unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        (libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before), before)
    };
    if rc != 0 {
        return Err(HookError::call("pthread_sigmask", None, std::io::Error::from_raw_os_error(rc)));
    }
    let _before = Before(before);
    Ok(act())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    /// In a thread of its own, whose mask is of no use to anybody else.
    #[test]
    fn a_child_is_started_with_the_mask_of_before() {
        let of_child = |given_back: bool| {
            let stop = StopSignals::block_to_pass_on().unwrap();
            let mut command = Command::new("/bin/grep");
            command.args(["SigBlk", "/proc/self/status"]);
            if given_back {
                stop.not_for(&mut command);
            }
            let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
            u64::from_str_radix(said.trim_start_matches("SigBlk:").trim(), 16).unwrap()
        };
        let masks = std::thread::spawn(move || (blocked(), of_child(true), blocked(), of_child(false)));
        let (before, given_back, here, inherited) = masks.join().unwrap();
        assert_eq!((given_back, inherited), (before, here));
        assert!(here != before && here >> (libc::SIGTERM - 1) & 1 == 1);
    }

    #[test]
    fn a_thread_that_is_started_inside_has_all_signals_blocked_and_the_caller_its_own_mask_again() {
        let before = blocked();
        let inside = with_all_blocked(|| std::thread::spawn(blocked)).unwrap().join().unwrap();
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGUSR1, libc::SIGALRM, libc::SIGTERM, libc::SIGCHLD, 64] {
            assert!(inside >> (signal - 1) & 1 == 1, "signal {signal} is not in {inside:x}");
        }
        assert_eq!(blocked(), before);
    }
}
