//! Errors: a number for programs, a text for people.
//!
//! A function answers 0 or `-errno`. The text of a thread's last failed call stays with that thread until its next failure.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use uhmm_sdk::ErrorCode;

use crate::buffers::{copy_text, items_mut};

/// Why a call of the C interface was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The SDK's or a service's own.
    #[error(transparent)]
    Sdk(#[from] uhmm_sdk::Error),
    /// A pointer that must not be null.
    #[error("The pointer `{name}` is null: give the address of a variable or buffer")]
    Null { name: &'static str },
    /// A pointer that cannot point to what it should.
    #[error("The pointer `{name}` is not aligned to {align} bytes: it does not point to what the header says")]
    Misaligned { name: &'static str, align: usize },
    /// No object is that large.
    #[error("The length of `{name}`, {count}, is larger than any object: check its sign and its unit")]
    TooLong { name: &'static str, count: usize },
    /// Text that is not UTF-8.
    #[error("The text `{name}` is not UTF-8: names and paths must be")]
    NotText { name: &'static str },
    /// A handle that was closed, never opened or of another kind.
    #[error("This is no open {kind}: it was closed before, never opened, or is a handle of another kind")]
    NoHandle { kind: &'static str },
    /// A handle that came through fork.
    #[error(
        "This {kind} belongs to process {owner}, which forked this one: call uhmm_in_child() and use the session it gives"
    )]
    OtherProcess { kind: &'static str, owner: u32 },
    /// A number outside what the header lists.
    #[error("The value {value} of `{name}` is not possible: {expected}")]
    BadValue { name: &'static str, value: i64, expected: &'static str },
    /// An array of the caller's that is too short.
    #[error("The array `{name}` has room for {capacity}, but {needed} are needed: make it larger")]
    TooSmall { name: &'static str, capacity: usize, needed: u64 },
    /// No allocation begins there.
    #[error("No memory that uhmm_allocate() gave begins at {addr:#x} in this session: it was freed before, or adopted")]
    NoAllocation { addr: u64 },
    /// No such counter.
    #[error("The service \"{service}\" has no counter \"{name}\": uhmm_stats() lists them")]
    NoCounter { service: String, name: String },
    /// A kernel index behind the last.
    #[error("The device has {count} kernels, number {index} is not one of them")]
    NoKernel { index: usize, count: usize },
    /// A pending call without an answer yet.
    #[error("The answer is not here yet: uhmm_pending_wait() waits for it")]
    NotReady,
    /// A pending call of another kind.
    #[error("This call's answer is of another kind: use {with}")]
    OtherAnswer { with: &'static str },
    /// A call's error that was kept with its pending handle.
    #[error("{text}")]
    Kept { errno: c_int, text: String },
    /// A bug.
    #[error("A bug in libuhmm was met ({0}): please report it; the call may or may not have been done")]
    Panic(String),
}

impl Failure {
    /// The number without its sign.
    pub(crate) fn errno(&self) -> c_int {
        match self {
            Failure::Sdk(uhmm_sdk::Error::NotRunning { .. }) => libc::ENOTCONN,
            Failure::Sdk(error @ (uhmm_sdk::Error::Kernel { .. } | uhmm_sdk::Error::Thread(_))) => kernels_errno(error),
            Failure::Sdk(error) => errno_of(error.code()),
            Failure::Null { .. }
            | Failure::Misaligned { .. }
            | Failure::TooLong { .. }
            | Failure::NotText { .. }
            | Failure::NoHandle { .. }
            | Failure::OtherProcess { .. }
            | Failure::BadValue { .. }
            | Failure::TooSmall { .. }
            | Failure::OtherAnswer { .. } => libc::EINVAL,
            Failure::NoAllocation { .. } | Failure::NoCounter { .. } | Failure::NoKernel { .. } => libc::ENOENT,
            Failure::NotReady => libc::EBUSY,
            Failure::Kept { errno, .. } => *errno,
            Failure::Panic(_) => libc::EIO,
        }
    }

    /// The text with every cause behind it that it does not name already.
    pub(crate) fn full_text(&self) -> String {
        let own = match self {
            // The code is the number that C has already, under a name of ours.
            Failure::Sdk(uhmm_sdk::Error::Service { text, .. }) => text.clone(),
            other => other.to_string(),
        };
        causes(self).skip(1).fold(own, |text, error| {
            let next = error.to_string();
            if text.contains(&next) { text } else { format!("{text}: {next}") }
        })
    }

    /// For answers that are read more than once.
    pub(crate) fn keep(&self) -> Failure {
        Failure::Kept { errno: self.errno(), text: self.full_text() }
    }
}

/// An error and what is behind it.
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// A system call of the SDK's own failed: the numbers that a program can do something about are kept, the rest is EIO.
fn kernels_errno(error: &uhmm_sdk::Error) -> c_int {
    let kernels = causes(error).find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    match kernels {
        Some(libc::ENOMEM) => libc::ENOMEM,
        Some(libc::EPERM | libc::EACCES) => libc::EPERM,
        Some(libc::EAGAIN) => libc::EAGAIN,
        _ => errno_of(error.code()),
    }
}

/// The kernel's numbers for the closed set of the protocol.
fn errno_of(code: ErrorCode) -> c_int {
    match code {
        ErrorCode::Fault => libc::EFAULT,
        ErrorCode::Permission => libc::EPERM,
        ErrorCode::Invalid => libc::EINVAL,
        ErrorCode::NotFound => libc::ENOENT,
        ErrorCode::Busy => libc::EBUSY,
        ErrorCode::NoMemory => libc::ENOMEM,
        ErrorCode::Io => libc::EIO,
        ErrorCode::Stale => libc::ESTALE,
        ErrorCode::TimedOut => libc::ETIMEDOUT,
        ErrorCode::Protocol => libc::EPROTO,
    }
}

thread_local! {
    /// Text of this thread's last failure.
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs one call: 0, or the negative number of its error. Nothing unwinds into C.
pub(crate) fn guard(call: impl FnOnce() -> Result<(), Failure>) -> c_int {
    guard_value(|| call().map(|()| 0))
}

/// [`guard`] for calls that answer a number of their own.
pub(crate) fn guard_value(call: impl FnOnce() -> Result<c_int, Failure>) -> c_int {
    // What the closure holds is dropped by the unwinding and nothing of it is looked at afterwards.
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(Failure::Panic(panic_text(&*panic))));
    result.unwrap_or_else(|failure| {
        LAST.set(failure.full_text());
        -failure.errno()
    })
}

/// A call that succeeds leaves a text: why a part of what was asked was not done.
pub(crate) fn remark(text: &str) {
    LAST.set(text.to_owned());
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no text".into())
}

/// Writes the text of the calling thread's last failed call to `buffer` (at most `capacity` bytes with the final zero; longer
/// text is cut) and returns its full length in bytes without the zero. An empty text means that no call of this thread failed
/// yet; a call that succeeds leaves the text alone, but for migrations: pages of UHMM_PAGE_IO, UHMM_PAGE_NO_MEMORY and UHMM_PAGE_PINNED may
/// have stayed for a reason that is told here. With a capacity of 0, `buffer` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uhmm_last_error(buffer: *mut c_char, capacity: usize) -> usize {
    let text = LAST.with_borrow(Clone::clone);
    // SAFETY: the caller promises `capacity` writable bytes.
    if let Ok(buffer) = unsafe { items_mut(buffer, capacity, "buffer") } {
        copy_text(&text, buffer);
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use uhmm_kernel_hook::HookError;

    use super::*;

    fn last_error() -> String {
        // SAFETY: a capacity of 0 writes nothing.
        let len = unsafe { uhmm_last_error(std::ptr::null_mut(), 0) };
        let mut buffer = vec![1 as c_char; len + 1];
        // SAFETY: the vector has this many elements.
        assert_eq!(unsafe { uhmm_last_error(buffer.as_mut_ptr(), buffer.len()) }, len);
        assert_eq!(buffer.pop(), Some(0));
        String::from_utf8(buffer.into_iter().map(|char| char as u8).collect()).unwrap()
    }

    #[test]
    fn every_code_has_its_own_number() {
        use ErrorCode::*;
        let all = [Fault, Permission, Invalid, NotFound, Busy, NoMemory, Io, Stale, TimedOut, Protocol];
        let numbers: std::collections::HashSet<_> = all.into_iter().map(errno_of).collect();
        assert_eq!(numbers.len(), all.len());
        let not_running = uhmm_sdk::Error::NotRunning { run_dir: "/nowhere".into() };
        assert_eq!(Failure::from(not_running).errno(), libc::ENOTCONN);
    }

    #[test]
    fn a_panic_becomes_eio_and_its_text_is_kept() {
        assert_eq!(guard(|| panic!("number {}", 7)), -libc::EIO);
        assert!(last_error().contains("number 7"), "{}", last_error());
        assert_eq!(guard(|| panic!("plain")), -libc::EIO);
        assert!(last_error().contains("plain"), "{}", last_error());
    }

    #[test]
    fn the_text_stays_until_the_next_failure_and_belongs_to_its_thread() {
        assert_eq!(guard(|| Err(Failure::Null { name: "session" })), -libc::EINVAL);
        assert_eq!(guard(|| Ok(())), 0);
        assert!(last_error().contains("`session`"));
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(guard(|| Err(Failure::NotReady)), -libc::EBUSY);
        assert!(last_error().contains("uhmm_pending_wait"));
    }

    #[test]
    fn a_short_buffer_gets_the_beginning_and_its_zero() {
        assert_eq!(guard(|| Err(Failure::NotReady)), -libc::EBUSY);
        let mut buffer = [1 as c_char; 5];
        // SAFETY: four of the five bytes are offered.
        let len = unsafe { uhmm_last_error(buffer.as_mut_ptr(), 4) };
        assert!(len > 4);
        assert_eq!(buffer, [b'T' as c_char, b'h' as c_char, b'e' as c_char, 0, 1]);
    }

    #[test]
    fn the_kernels_number_is_kept_where_a_program_can_do_something() {
        let of = |number| {
            let source = std::io::Error::from_raw_os_error(number);
            let source = HookError::Call { call: "mmap", range: None, source, hint: "Check free memory" };
            Failure::from(uhmm_sdk::Error::Kernel { doing: "Mapping", source })
        };
        for (number, expected) in [
            (libc::ENOMEM, libc::ENOMEM),
            (libc::EPERM, libc::EPERM),
            (libc::EACCES, libc::EPERM),
            (libc::EAGAIN, libc::EAGAIN),
            (libc::ENODEV, libc::EIO),
        ] {
            assert_eq!(of(number).errno(), expected);
        }
        let text = of(libc::ENOMEM).full_text();
        assert_eq!(text.matches("Cannot allocate memory").count(), 1, "{text}");
    }

    #[test]
    fn nothing_of_rust_is_named() {
        let code = ErrorCode::Fault;
        let service = Failure::from(uhmm_sdk::Error::Service { code, text: "Range is in no region".into() });
        assert_eq!(service.full_text(), "Range is in no region");
        let unaligned = Failure::from(uhmm_sdk::Error::UnalignedAddress { addr: 0x5008 });
        assert!(unaligned.full_text().ends_with("starts at 0x5000"), "{}", unaligned.full_text());
    }

    #[test]
    fn causes_are_part_of_the_text() {
        let source = std::io::Error::other("no threads left");
        let failure = Failure::from(uhmm_sdk::Error::Thread(source));
        assert_eq!(failure.full_text(), "A thread of uhmm could not be started: no threads left");
        assert_eq!(failure.keep().full_text(), failure.full_text());
        assert_eq!(failure.keep().errno(), libc::EIO);
    }
}
