//! Byte streams with descriptors beside them, for protocols that were not made here (vfio-user).
//!
//! A stream has no messages: sends and receives here are of a whole number of bytes, until a deadline. After anything but `Done` the
//! stream's position is unknown, so its owner closes it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketType,
};

use super::{CONTROL_BYTES, MAX_FDS, accept, bind, connect, socket_flags};
use crate::error::HookError;

/// What became of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum StreamStatus {
    /// All bytes went or came.
    Done,
    /// The peer has closed, perhaps in the middle.
    Closed,
    /// The deadline passed, perhaps in the middle.
    TimedOut,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
}

impl Stream {
    /// Two connected ends.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn pair() -> Result<(Self, Self), HookError> {
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, socket_flags(), None)
            .map_err(|error| HookError::hinted("socketpair", error, "Raise the descriptor limit (ulimit -n)"))?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    /// Connects to a listener's socket file.
    ///
    /// # Errors
    /// `Path`: ENOENT or ECONNREFUSED when nobody listens, EAGAIN when its backlog is full.
    pub fn connect(path: &Path) -> Result<Self, HookError> {
        connect(path, SocketType::STREAM, "Is its process running?").map(|fd| Self { fd })
    }

    /// Sends all of `bytes`; up to [`MAX_FDS`] descriptors go with the first of them and stay this process's too.
    ///
    /// # Errors
    /// `BadMessage` for nothing or too many descriptors, `Call`.
    pub fn send(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<StreamStatus, HookError> {
        if bytes.is_empty() || fds.len() > MAX_FDS {
            return Err(HookError::BadMessage("it is empty, or carries more than 253 descriptors"));
        }
        let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(HookError::BadMessage("its descriptors do not fit"));
        }
        let mut left = bytes;
        while !left.is_empty() {
            let parts = [IoSlice::new(left)];
            match rustix::net::sendmsg(&self.fd, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    control.clear();
                    left = left.get(count..).unwrap_or(&[]);
                }
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::OUT, deadline)? {
                        return Ok(StreamStatus::TimedOut);
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(StreamStatus::Closed),
                Err(Errno::INTR) => {}
                Err(error) => return Err(HookError::failed("sendmsg", error)),
            }
        }
        Ok(StreamStatus::Done)
    }

    /// Fills `buf`. Descriptors that come with these bytes are appended to `fds`, `max_fds` at most in all; more are closed and
    /// `BadMessage`.
    ///
    /// # Errors
    /// `BadMessage`, `Call`.
    pub fn recv(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        max_fds: usize,
        deadline: Option<Instant>,
    ) -> Result<StreamStatus, HookError> {
        let mut done = 0;
        while done < buf.len() {
            let mut space = [MaybeUninit::uninit(); CONTROL_BYTES];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buf[done..])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match rustix::net::recvmsg(&self.fd, &mut parts, &mut control, flags) {
                Ok(answer) => {
                    let mut cut = answer.flags.contains(ReturnFlags::CTRUNC);
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = message {
                            fds.extend(received);
                        }
                    }
                    cut |= fds.len() > max_fds;
                    fds.truncate(max_fds);
                    if cut {
                        return Err(HookError::BadMessage("it carries more descriptors than were agreed"));
                    }
                    if answer.bytes == 0 {
                        return Ok(StreamStatus::Closed);
                    }
                    done += answer.bytes;
                }
                Err(Errno::AGAIN) => {
                    if !self.wait(PollFlags::IN, deadline)? {
                        return Ok(StreamStatus::TimedOut);
                    }
                }
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Ok(StreamStatus::Closed),
                Err(Errno::INTR) => {}
                Err(error) => return Err(HookError::failed("recvmsg", error)),
            }
        }
        Ok(StreamStatus::Done)
    }

    /// Waits, for ever, until the peer has closed or [`Stream::shutdown`] was called. Reads nothing.
    ///
    /// # Errors
    /// `Call`.
    pub fn wait_closed(&self) -> Result<(), HookError> {
        self.wait(PollFlags::RDHUP, None).map(|_| ())
    }

    /// Nothing more is sent: the peer sees the end when it looks, and [`Stream::wait_closed`] tells when it has closed too.
    ///
    /// # Errors
    /// `Call`; a peer that is gone is no error.
    pub fn finish_sending(&self) -> Result<(), HookError> {
        self.shut(Shutdown::Write)
    }

    /// Both directions end now, also for those who wait in other threads.
    ///
    /// # Errors
    /// `Call`; a peer that is gone is no error.
    pub fn shutdown(&self) -> Result<(), HookError> {
        self.shut(Shutdown::Both)
    }

    fn shut(&self, how: Shutdown) -> Result<(), HookError> {
        match rustix::net::shutdown(&self.fd, how) {
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(error) => Err(HookError::failed("shutdown", error)),
        }
    }

    /// Whether the stream became ready (or ended) before the deadline.
    fn wait(&self, events: PollFlags, deadline: Option<Instant>) -> Result<bool, HookError> {
        wait(self.fd.as_fd(), events, deadline)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct StreamListener {
    fd: OwnedFd,
}

impl StreamListener {
    /// Listens at `path`, mode 0600 from the first moment. A file left by a dead listener is replaced.
    ///
    /// # Errors
    /// As [`super::SeqListener::bind`].
    pub fn bind(path: &Path) -> Result<Self, HookError> {
        bind(path, SocketType::STREAM).map(|fd| Self { fd })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// `Call`: EMFILE when the process is out of descriptors (the connection stays queued).
    pub fn accept(&self) -> Result<Stream, HookError> {
        loop {
            if let Some(fd) = accept(&self.fd)? {
                return Ok(Stream { fd });
            }
            wait(self.fd.as_fd(), PollFlags::IN, None)?;
        }
    }
}

fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> Result<bool, HookError> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(timespec);
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], timeout.as_ref()) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(HookError::failed("poll", error)),
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().min(i64::MAX as u64) as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventFd;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(20))
    }

    #[test]
    fn bytes_and_descriptors_come_as_they_went() {
        let (one, other) = Stream::pair().unwrap();
        let event = EventFd::new().unwrap();
        let big = vec![7; 1 << 20];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(one.send(b"head", &[event.as_fd()], None).unwrap(), StreamStatus::Done);
                assert_eq!(one.send(&big, &[], None).unwrap(), StreamStatus::Done);
            });
            let (mut head, mut body, mut fds) = ([0; 4], vec![0; 1 << 20], Vec::new());
            assert_eq!(other.recv(&mut head, &mut fds, 1, None).unwrap(), StreamStatus::Done);
            assert_eq!((&head, fds.len()), (b"head", 1));
            assert_eq!(other.recv(&mut body, &mut fds, 1, None).unwrap(), StreamStatus::Done);
            assert!(body == big);
            EventFd::from_fd(fds.remove(0)).unwrap().signal().unwrap();
            assert_eq!(event.drain().unwrap(), 1);
        });
    }

    #[test]
    fn nobody_waits_longer_than_the_deadline() {
        let (one, other) = Stream::pair().unwrap();
        assert_eq!(one.recv(&mut [0; 2], &mut Vec::new(), 0, soon()).unwrap(), StreamStatus::TimedOut);
        assert_eq!(other.send(&[1], &[], None).unwrap(), StreamStatus::Done);
        assert_eq!(one.recv(&mut [0; 2], &mut Vec::new(), 0, soon()).unwrap(), StreamStatus::TimedOut);
        assert_eq!(one.send(&vec![0; 8 << 20], &[], soon()).unwrap(), StreamStatus::TimedOut);
    }

    #[test]
    fn a_peer_that_closes_is_noticed_by_all_who_wait() {
        let (one, other) = Stream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| one.wait_closed().unwrap());
            drop(other);
        });
        assert_eq!(one.recv(&mut [0; 1], &mut Vec::new(), 0, None).unwrap(), StreamStatus::Closed);
        assert_eq!(one.send(&[1], &[], None).unwrap(), StreamStatus::Closed);
        let (one, _other) = Stream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| one.wait_closed().unwrap());
            one.shutdown().unwrap();
        });
    }

    #[test]
    fn surplus_descriptors_are_refused() {
        let (one, other) = Stream::pair().unwrap();
        let event = EventFd::new().unwrap();
        assert_eq!(one.send(&[1], &[event.as_fd(), event.as_fd()], None).unwrap(), StreamStatus::Done);
        let mut fds = Vec::new();
        assert!(matches!(other.recv(&mut [0; 1], &mut fds, 1, None), Err(HookError::BadMessage(_))));
        assert_eq!(fds.len(), 1);
    }
}
