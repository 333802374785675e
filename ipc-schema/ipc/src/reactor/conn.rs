//! Accepted connections: handshake, calls in, replies and events out.
//!
//! Whatever is wrong with a peer ends here, in [`Reactor::end_conn`]: it is told why where that is possible, logged once, closed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::source::{MAX_INDEX, Source};
use super::timers::Due;
use super::{ACCEPTS_PER_TURN, MESSAGES_PER_TURN, Reactor, Shared, find_conn};
use crate::codec::{BodyRef, Frame, FrameBody, Header, decode};
use uhmm_kernel_hook::error::chain;
use uhmm_kernel_hook::process::PeerCred;

use crate::handshake::{judge, judge_door, judge_process};
use crate::identity::Limits;
use crate::ids::{CallId, ConnId, TimerId};
use crate::message::{Call, ErrorCode, Event, Hello, Interface, Reply, Role, TraceId, WireError};
use crate::transport::{Channel, Received, Sent};
use crate::wake::{Peer, Wake};

/// Time for the hello.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Pause after accepting failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections beyond `max_connections`: services with a key, operators, and those whose hello is still to come.
const SPARE_CONNECTIONS: usize = 64;
/// Of these, for operators: however many clients there are, somebody can look what is going on.
const OPERATORS_MAX: usize = 16;
/// Peers that are refused cost one line of the log in this time, however many there are.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(1);
/// Unanswered calls beyond the limit, for the acknowledgements that a well-behaved caller sends outside its window.
const SPARE_CALLS: usize = 64;

/// One accepted connection.
pub(super) struct Conn {
    pub(super) id: ConnId,
    pub(super) in_ready: bool,
    /// The kernel said that no more will come; matters only while we do not read.
    pub(super) peer_closed: bool,
    channel: Channel,
    state: State,
    unanswered: HashMap<u64, TraceId>,
    /// Not read because too many calls are unanswered.
    stalled: bool,
    /// Its process is dead: it ends when everything was read that was sent before.
    last_words: bool,
    /// It came through a socket for services.
    services_only: bool,
}

enum State {
    AwaitHello { timer: TimerId },
    Open { name: String, incarnation: u32, minor: u16, role: Role },
}

/// Log lines about peers that were refused.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    last: Option<Instant>,
    untold: u64,
}

impl Complaints {
    /// How many were not told since the last one, if one may be told now.
    fn another(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < COMPLAINT_PAUSE) {
            self.untold += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// Why a connection ends.
enum End {
    /// The peer went, or does not read: nothing can be said to it.
    Gone(String),
    /// The peer broke the protocol; it is told.
    Violation { call_id: u64, text: String },
    /// The handshake was refused; it is told.
    Refused(WireError),
}

impl Conn {
    fn send(&mut self, shared: &mut Shared, call_id: u64, trace: TraceId, body: BodyRef<'_>) -> Result<(), SendError> {
        let minor = match self.state {
            State::Open { minor, .. } => minor,
            State::AwaitHello { .. } => 0,
        };
        let header = Header { call_id, trace, minor, incarnation: shared.identity.incarnation, deadline_ms: 0 };
        let (bytes, fds) = shared
            .encoder
            .encode(header, body, self.channel.max_message_bytes, self.channel.max_fds)
            .map_err(|error| SendError::Encode(error.text()))?;
        match self.channel.send(&shared.registry, bytes, fds) {
            Sent::Taken => Ok(()),
            Sent::Gone(why) => Err(SendError::Gone(why)),
        }
    }
}

enum SendError {
    /// Our message is impossible; the connection is fine.
    Encode(String),
    Gone(String),
}

impl Reactor {
    /// Answers a call that an accepted connection made. False if the connection is gone or has no such unanswered call; the
    /// answer is dropped then. An answer that is too large for the peer becomes a Protocol error.
    pub fn reply(&mut self, conn: ConnId, call: CallId, result: Result<Reply, WireError>) -> bool {
        let Some(entry) = find_conn(&mut self.conns, conn) else { return false };
        let Some(trace) = entry.unanswered.remove(&call.0) else { return false };
        let body = match &result {
            Ok(reply) => BodyRef::Reply(reply),
            Err(error) => BodyRef::Error(error),
        };
        let sent = match entry.send(&mut self.shared, call.0, trace, body) {
            Err(SendError::Encode(text)) => {
                tracing::error!(%conn, %call, text, "An answer could not be sent");
                let error = WireError::new(ErrorCode::Protocol, text);
                entry.send(&mut self.shared, call.0, trace, BodyRef::Error(&error))
            }
            sent => sent,
        };
        if std::mem::take(&mut entry.stalled) {
            self.mark_ready(Source::Conn(conn), false);
        }
        self.after_send(conn, sent)
    }

    /// Sends an event to an accepted connection. False if the connection is gone (or the event cannot be sent): it is dropped.
    pub fn event(&mut self, conn: ConnId, event: Event, trace: TraceId) -> bool {
        let Some(entry) = find_conn(&mut self.conns, conn) else { return false };
        if matches!(entry.state, State::AwaitHello { .. }) {
            return false;
        }
        let sent = entry.send(&mut self.shared, 0, trace, BodyRef::Event(&event));
        self.after_send(conn, sent)
    }

    /// Closes an accepted connection; no [`Wake::Closed`] follows. What the kernel has taken still reaches the peer.
    pub fn close(&mut self, conn: ConnId) {
        if find_conn(&mut self.conns, conn).is_some() {
            self.remove_conn(conn);
        }
    }

    /// Ends a connection whose process is dead when all that it had sent was taken; [`Wake::Closed`] follows the last of it. Whoever shares the
    /// dead process's descriptors keeps the connection open, so its end may not come by itself.
    pub fn close_after_last_words(&mut self, conn: ConnId) {
        if let Some(entry) = find_conn(&mut self.conns, conn) {
            entry.last_words = true;
            self.mark_ready(Source::Conn(conn), false);
        }
    }

    fn after_send(&mut self, conn: ConnId, sent: Result<(), SendError>) -> bool {
        match sent {
            Ok(()) => true,
            Err(SendError::Gone(why)) => {
                self.end_conn(conn, End::Gone(why));
                false
            }
            Err(SendError::Encode(text)) => {
                tracing::error!(%conn, text, "A message could not be sent");
                false
            }
        }
    }

    pub(super) fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = self.listeners.get_mut(index) else { return };
            match listener.socket.accept() {
                Ok(Some(socket)) => {
                    let services_only = listener.services_only;
                    self.admit(socket, services_only);
                }
                Ok(None) => {
                    listener.in_ready = false;
                    return;
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "A connection could not be accepted; trying again shortly");
                    self.shared.timers.add_after(ACCEPT_PAUSE, Due::Accept(index));
                    return;
                }
            }
        }
        self.shared.ready.push_back(Source::Listener(index));
    }

    fn admit(&mut self, socket: uhmm_kernel_hook::SeqPacket, services_only: bool) {
        let most = self.shared.identity.limits.max_connections as usize + SPARE_CONNECTIONS;
        if self.conns.len() >= most.min(MAX_INDEX) && !self.forget_silent() {
            if let Some(untold) = self.complaints.another(Instant::now()) {
                tracing::warn!(connections = self.conns.len(), untold, "A connection was closed: there are too many");
            }
            return;
        }
        let generation = self.shared.generation();
        let entry = self.conns.vacant_entry();
        let id = ConnId { index: entry.key() as u32, generation };
        // A hello is small and carries no descriptors; the negotiated limits apply after it.
        let channel = match Channel::new(
            socket,
            &self.shared.registry,
            Source::Conn(id).token(),
            Limits::MIN_MESSAGE_BYTES as usize,
            0,
        ) {
            Ok(channel) => channel,
            Err(error) => {
                tracing::warn!(%error, "A connection could not be watched and was closed");
                return;
            }
        };
        let timer = self.shared.timers.add_after(GREETING_LIMIT, Due::Greeting(id));
        entry.insert(Conn {
            id,
            in_ready: false,
            peer_closed: false,
            channel,
            state: State::AwaitHello { timer },
            unanswered: HashMap::new(),
            stalled: false,
            last_words: false,
            services_only,
        });
    }

    /// The place of whoever says nothing for longest goes to a newcomer. False if all have said who they are.
    fn forget_silent(&mut self) -> bool {
        let silent = self.conns.iter().filter(|(_, conn)| matches!(conn.state, State::AwaitHello { .. }));
        let Some(oldest) = silent.map(|(_, conn)| conn.id).min_by_key(|id| id.generation) else { return false };
        let text = "Too many connections have not said who they are".to_owned();
        self.end_conn(oldest, End::Refused(WireError::new(ErrorCode::Busy, text)));
        true
    }

    pub(super) fn greeting_late(&mut self, conn: ConnId) {
        self.end_conn(conn, End::Violation { call_id: 0, text: "No hello came in time".to_owned() });
    }

    pub(super) fn flush_conn(&mut self, conn: ConnId) {
        let Some(entry) = find_conn(&mut self.conns, conn) else { return };
        if let Sent::Gone(why) = entry.channel.flush(&self.shared.registry) {
            self.end_conn(conn, End::Gone(why));
        }
    }

    /// Takes messages from a connection that has some; one turn's worth.
    pub(super) fn read_conn(&mut self, id: ConnId) {
        let most = self.shared.identity.limits.max_inflight_per_conn as usize + SPARE_CALLS;
        for _ in 0..MESSAGES_PER_TURN {
            let Some(conn) = find_conn(&mut self.conns, id) else { return };
            conn.in_ready = false;
            if conn.unanswered.len() >= most {
                conn.stalled = true;
                if conn.peer_closed {
                    self.end_conn(id, End::Gone("the peer closed the connection".to_owned()));
                }
                return;
            }
            let last_words = conn.last_words;
            let end = match conn.channel.receive(&mut self.shared.inbox) {
                Received::Nothing if last_words => Some(End::Gone("its process has ended".to_owned())),
                Received::Nothing => return,
                Received::Closed(why) => Some(End::Gone(why)),
                Received::Bad(why) => Some(End::Violation { call_id: 0, text: why.text() }),
                Received::Message => {
                    let fds = self.shared.inbox.take_fds();
                    match decode(self.shared.inbox.bytes(), fds) {
                        Ok(frame) => self.conn_frame(id, frame).err(),
                        Err(rejected) => Some(End::Violation { call_id: rejected.call_id, text: rejected.why.text() }),
                    }
                }
            };
            if let Some(end) = end {
                self.end_conn(id, end);
                return;
            }
        }
        self.mark_ready(Source::Conn(id), false);
    }

    fn conn_frame(&mut self, id: ConnId, frame: Frame) -> Result<(), End> {
        let Some(conn) = find_conn(&mut self.conns, id) else { return Ok(()) };
        let Frame { header, body } = frame;
        match (&conn.state, body) {
            (State::AwaitHello { .. }, FrameBody::Hello(hello)) => self.greet(id, hello),
            (State::Open { incarnation, minor, .. }, FrameBody::Call(body)) => {
                if header.incarnation != *incarnation || header.minor != *minor {
                    return Err(violation(&header, "The version or incarnation differs from the handshake's"));
                }
                if !served(self.shared.identity.interface, &body) {
                    return Err(violation(&header, "The call belongs to another interface"));
                }
                if header.call_id == 0 || conn.unanswered.insert(header.call_id, header.trace).is_some() {
                    return Err(violation(&header, "The call's id is zero or in use"));
                }
                let limit = Duration::from_millis(u64::from(header.deadline_ms));
                let deadline = if header.deadline_ms == 0 { None } else { Instant::now().checked_add(limit) };
                let call = CallId(header.call_id);
                self.shared.wakes.push(Wake::Call { conn: id, call, trace: header.trace, deadline, body });
                Ok(())
            }
            (State::AwaitHello { .. }, body) => {
                Err(violation(&header, &format!("The first message must be a hello, not a {}", body.kind())))
            }
            (State::Open { .. }, body) => {
                Err(violation(&header, &format!("A caller sends calls only, not a {}", body.kind())))
            }
        }
    }

    fn greet(&mut self, id: ConnId, hello: Hello) -> Result<(), End> {
        let welcome = judge(&self.shared.identity, &self.shared.keys, &hello).map_err(End::Refused)?;
        let services_only = find_conn(&mut self.conns, id).is_some_and(|conn| conn.services_only);
        judge_door(&hello, services_only).map_err(End::Refused)?;
        let max_clients = self.shared.identity.limits.max_connections as usize;
        let (count, max, whose) = match hello.role {
            Role::Client => (self.client_count, max_clients, "clients"),
            Role::Operator => (self.operator_count, OPERATORS_MAX, "operators"),
            _ => (0, 1, ""),
        };
        if count >= max {
            let name = &self.shared.identity.name;
            let text = format!(
                "{count} {whose} are connected to {name}, which is its limit: try again when one has ended (clients: as many as \
                 quota.max_spaces in the manifest says, 256 at least)"
            );
            return Err(End::Refused(WireError::new(ErrorCode::Busy, text)));
        }
        let Some(conn) = find_conn(&mut self.conns, id) else { return Ok(()) };
        let cred = conn.channel.peer().map_err(End::Gone)?;
        let process = conn.channel.peer_process();
        judge_process(&hello.name, hello.role, process.as_ref().err()).map_err(End::Refused)?;
        if let State::AwaitHello { timer } = conn.state {
            self.shared.timers.cancel(timer);
        }
        let (name, incarnation) = (hello.name.clone(), hello.incarnation);
        conn.state = State::Open { name, incarnation, minor: welcome.minor, role: hello.role };
        self.client_count += usize::from(hello.role == Role::Client);
        self.operator_count += usize::from(hello.role == Role::Operator);
        conn.channel.max_message_bytes = welcome.max_message_bytes as usize;
        conn.channel.max_fds = usize::from(welcome.max_fds);
        let PeerCred { pid, uid, gid } = cred;
        let process = process.ok();
        let peer = Peer { name: hello.name, role: hello.role, incarnation, pid, uid, gid, process };
        self.shared.wakes.push(Wake::Connected { conn: id, peer });
        match conn.send(&mut self.shared, 0, TraceId::default(), BodyRef::Welcome(&welcome)) {
            Ok(()) => Ok(()),
            Err(SendError::Gone(why) | SendError::Encode(why)) => Err(End::Gone(why)),
        }
    }

    fn end_conn(&mut self, id: ConnId, end: End) {
        let Some(conn) = find_conn(&mut self.conns, id) else { return };
        let name = match &conn.state {
            State::AwaitHello { .. } => None,
            State::Open { name, .. } => Some(name.clone()),
        };
        let peer = name.as_deref().unwrap_or("a peer without hello").to_owned();
        let why = match end {
            End::Gone(why) => {
                tracing::debug!(conn = %id, peer, why, "Connection ended");
                why
            }
            End::Violation { call_id, text } => {
                if let Some(untold) = self.complaints.another(Instant::now()) {
                    tracing::warn!(conn = %id, peer, text, untold, "Connection closed: the peer broke the protocol");
                }
                let error = WireError::new(ErrorCode::Protocol, text);
                // If even this does not get out, the peer learns it from the closed connection.
                let _ = conn.send(&mut self.shared, call_id, TraceId::default(), BodyRef::Error(&error));
                error.text
            }
            End::Refused(error) => {
                if let Some(untold) = self.complaints.another(Instant::now()) {
                    tracing::warn!(conn = %id, error = error.text, untold, "Connection refused");
                }
                let _ = conn.send(&mut self.shared, 0, TraceId::default(), BodyRef::Error(&error));
                error.text
            }
        };
        self.remove_conn(id);
        if name.is_some() {
            self.shared.wakes.push(Wake::Closed { conn: id, why });
        }
    }

    fn remove_conn(&mut self, id: ConnId) {
        let conn = self.conns.remove(id.index as usize);
        match conn.state {
            State::AwaitHello { timer } => {
                self.shared.timers.cancel(timer);
            }
            State::Open { role, .. } => {
                self.client_count -= usize::from(role == Role::Client);
                self.operator_count -= usize::from(role == Role::Operator);
            }
        }
        conn.channel.close(&self.shared.registry);
    }
}

fn violation(header: &Header, text: &str) -> End {
    End::Violation { call_id: header.call_id, text: text.to_owned() }
}

fn served(interface: Option<Interface>, call: &Call) -> bool {
    let wanted = match call {
        Call::Common(_) => return true,
        Call::Supervisor(_) => Interface::Supervisor,
        Call::Pager(_) => Interface::Pager,
        Call::Mirror(_) => Interface::Mirror,
        Call::Driver(_) => Interface::Driver,
    };
    interface == Some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_refusals_in_a_second_are_two_lines_and_none_is_forgotten() {
        let mut complaints = Complaints::default();
        let begun = Instant::now();
        let at = |tenths: u64| begun + Duration::from_millis(tenths * 100);
        assert_eq!(complaints.another(at(0)), Some(0));
        assert!((0..1000).all(|_| complaints.another(at(5)).is_none()));
        assert_eq!(complaints.another(at(10)), Some(1000));
        assert_eq!(complaints.another(at(30)), Some(0));
    }
}
