//! One connection: requests in turn, each with a deadline, and what becomes of the device when the peer is lost.
//!
//! ```text
//!   Alive --peer closes------------------------------> HungUp: it reaches nothing any more
//!     '--no answer in time, or nonsense--> Lost ------^ (when it closes too)
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uhmm_kernel_hook::{EventFd, Stream};

use crate::backend::InterruptKind;
use crate::vfio_user::wire::{self, Header, Limits, Message, WireError, command, flag};

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The peer said no.
    #[error("The device's process refused")]
    Refused(#[source] io::Error),
    /// It says nothing any more.
    #[error("{problem}")]
    Gone {
        /// How that was noticed.
        problem: String,
        /// The connection is closed at the other end too.
        hung_up: bool,
    },
}

impl From<WireError> for CallError {
    fn from(error: WireError) -> Self {
        Self::Gone { problem: error.to_string(), hung_up: matches!(error, WireError::Closed) }
    }
}

#[derive(Clone, Debug)]
struct Lost {
    problem: String,
    hung_up: bool,
}

#[derive(Debug, Default)]
struct Fate {
    lost: Option<Lost>,
    /// Events that are signalled when the peer is lost.
    error: Option<EventFd>,
    request: Option<EventFd>,
    /// This end closes: nobody is to be told.
    closing: bool,
}

/// See the module head.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    limit: Duration,
    limits: Limits,
    /// The next message's id; held while a request waits for its reply.
    turn: Mutex<u16>,
    fate: Mutex<Fate>,
}

impl Connection {
    /// Exchanges versions.
    pub fn start(stream: Stream, limit: Duration) -> Result<Self, CallError> {
        let unknown = Limits { max_msg_fds: 1, max_data_bytes: 8 };
        let fate = Mutex::new(Fate::default());
        let mut connection = Self { stream, limit, limits: unknown, turn: Mutex::new(0), fate };
        let reply = connection.call(command::VERSION, &wire::version_body(), &[])?;
        connection.limits = wire::parse_version(&reply.body)?;
        Ok(connection)
    }

    /// What the peer takes in one message.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// One request and its reply.
    pub fn call(&self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message, CallError> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lost) = self.fate().lost.clone() {
            return Err(CallError::Gone { problem: lost.problem, hung_up: lost.hung_up });
        }
        *turn = turn.wrapping_add(1);
        match self.exchange(*turn, command, body, fds) {
            Ok(reply) if reply.header.flags & flag::ERROR != 0 => {
                let errno = i32::try_from(reply.header.errno).ok().filter(|errno| (1..4096).contains(errno));
                // Some servers refuse without a reason.
                Err(CallError::Refused(errno.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error)))
            }
            Ok(reply) => Ok(reply),
            Err(error) => Err(self.lose(error)),
        }
    }

    /// The peer answered something else than it was asked.
    pub fn broken(&self, problem: &'static str) -> CallError {
        self.lose(WireError::Broken(problem))
    }

    /// Who is to be told when the peer is lost.
    pub fn tell_end(&self, kind: InterruptKind, event: Option<&EventFd>) -> Result<(), String> {
        let event = event.map(EventFd::try_clone).transpose().map_err(|error| error.to_string())?;
        let mut fate = self.fate();
        if let Some(lost) = &fate.lost {
            return Err(lost.problem.clone());
        }
        match kind {
            InterruptKind::Error => fate.error = event,
            InterruptKind::Request => fate.request = event,
            InterruptKind::Msi | InterruptKind::Msix => {}
        }
        Ok(())
    }

    /// The watcher thread: until the peer has closed or [`Connection::close`].
    pub fn watch(&self) {
        if let Err(error) = self.stream.wait_closed() {
            tracing::error!(%error, "A vfio-user connection cannot be watched: its end is noticed at the next access");
            return;
        }
        self.end(Lost { problem: "its process has closed the connection or ended".into(), hung_up: true });
    }

    /// This end is done.
    pub fn close(&self) {
        self.fate().closing = true;
        if let Err(error) = self.stream.shutdown() {
            tracing::error!(%error, "A vfio-user connection could not be closed");
        }
    }

    fn exchange(&self, id: u16, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message, WireError> {
        wire::send(&self.stream, Header { id, command, flags: 0, errno: 0 }, body, fds, self.limit)?;
        let reply = wire::receive(&self.stream, Some(self.limit), self.limit)?;
        let header = reply.header;
        if header.flags & flag::TYPE_MASK != flag::REPLY || header.id != id || header.command != command {
            return Err(WireError::Broken("it sent something else than the reply to the request"));
        }
        Ok(reply)
    }

    fn lose(&self, error: WireError) -> CallError {
        let lost = Lost { problem: error.to_string(), hung_up: matches!(error, WireError::Closed) };
        // The peer sees the end of requests as soon as it looks again, and closes: the watcher learns that it is harmless then.
        if let Err(error) = self.stream.finish_sending() {
            tracing::error!(%error, "A vfio-user connection could not be closed");
        }
        self.end(lost.clone());
        CallError::Gone { problem: lost.problem, hung_up: lost.hung_up }
    }

    fn end(&self, lost: Lost) {
        let mut fate = self.fate();
        match &mut fate.lost {
            // The first reason is the true one; that the peer closes after it only makes it harmless.
            Some(earlier) => earlier.hung_up |= lost.hung_up,
            None => fate.lost = Some(lost.clone()),
        }
        let closing = fate.closing;
        if !closing {
            tracing::error!(problem = lost.problem, "A vfio-user device is lost");
        }
        // The request first: whoever waits for both learns that the device is gone, not that it is broken.
        for event in [fate.request.take(), fate.error.take()].into_iter().flatten().filter(|_| !closing) {
            if let Err(error) = event.signal() {
                tracing::error!(%error, "The end of a vfio-user device could not be told");
            }
        }
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
