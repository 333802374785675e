//! Calls on a link: window, deadlines, completion.
//!
//! ```text
//!   call --> queued --(Up, window open)--> sent --answer--> Done
//!               |  ^                        |  +--deadline--> Done(TimedOut), its late answer is dropped
//!               |  +------lost, idempotent--+--lost, other--> Done(Stale)
//!               +--deadline--> Done(TimedOut)   +--Blocked, refused--> Done(that error)
//! ```

use std::time::{Duration, Instant};

use super::link::{Link, LinkSendError, Phase};
use super::timers::Due;
use super::{Reactor, find_link};
use crate::codec::{BodyRef, Header};
use crate::ids::{CallId, LinkId, TimerId};
use crate::message::{Call, ErrorCode, Reply, TraceId, WireError, mirror, pager, supervisor};
use crate::wake::Wake;

/// A call that has not ended.
pub(super) struct Pending {
    body: Call,
    trace: TraceId,
    deadline: Option<Instant>,
    pub(super) timer: Option<TimerId>,
    pub(super) sent: bool,
    /// Index in the preamble; such a call belongs to one connection only.
    pub(super) preamble: Option<usize>,
}

impl Pending {
    pub(super) fn preamble(body: Call, trace: TraceId, index: usize) -> Self {
        Self { body, trace, deadline: None, timer: None, sent: false, preamble: Some(index) }
    }

    /// Must not wait behind other calls.
    pub(super) fn is_acknowledgement(&self) -> bool {
        is_acknowledgement(&self.body)
    }

    /// Cannot be repeated on another connection.
    pub(super) fn sent_once_only(&self) -> bool {
        self.sent && self.preamble.is_none() && !self.body.idempotent()
    }
}

/// Answers to events. They are sent outside the window: what fills the window may wait for just these.
fn is_acknowledgement(call: &Call) -> bool {
    matches!(
        call,
        Call::Pager(pager::Call::InvalidateDone { .. } | pager::Call::FramesDone { .. })
            | Call::Mirror(mirror::Call::Ack { .. })
            | Call::Supervisor(supervisor::Call::Pong { .. })
    )
}

/// A reply of the call's interface. Which reply of that interface it is, is the owner's to check.
fn fits(call: &Call, reply: &Reply) -> bool {
    matches!(
        (call, reply),
        (Call::Common(_), Reply::Common(_))
            | (Call::Supervisor(_), Reply::Supervisor(_))
            | (Call::Pager(_), Reply::Pager(_))
            | (Call::Mirror(_), Reply::Mirror(_))
            | (Call::Driver(_), Reply::Driver(_))
    )
}

impl Reactor {
    /// Makes a call. It ends with exactly one [`Wake::Done`]: an answer, TimedOut, Stale (the connection was lost and the call
    /// is not idempotent), or Protocol (it cannot be sent to this peer). While the link is down an idempotent call waits; another
    /// one ends with Stale, unless the link was never up.
    pub fn call(&mut self, link: LinkId, body: Call, trace: TraceId, deadline: Option<Duration>) -> CallId {
        self.shared.last_call += 1;
        let call = self.shared.last_call;
        let id = CallId(call);
        let Some(entry) = find_link(&mut self.links, link) else {
            let error = WireError::new(ErrorCode::Stale, "The link was dropped: open a new one");
            self.shared.wakes.push(Wake::Done { link, call: id, result: Err(error) });
            return id;
        };
        let down = matches!(entry.phase, Phase::Down | Phase::Greeting);
        let lost = down && entry.ever_up && !body.idempotent();
        let acknowledgement = is_acknowledgement(&body);
        let timer = deadline.map(|after| self.shared.timers.add_after(after, Due::Deadline(link, call)));
        let deadline = timer.map(|timer| timer.at);
        entry.calls.insert(call, Pending { body, trace, deadline, timer, sent: false, preamble: None });
        if lost {
            let text = "The service is being restarted, and the call may not be repeated: make it again later";
            self.finish(link, call, Err(WireError::new(ErrorCode::Stale, text)));
        } else if acknowledgement && matches!(entry.phase, Phase::Up) {
            self.send_call(link, call);
        } else if acknowledgement {
            entry.unsent.push_front(call);
            self.pump(link);
        } else {
            entry.unsent.push_back(call);
            self.pump(link);
        }
        id
    }

    /// Sends what may be sent.
    pub(super) fn pump(&mut self, id: LinkId) {
        let window = self.shared.identity.limits.max_inflight_per_conn as usize;
        loop {
            let Some(link) = find_link(&mut self.links, id) else { return };
            match &link.phase {
                Phase::Down | Phase::Greeting | Phase::Preamble => return,
                Phase::Up if link.in_flight >= window => return,
                Phase::Up => match link.unsent.pop_front() {
                    Some(call) => self.send_call(id, call),
                    None => return,
                },
                Phase::Blocked(error) => {
                    let error = error.clone();
                    match link.unsent.pop_front() {
                        Some(call) => self.finish(id, call, Err(error)),
                        None => return,
                    }
                }
            }
        }
    }

    /// Sends one call now. A call that ended meanwhile is skipped.
    pub(super) fn send_call(&mut self, id: LinkId, call: u64) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        // Out of the map while it is encoded: the link lends its channel to the same call.
        let Some(mut pending) = link.calls.remove(&call) else { return };
        let now = Instant::now();
        let deadline_ms = pending
            .deadline
            .map_or(0, |at| u32::try_from(at.saturating_duration_since(now).as_millis()).unwrap_or(u32::MAX).max(1));
        let header = Header {
            call_id: call,
            trace: pending.trace,
            minor: link.minor,
            incarnation: self.shared.identity.incarnation,
            deadline_ms,
        };
        let sent = link.send(&mut self.shared, header, BodyRef::Call(&pending.body));
        pending.sent = true;
        link.calls.insert(call, pending);
        link.in_flight += 1;
        match sent {
            Ok(()) => {}
            Err(LinkSendError::Lost(why)) => self.lose_link(id, &why),
            Err(LinkSendError::Encode(text)) => {
                link.in_flight -= 1;
                self.finish(id, call, Err(WireError::new(ErrorCode::Protocol, text)));
            }
        }
    }

    /// An answer came.
    pub(super) fn answered(&mut self, id: LinkId, call: u64, result: Result<Reply, WireError>) -> Result<(), String> {
        let Some(link) = find_link(&mut self.links, id) else { return Ok(()) };
        match link.calls.get(&call).filter(|pending| pending.sent) {
            Some(pending) => {
                if result.as_ref().is_ok_and(|reply| !fits(&pending.body, reply)) {
                    return Err("The callee answered with a reply of another interface".to_owned());
                }
                link.in_flight -= 1;
                self.finish(id, call, result);
            }
            None if link.abandoned.remove(&call) => link.in_flight -= 1,
            None => return Err(format!("The callee answered call {call}, which was not made")),
        }
        self.pump(id);
        Ok(())
    }

    pub(super) fn deadline_passed(&mut self, id: LinkId, call: u64) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        if link.calls.get(&call).is_some_and(|pending| pending.sent) {
            link.abandoned.insert(call);
        }
        let text = format!("{} did not answer in time", link.endpoint.path.display());
        self.finish(id, call, Err(WireError::new(ErrorCode::TimedOut, text)));
    }

    /// Ends a call and tells the owner.
    pub(super) fn finish(&mut self, id: LinkId, call: u64, result: Result<Reply, WireError>) {
        let Some(link) = find_link(&mut self.links, id) else { return };
        let Some(pending) = link.calls.remove(&call) else { return };
        if let Some(timer) = pending.timer {
            self.shared.timers.cancel(timer);
        }
        let Some(index) = pending.preamble else {
            self.shared.wakes.push(Wake::Done { link: id, call: CallId(call), result });
            return;
        };
        let failed = result.as_ref().err().cloned();
        self.shared.wakes.push(Wake::Preamble { link: id, call: pending.body, result });
        match failed {
            None => self.run_preamble(id, index + 1),
            Some(error) => {
                block(link, error);
                self.pump(id);
            }
        }
    }
}

fn block(link: &mut Link, error: WireError) {
    tracing::warn!(link = %link.id, endpoint = ?link.endpoint, error = error.text, "The first calls on a link failed");
    link.phase = Phase::Blocked(error);
}
