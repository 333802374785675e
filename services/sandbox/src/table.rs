//! The table: system calls and capabilities by kind of service.

use uhmm_kernel_hook::confine::Capability;

use crate::{Call, Only, Role};

/// What the C library and the standard library do in any program.
#[rustfmt::skip]
const RUNTIME: &[&str] = &[
    "access", "arch_prctl", "brk", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "dup", "dup2", "dup3", "execve", "exit",
    "exit_group", "faccessat", "faccessat2", "fstat", "fstatfs", "futex", "getcwd", "getdents64", "getegid", "geteuid", "getgid",
    "getpid", "getppid", "getrandom", "getrlimit", "gettid", "gettimeofday", "getuid", "lseek", "lstat", "madvise", "mmap", "mprotect",
    "mremap", "munmap", "nanosleep", "newfstatat", "open", "openat", "poll", "ppoll", "pread64", "preadv", "preadv2", "pwrite64", "pwritev",
    "pwritev2", "read", "readlink", "readlinkat", "readv", "restart_syscall", "rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn",
    "rt_sigtimedwait", "sched_getaffinity", "sched_yield", "set_robust_list", "set_tid_address", "setrlimit", "sigaltstack", "stat",
    "statfs", "statx", "sysinfo", "time", "uname", "write", "writev", "getcpu", "membarrier",
];
/// The event loop, sockets that somebody else has bound, memory that is shared by descriptor.
#[rustfmt::skip]
const SERVICE: &[&str] = &[
    "accept", "accept4", "connect", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd2", "fallocate",
    "fsync", "ftruncate", "getpeername", "getsockname", "getsockopt", "memfd_create", "mlock", "mlock2", "msync", "munlock", "pselect6",
    "recvfrom", "recvmsg", "select", "sendmsg", "sendto", "setsockopt", "shutdown", "signalfd4", "socketpair", "timerfd_create",
    "timerfd_gettime", "timerfd_settime",
];
/// Calls whose first argument is a process: this one alone. Some copy memory that may vanish under them by asking the kernel.
const OWN: &[&str] = &["prlimit64", "process_vm_readv", "process_vm_writev", "sched_setaffinity", "tgkill"];
/// Watches clients, keeps their descriptors by a process of its own, locks its memory.
const PAGER: &[&str] =
    &["clone", "mlockall", "munlockall", "pidfd_open", "pidfd_send_signal", "setpgid", "wait4", "waitid"];
/// Direct I/O to a file that is nobody else's, many transfers at once.
const FILE: &[&str] =
    &["fdatasync", "flock", "io_uring_enter", "io_uring_register", "io_uring_setup", "sync_file_range", "unlink"];
/// With `network = true`.
pub const NETWORK: &[&str] = &["bind", "listen", "recvmmsg", "sendmmsg", "socket"];

/// ioctl families and numbers.
const TERMINAL_AND_NONBLOCK: &[u32] = &[0x5401, 0x5413, 0x5421, 0x5451];
const FAMILY_USERFAULTFD: u32 = 0xaa00;
/// PROCMAP_QUERY, PAGEMAP_SCAN.
const FAMILY_FILESYSTEM: u32 = 0x6600;
/// Block devices.
const FAMILY_BLOCK: u32 = 0x1200;
/// VFIO and iommufd.
const FAMILY_VFIO: u32 = 0x3b00;
/// Names, dumpable, no_new_privs, the auxiliary vector, names of mappings.
const PRCTL: &[u32] = &[1, 2, 3, 4, 15, 16, 21, 38, 39, 0x4155_5856, 0x5356_4d41];

/// Duplicates, flags, locks, pipes, seals. Not F_SETOWN and F_SETSIG, by which the kernel sends signals to others.
const FCNTL: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1033, 1034];

/// What a kind of service may call, sorted.
#[must_use]
pub fn calls(role: Role) -> Vec<Call> {
    let families: &[u32] = match role {
        Role::Pager => &[FAMILY_USERFAULTFD, FAMILY_FILESYSTEM],
        Role::Vfio => &[FAMILY_VFIO],
        Role::File => &[FAMILY_BLOCK],
        Role::Holder | Role::Mirror | Role::Software | Role::Remote | Role::VfioUser => &[],
    };
    let more: &[&str] = match role {
        Role::Pager => PAGER,
        Role::File => FILE,
        _ => &[],
    };
    let plain = |name: &&str| Call { name: (*name).to_owned(), only: None };
    let mut calls: Vec<Call> = RUNTIME.iter().chain(SERVICE).chain(more).map(plain).collect();
    let mut limited = |name: &str, only| calls.push(Call { name: name.to_owned(), only: Some(only) });
    OWN.iter().for_each(|name| limited(name, Only::Own));
    limited("socket", Only::Unix);
    limited("prctl", Only::Options(PRCTL.to_vec()));
    limited("fcntl", Only::Second(FCNTL.to_vec()));
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
        // Buffers that io_uring pins.
        Role::File => &[Capability::IpcLock],
        Role::Holder | Role::Mirror | Role::Software | Role::Remote | Role::VfioUser => &[],
    }
}
