//! Forks as the pager sees them: the child's userfaultfd comes with the event, whatever the client has made of its own.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use crate::common::{Child, hear, may_ask_for_forks, tell, wait_readable};
use uhmm_kernel_hook::{
    AddrRange, CopyMode, Features, PAGE_SIZE, RegisterMode, SendStatus, SeqPacket, UffdEvent, Userfaultfd, Window,
};

/// A client with one private page under management; `body` runs in it with the page. The userfaultfd is as a careless or hostile
/// client would make it: blocking, and kept over exec.
fn client(body: impl FnOnce(&Window) -> i32) -> (Child, Userfaultfd, AddrRange) {
    let (socket, peer) = SeqPacket::pair().unwrap();
    let child = Child::fork(|| {
        let page = Window::anonymous(PAGE_SIZE).unwrap();
        // SAFETY: a system call without pointers.
        let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, 0) };
        assert!(raw >= 0, "userfaultfd");
        // SAFETY: the kernel just made this descriptor for us.
        let uffd = unsafe { OwnedFd::from_raw_fd(raw as i32) };
        assert_eq!(peer.send(&page.addr().to_ne_bytes(), &[uffd.as_fd()]).unwrap(), SendStatus::Sent);
        drop(uffd);
        hear(&peer);
        body(&page)
    });
    let (addr, mut fds) = hear(&socket);
    let uffd = Userfaultfd::from_fd(fds.remove(0)).unwrap();
    uffd.api(Features::EVENT_FORK).unwrap();
    let page = AddrRange::new(u64::from_ne_bytes(addr.try_into().unwrap()), PAGE_SIZE).unwrap();
    uffd.register(page, RegisterMode::MISSING).unwrap();
    tell(&socket, b"registered");
    (child, uffd, page)
}

fn next_event(uffd: &Userfaultfd) -> UffdEvent {
    wait_readable(uffd.as_fd());
    let mut events = Vec::new();
    assert_eq!(uffd.read_events(&mut events).unwrap(), 1, "{events:?}");
    events.remove(0)
}

fn next_fork(uffd: &Userfaultfd) -> Userfaultfd {
    match next_event(uffd) {
        UffdEvent::Fork { uffd } => uffd,
        other => panic!("{other:?}"),
    }
}

fn answer(uffd: &Userfaultfd, page: AddrRange, byte: u8) {
    let source = Window::anonymous(PAGE_SIZE).unwrap();
    source.fill(0, PAGE_SIZE, byte).unwrap();
    assert!(uffd.copy(page.start, &source, 0, PAGE_SIZE, CopyMode::default()).unwrap().is_complete());
}

#[test]
fn integration_a_childs_userfaultfd_never_blocks_its_reader() {
    if !may_ask_for_forks() {
        return;
    }
    let (mut child, uffd, page) = client(|page| {
        let mut grandchild = Child::fork(|| i32::from(page.load_u8(0).unwrap()));
        grandchild.wait().code().unwrap_or(102)
    });
    let childs = next_fork(&uffd);
    let flags = rustix::io::fcntl_getfd(childs.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    assert_eq!(next_event(&childs).fault_page(), Some(page));
    let mut none = Vec::new();
    assert_eq!(childs.read_events(&mut none).unwrap(), 0, "a second read must not wait");
    answer(&childs, page, 33);
    assert_eq!(child.wait().code(), Some(33));
}

#[test]
fn integration_every_generation_brings_its_own_and_keeps_its_own_bytes() {
    if !may_ask_for_forks() {
        return;
    }
    let (mut child, uffd, page) = client(|page| {
        let mut second = Child::fork(|| {
            let mut third = Child::fork(|| i32::from(page.load_u8(0).unwrap()));
            let below = third.wait().code().unwrap_or(102);
            below + i32::from(page.load_u8(0).unwrap())
        });
        second.wait().code().unwrap_or(102) + i32::from(page.load_u8(0).unwrap())
    });
    let second = next_fork(&uffd);
    let third = next_fork(&second);
    for (uffd, byte) in [(&third, 1), (&second, 10), (&uffd, 100)] {
        assert_eq!(next_event(uffd).fault_page(), Some(page));
        answer(uffd, page, byte);
    }
    assert_eq!(child.wait().code(), Some(111));
}

#[test]
fn integration_a_fork_whose_event_nobody_reads_ends_with_its_process() {
    if !may_ask_for_forks() {
        return;
    }
    let (mut child, uffd, page) = client(|_| {
        let mut grandchild = Child::fork(|| 0);
        grandchild.wait().code().unwrap_or(102)
    });
    wait_readable(uffd.as_fd());
    let killed = uhmm_kernel_hook::PidFd::open(child.pid as u32).unwrap();
    assert!(killed.signal(rustix::process::Signal::KILL).unwrap());
    assert_eq!(child.wait().signal(), Some(libc::SIGKILL));
    let mut events = Vec::new();
    while uffd.read_events(&mut events).unwrap() > 0 {}
    let forks: Vec<&Userfaultfd> = events
        .iter()
        .filter_map(|event| if let UffdEvent::Fork { uffd } = event { Some(uffd) } else { None })
        .collect();
    assert!(forks.is_empty(), "the kernel withdraws the event of a fork that was killed while it waited");
    assert_eq!(uffd.zeropage(page, true).unwrap().stop, Some(uhmm_kernel_hook::FillStop::NoProcess));
}

/// What a child is told of a page that is lost is its own matter: the kernel copies poison that is there, takes none while an event is
/// unread, and what is poisoned afterwards is the parent's alone.
#[test]
fn integration_poison_is_inherited_by_forks_that_come_after_it_and_refused_before_their_event_is_read() {
    if !may_ask_for_forks() {
        return;
    }
    let (mut child, uffd, page) = client(|page| {
        let read = || i32::from(page.load_u8(0).unwrap());
        let before = Child::fork(read).wait().code();
        let after = Child::fork(read).wait().signal();
        if after == Some(libc::SIGBUS) { before.unwrap_or(102) } else { 103 }
    });
    wait_readable(uffd.as_fd());
    let refused = uffd.poison(page).unwrap();
    assert_eq!((refused.done_bytes, refused.stop), (0, Some(uhmm_kernel_hook::FillStop::Again)));
    let before = next_fork(&uffd);
    // The kernel counts the event as under way until the forking thread has run again.
    while uffd.poison(page).unwrap().stop == Some(uhmm_kernel_hook::FillStop::Again) {
        std::thread::yield_now();
    }
    assert_eq!(next_event(&before).fault_page(), Some(page), "a hole, and no poison");
    answer(&before, page, 33);
    next_fork(&uffd);
    assert_eq!(child.wait().code(), Some(33));
}
