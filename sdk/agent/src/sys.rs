//! System calls as instructions, and nothing else: no errno, no cancellation point, no restart. An answer below zero is an error number.

use core::arch::asm;

pub(crate) const EAGAIN: i64 = 11;
pub(crate) const EBUSY: i64 = 16;
pub(crate) const EEXIST: i64 = 17;
pub(crate) const EINTR: i64 = 4;
pub(crate) const EINVAL: i64 = 22;
pub(crate) const ENOENT: i64 = 2;
pub(crate) const ENOMEM: i64 = 12;
pub(crate) const ESRCH: i64 = 3;

pub(crate) const MADV_DONTNEED_LOCKED: u64 = 24;
pub(crate) const MADV_HUGEPAGE: u64 = 14;
pub(crate) const MADV_POPULATE_WRITE: u64 = 23;
pub(crate) const MADV_UNMERGEABLE: u64 = 13;

const WRITE: u64 = 1;
const RT_SIGACTION: u64 = 13;
const RT_SIGPROCMASK: u64 = 14;
const IOCTL: u64 = 16;
const PREAD64: u64 = 17;
const SCHED_YIELD: u64 = 24;
const MADVISE: u64 = 28;
const NANOSLEEP: u64 = 35;
const SETITIMER: u64 = 38;
const CHDIR: u64 = 80;
const SETPGID: u64 = 109;
const MUNLOCK: u64 = 150;
const PRCTL: u64 = 157;
const CLOCK_GETTIME: u64 = 228;
const EXIT_GROUP: u64 = 231;
const UNSHARE: u64 = 272;
const MLOCK2: u64 = 325;
const CLOSE_RANGE: u64 = 436;
const FUTEX_WAITV: u64 = 449;

const CLONE_VM: u64 = 0x100;
const CLOCK_MONOTONIC: u64 = 1;
const SIG_BLOCK: u64 = 0;
const SIG_UNBLOCK: u64 = 1;
const SIGALRM: u64 = 14;
const SIGNALS: u64 = 64;
const SIGSET_BYTES: u64 = 8;
const MLOCK_ONFAULT: u64 = 1;
const FUTEX2_SIZE_U32: u64 = 2;

/// # Safety
/// As the system call: addresses among the arguments are valid for what the kernel does with them.
#[inline(always)]
pub(crate) unsafe fn call(number: u64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let answer: i64;
    // SAFETY: the kernel's calling convention; rcx and r11 are lost. What the call does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as i64 => answer,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    answer
}

/// `Err`: the error number.
#[inline(always)]
fn checked(answer: i64) -> Result<u64, i64> {
    if answer < 0 { Err(-answer) } else { Ok(answer as u64) }
}

/// An ioctl whose argument is plain words. Addresses in them name memory of the agent's or ranges that the kernel checks.
#[inline(always)]
pub(crate) fn ioctl<const WORDS: usize>(fd: i32, number: u64, argument: &mut [u64; WORDS]) -> Result<u64, i64> {
    let at = argument.as_mut_ptr() as u64;
    loop {
        // SAFETY: the number carries the size of its argument, which is that of `argument`; the ioctls of `look.rs` and `orders.rs` write
        // to nothing else but the regions of `Work`, or move and fill pages of ranges whose owner has asked for it.
        match checked(unsafe { call(IOCTL, [fd as u64, number, at, 0, 0, 0]) }) {
            Err(EINTR) => {}
            answer => return answer,
        }
    }
}

pub(crate) fn madvise(addr: u64, len_bytes: u64, advice: u64) -> Result<u64, i64> {
    // SAFETY: scratch, which is the agent's, or pages whose content is valid elsewhere.
    checked(unsafe { call(MADVISE, [addr, len_bytes, advice, 0, 0, 0]) })
}

/// Locks from the first touch on.
pub(crate) fn lock(addr: u64, len_bytes: u64) -> Result<u64, i64> {
    // SAFETY: no byte changes.
    checked(unsafe { call(MLOCK2, [addr, len_bytes, MLOCK_ONFAULT, 0, 0, 0]) })
}

pub(crate) fn unlock(addr: u64, len_bytes: u64) -> Result<u64, i64> {
    // SAFETY: no byte changes.
    checked(unsafe { call(MUNLOCK, [addr, len_bytes, 0, 0, 0, 0]) })
}

/// Reads this address space through /proc/self/mem to memory of the agent's; what is not there is an error, and nobody waits.
pub(crate) fn read_memory(mem: i32, from: u64, to: u64, len_bytes: u64) -> Result<u64, i64> {
    // SAFETY: `to` is inside a staging slot, see `orders.rs`.
    checked(unsafe { call(PREAD64, [mem as u64, to, len_bytes, from, 0, 0]) })
}

/// Copies whole pages between scratch and staging.
#[inline(always)]
pub(crate) fn copy(from: u64, to: u64, len_bytes: u64) {
    // SAFETY: both lie in mappings of the agent's, see `memory.rs`; the program may write there too, and gets what it has earned.
    unsafe {
        asm!(
            "rep movsq",
            inout("rcx") len_bytes / 8 => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Tells an eventfd.
pub(crate) fn tell(event: i32) {
    let one = 1u64;
    // SAFETY: eight bytes that live through the call.
    unsafe { call(WRITE, [event as u64, &raw const one as u64, 8, 0, 0, 0]) };
}

pub(crate) fn let_others_run() {
    // SAFETY: no addresses.
    unsafe { call(SCHED_YIELD, [0; 6]) };
}

pub(crate) fn sleep_ns(ns: u64) {
    let time = [0, ns];
    // SAFETY: a timespec that lives through the call.
    unsafe { call(NANOSLEEP, [time.as_ptr() as u64, 0, 0, 0, 0, 0]) };
}

pub(crate) fn now_ns() -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes a timespec.
    unsafe { call(CLOCK_GETTIME, [CLOCK_MONOTONIC, time.as_mut_ptr() as u64, 0, 0, 0, 0]) };
    let [seconds, ns] = time;
    seconds.wrapping_mul(1_000_000_000).wrapping_add(ns)
}

/// Waits until one of some futexes (address, expected value) changes or is woken, or until a time. An address of 0 is left out.
pub(crate) fn wait(futexes: [(u64, u32); 2], until_ns: Option<u64>) -> Result<u64, i64> {
    let mut waiters = [[0u64; 3]; 2];
    let mut count = 0;
    for ((addr, value), waiter) in futexes.into_iter().filter(|(addr, _)| *addr != 0).zip(&mut waiters) {
        *waiter = [u64::from(value), addr, FUTEX2_SIZE_U32];
        count += 1;
    }
    let until = until_ns.map(|ns| [ns / 1_000_000_000, ns % 1_000_000_000]);
    let time = until.as_ref().map_or(0, |time| time.as_ptr() as u64);
    // SAFETY: waiters and time live through the call; the kernel only reads the words that they name.
    checked(unsafe { call(FUTEX_WAITV, [waiters.as_ptr() as u64, count, 0, time, CLOCK_MONOTONIC, 0]) })
}

/// Whether another process uses this address space. Asking for an address space of one's own is refused (EINVAL) as long as anybody
/// shares it, and changes nothing otherwise. `None`: a filter that was there at birth forbids the question.
pub(crate) fn is_shared() -> Option<bool> {
    // SAFETY: no addresses.
    match checked(unsafe { call(UNSHARE, [CLONE_VM, 0, 0, 0, 0, 0]) }) {
        Ok(_) => Some(false),
        Err(EINVAL) => Some(true),
        Err(_) => None,
    }
}

/// After so much time this process is ended, whatever it waits for; 0: not any more. The kernel waits for the pager inside madvise and
/// can be got out of that by death alone. The next agent does the order again.
pub(crate) fn end_after_s(seconds: u64) {
    let timer = [0, 0, seconds, 0];
    // SAFETY: an itimerval that lives through the call; ITIMER_REAL.
    unsafe { call(SETITIMER, [0, timer.as_ptr() as u64, 0, 0, 0, 0]) };
}

pub(crate) fn exit(code: i32) -> ! {
    loop {
        // SAFETY: ends this process.
        unsafe { call(EXIT_GROUP, [code as u64, 0, 0, 0, 0, 0]) };
    }
}

/// Blocks every signal of the calling thread, those of the C library too; returns those that were blocked before.
pub(crate) fn block_signals() -> u64 {
    let (all, mut before) = (u64::MAX, 0u64);
    // SAFETY: two signal sets of eight bytes.
    unsafe {
        call(RT_SIGPROCMASK, [SIG_BLOCK, &raw const all as u64, &raw mut before as u64, SIGSET_BYTES, 0, 0]);
    }
    before
}

/// Undoes [`block_signals`].
pub(crate) fn restore_signals(before: u64) {
    const SIG_SETMASK: u64 = 2;
    // SAFETY: a signal set of eight bytes.
    unsafe { call(RT_SIGPROCMASK, [SIG_SETMASK, &raw const before as u64, 0, SIGSET_BYTES, 0, 0]) };
}

/// What a new agent does first. The program's handlers are none of ours, nor its descriptors but `kept`: a pipe whose end somebody waits for
/// would never hang up. All signals stay blocked but that of `end_after_s`.
pub(crate) fn become_a_process(kept: [i32; 5]) {
    let default = [0u64; 4];
    for signal in 1..=SIGNALS {
        // SAFETY: SIG_DFL without flags; this process has its own table of handlers.
        unsafe { call(RT_SIGACTION, [signal, default.as_ptr() as u64, 0, SIGSET_BYTES, 0, 0]) };
    }
    let alarm = 1u64 << (SIGALRM - 1);
    let name = *b"uhmm-agent\0\0\0\0\0\0";
    // SAFETY: a signal set, the process's own group, "/" and a name, all of which live through their calls. PR_SET_NAME is the thread's, not
    // the address space's.
    unsafe {
        call(RT_SIGPROCMASK, [SIG_UNBLOCK, &raw const alarm as u64, 0, SIGSET_BYTES, 0, 0]);
        call(SETPGID, [0; 6]);
        call(CHDIR, [c"/".as_ptr() as u64, 0, 0, 0, 0, 0]);
        call(PRCTL, [15, name.as_ptr() as u64, 0, 0, 0, 0]);
    }
    let mut next = 0u64;
    loop {
        let kept_from = kept.iter().filter(|fd| **fd >= 0 && **fd as u64 >= next).map(|fd| *fd as u64).min();
        let last = kept_from.map_or(u64::from(u32::MAX), |fd| fd.wrapping_sub(1));
        if kept_from != Some(next) {
            // SAFETY: nobody else uses this table.
            unsafe { call(CLOSE_RANGE, [next, last, 0, 0, 0, 0]) };
        }
        match kept_from {
            Some(fd) => next = fd.wrapping_add(1),
            None => return,
        }
    }
}
