//! A thread with a corner of its own: its descriptors are not the program's, no signal of the program's lands on it, it is woken without a
//! descriptor, and others learn of its death.
//!
//! A library's thread that lives in a program shares what the program is free to do away with. A daemon closes all descriptors, and the next files that
//! it opens get their numbers: a library that wrote its eight bytes to "its" eventfd would write them into somebody's file. So:
//!
//! ```text
//!   signal::with_all_blocked(spawn) -> [thread] own_descriptors, own_folders, SummonsFd::new, LifeMark::hold
//!   program's threads: Summons::call --tgkill(SIGURG, blocked there)--> signalfd of the thread's own table --> its event loop
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use crate::error::HookError;
use crate::window::Window;

/// Ignored unless somebody wants it: should one get through, nothing happens.
pub(crate) const SIGNAL: libc::c_int = libc::SIGURG;
/// The kernel's mark in the word of a robust futex whose holder has died.
const FUTEX_OWNER_DIED: u32 = 1 << 30;

/// From now on the calling thread (and threads that it makes) has a table of descriptors of its own, with `kept` and, as 0 to 2,
/// /dev/null: copies of the program's would keep pipes open whose end somebody waits for.
///
/// # Errors
/// `Call`: ENOMEM; EPERM or ENOSYS where a filter forbids close_range.
pub fn own_descriptors(kept: &[BorrowedFd<'_>]) -> Result<(), HookError> {
    let mut numbers: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    numbers.sort_unstable();
    let unshare = |first: u32, last: u32, flags: libc::c_uint| {
        // SAFETY: with UNSHARE the table is the thread's own, so nobody else's descriptor is closed; `kept` are left out.
        match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
            0 => Ok(()),
            _ => Err(HookError::failed("close_range", io::Error::last_os_error())),
        }
    };
    unshare(u32::MAX, u32::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    let mut next = 0u32;
    for number in numbers.iter().map(|number| *number as u32) {
        if number > next {
            unshare(next, number - 1, 0)?;
        }
        next = number + 1;
    }
    unshare(next, u32::MAX, 0)?;
    // Numbers below 3 that are free now are taken in turn; if one of `kept` has such a number, it stays.
    for number in (0..3).filter(|number| !numbers.contains(number)) {
        // SAFETY: a name that ends with a zero; the descriptor belongs to this table until the thread ends.
        let opened = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
        debug_assert!(opened < 0 || opened == number);
    }
    Ok(())
}

/// From now on the calling thread has a root and a working directory of its own: chroot and chdir of the program do not move it.
///
/// # Errors
/// `Call`: EPERM where a filter forbids unshare.
pub fn own_folders() -> Result<(), HookError> {
    // SAFETY: no memory is concerned.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(()),
        _ => Err(HookError::failed("unshare(CLONE_FS)", io::Error::last_os_error())),
    }
}

/// Wakes a thread's event loop, from any thread of its process.
#[derive(Clone, Copy, Debug)]
pub struct Summons {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Summons {
    /// Process and thread.
    pub(crate) fn ids(&self) -> (libc::pid_t, libc::pid_t) {
        (self.process, self.thread)
    }

    /// Wakes it; many calls may be told as one. `false`: the thread has ended.
    ///
    /// # Errors
    /// `Call`: EPERM where a filter forbids tgkill.
    pub fn call(&self) -> Result<bool, HookError> {
        // SAFETY: a signal to a thread of this process that blocks it.
        match unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, SIGNAL) } {
            0 => Ok(true),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
                error => Err(HookError::hinted("tgkill", error, "Let the program's seccomp filter allow tgkill")),
            },
        }
    }
}

/// Where a thread hears of its [`Summons`].
#[derive(Debug)]
pub struct SummonsFd {
    fd: OwnedFd,
}

impl SummonsFd {
    /// For the calling thread, whose signals are blocked.
    ///
    /// # Errors
    /// `Call`: EMFILE.
    pub fn new() -> Result<(Self, Summons), HookError> {
        // SAFETY: a local set, initialised before its use.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, SIGNAL);
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(HookError::failed("signalfd", io::Error::last_os_error()));
        }
        // SAFETY: signalfd returned a new descriptor that nobody else owns; the other two calls have no preconditions.
        let (fd, process, thread) =
            unsafe { (OwnedFd::from_raw_fd(fd), libc::getpid(), libc::syscall(libc::SYS_gettid) as libc::pid_t) };
        Ok((Self { fd }, Summons { process, thread }))
    }

    /// Takes all that have come.
    pub fn drain(&self) {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.fd, &mut info).is_ok_and(|len| len > 0) {}
    }
}

impl AsFd for SummonsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Tells whoever shares the memory that a thread has died: by exit, exec, a signal, or alone. A robust mutex that the thread holds.
#[derive(Debug)]
pub struct LifeMark {
    window: Arc<Window>,
    offset: u64,
    /// Of the lock word in the mutex; 0 before it was held.
    word: u64,
}

/// Bytes that a mark takes.
pub const LIFE_MARK_BYTES: u64 = size_of::<libc::pthread_mutex_t>() as u64;

impl LifeMark {
    /// Makes a mark at an offset (a multiple of 16) of memory that is never managed: the kernel reads it while the thread dies.
    ///
    /// # Errors
    /// `OutOfWindow`, `Call`.
    pub fn new(window: Arc<Window>, offset: u64) -> Result<Self, HookError> {
        let mutex = window.at_mut(offset, LIFE_MARK_BYTES)?.cast::<libc::pthread_mutex_t>();
        // SAFETY: that many bytes of a live mapping that this mark owns, aligned; the attributes are a local.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attributes);
            libc::pthread_mutexattr_setpshared(&mut attributes, libc::PTHREAD_PROCESS_SHARED);
            libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST);
            let made = libc::pthread_mutex_init(mutex, &attributes);
            libc::pthread_mutexattr_destroy(&mut attributes);
            match made {
                0 => Ok(Self { window, offset, word: 0 }),
                error => Err(HookError::failed("pthread_mutex_init", io::Error::from_raw_os_error(error))),
            }
        }
    }

    fn mutex(&self) -> *mut libc::pthread_mutex_t {
        std::ptr::with_exposed_provenance_mut((self.window.addr() + self.offset) as usize)
    }

    /// The calling thread is marked from now on. Returns the address of the futex word: the thread's number while it lives.
    ///
    /// # Errors
    /// `Call`; `Strange` when the C library keeps no such word.
    pub fn hold(&mut self) -> Result<u64, HookError> {
        // SAFETY: the mutex was initialised in `new`, and nobody else locks it.
        let (error, thread) =
            unsafe { (libc::pthread_mutex_lock(self.mutex()), libc::syscall(libc::SYS_gettid) as u32) };
        if error != 0 {
            return Err(HookError::failed("pthread_mutex_lock", io::Error::from_raw_os_error(error)));
        }
        // Which of its words the kernel looks at is the C library's business; it is the first one with the thread's number.
        let offsets = (self.offset..self.offset + LIFE_MARK_BYTES).step_by(4);
        let mut holding = offsets.filter(|offset| self.window.load_u32(*offset).is_ok_and(|word| word == thread));
        let found = holding.next().ok_or_else(|| HookError::Strange {
            call: "pthread_mutex_lock",
            detail: "no word of a robust mutex holds its owner's number".into(),
        })?;
        self.word = self.window.addr() + found;
        Ok(self.word)
    }

    /// The thread that holds it is about to end, and that is no death.
    pub fn release(&self) {
        // SAFETY: held by the calling thread since `hold`.
        unsafe { libc::pthread_mutex_unlock(self.mutex()) };
    }

    /// For other threads, after `hold`.
    #[must_use]
    pub fn watch(&self) -> LifeWatch {
        let offset = self.word.checked_sub(self.window.addr());
        LifeWatch { window: self.window.clone(), offset }
    }
}

/// Sees what becomes of the thread that holds a [`LifeMark`].
#[derive(Clone, Debug)]
pub struct LifeWatch {
    window: Arc<Window>,
    /// Of the lock word; `None`: nobody held it.
    offset: Option<u64>,
}

impl LifeWatch {
    /// Whether it has died without having released the mark.
    #[must_use]
    pub fn is_orphaned(&self) -> bool {
        let word = self.offset.map(|offset| self.window.atomic_u32(offset));
        word.is_some_and(|word| word.is_ok_and(|word| word.load(Acquire) & FUTEX_OWNER_DIED != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal::with_all_blocked;
    use crate::{EventFd, memfd};
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn a_secluded_thread_keeps_its_descriptors_and_the_program_keeps_its_own() {
        let ours = Arc::new(EventFd::new().unwrap());
        let kept = ours.clone();
        let number = ours.as_fd().as_raw_fd();
        let body = move || {
            own_descriptors(&[kept.as_fd()]).unwrap();
            let (summons_fd, _) = SummonsFd::new().unwrap();
            let late = memfd::create_sealed("uhmm-secluded", 4096).unwrap();
            kept.signal().unwrap();
            let own = std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
            drop(summons_fd);
            (late.as_raw_fd(), own)
        };
        let thread = with_all_blocked(|| std::thread::spawn(body)).unwrap();
        let (late, own) = thread.join().unwrap();
        assert_eq!(ours.drain().unwrap(), 1, "the same file under the same number {number}");
        assert!(own <= 8, "{own} descriptors: 0 to 2, the kept one, two of its own, the folder that lists them");
        // SAFETY: only asks whether the number names something here.
        let flags = unsafe { libc::fcntl(late, libc::F_GETFD) };
        let here = std::fs::read_link(format!("/proc/self/fd/{late}")).unwrap_or_default();
        assert!(
            flags < 0 || !here.to_string_lossy().contains("uhmm-secluded"),
            "its memfd is not in the program's table"
        );
    }

    #[test]
    fn a_summons_wakes_the_thread_and_tells_when_it_has_ended() {
        let (sender, summons) = std::sync::mpsc::channel();
        let body = move || {
            let (fd, summons) = SummonsFd::new().unwrap();
            sender.send(summons).unwrap();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
            fd.drain();
        };
        let thread = with_all_blocked(|| std::thread::spawn(body)).unwrap();
        let summons = summons.recv().unwrap();
        assert!(summons.call().unwrap());
        thread.join().unwrap();
        while summons.call().unwrap() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_mark_tells_of_a_death_and_not_of_an_end() {
        for (ends, orphaned) in [(true, false), (false, true)] {
            let window = Arc::new(Window::anonymous(4096).unwrap());
            let mut mark = LifeMark::new(window, 0).unwrap();
            let mark = std::thread::spawn(move || {
                let word = mark.hold().unwrap();
                assert!(word >= mark.window.addr() && !mark.watch().is_orphaned());
                if ends {
                    mark.release();
                }
                mark
            });
            let mark = mark.join().unwrap();
            assert_eq!(mark.watch().is_orphaned(), orphaned);
        }
    }
}
