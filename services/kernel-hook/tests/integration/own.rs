//! A process's own memory: the files behind it, and the memory of test programs under every kind of mapping.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use crate::common::{Child, become_nobody, is_root};
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{AddrRange, CopyMode, Features, HookError, PAGE_SIZE, RegisterMode, Userfaultfd, Window};
use uhmm_kernel_hook::{memfd, own_memory};

const HUGE_BYTES: u64 = 2 << 20;

fn reopen(memory: &ProgramMemory) -> Result<OwnedFd, HookError> {
    let range = AddrRange::new(memory.addr(), memory.len()).unwrap();
    own_memory::open_mapped_file(&own_memory::mappings(range).unwrap()[0])
}

/// A file of two pages that everybody may open.
fn public_file(path: &Path) -> File {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, [0; 2 * PAGE_SIZE as usize]).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o666)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn integration_shared_anonymous_memory_is_opened_again_by_whoever_may() {
    if !is_root() {
        eprintln!("skipped: /proc/self/map_files needs CAP_CHECKPOINT_RESTORE");
        return;
    }
    let memory = ProgramMemory::shared(2 * PAGE_SIZE).unwrap();
    memory.store_u64(PAGE_SIZE, 5).unwrap();
    let file = reopen(&memory).unwrap();
    let view = Window::map(file.as_fd(), 0, 2 * PAGE_SIZE, uhmm_kernel_hook::Prot::ReadWrite).unwrap();
    assert_eq!(view.load_u64(PAGE_SIZE).unwrap(), 5);
    view.store_u64(0, 6).unwrap();
    assert_eq!(memory.load_u64(0).unwrap(), 6, "it is the same memory");
}

#[test]
fn integration_an_ordinary_user_opens_files_by_path_and_never_another_file() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let path = folder.path().join("mapped");
    let file = public_file(&path);
    let memory = ProgramMemory::file_shared(file.as_fd(), PAGE_SIZE, PAGE_SIZE, true).unwrap();
    let nameless = memfd::create_sealed("uhmm-own-test", PAGE_SIZE).unwrap();
    let nameless = ProgramMemory::file_shared(nameless.as_fd(), 0, PAGE_SIZE, true).unwrap();
    let mut child = Child::fork(|| {
        if is_root() {
            become_nobody();
        }
        let same = File::from(reopen(&memory).unwrap()).metadata().unwrap();
        assert_eq!((same.dev(), same.ino()), (file.metadata().unwrap().dev(), file.metadata().unwrap().ino()));
        let error = reopen(&nameless).unwrap_err();
        assert!(error.to_string().contains("allocate the memory from uhmm"), "{error}");
        std::fs::rename(&path, folder.path().join("elsewhere")).unwrap();
        drop(public_file(&path));
        // The kernel shows the new name; under the old one there is another file.
        let moved = File::from(reopen(&memory).unwrap()).metadata().unwrap();
        assert_eq!(moved.ino(), same.ino());
        std::fs::remove_file(folder.path().join("elsewhere")).unwrap();
        drop(public_file(&folder.path().join("elsewhere (deleted)")));
        assert!(matches!(reopen(&memory), Err(HookError::Strange { .. })), "the name is another file's by now");
        0
    });
    assert_eq!(child.wait().code(), Some(0));
}

#[test]
fn integration_forbidden_poisoned_and_cut_off_accesses_are_told_without_a_signal() {
    let memory = ProgramMemory::private(4 * PAGE_SIZE).unwrap();
    memory.store_u64(PAGE_SIZE, 3).unwrap();
    let both = |off: u64| (memory.access_faults(off, false).unwrap(), memory.access_faults(off, true).unwrap());
    assert_eq!(both(PAGE_SIZE + 5), (false, false));
    memory.protect(PAGE_SIZE, PAGE_SIZE, true, false).unwrap();
    assert_eq!(both(PAGE_SIZE), (false, true));
    memory.protect(PAGE_SIZE, PAGE_SIZE, false, false).unwrap();
    assert_eq!(both(PAGE_SIZE), (true, true));
    memory.protect(PAGE_SIZE, PAGE_SIZE, true, true).unwrap();
    assert_eq!((both(PAGE_SIZE), memory.load_u64(PAGE_SIZE).unwrap()), ((false, false), 3), "asking changed no byte");
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api(Features::POISON).unwrap();
    let page = AddrRange::new(memory.addr() + 2 * PAGE_SIZE, PAGE_SIZE).unwrap();
    uffd.register(page, RegisterMode::MISSING).unwrap();
    assert!(uffd.poison(page).unwrap().is_complete());
    assert_eq!(both(2 * PAGE_SIZE), (true, true));
    let mut child = Child::fork(|| memory.load_u64(2 * PAGE_SIZE).unwrap() as i32);
    // Without EVENT_FORK the child has no userfaultfd: the poison is inherited all the same, or dropped with the registration.
    let end = child.wait();
    assert!(end.signal() == Some(libc::SIGBUS) || end.code() == Some(0), "{end:?}");
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * PAGE_SIZE).unwrap();
    let mapped = ProgramMemory::file_shared(file.as_fd(), 0, 2 * PAGE_SIZE, true).unwrap();
    file.set_len(PAGE_SIZE).unwrap();
    assert!(!mapped.access_faults(0, true).unwrap() && mapped.access_faults(PAGE_SIZE, false).unwrap());
    memory.unmap(3 * PAGE_SIZE, PAGE_SIZE).unwrap();
    assert!(memory.access_faults(3 * PAGE_SIZE, false).is_err(), "not this value's any more");
}

/// Reserves huge pages for as long as it lives.
struct Reserved {
    before: String,
}

const RESERVATION: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl Reserved {
    /// None when they cannot be had: no right, or no contiguous memory.
    fn new(count: u64) -> Option<Self> {
        let read = || Some(std::fs::read_to_string(RESERVATION).ok()?.trim().to_string());
        let before = read()?;
        let wanted = before.parse::<u64>().ok()? + count;
        std::fs::write(RESERVATION, wanted.to_string()).ok()?;
        let reserved = Self { before };
        (read()? == wanted.to_string()).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        std::fs::write(RESERVATION, &self.before).unwrap();
    }
}

#[test]
fn integration_hugetlb_memory_is_whole_huge_pages_and_filled_by_copy() {
    let Some(_reserved) = Reserved::new(3) else {
        eprintln!("skipped: no hugetlb pages can be reserved (needs root and 6 MiB of contiguous memory)");
        return;
    };
    assert!(matches!(ProgramMemory::hugetlb(PAGE_SIZE), Err(HookError::Unaligned { align: HUGE_BYTES, .. })));
    let (private, shared) =
        (ProgramMemory::hugetlb(2 * HUGE_BYTES).unwrap(), ProgramMemory::hugetlb_shared(HUGE_BYTES).unwrap());
    let range = AddrRange::new(private.addr(), HUGE_BYTES).unwrap();
    let vma = own_memory::mappings(range).unwrap()[0];
    // Private anonymous memory, and yet of a file: only the page size tells it from a mapping of one.
    assert!(vma.page_size_bytes == HUGE_BYTES && !vma.shared && vma.inode != 0);
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api(Features::MISSING_HUGETLBFS | Features::MOVE).unwrap();
    uffd.register(range, RegisterMode::MISSING).unwrap();
    let source = Window::anonymous(HUGE_BYTES).unwrap();
    source.fill(0, HUGE_BYTES, 6).unwrap();
    assert!(uffd.copy(range.start, &source, 0, HUGE_BYTES, CopyMode::default()).unwrap().is_complete());
    assert_eq!(private.load_u64(HUGE_BYTES - 8).unwrap(), u64::from_ne_bytes([6; 8]));
    assert!(private.unmap(0, PAGE_SIZE).is_err(), "a part of a huge page cannot be unmapped");
    assert_eq!(private.load_u64(0).unwrap() as u8, 6, "and so it still is this value's");
    private.unmap(0, HUGE_BYTES).unwrap();
    assert!(private.load_u64(0).is_err() && private.load_u64(HUGE_BYTES).is_ok());
    shared.store_u64(0, 1).unwrap();
    if is_root() {
        let file = reopen(&shared).unwrap();
        let again = ProgramMemory::file_shared(file.as_fd(), 0, HUGE_BYTES, true).unwrap();
        again.store_u64(8, 2).unwrap();
        assert_eq!((again.load_u64(0).unwrap(), shared.load_u64(8).unwrap()), (1, 2));
    }
}
