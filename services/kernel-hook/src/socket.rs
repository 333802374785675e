//! Message sockets between services: Unix SOCK_SEQPACKET, where one send is one receive and descriptors travel beside bytes.
//!
//! Everything is non-blocking and close-on-exec. What a peer sends is never trusted: a message that is too long or carries too
//! many descriptors is reported as cut, and surplus descriptors are closed. [`stream`] has the byte streams that a protocol from
//! elsewhere may ask for.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::error::HookError;

pub mod stream;

/// The most descriptors the kernel lets one message carry (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

const CONTROL_BYTES: usize = rustix::cmsg_space!(ScmRights(MAX_FDS));
/// How many connections may wait while a service is being restarted.
const BACKLOG: i32 = 1024;

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum SendStatus {
    /// All of it is in the peer's queue.
    Sent,
    /// The queue is full: nothing was sent; try again when the socket is writable.
    WouldBlock,
    /// The peer has closed.
    PeerGone,
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum RecvStatus {
    /// A message.
    Message {
        /// Bytes of it that are in the buffer.
        len: usize,
        /// It was longer than the buffer; the rest is lost.
        truncated: bool,
        /// It carried more descriptors than were wanted (or than this process may open); they are closed.
        fds_truncated: bool,
    },
    /// Nothing yet.
    WouldBlock,
    /// The peer has closed (or sent an empty message, which no honest peer can).
    Closed,
}

/// One end of a connection.
#[derive(Debug)]
pub struct SeqPacket {
    fd: OwnedFd,
}

impl SeqPacket {
    /// Two connected ends.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn pair() -> Result<(Self, Self), HookError> {
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, socket_flags(), None)
            .map_err(|error| HookError::hinted("socketpair", error, "Raise the descriptor limit (ulimit -n)"))?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    /// Connects to a listener's socket file.
    ///
    /// # Errors
    /// `Path`: ENOENT or ECONNREFUSED when nobody listens, EAGAIN when its backlog is full; try again later.
    pub fn connect(path: &Path) -> Result<Self, HookError> {
        connect(path, SocketType::SEQPACKET, "Is the service running (`uhmm status`)?").map(|fd| Self { fd })
    }

    /// Takes over a connected socket (inherited, from the vault or from a message).
    ///
    /// # Errors
    /// `Call` when its flags cannot be set.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HookError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| HookError::failed("FIONBIO(socket)", error))?;
        Ok(Self { fd })
    }

    /// Gives the descriptor away.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends one message with up to [`MAX_FDS`] descriptors, all or nothing. The descriptors stay this process's too.
    ///
    /// # Errors
    /// `BadMessage` for an empty message or too many descriptors; `Call`: EMSGSIZE above the socket's buffer.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<SendStatus, HookError> {
        if bytes.is_empty() {
            return Err(HookError::BadMessage("it is empty, which would read as the end of the connection"));
        }
        if fds.len() > MAX_FDS {
            return Err(HookError::BadMessage("it carries more than 253 descriptors"));
        }
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(HookError::BadMessage("its descriptors do not fit"));
        }
        loop {
            let parts = [IoSlice::new(bytes)];
            match rustix::net::sendmsg(&self.fd, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => return Ok(SendStatus::Sent),
                Err(Errno::AGAIN) => return Ok(SendStatus::WouldBlock),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(SendStatus::PeerGone),
                Err(Errno::INTR) => {}
                Err(error) => return Err(HookError::hinted("sendmsg", error, "Send large data through shared memory")),
            }
        }
    }

    /// Takes one message; appends at most `max_fds` descriptors (close-on-exec) to `fds`.
    ///
    /// # Errors
    /// `Call`.
    pub fn recv(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>, max_fds: usize) -> Result<RecvStatus, HookError> {
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        // With no room at all the kernel would still report the cut, so the smallest room is one descriptor's.
        let room = rustix::cmsg_space!(ScmRights(max_fds.clamp(1, MAX_FDS)));
        let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
        let answer = loop {
            let mut parts = [IoSliceMut::new(buf)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match rustix::net::recvmsg(&self.fd, &mut parts, &mut control, flags) {
                Ok(answer) => break answer,
                Err(Errno::AGAIN) => return Ok(RecvStatus::WouldBlock),
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Ok(RecvStatus::Closed),
                Err(Errno::INTR) => {}
                Err(error) => return Err(HookError::failed("recvmsg", error)),
            }
        };
        let mut fds_truncated = answer.flags.contains(ReturnFlags::CTRUNC);
        let mut taken = 0;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                for fd in received {
                    if taken < max_fds {
                        fds.push(fd);
                        taken += 1;
                    } else {
                        // Alignment of the control buffer leaves room for one or two more than asked for: closed here.
                        drop(fd);
                        fds_truncated = true;
                    }
                }
            }
        }
        if answer.bytes == 0 && !answer.flags.contains(ReturnFlags::TRUNC) {
            return Ok(RecvStatus::Closed);
        }
        let truncated = answer.flags.contains(ReturnFlags::TRUNC);
        Ok(RecvStatus::Message { len: answer.bytes.min(buf.len()), truncated, fds_truncated })
    }
}

impl AsFd for SeqPacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A listening socket. The supervisor makes it and keeps a duplicate, so that connections queue up while its service restarts;
/// closing one handle therefore leaves the socket file in place.
#[derive(Debug)]
pub struct SeqListener {
    fd: OwnedFd,
}

impl SeqListener {
    /// Listens at `path`, mode 0600 from the first moment. A file left by a dead listener is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when somebody listens there, `NotASocket`, `Path`: ENAMETOOLONG beyond 107 bytes, EACCES, ENOENT.
    pub fn bind(path: &Path) -> Result<Self, HookError> {
        bind(path, SocketType::SEQPACKET).map(|fd| Self { fd })
    }

    /// Takes over a listening socket (from the supervisor).
    ///
    /// # Errors
    /// `Call` when its flags cannot be set.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HookError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| HookError::failed("FIONBIO(socket)", error))?;
        Ok(Self { fd })
    }

    /// A second handle, for the vault.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, HookError> {
        Ok(Self { fd: crate::memfd::try_clone(self.fd.as_fd())? })
    }

    /// Gives the descriptor away.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The next waiting connection, or None.
    ///
    /// # Errors
    /// `Call`: EMFILE when the process is out of descriptors (the connection stays queued).
    pub fn accept(&self) -> Result<Option<SeqPacket>, HookError> {
        Ok(accept(&self.fd)?.map(|fd| SeqPacket { fd }))
    }
}

impl AsFd for SeqListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn socket_flags() -> SocketFlags {
    SocketFlags::CLOEXEC | SocketFlags::NONBLOCK
}

fn connect(path: &Path, kind: SocketType, hint: &'static str) -> Result<OwnedFd, HookError> {
    let addr = address(path)?;
    let fd = new_socket(kind)?;
    rustix::net::connect(&fd, &addr).map_err(|error| path_error("connect", path, error, hint))?;
    Ok(fd)
}

fn bind(path: &Path, kind: SocketType) -> Result<OwnedFd, HookError> {
    let addr = address(path)?;
    let fd = new_socket(kind)?;
    // The new file takes the mode of the unbound socket: no moment in which others could connect.
    rustix::fs::fchmod(&fd, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|error| HookError::failed("fchmod(socket)", error))?;
    let hint = "Create the directory, or choose another with --run-dir";
    match rustix::net::bind(&fd, &addr) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &addr, kind)?;
            rustix::net::bind(&fd, &addr).map_err(|error| match error {
                Errno::ADDRINUSE => HookError::AddrInUse { path: path.to_path_buf() },
                other => path_error("bind", path, other, hint),
            })?;
        }
        Err(error) => return Err(path_error("bind", path, error, hint)),
    }
    rustix::net::listen(&fd, BACKLOG).map_err(|error| path_error("listen", path, error, ""))?;
    Ok(fd)
}

fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, HookError> {
    loop {
        match rustix::net::accept_with(listener, socket_flags()) {
            Ok(fd) => return Ok(Some(fd)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => return Err(HookError::hinted("accept4", error, "Raise the descriptor limit (ulimit -n)")),
        }
    }
}

fn new_socket(kind: SocketType) -> Result<OwnedFd, HookError> {
    rustix::net::socket_with(AddressFamily::UNIX, kind, socket_flags(), None)
        .map_err(|error| HookError::hinted("socket", error, "Raise the descriptor limit (ulimit -n)"))
}

fn address(path: &Path) -> Result<SocketAddrUnix, HookError> {
    SocketAddrUnix::new(path)
        .map_err(|error| path_error("bind or connect", path, error, "Socket paths have at most 107 bytes"))
}

fn path_error(call: &'static str, path: &Path, error: Errno, hint: &'static str) -> HookError {
    HookError::Path { call, path: path.to_path_buf(), source: error.into(), hint }
}

/// Removes a socket file that nobody listens on; an attempt to connect tells.
fn remove_stale(path: &Path, addr: &SocketAddrUnix, kind: SocketType) -> Result<(), HookError> {
    use std::os::unix::fs::FileTypeExt;
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        // Gone since: fine.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(HookError::Path { call: "lstat", path: path.to_path_buf(), source, hint: "" }),
    };
    if !meta.file_type().is_socket() {
        return Err(HookError::NotASocket { path: path.to_path_buf() });
    }
    match rustix::net::connect(new_socket(kind)?, addr) {
        // A listener of another socket type answers EPROTOTYPE: alive as well. EAGAIN: alive with a full backlog.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(HookError::AddrInUse { path: path.to_path_buf() }),
        Err(Errno::CONNREFUSED | Errno::NOENT) => match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(HookError::Path { call: "unlink", path: path.to_path_buf(), source: error, hint: "" })
            }
            _ => Ok(()),
        },
        Err(error) => Err(path_error("connect", path, error, "")),
    }
}

#[cfg(test)]
mod tests;
