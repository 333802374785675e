//! Ways of making a userfaultfd, from the most to the least able. A refusal of one goes on to the next: a device node that
//! exists but may not be opened is no reason to give up.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::Userfaultfd;
use crate::abi;
use crate::error::HookError;

/// What a userfaultfd sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdKind {
    /// Faults of the program and of the kernel on its behalf.
    Full,
    /// Faults of the program only: read(2) and the like into a migrated page fail with EFAULT.
    UserModeOnly,
}

/// The device node that grants full userfaultfds to whoever may open it.
pub(crate) const DEVICE_PATH: &str = "/dev/userfaultfd";

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// One way of making a userfaultfd; None when it does not apply here.
type Way<'a> = &'a dyn Fn() -> Option<io::Result<OwnedFd>>;

impl Userfaultfd {
    /// Makes one for this process, non-blocking and close-on-exec: by the device node handed in (which the pager opened),
    /// by opening it, by the call, at last for user mode only.
    ///
    /// # Errors
    /// `NoUserfaultfd` with every way's answer.
    pub fn create(dev: Option<BorrowedFd<'_>>) -> Result<(Self, UffdKind), HookError> {
        let mut tried = Vec::new();
        let ways: [(&str, Way<'_>, UffdKind); 4] = [
            ("given device", &|| dev.map(by_device), UffdKind::Full),
            (DEVICE_PATH, &|| Some(open_device().and_then(|node| by_device(node.as_fd()))), UffdKind::Full),
            ("userfaultfd()", &|| Some(by_call(0)), UffdKind::Full),
            ("userfaultfd(USER_MODE_ONLY)", &|| Some(by_call(abi::UFFD_USER_MODE_ONLY)), UffdKind::UserModeOnly),
        ];
        let mut last = io::Error::from_raw_os_error(libc::ENOSYS);
        for (name, way, kind) in ways {
            match way() {
                Some(Ok(fd)) => return Ok((Self { fd }, kind)),
                Some(Err(error)) => {
                    tried.push(format!("{name}: {error}"));
                    last = error;
                }
                None => {}
            }
        }
        Err(HookError::NoUserfaultfd { tried: tried.join("; "), source: last })
    }

    /// Makes one that any account may make, which does not see the kernel's own accesses.
    ///
    /// # Errors
    /// `NoUserfaultfd`.
    pub fn create_user_mode_only() -> Result<Self, HookError> {
        match by_call(abi::UFFD_USER_MODE_ONLY) {
            Ok(fd) => Ok(Self { fd }),
            Err(source) => Err(HookError::NoUserfaultfd { tried: "userfaultfd(USER_MODE_ONLY)".to_string(), source }),
        }
    }
}

/// Opens the device node; the pager does, and hands it to clients that may not.
///
/// # Errors
/// As the system gives it: EACCES, ENOENT in a container that was not given it.
pub fn open_device() -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE_PATH)?;
    Ok(file.into())
}

pub(crate) fn by_device(device: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: this ioctl takes flags, no pointer.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), abi::USERFAULTFD_IOC_NEW, FLAGS) })
}

pub(crate) fn by_call(extra: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: this call takes flags, no pointer.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS | extra) } as libc::c_int)
}

fn owned(rc: libc::c_int) -> io::Result<OwnedFd> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(rc) })
}
