//! Everything that a call of the SDK can end with.

use std::path::PathBuf;

use uhmm_ipc::IpcError;
use uhmm_ipc::message::{ErrorCode, WireError};
use uhmm_kernel_hook::error::making_processes;
use uhmm_kernel_hook::{Full, HookError};

/// Why a call was not done. Local checks come before anything is sent; [`Error::Service`] is a service's own answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A service answered with an error. The code is the closed set of the protocol, the text is the service's.
    #[error("{text} ({code:?})")]
    Service {
        /// For programs.
        code: ErrorCode,
        /// For people.
        text: String,
    },
    /// The range or length is empty.
    #[error("The range is empty: give at least one page of 4096 bytes")]
    EmptyRange,
    /// The length is not a whole number of pages.
    #[error("The length of {len_bytes} bytes is not a multiple of the page size of 4096: use {next_bytes}")]
    UnalignedLength {
        /// As given.
        len_bytes: u64,
        /// The next longer length that would do.
        next_bytes: u64,
    },
    /// The address is not at the start of a page.
    #[error("The address {addr:#x} is not at the start of a page of 4096 bytes: the page that holds it starts at {:#x}", .addr & !4095)]
    UnalignedAddress {
        /// As given.
        addr: u64,
    },
    /// The range ends behind the last address.
    #[error("The range of {len_bytes} bytes at {addr:#x} ends behind the last address: shorten it")]
    RangeWraps {
        /// First address.
        addr: u64,
        /// Length.
        len_bytes: u64,
    },
    /// More than any address space holds.
    #[error("There is no memory of {len_bytes} bytes: that is more than an address space holds")]
    TooLong {
        /// As given.
        len_bytes: u64,
    },
    /// An access to a region does not lie inside.
    #[error(
        "{len_bytes} bytes at offset {offset} do not lie inside the region of {region_bytes} bytes: check the offset"
    )]
    OutsideRegion {
        /// Offset in the region.
        offset: u64,
        /// Length of the access.
        len_bytes: u64,
        /// Length of the region.
        region_bytes: u64,
    },
    /// A device name that cannot be the name of a socket.
    #[error("\"{name}\" cannot be a device's name: it has 1 to 64 letters, digits, '-', '_' or '.'; see `uhmm plan`")]
    BadDeviceName {
        /// As given.
        name: String,
    },
    /// The environment names a claim that cannot be one.
    #[error("UHMM_CLAIM is no claim: it is 64 hexadecimal digits, as `uhmm dra` sets it; unset it to use none")]
    BadClaim,
    /// All that is on a device is more than this machine has room for.
    #[error(
        "{away_bytes} bytes lie on the device and {free_bytes} are available here: end something, or move pages to another device, and try again"
    )]
    NoRoomAtHome {
        /// What would come.
        away_bytes: u64,
        /// MemAvailable.
        free_bytes: u64,
    },
    /// A device does not become empty.
    #[error("{pages} pages do not come home: the pager's log says why, `uhmm status` whose they are")]
    NotEmpty {
        /// How many.
        pages: u64,
    },
    /// Nothing serves there, or nobody is left there who could serve this session.
    #[error("No supervisor serves in {}: start one with `uhmm up`, or name its --run-dir", .run_dir.display())]
    NotRunning {
        /// Where it was looked for.
        run_dir: PathBuf,
    },
    /// This account may not go there (any more): another user's system, or the program has changed its user or root.
    #[error("This process may not enter {}: it runs as another user than the system, or has left it behind (setuid, chroot)", .run_dir.display())]
    Forbidden {
        /// Where it was looked for.
        run_dir: PathBuf,
    },
    /// A service has no socket in the run directory.
    #[error("There is no service \"{service}\" in {}: `uhmm status` lists what there is", .run_dir.display())]
    NoSuchService {
        /// Name.
        service: String,
        /// Where it was looked for.
        run_dir: PathBuf,
    },
    /// A system call of the SDK's own failed.
    #[error("{doing} failed")]
    Kernel {
        /// What the SDK was doing.
        doing: &'static str,
        /// The kernel hook's words.
        #[source]
        source: HookError,
    },
    /// A region's arena has no room for a value.
    #[error(transparent)]
    ArenaFull(#[from] Full),
    /// The event loop failed.
    #[error("The connection to the services failed")]
    Ipc(#[from] IpcError),
    /// A thread of the SDK could not be started.
    #[error("A thread of uhmm could not be started{}", what_limits(.0))]
    Thread(#[source] std::io::Error),
    /// The link thread has ended, or was killed alone (a seccomp filter of the program's).
    #[error("The session has ended, or its thread was killed: connect again")]
    AgentGone,
    /// The answer of a pending call was taken before.
    #[error("The result of this call was taken before: keep it when you take it")]
    AlreadyTaken,
    /// This is not a forked child, or nobody looks after forked children here.
    #[error("This process is not a forked child of the session, or fork events are not granted (see `uhmm doctor`)")]
    NotForked,
    /// A service answered something that does not belong to the question.
    #[error("The answer to {question} was of another kind: the service does not speak this program's protocol")]
    StrangeReply {
        /// What was asked.
        question: &'static str,
    },
}

impl Error {
    /// The protocol's code: a service's own, or the nearest one for what the SDK found by itself.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::Service { code, .. } => *code,
            Error::EmptyRange
            | Error::UnalignedLength { .. }
            | Error::UnalignedAddress { .. }
            | Error::RangeWraps { .. }
            | Error::OutsideRegion { .. }
            | Error::AlreadyTaken
            | Error::BadClaim
            | Error::BadDeviceName { .. } => ErrorCode::Invalid,
            Error::NotRunning { .. } | Error::NoSuchService { .. } | Error::NotForked => ErrorCode::NotFound,
            Error::Forbidden { .. } => ErrorCode::Permission,
            Error::ArenaFull(_) | Error::TooLong { .. } | Error::NoRoomAtHome { .. } => ErrorCode::NoMemory,
            Error::Kernel { .. } | Error::Ipc(_) | Error::Thread(_) | Error::NotEmpty { .. } => ErrorCode::Io,
            Error::AgentGone => ErrorCode::Stale,
            Error::StrangeReply { .. } => ErrorCode::Protocol,
        }
    }

    /// The same call may succeed when it is made again: the page was in motion, the service was restarting, time ran out.
    pub fn is_transient(&self) -> bool {
        matches!(self.code(), ErrorCode::Busy | ErrorCode::Stale | ErrorCode::TimedOut)
            && !matches!(self, Error::AgentGone)
    }

    /// Wraps a kernel hook's error with what the SDK was doing.
    pub(crate) fn kernel(doing: &'static str) -> impl FnOnce(HookError) -> Error {
        move |source| Error::Kernel { doing, source }
    }
}

fn what_limits(error: &std::io::Error) -> String {
    match making_processes(error.raw_os_error().unwrap_or(0)) {
        "" => String::new(),
        hint => format!(". {hint}"),
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        Error::Service { code: error.code, text: error.text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_services_code_and_text_arrive_unchanged() {
        let error = Error::from(WireError::new(ErrorCode::NoMemory, "Device soft0 is full"));
        assert_eq!(error.code(), ErrorCode::NoMemory);
        assert_eq!(error.to_string(), "Device soft0 is full (NoMemory)");
        assert!(!error.is_transient());
    }

    #[test]
    fn only_what_may_pass_is_transient() {
        for (code, transient) in [
            (ErrorCode::Busy, true),
            (ErrorCode::Stale, true),
            (ErrorCode::TimedOut, true),
            (ErrorCode::Invalid, false),
            (ErrorCode::Io, false),
        ] {
            assert_eq!(Error::from(WireError::new(code, "X")).is_transient(), transient, "{code:?}");
        }
        assert!(!Error::AgentGone.is_transient());
    }

    #[test]
    fn local_errors_say_what_to_do() {
        let error = Error::UnalignedLength { len_bytes: 5000, next_bytes: 8192 };
        assert!(error.to_string().ends_with("use 8192"), "{error}");
        assert_eq!(error.code(), ErrorCode::Invalid);
    }
}
