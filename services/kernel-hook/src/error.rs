//! The one error of this crate: which call failed, on which range, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::range::AddrRange;

/// An error with all its causes, in one line: for logs, for the wire and for people.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Why a kernel call or an access was not done. Nothing was changed unless a variant says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// The kernel refused a call.
    #[error("{call} failed{}: {source}{}", on_range(.range), hint_text(.hint))]
    Call {
        /// The call, in the kernel's words.
        call: &'static str,
        /// The addresses it was about, where it had any.
        range: Option<AddrRange>,
        /// The kernel's answer.
        source: io::Error,
        /// What to do, or empty.
        hint: &'static str,
    },
    /// No way of making a userfaultfd worked.
    #[error(
        "No userfaultfd could be made ({tried}): {source}. Run as root, or give this account /dev/userfaultfd, or allow the userfaultfd call in the container's seccomp profile"
    )]
    NoUserfaultfd {
        /// Each way and its answer.
        tried: String,
        /// The answer of the last way.
        source: io::Error,
    },
    /// A value is not a multiple of its unit.
    #[error("The {what} {value:#x} is not a multiple of {align}: align it")]
    Unaligned {
        /// Which value.
        what: &'static str,
        /// The value.
        value: u64,
        /// The unit in bytes.
        align: u64,
    },
    /// A range or length is zero.
    #[error("The range at {start:#x} is empty: give at least one page")]
    Empty {
        /// Where it would start.
        start: u64,
    },
    /// A range ends behind the last address.
    #[error("The range {start:#x}+{len:#x} wraps around the address space: shorten it")]
    Wraps {
        /// First byte.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// An access does not lie inside its mapping or file.
    #[error("Bytes {off:#x}+{len:#x} lie outside the {window_len:#x} bytes there are: check the offset")]
    OutOfWindow {
        /// First byte asked for.
        off: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        window_len: u64,
    },
    /// A write to a mapping that was made read-only.
    #[error("This mapping is read-only: map it with Prot::ReadWrite to change it")]
    ReadOnly,
    /// A raw access to a mapping whose bytes belong to typed values (a `Bump`), or a `Bump` over one already in use.
    #[error("This mapping is already used {used}: raw writes, atomics and one arena exclude each other")]
    Claimed {
        /// By what.
        used: &'static str,
    },
    /// A file that must be sealed is not.
    #[error("The file is not a memfd with seals {missing}: create it with memfd::create_sealed")]
    NotSealed {
        /// The seals that are missing, or all for a file that cannot be sealed.
        missing: String,
    },
    /// A file of reserved huge pages where one of ordinary pages is needed.
    #[error(
        "The memfd consists of hugetlb pages, and an access raises SIGBUS where none is left: create it without MFD_HUGETLB"
    )]
    HugePages,
    /// A file has another size than was agreed.
    #[error("The file has {found} bytes where {expected} were agreed: send the right descriptor")]
    WrongSize {
        /// Bytes agreed.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A listener is alive at this path.
    #[error("{} is in use by a running process: stop it, or choose another run directory", .path.display())]
    AddrInUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something that is no socket is at this path.
    #[error("{} exists and is not a socket: move it away", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A socket file's call failed.
    #[error("{call} failed for {}: {source}{}", .path.display(), hint_text(.hint))]
    Path {
        /// The call.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
        /// What to do, or empty.
        hint: &'static str,
    },
    /// The kernel answered something this crate does not know.
    #[error("The kernel's answer to {call} was not understood: {detail}")]
    Strange {
        /// The call or file.
        call: &'static str,
        /// What came.
        detail: String,
    },
    /// A message that cannot be sent as it is.
    #[error("The message cannot be sent: {0}")]
    BadMessage(&'static str),
    /// Writing into this very process by address would break Rust's rules.
    #[error("Process {pid} is this process: use its own mappings instead of process_vm_writev")]
    OwnMemory {
        /// This process.
        pid: u32,
    },
}

impl HookError {
    /// The kernel's error number, where a call failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } | Self::Path { source, .. } | Self::NoUserfaultfd { source, .. } => {
                source.raw_os_error()
            }
            Self::AddrInUse { .. } => Some(libc::EADDRINUSE),
            _ => None,
        }
    }

    /// A failed call that another crate made with std (dup, open): the same words for the same kind of failure.
    #[must_use]
    pub fn call(call: &'static str, range: Option<AddrRange>, source: impl Into<io::Error>) -> Self {
        Self::Call { call, range, source: source.into(), hint: "" }
    }

    /// A failed call without addresses.
    pub(crate) fn failed(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::call(call, None, source)
    }

    /// A failed call with what to do about it.
    pub(crate) fn hinted(call: &'static str, source: impl Into<io::Error>, hint: &'static str) -> Self {
        Self::Call { call, range: None, source: source.into(), hint }
    }

    /// A failed call on a range.
    pub(crate) fn on(call: &'static str, range: AddrRange, source: impl Into<io::Error>, hint: &'static str) -> Self {
        let source = source.into();
        // Whatever splits or makes a mapping meets the limit of how many a process may have, and nobody thinks of it.
        let hint = if hint.is_empty() && source.raw_os_error() == Some(libc::ENOMEM) { NO_MEMORY } else { hint };
        Self::Call { call, range: Some(range), source, hint }
    }
}

/// What to do when no process and no thread can be made. Empty where it is not for a limit.
#[must_use]
pub fn making_processes(errno: i32) -> &'static str {
    match errno {
        libc::EAGAIN => {
            "This program's control group (pids.max) or user (RLIMIT_NPROC, `ulimit -u`) has as many processes and threads as it may: raise that limit, or end some"
        }
        libc::ENOMEM => "Check free memory and the control group's limit",
        libc::EPERM | libc::EACCES | libc::ENOSYS => {
            "A seccomp filter may forbid clone: connect before it is installed"
        }
        _ => "",
    }
}

const NO_MEMORY: &str = "Check free memory and vm.max_map_count (sysctl), the most mappings that a process may have";

fn on_range(range: &Option<AddrRange>) -> String {
    range.map(|range| format!(" on {range}")).unwrap_or_default()
}

fn hint_text(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(". {hint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_names_call_range_and_remedy() {
        let range = AddrRange { start: 0x1000, len: 0x2000 };
        let error = HookError::on("UFFDIO_REGISTER", range, io::Error::from_raw_os_error(libc::EBUSY), "Unregister it");
        let text = error.to_string();
        assert!(text.starts_with("UFFDIO_REGISTER failed on 0x1000+0x2000: "), "{text}");
        assert!(text.ends_with(". Unregister it"), "{text}");
        assert_eq!(error.errno(), Some(libc::EBUSY));
        let full =
            |hint| HookError::on("mprotect", range, io::Error::from_raw_os_error(libc::ENOMEM), hint).to_string();
        assert!(full("").contains("vm.max_map_count") && full("Unmap it").ends_with(". Unmap it"));
        assert_eq!(HookError::ReadOnly.errno(), None);
    }

    #[test]
    fn a_limit_of_processes_is_not_taken_for_a_filter() {
        assert!(
            making_processes(libc::EAGAIN).contains("pids.max") && making_processes(libc::EAGAIN).contains("ulimit -u")
        );
        assert!(
            !making_processes(libc::EAGAIN).contains("seccomp") && !making_processes(libc::ENOMEM).contains("seccomp")
        );
        assert!(making_processes(libc::EPERM).contains("seccomp"));
    }
}
