//! What a service manager (systemd) and a service that it starts tell each other, without its library: the variables `NOTIFY_SOCKET`,
//! `WATCHDOG_USEC`, `FDSTORE` and `LISTEN_FDS`, datagrams of `KEY=value` lines, and descriptors that the manager keeps between two processes of
//! the service.

use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::{HookError, SendStatus};

/// What is for this process alone: whoever starts another one removes them, or that one speaks in its name.
pub const VARIABLES: [&str; 7] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];
/// Where inherited descriptors begin.
const FIRST_FD: RawFd = 3;
/// More than any manager keeps.
const FDS_MAX: RawFd = 1 << 17;

/// The way to the manager. Never waits.
#[derive(Debug)]
pub struct NotifySocket {
    fd: OwnedFd,
}

impl NotifySocket {
    /// The manager's, if this process was started by one that wants to hear something.
    ///
    /// # Errors
    /// The variable names no socket that can be reached.
    pub fn from_env() -> Result<Option<Self>, HookError> {
        std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()).map(Self::to).transpose()
    }

    /// `/path`, or `@name` without a file.
    ///
    /// # Errors
    /// `Call`.
    pub fn to(path: OsString) -> Result<Self, HookError> {
        let failed =
            |call| move |errno: Errno| HookError::hinted(call, errno, "NOTIFY_SOCKET must name a datagram socket");
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
            path => SocketAddrUnix::new(path),
        };
        let address = address.map_err(failed("sockaddr_un"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).map_err(failed("socket"))?;
        rustix::net::connect(&fd, &address).map_err(failed("connect(NOTIFY_SOCKET)"))?;
        Ok(Self { fd })
    }

    /// One datagram of lines; `fd` is for the descriptor store.
    ///
    /// # Errors
    /// `Call`: the kernel refuses the descriptor or the message.
    pub fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<SendStatus, HookError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(HookError::call("sendmsg", None, Errno::NOBUFS));
        }
        match rustix::net::sendmsg(&self.fd, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(SendStatus::Sent),
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Ok(SendStatus::WouldBlock),
            Err(Errno::CONNREFUSED | Errno::PIPE | Errno::NOTCONN) => Ok(SendStatus::PeerGone),
            Err(errno) => Err(HookError::call("sendmsg(NOTIFY_SOCKET)", None, errno)),
        }
    }
}

/// Longest time between two signs of life that the manager allows; `None`: it does not watch this process.
pub fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    number("WATCHDOG_USEC").filter(|micros| *micros > 0).map(Duration::from_micros)
}

/// How many descriptors the manager keeps for this process. (systemd says it from version 254 on; before, the unit has to.)
pub fn store_limit() -> usize {
    std::env::var("FDSTORE").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// What the manager has handed to this process, by name: once, further calls get nothing. Call it before anything is opened.
///
/// # Errors
/// `Call`: a descriptor that was announced is not there.
pub fn inherited() -> Result<Vec<(String, OwnedFd)>, HookError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).unwrap_or_default();
    let ours = variable("LISTEN_PID").parse() == Ok(std::process::id());
    let count = variable("LISTEN_FDS").parse().unwrap_or(0).clamp(0, FDS_MAX);
    if !ours || count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let names = variable("LISTEN_FDNAMES");
    let mut names = names.split(':');
    let mut all = Vec::new();
    for raw in FIRST_FD..FIRST_FD + count {
        // SAFETY: the manager made these descriptors for this process before it began, nothing here owns them yet, and TAKEN lets nobody
        // come twice. One that is not open is found by the next call, before anybody could close it: it is forgotten instead.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        if let Err(errno) = rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC) {
            std::mem::forget(fd);
            return Err(HookError::hinted(
                "fcntl(LISTEN_FDS)",
                errno,
                "Something closed what the service manager handed over",
            ));
        }
        all.push((names.next().unwrap_or_default().to_owned(), fd));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_datagram_arrives_with_its_descriptor_and_a_full_queue_is_said() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("bind");
        let socket = NotifySocket::to(path.into_os_string()).expect("connect");
        let file = std::fs::File::open("/dev/null").expect("a file");
        assert_eq!(socket.send("FDSTORE=1\nFDNAME=x", Some(file.as_fd())).expect("send"), SendStatus::Sent);
        let mut bytes = [0; 64];
        let len = manager.recv(&mut bytes).expect("a datagram");
        assert_eq!(&bytes[..len], b"FDSTORE=1\nFDNAME=x");
        let sent =
            (0..100_000).take_while(|_| socket.send("WATCHDOG=1", None).expect("send") == SendStatus::Sent).count();
        assert!(sent < 100_000, "nobody reads, and it never said that it would have to wait");
        drop(manager);
        assert_eq!(socket.send("READY=1", None).expect("send"), SendStatus::PeerGone);
    }

    #[test]
    fn a_manager_that_is_not_there_is_an_error_that_names_the_variable() {
        let error = NotifySocket::to("/nowhere/notify".into()).expect_err("nobody listens");
        assert!(error.to_string().contains("NOTIFY_SOCKET"), "{error}");
    }
}
