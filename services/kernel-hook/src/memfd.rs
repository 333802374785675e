//! Memory files: region backing, directories, device memory, rings. Their size is sealed, so a mapping of one never raises
//! SIGBUS; their pages come and go by writing and punching holes. A memfd lives as long as any process holds it (the vault does).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use memfd::{FileSeal, MemfdOptions};
use rustix::fs::{FallocateFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::PAGE_SIZE;
use crate::bytes::MappedBytes;
use crate::error::HookError;

/// The seals every shared file of the project carries: size fixed, no further seals (nobody can seal writing away).
const REQUIRED: [(SealFlags, &str); 3] =
    [(SealFlags::SHRINK, "SHRINK"), (SealFlags::GROW, "GROW"), (SealFlags::SEAL, "SEAL")];

/// What fstatfs says of a file that consists of huge pages.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Makes an empty (all holes, reads as zeros) memfd of `len` bytes with its size sealed. `name` shows up in /proc/PID/maps.
///
/// # Errors
/// `Empty`, or `Call` when memory or descriptors run out.
pub fn create_sealed(name: &str, len: u64) -> Result<OwnedFd, HookError> {
    if len == 0 {
        return Err(HookError::Empty { start: 0 });
    }
    let memfd = MemfdOptions::default()
        .allow_sealing(true)
        .close_on_exec(true)
        .create(name)
        .map_err(|error| HookError::hinted("memfd_create", crate_error(error), "Raise the descriptor limit"))?;
    memfd.as_file().set_len(len).map_err(|error| HookError::failed("ftruncate(memfd)", error))?;
    memfd
        .add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal])
        .map_err(|error| HookError::failed("fcntl(F_ADD_SEALS)", crate_error(error)))?;
    Ok(OwnedFd::from(memfd.into_file()))
}

fn crate_error(error: memfd::Error) -> io::Error {
    match error {
        memfd::Error::Create(source) | memfd::Error::AddSeals(source) | memfd::Error::GetSeals(source) => source,
    }
}

/// Whether a descriptor that a peer sent is safe to map: a memfd whose size is `expected_len` and cannot change.
///
/// # Errors
/// `NotSealed` naming what is missing, `WrongSize`, `HugePages`: there a seal on the size does not keep SIGBUS away.
pub fn check_sealed(fd: BorrowedFd<'_>, expected_len: u64) -> Result<(), HookError> {
    // EINVAL: not a memory file at all (regular file, pipe, socket), so it has none of the seals.
    let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    let missing = missing_seals(seals);
    if !missing.is_empty() {
        return Err(HookError::NotSealed { missing });
    }
    let found = len(fd)?;
    if found != expected_len {
        return Err(HookError::WrongSize { expected: expected_len, found });
    }
    match huge_page_bytes(fd)? {
        Some(_) => Err(HookError::HugePages),
        None => Ok(()),
    }
}

/// The same memory file once more, as a file description of its own; `None`: it is none, or this account cannot.
pub fn reopened(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    let sealable = rustix::fs::fcntl_get_seals(fd).is_ok();
    let flags = rustix::fs::fcntl_getfl(fd).ok().filter(|_| sealable)?;
    let flags = (flags & rustix::fs::OFlags::ACCMODE) | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, rustix::fs::Mode::empty()).ok()
}

/// Size of the huge pages that a file of hugetlbfs consists of (memfds of huge pages and shared anonymous ones too); `None` for any
/// other file.
///
/// # Errors
/// `Call`.
pub fn huge_page_bytes(fd: BorrowedFd<'_>) -> Result<Option<u64>, HookError> {
    let stat = rustix::fs::fstatfs(fd).map_err(|error| HookError::failed("fstatfs", error))?;
    Ok((stat.f_type as u64 == HUGETLBFS_MAGIC).then_some(stat.f_bsize as u64))
}

fn missing_seals(present: SealFlags) -> String {
    let names: Vec<&str> =
        REQUIRED.iter().filter(|(seal, _)| !present.contains(*seal)).map(|(_, name)| *name).collect();
    names.join("+")
}

/// The file's size in bytes.
///
/// # Errors
/// `Call` when the descriptor has no size.
pub fn len(fd: BorrowedFd<'_>) -> Result<u64, HookError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| HookError::failed("fstat", error))?;
    Ok(stat.st_size.max(0) as u64)
}

/// Bytes of memory that the file holds now, in swap or out.
///
/// # Errors
/// `Call`.
pub fn populated_bytes(fd: BorrowedFd<'_>) -> Result<u64, HookError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| HookError::failed("fstat", error))?;
    Ok(stat.st_blocks.max(0) as u64 * 512)
}

/// Gives the pages of a range back to the kernel, and takes them out of every process that maps them. Raises no userfaultfd
/// event; repeating it is harmless, so recovery does.
///
/// # Errors
/// `Call`; nothing guarantees that no page was freed then.
pub fn punch_hole(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<(), HookError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, flags, off, len).map_err(|error| HookError::failed("fallocate(PUNCH_HOLE)", error))
}

/// Allocates the pages of a range now (zeroed on first use), so that later writes cannot fail for want of memory.
///
/// # Errors
/// `Call`: ENOMEM or ENOSPC when there is not enough.
pub fn allocate(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<(), HookError> {
    rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, off, len)
        .map_err(|error| HookError::failed("fallocate", error))
}

/// Whether the page at `off` is there (not a hole), without touching it.
///
/// # Errors
/// `Call`.
pub fn has_page(fd: BorrowedFd<'_>, off: u64) -> Result<bool, HookError> {
    Ok(next_data(fd, off)? == Some(off))
}

/// The parts of `off..off+len` that have pages, as (offset, length), in order. Holes are left out. Costs what the range has, however much the
/// file has behind it: SEEK_HOLE would walk over all of that.
///
/// # Errors
/// `Wraps`, `Call`.
pub fn data_ranges(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<Vec<(u64, u64)>, HookError> {
    let end = off.checked_add(len).ok_or(HookError::Wraps { start: off, len })?;
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut place = off;
    while place < end {
        let Some(data) = next_data(fd, place)?.filter(|data| *data < end) else { break };
        place = (data / PAGE_SIZE + 1).saturating_mul(PAGE_SIZE).min(end);
        match ranges.last_mut().filter(|(at, len)| at + len == data) {
            Some((_, len)) => *len += place - data,
            None => ranges.push((data, place - data)),
        }
    }
    Ok(ranges)
}

fn next_data(fd: BorrowedFd<'_>, off: u64) -> Result<Option<u64>, HookError> {
    match rustix::fs::seek(fd, SeekFrom::Data(off)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(HookError::failed("lseek(SEEK_DATA)", error)),
    }
}

/// Reads `len` file bytes at `off` straight into a mapping. Holes read as zeros and stay holes.
///
/// # Errors
/// `OutOfWindow` when the window or the file is too short, `Call`; part may have been read.
pub fn read_to_window(
    fd: BorrowedFd<'_>,
    off: u64,
    dst: &MappedBytes,
    dst_off: u64,
    len: u64,
) -> Result<(), HookError> {
    let place = dst.at_mut(dst_off, len)?;
    transfer("pread", off, len, |done, left| {
        // SAFETY: place+done..+left lies inside the checked, writable window; the kernel writes there and nowhere else.
        unsafe { libc::pread(fd.as_raw_fd(), place.add(done).cast(), left, (off + done as u64) as libc::off_t) }
    })
}

/// Writes `len` bytes of a mapping to the file at `off`, allocating pages where there were holes (charged to this process).
///
/// # Errors
/// `OutOfWindow`, `Call` (ENOMEM, ENOSPC, EPERM behind a size seal); part may have been written.
pub fn write_from_window(
    fd: BorrowedFd<'_>,
    off: u64,
    src: &MappedBytes,
    src_off: u64,
    len: u64,
) -> Result<(), HookError> {
    let place = src.at(src_off, len)?;
    transfer("pwrite", off, len, |done, left| {
        // SAFETY: place+done..+left lies inside the checked window; the kernel only reads it.
        unsafe { libc::pwrite(fd.as_raw_fd(), place.add(done).cast(), left, (off + done as u64) as libc::off_t) }
    })
}

/// Repeats a positional read or write until all is done.
fn transfer(
    call: &'static str,
    off: u64,
    len: u64,
    mut step: impl FnMut(usize, usize) -> isize,
) -> Result<(), HookError> {
    let total = len as usize;
    let mut done = 0;
    while done < total {
        match step(done, total - done) {
            0 => return Err(HookError::OutOfWindow { off, len, window_len: off + done as u64 }),
            moved if moved > 0 => done += moved as usize,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(HookError::failed(call, error));
                }
            }
        }
    }
    Ok(())
}

/// The file behind a descriptor, for identity checks: (device, inode). Two descriptors of one memfd answer the same.
///
/// # Errors
/// `Call`.
pub fn identity(fd: BorrowedFd<'_>) -> Result<(u64, u64), HookError> {
    let stat = rustix::fs::fstat(fd).map_err(|error| HookError::failed("fstat", error))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// The file's inode number, to compare with [`crate::procmap::Vma::inode`]: is this the file that a client has mapped?
///
/// # Errors
/// `Call`.
pub fn inode(fd: BorrowedFd<'_>) -> Result<u64, HookError> {
    identity(fd).map(|(_, inode)| inode)
}

/// A second descriptor of the same file.
///
/// # Errors
/// `Call` when the process is out of descriptors.
pub fn try_clone(fd: BorrowedFd<'_>) -> Result<OwnedFd, HookError> {
    fd.try_clone_to_owned().map_err(|error| HookError::hinted("dup", error, "Raise the descriptor limit (ulimit -n)"))
}

/// The descriptor as a `File`, for std's own reads and writes.
///
/// # Errors
/// `Call` when the process is out of descriptors.
pub fn to_file(fd: BorrowedFd<'_>) -> Result<File, HookError> {
    Ok(File::from(try_clone(fd)?))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::window::Window;

    #[test]
    fn missing_seals_are_named() {
        assert_eq!(missing_seals(SealFlags::SHRINK), "GROW+SEAL");
        assert_eq!(missing_seals(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "");
    }

    #[test]
    fn a_sealed_file_cannot_change_its_size() {
        let fd = create_sealed("uhmm-memfd-test", 8192).unwrap();
        check_sealed(fd.as_fd(), 8192).unwrap();
        assert!(matches!(check_sealed(fd.as_fd(), 4096), Err(HookError::WrongSize { expected: 4096, found: 8192 })));
        assert!(to_file(fd.as_fd()).unwrap().set_len(4096).is_err());
        assert!(to_file(fd.as_fd()).unwrap().set_len(16384).is_err());
    }

    #[test]
    fn check_refuses_an_unsealed_memfd_and_a_plain_file() {
        let open = rustix::fs::memfd_create("uhmm-open", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, 4096).unwrap();
        assert!(
            matches!(check_sealed(open.as_fd(), 4096), Err(HookError::NotSealed { missing }) if missing == "SHRINK+GROW+SEAL")
        );
        let file = File::open("/proc/self/exe").unwrap();
        assert!(matches!(check_sealed(file.as_fd(), 4096), Err(HookError::NotSealed { .. })));
    }

    #[test]
    fn pages_come_by_writing_and_go_by_punching() {
        let fd = create_sealed("uhmm-memfd-test", 16 * 4096).unwrap();
        let window = Window::anonymous(2 * 4096).unwrap();
        window.fill(0, 2 * 4096, 0x5a).unwrap();
        assert_eq!(populated_bytes(fd.as_fd()).unwrap(), 0);
        write_from_window(fd.as_fd(), 3 * 4096, &window, 0, 2 * 4096).unwrap();
        write_from_window(fd.as_fd(), 9 * 4096, &window, 4096, 4096).unwrap();
        assert_eq!(populated_bytes(fd.as_fd()).unwrap(), 3 * 4096);
        assert_eq!(data_ranges(fd.as_fd(), 0, 16 * 4096).unwrap(), [(3 * 4096, 2 * 4096), (9 * 4096, 4096)]);
        assert_eq!(data_ranges(fd.as_fd(), 4 * 4096, 4096).unwrap(), [(4 * 4096, 4096)]);
        assert!(has_page(fd.as_fd(), 4 * 4096).unwrap() && !has_page(fd.as_fd(), 5 * 4096).unwrap());
        punch_hole(fd.as_fd(), 3 * 4096, 2 * 4096).unwrap();
        punch_hole(fd.as_fd(), 3 * 4096, 2 * 4096).unwrap();
        assert_eq!(data_ranges(fd.as_fd(), 0, 16 * 4096).unwrap(), [(9 * 4096, 4096)]);
        read_to_window(fd.as_fd(), 4 * 4096, &window, 0, 4096).unwrap();
        assert!(window.compare(0, &[0; 4096]).unwrap());
        assert!(!has_page(fd.as_fd(), 4 * 4096).unwrap(), "reading a hole must leave it one");
    }

    #[test]
    fn transfers_refuse_ends_of_window_and_file() {
        let fd = create_sealed("uhmm-memfd-test", 4096).unwrap();
        let window = Window::anonymous(4096).unwrap();
        assert!(matches!(read_to_window(fd.as_fd(), 0, &window, 1, 4096), Err(HookError::OutOfWindow { .. })));
        assert!(matches!(read_to_window(fd.as_fd(), 4000, &window, 0, 4096), Err(HookError::OutOfWindow { .. })));
        assert!(write_from_window(fd.as_fd(), 4096, &window, 0, 4096).is_err());
    }
}
