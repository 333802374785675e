//! The table: system calls and capabilities by kind of service.

use uhmm_kernel_hook::confine::Capability;

use crate::{Call, Only, Role};

/// What the C library and the standard library do in any program.
const RUNTIME: &[&str] = &[
    "access",
    "arch_prctl",
    "brk",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "dup",
    "dup2",
    "dup3",
    "execve",
    "exit",
    "exit_group",
    "faccessat",
    "faccessat2",
    "fcntl",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getpid",
    "getppid",
    "getrandom",
    "getrlimit",
    "gettid",
    "gettimeofday",
    "getuid",
    "lseek",
    "lstat",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "poll",
    "ppoll",
    "pread64",
    "preadv",
    "preadv2",
    "prlimit64",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readlink",
    "readlinkat",
    "readv",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "rt_sigtimedwait",
    "sched_getaffinity",
    "sched_setaffinity",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "setrlimit",
    "sigaltstack",
    "stat",
    "statfs",
    "statx",
    "sysinfo",
    "time",
    "uname",
    "write",
    "writev",
    "getcpu",
    "membarrier",
    "tgkill",
];
/// The event loop, sockets that somebody else has bound, memory that is shared by descriptor.
const SERVICE: &[&str] = &[
    "accept",
    "accept4",
    "connect",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "eventfd2",
    "fallocate",
    "fsync",
    "ftruncate",
    "getpeername",
    "getsockname",
    "getsockopt",
    "memfd_create",
    "mlock",
    "mlock2",
    "msync",
    "munlock",
    "pselect6",
    "recvfrom",
    "recvmsg",
    "select",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "signalfd4",
    "socketpair",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
];
/// Watches clients, keeps their descriptors by a process of its own, locks its memory.
const PAGER: &[&str] =
    &["clone", "mlockall", "munlockall", "pidfd_open", "pidfd_send_signal", "setpgid", "wait4", "waitid"];
/// With `network = true`.
pub const NETWORK: &[&str] = &["bind", "listen", "recvmmsg", "sendmmsg", "socket"];

/// ioctl families and numbers.
const TERMINAL_AND_NONBLOCK: &[u32] = &[0x5401, 0x5413, 0x5421, 0x5451];
const FAMILY_USERFAULTFD: u32 = 0xaa00;
/// PROCMAP_QUERY, PAGEMAP_SCAN.
const FAMILY_FILESYSTEM: u32 = 0x6600;
/// VFIO and iommufd.
const FAMILY_VFIO: u32 = 0x3b00;
/// Names, dumpable, no_new_privs, names of mappings.
const PRCTL: &[u32] = &[1, 2, 3, 4, 15, 16, 21, 38, 39, 0x5356_4d41];

/// What a kind of service may call, sorted.
#[must_use]
pub fn calls(role: Role) -> Vec<Call> {
    let families: &[u32] = match role {
        Role::Pager => &[FAMILY_USERFAULTFD, FAMILY_FILESYSTEM],
        Role::Vfio => &[FAMILY_VFIO],
        Role::Supervisor | Role::Holder | Role::Mirror | Role::Software | Role::VfioUser => &[],
    };
    let more: &[&str] = if role == Role::Pager { PAGER } else { &[] };
    let plain = |name: &&str| Call { name: (*name).to_owned(), only: None };
    let mut calls: Vec<Call> = RUNTIME.iter().chain(SERVICE).chain(more).map(plain).collect();
    let mut limited = |name: &str, only| calls.push(Call { name: name.to_owned(), only: Some(only) });
    limited("socket", Only::Unix);
    limited("prctl", Only::Options(PRCTL.to_vec()));
    limited("ioctl", Only::Ioctls { numbers: TERMINAL_AND_NONBLOCK.to_vec(), families: families.to_vec() });
    if role != Role::Pager {
        limited("clone", Only::Threads);
    }
    calls.sort();
    calls
}

/// What is left of the supervisor's capabilities.
#[must_use]
pub fn capabilities(role: Role) -> &'static [Capability] {
    match role {
        // fork events of clients' userfaultfds; memory that is locked.
        Role::Pager => &[Capability::IpcLock, Capability::SysPtrace],
        // Memory that is pinned for DMA.
        Role::Vfio => &[Capability::IpcLock],
        Role::Supervisor | Role::Holder | Role::Mirror | Role::Software | Role::VfioUser => &[],
    }
}
