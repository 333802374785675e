//! What a process does before a fatal signal ends it: it asks one of its threads for something and waits for it, bounded. For core dumps, which
//! cannot wait for a page that lives elsewhere.
//!
//! ```text
//!   [thread] crashes -> on_fatal: ASKED, tgkill(SIGURG) --> [helper] was_asked -> ... -> answer: ANSWERED, FUTEX_WAKE
//!                          `-- FUTEX_WAIT, at most `patience` --> default action again; the signal comes once more and ends the process
//! ```
//! The handler may run anywhere, with any lock held: it makes system calls and touches the statics below, nothing else.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use std::{io, mem, ptr};

use crate::error::HookError;
use crate::secluded::Summons;

static ASKED: AtomicBool = AtomicBool::new(false);
/// A futex.
static ANSWERED: AtomicU32 = AtomicU32::new(0);
static PROCESS: AtomicI32 = AtomicI32::new(0);
static HELPER: AtomicI32 = AtomicI32::new(0);
static PATIENCE_NS: AtomicU64 = AtomicU64::new(0);

/// Those whose default action is a core dump.
const FATAL: [libc::c_int; 10] = [
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// From now on `helper` is asked before a signal ends the process whose default action is a core dump. Signals that the program handles or ignores
/// are left alone; so are those of forked children. Returns how many signals are handled now.
///
/// # Errors
/// `Call`: sigaction was refused.
pub fn ask_before(helper: Summons, patience: Duration) -> Result<usize, HookError> {
    let (process, thread) = helper.ids();
    PATIENCE_NS.store(u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    HELPER.store(thread, Ordering::Relaxed);
    PROCESS.store(process, Ordering::Release);
    let mut handled = 0;
    for signal in FATAL {
        // SAFETY: both are locals; all zeros is a valid sigaction.
        let (rc, now) = unsafe {
            let mut now: libc::sigaction = mem::zeroed();
            (libc::sigaction(signal, ptr::null(), &mut now), now)
        };
        if rc != 0 {
            return Err(HookError::failed("sigaction", io::Error::last_os_error()));
        }
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fatal;
        let ours = now.sa_sigaction == handler as usize;
        if now.sa_sigaction == libc::SIG_DFL || ours {
            set(signal, handler as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)?;
            handled += 1;
        }
    }
    Ok(handled)
}

fn set(signal: libc::c_int, action: usize, flags: libc::c_int) -> Result<(), HookError> {
    // SAFETY: a local that is filled in; `action` is SIG_DFL or a handler that keeps to what signal handlers may do.
    let rc = unsafe {
        let mut wanted: libc::sigaction = mem::zeroed();
        libc::sigemptyset(&mut wanted.sa_mask);
        wanted.sa_sigaction = action;
        wanted.sa_flags = flags;
        libc::sigaction(signal, &wanted, ptr::null_mut())
    };
    if rc == 0 { Ok(()) } else { Err(HookError::failed("sigaction", io::Error::last_os_error())) }
}

/// The helper, when it was woken: whether somebody asks. True once.
#[must_use]
pub fn was_asked() -> bool {
    // SAFETY: no memory is concerned.
    let me = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
    me == HELPER.load(Ordering::Relaxed) && ASKED.swap(false, Ordering::AcqRel)
}

/// The helper: it is done, or cannot be. Whoever waits goes on to its end.
pub fn answer() {
    ANSWERED.store(1, Ordering::Release);
    // SAFETY: a futex call on a static.
    unsafe { libc::syscall(libc::SYS_futex, ANSWERED.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX) };
}

fn now_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a local; safe in signal handlers.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: no memory is concerned; both are safe in signal handlers.
    let (process, thread) = unsafe { (libc::getpid(), libc::syscall(libc::SYS_gettid) as i32) };
    if process == PROCESS.load(Ordering::Acquire) {
        ask_and_wait(process);
    }
    // A signal that an instruction has raised is raised by it again. What somebody has sent must be sent again.
    // SAFETY: the kernel gives a valid siginfo to handlers that were set with SA_SIGINFO.
    let by_instruction =
        unsafe { (*info).si_code } > 0 && [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE].contains(&signal);
    let reset = set(signal, libc::SIG_DFL, 0).is_ok();
    if !by_instruction || !reset {
        // SAFETY: it is blocked until the handler returns, and ends the process then.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    }
}

fn ask_and_wait(process: i32) {
    let helper = HELPER.load(Ordering::Relaxed);
    let end_ns = now_ns().saturating_add(PATIENCE_NS.load(Ordering::Relaxed));
    ASKED.store(true, Ordering::Release);
    // SAFETY: a signal that the helper blocks, to read it.
    unsafe { libc::syscall(libc::SYS_tgkill, process, helper, crate::secluded::SIGNAL) };
    while ANSWERED.load(Ordering::Acquire) == 0 {
        let left_ns = end_ns.saturating_sub(now_ns());
        if left_ns == 0 {
            return;
        }
        let wait = libc::timespec {
            tv_sec: (left_ns / 1_000_000_000) as libc::time_t,
            tv_nsec: (left_ns % 1_000_000_000) as libc::c_long,
        };
        // SAFETY: a futex call on a static, with a local time.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                ANSWERED.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                0,
                &wait as *const libc::timespec,
            );
        }
    }
}
