//! fork, as far as this process must be ready for it.
//!
//! A child does not inherit frames of coherent devices that stand in for pages of allocated regions (it could not be made to let go of
//! them), and would find holes there. So what the program reaches on a device comes home before the process forks; afterwards parent and
//! child show the region both, and its pages go to devices like those of any shared memory: a CPU access brings them home.
//!
//! What another thread sends to a device while this one forks may be missed: the child then gets SIGSEGV there. Children of vfork and
//! posix_spawn run in the parent's memory until they are another program, and need nothing.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use uhmm_ipc::message::pager::{Residency, ResidencyRun, Target};
use uhmm_kernel_hook::fork::before_fork;

use crate::agent::AGENT_THREAD;
use crate::range::PAGE_BYTES;
use crate::session::Inner;
use crate::{Error, Session};

/// A fork does not wait for ever for pages to come home.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sessions that use coherent devices, with their process.
static SESSIONS: Mutex<Vec<(u32, Weak<Inner>)>> = Mutex::new(Vec::new());

/// From now on the session's pages come home before a fork.
pub(crate) fn prepare_for(session: &Arc<Inner>) -> Result<(), Error> {
    {
        let mut sessions = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|(_, known)| known.strong_count() > 0);
        if sessions.iter().any(|(_, known)| known.as_ptr() == Arc::as_ptr(session)) {
            return Ok(());
        }
        sessions.push((std::process::id(), Arc::downgrade(session)));
    }
    before_fork(bring_home).map_err(Error::kernel("Preparing for forks of this process"))
}

fn bring_home() {
    if std::thread::current().name() == Some(AGENT_THREAD) {
        // It cannot wait for itself.
        return;
    }
    let own = std::process::id();
    let sessions = SESSIONS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for inner in sessions.into_iter().filter(|(pid, _)| *pid == own).filter_map(|(_, known)| known.upgrade()) {
        if let Err(error) = bring_session_home(&Session { everything: Mutex::default(), inner }) {
            tracing::warn!(%error, "Before a fork: pages stay on a coherent device, and children will not have them");
        }
    }
}

fn bring_session_home(session: &Session) -> Result<(), Error> {
    let reached = |run: &ResidencyRun| run.coherent || run.residency == Residency::Moving;
    for range in session.inner.allocations.ranges() {
        for run in session.residency(range.start, range.len)?.into_iter().filter(reached) {
            let (addr, len_bytes) = (range.start + run.first_page * PAGE_BYTES, run.page_count * PAGE_BYTES);
            if session.migrate_async(addr, len_bytes, Target::Home)?.wait_timeout(PATIENCE).is_none() {
                tracing::warn!(addr, len_bytes, "Before a fork: pages do not come home in time");
            }
        }
    }
    Ok(())
}
