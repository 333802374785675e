//! Huge pages (hugetlb): memory of test programs, and files that are written without a signal whatever becomes of them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::is_root;
use uhmm_kernel_hook::huge_file::HugeFile;
use uhmm_kernel_hook::huge_pool::{HUGE_BYTES, HugePool, huge_memfd, sealed_huge_memfd};
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{AddrRange, CopyMode, Features, HookError, PAGE_SIZE, RegisterMode, Userfaultfd, Window};
use uhmm_kernel_hook::{memfd, own_memory};

fn reserved(page_count: u64) -> Option<HugePool> {
    HugePool::reserve(page_count).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

fn errno(error: &HookError) -> Option<i32> {
    match error {
        HookError::Call { source, .. } => source.raw_os_error(),
        _ => None,
    }
}

#[test]
fn integration_hugetlb_memory_is_whole_huge_pages_and_filled_by_copy() {
    let Some(_pool) = reserved(3) else { return };
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
        let range = AddrRange::new(shared.addr(), HUGE_BYTES).unwrap();
        let file = own_memory::open_mapped_file(&own_memory::mappings(range).unwrap()[0]).unwrap();
        assert_eq!(memfd::huge_page_bytes(file.as_fd()).unwrap(), Some(HUGE_BYTES));
        let again = ProgramMemory::file_shared(file.as_fd(), 0, HUGE_BYTES, true).unwrap();
        again.store_u64(8, 2).unwrap();
        assert_eq!((again.load_u64(0).unwrap(), shared.load_u64(8).unwrap()), (1, 2));
    }
}

#[test]
fn integration_a_huge_file_is_written_in_the_middle_of_a_page_and_across_two() {
    let Some(_pool) = reserved(3) else { return };
    let file = huge_memfd(3 * HUGE_BYTES).unwrap();
    let seen = ProgramMemory::file_shared(file.as_fd(), 0, 3 * HUGE_BYTES, true).unwrap();
    let begin = HUGE_BYTES - 3 * PAGE_SIZE;
    let part = HugeFile::open(file.as_fd(), begin, HUGE_BYTES + 5 * PAGE_SIZE).unwrap().unwrap();
    let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|index| (index % 251) as u8).collect();
    part.write(2 * PAGE_SIZE + 5, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    seen.read(begin + 2 * PAGE_SIZE + 5, &mut back).unwrap();
    assert!(back == bytes, "a store to the mapping and a write of the file are the same");
    assert_eq!(seen.load_u64(begin + 2 * PAGE_SIZE - 8).unwrap(), 0);
    part.write(HUGE_BYTES + 5 * PAGE_SIZE - 8, &7u64.to_ne_bytes()).unwrap();
    assert_eq!(seen.load_u64(begin + HUGE_BYTES + 5 * PAGE_SIZE - 8).unwrap(), 7);
    assert!(matches!(part.write(HUGE_BYTES + 5 * PAGE_SIZE - 7, &[0; 8]), Err(HookError::OutOfWindow { .. })));
    assert!(matches!(part.write(u64::MAX, &[0; 8]), Err(HookError::OutOfWindow { .. })));
    drop(part);
    assert_eq!(seen.load_u64(begin + HUGE_BYTES + 5 * PAGE_SIZE - 8).unwrap(), 7, "what was written stays");
}

#[test]
fn integration_a_hole_that_no_huge_page_is_left_for_is_an_error_and_no_signal() {
    let Some(pool) = reserved(2) else { return };
    let file = huge_memfd(2 * HUGE_BYTES).unwrap();
    let part = HugeFile::open(file.as_fd(), 0, 2 * HUGE_BYTES).unwrap().unwrap();
    // Others may have some of the pool's for a moment.
    assert!((0..1000).any(|_| pool.unclaimed().unwrap() >= 2), "the mapping has set none aside");
    part.write(8, &[5; 8]).unwrap();
    let mut hog = pool.hog().unwrap();
    let punch = || memfd::punch_hole(file.as_fd(), HUGE_BYTES, HUGE_BYTES).unwrap();
    let error = hog.starve(|| part.write(HUGE_BYTES, &[6; 8]), punch).unwrap();
    assert_eq!(errno(&error), Some(libc::EFAULT), "{error}");
    part.write(16, &[7; 8]).unwrap();
    drop(hog);
    part.write(HUGE_BYTES, &[6; 8]).unwrap();
    let seen = ProgramMemory::file_shared(file.as_fd(), 0, 2 * HUGE_BYTES, true).unwrap();
    let word = |byte: u8| u64::from_ne_bytes([byte; 8]);
    assert_eq!([8, 16, HUGE_BYTES].map(|off| seen.load_u64(off).unwrap()), [word(5), word(7), word(6)]);
}

#[test]
fn integration_a_huge_file_that_was_cut_short_is_an_error_and_never_gets_longer() {
    let Some(_pool) = reserved(2) else { return };
    let file = huge_memfd(2 * HUGE_BYTES).unwrap();
    let part = HugeFile::open(file.as_fd(), 0, 2 * HUGE_BYTES).unwrap().unwrap();
    part.write(HUGE_BYTES, &[1; 8]).unwrap();
    let cut = |len: u64| memfd::to_file(file.as_fd()).unwrap().set_len(len).unwrap();
    cut(HUGE_BYTES);
    let error = part.write(HUGE_BYTES, &[2; 8]).unwrap_err();
    assert_eq!(errno(&error), Some(libc::EFAULT), "{error}");
    part.write(0, &[3; 8]).unwrap();
    let beyond = HugeFile::open(file.as_fd(), HUGE_BYTES, 4 * HUGE_BYTES).unwrap().unwrap();
    assert!(beyond.write(0, &[4; 8]).is_err());
    assert_eq!(memfd::len(file.as_fd()).unwrap(), HUGE_BYTES, "opening or writing a part has made the file longer");
    cut(2 * HUGE_BYTES);
    let seen = ProgramMemory::file_shared(file.as_fd(), 0, 2 * HUGE_BYTES, true).unwrap();
    assert_eq!(seen.load_u64(HUGE_BYTES).unwrap(), 0);
    part.write(HUGE_BYTES, &[5; 8]).unwrap();
    assert_eq!(seen.load_u64(HUGE_BYTES).unwrap(), u64::from_ne_bytes([5; 8]));
}

#[test]
fn integration_only_writable_files_of_huge_pages_can_be_opened_and_none_passes_as_sealed() {
    use std::io::ErrorKind::{InvalidInput, PermissionDenied};
    let ordinary = memfd::create_sealed("uhmm-huge-test", PAGE_SIZE).unwrap();
    assert!(HugeFile::open(ordinary.as_fd(), 0, PAGE_SIZE).unwrap().is_none());
    // A file of no page needs none.
    let Ok(file) = huge_memfd(HUGE_BYTES) else {
        eprintln!("skipped: this kernel has no huge pages");
        return;
    };
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = OwnedFd::from(std::fs::File::open(link).unwrap());
    let error = HugeFile::open(read_only.as_fd(), 0, PAGE_SIZE).unwrap_err();
    assert!(matches!(&error, HookError::Call { source, .. } if source.kind() == PermissionDenied), "{error}");
    assert!(matches!(HugeFile::open(file.as_fd(), u64::MAX - 5, 8), Err(HookError::Wraps { .. })));
    assert!(matches!(HugeFile::open(file.as_fd(), 0, 0), Err(HookError::Empty { .. })));
    let error = memfd::check_sealed(file.as_fd(), HUGE_BYTES).unwrap_err();
    assert!(matches!(error, HookError::NotSealed { .. }), "{error}");
    let sealed = sealed_huge_memfd(HUGE_BYTES).unwrap();
    let error = memfd::check_sealed(sealed.as_fd(), HUGE_BYTES).unwrap_err();
    assert!(matches!(error, HookError::HugePages), "a seal does not keep SIGBUS away: {error}");
    assert!(matches!(huge_memfd(PAGE_SIZE), Err(HookError::Call { source, .. }) if source.kind() == InvalidInput));
}

#[test]
fn integration_a_reservation_waits_for_pages_that_the_last_one_left_in_use() {
    // Another user of the pool who frees a page at this moment gives the reservation what it waits for: again then.
    let mut looks = (0..10).map(|_| waits_for_the_page_in_use());
    assert!(looks.any(|waited| waited != Some(false)), "it did not wait");
}

/// Whether a reservation waited until the page of the one before was free; `None` where no page can be reserved, or another user's free page made
/// up for the one in use.
fn waits_for_the_page_in_use() -> Option<bool> {
    let first = reserved(1)?;
    let file = huge_memfd(HUGE_BYTES).unwrap();
    HugeFile::open(file.as_fd(), 0, HUGE_BYTES).unwrap().unwrap().write(0, &[1; 8]).ok()?;
    drop(first);
    let surplus = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages").unwrap();
    if surplus.trim() == "0" {
        return None;
    }
    let let_go = Arc::new(AtomicBool::new(false));
    let holder = std::thread::spawn({
        let let_go = let_go.clone();
        move || {
            // No event: that the other thread waits by then is likely, and the test is right either way.
            std::thread::sleep(Duration::from_millis(20));
            let_go.store(true, Ordering::SeqCst);
            drop(file);
        }
    });
    let _second = reserved(1).expect("the page comes back");
    let waited = let_go.load(Ordering::SeqCst);
    holder.join().unwrap();
    Some(waited)
}
