//! The whole address space under management, as far as that can be: [`Session::adopt_all`].

mod look;
mod maps;
mod policy;
mod watcher;

use std::sync::{Arc, PoisonError};

use uhmm_ipc::message::ErrorCode;
use uhmm_kernel_hook::{AddrRange, UffdKind};

pub use self::look::AdoptedAll;
use self::look::{Looker, joined};
pub use self::policy::{ADOPT_ALL_MIN_BYTES, LeftAlone};
use self::watcher::Watcher;
use crate::{Error, Session};

/// What a session that adopts everything has beside its other state.
#[derive(Debug)]
pub(crate) struct Everything {
    looker: Arc<Looker>,
    _watcher: Watcher,
}

impl Session {
    /// Puts the whole address space of this process under management, but what must not be: all private anonymous memory (the heap, malloc's
    /// arenas, what was mmapped, uninitialised variables). New memory follows by itself, half a second after it has appeared at the latest while
    /// the address space is small (a thread looks for it, more rarely in large ones: one twentieth of a processor at most). Memory that is
    /// managed already stays as it is.
    ///
    /// Neighbouring mappings become one region, and what appears later beside a managed one is a region of its own. Left alone, with the reason
    /// and the bytes in the answer: everything that [`Session::adopt`] refuses, stacks and control blocks of threads, shared mappings, locked,
    /// sealed and huge (hugetlb) memory, what children do not inherit or get wiped, addresses without rights, pieces of less than
    /// [`ADOPT_ALL_MIN_BYTES`], what was given back by [`Session::release`], and what is over the manifest's quota. What is left alone for its
    /// attributes is looked at again after five seconds, or when its bounds change. Memory in which a thread's stack is set up later is given
    /// back as soon as that is seen; a thread that ends before with its control block on a device would not be noticed by
    /// pthread_join.
    ///
    /// May be called again, to have what is new adopted at once. The looking ends with this session value, what is adopted stays so. A forked
    /// child keeps what its parent had adopted; it looks for more only when it calls this with its own session
    /// ([`Session::in_child`]).
    ///
    /// # Errors
    /// `Permission` where the userfaultfd is for user mode only (the program's system calls on migrated memory would fail with EFAULT) or
    /// fork is not supported (children would lose the memory they run on): the text says what to change. [`Error::Kernel`]
    /// when /proc cannot be read. A mapping that vanishes, changes or is refused by the kernel is no error. After an error some memory may
    /// have been adopted; calling again goes on.
    pub fn adopt_all(&self) -> Result<AdoptedAll, Error> {
        self.check_adopt_all()?;
        let mut everything = self.everything.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(everything) = &*everything {
            return everything.looker.look(&self.inner, &|| false);
        }
        let looker = Arc::new(Looker::new()?);
        let report = looker.look(&self.inner, &|| false)?;
        let watcher = Watcher::start(Arc::downgrade(&self.inner), Arc::clone(&looker))?;
        tracing::info!(regions = report.region_count, bytes = report.bytes, "Everything is adopted");
        *everything = Some(Everything { looker, _watcher: watcher });
        Ok(report)
    }

    fn check_adopt_all(&self) -> Result<(), Error> {
        refusal(self.uffd_kind(), self.fork_supported())
            .map_or(Ok(()), |text| Err(Error::Service { code: ErrorCode::Permission, text: text.into() }))
    }

    /// The private memory of this process that is under management now, in order, neighbours joined: what [`Session::adopt`] and
    /// [`Session::adopt_all`] have adopted and a parent process has left, without what was released or unmapped since. The kernel is asked; only
    /// for memory that may not be read and written, and where the kernel cannot be asked (no /proc), the session's own list
    /// counts.
    pub fn adopted_ranges(&self) -> Vec<AddrRange> {
        let found = Looker::new().and_then(|looker| looker.managed(&self.inner));
        found.unwrap_or_else(|error| {
            tracing::debug!(%error, "The kernel cannot be asked what is managed");
            joined(self.inner.adopted_list().all())
        })
    }
}

/// Why nothing at all can be adopted by itself.
fn refusal(kind: UffdKind, forks: bool) -> Option<&'static str> {
    if kind != UffdKind::Full {
        return Some(
            "All memory cannot be adopted with a userfaultfd for user mode only, because the program's own system calls on migrated memory would fail with EFAULT: give this account access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1 (see `uhmm doctor`)",
        );
    }
    (!forks).then_some(
        "All memory cannot be adopted without fork events, because children of this program would lose the memory that they run on: run the pager as root or with CAP_SYS_PTRACE (see `uhmm doctor`)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_break_the_program_is_refused_with_its_remedy() {
        assert_eq!(refusal(UffdKind::Full, true), None);
        let text = refusal(UffdKind::UserModeOnly, true).unwrap();
        assert!(text.contains("EFAULT") && text.contains("vm.unprivileged_userfaultfd=1"), "{text}");
        assert!(refusal(UffdKind::Full, false).unwrap().contains("CAP_SYS_PTRACE"));
    }

    #[test]
    fn every_reason_is_listed_once_and_has_words_of_its_own() {
        let mut texts: Vec<&str> = LeftAlone::ALL.iter().map(|why| why.text()).collect();
        assert!(LeftAlone::ALL.is_sorted());
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), LeftAlone::ALL.len());
    }
}
