//! Typed ioctl: the struct's size is taken from its type, so number and argument cannot disagree.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Direction bits of an ioctl number, from the caller's side.
pub(crate) enum Dir {
    Read,
    ReadWrite,
}

/// An ioctl whose argument is a pointer to `T`.
pub(crate) struct Ioctl<T> {
    number: libc::c_ulong,
    argument: PhantomData<T>,
}

impl<T> Ioctl<T> {
    pub(crate) const fn new(dir: Dir, family: u8, nr: u8) -> Self {
        let dir_bits: libc::c_ulong = match dir {
            Dir::Read => 2,
            Dir::ReadWrite => 3,
        };
        let number = (dir_bits << 30)
            | ((size_of::<T>() as libc::c_ulong) << 16)
            | ((family as libc::c_ulong) << 8)
            | nr as libc::c_ulong;
        Self { number, argument: PhantomData }
    }

    #[cfg(test)]
    pub(crate) fn number(&self) -> libc::c_ulong {
        self.number
    }

    /// Makes the call.
    ///
    /// # Safety
    /// Every address inside `argument` that the kernel will read or write through on behalf of this process must be valid for
    /// that access. (The argument itself is: the number carries its size.)
    pub(crate) unsafe fn call(&self, fd: BorrowedFd<'_>, argument: &mut T) -> io::Result<i32> {
        loop {
            // SAFETY: `argument` is a live, exclusive T of the size the number names; addresses in it are the caller's promise.
            let rc = unsafe { libc::ioctl(fd.as_raw_fd(), self.number, std::ptr::from_mut(argument)) };
            if rc >= 0 {
                return Ok(rc);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// The error number of a failed system call; 0 never occurs there.
pub(crate) fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
