//! Which mapping of a process an address lies in: one ioctl (0.7 us) instead of parsing /proc/PID/maps. userfaultfd does not
//! report mprotect, so the pager asks here for the protection at device-fault time.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::abi;
use crate::error::HookError;
use crate::range::AddrRange;
use crate::sys::errno_of;

const VMA_READABLE: u64 = 1;
const VMA_WRITABLE: u64 = 2;
const VMA_EXECUTABLE: u64 = 4;
const VMA_SHARED: u64 = 8;
const COVERING_OR_NEXT: u64 = 16;

/// One mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// Shared with other processes.
    pub shared: bool,
    /// Page size in bytes: 4096, or a huge page's for hugetlb.
    pub page_size_bytes: u64,
    /// Offset of `start` in the file below, in bytes.
    pub offset: u64,
    /// Inode of the file below, 0 for none.
    pub inode: u64,
    /// Device of the file below, major and minor number; (0, 0) for none.
    pub device: (u32, u32),
}

impl Vma {
    /// Its addresses.
    #[must_use]
    pub fn range(&self) -> AddrRange {
        AddrRange { start: self.start, len: self.end - self.start }
    }
}

/// Opens /proc/PID/maps for [`query`]. Keep it: it stays with this process even when the pid is used again.
///
/// # Errors
/// `Call`: ENOENT when the process is gone, EACCES without the right to look at it.
pub fn open_maps(pid: u32) -> Result<OwnedFd, HookError> {
    let hint = "Run the pager as the client's user, or as root";
    let file = File::open(format!("/proc/{pid}/maps"))
        .map_err(|error| HookError::hinted("open(/proc/PID/maps)", error, hint))?;
    Ok(file.into())
}

/// Opens this process's own maps for [`query`]. Through /proc/thread-self, never by number: in another PID namespace than /proc's the
/// number is somebody else's, and when the first thread has ended /proc/self shows no memory.
///
/// # Errors
/// `Call`: ENOENT without /proc.
pub fn open_own_maps() -> Result<OwnedFd, HookError> {
    let file = File::open("/proc/thread-self/maps")
        .map_err(|error| HookError::hinted("open(/proc/thread-self/maps)", error, "Mount /proc"))?;
    Ok(file.into())
}

/// The mapping that covers `addr`, or None.
///
/// # Errors
/// `Call`: ESRCH when the process is gone, ENOTTY on kernels before 6.11.
pub fn query(maps: BorrowedFd<'_>, addr: u64) -> Result<Option<Vma>, HookError> {
    let mut request =
        abi::ProcmapQuery { size: size_of::<abi::ProcmapQuery>() as u64, query_addr: addr, ..Default::default() };
    // SAFETY: name and build id are not asked for (sizes are 0), so the kernel writes to the request only.
    match unsafe { abi::PROCMAP_QUERY.call(maps, &mut request) } {
        Ok(_) => Ok(Some(vma_of(&request))),
        Err(error) if errno_of(&error) == libc::ENOENT => Ok(None),
        Err(error) => Err(HookError::hinted("PROCMAP_QUERY", error, "")),
    }
}

/// The mappings that touch `range`, in order, holes left out.
///
/// # Errors
/// As [`query`].
pub fn query_range(maps: BorrowedFd<'_>, range: AddrRange) -> Result<Vec<Vma>, HookError> {
    let mut vmas = Vec::new();
    let mut addr = range.start;
    while addr < range.end() {
        let size = size_of::<abi::ProcmapQuery>() as u64;
        let mut request =
            abi::ProcmapQuery { size, query_flags: COVERING_OR_NEXT, query_addr: addr, ..Default::default() };
        // SAFETY: as in `query`.
        match unsafe { abi::PROCMAP_QUERY.call(maps, &mut request) } {
            Ok(_) if request.vma_start >= range.end() => break,
            Ok(_) => {
                vmas.push(vma_of(&request));
                addr = request.vma_end.max(addr + 1);
            }
            Err(error) if errno_of(&error) == libc::ENOENT => break,
            Err(error) => return Err(HookError::on("PROCMAP_QUERY", range, error, "")),
        }
    }
    Ok(vmas)
}

/// [`query`], with what the kernel calls the mapping: `[stack]`, `[vvar]`, a path, or nothing.
///
/// # Errors
/// As [`query`]; ENAMETOOLONG for a path of more than 4095 bytes.
pub fn query_named(maps: BorrowedFd<'_>, addr: u64) -> Result<Option<(Vma, String)>, HookError> {
    let mut name = [0u8; 4096];
    let mut request = abi::ProcmapQuery {
        size: size_of::<abi::ProcmapQuery>() as u64,
        query_addr: addr,
        vma_name_size: name.len() as u32,
        vma_name_addr: name.as_mut_ptr().expose_provenance() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel writes to the request, and at most `vma_name_size` bytes to `name`, which lives through the call.
    match unsafe { abi::PROCMAP_QUERY.call(maps, &mut request) } {
        Ok(_) => {
            // The size that comes back counts the final zero, and is 0 without a name.
            let len = (request.vma_name_size as usize).saturating_sub(1).min(name.len());
            Ok(Some((vma_of(&request), String::from_utf8_lossy(&name[..len]).into_owned())))
        }
        Err(error) if errno_of(&error) == libc::ENOENT => Ok(None),
        Err(error) => Err(HookError::hinted("PROCMAP_QUERY", error, "")),
    }
}

fn vma_of(answer: &abi::ProcmapQuery) -> Vma {
    Vma {
        start: answer.vma_start,
        end: answer.vma_end,
        read: answer.vma_flags & VMA_READABLE != 0,
        write: answer.vma_flags & VMA_WRITABLE != 0,
        exec: answer.vma_flags & VMA_EXECUTABLE != 0,
        shared: answer.vma_flags & VMA_SHARED != 0,
        page_size_bytes: answer.vma_page_size,
        offset: answer.vma_offset,
        inode: answer.inode,
        device: (answer.dev_major, answer.dev_minor),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::window::{Prot, Window};

    #[test]
    fn query_tells_protection_and_sharing_of_our_own_mappings() {
        let maps = open_own_maps().unwrap();
        let file = crate::memfd::create_sealed("uhmm-procmap-test", 3 * 4096).unwrap();
        let shared = Window::map(file.as_fd(), 4096, 8192, Prot::ReadOnly).unwrap();
        let vma = query(maps.as_fd(), shared.addr() + 5000).unwrap().unwrap();
        assert!(vma.read && !vma.write && !vma.exec && vma.shared);
        assert_eq!((vma.offset, vma.page_size_bytes), (4096, 4096));
        assert_eq!(vma.inode, crate::memfd::inode(file.as_fd()).unwrap());
        assert!(vma.range().contains_range(&shared.range()));
        assert_eq!(query(maps.as_fd(), 0).unwrap(), None);
    }

    #[test]
    fn a_range_is_told_with_its_holes_left_out() {
        let maps = open_own_maps().unwrap();
        let window = Window::anonymous(6 * 4096).unwrap();
        let parts = |page: u64, count: u64| window.range().sub_pages(page, count).unwrap();
        crate::own_memory::protect(parts(1, 1), true, false).unwrap();
        crate::own_memory::protect(parts(3, 1), false, false).unwrap();
        let found = query_range(maps.as_fd(), parts(0, 4)).unwrap();
        let rights: Vec<_> = found.iter().map(|vma| (vma.read, vma.write)).collect();
        assert_eq!(rights, [(true, true), (true, false), (true, true), (false, false)]);
        assert!(found[0].start <= window.addr() && found[3].range() == parts(3, 1));
        assert_eq!(query_range(maps.as_fd(), AddrRange { start: 0, len: 4096 }).unwrap(), []);
    }

    #[test]
    fn names_are_the_kernels() {
        let maps = open_own_maps().unwrap();
        let window = Window::anonymous(4096).unwrap();
        let (vma, name) = query_named(maps.as_fd(), window.addr()).unwrap().unwrap();
        assert!(vma.range().contains_range(&window.range()) && name.is_empty(), "{name:?}");
        let text = std::fs::read_to_string("/proc/thread-self/maps").unwrap();
        let vdso = text.lines().find(|line| line.ends_with("[vdso]")).unwrap();
        let addr = u64::from_str_radix(vdso.split_once('-').unwrap().0, 16).unwrap();
        assert_eq!(query_named(maps.as_fd(), addr).unwrap().unwrap().1, "[vdso]");
        assert_eq!(query_named(maps.as_fd(), 0).unwrap(), None);
    }
}
