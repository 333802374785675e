//! Descriptors that outlive the death of a process which had no time to give them away.
//!
//! Reading a FORK event makes a descriptor in the reader, and only there: a reader that is killed before its next instruction
//! closes it, and the forked child reads zeros where its pages were. So the reader shares its descriptor table with a second
//! process that does nothing:
//!
//! ```text
//!   reader --clone(CLONE_FILES)--> keeper: waits for the reader's death
//!     | killed                        | poll(pidfd of the reader)
//!     v                               v
//!   next reader: FdKeeper::take -- numbers --> keeper -- descriptors --> next reader
//!                the vault forgets the keeper: it ends, and with the last of them the table
//! ```
//! The numbers are known from an [`EventJournal`](crate::uffd::EventJournal). As long as the keeper lives, the dead reader's
//! connections stay open too. A keeper whom nobody can ask any more, because the vault
//! is gone too, ends by itself. A reader has two of them: one that dies together with it takes nothing away.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use crate::error::{HookError, making_processes};
use crate::process::{self, PidFd};
use crate::socket::{RecvStatus, SendStatus, SeqPacket};

/// How long the successor waits for a keeper's answers.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
const NUMBERS_MAX: usize = 128;
/// Descriptors of a pager lie below; asking for each takes 0.2 us, and 13 ms for all while others want to be started again.
const NUMBERS_SEARCHED: RawFd = 1 << 16;
/// When nobody has asked for so long after the reader's death, all of them are looked at.
const SEARCH_AFTER: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// The running keeper of this process's descriptors. Dropping it ends it.
#[derive(Debug)]
pub struct FdKeeper {
    pid: libc::pid_t,
    pidfd: PidFd,
    /// Its ends of things live in the table that we share.
    _near: SeqPacket,
    _own_pidfd: PidFd,
}

impl FdKeeper {
    /// Begins to keep; returns what the successor of this process gives to [`FdKeeper::take`] (keep it in the vault).
    ///
    /// # Errors
    /// `Call`: EAGAIN, ENOMEM, EMFILE.
    pub fn spawn() -> Result<(Self, OwnedFd), HookError> {
        let own_pidfd = PidFd::open(std::process::id())?;
        let (near, far) = SeqPacket::pair()?;
        let far = far.into_fd();
        let far_end =
            FarEnd { number: far.as_raw_fd(), file: file_of(&far).map_err(|error| HookError::failed("fstat", error))? };
        let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
        // SAFETY: like fork, with a shared descriptor table: the child has its own copy of all memory, runs `keep` (which neither
        // allocates nor takes locks that another thread may have held, and closes nothing) and never returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid < 0 {
            let error = io::Error::last_os_error();
            let hint = making_processes(error.raw_os_error().unwrap_or(0));
            return Err(HookError::hinted("clone", error, hint));
        }
        if pid == 0 {
            keep(&own_pidfd, &near, far_end);
            // SAFETY: ends this process at once; its descriptors are the reader's.
            unsafe { libc::_exit(0) };
        }
        let pid = pid as libc::pid_t;
        let pidfd = PidFd::open(pid as u32)?;
        Ok((Self { pid, pidfd, _near: near, _own_pidfd: own_pidfd }, far))
    }

    /// Readable when it has ended: another one is needed.
    pub fn pidfd(&self) -> &PidFd {
        &self.pidfd
    }

    /// Gets descriptors of a dead process by their numbers there. `None`: it has no such descriptor, or the keeper is gone too. It can be
    /// asked again, and ends when nobody has `far` any more.
    ///
    /// # Errors
    /// `Call`; `BadMessage` for more than 128 numbers.
    pub fn take(far: BorrowedFd<'_>, numbers: &[RawFd]) -> Result<Vec<Option<OwnedFd>>, HookError> {
        if numbers.len() > NUMBERS_MAX {
            return Err(HookError::BadMessage("it asks for more than 128 descriptors"));
        }
        let far = SeqPacket::from_fd(crate::memfd::try_clone(far)?)?;
        let mut request = [0u8; 1 + 4 * NUMBERS_MAX];
        for (place, number) in request[1..].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        let mut answers: Vec<Option<OwnedFd>> = numbers.iter().map(|_| None).collect();
        if far.send(&request[..1 + 4 * numbers.len()], &[])? != SendStatus::Sent {
            return Ok(answers);
        }
        for answer in &mut answers {
            let mut fds = Vec::new();
            if !wait_for(&far.as_fd(), Some(&PATIENCE)) {
                break;
            }
            match far.recv(&mut [0], &mut fds, 1)? {
                RecvStatus::Message { .. } => *answer = fds.pop(),
                RecvStatus::WouldBlock | RecvStatus::Closed => break,
            }
        }
        Ok(answers)
    }
}

impl Drop for FdKeeper {
    fn drop(&mut self) {
        if self.pidfd.signal(Signal::KILL).is_ok() {
            // SAFETY: no status is wanted; a child of ours that nobody else reaps.
            unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
        }
    }
}

/// `false`: not in time.
fn wait_for(fd: &BorrowedFd<'_>, timeout: Option<&Timespec>) -> bool {
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], timeout) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Which file a descriptor names.
fn file_of(fd: &impl AsFd) -> Result<(u64, u64), rustix::io::Errno> {
    rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

/// The successor's end, as the reader had it.
#[derive(Clone, Copy)]
struct FarEnd {
    number: RawFd,
    file: (u64, u64),
}

/// Closes a number of the dead reader if it is a copy of the successor's end: as long as one is open, `near` cannot tell that nobody is left
/// who would ask.
fn close_copy(far: FarEnd, number: RawFd) {
    // SAFETY: nobody else uses this table any more; the kernel refuses a number that names nothing.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    if file_of(&fd) == Ok(far.file) {
        // SAFETY: as above, and nobody here uses this one.
        unsafe { libc::close(number) };
    }
}

/// The keeper's life. It owns none of the descriptors and allocates nothing.
fn keep(reader: &PidFd, near: &SeqPacket, far: FarEnd) {
    drop(process::set_name("uhmm-fd-keeper"));
    if !wait_for(&reader.as_fd(), None) {
        return;
    }
    // The one that the reader was given; of others, if it made any, there is time to think.
    close_copy(far, far.number);
    while wait_for(&near.as_fd(), Some(&SEARCH_AFTER)) {
        if !answer(near) {
            return;
        }
    }
    (0..NUMBERS_SEARCHED).for_each(|number| close_copy(far, number));
    while wait_for(&near.as_fd(), None) && answer(near) {}
}

/// `false`: nobody can ask any more.
fn answer(near: &SeqPacket) -> bool {
    let mut request = [0u8; 1 + 4 * NUMBERS_MAX];
    let Ok(RecvStatus::Message { len, .. }) = near.recv(&mut request, &mut Vec::new(), 0) else { return false };
    for number in request[1..len.max(1)].chunks_exact(4) {
        let number = RawFd::from_ne_bytes([number[0], number[1], number[2], number[3]]);
        if number < 0 {
            drop(near.send(&[0], &[]));
            continue;
        }
        // SAFETY: nobody else uses this table any more; the kernel refuses a number that names nothing.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        if !matches!(near.send(&[1], &[fd]), Ok(SendStatus::Sent)) {
            drop(near.send(&[0], &[]));
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::fork_child;
    use crate::memfd;

    #[test]
    fn a_descriptor_of_a_killed_process_is_found_by_its_number() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let child = fork_child(|| {
            let (keeper, far) = FdKeeper::spawn().unwrap();
            let late = memfd::create_sealed("uhmm-late", 3 * 4096).unwrap();
            let number = late.as_raw_fd().to_ne_bytes();
            drop(theirs.send(&number, &[far.as_fd()]));
            wait_for(&theirs.as_fd(), None);
            drop(keeper);
            0
        })
        .unwrap();
        let (mut number, mut fds) = ([0; 4], Vec::new());
        wait_for(&ours.as_fd(), None);
        let RecvStatus::Message { .. } = ours.recv(&mut number, &mut fds, 1).unwrap() else { panic!("no message") };
        child.kill().unwrap();
        child.wait().unwrap();
        let numbers = [RawFd::from_ne_bytes(number), 9999, -1];
        let mut taken = FdKeeper::take(fds[0].as_fd(), &numbers).unwrap();
        assert!(taken[1].is_none() && taken[2].is_none());
        let late = taken.swap_remove(0).expect("the keeper had it");
        assert_eq!(memfd::len(late.as_fd()).unwrap(), 3 * 4096);
        let again = FdKeeper::take(fds[0].as_fd(), &numbers[..1]).unwrap();
        assert!(again[0].is_some(), "whoever asked may have died before it did anything with it");
    }

    #[test]
    fn of_two_keepers_any_one_is_enough_and_both_end() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let child = fork_child(|| {
            let keepers = [FdKeeper::spawn().unwrap(), FdKeeper::spawn().unwrap()];
            let late = memfd::create_sealed("uhmm-late", 4096).unwrap();
            let numbers =
                [late.as_raw_fd().to_ne_bytes(), keepers[0].0.pid.to_ne_bytes(), keepers[1].0.pid.to_ne_bytes()];
            drop(theirs.send(&numbers.concat(), &[keepers[0].1.as_fd(), keepers[1].1.as_fd()]));
            wait_for(&theirs.as_fd(), None);
            0
        })
        .unwrap();
        let (mut words, mut fds) = ([0; 12], Vec::new());
        wait_for(&ours.as_fd(), None);
        let RecvStatus::Message { .. } = ours.recv(&mut words, &mut fds, 2).unwrap() else { panic!("no message") };
        let word = |at: usize| i32::from_ne_bytes(words[at..at + 4].try_into().unwrap());
        let keepers = [4, 8].map(|at| PidFd::open(word(at) as u32).unwrap());
        keepers[0].signal(Signal::KILL).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(FdKeeper::take(fds[0].as_fd(), &[word(0)]).unwrap()[0].is_none(), "it was killed");
        assert!(FdKeeper::take(fds[1].as_fd(), &[word(0)]).unwrap()[0].is_some());
        fds.clear();
        for keeper in &keepers {
            assert!(wait_for(&keeper.as_fd(), Some(&PATIENCE)), "a keeper goes on");
        }
    }

    #[test]
    fn a_keeper_ends_also_when_its_reader_had_copied_what_it_gave_away() {
        let (ours, theirs) = SeqPacket::pair().unwrap();
        let child = fork_child(|| {
            let (keeper, far) = FdKeeper::spawn().unwrap();
            let copy = far.try_clone().unwrap();
            drop(theirs.send(&keeper.pid.to_ne_bytes(), &[far.as_fd()]));
            wait_for(&theirs.as_fd(), None);
            drop((keeper, copy));
            0
        })
        .unwrap();
        let (mut pid, mut fds) = ([0; 4], Vec::new());
        wait_for(&ours.as_fd(), None);
        let RecvStatus::Message { .. } = ours.recv(&mut pid, &mut fds, 1).unwrap() else { panic!("no message") };
        let keeper = PidFd::open(i32::from_ne_bytes(pid) as u32).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        fds.clear();
        assert!(wait_for(&keeper.as_fd(), Some(&PATIENCE)), "a keeper goes on");
    }

    #[test]
    fn a_keeper_ends_with_its_handle() {
        let (keeper, far) = FdKeeper::spawn().unwrap();
        let pidfd = keeper.pidfd.try_clone().unwrap();
        assert!(!pidfd.exited().unwrap());
        drop(keeper);
        assert!(pidfd.exited().unwrap());
        assert!(FdKeeper::take(far.as_fd(), &[0]).unwrap()[0].is_none());
    }
}
