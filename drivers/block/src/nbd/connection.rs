//! One connection: a socket under the protocol. Opening and negotiating it, and moving requests until it breaks.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use uhmm_kernel_hook::PidFd;
use uhmm_manifest::{NbdPlace, NbdUrl};

use super::client::{Packet, Shared};
use super::wire::{Command, Export, Kind, ServerErrno, Sink, Wire, WireError};
use crate::backend::Answer;
use crate::machine::Fault;

/// Connecting and negotiating.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);
/// In flight on one connection.
const DEPTH: usize = 32;
/// Sent before more is taken from the queue.
const OUT_MAX: usize = 1 << 20;
/// Read at once.
const IN_BYTES: usize = 256 << 10;
/// Reads in a row before something is sent.
const READS_MAX: usize = 8;
/// A server that keeps data back for longer is away.
const USER_TIMEOUT_MS: u32 = 20_000;

/// Why a server is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody there.
    #[error("it cannot be reached: {0}")]
    Connect(io::Error),
    /// It was there.
    #[error("{what}: {reason}")]
    Socket {
        /// When.
        what: &'static str,
        /// What the kernel said.
        reason: io::Error,
    },
    /// Nobody answers.
    #[error("it has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    /// The protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// One request.
    #[error("it answers with {0}")]
    Errno(ServerErrno),
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(into),
            Self::Tcp(stream) => stream.read(into),
        }
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(from),
            Self::Tcp(stream) => stream.write(from),
        }
    }
}

/// A negotiated connection.
#[derive(Debug)]
pub struct Link {
    /// What it offers.
    pub export: Export,
    stream: Stream,
    wire: Wire,
    peer: Option<PidFd>,
    /// In the kernel's direction from here on: what of `wire.output()` is sent.
    sent: usize,
    next: u64,
    buffer: Vec<u8>,
}

fn connect(url: &NbdUrl) -> Result<(Stream, Option<PidFd>), LinkError> {
    let failed = |what| move |reason: io::Error| LinkError::Socket { what, reason };
    match &url.place {
        NbdPlace::Unix(path) => {
            let stream = UnixStream::connect(path).map_err(LinkError::Connect)?;
            stream.set_nonblocking(true).map_err(failed("the socket's mode"))?;
            // Whoever daemonizes after it has begun to listen is dead already, and says nothing about who serves.
            let peer = PidFd::of_peer(stream.as_fd()).ok().filter(|peer| matches!(peer.exited(), Ok(false)));
            Ok((Stream::Unix(stream), peer))
        }
        NbdPlace::Tcp(address) => {
            let stream = TcpStream::connect_timeout(address, OPEN_PATIENCE).map_err(LinkError::Connect)?;
            stream.set_nonblocking(true).map_err(failed("the socket's mode"))?;
            stream.set_nodelay(true).map_err(failed("the socket's mode"))?;
            let timeout = rustix::net::sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS);
            timeout.map_err(|error| failed("the socket's mode")(error.into()))?;
            Ok((Stream::Tcp(stream), None))
        }
    }
}

/// Who is told while a connection is opened.
#[derive(Default)]
struct Opening {
    export: Option<Export>,
    bytes: Vec<u8>,
    ended: Option<Result<(), ServerErrno>>,
}

impl Sink for Opening {
    fn ready(&mut self, export: Export) {
        self.export = Some(export);
    }

    fn data(&mut self, _: u64, at: u32, bytes: &[u8]) {
        // The protocol has checked that it is inside of what was asked for.
        self.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn zeroes(&mut self, _: u64, at: u32, len: u32) {
        self.bytes[at as usize..][..len as usize].fill(0);
    }

    fn ended(&mut self, _: u64, result: Result<(), ServerErrno>) {
        self.ended = Some(result);
    }
}

impl Link {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn open(url: &NbdUrl) -> Result<Self, LinkError> {
        let (stream, peer) = connect(url)?;
        let wire = Wire::new(&url.export);
        let buffer = vec![0; IN_BYTES];
        let mut link = Self { export: Export::default(), stream, wire, peer, sent: 0, next: 1, buffer };
        let mut opening = Opening::default();
        link.until(&mut opening, |opening| opening.export.is_some())?;
        link.export = opening.export.unwrap_or_default();
        Ok(link)
    }

    fn until(&mut self, sink: &mut Opening, done: impl Fn(&Opening) -> bool) -> Result<(), LinkError> {
        let end = Instant::now() + OPEN_PATIENCE;
        while !done(sink) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Silent(OPEN_PATIENCE));
            }
            let reason = |what| move |reason: io::Error| LinkError::Socket { what, reason };
            self.flush().map_err(reason("sending to it failed"))?;
            let wants = self.wants();
            wait(&[(self.stream.as_fd(), wants)], left).map_err(reason("waiting for it failed"))?;
            self.take(sink)?;
        }
        Ok(())
    }

    fn wants(&mut self) -> PollFlags {
        if self.sent < self.wire.output().len() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// Sends as much as the kernel takes.
    fn flush(&mut self) -> io::Result<()> {
        loop {
            let left = &self.wire.output()[self.sent..];
            if left.is_empty() {
                self.wire.output().clear();
                self.sent = 0;
                return Ok(());
            }
            match self.stream.write(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.sent > OUT_MAX {
            self.wire.output().drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    /// Takes what has come.
    fn take(&mut self, sink: &mut dyn Sink) -> Result<(), LinkError> {
        for _ in 0..READS_MAX {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(closed("it has closed the connection")),
                Ok(count) => self.wire.receive(&self.buffer[..count], sink)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(reason) => return Err(LinkError::Socket { what: "reading from it failed", reason }),
            }
        }
        Ok(())
    }

    /// Reads before anybody else uses it.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, LinkError> {
        let mut opening = Opening { bytes: vec![0; len as usize], ..Opening::default() };
        let id = self.next_id();
        self.wire.command(Command { id, kind: Kind::Read, offset, len });
        self.until(&mut opening, |opening| opening.ended.is_some())?;
        match opening.ended {
            Some(Err(errno)) => Err(LinkError::Errno(errno)),
            _ => Ok(opening.bytes),
        }
    }

    /// Writes before anybody else uses it.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), LinkError> {
        let mut opening = Opening::default();
        let (id, kind) = (self.next_id(), Kind::Write { fua: self.export.fua });
        self.wire.command(Command { id, kind, offset, len: bytes.len() as u32 });
        self.wire.output().extend_from_slice(bytes);
        self.until(&mut opening, |opening| opening.ended.is_some())?;
        opening.ended.unwrap_or(Ok(())).map_err(LinkError::Errno)
    }

    fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Ends it so that nothing that was not sent is sent any more. Says who served.
    pub(super) fn reset(self) -> Option<PidFd> {
        if let Stream::Tcp(stream) = &self.stream
            && let Err(error) = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))
        {
            tracing::warn!(%error, "A connection is closed, not reset: what was not sent may be sent still");
        }
        self.peer
    }
}

fn closed(text: &str) -> LinkError {
    LinkError::Socket { what: "reading from it failed", reason: io::Error::new(io::ErrorKind::ConnectionReset, text) }
}

/// Waits for any of these.
fn wait(entries: &[(BorrowedFd<'_>, PollFlags)], patience: Duration) -> io::Result<()> {
    let mut polled: Vec<PollFd<'_>> = entries.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let time = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
    match rustix::event::poll(&mut polled, Some(&time)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Requests of a connection.
struct Requests<'a> {
    shared: &'a Shared,
    /// With the moment at which each was sent.
    flights: HashMap<u64, (Packet, Instant)>,
    /// It said that it goes away.
    goes: bool,
    answered: bool,
}

/// How a connection ended.
pub(super) struct Served {
    /// Why.
    pub reason: String,
    /// The server's end of it was seen.
    pub closed: bool,
    /// What was in flight.
    pub left: Vec<Packet>,
    /// It has answered something before.
    pub answered: bool,
}

impl Requests<'_> {
    fn put(&self, id: u64, at: u32, put: impl FnOnce(&Packet, u64) -> Result<(), uhmm_kernel_hook::HookError>) {
        let Some((packet, _)) = self.flights.get(&id) else { return };
        if let Err(error) = put(packet, packet.at + u64::from(at)) {
            tracing::error!(%error, "What a server sent has no place");
        }
    }
}

impl Sink for Requests<'_> {
    fn ready(&mut self, _: Export) {}

    fn data(&mut self, id: u64, at: u32, bytes: &[u8]) {
        self.put(id, at, |packet, at| packet.memory.write(at, bytes));
    }

    fn zeroes(&mut self, id: u64, at: u32, len: u32) {
        self.put(id, at, |packet, at| packet.memory.fill(at, u64::from(len), 0));
    }

    fn ended(&mut self, id: u64, result: Result<(), ServerErrno>) {
        if result.is_err_and(ServerErrno::is_shutdown) {
            // It stays in flight until the connection is ended: another one may do it.
            self.goes = true;
            return;
        }
        self.answered = true;
        let Some((packet, _)) = self.flights.remove(&id) else { return };
        let url = &self.shared.settings.url;
        let failed = |errno| Answer::Failed(Fault::Refused(format!("block server {url} answers with {errno}")));
        self.shared.answer(&packet, result.map_or_else(failed, |()| Answer::Done));
    }
}

/// Moves requests until the connection breaks.
pub(super) fn serve(shared: &Shared, index: usize, link: &mut Link) -> Served {
    let mut requests = Requests { shared, flights: HashMap::new(), goes: false, answered: false };
    let error = loop {
        match turn(shared, index, link, &mut requests) {
            Ok(true) => {}
            Ok(false) => break None,
            Err(error) => break Some(error),
        }
    };
    let closed = matches!(&error, Some(LinkError::Socket { reason, .. })
        if [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe].contains(&reason.kind()));
    let reason = error.map_or_else(|| "it is not needed any more".to_owned(), |error| error.to_string());
    let answered = requests.answered;
    let mut left: Vec<(u64, (Packet, Instant))> = requests.flights.into_iter().collect();
    left.sort_by_key(|(id, _)| *id);
    let left = left.into_iter().map(|(_, (packet, _))| packet).collect();
    Served { reason, closed, left, answered }
}

/// False: it ends in order.
fn turn(shared: &Shared, index: usize, link: &mut Link, requests: &mut Requests<'_>) -> Result<bool, LinkError> {
    let backlog = link.wire.output().len() - link.sent;
    let room = if backlog > OUT_MAX { 0 } else { DEPTH.saturating_sub(requests.flights.len()) };
    let (packets, stop) = shared.take(index, room);
    for packet in packets {
        begin(link, requests, packet)?;
    }
    if stop && requests.flights.is_empty() {
        link.wire.disconnect();
    }
    let failed = |what| move |reason: io::Error| LinkError::Socket { what, reason };
    link.flush().map_err(failed("sending to it failed"))?;
    if stop && requests.flights.is_empty() {
        return Ok(false);
    }
    let silence = shared.settings.silence;
    let oldest = requests.flights.values().map(|(_, sent)| *sent).min();
    let left =
        oldest.map_or(Duration::from_secs(60), |since| (since + silence).saturating_duration_since(Instant::now()));
    let wants = link.wants();
    let wake = &shared.wakes[index];
    wait(&[(link.stream.as_fd(), wants), (wake.as_fd(), PollFlags::IN)], left)
        .map_err(failed("waiting for it failed"))?;
    if let Err(error) = wake.drain() {
        tracing::error!(%error, "A connection cannot be woken");
    }
    link.take(requests)?;
    if requests.goes {
        return Err(LinkError::Errno(ServerErrno(108)));
    }
    let late = |(_, sent): &(Packet, Instant)| sent.elapsed() >= silence;
    if oldest.is_some_and(|sent| sent.elapsed() >= silence) && requests.flights.values().any(late) {
        return Err(LinkError::Silent(silence));
    }
    Ok(true)
}

fn begin(link: &mut Link, requests: &mut Requests<'_>, packet: Packet) -> Result<(), LinkError> {
    let id = link.next_id();
    let Packet { kind, offset, len, .. } = packet;
    let kind = if let Kind::Write { fua } = kind { Kind::Write { fua: fua && link.export.fua } } else { kind };
    link.wire.command(Command { id, kind, offset, len });
    let read = if let Kind::Write { .. } = kind {
        let out = link.wire.output();
        let from = out.len();
        out.resize(from + len as usize, 0);
        packet.memory.read(packet.at, &mut out[from..])
    } else {
        Ok(())
    };
    requests.flights.insert(id, (packet, Instant::now()));
    // Half a request cannot be taken back.
    read.map_err(|error| LinkError::Socket {
        what: "a page cannot be read",
        reason: io::Error::other(error.to_string()),
    })
}
