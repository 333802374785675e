//! Outgoing links: connect, shake hands, keep alive across the callee's restarts.
//!
//! ```text
//!   Down --connect, hello--> Greeting --welcome--> Preamble(0) -> Preamble(1) ... -> Up
//!    ^                          |                       |                             |
//!    |                          | error: refused        | error: Blocked              |
//!    +- 0, 5, 10 .. 200 ms <----+----------- connection lost -------------------------+
//! ```
//! When a callee dies whose socket is kept for the next one, the first attempt comes at once and waits there: it is the first thing that the
//! next one finds. One a callee, so that one that hangs up on everybody is not asked without end.
//! On loss a sent call goes back into the queue if it is idempotent and ends with Stale if not: it may or may not have happened.
//! A refusal is an answer too (version, interface, key; or the kernel or a filter forbids this process to connect, which waiting does
//! not change): after [`REFUSALS`] in a row the queued calls end with it, while the link goes on trying.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;

use uhmm_kernel_hook::SeqPacket;
use uhmm_kernel_hook::error::chain;

use super::link_calls::Pending;
use super::source::Source;
use super::timers::Due;
use super::{MESSAGES_PER_TURN, Reactor, Shared, find_link};
use crate::codec::{BodyRef, Frame, FrameBody, Header, decode};
use crate::handshake::{check_welcome, hello};
use crate::identity::Endpoint;
use crate::ids::{LinkId, TimerId};
use crate::message::{Call, ErrorCode, TraceId, Welcome, WireError};
use crate::transport::{Channel, Received, Sent};
use crate::wake::Wake;

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// Refusals in a row before queued calls learn of them: a restarting system may know the new keys a moment later.
const REFUSALS: u32 = 3;

/// Connecting is forbidden: another user, a filter, an address family that is not allowed.
const FORBIDDEN: [i32; 4] = [EPERM, EACCES, ENOSYS, EAFNOSUPPORT];
const EPERM: i32 = 1;
const EACCES: i32 = 13;
const ENOSYS: i32 = 38;
const EAFNOSUPPORT: i32 = 97;

/// Where a link stands.
pub(super) enum Phase {
    Down,
    Greeting,
    /// A preamble call is on its way; [`Pending::preamble`] says which.
    Preamble,
    Up,
    /// A preamble call failed: every call ends with its error.
    Blocked(WireError),
}

/// One outgoing link.
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) in_ready: bool,
    pub(super) endpoint: Endpoint,
    pub(super) phase: Phase,
    pub(super) channel: Option<Channel>,
    pub(super) preamble: Vec<Call>,
    /// The preamble of the present connection, as it was at its handshake: a list that changes while its calls are made one after the other
    /// would lose some of them.
    pub(super) running: Vec<Call>,
    /// Every call that has not ended, oldest first.
    pub(super) calls: BTreeMap<u64, Pending>,
    /// Those of them that are not sent, in sending order. May name calls that ended meanwhile.
    pub(super) unsent: VecDeque<u64>,
    /// Sent calls whose deadline passed: their late answers are expected and dropped.
    pub(super) abandoned: HashSet<u64>,
    /// Sent and unanswered, `abandoned` included.
    pub(super) in_flight: usize,
    /// The callee's, from its welcome.
    pub(super) minor: u16,
    incarnation: u32,
    /// The incarnation (plus one) whose loss was followed by an attempt at once.
    hurried: u64,
    pub(super) ever_up: bool,
    pause: Duration,
    retry: Option<TimerId>,
    refusals: u32,
    /// What was last logged about a failed attempt, so that it is logged once.
    complaint: String,
}

impl Link {
    pub(super) fn send(&mut self, shared: &mut Shared, header: Header, body: BodyRef<'_>) -> Result<(), LinkSendError> {
        let Some(channel) = &mut self.channel else {
            return Err(LinkSendError::Lost("the link is down".to_owned()));
        };
        let (bytes, fds) = shared
            .encoder
            .encode(header, body, channel.max_message_bytes, channel.max_fds)
            .map_err(|error| LinkSendError::Encode(error.text()))?;
        match channel.send(&shared.registry, bytes, fds) {
            Sent::Taken => Ok(()),
            Sent::Gone(why) => Err(LinkSendError::Lost(why)),
        }
    }

    fn complain(&mut self, why: &str) {
        if self.complaint != why {
            tracing::warn!(link = %self.id, endpoint = ?self.endpoint, why, "Link is down; trying again");
            self.complaint = why.to_owned();
        }
    }
}

pub(super) enum LinkSendError {
    /// The message itself is impossible.
    Encode(String),
    Lost(String),
}

impl Reactor {
    /// Opens a link. It connects now or as soon as the callee listens, and again whenever the connection is lost, for ever.
    pub fn link(&mut self, endpoint: Endpoint) -> LinkId {
        let generation = self.shared.generation();
        let entry = self.links.vacant_entry();
        let id = LinkId { index: entry.key() as u32, generation };
        entry.insert(Link {
            id,
            in_ready: false,
            endpoint,
            phase: Phase::Down,
            channel: None,
            preamble: Vec::new(),
            running: Vec::new(),
            calls: BTreeMap::new(),
            unsent: VecDeque::new(),
            abandoned: HashSet::new(),
            in_flight: 0,
            minor: 0,
            incarnation: 0,
            hurried: 0,
            ever_up: false,
            pause: FIRST_PAUSE,
            retry: None,
            refusals: 0,
            complaint: String::new(),
        });
        self.reconnect(id);
        id
    }

    /// Calls to be made first on every new connection of the link, one after the other, each awaited: login, attach. Takes
    /// effect with the next handshake, whatever the present connection is doing; set it right after [`link`](Self::link). Results come as [`Wake::Preamble`].
    pub fn set_preamble(&mut self, link: LinkId, calls: Vec<Call>) {
        if let Some(link) = find_link(&mut self.links, link) {
            link.preamble = calls;
        }
    }

    /// Gives the present connection up and makes a new one, with a new handshake and preamble. For an owner whose preamble
    /// failed or changed.
    pub fn reset_link(&mut self, link: LinkId) {
        self.lose_link(link, "its owner reset it");
    }

    /// Closes a link for good. Its unfinished calls end without [`Wake::Done`].
    pub fn drop_link(&mut self, link: LinkId) {
        if find_link(&mut self.links, link).is_none() {
            return;
        }
        let link = self.links.remove(link.index as usize);
        for timer in link.calls.values().filter_map(|call| call.timer).chain(link.retry) {
            self.shared.timers.cancel(timer);
        }
        if let Some(channel) = link.channel {
            channel.close(&self.shared.registry);
        }
    }

    /// One attempt; the handshake goes on when the callee answers.
    pub(super) fn reconnect(&mut self, id: LinkId) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        link.retry = None;
        if link.channel.is_some() {
            return;
        }
        let limits = self.shared.identity.limits;
        let mut forbidden = None;
        let connected = SeqPacket::connect(&link.endpoint.path).map_err(|error| {
            let why = chain(&error);
            forbidden = error.errno().filter(|errno| FORBIDDEN.contains(errno)).map(|_| why.clone());
            why
        });
        let connected = connected.and_then(|socket| {
            let token = Source::Link(id).token();
            let (bytes, fds) = (limits.max_message_bytes as usize, usize::from(limits.max_fds));
            Channel::new(socket, &self.shared.registry, token, bytes, fds).map_err(|error| error.to_string())
        });
        match connected {
            Ok(channel) => link.channel = Some(channel),
            Err(why) => {
                self.lose_link(id, &why);
                if let Some(why) = forbidden {
                    self.refused(
                        id,
                        WireError::new(ErrorCode::Permission, format!("This process may not connect any more: {why}")),
                    );
                }
                return;
            }
        }
        link.phase = Phase::Greeting;
        let hello = hello(&self.shared.identity, &link.endpoint);
        let header = Header { minor: hello.minor, incarnation: hello.incarnation, ..Header::default() };
        if let Err(LinkSendError::Encode(why) | LinkSendError::Lost(why)) =
            link.send(&mut self.shared, header, BodyRef::Hello(&hello))
        {
            self.lose_link(id, &why);
        }
    }

    /// The connection is of no use any more (or was not made): decide about every call, plan the next attempt.
    pub(super) fn lose_link(&mut self, id: LinkId, why: &str) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        link.complain(why);
        if let Some(channel) = link.channel.take() {
            channel.close(&self.shared.registry);
        }
        let was_up = !matches!(link.phase, Phase::Down | Phase::Greeting);
        link.phase = Phase::Down;
        link.abandoned.clear();
        link.in_flight = 0;
        let stale: Vec<u64> = link.calls.iter().filter(|(_, call)| call.sent_once_only()).map(|(id, _)| *id).collect();
        link.calls.retain(|_, call| call.preamble.is_none());
        if was_up {
            self.shared.wakes.push(Wake::LinkDown { link: id });
        }
        for call in stale {
            let text = format!("The connection was lost while the call ran ({why}): it may or may not have happened");
            self.finish(id, call, Err(WireError::new(ErrorCode::Stale, text)));
        }
        let Some(link) = find_link(&mut self.links, id) else { return };
        for call in link.calls.values_mut() {
            call.sent = false;
        }
        let (first, rest): (Vec<u64>, Vec<u64>) =
            link.calls.keys().partition(|id| link.calls.get(id).is_some_and(|call| call.is_acknowledgement()));
        link.unsent = first.into_iter().chain(rest).collect();
        if link.retry.is_none() {
            let lost = u64::from(link.incarnation) + 1;
            let at_once = was_up && std::mem::replace(&mut link.hurried, lost) != lost;
            let pause = if at_once { Duration::ZERO } else { link.pause };
            link.retry = Some(self.shared.timers.add_after(pause, Due::Reconnect(id)));
            if !at_once {
                link.pause = (link.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    pub(super) fn flush_link(&mut self, id: LinkId) {
        let Some(channel) = find_link(&mut self.links, id).and_then(|link| link.channel.as_mut()) else { return };
        if let Sent::Gone(why) = channel.flush(&self.shared.registry) {
            self.lose_link(id, &why);
        }
    }

    /// Takes messages from a link that has some; one turn's worth.
    pub(super) fn read_link(&mut self, id: LinkId) {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(link) = find_link(&mut self.links, id) else { return };
            link.in_ready = false;
            let Some(channel) = &mut link.channel else { return };
            let lost = match channel.receive(&mut self.shared.inbox) {
                Received::Nothing => return,
                Received::Closed(why) => Some(why),
                Received::Bad(why) => Some(why.text()),
                Received::Message => {
                    let fds = self.shared.inbox.take_fds();
                    match decode(self.shared.inbox.bytes(), fds) {
                        Ok(frame) => self.link_frame(id, frame).err(),
                        Err(rejected) => Some(rejected.why.text()),
                    }
                }
            };
            if let Some(why) = lost {
                self.lose_link(id, &why);
                return;
            }
        }
        self.mark_ready(Source::Link(id), false);
    }

    fn link_frame(&mut self, id: LinkId, frame: Frame) -> Result<(), String> {
        let Some(link) = find_link(&mut self.links, id) else { return Ok(()) };
        let Frame { header, body } = frame;
        let greeting = matches!(link.phase, Phase::Greeting);
        if !greeting && (header.incarnation != link.incarnation || header.minor != link.minor) {
            return Err("The callee's version or incarnation differs from the handshake's".to_owned());
        }
        match body {
            FrameBody::Welcome(welcome) if greeting => {
                link.incarnation = header.incarnation;
                self.welcomed(id, welcome)
            }
            FrameBody::Error(error) if greeting => {
                self.refused(id, error.clone());
                Err(format!("The callee refused: {error}"))
            }
            FrameBody::Error(error) if header.call_id == 0 => Err(format!("The callee complained: {error}")),
            FrameBody::Reply(reply) if !greeting => self.answered(id, header.call_id, Ok(reply)),
            FrameBody::Error(error) => self.answered(id, header.call_id, Err(error)),
            FrameBody::Event(body) if !greeting => {
                self.shared.wakes.push(Wake::Event { link: id, trace: header.trace, body });
                Ok(())
            }
            body => Err(format!("The callee sent a {} out of turn", body.kind())),
        }
    }

    fn welcomed(&mut self, id: LinkId, welcome: Welcome) -> Result<(), String> {
        if let Err(error) = check_welcome(&self.shared.identity, &welcome) {
            self.refused(id, error.clone());
            return Err(error.text);
        }
        let Some(link) = find_link(&mut self.links, id) else { return Ok(()) };
        if let Some(channel) = &mut link.channel {
            channel.max_message_bytes = welcome.max_message_bytes as usize;
            channel.max_fds = usize::from(welcome.max_fds);
        }
        if welcome.incarnation != link.incarnation {
            return Err("The callee's welcome names another incarnation than its envelope".to_owned());
        }
        link.minor = welcome.minor;
        link.pause = FIRST_PAUSE;
        link.refusals = 0;
        link.complaint.clear();
        let reconnected = std::mem::replace(&mut link.ever_up, true);
        self.shared.wakes.push(Wake::LinkUp { link: id, welcome, reconnected });
        if let Some(link) = find_link(&mut self.links, id) {
            link.running.clone_from(&link.preamble);
        }
        self.run_preamble(id, 0);
        Ok(())
    }

    fn refused(&mut self, id: LinkId, error: WireError) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        link.refusals += 1;
        if link.refusals < REFUSALS {
            return;
        }
        let calls: Vec<u64> = link.calls.keys().copied().collect();
        for call in calls {
            self.finish(id, call, Err(error.clone()));
        }
        self.shared.wakes.push(Wake::Refused { link: id, error });
    }

    /// Sends the preamble call `index`, or lets the queue go when there are no more.
    pub(super) fn run_preamble(&mut self, id: LinkId, index: usize) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        let Some(body) = link.running.get(index).cloned() else {
            link.phase = Phase::Up;
            return self.pump(id);
        };
        link.phase = Phase::Preamble;
        self.shared.last_call += 1;
        let call = self.shared.last_call;
        link.calls.insert(call, Pending::preamble(body, TraceId::fresh(), index));
        self.send_call(id, call);
    }
}
