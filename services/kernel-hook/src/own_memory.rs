//! This process's own memory, by number: what the SDK's agent does to ranges that the program owns, without ever holding a
//! reference into them.
//!
//! Everything here either leaves every byte as it is, or is documented as destroying content; then its caller was told by the
//! program (or by the pager, for pages whose valid copy is elsewhere) that nobody needs it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::error::HookError;
use crate::procmap::{self, Vma};
use crate::range::{AddrRange, PAGE_SIZE};
use crate::window::{Placement, map_raw};

/// What to tell the kernel about a range of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeAdvice {
    /// Drop the pages: private ones read as zero from now on. The caller answers for the content. Sends a REMOVE event on
    /// registered ranges, and returns when that was read.
    DontNeed,
    /// The same, also of locked memory.
    DontNeedLocked,
    /// Make every page writable and its own now (ends copy-on-write sharing). Content stays.
    PopulateWrite,
    /// Leave the range out of children made by fork.
    DontFork,
    /// Undo `DontFork`.
    DoFork,
    /// Whoever touches it gets SIGSEGV; private content is dropped, for which the caller answers.
    GuardInstall,
    /// Undo `GuardInstall`.
    GuardRemove,
}

fn place(range: AddrRange) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(range.start as usize)
}

/// Gives advice about a range of this process.
///
/// # Errors
/// `Call`: ENOMEM for a hole, EINVAL, EFAULT.
pub fn advise(range: AddrRange, advice: RangeAdvice) -> Result<(), HookError> {
    let range = AddrRange::new(range.start, range.len)?;
    let (call, code) = match advice {
        RangeAdvice::DontNeed => ("madvise(DONTNEED)", libc::MADV_DONTNEED),
        RangeAdvice::DontNeedLocked => ("madvise(DONTNEED_LOCKED)", libc::MADV_DONTNEED_LOCKED),
        RangeAdvice::PopulateWrite => ("madvise(POPULATE_WRITE)", libc::MADV_POPULATE_WRITE),
        RangeAdvice::DontFork => ("madvise(DONTFORK)", libc::MADV_DONTFORK),
        RangeAdvice::DoFork => ("madvise(DOFORK)", libc::MADV_DOFORK),
        RangeAdvice::GuardInstall => ("madvise(GUARD_INSTALL)", GUARD_INSTALL),
        RangeAdvice::GuardRemove => ("madvise(GUARD_REMOVE)", GUARD_REMOVE),
    };
    // SAFETY: only the two DONTNEED and GUARD_INSTALL change bytes, and their caller answers for them (see the module head). No mapping appears or goes.
    if unsafe { libc::madvise(place(range), range.len as usize, code) } == 0 {
        return Ok(());
    }
    Err(HookError::on(call, range, io::Error::last_os_error(), ""))
}

/// Linux 6.13; not in the libc crate.
pub(crate) const GUARD_INSTALL: libc::c_int = 102;
pub(crate) const GUARD_REMOVE: libc::c_int = 103;

/// Whether an access of the CPU to a page of this process would end in a signal, because it is forbidden, a guard, poisoned, or behind
/// the end of a file. Faults the page in as the access would, and changes nothing. Not for write-only memory (told as unreadable, though
/// x86 reads it), nor for pages that are missing under a userfaultfd for user mode only.
///
/// # Errors
/// `Call` when it cannot be told (ENOMEM).
pub fn access_faults(addr: u64, write: bool) -> Result<bool, HookError> {
    let range = AddrRange { start: addr / PAGE_SIZE * PAGE_SIZE, len: PAGE_SIZE };
    let code = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    loop {
        // SAFETY: faults one page in; no byte changes.
        if unsafe { libc::madvise(place(range), PAGE_SIZE as usize, code) } == 0 {
            return Ok(false);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Forbidden; SIGBUS; poisoned.
            Some(libc::EINVAL | libc::EFAULT | libc::EHWPOISON) => return Ok(true),
            Some(libc::EINTR | libc::EAGAIN) => {}
            _ => return Err(HookError::on("madvise(POPULATE)", range, error, "")),
        }
    }
}

/// Changes what the program may do with a range of its own. Accesses that are not allowed any more raise SIGSEGV, as the program
/// asked.
///
/// # Errors
/// `Call`: ENOMEM for a hole, EACCES for a file opened otherwise.
pub fn protect(range: AddrRange, read: bool, write: bool) -> Result<(), HookError> {
    let range = AddrRange::new(range.start, range.len)?;
    let prot = if read { libc::PROT_READ } else { 0 } | if write { libc::PROT_READ | libc::PROT_WRITE } else { 0 };
    // SAFETY: no byte changes; the program asks for its own range.
    if unsafe { libc::mprotect(place(range), range.len as usize, prot) } == 0 {
        return Ok(());
    }
    Err(HookError::on("mprotect", range, io::Error::last_os_error(), ""))
}

/// Locks pages of a range in memory from their first touch on, or ends that. No byte changes.
///
/// # Errors
/// `Call`: ENOMEM over the limit.
pub fn lock(range: AddrRange, on: bool) -> Result<(), HookError> {
    let range = AddrRange::new(range.start, range.len)?;
    // SAFETY: locking changes no byte.
    let rc = unsafe {
        if on {
            libc::mlock2(place(range), range.len as usize, libc::MLOCK_ONFAULT as libc::c_uint)
        } else {
            libc::munlock(place(range), range.len as usize)
        }
    };
    if rc == 0 {
        return Ok(());
    }
    Err(HookError::on("mlock2", range, io::Error::last_os_error(), "Raise the limit (ulimit -l)"))
}

/// The mappings that a range of this process consists of, in order, up to its first hole.
///
/// # Errors
/// `Call` on kernels before 6.11.
pub fn mappings(range: AddrRange) -> Result<Vec<Vma>, HookError> {
    let maps = procmap::open_own_maps()?;
    let mut found = Vec::new();
    let mut addr = range.start;
    while addr < range.end() {
        let Some(vma) = procmap::query(maps.as_fd(), addr)? else { break };
        addr = vma.end;
        found.push(vma);
    }
    Ok(found)
}

/// [`mappings`], with what the kernel calls each.
///
/// # Errors
/// As [`mappings`].
pub fn named_mappings(range: AddrRange) -> Result<Vec<(Vma, String)>, HookError> {
    let maps = procmap::open_own_maps()?;
    let mut found = Vec::new();
    let mut addr = range.start;
    while addr < range.end() {
        let Some(named) = procmap::query_named(maps.as_fd(), addr)? else { break };
        addr = named.0.end;
        found.push(named);
    }
    Ok(found)
}

/// Whether a mapping of this process grows downwards by itself when it is touched below its start (MAP_GROWSDOWN, the main thread's stack).
/// One call of about a microsecond; the kernel says it elsewhere only in smaps, which walks every page table before the mapping.
///
/// # Errors
/// `Call`: EACCES, ENOMEM when the mapping has changed meanwhile.
pub fn grows_down(vma: &Vma) -> Result<bool, HookError> {
    let prot = [(vma.read, libc::PROT_READ), (vma.write, libc::PROT_WRITE), (vma.exec, libc::PROT_EXEC)];
    let prot = prot.iter().filter(|(has, _)| *has).fold(0, |all, (_, bit)| all | bit);
    let first = AddrRange { start: vma.start, len: PAGE_SIZE };
    // SAFETY: mprotect with this flag answers EINVAL and changes nothing for a mapping that does not grow; one that does gets the protection
    // that it has. No byte changes.
    if unsafe { libc::mprotect(place(first), first.len as usize, prot | libc::PROT_GROWSDOWN) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        error => Err(HookError::on("mprotect(PROT_GROWSDOWN)", first, error, "")),
    }
}

/// Opens the file behind a shared mapping of this process, for what the mapping may do. Works for shared anonymous memory too when
/// the account may follow /proc/self/map_files (CAP_CHECKPOINT_RESTORE); else the path in /proc/self/maps must still lead there.
///
/// # Errors
/// `Call`: EPERM, ENOENT; `Strange` when the path leads to another file by now.
pub fn open_mapped_file(vma: &Vma) -> Result<OwnedFd, HookError> {
    let open = |path: &str| File::options().read(true).write(vma.write).open(path);
    let link = format!("/proc/self/map_files/{:x}-{:x}", vma.start, vma.end);
    if let Ok(file) = open(&link) {
        return Ok(file.into());
    }
    let hint = "Run with CAP_CHECKPOINT_RESTORE, or allocate the memory from uhmm";
    let failed = |error: io::Error| HookError::hinted("open(file of a mapping)", error, hint);
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(failed)?;
    let start = format!("{:x}-", vma.start);
    let line = maps.lines().find(|line| line.trim_start_matches('0').starts_with(&start));
    let path = line.and_then(|line| line.find('/').map(|at| line[at..].to_owned()));
    let path = path.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let file = OwnedFd::from(open(&path).map_err(failed)?);
    if identity_of(&file, vma.offset, vma.page_size_bytes)? != (vma.device, vma.inode) {
        return Err(HookError::Strange {
            call: "open(file of a mapping)",
            detail: format!("{path} is another file now"),
        });
    }
    Ok(file)
}

/// Device and inode that the kernel shows for a mapping of one page of `file`, to be compared with those of a [`Vma`]. Not those of fstat:
/// filesystems in layers have others there. `offset`: where the file can be mapped (a device's file only where it has a BAR).
///
/// # Errors
/// `Call` when the file cannot be mapped.
pub fn identity_of(file: impl AsFd, offset: u64, page_bytes: u64) -> Result<((u32, u32), u64), HookError> {
    let maps = procmap::open_own_maps()?;
    // NORESERVE: of huge pages a mapping otherwise sets some aside, and there may be none.
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    let probe = map_raw(Placement::Anywhere, page_bytes, libc::PROT_NONE, flags, Some((file.as_fd(), offset)))?;
    let found = procmap::query(maps.as_fd(), probe.addr().get() as u64);
    // SAFETY: the mapping was made above for this question, and nobody else knows it.
    unsafe { libc::munmap(probe.as_ptr().cast(), page_bytes as usize) };
    Ok(found?.map_or(((0, 0), 0), |vma| (vma.device, vma.inode)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd;
    use crate::window::{Prot, Window};

    #[test]
    fn mappings_end_at_a_hole_and_tell_protection() {
        let window = Window::anonymous(4 * 4096).unwrap();
        let middle = window.range().sub_pages(1, 1).unwrap();
        protect(middle, true, false).unwrap();
        let found = mappings(window.range()).unwrap();
        assert!(found.iter().any(|vma| vma.range() == middle && !vma.write && vma.read));
        protect(middle, false, false).unwrap();
        assert!(mappings(middle).unwrap().iter().all(|vma| !vma.read));
        protect(window.range(), true, true).unwrap();
        assert!(mappings(AddrRange { start: 4096, len: 4096 }).unwrap().is_empty());
    }

    #[test]
    fn what_grows_downwards_is_told_and_stays_as_it_is() {
        let window = Window::anonymous(4 * 4096).unwrap();
        let middle = window.range().sub_pages(1, 1).unwrap();
        protect(middle, true, false).unwrap();
        let vma = mappings(middle).unwrap()[0];
        assert!(!grows_down(&vma).unwrap());
        assert_eq!(mappings(middle).unwrap()[0], vma);
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = text.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let start = u64::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap();
        let (stack, name) = named_mappings(AddrRange { start, len: PAGE_SIZE }).unwrap().remove(0);
        assert_eq!(name, "[stack]");
        assert!(grows_down(&stack).unwrap() && stack.write);
    }

    #[test]
    fn dropped_pages_read_as_zero_and_populating_keeps_bytes() {
        let window = Window::anonymous(2 * 4096).unwrap();
        window.fill(0, 8192, 7).unwrap();
        advise(window.range(), RangeAdvice::PopulateWrite).unwrap();
        assert_eq!(window.load_u8(5000).unwrap(), 7);
        advise(window.range().sub_pages(1, 1).unwrap(), RangeAdvice::DontNeed).unwrap();
        assert_eq!((window.load_u8(0).unwrap(), window.load_u8(5000).unwrap()), (7, 0));
    }

    #[test]
    fn the_file_behind_a_mapping_is_found() {
        let path = std::env::temp_dir().join(format!("uhmm-own-memory-{}", std::process::id()));
        std::fs::write(&path, [9u8; 4096]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let window = Window::map(file.as_fd(), 0, 4096, Prot::ReadWrite).unwrap();
        let vma = mappings(window.range()).unwrap()[0];
        let opened = open_mapped_file(&vma).unwrap();
        assert_eq!(memfd::inode(opened.as_fd()).unwrap(), memfd::inode(file.as_fd()).unwrap());
        std::fs::remove_file(&path).unwrap();
    }
}
