//! The event loop under every uhmm process: mio's epoll, accepted connections, links, timers, watched descriptors.
//!
//! Single-threaded and pull style: the owner calls [`Reactor::poll`] and gets [`Wake`]s; everything it asks for in between
//! (call, reply, event, close) only sends or queues and never blocks.
//!
//! ```text
//!   poll:  epoll_wait -> mark sources ready -> each ready source: at most 64 messages, rest in the next turn -> timers -> wakes
//!
//!   accepted connection                       link
//!     AwaitHello --hello ok--> Open             Down --connect, hello--> Greeting --welcome--> Preamble --all ok--> Up
//!        |  refused, 5 s late    | violation      ^                         |                     | one failed
//!        v                       v                +--- lost: back-off <-----+------ (any) <----- Blocked: calls end with it
//!      closed                  Closed
//! ```
//! A readable descriptor is reported by edge, so a source that was not drained stays in the ready queue (`has_work`). No peer
//! can hold the loop: messages per turn, connections, unanswered calls, descriptors, message size and write queues are bounded.
//! Nothing here survives a crash, and nothing needs to: links reconnect and send idempotent calls again.

mod conn;
mod link;
mod link_calls;
mod source;
mod timers;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Poll, Registry};
use slab::Slab;
use uhmm_kernel_hook::SeqListener;

use crate::codec::Encoder;
use crate::constants::MAX_NAME_BYTES;
use crate::error::IpcError;
use crate::handshake::Keys;
use crate::identity::{Identity, Limits};
use crate::ids::{FdToken, TimerId, TimerToken};
use crate::message::Role;
use crate::transport::Inbox;
use crate::wake::Wake;
use conn::{Complaints, Conn};
use link::Link;
use source::Source;
use timers::{Due, Timers};

/// Messages taken from one connection before the others get their turn.
const MESSAGES_PER_TURN: usize = 64;
/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 32;
const EVENTS_PER_POLL: usize = 128;

/// What connections and links need from the loop.
struct Shared {
    identity: Identity,
    registry: Registry,
    encoder: Encoder,
    inbox: Inbox,
    timers: Timers,
    ready: VecDeque<Source>,
    wakes: Vec<Wake>,
    keys: Keys,
    last_generation: u32,
    last_call: u64,
}

impl Shared {
    fn generation(&mut self) -> u32 {
        self.last_generation = self.last_generation.wrapping_add(1);
        self.last_generation
    }
}

struct Listener {
    socket: SeqListener,
    in_ready: bool,
    /// Nobody but services with a key is let in.
    services_only: bool,
}

struct Watched {
    token: FdToken,
    generation: u32,
    raw_fd: RawFd,
}

/// The event loop. See the module's head.
pub struct Reactor {
    poll: Poll,
    events: mio::Events,
    waker: Arc<mio::Waker>,
    shared: Shared,
    listeners: Vec<Listener>,
    conns: Slab<Conn>,
    /// Connections of clients that are past their handshake.
    client_count: usize,
    /// The same of operators.
    operator_count: usize,
    complaints: Complaints,
    links: Slab<Link>,
    watched: Slab<Watched>,
    watched_by_fd: HashMap<RawFd, usize>,
}

/// Wakes a reactor from another thread: its `poll` returns with [`Wake::Woken`].
#[derive(Clone, Debug)]
pub struct Waker(Arc<mio::Waker>);

impl Waker {
    /// Wakes the loop; many calls may be told as one.
    pub fn wake(&self) {
        if let Err(error) = self.0.wake() {
            tracing::error!(%error, "The event loop cannot be woken");
        }
    }
}

impl Reactor {
    /// A loop that serves nothing yet.
    pub fn new(identity: Identity) -> Result<Self, IpcError> {
        check(&identity)?;
        let failed = |action| move |source| IpcError::Poll { action, source };
        let poll = Poll::new().map_err(failed("be created"))?;
        let registry = poll.registry().try_clone().map_err(failed("be shared"))?;
        let waker = mio::Waker::new(&registry, Source::Waker.token()).map_err(failed("get a waker"))?;
        let inbox = Inbox::new(identity.limits.max_message_bytes as usize);
        Ok(Self {
            poll,
            events: mio::Events::with_capacity(EVENTS_PER_POLL),
            waker: Arc::new(waker),
            shared: Shared {
                identity,
                registry,
                encoder: Encoder::new(),
                inbox,
                timers: Timers::default(),
                ready: VecDeque::new(),
                wakes: Vec::new(),
                keys: Keys::default(),
                last_generation: 0,
                last_call: 0,
            },
            listeners: Vec::new(),
            conns: Slab::new(),
            client_count: 0,
            operator_count: 0,
            complaints: Complaints::default(),
            links: Slab::new(),
            watched: Slab::new(),
            watched_by_fd: HashMap::new(),
        })
    }

    /// What was given to [`new`](Self::new).
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// Accepts connections from now on; those that wait in the backlog come first. May be called more than once.
    pub fn listen(&mut self, socket: SeqListener) -> Result<(), IpcError> {
        self.listen_to(socket, false)
    }

    /// The same, for a socket that confined services can reach: whoever comes through it has a service's key, or is refused. Such a process
    /// could call itself a client or an operator otherwise.
    pub fn listen_to_services(&mut self, socket: SeqListener) -> Result<(), IpcError> {
        self.listen_to(socket, true)
    }

    fn listen_to(&mut self, socket: SeqListener, services_only: bool) -> Result<(), IpcError> {
        if self.shared.identity.interface.is_none() {
            return Err(IpcError::NothingServed);
        }
        let token = Source::Listener(self.listeners.len()).token();
        self.shared
            .registry
            .register(&mut SourceFd(&socket.as_fd().as_raw_fd()), token, Interest::READABLE)
            .map_err(|source| IpcError::Poll { action: "watch a listener", source })?;
        self.listeners.push(Listener { socket, in_ready: false, services_only });
        Ok(())
    }

    /// Another limit than the identity's for connections of clients.
    pub fn set_max_connections(&mut self, max_connections: u32) {
        self.shared.identity.limits.max_connections = max_connections;
    }

    /// The key that the service `peer_name` must present; replaces an older one. An empty key admits nobody.
    pub fn set_channel_key(&mut self, peer_name: &str, key: Vec<u8>) {
        self.shared.keys.set_key(peer_name, key);
    }

    /// The only role that the service `peer_name` may take. Without this a service with a valid key may claim any role; the key
    /// proves its name only.
    pub fn set_channel_role(&mut self, peer_name: &str, role: Role) {
        self.shared.keys.set_role(peer_name, role);
    }

    /// Watches a descriptor for being readable. Edge-triggered: after [`Wake::Fd`] read until EAGAIN. Remove it before closing
    /// it, as a duplicate elsewhere (the vault) would keep it in the loop.
    pub fn add_fd(&mut self, fd: &impl AsFd, token: FdToken) -> Result<(), IpcError> {
        let raw_fd = fd.as_fd().as_raw_fd();
        let generation = self.shared.generation();
        let entry = self.watched.vacant_entry();
        let index = entry.key();
        let source = Source::Fd { index: index as u32, generation };
        self.shared
            .registry
            .register(&mut SourceFd(&raw_fd), source.token(), Interest::READABLE)
            .map_err(|source| IpcError::Poll { action: "watch a descriptor", source })?;
        entry.insert(Watched { token, generation, raw_fd });
        // An older entry of that number was closed without being removed; the kernel has forgotten it.
        if let Some(stale) = self.watched_by_fd.insert(raw_fd, index) {
            self.watched.remove(stale);
        }
        Ok(())
    }

    /// Stops watching a descriptor.
    pub fn remove_fd(&mut self, fd: &impl AsFd) -> Result<(), IpcError> {
        let raw_fd = fd.as_fd().as_raw_fd();
        let index = self.watched_by_fd.remove(&raw_fd).ok_or(IpcError::NotWatched { raw_fd })?;
        let watched = self.watched.remove(index);
        self.shared
            .registry
            .deregister(&mut SourceFd(&watched.raw_fd))
            .map_err(|source| IpcError::Poll { action: "stop watching a descriptor", source })
    }

    /// Fires once, after `after` at the earliest.
    pub fn add_timer(&mut self, after: Duration, token: TimerToken) -> TimerId {
        self.shared.timers.add_after(after, Due::Owner(token))
    }

    /// False when it has fired or was cancelled before.
    pub fn cancel_timer(&mut self, timer: TimerId) -> bool {
        self.shared.timers.cancel(timer)
    }

    /// For other threads.
    pub fn waker(&self) -> Waker {
        Waker(self.waker.clone())
    }

    /// The next [`poll`](Self::poll) returns this again: for an owner that looked for something else when it came.
    pub fn put_back(&mut self, wake: Wake) {
        self.shared.wakes.push(wake);
    }

    /// Another `poll` would do something without waiting.
    pub fn has_work(&self) -> bool {
        !self.shared.ready.is_empty() || !self.shared.wakes.is_empty()
    }

    /// Waits for something to happen, at most `timeout` (`None`: without limit), and appends what happened to `out`. May return
    /// with nothing. Errors are the loop's own (epoll); peers cannot cause them.
    pub fn poll(&mut self, timeout: Option<Duration>, out: &mut Vec<Wake>) -> Result<(), IpcError> {
        let timeout = if self.has_work() {
            Some(Duration::ZERO)
        } else {
            match (timeout, self.shared.timers.wait()) {
                (Some(owner), Some(timer)) => Some(owner.min(timer)),
                (owner, timer) => owner.or(timer),
            }
        };
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => self.sort_events(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(IpcError::Poll { action: "wait", source }),
        }
        // Only those that are ready now: a busy peer that comes back into the queue waits for the next turn.
        for _ in 0..self.shared.ready.len() {
            match self.shared.ready.pop_front() {
                Some(Source::Listener(index)) => self.accept(index),
                Some(Source::Conn(conn)) => self.read_conn(conn),
                Some(Source::Link(link)) => self.read_link(link),
                Some(Source::Waker | Source::Fd { .. }) | None => {}
            }
        }
        self.run_timers();
        out.append(&mut self.shared.wakes);
        Ok(())
    }

    fn sort_events(&mut self) {
        let mut writable = Vec::new();
        let events = std::mem::replace(&mut self.events, mio::Events::with_capacity(0));
        for event in &events {
            let Some(source) = Source::from_token(event.token()) else { continue };
            match source {
                Source::Waker => self.shared.wakes.push(Wake::Woken),
                Source::Fd { index, generation } => {
                    let watched = self.watched.get(index as usize).filter(|watched| watched.generation == generation);
                    if let Some(watched) = watched {
                        self.shared.wakes.push(Wake::Fd(watched.token));
                    }
                }
                Source::Listener(index) => {
                    if let Some(listener) = self.listeners.get_mut(index)
                        && !std::mem::replace(&mut listener.in_ready, true)
                    {
                        self.shared.ready.push_back(source);
                    }
                }
                Source::Conn(_) | Source::Link(_) => {
                    if event.is_writable() {
                        writable.push(source);
                    }
                    if event.is_readable() || event.is_read_closed() || event.is_error() {
                        self.mark_ready(source, event.is_read_closed());
                    }
                }
            }
        }
        self.events = events;
        for source in writable {
            match source {
                Source::Conn(conn) => self.flush_conn(conn),
                Source::Link(link) => self.flush_link(link),
                _ => {}
            }
        }
    }

    fn mark_ready(&mut self, source: Source, peer_closed: bool) {
        let in_ready = match source {
            Source::Conn(id) => match find_conn(&mut self.conns, id) {
                Some(conn) => {
                    conn.peer_closed |= peer_closed;
                    &mut conn.in_ready
                }
                None => return,
            },
            Source::Link(id) => match find_link(&mut self.links, id) {
                Some(link) => &mut link.in_ready,
                None => return,
            },
            _ => return,
        };
        if !std::mem::replace(in_ready, true) {
            self.shared.ready.push_back(source);
        }
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        while let Some(due) = self.shared.timers.take(now) {
            match due {
                Due::Owner(token) => self.shared.wakes.push(Wake::Timer(token)),
                Due::Reconnect(link) => self.reconnect(link),
                Due::Deadline(link, call) => self.deadline_passed(link, call),
                Due::Greeting(conn) => self.greeting_late(conn),
                Due::Accept(index) => self.shared.ready.push_back(Source::Listener(index)),
            }
        }
    }
}

fn find_conn(conns: &mut Slab<Conn>, id: crate::ConnId) -> Option<&mut Conn> {
    conns.get_mut(id.index as usize).filter(|conn| conn.id == id)
}

fn find_link(links: &mut Slab<Link>, id: crate::LinkId) -> Option<&mut Link> {
    links.get_mut(id.index as usize).filter(|link| link.id == id)
}

fn check(identity: &Identity) -> Result<(), IpcError> {
    let Limits { max_message_bytes, max_fds, max_connections, max_inflight_per_conn } = identity.limits;
    let limit = |name, value, ok, allowed| if ok { Ok(()) } else { Err(IpcError::Limit { name, value, allowed }) };
    let bytes = Limits::MIN_MESSAGE_BYTES..=Limits::MAX_MESSAGE_BYTES;
    limit("max_message_bytes", max_message_bytes, bytes.contains(&max_message_bytes), "1024 to 131072")?;
    limit("max_fds", u32::from(max_fds), max_fds <= Limits::MAX_FDS, "0 to 64")?;
    limit("max_connections", max_connections, (max_connections as usize) < source::MAX_INDEX / 2, "fewer than 2^27")?;
    limit("max_inflight_per_conn", max_inflight_per_conn, max_inflight_per_conn > 0, "1 or more")?;
    let len_bytes = identity.name.len();
    if len_bytes == 0 || len_bytes > MAX_NAME_BYTES as usize {
        return Err(IpcError::Name { len_bytes, max_bytes: MAX_NAME_BYTES });
    }
    Ok(())
}
