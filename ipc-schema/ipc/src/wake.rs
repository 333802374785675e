//! What [`Reactor::poll`](crate::Reactor::poll) tells its owner.

use std::sync::Arc;
use std::time::Instant;

use uhmm_kernel_hook::PidFd;

use crate::ids::{CallId, ConnId, FdToken, LinkId, TimerToken};
use crate::message::{Call, Event, Reply, Role, TraceId, Welcome, WireError};

/// Who is at the other end of an accepted connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Service name, proven by the channel key for service roles; only a claim for clients and operators.
    pub name: String,
    /// What the peer says it is. For service roles it holds as far as
    /// [`set_channel_role`](crate::Reactor::set_channel_role) tied the name to it.
    pub role: Role,
    /// How often the peer has been started; 0 for clients.
    pub incarnation: u32,
    /// Process id at connect time (SO_PEERCRED); 0 when the process is not visible from here.
    pub pid: u32,
    /// User id at connect time (SO_PEERCRED).
    pub uid: u32,
    /// Group id at connect time (SO_PEERCRED).
    pub gid: u32,
    /// The process that connected, whatever namespace it is in (SO_PEERPIDFD); `None`: it has ended already.
    pub process: Option<PeerProcess>,
}

/// A peer's process, held so that it cannot be taken for another one.
#[derive(Clone, Debug)]
pub struct PeerProcess {
    /// Readable when it has ended.
    pub pidfd: Arc<PidFd>,
    /// What it is called everywhere ([`PidFd::name`]).
    pub name: u64,
}

impl PartialEq for PeerProcess {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for PeerProcess {}

/// One thing that happened. Order is the order of arrival per connection, per link.
#[derive(Debug)]
pub enum Wake {
    /// A peer's handshake was accepted.
    Connected {
        /// Its connection from now on.
        conn: ConnId,
        /// Who.
        peer: Peer,
    },
    /// A peer asks. Answer exactly once with [`reply`](crate::Reactor::reply), now or later.
    Call {
        /// From.
        conn: ConnId,
        /// Give it to `reply`.
        call: CallId,
        /// Pass it on with every call made because of this one.
        trace: TraceId,
        /// After this the caller has stopped waiting.
        deadline: Option<Instant>,
        /// The request.
        body: Call,
    },
    /// A connection that was [`Connected`](Wake::Connected) is gone; replies and events to it are dropped. Not sent for a
    /// connection that the owner closed.
    Closed {
        /// Which.
        conn: ConnId,
        /// Why, for the log.
        why: String,
    },
    /// A link's handshake is done. The preamble, if any, runs now; queued calls follow it.
    LinkUp {
        /// Which.
        link: LinkId,
        /// What the callee said.
        welcome: Welcome,
        /// False the first time.
        reconnected: bool,
    },
    /// A link that was up is lost; it reconnects by itself.
    LinkDown {
        /// Which.
        link: LinkId,
    },
    /// The callee has refused the handshake several times in a row. Whatever was queued has ended with this error; the link goes on trying.
    Refused {
        /// Which.
        link: LinkId,
        /// Why.
        error: WireError,
    },
    /// A preamble call was answered. On an error the link stays up and everything queued ends with that error.
    Preamble {
        /// Which link.
        link: LinkId,
        /// The call. The list of today may be another one than that of this connection.
        call: Call,
        /// The answer.
        result: Result<Reply, WireError>,
    },
    /// A call has ended. Exactly one a call, unless its link is dropped.
    Done {
        /// Which link.
        link: LinkId,
        /// From [`call`](crate::Reactor::call).
        call: CallId,
        /// The answer.
        result: Result<Reply, WireError>,
    },
    /// The service at the other end of a link says something, unasked.
    Event {
        /// From.
        link: LinkId,
        /// Trace of what caused it.
        trace: TraceId,
        /// What.
        body: Event,
    },
    /// A descriptor of [`add_fd`](crate::Reactor::add_fd) became readable. Told once per edge: read until EAGAIN.
    Fd(FdToken),
    /// A timer fired. It is gone; arm it again if wanted.
    Timer(TimerToken),
    /// A [`Waker`](crate::Waker) was used, once or more often.
    Woken,
}
