//! Other processes and this one: who a peer is, whether it lives, its memory, and where threads run.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::CpuSet;

use crate::error::HookError;
use crate::range::AddrRange;

/// A process, held so that its number cannot come to mean another one. Readable (for an event loop) once it has died.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl PidFd {
    /// Opens a process by number; sure only for children that have not been waited for. Prefer [`Self::of_peer`].
    ///
    /// # Errors
    /// `Call`: ESRCH when there is none.
    pub fn open(pid: u32) -> Result<Self, HookError> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| HookError::failed("pidfd_open", Errno::SRCH))?;
        let fd = rustix::process::pidfd_open(number, PidfdFlags::empty())
            .map_err(|error| HookError::failed("pidfd_open", error))?;
        Ok(Self { fd })
    }

    /// The process of that number that began then ([`start_time`]); `None` when it has ended, whoever has its number now.
    ///
    /// # Errors
    /// `Call`.
    pub fn open_started_at(pid: u32, start_time: u64) -> Result<Option<Self>, HookError> {
        let opened = match Self::open(pid) {
            Ok(opened) => opened,
            Err(error) if error.errno() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Looked at while it is held: its number cannot come to mean another one any more.
        let same = self::start_time(pid).is_ok_and(|found| found == start_time);
        Ok((same && !opened.exited()?).then_some(opened))
    }

    /// The process at the other end of a connected Unix socket: the one that connected (or made the pair), whoever holds the
    /// socket now.
    ///
    /// # Errors
    /// `Call`.
    pub fn of_peer(socket: BorrowedFd<'_>) -> Result<Self, HookError> {
        match peer_pidfd(socket) {
            Ok(fd) => Ok(Self { fd }),
            // Kernels before 6.5. The number may have been used again, which only the newer call can tell.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Self::open(peer_cred(socket)?.pid),
            Err(error) => Err(HookError::failed("getsockopt(SO_PEERPIDFD)", error)),
        }
    }

    /// Takes over a descriptor from a socket or the vault.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Gives the descriptor away.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// A second handle.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, HookError> {
        Ok(Self { fd: crate::memfd::try_clone(self.fd.as_fd())? })
    }

    /// What it is called everywhere, also where it has no number, for as long as this machine runs (the inode of its pidfd, which Linux
    /// gives to no second process).
    ///
    /// # Errors
    /// `Strange` before Linux 6.9 for a process of a foreign pid namespace: nothing tells it from others there.
    pub fn name(&self) -> Result<u64, HookError> {
        /// `PID_FS_MAGIC`.
        const PIDFS: i64 = 0x5049_4446;
        let failed = |error| HookError::failed("fstat(pidfd)", error);
        let in_pidfs = rustix::fs::fstatfs(&self.fd).map_err(failed)?.f_type as i64 == PIDFS;
        if in_pidfs {
            return Ok(rustix::fs::fstat(&self.fd).map_err(failed)?.st_ino);
        }
        let detail =
            "its process is in a pid namespace that this one does not see, and Linux tells such apart from 6.9 on"
                .into();
        self.pid()?.map(u64::from).ok_or(HookError::Strange { call: "fstat(pidfd)", detail })
    }

    /// Its number as this process sees it; None once it was waited for, or in a foreign pid namespace.
    ///
    /// # Errors
    /// `Strange` when the descriptor is not a pidfd.
    pub fn pid(&self) -> Result<Option<u32>, HookError> {
        let text = read_proc(&format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()), "fdinfo of a pidfd")?;
        let strange = || HookError::Strange { call: "fdinfo of a pidfd", detail: "no Pid line".into() };
        let number: i64 = field(&text, "Pid:").and_then(|word| word.parse().ok()).ok_or_else(strange)?;
        Ok(u32::try_from(number).ok().filter(|pid| *pid > 0))
    }

    /// Sends a signal. A process that is gone is not an error: it needs none any more; then false.
    ///
    /// # Errors
    /// `Call`: EPERM for another user's process.
    pub fn signal(&self, signal: Signal) -> Result<bool, HookError> {
        match rustix::process::pidfd_send_signal(&self.fd, signal) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => Err(HookError::failed("pidfd_send_signal", error)),
        }
    }

    /// Whether it has died (it may still wait for its parent).
    ///
    /// # Errors
    /// `Call`.
    pub fn exited(&self) -> Result<bool, HookError> {
        let mut entry = [PollFd::new(&self.fd, PollFlags::IN)];
        match rustix::event::poll(&mut entry, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => Ok(ready == 1),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(HookError::failed("poll(pidfd)", error)),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut raw: libc::c_int = -1;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    let place = std::ptr::from_mut(&mut raw).cast();
    // SAFETY: the option is one int, which `place` has room for.
    let rc = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERPIDFD, place, &mut size) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us (close-on-exec, as all pidfds).
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Who connected a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// Process number, 0 when it cannot be seen from here.
    pub pid: u32,
    /// Effective user at the time.
    pub uid: u32,
    /// Effective group at the time.
    pub gid: u32,
}

/// The credentials of a connected Unix socket's other end.
///
/// # Errors
/// `Call`, `Strange` when the peer lives in a pid namespace that this one does not see.
pub fn peer_cred(socket: BorrowedFd<'_>) -> Result<PeerCred, HookError> {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    let place = std::ptr::from_mut(&mut cred).cast();
    // SAFETY: the option is one ucred, which `place` has room for.
    let rc = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, place, &mut size) };
    if rc != 0 {
        return Err(HookError::failed("getsockopt(SO_PEERCRED)", io::Error::last_os_error()));
    }
    Ok(PeerCred { pid: cred.pid.max(0) as u32, uid: cred.uid, gid: cred.gid })
}

/// Reads another process's memory; returns how many bytes, fewer when it hits an address that cannot be read.
///
/// # Errors
/// `Call`: ESRCH when it is gone, EPERM without ptrace rights, EFAULT when not even the first byte can be read.
pub fn vm_read(pid: u32, addr: u64, into: &mut [u8]) -> Result<usize, HookError> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = remote_iovec(addr, into.len());
    // SAFETY: the kernel writes to `into` only; the remote address is a number to us, checked by the kernel.
    let rc = unsafe { libc::process_vm_readv(pid as libc::pid_t, &local, 1, &remote, 1, 0) };
    transferred("process_vm_readv", addr, into.len(), rc)
}

/// Writes another process's memory; returns how many bytes, fewer when it hits an address that cannot be written.
///
/// # Errors
/// `OwnMemory` for this very process; `Call` as for [`vm_read`].
pub fn vm_write(pid: u32, addr: u64, from: &[u8]) -> Result<usize, HookError> {
    if pid == std::process::id() {
        return Err(HookError::OwnMemory { pid });
    }
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = remote_iovec(addr, from.len());
    // SAFETY: the kernel only reads `from`; the remote process is another one, whose memory is not ours to reason about.
    let rc = unsafe { libc::process_vm_writev(pid as libc::pid_t, &local, 1, &remote, 1, 0) };
    transferred("process_vm_writev", addr, from.len(), rc)
}

fn remote_iovec(addr: u64, len: usize) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::without_provenance_mut(addr as usize), iov_len: len }
}

/// Ends this process at once, without its exit handlers: for a library that is loaded into somebody else's program, before that has begun.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process; no other code of it runs.
    unsafe { libc::_exit(code) }
}

/// Runs `act` and leaves the calling thread's `errno` as it was: a program may read it where no system call of its own is in between.
pub fn with_errno_kept<T>(act: impl FnOnce() -> T) -> T {
    // SAFETY: the address of a word of the calling thread, which lives as long as the thread.
    let before = unsafe { *libc::__errno_location() };
    let done = act();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = before };
    done
}

fn transferred(call: &'static str, addr: u64, len: usize, rc: isize) -> Result<usize, HookError> {
    if rc >= 0 {
        return Ok(rc as usize);
    }
    let range = AddrRange { start: addr, len: len as u64 };
    let hint = "EPERM: it needs the same user and a dumpable process, or CAP_SYS_PTRACE";
    Err(HookError::on(call, range, io::Error::last_os_error(), hint))
}

/// Memory that a process has mapped and in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RssBytes {
    /// Private pages.
    pub anon: u64,
    /// Pages of files.
    pub file: u64,
    /// Pages of shared memory.
    pub shmem: u64,
}

/// Reads a process's resident memory from /proc/PID/status.
///
/// # Errors
/// `Call` when it is gone, `Strange` when it has no memory (a zombie).
pub fn rss(pid: u32) -> Result<RssBytes, HookError> {
    let text = read_proc(&format!("/proc/{pid}/status"), "/proc/PID/status")?;
    parse_rss(&text).ok_or(HookError::Strange { call: "/proc/PID/status", detail: "no Rss lines".into() })
}

fn parse_rss(text: &str) -> Option<RssBytes> {
    let bytes = |key| kib_line(text, key);
    Some(RssBytes { anon: bytes("RssAnon:")?, file: bytes("RssFile:")?, shmem: bytes("RssShmem:")? })
}

/// Memory of a process in bytes where what others have mapped too counts as their shares are (Pss); `None` when it is gone, or somebody else's. It
/// costs a walk over its page tables.
#[must_use]
pub fn proportional_bytes(pid: u32) -> Option<u64> {
    kib_line(&std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss:")
}

/// What the kernel could give away without swapping; `None`: it does not say.
#[must_use]
pub fn memory_available_bytes() -> Option<u64> {
    kib_line(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn kib_line(text: &str, key: &str) -> Option<u64> {
    field(text, key)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes charged to this process's memory cgroup (version 2 or 1); None when there is none or it cannot be read.
#[must_use]
pub fn memcg_usage_bytes() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    // Inside a cgroup namespace the path can lie above our mount; then the mount's root is our group.
    memcg_usage_paths(&own).iter().find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
}

/// The paths of a process's control groups, as /proc/PID/cgroup has them, each once.
///
/// # Errors
/// `Call` when it is gone, or hidden (hidepid).
pub fn control_groups(pid: u32) -> Result<Vec<String>, HookError> {
    let text = read_proc(&format!("/proc/{pid}/cgroup"), "/proc/PID/cgroup")?;
    let mut paths: Vec<String> =
        text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(str::to_owned).collect();
    // The longest first: where one hierarchy has the group and others the root, the group says more.
    paths.sort_by_key(|path| std::cmp::Reverse(path.len()));
    paths.dedup();
    Ok(paths)
}

fn memcg_usage_paths(own_cgroups: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for line in own_cgroups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let group = group.trim_end_matches('/');
        if controllers.split(',').any(|name| name == "memory") {
            paths.push(format!("/sys/fs/cgroup/memory{group}/memory.usage_in_bytes"));
            paths.push("/sys/fs/cgroup/memory/memory.usage_in_bytes".to_string());
        } else if controllers.is_empty() {
            paths.push(format!("/sys/fs/cgroup{group}/memory.current"));
            paths.push("/sys/fs/cgroup/memory.current".to_string());
        }
    }
    paths
}

/// Keeps this process's present pages in memory, each from its first touch on, so that the pager cannot wait for a swap-in that
/// waits for the pager. Mappings made later are locked by [`crate::MappedBytes::lock_on_fault`]: locking all future mappings
/// would make every large scratch mapping resident.
///
/// # Errors
/// `Call`: EPERM or ENOMEM behind the memlock limit. Callers log it and go on.
pub fn lock_memory_best_effort() -> Result<(), HookError> {
    use rustix::mm::MlockAllFlags;
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT).map_err(|error| {
        HookError::hinted("mlockall(CURRENT|ONFAULT)", error, "Raise the limit (ulimit -l) or grant CAP_IPC_LOCK")
    })
}

/// Lets this process have as many descriptors as it may give itself. A client takes about a dozen in the pager and nine in the vault, and the
/// usual soft limit of 1024 is for programs that call select.
///
/// # Errors
/// `Call`. Callers log it and go on.
pub fn raise_descriptor_limit() -> Result<(), HookError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .map_err(|error| HookError::failed("setrlimit", error))
}

/// Fills a buffer with random bytes for keys and tokens that a peer must not guess.
///
/// # Errors
/// `Call`: ENOSYS in a sandbox without getrandom; the buffer is then not to be used.
pub fn random_bytes(into: &mut [u8]) -> Result<(), HookError> {
    let mut done = 0;
    while done < into.len() {
        match rustix::rand::getrandom(&mut into[done..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(HookError::failed("getrandom", error)),
        }
    }
    Ok(())
}

/// Names the calling thread (15 bytes are shown) for ps, top and the journal.
///
/// # Errors
/// `BadMessage` for a name with a zero byte, `Call`.
pub fn set_name(name: &str) -> Result<(), HookError> {
    let end = (0..=name.len().min(15)).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    let short = CString::new(&name[..end]).map_err(|_| HookError::BadMessage("a thread name holds no zero byte"))?;
    rustix::thread::set_name(&short).map_err(|error| HookError::failed("prctl(PR_SET_NAME)", error))
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// `Call`: EINVAL when this process may not use that CPU.
pub fn pin_current_thread(cpu: u32) -> Result<(), HookError> {
    let mut set = CpuSet::new();
    if cpu as usize >= CpuSet::MAX_CPU {
        return Err(HookError::failed("sched_setaffinity", Errno::INVAL));
    }
    set.set(cpu as usize);
    rustix::thread::sched_setaffinity(None, &set).map_err(|error| HookError::failed("sched_setaffinity", error))
}

/// The CPU that a thread runs on or last ran on. The thread number is as seen from this process.
///
/// # Errors
/// `Call` when it is gone.
pub fn current_cpu_of(tid: u32) -> Result<u32, HookError> {
    let text = read_proc(&format!("/proc/{tid}/stat"), "/proc/TID/stat")?;
    parse_stat_cpu(&text).ok_or(HookError::Strange { call: "/proc/TID/stat", detail: text })
}

/// When a process began, in clock ticks since the machine did: with its number it names a process for good.
///
/// # Errors
/// `Call` when it is gone.
pub fn start_time(pid: u32) -> Result<u64, HookError> {
    let text = read_proc(&format!("/proc/{pid}/stat"), "/proc/PID/stat")?;
    let field = text.rsplit_once(')').and_then(|(_, after)| after.split_ascii_whitespace().nth(22 - 3)?.parse().ok());
    field.ok_or(HookError::Strange { call: "/proc/PID/stat", detail: text })
}

/// Field 39, counted after the name, which may hold blanks and brackets.
pub(crate) fn parse_stat_cpu(stat: &str) -> Option<u32> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}

fn read_proc(path: &str, call: &'static str) -> Result<String, HookError> {
    std::fs::read_to_string(path).map_err(|source| HookError::failed(call, source))
}

/// The first word behind a key at the start of a line.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.split_ascii_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_of_descriptors_becomes_the_hard_one() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let child = crate::fork::fork_child(|| {
            let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
            let lowered = setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum }).is_ok();
            let raised = raise_descriptor_limit().is_ok() && getrlimit(Resource::Nofile).current == maximum;
            i32::from(!(lowered && raised))
        });
        assert_eq!(child.unwrap().wait().unwrap(), crate::fork::Ended::Code(0));
    }

    #[test]
    fn rss_lines_are_kibibytes() {
        let text = "Name:\tx\nVmRSS:\t 9 kB\nRssAnon:\t    104 kB\nRssFile:\t 3 kB\nRssShmem:\t 0 kB\n";
        assert_eq!(parse_rss(text), Some(RssBytes { anon: 104 * 1024, file: 3072, shmem: 0 }));
        assert_eq!(parse_rss("Name:\tzombie\n"), None);
    }

    #[test]
    fn stat_cpu_survives_a_name_with_brackets() {
        let mut stat = String::from("17 (a) b (c)) S");
        for field in 4..=38 {
            stat.push_str(&format!(" {field}"));
        }
        stat.push_str(" 5 0 0");
        assert_eq!(parse_stat_cpu(&stat), Some(5));
        assert_eq!(parse_stat_cpu("17 (a) S 1 2"), None);
    }

    #[test]
    fn cgroup_paths_follow_the_version_in_use() {
        assert_eq!(memcg_usage_paths("0::/user/app\n")[0], "/sys/fs/cgroup/user/app/memory.current");
        let hybrid = "5:cpu,memory:/box\n0::/\n";
        assert_eq!(memcg_usage_paths(hybrid)[0], "/sys/fs/cgroup/memory/box/memory.usage_in_bytes");
        assert!(memcg_usage_paths("3:cpuset:/\n").is_empty());
    }

    #[test]
    fn own_process_is_alive_and_measurable() {
        let own = std::process::id();
        let pidfd = PidFd::open(own).unwrap();
        assert!(!pidfd.exited().unwrap());
        assert_eq!(pidfd.pid().unwrap(), Some(own));
        assert_eq!(pidfd.name().unwrap(), PidFd::open(own).unwrap().name().unwrap());
        assert_ne!(pidfd.name().unwrap(), PidFd::open(1).unwrap().name().unwrap());
        assert!(rss(own).unwrap().anon > 0);
        assert!(control_groups(own).unwrap().iter().all(|path| path.starts_with('/')));
        assert!(control_groups(0).is_err());
        assert!(matches!(vm_write(own, 0x1000, b"x"), Err(HookError::OwnMemory { .. })));
        assert_eq!(PidFd::open(0).unwrap_err().errno(), Some(libc::ESRCH));
        let began = start_time(own).unwrap();
        assert!(PidFd::open_started_at(own, began).unwrap().is_some());
        assert!(PidFd::open_started_at(own, began + 1).unwrap().is_none(), "another process of this number");
    }

    #[test]
    fn a_process_that_has_ended_is_not_found_by_number_and_time() {
        let child = crate::fork::fork_child(|| 0).unwrap();
        let (pid, began) = (child.pid(), start_time(child.pid()).unwrap());
        while !child.pidfd().exited().unwrap() {
            std::thread::yield_now();
        }
        assert!(PidFd::open_started_at(pid, began).unwrap().is_none(), "not even before it is reaped");
    }

    #[test]
    fn a_pinned_thread_is_found_on_its_cpu() {
        pin_current_thread(0).unwrap();
        let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        assert_eq!(current_cpu_of(tid).unwrap(), 0);
        assert!(pin_current_thread(100_000).is_err());
    }

    #[test]
    fn random_bytes_fill_the_whole_buffer_and_differ() {
        let (mut one, mut other) = ([0u8; 4096], [0u8; 4096]);
        random_bytes(&mut one).unwrap();
        random_bytes(&mut other).unwrap();
        assert_ne!(one, other);
        assert_ne!(one[4064..], [0; 32]);
    }

    #[test]
    fn thread_names_are_cut_at_a_character() {
        set_name("uhmm-pager-\u{e4}\u{e4}\u{e4}\u{e4}").unwrap();
        assert_eq!(std::fs::read_to_string("/proc/thread-self/comm").unwrap().trim(), "uhmm-pager-\u{e4}\u{e4}");
        assert!(set_name("a\0b").is_err());
    }
}
