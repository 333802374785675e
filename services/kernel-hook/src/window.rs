//! A shared mapping of a file (memfd, BAR, ring) or private scratch memory, with the accessors of [`MappedBytes`].

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::bytes::MappedBytes;
use crate::error::HookError;
pub use crate::managed::ManagedMapping;
use crate::range::{AddrRange, aligned};

/// What a window allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prot {
    /// Loads only; stores answer `ReadOnly`.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

/// Mapped memory, released on drop. It never outlives its process; the file behind it does.
#[derive(Debug)]
pub struct Window {
    bytes: MappedBytes,
}

impl Window {
    /// Private memory that may not be touched before its rights are changed (`own_memory::protect`), and that nobody sets aside memory
    /// for: mlockall(MCL_FUTURE) populates nothing of it.
    ///
    /// # Errors
    /// `Empty`, `Call`: EAGAIN over RLIMIT_MEMLOCK under mlockall, ENOMEM over RLIMIT_AS.
    pub(crate) fn reserved(len: u64) -> Result<Self, HookError> {
        if len == 0 {
            return Err(HookError::Empty { start: 0 });
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map_raw(Placement::Anywhere, len, libc::PROT_NONE, flags, None)?;
        // SAFETY: a fresh mapping of that length, owned by nobody else; its owner makes it accessible before it is used.
        Ok(Self { bytes: unsafe { MappedBytes::from_raw(base, len, true) } })
    }

    /// Maps `len` bytes of `fd` from the page-aligned `off`, shared with everybody who maps the same file.
    ///
    /// # Errors
    /// `Unaligned`, `Empty`, `OutOfWindow` when a regular file is shorter, `Call` when the kernel refuses.
    pub fn map(fd: BorrowedFd<'_>, off: u64, len: u64, prot: Prot) -> Result<Self, HookError> {
        aligned("file offset", off)?;
        if len == 0 {
            return Err(HookError::Empty { start: off });
        }
        let stat = rustix::fs::fstat(fd).map_err(|error| HookError::failed("fstat", error))?;
        let file_len = stat.st_size.max(0) as u64;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        // A device node has no size; a file that ends early would raise SIGBUS on access.
        if regular && off.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(HookError::OutOfWindow { off, len, window_len: file_len });
        }
        let flags = match prot {
            Prot::ReadOnly => libc::PROT_READ,
            Prot::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let base = map_raw(Placement::Anywhere, len, flags, libc::MAP_SHARED, Some((fd, off)))?;
        // SAFETY: a fresh mapping of that length and protection, owned by nobody else.
        Ok(Self { bytes: unsafe { MappedBytes::from_raw(base, len, prot == Prot::ReadWrite) } })
    }

    /// As [`Window::map`], of memory that may vanish under us: a device's BAR, a file that is not sealed. Bulk copies (`read`, `write`,
    /// `copy_to`, `fill`) answer `Call` (EFAULT) then, after having copied a part; they cost one system call each. Loads, stores and
    /// atomics of single words still raise SIGBUS. Overlapping copies inside such a mapping give some mix.
    ///
    /// # Errors
    /// As [`Window::map`].
    pub fn map_guarded(fd: BorrowedFd<'_>, off: u64, len: u64, prot: Prot) -> Result<Self, HookError> {
        let window = Self::map(fd, off, len, prot)?;
        Ok(Self { bytes: window.bytes.guarded() })
    }

    /// Device memory that another process shows: a file must be sealed, so that it can neither shrink nor lie about its size; anything
    /// else (a BAR) may vanish at any time and is mapped guarded.
    ///
    /// # Errors
    /// As [`Window::map`], `NotSealed`.
    pub fn map_aperture(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<Self, HookError> {
        let stat = rustix::fs::fstat(fd).map_err(|error| HookError::failed("fstat", error))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
            return Self::map_guarded(fd, off, len, Prot::ReadWrite);
        }
        crate::memfd::check_sealed(fd, stat.st_size.max(0) as u64)?;
        Self::map(fd, off, len, Prot::ReadWrite)
    }

    /// Its bytes may vanish: they are a device's own, not a file's.
    pub fn is_guarded(&self) -> bool {
        self.bytes.is_guarded()
    }

    /// Private zeroed memory, for scratch and staging.
    ///
    /// # Errors
    /// `Empty`, `Call` (ENOMEM).
    pub fn anonymous(len: u64) -> Result<Self, HookError> {
        if len == 0 {
            return Err(HookError::Empty { start: 0 });
        }
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        let base = map_raw(Placement::Anywhere, len, flags, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
        // SAFETY: a fresh mapping of that length, owned by nobody else.
        Ok(Self { bytes: unsafe { MappedBytes::from_raw(base, len, true) } })
    }
}

impl Deref for Window {
    type Target = MappedBytes;

    fn deref(&self) -> &MappedBytes {
        &self.bytes
    }
}

/// Where a mapping goes.
#[derive(Clone, Copy)]
pub(crate) enum Placement {
    Anywhere,
    /// Exactly here, or EEXIST.
    FreeAt(u64),
    /// Exactly here, replacing a reservation that the caller made and owns.
    Over(NonNull<u8>),
}

/// `mmap`, with the failure's range and hint.
pub(crate) fn map_raw(
    place: Placement,
    len: u64,
    prot: libc::c_int,
    flags: libc::c_int,
    file: Option<(BorrowedFd<'_>, u64)>,
) -> Result<NonNull<u8>, HookError> {
    let (hint, extra) = match place {
        Placement::Anywhere => (std::ptr::null_mut(), 0),
        Placement::FreeAt(addr) => {
            (std::ptr::without_provenance_mut::<libc::c_void>(addr as usize), libc::MAP_FIXED_NOREPLACE)
        }
        Placement::Over(base) => (base.as_ptr().cast(), libc::MAP_FIXED),
    };
    let (raw_fd, off) = file.map_or((-1, 0), |(fd, off)| (fd.as_raw_fd(), off as libc::off_t));
    // SAFETY: a new mapping never replaces memory in use: only `Over` replaces anything, and that is its caller's reservation.
    let base = unsafe { libc::mmap(hint, len as usize, prot, flags | extra, raw_fd, off) };
    if base == libc::MAP_FAILED {
        let range = AddrRange { start: hint.addr() as u64, len };
        return Err(HookError::on(
            "mmap",
            range,
            io::Error::last_os_error(),
            "Check free memory, RLIMIT_AS (ulimit -v) and vm.max_map_count",
        ));
    }
    NonNull::new(base.cast()).ok_or(HookError::Strange { call: "mmap", detail: "address zero".into() })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn accessors_refuse_what_is_outside_or_unaligned() {
        let window = Window::anonymous(8192).unwrap();
        assert!(matches!(window.load_u64(8190), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(window.load_u64(8192), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(window.load_u32(2), Err(HookError::Unaligned { .. })));
        assert!(matches!(window.read(u64::MAX, &mut [0; 4]), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(window.write(8190, &[0; 4]), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(window.fill(0, 8193, 1), Err(HookError::OutOfWindow { .. })));
        assert!(window.residency(1, 2).is_err());
    }

    #[test]
    fn values_and_bulk_come_back_as_written() {
        let window = Window::anonymous(3 * 4096).unwrap();
        window.store_u8(0, 7).unwrap();
        window.store_u16(2, 0x1234).unwrap();
        window.store_u32(4, 0xdead_beef).unwrap();
        window.store_u64(8, u64::MAX - 1).unwrap();
        assert_eq!((window.load_u8(0).unwrap(), window.load_u16(2).unwrap()), (7, 0x1234));
        assert_eq!((window.load_u32(4).unwrap(), window.load_u64(8).unwrap()), (0xdead_beef, u64::MAX - 1));
        let text: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        window.write(100, &text).unwrap();
        window.copy_within(100, 200, 5000).unwrap();
        assert!(window.compare(200, &text).unwrap());
        window.store_u8(200 + 4999, 0xff).unwrap();
        assert!(!window.compare(200, &text).unwrap());
        let other = Window::anonymous(3 * 4096).unwrap();
        window.copy_to(0, &other, 0, window.len()).unwrap();
        assert_eq!(window.first_difference(0, &other, 0, window.len()).unwrap(), None);
        other.store_u8(9000, 1).unwrap();
        assert_eq!(window.first_difference(1, &other, 1, window.len() - 1).unwrap(), Some(8999));
    }

    #[test]
    fn two_windows_of_one_file_see_each_other_and_read_only_refuses_stores() {
        let fd = crate::memfd::create_sealed("uhmm-window-test", 8192).unwrap();
        let writer = Window::map(fd.as_fd(), 0, 8192, Prot::ReadWrite).unwrap();
        let reader = Window::map(fd.as_fd(), 4096, 4096, Prot::ReadOnly).unwrap();
        writer.atomic_u64(4096).unwrap().fetch_add(41, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(reader.load_u64(0).unwrap(), 41);
        assert!(matches!(reader.store_u64(0, 1), Err(HookError::ReadOnly)));
        assert!(matches!(reader.atomic_u64(0), Err(HookError::ReadOnly)));
        assert!(matches!(reader.prefault(), Err(HookError::ReadOnly)));
    }

    #[test]
    fn map_refuses_a_file_that_is_too_short() {
        let fd = crate::memfd::create_sealed("uhmm-window-test", 4096).unwrap();
        assert!(matches!(Window::map(fd.as_fd(), 0, 4097, Prot::ReadOnly), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(Window::map(fd.as_fd(), 4096, 1, Prot::ReadOnly), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(Window::map(fd.as_fd(), 1, 1, Prot::ReadOnly), Err(HookError::Unaligned { .. })));
        assert!(matches!(Window::map(fd.as_fd(), 0, 0, Prot::ReadOnly), Err(HookError::Empty { .. })));
    }

    #[test]
    fn an_aperture_is_a_sealed_file_that_is_long_enough() {
        let sealed = crate::memfd::create_sealed("uhmm-window-test", 4 * 4096).unwrap();
        let window = Window::map_aperture(sealed.as_fd(), 4096, 3 * 4096).unwrap();
        window.store_u64(0, 7).unwrap();
        assert_eq!(Window::map_aperture(sealed.as_fd(), 0, 8192).unwrap().load_u64(4096).unwrap(), 7);
        assert!(matches!(Window::map_aperture(sealed.as_fd(), 8192, 3 * 4096), Err(HookError::OutOfWindow { .. })));
        let open = rustix::fs::memfd_create("uhmm-window-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&open, 8192).unwrap();
        assert!(matches!(Window::map_aperture(open.as_fd(), 0, 8192), Err(HookError::NotSealed { .. })));
        let zero = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
        assert!(Window::map_aperture(zero.as_fd(), 0, 8192).unwrap().compare(0, &[0; 8192]).unwrap());
    }

    #[test]
    fn prefault_makes_every_page_resident() {
        let fd = crate::memfd::create_sealed("uhmm-window-test", 4 * 4096).unwrap();
        let window = Window::map(fd.as_fd(), 0, 4 * 4096, Prot::ReadWrite).unwrap();
        assert_eq!(window.residency(0, 4).unwrap(), [false; 4]);
        window.store_u8(4096, 1).unwrap();
        assert_eq!(window.residency(0, 4).unwrap(), [false, true, false, false]);
        window.prefault().unwrap();
        assert_eq!(window.residency(0, 4).unwrap(), [true; 4]);
    }
}
