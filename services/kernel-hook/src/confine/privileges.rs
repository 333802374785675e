//! Capabilities and the account, by bare system calls.

use std::io;

/// Capabilities that services of uhmm may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Capability {
    /// Locked memory without a limit (pinning for DMA).
    IpcLock,
    /// fork events of a userfaultfd.
    SysPtrace,
}

impl Capability {
    /// The kernel's word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IpcLock => "CAP_IPC_LOCK",
            Self::SysPtrace => "CAP_SYS_PTRACE",
        }
    }

    pub(crate) fn bit(self) -> u64 {
        1 << match self {
            Self::IpcLock => 14,
            Self::SysPtrace => 19,
        }
    }
}

/// As many as an unsigned word can name; the kernel knows fewer.
const CAPABILITIES: u64 = 63;
/// The kernel's mark of the calls' present form.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Head {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The effective ones of the calling thread, as bits.
#[must_use]
pub fn own_capabilities() -> u64 {
    let mut head = Head { version: VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: head and two sets are what this version reads and writes.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut head, sets.as_mut_ptr()) };
    if got == 0 { u64::from(sets[0].effective) | u64::from(sets[1].effective) << 32 } else { 0 }
}

/// Leaves `kept` of what the process has, in every set: a program that it executes has just these, whoever its user is.
pub(super) fn keep_only(kept: u64) -> io::Result<()> {
    let kept = kept & own_capabilities();
    for number in (0..CAPABILITIES).filter(|number| kept & (1 << number) == 0) {
        // SAFETY: a call without pointers. EINVAL: no such capability; EPERM: this process may not, and then has none to lose.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
    }
    let mut head = Head { version: VERSION_3, pid: 0 };
    let half = |bits: u32| Sets { effective: bits, permitted: bits, inheritable: bits };
    let sets = [half(kept as u32), half((kept >> 32) as u32)];
    // SAFETY: head and two sets, as above.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut head, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: calls without pointers. A kernel without ambient capabilities has none to clear.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    for number in (0..CAPABILITIES).filter(|number| kept & (1 << number) != 0) {
        // SAFETY: as above.
        if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Becomes another user and keeps its capabilities for [`keep_only`].
pub(super) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // By bare calls: the C library would tell other threads, and a forked child has none. No memory is concerned but an empty list.
    // SAFETY: calls without pointers, and an empty list.
    let done = unsafe {
        libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, gid, gid, gid) == 0
            && libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0
    };
    if done { restore_effective() } else { Err(io::Error::last_os_error()) }
}

/// A change of the user empties the effective set; the permitted one was kept.
fn restore_effective() -> io::Result<()> {
    let mut head = Head { version: VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: head and two sets are what this version reads and writes.
    let done = unsafe {
        let got = libc::syscall(libc::SYS_capget, &raw mut head, sets.as_mut_ptr());
        sets.iter_mut().for_each(|set| set.effective = set.permitted);
        got == 0 && libc::syscall(libc::SYS_capset, &raw mut head, sets.as_ptr()) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
