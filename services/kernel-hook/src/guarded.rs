//! Bulk copies to and from memory that may vanish: a device's BAR (unplugged, switched off), a file that its owner can shorten.
//! The kernel does them (`process_vm_readv` on this very process, which needs no rights), so what is gone is EFAULT and not SIGBUS.
//!
//! The kernel looks up the far side as ordinary pages, which a BAR has none of; the near side it just reads and writes. So the
//! vanishing memory is always the near side, and between two such places bytes go through a buffer.

use std::io;

use crate::error::HookError;
use crate::range::AddrRange;

/// Bytes of the buffer between two vanishing places, and of the zeroes that fill one.
const BUFFER_BYTES: usize = 64 << 10;

/// One end of a copy.
#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) at: *mut u8,
    /// It may vanish.
    pub(crate) guarded: bool,
}

/// Copies between two places of which at least one may vanish.
///
/// # Safety
/// Both ends are mappings of `len` bytes, `to` is writable, and no reference to its bytes exists.
pub(crate) unsafe fn copy(from: End, to: End, len: usize) -> Result<(), HookError> {
    if !(from.guarded && to.guarded) {
        // SAFETY: the caller's.
        return unsafe { transfer(from, to, len) };
    }
    let mut buffer = vec![0u8; BUFFER_BYTES];
    let between = End { at: buffer.as_mut_ptr(), guarded: false };
    let mut done = 0;
    while done < len {
        let part = (len - done).min(BUFFER_BYTES);
        // SAFETY: `done + part <= len`; the buffer is ours alone.
        unsafe {
            transfer(from.add(done), between, part)?;
            transfer(between, to.add(done), part)?;
        }
        done += part;
    }
    Ok(())
}

/// Sets `len` bytes of a place that may vanish.
///
/// # Safety
/// `to` is a writable mapping of `len` bytes, and no reference to its bytes exists.
pub(crate) unsafe fn fill(to: End, byte: u8, len: usize) -> Result<(), HookError> {
    let mut buffer = vec![byte; BUFFER_BYTES.min(len)];
    let from = End { at: buffer.as_mut_ptr(), guarded: false };
    let mut done = 0;
    while done < len {
        let part = (len - done).min(BUFFER_BYTES);
        // SAFETY: `done + part <= len`; the buffer is ours alone.
        unsafe { transfer(from, to.add(done), part)? };
        done += part;
    }
    Ok(())
}

impl End {
    /// # Safety
    /// The result stays inside the mapping.
    unsafe fn add(self, bytes: usize) -> Self {
        // SAFETY: the caller's.
        Self { at: unsafe { self.at.add(bytes) }, ..self }
    }
}

/// # Safety
/// As [`copy`]; at most one end is guarded.
unsafe fn transfer(from: End, to: End, len: usize) -> Result<(), HookError> {
    let mut done = 0;
    while done < len {
        let part = |end: End| libc::iovec { iov_base: end.at.wrapping_add(done).cast(), iov_len: len - done };
        let (source, target) = (part(from), part(to));
        let this = std::process::id() as libc::pid_t;
        // SAFETY: both vectors name mappings of the caller's (see `copy`); the kernel answers EFAULT for what is not there.
        let moved = unsafe {
            if from.guarded {
                libc::process_vm_writev(this, &source, 1, &target, 1, 0)
            } else {
                libc::process_vm_readv(this, &target, 1, &source, 1, 0)
            }
        };
        let gone = || {
            let guarded = if from.guarded { from } else { to };
            let range =
                AddrRange { start: guarded.at.expose_provenance() as u64 + done as u64, len: (len - done) as u64 };
            let source =
                if moved < 0 { io::Error::last_os_error() } else { io::Error::from_raw_os_error(libc::EFAULT) };
            HookError::on("Copy of memory that may vanish", range, source, "The device or the file behind it is gone")
        };
        match usize::try_from(moved) {
            Ok(moved) if moved > 0 => done += moved,
            _ => return Err(gone()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use crate::window::{Prot, Window};

    #[test]
    fn what_is_gone_is_an_error_and_not_a_signal() {
        let fd = rustix::fs::memfd_create("uhmm-guarded-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 64 * 4096).unwrap();
        let window = Window::map_guarded(fd.as_fd(), 0, 64 * 4096, Prot::ReadWrite).unwrap();
        let other = Window::map_guarded(fd.as_fd(), 0, 64 * 4096, Prot::ReadWrite).unwrap();
        let plain = Window::anonymous(64 * 4096).unwrap();
        let text: Vec<u8> = (0..20 * 4096u32).map(|n| (n % 251) as u8).collect();
        window.write(100, &text).unwrap();
        let mut back = vec![0; text.len()];
        other.read(100, &mut back).unwrap();
        assert_eq!(back, text);
        window.copy_to(100, &plain, 7, text.len() as u64).unwrap();
        assert!(plain.compare(7, &text).unwrap());
        plain.copy_to(7, &window, 4000, text.len() as u64).unwrap();
        assert!(window.compare(4000, &text).unwrap());
        window.copy_to(4000, &other, 30 * 4096, 20 * 4096).unwrap();
        assert!(window.compare(30 * 4096, &text).unwrap());
        window.fill(5, 30 * 4096, 0xee).unwrap();
        assert_eq!((window.load_u8(4).unwrap(), window.load_u8(30 * 4096 + 4).unwrap()), (0, 0xee));

        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert!(window.read(8000, &mut back[..100]).is_err());
        assert!(window.write(8000, &text[..100]).is_err());
        assert!(window.fill(0, 3 * 4096, 1).is_err());
        assert!(window.copy_to(4096, &plain, 0, 4096).is_err() && plain.copy_to(0, &window, 4096, 4096).is_err());
        assert!(window.copy_to(0, &other, 4096, 4096).is_err());
        assert!(window.copy_to(0, &plain, 0, 4096).is_ok());
    }
}
