//! A process's own memory: the files behind it, and the memory of test programs under every kind of mapping.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use crate::common::{Child, become_nobody, is_root};
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{AddrRange, Features, HookError, PAGE_SIZE, RegisterMode, Userfaultfd, Window};
use uhmm_kernel_hook::{memfd, own_memory};

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
