//! What a hostile driver tries, one by one: for the program that shows that each attempt is refused. Nothing else calls it.
//!
//! Whatever succeeds does no harm that outlives this process, but for the neighbour that a test gives it to kill.

use std::ffi::CString;
use std::io;
use std::path::Path;

/// Whom it is hostile to.
#[derive(Clone, Debug, Default)]
pub struct Victims {
    /// A client, and an address of its memory.
    pub client: (u32, u64),
    /// A process that may be killed.
    pub neighbour: u32,
}

type Attempt = (&'static str, fn(&Victims) -> io::Result<()>);

fn call(number: libc::c_long, args: [usize; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the callers below give numbers and addresses of their own locals, which live until the call returns.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn plain(number: libc::c_long, args: &[usize]) -> io::Result<()> {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    call(number, all).map(drop)
}

fn open(path: &str, flags: i32) -> io::Result<()> {
    let path = CString::new(path)?;
    let opened =
        call(libc::SYS_openat, [libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0o600, 0, 0])?;
    plain(libc::SYS_close, &[opened as usize])
}

fn transfer(victims: &Victims, number: libc::c_long) -> io::Result<()> {
    let mut bytes = [0u8; 8];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let addr = std::ptr::without_provenance_mut(victims.client.1 as usize);
    let remote = libc::iovec { iov_base: addr, iov_len: bytes.len() };
    let (local, remote) = (&raw const local as usize, &raw const remote as usize);
    plain(number, &[victims.client.0 as usize, local, 1, remote, 1, 0])
}

fn with_pidfd(pid: u32, then: impl FnOnce(usize) -> io::Result<()>) -> io::Result<()> {
    then(call(libc::SYS_pidfd_open, [pid as usize, 0, 0, 0, 0, 0])? as usize)
}

/// A child that ends at once, where one is made.
fn forked(number: libc::c_long, args: [usize; 6]) -> io::Result<()> {
    let child = call(number, args)?;
    if child == 0 {
        // SAFETY: the child ends at once.
        unsafe { libc::_exit(0) };
    }
    Ok(())
}

/// How many threads can be had at once, up to `max`.
#[must_use]
pub fn threads(max: usize) -> usize {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let stopped = std::sync::Arc::new(std::sync::Mutex::new(stopped));
    let mut made = Vec::new();
    while made.len() < max {
        let stopped = std::sync::Arc::clone(&stopped);
        let body = move || drop(stopped.lock().map(|stopped| stopped.recv()));
        match std::thread::Builder::new().stack_size(64 << 10).spawn(body) {
            Ok(thread) => made.push(thread),
            Err(_) => break,
        }
    }
    drop(stop);
    let count = made.len();
    made.into_iter().for_each(|thread| drop(thread.join()));
    count
}

/// Another program in the place of this one. Returns only when that is refused.
#[must_use]
pub fn execute(program: &Path) -> io::Error {
    use std::os::unix::process::CommandExt;
    std::process::Command::new(program).exec()
}

/// Where nothing is mounted: an attempt that is let through fails for that, and changes nothing.
const NOWHERE: &std::ffi::CStr = c"/uhmm-no-such-folder";
const KILL: usize = libc::SIGKILL as usize;

/// Every attempt, by name.
pub const ATTEMPTS: &[Attempt] = &[
    ("process_vm_readv of a client", |v| transfer(v, libc::SYS_process_vm_readv)),
    ("process_vm_writev of a client", |v| transfer(v, libc::SYS_process_vm_writev)),
    ("ptrace of a client", |v| plain(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, v.client.0 as usize])),
    ("/proc/PID/mem of a client", |v| open(&format!("/proc/{}/mem", v.client.0), libc::O_RDWR)),
    ("/proc/PID/maps of a client", |v| open(&format!("/proc/{}/maps", v.client.0), libc::O_RDONLY)),
    ("/proc/PID/environ of a client", |v| open(&format!("/proc/{}/environ", v.client.0), libc::O_RDONLY)),
    ("/proc/PID/root of a client", |v| open(&format!("/proc/{}/root/etc/passwd", v.client.0), libc::O_RDONLY)),
    ("pidfd_getfd of a client", |v| with_pidfd(v.client.0, |fd| plain(libc::SYS_pidfd_getfd, &[fd, 0, 0]))),
    ("kcmp of a client", |v| plain(libc::SYS_kcmp, &[v.client.0 as usize, std::process::id() as usize, 1])),
    ("process_madvise of a client", |v| {
        with_pidfd(v.client.0, |fd| plain(libc::SYS_process_madvise, &[fd, 0, 0, libc::MADV_COLD as usize, 0]))
    }),
    ("kill of a neighbour", |v| plain(libc::SYS_kill, &[v.neighbour as usize, KILL])),
    ("tkill of a neighbour", |v| plain(libc::SYS_tkill, &[v.neighbour as usize, KILL])),
    ("tgkill of a neighbour", |v| plain(libc::SYS_tgkill, &[v.neighbour as usize, v.neighbour as usize, KILL])),
    ("pidfd_send_signal to a neighbour", |v| {
        with_pidfd(v.neighbour, |fd| plain(libc::SYS_pidfd_send_signal, &[fd, KILL, 0, 0]))
    }),
    ("prlimit of a neighbour", |v| {
        let limit = [1u64; 2];
        plain(libc::SYS_prlimit64, &[v.neighbour as usize, libc::RLIMIT_CORE as usize, limit.as_ptr() as usize, 0])
    }),
    ("sched_setaffinity of a neighbour", |v| {
        let cpus = [u64::MAX; 16];
        plain(libc::SYS_sched_setaffinity, &[v.neighbour as usize, 128, cpus.as_ptr() as usize])
    }),
    ("setpriority of a neighbour", |v| plain(libc::SYS_setpriority, &[0, v.neighbour as usize, 0])),
    ("a signal by F_SETOWN", |v| plain(libc::SYS_fcntl, &[0, libc::F_SETOWN as usize, v.neighbour as usize])),
    ("kill of everybody", |_| plain(libc::SYS_kill, &[usize::MAX, 0])),
    ("network by IPv4", |_| plain(libc::SYS_socket, &[libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0])),
    ("network by IPv6", |_| plain(libc::SYS_socket, &[libc::AF_INET6 as usize, libc::SOCK_DGRAM as usize, 0])),
    ("network by netlink", |_| plain(libc::SYS_socket, &[libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0])),
    ("network by packets", |_| plain(libc::SYS_socket, &[libc::AF_PACKET as usize, libc::SOCK_RAW as usize, 0])),
    ("network by vsock", |_| plain(libc::SYS_socket, &[libc::AF_VSOCK as usize, libc::SOCK_STREAM as usize, 0])),
    ("userfaultfd by call", |_| plain(libc::SYS_userfaultfd, &[0])),
    ("userfaultfd by device", |_| open("/dev/userfaultfd", libc::O_RDWR)),
    ("/dev/mem", |_| open("/dev/mem", libc::O_RDWR)),
    ("/dev/kvm", |_| open("/dev/kvm", libc::O_RDWR)),
    ("/dev/vfio/vfio", |_| open("/dev/vfio/vfio", libc::O_RDWR)),
    ("/dev/vfio/0", |_| open("/dev/vfio/0", libc::O_RDWR)),
    ("/dev/iommu", |_| open("/dev/iommu", libc::O_RDWR)),
    ("/dev/loop0", |_| open("/dev/loop0", libc::O_RDWR)),
    ("/dev/kmsg", |_| open("/dev/kmsg", libc::O_WRONLY)),
    ("mknod", |_| {
        plain(
            libc::SYS_mknodat,
            &[libc::AT_FDCWD as usize, c"/tmp/uhmm-hostile-mem".as_ptr() as usize, 0o20_600, 0x101],
        )
    }),
    ("a new file in /tmp", |_| open("/tmp/uhmm-hostile-file", libc::O_CREAT | libc::O_WRONLY)),
    ("/etc/shadow", |_| open("/etc/shadow", libc::O_RDONLY)),
    ("the sysrq trigger", |_| open("/proc/sysrq-trigger", libc::O_WRONLY)),
    ("core pattern", |_| open("/proc/sys/kernel/core_pattern", libc::O_WRONLY)),
    ("a control group", |_| open("/sys/fs/cgroup/cgroup.procs", libc::O_WRONLY)),
    ("mount", |_| {
        let none = c"none".as_ptr() as usize;
        plain(libc::SYS_mount, &[none, NOWHERE.as_ptr() as usize, c"tmpfs".as_ptr() as usize, 0, 0])
    }),
    ("umount of the view", |_| plain(libc::SYS_umount2, &[NOWHERE.as_ptr() as usize, libc::MNT_DETACH as usize])),
    ("open_tree", |_| plain(libc::SYS_open_tree, &[libc::AT_FDCWD as usize, c"/".as_ptr() as usize, 1])),
    ("fsopen", |_| plain(libc::SYS_fsopen, &[c"tmpfs".as_ptr() as usize, 0])),
    ("chroot", |_| plain(libc::SYS_chroot, &[c"/".as_ptr() as usize])),
    ("setns", |v| with_pidfd(v.client.0, |fd| plain(libc::SYS_setns, &[fd, libc::CLONE_NEWNS as usize]))),
    ("open_by_handle_at", |_| {
        let mut handle = [0u32; 8];
        (handle[0], handle[1]) = (8, 1);
        plain(libc::SYS_open_by_handle_at, &[libc::AT_FDCWD as usize, handle.as_mut_ptr() as usize, 0])
    }),
    ("setresuid", |_| plain(libc::SYS_setresuid, &[0, 0, 0])),
    ("capset", |_| {
        let (mut head, sets) = ([0x2008_0522u32, 0], [u32::MAX; 6]);
        plain(libc::SYS_capset, &[head.as_mut_ptr() as usize, sets.as_ptr() as usize])
    }),
    ("keyctl", |_| plain(libc::SYS_keyctl, &[0, usize::MAX - 2, 1])),
    ("add_key", |_| {
        let (kind, name) = (c"user".as_ptr() as usize, c"uhmm".as_ptr() as usize);
        plain(libc::SYS_add_key, &[kind, name, name, 4, usize::MAX - 1])
    }),
    ("io_uring", |_| {
        let mut parameters = [0u64; 15];
        plain(libc::SYS_io_uring_setup, &[1, parameters.as_mut_ptr() as usize])
    }),
    ("bpf", |_| {
        let mut attributes = [0u32; 32];
        (attributes[0], attributes[1], attributes[2], attributes[3]) = (2, 4, 4, 1);
        plain(libc::SYS_bpf, &[0, attributes.as_mut_ptr() as usize, 128])
    }),
    ("perf_event_open", |v| {
        let mut attributes = [0u32; 32];
        (attributes[0], attributes[1]) = (1, 128);
        plain(
            libc::SYS_perf_event_open,
            &[attributes.as_mut_ptr() as usize, v.client.0 as usize, usize::MAX, usize::MAX, 0],
        )
    }),
    ("a seccomp filter", |_| plain(libc::SYS_seccomp, &[1, 0, 0])),
    ("System V shared memory", |_| plain(libc::SYS_shmget, &[0x75_686d, 0, 0])),
    ("a message queue", |_| plain(libc::SYS_msgget, &[0x75_686d, 0])),
    ("terminal input", |_| plain(libc::SYS_ioctl, &[2, 0x5412, c"x".as_ptr() as usize])),
    ("fork by clone", |_| forked(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])),
    ("fork by fork", |_| forked(libc::SYS_fork, [0; 6])),
    ("fork by clone3", |_| {
        let mut arguments = [0u64; 11];
        arguments[4] = libc::SIGCHLD as u64;
        forked(libc::SYS_clone3, [arguments.as_mut_ptr() as usize, 88, 0, 0, 0, 0])
    }),
    // Last: what it changes would hinder the others.
    ("unshare of the user", |_| plain(libc::SYS_unshare, &[libc::CLONE_NEWUSER as usize])),
];
