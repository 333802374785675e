//! Ways of making a userfaultfd under other accounts, moves inside one process, and looking at other processes.

use std::os::fd::AsFd;

use crate::common::{Child, Client, become_nobody, hear, is_root, tell, wait_readable};
use rustix::process::Signal;
use uhmm_kernel_hook::{
    AddrRange, Features, FillStop, PAGE_SIZE, PidFd, RegisterMode, SeqListener, SeqPacket, UffdKind, Userfaultfd,
    Window, memfd, process, procmap,
};

#[test]
fn integration_an_account_without_rights_falls_back_unless_it_is_given_the_device() {
    if !is_root() {
        eprintln!("skipped: only root can change accounts");
        return;
    }
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").unwrap();
    let closed_to_others = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() == "0";
    let mut child = Child::fork(|| {
        become_nobody();
        let (alone, kind) = Userfaultfd::create(None).unwrap();
        if closed_to_others && kind != UffdKind::UserModeOnly {
            return 1;
        }
        // EVENT_FORK is refused to this account, and left out by `api_best` instead of failing.
        let granted = alone.api_best(Features::EVENT_FORK | Features::MISSING_SHMEM).unwrap();
        if granted != Features::MISSING_SHMEM {
            return 2;
        }
        let (_full, kind) = Userfaultfd::create(Some(device.as_fd())).unwrap();
        if kind == UffdKind::Full { 0 } else { 3 }
    });
    assert_eq!(child.wait().code(), Some(0));
}

#[test]
fn integration_user_mode_only_fails_the_kernels_own_access() {
    let uffd = Userfaultfd::create_user_mode_only().unwrap();
    uffd.api(Features::MISSING_SHMEM).unwrap();
    let file = memfd::create_sealed("uhmm-source", PAGE_SIZE).unwrap();
    let window = Window::anonymous(PAGE_SIZE).unwrap();
    uffd.register(window.range(), RegisterMode::MISSING).unwrap();
    let error = memfd::read_to_window(file.as_fd(), 0, &window, 0, PAGE_SIZE).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EFAULT), "{error}");
    uffd.unregister(window.range()).unwrap();
    memfd::read_to_window(file.as_fd(), 0, &window, 0, PAGE_SIZE).unwrap();
}

#[test]
fn integration_move_takes_pages_without_copying_and_stops_at_holes() {
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api(Features::MOVE).unwrap();
    let (source, scratch) = (Window::anonymous(4 * PAGE_SIZE).unwrap(), Window::anonymous(4 * PAGE_SIZE).unwrap());
    source.fill(0, PAGE_SIZE, 1).unwrap();
    source.fill(2 * PAGE_SIZE, 2 * PAGE_SIZE, 3).unwrap();
    uffd.register(scratch.range(), RegisterMode::MISSING).unwrap();
    let (dst, src) = (scratch.addr(), source.addr());
    let outcome = uffd.move_pages(dst, src, 4 * PAGE_SIZE, false).unwrap();
    assert_eq!((outcome.done_bytes, outcome.stop), (PAGE_SIZE, Some(FillStop::Again)), "a hole follows page 0");
    let rest = uffd.move_pages(dst + PAGE_SIZE, src + PAGE_SIZE, 3 * PAGE_SIZE, true).unwrap();
    assert!(rest.is_complete());
    assert_eq!(scratch.load_u8(0).unwrap(), 1);
    assert!(scratch.compare(2 * PAGE_SIZE, &[3; 2 * PAGE_SIZE as usize]).unwrap());
    assert!(source.compare(0, &[0; 4 * PAGE_SIZE as usize]).unwrap(), "the source is empty now");
}

#[test]
fn integration_refusals_name_call_and_range() {
    let (uffd, _) = Userfaultfd::create(None).unwrap();
    uffd.api(Features::empty()).unwrap();
    assert_eq!(uffd.api(Features::empty()).unwrap_err().errno(), Some(libc::EINVAL), "the handshake is done once");
    let range = AddrRange::new(0x10_0000_0000, PAGE_SIZE).unwrap();
    let error = uffd.register(range, RegisterMode::MISSING).unwrap_err();
    assert!(error.to_string().starts_with("UFFDIO_REGISTER failed on 0x1000000000+0x1000: "), "{error}");
    let fresh = Userfaultfd::create(None).unwrap().0;
    assert!(fresh.read_events(&mut Vec::new()).is_err(), "no events before the handshake");
}

#[test]
fn integration_this_kernel_has_what_shared_regions_need() {
    let needed = Features::MISSING_SHMEM | Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM | Features::POISON;
    assert!(Userfaultfd::supported_features().unwrap().contains(needed));
    assert!(uhmm_kernel_hook::Probe::run().usable());
}

#[test]
fn integration_memory_of_another_process_is_read_and_written() {
    let window = Window::anonymous(2 * PAGE_SIZE).unwrap();
    let (socket, peer) = SeqPacket::pair().unwrap();
    let mut child = Child::fork(|| {
        window.write(100, b"of the child").unwrap();
        tell(&peer, b"written");
        hear(&peer);
        i32::from(window.load_u8(200).unwrap())
    });
    hear(&socket);
    let pid = child.pid as u32;
    let mut text = [0; 12];
    assert_eq!(process::vm_read(pid, window.addr() + 100, &mut text).unwrap(), 12);
    assert_eq!(&text, b"of the child");
    assert_eq!(process::vm_write(pid, window.addr() + 200, &[33]).unwrap(), 1);
    assert_eq!(process::vm_read(pid, 0, &mut text).unwrap_err().errno(), Some(libc::EFAULT));
    assert!(process::rss(pid).unwrap().anon > 0);
    tell(&socket, b"end");
    assert_eq!(child.wait().code(), Some(33));
    assert_eq!(window.load_u8(100).unwrap(), 0, "this process has its own copy");
    assert_eq!(process::vm_read(pid, window.addr(), &mut text).unwrap_err().errno(), Some(libc::ESRCH));
}

#[test]
fn integration_procmap_query_tells_a_clients_protection() {
    let client = Client::start(3, Features::MISSING_SHMEM, RegisterMode::MISSING, |_, socket| {
        hear(socket);
        0
    });
    let maps = procmap::open_maps(client.child.pid as u32).unwrap();
    let vma = procmap::query(maps.as_fd(), client.range.start + PAGE_SIZE).unwrap().unwrap();
    assert!(vma.read && vma.write && vma.shared && !vma.exec);
    assert_eq!(vma.range(), client.range);
    assert_eq!(vma.inode, memfd::identity(client.backing.as_fd()).unwrap().1);
}

#[test]
fn integration_the_peer_of_a_socket_is_followed_to_its_death() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("service.sock");
    let listener = SeqListener::bind(&path).unwrap();
    let mut child = Child::fork(|| {
        let socket = SeqPacket::connect(&path).unwrap();
        hear(&socket);
        0
    });
    wait_readable(listener.as_fd());
    let server = listener.accept().unwrap().unwrap();
    let pidfd = PidFd::of_peer(server.as_fd()).unwrap();
    assert_eq!(pidfd.pid().unwrap(), Some(child.pid as u32));
    assert!(!pidfd.exited().unwrap());
    assert!(pidfd.signal(Signal::KILL).unwrap());
    wait_readable(pidfd.as_fd());
    assert!(pidfd.exited().unwrap());
    child.wait();
    assert!(!pidfd.signal(Signal::KILL).unwrap(), "a process that is gone takes no signal");
    assert_eq!(pidfd.pid().unwrap(), None);
}
