//! Faults of a real second process, answered through a userfaultfd that came over a socket.

use std::os::unix::process::ExitStatusExt;

use crate::common::{Client, hear, tell};
use std::os::fd::AsFd;
use uhmm_kernel_hook::{
    Advice, CopyMode, Features, FillOutcome, FillStop, PAGE_SIZE, RegisterMode, UffdEvent, WpOutcome, memfd,
};

const MISSING_MINOR: RegisterMode = RegisterMode::MISSING.union(RegisterMode::MINOR);

fn done(pages: u64) -> FillOutcome {
    FillOutcome { done_bytes: pages * PAGE_SIZE, stop: None }
}

fn stopped(pages: u64, stop: FillStop) -> FillOutcome {
    FillOutcome { done_bytes: pages * PAGE_SIZE, stop: Some(stop) }
}

fn copy_page(client: &Client, page: u64, byte: u8) -> FillOutcome {
    client.page.fill(0, PAGE_SIZE, byte).unwrap();
    let dst = client.page_range(page, 1).start;
    client.uffd.copy(dst, &client.page, 0, PAGE_SIZE, CopyMode::default()).unwrap()
}

#[test]
fn integration_missing_fault_is_answered_by_copy_from_another_process() {
    let features = Features::MISSING_SHMEM | Features::THREAD_ID;
    let mut client = Client::start(4, features, RegisterMode::MISSING, |region, _| {
        i32::from(region.load_u8(PAGE_SIZE + 9).unwrap()) // The exit code is the byte read.
    });
    let events = client.events();
    let pid = client.child.pid as u32;
    assert!(matches!(events[..], [UffdEvent::Fault { thread_id, .. }] if thread_id == pid), "{events:?}");
    assert_eq!(events[0].fault_page(), Some(client.page_range(1, 1)));
    let mut none = Vec::new();
    assert_eq!(client.uffd.read_events(&mut none).unwrap(), 0, "the descriptor must not block");
    assert_eq!(copy_page(&client, 1, 0x2a), done(1));
    assert_eq!(client.child.wait().code(), Some(0x2a));
    assert_eq!(copy_page(&client, 2, 1), stopped(0, FillStop::NoProcess));
}

#[test]
fn integration_copy_stops_before_a_page_that_exists() {
    let client = Client::start(4, Features::MISSING_SHMEM, RegisterMode::MISSING, |_, socket| {
        hear(socket);
        0
    });
    assert_eq!(copy_page(&client, 2, 7), done(1));
    assert_eq!(copy_page(&client, 2, 8), stopped(0, FillStop::Exists));
    let source = uhmm_kernel_hook::Window::anonymous(4 * PAGE_SIZE).unwrap();
    let start = client.range.start;
    let whole = client.uffd.copy(start, &source, 0, 4 * PAGE_SIZE, CopyMode::default()).unwrap();
    assert_eq!(whole, stopped(2, FillStop::Again), "two pages were free before the third");
    assert_eq!(client.backing_byte(2), 7, "a page that exists is never replaced");
    let zeroed = client.uffd.zeropage(client.page_range(3, 1), false).unwrap();
    assert_eq!(zeroed, done(1));
    assert!(client.uffd.copy(start, &source, 1, 4 * PAGE_SIZE, CopyMode::default()).is_err(), "source out of bounds");
}

#[test]
fn integration_minor_fault_is_answered_by_continue() {
    let features = Features::MISSING_SHMEM | Features::MINOR_SHMEM;
    let mut client = Client::start(4, features, MISSING_MINOR, |region, socket| {
        hear(socket);
        i32::from(region.load_u8(0).unwrap())
    });
    client.put_in_page_cache(0, 0x31);
    client.put_in_page_cache(1, 0x32);
    tell(&client.socket, b"go");
    assert_eq!(client.fault_on(0), (false, false, true));
    assert_eq!(client.uffd.cont(client.page_range(2, 1), false, false).unwrap(), stopped(0, FillStop::NoPage));
    assert_eq!(client.uffd.cont(client.page_range(1, 3), false, false).unwrap(), stopped(1, FillStop::Again));
    assert_eq!(client.uffd.cont(client.page_range(1, 1), false, false).unwrap(), stopped(0, FillStop::Exists));
    assert_eq!(client.uffd.cont(client.page_range(0, 1), false, false).unwrap(), done(1));
    assert_eq!(client.child.wait().code(), Some(0x31));
}

#[test]
fn integration_write_protection_stops_writers_also_of_pages_that_are_not_there() {
    let features = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED;
    let mut client = Client::start(2, features, RegisterMode::WP, |region, socket| {
        region.store_u8(0, 1).unwrap();
        tell(socket, b"populated");
        hear(socket);
        region.store_u8(0, 2).unwrap();
        region.store_u8(PAGE_SIZE, 3).unwrap();
        0
    });
    hear(&client.socket);
    assert_eq!(client.uffd.write_protect(client.range, true, true).unwrap(), WpOutcome::Done);
    tell(&client.socket, b"go");
    assert_eq!(client.fault_on(0), (true, true, false));
    assert_eq!(client.backing_byte(0), 1, "the write must wait");
    assert_eq!(client.uffd.write_protect(client.page_range(0, 1), false, false).unwrap(), WpOutcome::Done);
    assert_eq!(client.fault_on(1), (true, true, false));
    // The kernel puts a zero page there before it reports the write: has_page says nothing about content.
    assert_eq!(client.backing_byte(1), 0, "the write must wait");
    assert_eq!(client.uffd.write_protect(client.page_range(1, 1), false, true).unwrap(), WpOutcome::Done);
    client.uffd.wake(client.page_range(1, 1)).unwrap();
    assert_eq!(client.child.wait().code(), Some(0));
    assert_eq!((client.backing_byte(0), client.backing_byte(1)), (2, 3));
    assert_eq!(client.uffd.write_protect(client.range, true, false).unwrap(), WpOutcome::NoProcess);
}

#[test]
fn integration_a_hole_punched_from_outside_faults_again() {
    let mut client = Client::start(2, Features::MISSING_SHMEM, RegisterMode::MISSING, |region, socket| {
        let first = region.load_u8(0).unwrap();
        tell(socket, b"read");
        hear(socket);
        i32::from(first) + i32::from(region.load_u8(0).unwrap())
    });
    client.fault_on(0);
    assert_eq!(copy_page(&client, 0, 40), done(1));
    hear(&client.socket);
    memfd::punch_hole(client.backing.as_fd(), 0, PAGE_SIZE).unwrap();
    let mut none = Vec::new();
    assert_eq!(client.uffd.read_events(&mut none).unwrap(), 0, "a punch from outside raises no event");
    tell(&client.socket, b"again");
    assert_eq!(client.fault_on(0), (false, false, false));
    assert_eq!(copy_page(&client, 0, 2), done(1));
    assert_eq!(client.child.wait().code(), Some(42));
}

#[test]
fn integration_poison_raises_sigbus_in_the_thread_that_touches() {
    let features = Features::MISSING_SHMEM | Features::POISON;
    let mut client = Client::start(2, features, RegisterMode::MISSING, |region, socket| {
        hear(socket);
        i32::from(region.load_u8(PAGE_SIZE).unwrap())
    });
    assert_eq!(client.uffd.poison(client.page_range(1, 1)).unwrap(), done(1));
    tell(&client.socket, b"touch it");
    assert_eq!(client.child.wait().signal(), Some(libc::SIGBUS));
}

#[test]
fn integration_fills_answer_again_until_the_event_is_read() {
    let features = Features::MISSING_SHMEM | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let mut client = Client::start(4, features, RegisterMode::MISSING, |region, _| {
        region.advise(PAGE_SIZE, 2 * PAGE_SIZE, Advice::DontNeed).unwrap();
        drop(region);
        0
    });
    crate::common::wait_readable(client.uffd.as_fd());
    assert_eq!(copy_page(&client, 0, 1), stopped(0, FillStop::Again));
    let mut events = Vec::new();
    assert_eq!(client.uffd.read_events(&mut events).unwrap(), 1);
    let dropped = client.page_range(1, 2);
    let expected = (dropped.start, dropped.end());
    assert!(matches!(events[..], [UffdEvent::Remove { start, end }] if (start, end) == expected), "{events:?}");
    let events = client.events();
    let whole = (client.range.start, client.range.end());
    assert!(matches!(events[..], [UffdEvent::Unmap { start, end }] if (start, end) == whole), "{events:?}");
    assert_eq!(client.child.wait().code(), Some(0));
}

#[test]
fn integration_fork_hands_the_pager_the_childs_userfaultfd() {
    if !crate::common::may_ask_for_forks() {
        return;
    }
    let features = Features::MISSING_SHMEM | Features::EVENT_FORK;
    let mut client = Client::start(1, features, RegisterMode::MISSING, |region, _| {
        region.allow_fork().unwrap();
        let mut grandchild = crate::common::Child::fork(|| i32::from(region.load_u8(0).unwrap()));
        grandchild.wait().code().unwrap_or(102)
    });
    let mut events = client.events();
    let Some(UffdEvent::Fork { uffd }) = events.pop() else { panic!("{events:?}") };
    crate::common::wait_readable(uffd.as_fd());
    let mut faults = Vec::new();
    assert_eq!(uffd.read_events(&mut faults).unwrap(), 1);
    assert_eq!(faults[0].fault_page(), Some(client.range));
    client.page.fill(0, PAGE_SIZE, 77).unwrap();
    assert_eq!(uffd.copy(client.range.start, &client.page, 0, PAGE_SIZE, CopyMode::default()).unwrap(), done(1));
    assert_eq!(client.child.wait().code(), Some(77));
}

#[test]
fn integration_a_fault_read_by_a_dead_pager_comes_again_after_wake() {
    let mut client = Client::start(1, Features::MISSING_SHMEM, RegisterMode::MISSING, |region, _| {
        i32::from(region.load_u8(0).unwrap())
    });
    let vault_copy = client.uffd.try_clone().unwrap();
    client.fault_on(0);
    client.uffd = vault_copy; // The pager dies with the fault in its hands; the next one has the vault's descriptor.
    client.uffd.wake(client.range).unwrap();
    assert_eq!(client.fault_on(0), (false, false, false));
    assert_eq!(copy_page(&client, 0, 5), done(1));
    assert_eq!(client.child.wait().code(), Some(5));
}
