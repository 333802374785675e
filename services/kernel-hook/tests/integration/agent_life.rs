//! How an agent lives beside its program, and how it ends with it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use crate::agent_bed::{Bed, Desk, filled};
use crate::common::{Child, hear, is_root, tell, wait_readable};
use uhmm_kernel_hook::{PAGE_SIZE, PidFd, SendStatus, SeqPacket, Userfaultfd};
use uhmm_shared::agent::{Op, Status};

/// An address where nothing is mapped: an order that any agent can do.
const NOWHERE: u64 = 1 << 20;
const NOT_EVEN: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

fn is_answered(desk: &mut Desk) -> bool {
    desk.ask(0, NOWHERE, 1, Op::CopyOut { slot: 0 }) == [(1, Status::Gone)]
}

/// A process with an agent, both seen from another one.
struct Program {
    child: Child,
    agent: PidFd,
    socket: SeqPacket,
    desk: Desk,
}

impl Program {
    /// As with the SDK, a thread of the program starts the agent; it goes on for as long as the program if it `stays`, else it ends
    /// alone. Then `body` runs on the program's first thread.
    fn start(stays: bool, body: impl FnOnce(&SeqPacket) -> i32) -> Self {
        let (socket, peer) = SeqPacket::pair().unwrap();
        let desk = Desk::new();
        let theirs = desk.reopen();
        let child = Child::fork(move || {
            let peer = Arc::new(peer);
            let (ready, is_ready) = mpsc::channel();
            let told = peer.clone();
            let keeper = std::thread::spawn(move || {
                let bed = Bed::start(theirs, Userfaultfd::create(None).unwrap().0, true);
                let sent = told.send(b"agent", &[bed.agent().pidfd().as_fd()]).unwrap();
                assert_eq!(sent, SendStatus::Sent);
                ready.send(()).unwrap();
                if stays {
                    // Until the process ends.
                    loop {
                        std::thread::park();
                    }
                }
                std::mem::forget(bed);
            });
            is_ready.recv().unwrap();
            if !stays {
                keeper.join().unwrap();
            }
            body(&peer)
        });
        let (_, mut fds) = hear(&socket);
        let agent = PidFd::from_fd(fds.remove(0));
        Self { child, agent, socket, desk }
    }

    fn agent_ends(&self) {
        wait_readable(self.agent.as_fd());
    }

    fn agent_lives(&mut self) {
        assert!(is_answered(&mut self.desk));
        let ended = poll(&mut [PollFd::new(&self.agent, PollFlags::IN)], Some(&NOT_EVEN)).unwrap();
        assert_eq!(ended, 0, "it has ended");
    }
}

fn wait_for_word(peer: &SeqPacket) -> i32 {
    hear(peer);
    7
}

#[test]
fn integration_agent_ends_when_its_program_exits() {
    let mut program = Program::start(true, wait_for_word);
    program.agent_lives();
    tell(&program.socket, b"exit");
    assert_eq!(program.child.wait().code(), Some(7));
    program.agent_ends();
}

#[test]
fn integration_agent_ends_when_its_program_is_killed() {
    use std::os::unix::process::ExitStatusExt;
    let mut program = Program::start(true, wait_for_word);
    program.agent_lives();
    // SAFETY: the number is our own child's, which was not waited for.
    assert_eq!(unsafe { libc::kill(program.child.pid, libc::SIGKILL) }, 0);
    assert_eq!(program.child.wait().signal(), Some(libc::SIGKILL));
    program.agent_ends();
}

#[test]
fn integration_agent_ends_when_its_program_becomes_another_one() {
    let mut program = Program::start(true, |peer| {
        hear(peer);
        let arguments = [c"/bin/sleep".as_ptr(), c"20".as_ptr(), std::ptr::null()];
        // SAFETY: strings that live through the call, and a list that ends with null.
        unsafe { libc::execv(arguments[0], arguments.as_ptr()) };
        102
    });
    program.agent_lives();
    tell(&program.socket, b"exec");
    program.agent_ends();
    let other = PidFd::open(program.child.pid as u32).unwrap();
    assert!(!other.exited().unwrap(), "the program goes on, as another one");
    let image = std::fs::read_link(format!("/proc/{}/exe", program.child.pid)).unwrap();
    assert_ne!(image, std::env::current_exe().unwrap());
}

#[test]
fn integration_agent_outlives_the_thread_that_has_started_it_and_not_the_program() {
    let mut program = Program::start(false, |peer| {
        tell(peer, b"the thread has ended");
        wait_for_word(peer)
    });
    hear(&program.socket);
    program.agent_lives();
    tell(&program.socket, b"exit");
    assert_eq!(program.child.wait().code(), Some(7));
    program.agent_ends();
}

/// A process of the program's memory: waits until the descriptor can be read, and ends. Nothing here uses thread-local memory.
extern "C" fn linger(fd: *mut libc::c_void) -> libc::c_int {
    let mut wait = libc::pollfd { fd: fd.addr() as i32, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry that lives through the call.
    unsafe { libc::syscall(libc::SYS_poll, &raw mut wait, 1, 20_000) };
    0
}

#[test]
fn integration_agent_serves_a_process_that_shares_the_memory_and_outlives_the_program() {
    let mut program = Program::start(true, |peer| {
        let stack = Box::leak(Box::new([0u128; 4096]));
        // SAFETY: the stack is nobody else's and is never freed; the memory stays as long as the new process.
        let made = unsafe {
            let top = stack.as_mut_ptr_range().end.cast();
            libc::clone(
                linger,
                top,
                libc::CLONE_VM,
                std::ptr::without_provenance_mut(peer.as_fd().as_raw_fd() as usize),
            )
        };
        assert!(made > 0);
        7
    });
    assert_eq!(program.child.wait().code(), Some(7));
    program.agent_lives();
    tell(&program.socket, b"end");
    program.agent_ends();
}

/// Every thread of this process is killed when it calls ioctl.
fn forbid_ioctl() {
    let step = |code: u32, jt: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    let load_number = step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0);
    let is_ioctl =
        libc::sock_filter { jf: 1, ..step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, libc::SYS_ioctl as u32) };
    let answer = |what: u32| step(libc::BPF_RET | libc::BPF_K, 0, what);
    let mut steps = [load_number, is_ioctl, answer(libc::SECCOMP_RET_KILL_PROCESS), answer(libc::SECCOMP_RET_ALLOW)];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: a program that lives through the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC);
        assert_eq!(libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program), 0);
    }
}

/// Closes every descriptor but one and gives up root folder, account and what debuggers and ioctls are for.
fn give_everything_up(kept: u32) {
    // SAFETY: nobody in this process uses the other descriptors any more; no memory is concerned.
    unsafe {
        assert_eq!(libc::chroot(c"/sys".as_ptr()), 0);
        assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 0), 0);
        libc::syscall(libc::SYS_close_range, 0, kept - 1, 0);
        libc::syscall(libc::SYS_close_range, kept + 1, u32::MAX, 0);
    }
    forbid_ioctl();
}

#[test]
fn integration_agent_goes_on_when_its_program_has_closed_and_given_up_everything() {
    if !is_root() {
        eprintln!("skipped: chroot and setresuid need root");
        return;
    }
    let (socket, peer) = SeqPacket::pair().unwrap();
    let mut desk = Desk::new();
    let theirs = desk.reopen();
    let mut child = Child::fork(move || {
        let mut bed = Bed::start(theirs, Userfaultfd::create(None).unwrap().0, true);
        let memory = filled(8);
        bed.adopt(&memory);
        // A program that has closed its descriptors has a pager still.
        bed.read_no_events();
        let sent = peer.send(&memory.addr().to_ne_bytes(), &[bed.agent().pidfd().as_fd()]).unwrap();
        assert_eq!(sent, SendStatus::Sent);
        hear(&peer);
        give_everything_up(peer.as_fd().as_raw_fd() as u32);
        tell(&peer, b"ready");
        hear(&peer);
        // Ends without the bed's ioctls.
        let bytes = (0..8).all(|page| memory.load_u64(page * PAGE_SIZE).ok() == Some(page + 1));
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(if bytes { 7 } else { 8 }) };
    });
    let (addr, mut fds) = hear(&socket);
    let addr = u64::from_ne_bytes(addr.try_into().unwrap());
    let agent = PidFd::from_fd(fds.remove(0));
    tell(&socket, b"go on");
    hear(&socket);
    assert_eq!(desk.ask(0, addr, 8, Op::MoveOut { slot: 0 }), [(8, Status::Moved)]);
    assert_eq!(desk.staging.load_u64(7 * PAGE_SIZE).unwrap(), 8);
    assert_eq!(desk.ask(0, addr, 8, Op::MoveBack), [(8, Status::Moved)]);
    // Nobody has protected them, so the copies may be old: no use, but they were read.
    assert_eq!(desk.ask(0, addr, 8, Op::CopyOut { slot: 1 }), [(8, Status::Busy)]);
    let last = desk.staging.load_u64((512 + 7) * PAGE_SIZE).unwrap();
    assert_eq!(last, 8, "/proc/self/mem is open still");
    tell(&socket, b"end");
    assert_eq!(child.wait().code(), Some(7));
    wait_readable(agent.as_fd());
}

#[test]
fn integration_agent_ends_at_once_when_it_is_told() {
    let mut bed = Bed::new();
    assert!(is_answered(&mut bed.desk));
    bed.seat().stop().unwrap();
    wait_readable(bed.agent().pidfd().as_fd());
    let mut status = 0;
    // SAFETY: `status` is one int; a child of ours that has ended.
    let reaped = unsafe { libc::waitpid(bed.agent().pid() as i32, &mut status, libc::__WCLONE) };
    assert_eq!((reaped as u32, status), (bed.agent().pid(), 0), "told, and nothing else");
}

#[test]
fn integration_agent_ends_when_its_ring_is_nonsense() {
    let mut bed = Bed::new();
    assert!(is_answered(&mut bed.desk));
    bed.desk.corrupt();
    wait_readable(bed.agent().pidfd().as_fd());
    let mut status = 0;
    // SAFETY: as above.
    let reaped = unsafe { libc::waitpid(bed.agent().pid() as i32, &mut status, libc::__WCLONE) };
    assert_eq!(reaped as u32, bed.agent().pid());
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 2, "{status:#x}");
}

/// In a process of its own, where nobody else makes children or descriptors.
fn alone(body: fn(Bed)) {
    let mut child = Child::fork(|| {
        body(Bed::start(Desk::new(), Userfaultfd::create(None).unwrap().0, true));
        7
    });
    assert_eq!(child.wait().code(), Some(7));
}

#[test]
fn integration_agent_is_seen_by_nobody_who_waits_for_any_child() {
    alone(|mut bed| {
        assert!(is_answered(&mut bed.desk));
        // SAFETY: no status is asked for.
        assert_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) }, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ECHILD));
        assert!(bed.agent().pidfd().signal(Signal::KILL).unwrap());
        wait_readable(bed.agent().pidfd().as_fd());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) }, -1, "nor of its death");
    });
}

#[test]
fn integration_agent_keeps_no_descriptor_of_its_program_open() {
    let mut child = Child::fork(|| {
        let mut ends = [0; 2];
        // SAFETY: two ints.
        assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
        // SAFETY: the kernel just made both for us.
        let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let mut bed = Bed::start(Desk::new(), Userfaultfd::create(None).unwrap().0, true);
        drop(write);
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        let mut wait = [PollFd::new(&read, PollFlags::IN)];
        assert_eq!(poll(&mut wait, Some(&patience)).unwrap(), 1, "somebody holds the other end");
        assert!(wait[0].revents().contains(PollFlags::HUP));
        assert!(is_answered(&mut bed.desk), "and the agent lives");
        let open = std::fs::read_dir(format!("/proc/{}/fd", bed.agent().pid())).unwrap().count();
        assert_eq!(open, 5, "userfaultfd, pagemap, maps, mem, eventfd");
        7
    });
    assert_eq!(child.wait().code(), Some(7));
}

/// A field of /proc/PID/status.
fn status_field(pid: u32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    value.trim_start_matches(':').trim().to_string()
}

#[test]
fn integration_agent_takes_no_signal_but_the_last() {
    let mut bed = Bed::new();
    assert!(is_answered(&mut bed.desk));
    let pid = bed.agent().pid();
    let signals = [
        Signal::TERM,
        Signal::INT,
        Signal::SEGV,
        Signal::HUP,
        Signal::QUIT,
        Signal::ABORT,
        Signal::BUS,
        Signal::USR1,
        Signal::PIPE,
    ];
    for signal in signals {
        assert!(bed.agent().pidfd().signal(signal).unwrap());
        assert!(is_answered(&mut bed.desk), "{signal:?}");
    }
    assert_eq!(u64::from_str_radix(&status_field(pid, "SigCgt"), 16).unwrap(), 0, "none of the program's handlers");
    assert!(!bed.agent().pidfd().exited().unwrap());
    assert!(bed.agent().pidfd().signal(Signal::KILL).unwrap());
    wait_readable(bed.agent().pidfd().as_fd());
}

#[test]
fn integration_agent_has_a_process_group_and_a_name_of_its_own() {
    let mut bed = Bed::new();
    assert!(is_answered(&mut bed.desk));
    let pid = bed.agent().pid();
    // SAFETY: no memory is concerned.
    let (group, ours) = unsafe { (libc::getpgid(pid as i32), libc::getpgrp()) };
    assert_eq!(group as u32, pid, "Ctrl-C is for the program");
    assert_ne!(group, ours);
    assert_eq!(status_field(pid, "Name"), "uhmm-agent");
}

/// User and system time in ticks, and how often it went to sleep.
fn work_done(pid: u32) -> (u64, u64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, after_name) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let sleeps = status_field(pid, "voluntary_ctxt_switches").parse().unwrap();
    (fields[11].parse().unwrap(), fields[12].parse().unwrap(), sleeps)
}

#[test]
fn integration_agent_that_has_nothing_to_do_does_nothing() {
    let mut bed = Bed::new();
    let memory = filled(8);
    bed.adopt(&memory);
    assert_eq!(bed.run(&memory, 0, 8, Op::MoveOut { slot: 1 }), [(8, Status::Moved)]);
    assert_eq!(bed.run(&memory, 0, 8, Op::MoveBack), [(8, Status::Moved)]);
    let pid = bed.agent().pid();
    while !status_field(pid, "State").starts_with('S') {
        std::thread::yield_now();
    }
    let before = work_done(pid);
    // The time is what is measured here.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(work_done(pid), before);
    assert_eq!(memory.load_u64(7 * PAGE_SIZE).unwrap(), 8);
}
