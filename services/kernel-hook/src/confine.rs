//! What a process gives up before it runs its program: the child does it between fork and exec, so that the program never had it.
//!
//! ```text
//!   parent: Confinement::install(command)   everything is prepared: the child allocates nothing
//!   child:  namespaces -> folders -> limits -> no_new_privs -> account, capabilities -> Landlock -> seccomp -> exec
//!              \________________________ what became of each step, the filter's listener ____________________/
//!   parent: Pending::outcome                which steps are in force, and where calls that the filter refuses are told
//! ```
//! What this kernel or account does not offer is left out and reported; the owner decides whether that will do. A step that fails although
//! it is offered (the account, the capabilities) ends the child.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::HookError;
use crate::socket::{RecvStatus, SeqPacket};

pub mod calls;
mod child;
mod filter;
mod landlock;
mod mounts;
mod privileges;

pub use filter::{DeniedCall, DeniedCalls, Instruction, OWN_PROCESS, Taken};
pub use landlock::{FileAccess, LandlockSupport};
pub use privileges::{Capability, own_capabilities};

/// One thing that is taken away, in the order in which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A mount namespace: some folders are hidden, and one shows another one's entries.
    Folders,
    /// A network namespace with nothing in it.
    Network,
    /// A namespace for System V and POSIX message queues.
    Ipc,
    /// Resource limits.
    Limits,
    /// Capabilities, also out of the bounding set; never more by exec (no_new_privs).
    Capabilities,
    /// Another user.
    Account,
    /// Landlock: files.
    Files,
    /// Landlock: TCP.
    Tcp,
    /// Landlock: signals to processes outside, abstract sockets.
    Signals,
    /// seccomp: system calls.
    Calls,
    /// Refused calls are told to the parent; without it they are in the kernel's log alone.
    Listener,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; STEPS] = [
        Self::Folders,
        Self::Network,
        Self::Ipc,
        Self::Limits,
        Self::Capabilities,
        Self::Account,
        Self::Files,
        Self::Tcp,
        Self::Signals,
        Self::Calls,
        Self::Listener,
    ];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Folders => "folders",
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Limits => "limits",
            Self::Capabilities => "capabilities",
            Self::Account => "account",
            Self::Files => "files",
            Self::Tcp => "tcp",
            Self::Signals => "signals",
            Self::Calls => "calls",
            Self::Listener => "listener",
        }
    }
}

const STEPS: usize = 11;
/// In a report: not asked for.
const NOT_WANTED: i32 = -1;

/// What became of each step: 0 or an error number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report([i32; STEPS]);

impl Report {
    pub(crate) const fn new() -> Self {
        Self([NOT_WANTED; STEPS])
    }

    pub(crate) fn note(&mut self, step: Step, errno: i32) {
        self.0[step as usize] = errno;
    }

    fn to_bytes(self) -> [u8; STEPS * 4] {
        let mut bytes = [0; STEPS * 4];
        for (place, errno) in bytes.chunks_exact_mut(4).zip(self.0) {
            place.copy_from_slice(&errno.to_ne_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut report = Self::new();
        for (errno, place) in report.0.iter_mut().zip(bytes.chunks_exact(4)) {
            *errno = i32::from_ne_bytes(place.try_into().ok()?);
        }
        (bytes.len() == STEPS * 4).then_some(report)
    }
}

/// Which folders a process sees.
#[derive(Clone, Debug, Default)]
pub struct Folders {
    /// Empty for the process, except for what is `shown`.
    pub covered: Vec<PathBuf>,
    /// Files and folders that are there all the same.
    pub shown: Vec<PathBuf>,
    /// The second folder shows the entries of the first one.
    pub view: Option<(PathBuf, PathBuf)>,
}

/// Which system calls a process may make.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Comes first: calls with an answer of their own.
    pub special: Vec<Instruction>,
    /// Tells refused calls to a listener.
    pub telling: Vec<Instruction>,
    /// The same where nobody can listen: EPERM, and a line in the kernel's log.
    pub silent: Vec<Instruction>,
}

/// See the module head. The default takes nothing away.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// Mount namespace.
    pub folders: Option<Folders>,
    /// A network namespace of its own.
    pub network: bool,
    /// An IPC namespace of its own.
    pub ipc: bool,
    /// Resource (`RLIMIT_...`) and both its limits.
    pub limits: Vec<(Limit, u64)>,
    /// User and group.
    pub account: Option<(u32, u32)>,
    /// What is left, of what this process has; `None`: as it is.
    pub capabilities: Option<Vec<Capability>>,
    /// Files that may be used, and TCP, signals and abstract sockets as far as Landlock knows them. `None`: no Landlock.
    pub files: Option<Vec<(PathBuf, FileAccess)>>,
    /// TCP stays allowed.
    pub tcp: bool,
    /// Where not, connecting to these ports stays allowed.
    pub tcp_ports: Vec<u16>,
    /// System calls.
    pub filter: Option<Filter>,
}

/// A resource that is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Open descriptors.
    Descriptors,
    /// Address space, in bytes.
    AddressSpace,
    /// Processes and threads of the user.
    Processes,
    /// Core files, in bytes.
    CoreFile,
}

impl Limit {
    pub(crate) fn resource(self) -> libc::__rlimit_resource_t {
        match self {
            Self::Descriptors => libc::RLIMIT_NOFILE,
            Self::AddressSpace => libc::RLIMIT_AS,
            Self::Processes => libc::RLIMIT_NPROC,
            Self::CoreFile => libc::RLIMIT_CORE,
        }
    }
}

impl Confinement {
    /// The command's child will confine itself.
    ///
    /// # Errors
    /// `Call` without descriptors; `BadMessage` for a path with a zero byte.
    pub fn install(&self, command: &mut Command) -> Result<Pending, HookError> {
        let (near, far) = SeqPacket::pair()?;
        let prepared = child::Prepared::of(self, far)?;
        // SAFETY: the closure makes system calls on memory that was prepared before the fork; it neither allocates nor locks.
        unsafe { command.pre_exec(move || prepared.confine()) };
        Ok(Pending { near })
    }
}

impl Confinement {
    /// What of it is offered here: a child tries, and ends.
    ///
    /// # Errors
    /// `Call`; `Strange` when the child has said nothing.
    pub fn try_out(&self) -> Result<Outcome, HookError> {
        let (near, far) = SeqPacket::pair()?;
        let prepared = child::Prepared::of(self, far)?;
        let child = crate::fork::fork_child(|| i32::from(prepared.confine().is_err()))?;
        // The listener goes before the child is waited for: whatever it calls on its way out is not to wait for an answer.
        let mut entry = [rustix::event::PollFd::new(&near, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut entry, None).map_err(|error| HookError::failed("poll", error))?;
        let outcome = Pending { near }.outcome()?.map(|outcome| Outcome { denied: None, ..outcome });
        child.wait()?;
        outcome.ok_or(HookError::Strange { call: "fork", detail: "the child has not said what confines it".into() })
    }
}

/// What a child will say.
#[derive(Debug)]
pub struct Pending {
    near: SeqPacket,
}

/// What is in force.
#[derive(Debug)]
pub struct Outcome {
    report: Report,
    /// Where refused calls are told.
    pub denied: Option<DeniedCalls>,
}

impl Outcome {
    /// What was asked for and is not in force, with the kernel's answer.
    pub fn missing(&self) -> impl Iterator<Item = (Step, io::Error)> + '_ {
        let lost = |step: &Step| self.report.0[*step as usize] > 0;
        Step::ALL
            .into_iter()
            .filter(lost)
            .map(|step| (step, io::Error::from_raw_os_error(self.report.0[step as usize])))
    }

    /// What is in force.
    pub fn in_force(&self) -> impl Iterator<Item = Step> + '_ {
        Step::ALL.into_iter().filter(|step| self.report.0[*step as usize] == 0)
    }
}

impl Pending {
    /// After the child was spawned, or could not be. `None`: it has said nothing.
    ///
    /// # Errors
    /// `Call`.
    pub fn outcome(self) -> Result<Option<Outcome>, HookError> {
        let (mut bytes, mut fds) = ([0; STEPS * 4], Vec::<OwnedFd>::new());
        let RecvStatus::Message { len, .. } = self.near.recv(&mut bytes, &mut fds, 1)? else { return Ok(None) };
        let denied = fds.pop().map(DeniedCalls::new);
        Ok(Report::from_bytes(&bytes[..len]).map(|report| Outcome { report, denied }))
    }
}

/// From now on nobody of this user may look into this process (ptrace, /proc/PID/mem, core files). exec takes that back.
///
/// # Errors
/// `Call`.
pub fn hide_memory() -> Result<(), HookError> {
    // SAFETY: a call without pointers.
    match unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(HookError::failed("prctl(PR_SET_DUMPABLE)", io::Error::last_os_error())),
    }
}

/// Whose rights this process uses.
#[must_use]
pub fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

pub(crate) fn c_path(path: &Path) -> Result<CString, HookError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| HookError::BadMessage("a path holds no zero byte"))
}

/// Sends the report, with the listener. Runs in the child.
pub(crate) fn tell(socket: &SeqPacket, report: Report, listener: Option<&OwnedFd>) {
    let bytes = report.to_bytes();
    // The parent that does not hear it takes everything for missing.
    let _ = match listener {
        Some(fd) => socket.send(&bytes, &[fd.as_fd()]),
        None => socket.send(&bytes, &[]),
    };
}

#[cfg(test)]
mod tests;
