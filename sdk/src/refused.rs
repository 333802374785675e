//! What must not be put under management, whoever asks: a page that is out while the kernel or the SDK cannot wait for it would stop the
//! program for ever, or end it. Each refusal says which part of the range it is, why, and what to do.

use uhmm_ipc::message::ErrorCode;
use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::threads::{self, ThreadWords};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, UffdKind, own_memory};

use crate::{Error, own};

/// What this process says about itself, beside its mappings.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// A mapping of the SDK's own that shares a page with the range.
    pub(crate) own: Option<(AddrRange, &'static str)>,
    pub(crate) threads: Vec<ThreadWords>,
    /// Of the thread that asks.
    pub(crate) alternate_stack: Option<AddrRange>,
    /// An object of the SDK's that lies in memory of the program's allocator.
    pub(crate) object_addr: u64,
    pub(crate) kind: UffdKind,
}

impl Facts {
    /// What concerns `range` now. `object_addr`: of a live object of the session.
    pub(crate) fn about(range: AddrRange, object_addr: u64, kind: UffdKind) -> Result<Self, Error> {
        Ok(Self {
            own: own::overlapping(range),
            threads: threads::thread_words().map_err(Error::kernel("Looking at this process's threads"))?,
            alternate_stack: threads::alternate_stack()
                .map_err(Error::kernel("Asking for the alternate signal stack"))?,
            object_addr,
            kind,
        })
    }

    /// What no kind of memory makes right.
    pub(crate) fn check(&self, range: AddrRange) -> Result<(), Error> {
        let refused = |text| Err(Error::Service { code: ErrorCode::Permission, text });
        if let Some((own, what)) = self.own.filter(|(own, _)| own.overlaps(&range)) {
            return refused(format!(
                "{range} holds {what} at {own}, which uhmm itself needs to bring pages home: leave it out"
            ));
        }
        // The thread's number lies right before the list's head, in the same page.
        if let Some(words) = self.threads.iter().find(|words| range.contains(words.robust_list)) {
            return refused(format!(
                "{range} holds words of thread {} at {:#x} that the kernel writes when the thread ends. It does not wait for a page then, and pthread_join would never return: leave out stacks of threads and the pages of their thread-local storage",
                words.tid, words.robust_list
            ));
        }
        if self.kind == UffdKind::Full {
            return Ok(());
        }
        let fix = "leave it out, or give this account access to /dev/userfaultfd or set vm.unprivileged_userfaultfd=1 (see `uhmm doctor`)";
        if let Some(stack) = self.alternate_stack.filter(|stack| stack.overlaps(&range)) {
            return refused(format!(
                "{range} holds the calling thread's alternate signal stack at {stack}. This userfaultfd is for user mode only, so the kernel cannot wait for its pages while it delivers a signal, and the program would be killed: {fix}"
            ));
        }
        if range.contains(self.object_addr) {
            return refused(format!(
                "{range} holds objects of uhmm's own at {:#x}. This userfaultfd is for user mode only, so uhmm's system calls on them would fail with EFAULT: {fix}",
                self.object_addr
            ));
        }
        Ok(())
    }
}

/// Refuses private mappings of kinds that management would break. `grows_down` is asked for mappings that could.
pub(crate) fn check_kinds(
    range: AddrRange,
    vmas: &[(Vma, String)],
    grows_down: impl Fn(&Vma) -> Result<bool, Error>,
) -> Result<(), Error> {
    let refused = |text| Err(Error::Service { code: ErrorCode::Invalid, text });
    for (vma, name) in vmas.iter().filter(|(vma, _)| !vma.shared && vma.inode == 0) {
        let mapping = vma.range();
        if is_kernels(name) {
            return refused(format!(
                "{range} holds {name} at {mapping}, pages of the kernel that nobody can take out: leave it out"
            ));
        }
        if vma.exec {
            return refused(format!(
                "{range} holds executable memory at {mapping}, and Linux moves pages between mappings of the same rights only: leave it out, or take PROT_EXEC away"
            ));
        }
        if name == "[stack]" || grows_down(vma)? {
            let name = if name.is_empty() { "a mapping" } else { name };
            return refused(format!(
                "{range} holds {name} at {mapping} that grows downwards by itself, and nobody is told when it does: leave it out, or map memory without MAP_GROWSDOWN"
            ));
        }
    }
    Ok(())
}

/// Mappings that the kernel makes in every process.
pub(crate) fn is_kernels(name: &str) -> bool {
    ["[vdso]", "[vsyscall]", "[uprobes]"].contains(&name) || name.starts_with("[vvar")
}

/// [`own_memory::grows_down`], as [`check_kinds`] wants it. A mapping that has gone meanwhile does not grow.
pub(crate) fn asks_kernel(vma: &Vma) -> Result<bool, Error> {
    debug_assert!(vma.start.is_multiple_of(PAGE_SIZE));
    match own_memory::grows_down(vma) {
        Err(error) if error.errno() == Some(NO_MAPPING) => Ok(false),
        answer => answer.map_err(Error::kernel("Asking whether a mapping grows")),
    }
}

/// ENOMEM: what mprotect says about a hole.
const NO_MAPPING: i32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: AddrRange = AddrRange { start: 0x10000, len: 0x8000 };

    fn facts(kind: UffdKind) -> Facts {
        Facts { own: None, threads: Vec::new(), alternate_stack: None, object_addr: 0, kind }
    }

    fn refusal(facts: &Facts) -> String {
        let error = facts.check(RANGE).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Permission, "{error}");
        error.to_string()
    }

    #[test]
    fn uhmms_own_mappings_and_threads_last_words_are_refused_in_every_mode() {
        for kind in [UffdKind::Full, UffdKind::UserModeOnly] {
            assert!(facts(kind).check(RANGE).is_ok());
            let own = AddrRange { start: 0x17000, len: 0x9000 };
            let text = refusal(&Facts { own: Some((own, "the agent's stack")), ..facts(kind) });
            assert!(text.contains("the agent's stack at 0x17000"), "{text}");
            let words = |robust_list| vec![ThreadWords { tid: 77, robust_list }];
            let text = refusal(&Facts { threads: words(0x17ff8), ..facts(kind) });
            assert!(text.contains("thread 77 at 0x17ff8") && text.contains("pthread_join"), "{text}");
            assert!(Facts { threads: words(0x18000), ..facts(kind) }.check(RANGE).is_ok());
        }
    }

    #[test]
    fn what_the_kernel_cannot_wait_for_is_refused_in_user_mode_only() {
        let stack =
            Facts { alternate_stack: Some(AddrRange { start: 0x12000, len: 0x2000 }), ..facts(UffdKind::UserModeOnly) };
        assert!(refusal(&stack).contains("alternate signal stack at 0x12000"));
        assert!(Facts { kind: UffdKind::Full, ..stack }.check(RANGE).is_ok());
        let object = Facts { object_addr: 0x14010, ..facts(UffdKind::UserModeOnly) };
        assert!(refusal(&object).contains("objects of uhmm's own at 0x14010"));
        assert!(Facts { kind: UffdKind::Full, ..object }.check(RANGE).is_ok());
    }

    fn vma(name: &str, exec: bool) -> (Vma, String) {
        let (read, write, shared, page_size_bytes) = (true, !exec, false, PAGE_SIZE);
        let (start, end, offset, device, inode) = (0x10000, 0x18000, 0, (0, 0), 0);
        (Vma { start, end, read, write, exec, shared, page_size_bytes, offset, device, inode }, name.into())
    }

    #[test]
    fn kinds_that_management_would_break_are_named() {
        let check = |vma: (Vma, String), grows| check_kinds(RANGE, &[vma], |_| Ok(grows));
        let refusal = |vma, grows| {
            let error = check(vma, grows).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Invalid, "{error}");
            error.to_string()
        };
        for name in ["[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"] {
            assert!(refusal(vma(name, false), false).contains(&format!("{name} at 0x10000")));
        }
        assert!(refusal(vma("", true), false).contains("executable memory at 0x10000"));
        assert!(refusal(vma("[stack]", false), false).contains("[stack] at 0x10000"));
        assert!(refusal(vma("", false), true).contains("a mapping at 0x10000"));
        assert!(check(vma("", false), false).is_ok() && check(vma("[heap]", false), false).is_ok());
        let (shared, name) = vma("/dev/shm/x", true);
        assert!(check((Vma { shared: true, ..shared }, name), false).is_ok(), "used in place");
    }
}
