//! One page of a direct access: between the client's buffer and wherever the page is, in the loop.

use std::sync::atomic::Ordering;

use uhmm_ipc::message::driver::AccessOp;
use uhmm_ipc::message::{ErrorCode, Fd, WireError};
use uhmm_kernel_hook::{HookError, Window};

use super::{Access, Wanted};
use crate::device::{PAGE_BYTES, Place, SystemPages};

/// The range, and whether there is a buffer where there must be one; that one, if bytes go there.
pub(super) fn check(wanted: &Wanted) -> Result<Option<&Fd>, WireError> {
    let invalid = |text: String| WireError::new(ErrorCode::Invalid, text);
    let Wanted { addr, len_bytes, op, buffer, .. } = wanted;
    let aligned = addr.is_multiple_of(PAGE_BYTES) && len_bytes.is_multiple_of(PAGE_BYTES);
    if *len_bytes == 0 || !aligned || addr.checked_add(*len_bytes).is_none() {
        return Err(invalid(format!("Range [{addr:#x}, +{len_bytes:#x}) is empty, wraps, or is not page aligned")));
    }
    match buffer {
        _ if wanted.needs_no_bytes() => Ok(None),
        None => Err(invalid(format!("{op:?} needs a buffer"))),
        Some(buffer) => Ok(Some(buffer)),
    }
}

pub(super) fn buffer_refused(error: &HookError) -> WireError {
    WireError::new(ErrorCode::Invalid, format!("The buffer is refused: {error}"))
}

/// Why a page could not be accessed.
#[derive(Debug)]
pub(super) struct TransferError {
    code: ErrorCode,
    text: String,
}

impl TransferError {
    pub(super) fn at(self, addr: u64) -> WireError {
        WireError::new(self.code, format!("Device access of address {addr:#x} failed: {}", self.text))
    }
}

impl From<HookError> for TransferError {
    fn from(error: HookError) -> Self {
        Self { code: ErrorCode::Io, text: error.to_string() }
    }
}

impl From<&str> for TransferError {
    fn from(text: &str) -> Self {
        Self { code: ErrorCode::Io, text: text.into() }
    }
}

impl From<std::io::Error> for TransferError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Self { code: ErrorCode::Fault, text: "it lies behind the end of its file".into() }
            }
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                let text = format!("its file may not be written (sealed, or on a read-only file system): {error}");
                Self { code: ErrorCode::Permission, text }
            }
            std::io::ErrorKind::StorageFull => Self { code: ErrorCode::NoMemory, text: error.to_string() },
            _ => Self { code: ErrorCode::Io, text: error.to_string() },
        }
    }
}

/// One page. `alone`: nobody else changes a frame meanwhile.
pub(super) fn transfer(
    access: &Access,
    memory: Option<&Window>,
    place: Place<'_>,
    alone: bool,
) -> Result<(), TransferError> {
    let (Some(buffer), op) = (&access.buffer, access.wanted.op) else { return Ok(()) };
    let at = access.done_pages * PAGE_BYTES;
    let (bytes, offset) = match place {
        Place::Frame(frame) => (memory.ok_or("the device has no aperture")?, u64::from(frame) * PAGE_BYTES),
        Place::System(SystemPages::Mapped(window), page) => (window, page * PAGE_BYTES),
        Place::System(SystemPages::Private, _) => return Err("private memory was mapped in place".into()),
        Place::System(SystemPages::File(file), page) => {
            let mut page_bytes = vec![0; PAGE_BYTES as usize];
            let offset = page * PAGE_BYTES;
            match op {
                AccessOp::Read | AccessOp::Peek => {
                    file.read(offset, &mut page_bytes)?;
                    buffer.write(at, &page_bytes)?;
                }
                AccessOp::Write => {
                    buffer.read(at, &mut page_bytes)?;
                    file.write(offset, &page_bytes)?;
                }
                AccessOp::FetchAdd(_) => {
                    let text = "it is a page of a file, where nothing can be added atomically".into();
                    return Err(TransferError { code: ErrorCode::Invalid, text });
                }
                AccessOp::MakeExclusive | AccessOp::Map | AccessOp::MapForWrite => {}
            }
            return Ok(());
        }
    };
    match op {
        AccessOp::Read | AccessOp::Peek => bytes.copy_to(offset, buffer, at, PAGE_BYTES)?,
        AccessOp::Write => buffer.copy_to(at, bytes, offset, PAGE_BYTES)?,
        AccessOp::FetchAdd(value) if alone && matches!(place, Place::Frame(_)) => {
            let mut words = [0u64; PAGE_BYTES as usize / 8];
            bytes.read_words(offset, &mut words)?;
            buffer.write_words(at, &words)?;
            words.iter_mut().for_each(|word| *word = word.wrapping_add(value));
            bytes.write_words(offset, &words)?;
        }
        AccessOp::FetchAdd(value) => {
            for word in (0..PAGE_BYTES).step_by(8) {
                let before = bytes.atomic_u64(offset + word)?.fetch_add(value, Ordering::SeqCst);
                buffer.store_u64(at + word, before)?;
            }
        }
        AccessOp::MakeExclusive | AccessOp::Map | AccessOp::MapForWrite => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uhmm_ipc::message::TraceId;
    use uhmm_kernel_hook::memfd;

    use super::*;

    fn wanted(addr: u64, len_bytes: u64, op: AccessOp, buffer_bytes: Option<u64>) -> Wanted {
        let buffer = buffer_bytes.map(|len| Arc::new(memfd::create_sealed("uhmm-test", len).unwrap()));
        Wanted { space: 1, addr, len_bytes, op, buffer }
    }

    #[test]
    fn ranges_and_buffers_are_checked_before_anything_begins() {
        let ok = |wanted: Wanted| check(&wanted).map(|_| ()).map_err(|error| error.code);
        assert_eq!(ok(wanted(4096, 8192, AccessOp::Read, Some(8192))), Ok(()));
        assert_eq!(ok(wanted(4096, 8192, AccessOp::MakeExclusive, None)), Ok(()));
        for bad in [
            wanted(4097, 8192, AccessOp::Read, Some(8192)),
            wanted(4096, 0, AccessOp::Read, Some(4096)),
            wanted(4096, 100, AccessOp::Read, Some(4096)),
            wanted(u64::MAX - 4095, 8192, AccessOp::Read, Some(8192)),
            wanted(4096, 8192, AccessOp::Write, None),
        ] {
            assert_eq!(ok(bad), Err(ErrorCode::Invalid));
        }
    }

    #[test]
    fn an_addition_returns_the_words_from_before() {
        let memory = Window::anonymous(8192).unwrap();
        memory.store_u64(4096 + 8, 5).unwrap();
        let buffer = Arc::new(Window::anonymous(4096).unwrap());
        let of = wanted(0, 4096, AccessOp::FetchAdd(u64::MAX), Some(4096));
        let access = Access::new(of, Some(buffer.clone()), TraceId(0));
        for (alone, second) in [(false, 4), (true, 3)] {
            transfer(&access, Some(&memory), Place::Frame(1), alone).unwrap();
            assert_eq!(memory.load_u64(4096 + 8).unwrap(), second);
            assert_eq!(buffer.load_u64(8).unwrap(), second + 1);
        }
        assert_eq!((memory.load_u64(4096).unwrap(), buffer.load_u64(0).unwrap()), (u64::MAX - 1, u64::MAX));
    }
}
