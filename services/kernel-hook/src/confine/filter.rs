//! seccomp: a filter for the calling thread and its children, and the descriptor that tells which calls it refused.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Filter, Report, Step};
use crate::error::HookError;
use crate::sys::{Dir, Ioctl};

const SET_MODE_FILTER: libc::c_ulong = 1;
/// Whatever is refused goes to the kernel's log.
const FLAG_LOG: libc::c_ulong = 1 << 1;
const FLAG_NEW_LISTENER: libc::c_ulong = 1 << 3;

/// One instruction of a filter, as the kernel has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How far to jump when it holds.
    pub jump_true: u8,
    /// How far when it does not.
    pub jump_false: u8,
    /// Its number.
    pub number: u32,
}

#[repr(C)]
struct Program {
    len: u16,
    instructions: *const Instruction,
}

/// In a filter: the number of the process that it will restrict, which nobody knows before the fork.
pub const OWN_PROCESS: u32 = 0x4f57_4e50;
/// The kernel takes no more.
const INSTRUCTIONS_MAX: usize = 4096;

fn set(instructions: &[Instruction], flags: libc::c_ulong) -> io::Result<i32> {
    let (mut own, count) = ([Instruction::default(); INSTRUCTIONS_MAX], instructions.len());
    if count > INSTRUCTIONS_MAX {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let pid = std::process::id();
    for (place, instruction) in own.iter_mut().zip(instructions) {
        let number = if instruction.number == OWN_PROCESS { pid } else { instruction.number };
        *place = Instruction { number, ..*instruction };
    }
    let program = Program { len: count as u16, instructions: own.as_ptr() };
    // SAFETY: the kernel reads that many instructions and checks them.
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}

/// In the child: from here on only what the filter allows.
pub(super) fn enforce(filter: &Filter, report: &mut Report) -> Option<OwnedFd> {
    let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    if !filter.special.is_empty()
        && let Err(error) = set(&filter.special, 0)
    {
        report.note(Step::Calls, errno(error));
        return None;
    }
    match set(&filter.telling, FLAG_NEW_LISTENER) {
        Ok(listener) => {
            report.note(Step::Calls, 0);
            report.note(Step::Listener, 0);
            // SAFETY: a new descriptor that nobody else owns.
            Some(unsafe { OwnedFd::from_raw_fd(listener) })
        }
        // Another one listens already (in a container), or the kernel knows no such thing.
        Err(error) => {
            report.note(Step::Listener, errno(error));
            report.note(Step::Calls, set(&filter.silent, FLAG_LOG).map_or_else(errno, |_| 0));
            None
        }
    }
}

#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    instruction: u64,
    args: [u64; 6],
}

#[repr(C)]
#[derive(Default)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const RECV: Ioctl<Notification> = Ioctl::new(Dir::ReadWrite, b'!', 0);
const SEND: Ioctl<Response> = Ioctl::new(Dir::ReadWrite, b'!', 1);

/// A call that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeniedCall {
    /// Who made it.
    pub pid: u32,
    /// Its number: [`super::calls::name`].
    pub number: i32,
    /// Its first two arguments.
    pub args: [u64; 2],
}

/// Tells calls that a filter refused; readable when there is one. Their callers wait until they are taken. Without it they get ENOSYS.
#[derive(Debug)]
pub struct DeniedCalls {
    fd: OwnedFd,
}

/// What there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// A call, which got EPERM.
    Call(DeniedCall),
    /// Nothing now.
    Nothing,
    /// Nobody lives whom the filter restricts.
    Ended,
}

impl DeniedCalls {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Takes one and answers EPERM.
    ///
    /// # Errors
    /// `Call`.
    pub fn take(&self) -> Result<Taken, HookError> {
        let mut entry = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut entry, Some(&now)).map_err(|error| HookError::failed("poll(seccomp)", error))?;
        let ready = entry[0].revents();
        if !ready.contains(PollFlags::IN) {
            return Ok(if ready.contains(PollFlags::HUP) { Taken::Ended } else { Taken::Nothing });
        }
        let mut told = Notification::default();
        // SAFETY: the structure is plain data, and zero as the kernel wants it.
        match unsafe { RECV.call(self.fd.as_fd(), &mut told) } {
            Ok(_) => {}
            // Its caller was killed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Taken::Nothing),
            Err(error) => return Err(HookError::failed("SECCOMP_IOCTL_NOTIF_RECV", error)),
        }
        let mut response = Response { id: told.id, error: -libc::EPERM, ..Response::default() };
        // SAFETY: as above. A caller that was killed meanwhile needs no answer.
        let _ = unsafe { SEND.call(self.fd.as_fd(), &mut response) };
        Ok(Taken::Call(DeniedCall { pid: told.pid, number: told.number, args: [told.args[0], told.args[1]] }))
    }
}

impl AsFd for DeniedCalls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
