//! A forked client and the pager's side of it: what the integration tests share.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_kernel_hook::window::Prot;
use uhmm_kernel_hook::{
    AddrRange, Features, ManagedMapping, PAGE_SIZE, RecvStatus, RegisterMode, SendStatus, SeqPacket, UffdEvent,
    Userfaultfd, Window, memfd,
};

/// A test that waits longer than this has failed.
const PATIENCE_SECONDS: u32 = 20;

/// A child process; killed and waited for at the latest when dropped.
pub struct Child {
    pub pid: i32,
    waited: bool,
}

impl Child {
    /// Runs `body` in a forked child; its value is the exit code, a panic exits with 101.
    pub fn fork(body: impl FnOnce() -> i32) -> Self {
        // SAFETY: the child runs `body` on the forked thread alone and leaves by _exit, so no destructor runs twice.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            // SAFETY: plain calls; the alarm ends a child that nobody answers.
            unsafe { libc::alarm(PATIENCE_SECONDS) };
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(code) };
        }
        Self { pid, waited: false }
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = 0;
        // SAFETY: `status` is one int.
        assert_eq!(unsafe { libc::waitpid(self.pid, &mut status, 0) }, self.pid);
        self.waited = true;
        ExitStatus::from_raw(status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.waited {
            // SAFETY: the number is our own child's, which was not waited for, so it cannot mean another process.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            self.wait();
        }
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub fn may_ask_for_forks() -> bool {
    if !is_root() {
        eprintln!("skipped: EVENT_FORK needs CAP_SYS_PTRACE");
    }
    is_root()
}

/// Gives every right up; only for a child, and only as root.
pub fn become_nobody() {
    // SAFETY: plain calls without pointers.
    assert_eq!(unsafe { libc::setgid(65534) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setuid(65534) }, 0);
    // A change of account hides /proc/self from its own process, as starting a program under that account would not.
    // SAFETY: as above.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }, 0);
}

pub fn wait_readable(fd: BorrowedFd<'_>) {
    let patience = Timespec { tv_sec: PATIENCE_SECONDS.into(), tv_nsec: 0 };
    let ready = rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap();
    assert_eq!(ready, 1, "nothing came");
}

pub fn tell(socket: &SeqPacket, text: &[u8]) {
    assert_eq!(socket.send(text, &[]).unwrap(), SendStatus::Sent);
}

/// Waits for a message and returns it with its descriptors.
pub fn hear(socket: &SeqPacket) -> (Vec<u8>, Vec<OwnedFd>) {
    wait_readable(socket.as_fd());
    let (mut buf, mut fds) = (vec![0; 64], Vec::new());
    match socket.recv(&mut buf, &mut fds, 4).unwrap() {
        RecvStatus::Message { len, truncated: false, fds_truncated: false } => buf.truncate(len),
        other => panic!("{other:?}"),
    }
    (buf, fds)
}

/// A client process with one registered region, and the pager's handles of it.
pub struct Client {
    pub child: Child,
    pub socket: SeqPacket,
    pub uffd: Userfaultfd,
    pub backing: OwnedFd,
    pub range: AddrRange,
    /// One page of scratch memory to fill from.
    pub page: Window,
}

impl Client {
    /// Starts a client with a region of `page_count` pages; `body` runs in it once the region is registered.
    pub fn start(
        page_count: u64,
        features: Features,
        mode: RegisterMode,
        body: impl FnOnce(ManagedMapping, &SeqPacket) -> i32,
    ) -> Self {
        let backing = memfd::create_sealed("uhmm-test-region", page_count * PAGE_SIZE).unwrap();
        let (socket, peer) = SeqPacket::pair().unwrap();
        let child = Child::fork(|| {
            let region = ManagedMapping::map(backing.as_fd(), page_count * PAGE_SIZE, None).unwrap();
            let (uffd, _) = Userfaultfd::create(None).unwrap();
            let status = peer.send(&region.addr().to_ne_bytes(), &[uffd.as_fd()]).unwrap();
            assert_eq!(status, SendStatus::Sent);
            drop(uffd);
            hear(&peer);
            body(region, &peer)
        });
        drop(peer);
        let (addr, mut fds) = hear(&socket);
        let uffd = Userfaultfd::from_fd(fds.remove(0)).unwrap();
        assert_eq!(uffd.api(features).unwrap(), features);
        let addr = u64::from_ne_bytes(addr.try_into().unwrap());
        let range = AddrRange::new(addr, page_count * PAGE_SIZE).unwrap();
        uffd.register(range, mode).unwrap();
        tell(&socket, b"registered");
        Self { child, socket, uffd, backing, range, page: Window::anonymous(PAGE_SIZE).unwrap() }
    }

    pub fn page_range(&self, page: u64, page_count: u64) -> AddrRange {
        self.range.sub_pages(page, page_count).unwrap()
    }

    /// Waits for messages of the userfaultfd.
    pub fn events(&self) -> Vec<UffdEvent> {
        wait_readable(self.uffd.as_fd());
        let mut events = Vec::new();
        while self.uffd.read_events(&mut events).unwrap() > 0 {}
        events
    }

    /// Waits for exactly one fault on a page; returns (write, wp, minor).
    pub fn fault_on(&self, page: u64) -> (bool, bool, bool) {
        let events = self.events();
        match events.as_slice() {
            [UffdEvent::Fault { addr, write, wp, minor, .. }] => {
                assert_eq!((*addr - self.range.start) / PAGE_SIZE, page, "fault on another page");
                (*write, *wp, *minor)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Puts a page full of `byte` into the page cache, mapped nowhere.
    pub fn put_in_page_cache(&self, page: u64, byte: u8) {
        self.page.fill(0, PAGE_SIZE, byte).unwrap();
        memfd::write_from_window(self.backing.as_fd(), page * PAGE_SIZE, &self.page, 0, PAGE_SIZE).unwrap();
    }

    /// The byte at the start of a page of the backing.
    pub fn backing_byte(&self, page: u64) -> u8 {
        let view = Window::map(self.backing.as_fd(), page * PAGE_SIZE, PAGE_SIZE, Prot::ReadOnly).unwrap();
        view.load_u8(0).unwrap()
    }
}
