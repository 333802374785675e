//! Sessions: a process under management.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uhmm_sdk::{AgentKind, Region, UffdKind};

use crate::buffers::{self, Out};
use crate::error::guard;
use crate::handles::{self, Handle};

/// A process under management: what uhmm_connect() gives. May be used by all threads.
pub struct uhmm_session;

impl Handle for uhmm_session {
    type Object = Session;
    const KIND: &'static str = "uhmm_session";
}

/// What a session's handle stands for.
pub(crate) struct Session {
    pub(crate) sdk: uhmm_sdk::Session,
    pub(crate) run_dir: PathBuf,
    regions: Mutex<BTreeMap<u64, Region>>,
}

impl Session {
    fn new(sdk: uhmm_sdk::Session, run_dir: PathBuf) -> Self {
        Self { sdk, run_dir, regions: Mutex::new(BTreeMap::new()) }
    }

    /// Memory of `uhmm_allocate`, by its first address.
    pub(crate) fn regions(&self) -> MutexGuard<'_, BTreeMap<u64, Region>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects this process to the services in `run_dir` (NULL: $UHMM_RUN_DIR, else $XDG_RUNTIME_DIR/uhmm, else /tmp/uhmm-UID) and
/// puts it under management. One session a process is enough. It survives restarts of every service: calls wait for the service
/// to come back.
///
/// Errors: -ENOTCONN no system runs there; -EPERM the run directory cannot be entered, or this account may not make a userfaultfd (the text says what
/// to change); -ETIMEDOUT its pager does not answer for ten seconds; -ENOMEM no memory, or no mapping left (vm.max_map_count); -EAGAIN no process or
/// thread can be made (pids.max, ulimit -u); the services' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_connect(run_dir: *const c_char, session: *mut *mut uhmm_session) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let session = unsafe { Out::new(session, "session") }?;
        // SAFETY: text that ends with a zero; null was sorted out before.
        let run_dir = if run_dir.is_null() { None } else { Some(unsafe { buffers::text(run_dir, "run_dir") }?) };
        let run_dir = uhmm_sdk::run_dir(run_dir.map(Path::new));
        let sdk = uhmm_sdk::Session::connect(Some(&run_dir))?;
        session.set(handles::open(Session::new(sdk, run_dir)));
        Ok(())
    })
}

/// Ends a session and frees all memory that uhmm_allocate() gave: its addresses are gone. Adopted memory comes home with its bytes and is the
/// program's alone. That is waited for, ten seconds at most and not at all while the pager is away; then it goes on by itself. Devices
/// and pending calls of the session stay usable until they are closed and freed, and the session lives as long as they do; so it does in a forked
/// child as long as that has memory which its parent allocated.
/// A call that another thread is inside ends first. In a forked child, a handle of the parent is left alone and 0 is answered.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_disconnect(session: *mut uhmm_session) -> c_int {
    guard(|| {
        if let Some(session) = handles::close(session)? {
            drop(std::mem::take(&mut *session.regions()));
        }
        Ok(())
    })
}

/// After fork(), in the child: a session of its own on the inherited address space. `parents` is the session that the process
/// had when it called fork(); all of the parent's handles are refused in the child from then on. Memory that the parent
/// adopted is under management in the child too.
///
/// Errors: -EINVAL `parents` is of this very process; -ENOENT the kernel grants no fork events (see uhmm_fork_supported()): the managed ranges are
/// not in the child; as uhmm_connect().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_in_child(parents: *mut uhmm_session, session: *mut *mut uhmm_session) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let session = unsafe { Out::new(session, "session") }?;
        let parents = handles::get_inherited(parents)?;
        let sdk = parents.sdk.in_child()?;
        session.set(handles::open(Session::new(sdk, parents.run_dir.clone())));
        Ok(())
    })
}

/// Whether a child made by fork() keeps the managed memory (1) or finds those addresses unmapped (0). Depends on what the kernel
/// grants to this account: `uhmm doctor` says what would change it.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_fork_supported(session: *mut uhmm_session) -> c_int {
    crate::error::guard_value(|| Ok(c_int::from(handles::get(session)?.sdk.fork_supported())))
}

/// Whether system calls may be given migrated memory: 1, the kernel waits for the page as the program does; 0, they fail
/// with EFAULT until the page is touched. `uhmm doctor` says what would change it.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_system_calls_wait(session: *mut uhmm_session) -> c_int {
    crate::error::guard_value(|| Ok(c_int::from(handles::get(session)?.sdk.uffd_kind() == UffdKind::Full)))
}

/// This process's number at the pager, as in `uhmm status`.
///
/// Errors: -EINVAL a wrong handle or pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_space(session: *mut uhmm_session, space: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let space = unsafe { Out::new(space, "space") }?;
        space.set(handles::get(session)?.sdk.space());
        Ok(())
    })
}

/// Who takes private pages out of this process's address space and puts them back. `pid`: the number of the agent, a process that shares this
/// one's memory and nothing else; 0 when the agent is a thread of this process, because making a process is forbidden here (a
/// seccomp filter); -1 when it was killed and no other one can be started: then private memory moves to no device any more, and
/// what is on one comes home when it is touched.
///
/// Errors: -ESTALE the session's own thread was killed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_agent(session: *mut uhmm_session, pid: *mut i64) -> c_int {
    guard(|| {
        // SAFETY: the caller's variable.
        let pid = unsafe { Out::new(pid, "pid") }?;
        pid.set(match handles::get(session)?.sdk.agent()? {
            AgentKind::Process { pid } => i64::from(pid),
            AgentKind::Thread => 0,
            AgentKind::None => -1,
        });
        Ok(())
    })
}

/// Test hook: the session's agent stands still for this long. Returns at once.
///
/// Errors: -EINVAL a wrong handle.
#[unsafe(no_mangle)]
pub extern "C" fn uhmm_pause_agent(session: *mut uhmm_session, duration_ms: u32) -> c_int {
    guard(|| {
        handles::get(session)?.sdk.pause_agent(Duration::from_millis(duration_ms.into()));
        Ok(())
    })
}
