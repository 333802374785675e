use std::collections::BTreeSet;

use super::*;

const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(60);

fn file(pages: u64) -> Arc<OwnedFd> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE).unwrap();
    Arc::new(file.into())
}

fn transfer(token: u64, write: bool, page: u64, window: &Arc<Window>, at: u64, pages: u64) -> Transfer {
    let len = (pages * PAGE) as u32;
    Transfer { token, write, offset: page * PAGE, window: window.clone(), at: at * PAGE, len }
}

fn wait_all(disk: &mut Disk, count: usize) -> Vec<Finished> {
    let mut done = Vec::new();
    while done.len() < count {
        let had = done.len();
        disk.wait(LONG, &mut done).unwrap();
        assert!(done.len() > had, "a transfer never ends");
    }
    done
}

fn bytes_go_out_and_come_back(mode: DiskMode) {
    let memory = Arc::new(Window::anonymous(64 * PAGE).unwrap());
    let other = Arc::new(Window::anonymous(64 * PAGE).unwrap());
    let mut disk = Disk::open(file(64), 8, std::slice::from_ref(&memory), mode).unwrap();
    for page in 0..32 {
        memory.fill(page * PAGE, PAGE, page as u8 + 1).unwrap();
    }
    for token in 0..8 {
        disk.submit(transfer(token, true, 4 * (7 - token), &memory, 4 * token, 4)).unwrap();
    }
    assert!(disk.submit(transfer(99, true, 0, &memory, 0, 1)).is_err(), "more than its depth");
    let tokens: BTreeSet<u64> = wait_all(&mut disk, 8).iter().map(|done| done.token).collect();
    assert_eq!(tokens, (0..8).collect());
    // Registered memory, and memory that is not.
    for (token, into) in [(1, &memory), (2, &other)] {
        disk.submit(transfer(token, false, 28, into, 40, 4)).unwrap();
        assert!(wait_all(&mut disk, 1)[0].outcome.is_ok());
        assert!((0..4).all(|page| into.load_u8((40 + page) * PAGE + 77).unwrap() == page as u8 + 1));
    }
    disk.wait(LONG, &mut Vec::new()).unwrap();
}

fn what_is_not_there_is_an_error_of_that_transfer_alone(mode: DiskMode) {
    let memory = Arc::new(Window::anonymous(8 * PAGE).unwrap());
    let file = file(4);
    let mut disk = Disk::open(file.clone(), 4, &[], mode).unwrap();
    disk.submit(transfer(1, false, 3, &memory, 0, 2)).unwrap();
    disk.submit(transfer(2, false, 3, &memory, 4, 1)).unwrap();
    for done in wait_all(&mut disk, 2) {
        match done.outcome {
            Err(error) => assert_eq!((done.token, error.kind()), (1, io::ErrorKind::UnexpectedEof)),
            Ok(()) => assert_eq!(done.token, 2),
        }
    }
    assert!(matches!(disk.submit(transfer(3, false, 0, &memory, 7, 2)), Err(HookError::OutOfWindow { .. })));
    let read_only = std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file))).unwrap();
    let mut disk = Disk::open(Arc::new(read_only.into()), 4, &[], mode).unwrap();
    disk.submit(transfer(4, true, 0, &memory, 0, 1)).unwrap();
    let error = wait_all(&mut disk, 1).remove(0).outcome.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn by_the_ring() {
    bytes_go_out_and_come_back(DiskMode::Ring);
    what_is_not_there_is_an_error_of_that_transfer_alone(DiskMode::Ring);
}

#[test]
fn by_threads() {
    bytes_go_out_and_come_back(DiskMode::Threads);
    what_is_not_there_is_an_error_of_that_transfer_alone(DiskMode::Threads);
}

#[test]
fn memory_lives_as_long_as_a_transfer() {
    for mode in [DiskMode::Ring, DiskMode::Threads] {
        let memory = Arc::new(Window::anonymous(PAGE).unwrap());
        let mut disk = Disk::open(file(1), 4, &[], mode).unwrap();
        disk.submit(transfer(1, false, 0, &memory, 0, 1)).unwrap();
        assert!(Arc::strong_count(&memory) >= 2 || mode == DiskMode::Threads);
        drop(disk);
        assert_eq!(Arc::strong_count(&memory), 1, "and no longer");
    }
}
