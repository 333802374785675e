//! The mirror's shell: one loop over the reactor, every decision in [`crate::core`].

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Call, ErrorCode, Event, Interface, Reply, Role, TraceId, WireError, common, mirror, pager};
use uhmm_ipc::{CallId, ConnId, Endpoint, LinkId, Peer, TimerId, TimerToken, Wake};
use uhmm_kit::record::{self, Each, Kind, Place, What, Why};
use uhmm_kit::{Handled, Service, ServiceArgs};

use crate::core::{Action, Installable, Invalidation, MirrorCore, PageRange, Refusal};

const TIMER_LOGIN: TimerToken = TimerToken(2);
/// Between two logins.
const LOGIN_PAUSE: Duration = Duration::from_millis(20);
const TIMER_DEADLINE: TimerToken = TimerToken(1);

/// Why the mirror stopped.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The service frame failed.
    #[error("Mirror service failed")]
    Kit(#[from] uhmm_kit::KitError),
    /// The reactor failed.
    #[error("Mirror event loop failed")]
    Ipc(#[from] uhmm_ipc::IpcError),
}

/// A driver's call that waits for the pager.
enum Forwarded {
    Open { space: u64, device: u8 },
    Lookup { space: u64, device: u8 },
    Fault { key: u64 },
    Close,
}

struct Waiting {
    conn: ConnId,
    call: CallId,
    kind: Forwarded,
    /// How it began, for the record.
    begun: Option<record::Event>,
}

struct Session {
    peer: Peer,
    device: Option<u8>,
}

struct Mirror {
    service: Service,
    pager: LinkId,
    core: MirrorCore,
    sessions: HashMap<ConnId, Session>,
    waiting: HashMap<CallId, Waiting>,
    /// What a new pager must be told: it does not keep who mirrors whom.
    tokens: BTreeMap<(u64, u8), Vec<u8>>,
    actions: Vec<Action>,
    /// How invalidations began that are not through, for the record.
    invalidations: HashMap<u64, record::Event>,
    started: Instant,
    timer: Option<(TimerId, u64)>,
}

/// Runs the mirror until it is told to stop.
pub fn run(args: ServiceArgs) -> Result<(), MirrorError> {
    let mut service = Service::start(args, Role::Mirror, Interface::Mirror)?;
    let pager = connect(&mut service);
    service.reactor.set_preamble(pager, vec![Call::Pager(pager::Call::MirrorLogin)]);
    service.ready();
    let mut mirror = Mirror {
        service,
        pager,
        core: MirrorCore::default(),
        sessions: HashMap::new(),
        waiting: HashMap::new(),
        tokens: BTreeMap::new(),
        actions: Vec::new(),
        invalidations: HashMap::new(),
        started: Instant::now(),
        timer: None,
    };
    mirror.service.record.define(record::names(|each| mirror.tell(each)));
    let mut wakes = Vec::new();
    loop {
        mirror.service.reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            match mirror.service.on_wake(&wake) {
                Handled::Exit(_) => return Ok(()),
                Handled::Yes => {}
                Handled::No => mirror.on_wake(wake),
            }
        }
        mirror.service.record.publish(|each| mirror.tell(each));
    }
}

fn connect(service: &mut Service) -> LinkId {
    let endpoint = Endpoint {
        path: service.endpoint_path("pager"),
        interface: Interface::Pager,
        key: service.channel_key("pager"),
    };
    service.reactor.link(endpoint)
}

impl Mirror {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn on_wake(&mut self, wake: Wake) {
        match wake {
            Wake::Connected { conn, peer } => {
                self.sessions.insert(conn, Session { peer, device: None });
            }
            Wake::Closed { conn, .. } => self.closed(conn),
            Wake::Call { conn, call, trace, body, .. } => self.called(conn, call, trace, body),
            Wake::Done { link, call, result } if link == self.pager => self.answered(call, result),
            Wake::Event { link, body: Event::Pager(event), .. } if link == self.pager => self.pager_event(event),
            Wake::LinkDown { link } if link == self.pager => self.core.pager_lost(),
            Wake::Timer(TIMER_LOGIN) => self.reconnect(),
            Wake::Timer(TIMER_DEADLINE) => {
                self.timer = None;
                let now_ms = self.now_ms();
                self.core.tick(now_ms, &mut self.actions);
                self.act();
            }
            Wake::Preamble { link, call, result: Err(error) } if link == self.pager => {
                self.session_refused(&call, &error);
            }
            _ => {}
        }
    }

    /// Something that the first calls named is gone at the pager: a client that died while neither of the two looked. It is
    /// forgotten, and the session begins anew without it.
    fn session_refused(&mut self, call: &Call, error: &WireError) {
        let Call::Pager(pager::Call::OpenMirror { space, device, .. }) = *call else {
            tracing::warn!(%error, "The pager refused the mirror's login: trying again");
            self.service.reactor.add_timer(LOGIN_PAUSE, TIMER_LOGIN);
            return;
        };
        tracing::info!(space, device, %error, "A client is gone: the session with the pager begins anew without it");
        let mask = self.core.space_gone(space) | 1 << device;
        self.tokens.retain(|(of, _), _| *of != space);
        self.broadcast(mask, &mirror::Event::SpaceGone { space });
        self.reconnect();
    }

    fn reconnect(&mut self) {
        self.service.reactor.drop_link(self.pager);
        self.pager = connect(&mut self.service);
        self.update_preamble();
        self.core.pager_lost();
        // Calls of a dropped link never end by themselves; drivers ask again.
        let lost: Vec<CallId> = self.waiting.keys().copied().collect();
        for call in lost {
            self.answered(call, Err(WireError::new(ErrorCode::Stale, "The session with the pager was begun anew")));
        }
        self.act();
    }

    fn closed(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.remove(&conn) else { return };
        let Some(device) = session.device else { return };
        if !self.sessions.values().any(|other| other.device == Some(device)) {
            tracing::info!(device, driver = %session.peer.name, "Driver session lost");
            self.core.device_lost(device);
        }
    }

    fn called(&mut self, conn: ConnId, call: CallId, trace: TraceId, body: Call) {
        let answer = match body {
            Call::Common(common::Call::Stats) => {
                Some(Ok(Reply::Common(common::Reply::Stats(record::metrics(|each| self.tell(each))))))
            }
            Call::Mirror(request) => self.request(conn, call, trace, request),
            _ => Some(Err(WireError::new(ErrorCode::Protocol, "Not a call of the mirror interface"))),
        };
        if let Some(answer) = answer {
            self.service.reactor.reply(conn, call, answer);
        }
    }

    fn device_of(&self, conn: ConnId) -> Result<u8, WireError> {
        let device = self.sessions.get(&conn).and_then(|session| session.device);
        device.ok_or_else(|| WireError::new(ErrorCode::Permission, "Log in with a device id before any other call"))
    }

    /// `None`: the answer comes later.
    fn request(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        request: mirror::Call,
    ) -> Option<Result<Reply, WireError>> {
        if let mirror::Call::Login { device } = request {
            return Some(self.login(conn, device));
        }
        let device = match self.device_of(conn) {
            Ok(device) => device,
            Err(error) => return Some(Err(error)),
        };
        let refused = |refusal: Refusal| Some(Err(WireError::new(code_of(&refusal), refusal.to_string())));
        let (kind, upward) = match request {
            mirror::Call::Login { .. } => return None,
            mirror::Call::Ack { id } => {
                self.core.acknowledge(device, id, &mut self.actions);
                self.act();
                return Some(Ok(Reply::Mirror(mirror::Reply::Done)));
            }
            mirror::Call::Open { space, token } => {
                self.tokens.insert((space, device), token.clone());
                (Forwarded::Open { space, device }, pager::Call::OpenMirror { space, token, device })
            }
            mirror::Call::Close { space } => {
                self.core.close(space, device);
                self.tokens.remove(&(space, device));
                self.update_preamble();
                (Forwarded::Close, pager::Call::CloseMirror { space, device })
            }
            mirror::Call::Lookup { space, addr } => {
                if let Err(refusal) = self.core.is_open(space, device) {
                    return refused(refusal);
                }
                (Forwarded::Lookup { space, device }, pager::Call::Lookup { space, addr })
            }
            mirror::Call::Fault { space, region, first_page, page_count, fault_page, write, whole, exclusive } => {
                let window = PageRange { region, first_page, page_count };
                match self.core.fault_begin(space, device, window, fault_page) {
                    Err(refusal) => return refused(refusal),
                    Ok(key) => (
                        Forwarded::Fault { key },
                        pager::Call::Resolve {
                            space,
                            region,
                            first_page,
                            page_count,
                            fault_page,
                            device,
                            write,
                            whole,
                            exclusive,
                        },
                    ),
                }
            }
        };
        let begun = self.note_fault(device, trace, &upward);
        let upward = self.service.reactor.call(self.pager, Call::Pager(upward), trace, None);
        self.waiting.insert(upward, Waiting { conn, call, kind, begun });
        None
    }

    fn login(&mut self, conn: ConnId, device: u8) -> Result<Reply, WireError> {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return Err(WireError::new(ErrorCode::Protocol, "The connection is gone"));
        };
        let owner = self.service.plan.device(device).map(|d| d.service.as_str());
        if session.peer.role != Role::Driver || owner != Some(session.peer.name.as_str()) {
            let text = format!("Service {} does not drive device {device} in this plan", session.peer.name);
            return Err(WireError::new(ErrorCode::Permission, text));
        }
        session.device = Some(device);
        tracing::info!(device, driver = %session.peer.name, incarnation = session.peer.incarnation, "Driver logged in");
        self.core.device_login(device, session.peer.incarnation, &mut self.actions);
        self.act();
        Ok(Reply::Mirror(mirror::Reply::Done))
    }

    fn answered(&mut self, call: CallId, result: Result<Reply, WireError>) {
        let Some(waiting) = self.waiting.remove(&call) else { return };
        if let Some(begun) = waiting.begun {
            let why = if result.is_ok() { Why::None } else { Why::Failed };
            self.note_end(record::Event { why, ..begun }, What::DeviceFaultDone);
        }
        let answer = self.translate(waiting.kind, result);
        self.service.reactor.reply(waiting.conn, waiting.call, answer.map(Reply::Mirror));
    }

    fn note_fault(&mut self, device: u8, trace: TraceId, call: &pager::Call) -> Option<record::Event> {
        let pager::Call::Resolve { space, page_count, .. } = call else { return None };
        let now = record::Event::new(What::DeviceFault, record::now_ns());
        let to = Place::Device(device);
        let begun = record::Event { trace: trace.0, space: *space, pages: *page_count, to, ..now };
        self.service.record.event(&begun);
        Some(begun)
    }

    fn note_end(&mut self, begun: record::Event, what: What) {
        let time_ns = record::now_ns();
        let value = time_ns.saturating_sub(begun.time_ns);
        self.service.record.event(&record::Event { what, time_ns, value, ..begun });
    }

    /// Login, then every open mirror, on each new connection to the pager.
    fn update_preamble(&mut self) {
        let open = self.tokens.iter().map(|((space, device), token)| {
            Call::Pager(pager::Call::OpenMirror { space: *space, token: token.clone(), device: *device })
        });
        let calls = std::iter::once(Call::Pager(pager::Call::MirrorLogin)).chain(open).collect();
        self.service.reactor.set_preamble(self.pager, calls);
    }

    fn forget_space(&mut self, space: u64) {
        self.tokens.retain(|(of, _), _| *of != space);
        self.update_preamble();
    }

    fn translate(&mut self, kind: Forwarded, result: Result<Reply, WireError>) -> Result<mirror::Reply, WireError> {
        if let Forwarded::Fault { key } = kind {
            return self.resolved(key, result);
        }
        if let (Forwarded::Open { space, device }, Err(_)) = (&kind, &result) {
            self.tokens.remove(&(*space, *device));
        }
        match (kind, result?) {
            (Forwarded::Open { space, device }, Reply::Pager(pager::Reply::Done)) => {
                self.core.open(space, device);
                self.update_preamble();
                Ok(mirror::Reply::Done)
            }
            (Forwarded::Close, Reply::Pager(pager::Reply::Done)) => Ok(mirror::Reply::Done),
            (
                Forwarded::Lookup { space, device },
                Reply::Pager(pager::Reply::Region { region, addr, len_bytes, device_read_only, memory }),
            ) => {
                self.core.mirrored(space, device, region, addr, len_bytes);
                Ok(mirror::Reply::Region { region, addr, len_bytes, device_read_only, memory })
            }
            _ => Err(unexpected()),
        }
    }

    fn resolved(&mut self, key: u64, result: Result<Reply, WireError>) -> Result<mirror::Reply, WireError> {
        let Ok(Reply::Pager(pager::Reply::Resolved { runs })) = result else {
            self.core.fault_failed(key);
            return Err(result.err().unwrap_or_else(unexpected));
        };
        let text = "The page was invalidated while the fault was resolved: ask again";
        let Installable { sequence, runs } =
            self.core.fault_end(key, runs).ok_or_else(|| WireError::new(ErrorCode::Busy, text))?;
        Ok(mirror::Reply::Mapped { sequence, runs })
    }

    fn pager_event(&mut self, event: pager::Event) {
        match event {
            pager::Event::Invalidate { id, space, region, first_page, page_count, device_mask, unmap, deadline_ms } => {
                let range = PageRange { region, first_page, page_count };
                let deadline_ms = self.now_ms() + u64::from(deadline_ms);
                let now = record::Event::new(What::Invalidate, record::now_ns());
                let begun = record::Event { space, pages: page_count, ..now };
                self.service.record.event(&begun);
                self.invalidations.insert(id, begun);
                let invalidation = Invalidation { id, space, range, device_mask, unmap, deadline_ms };
                self.core.invalidate(invalidation, &mut self.actions);
            }
            pager::Event::DeviceVoid { device } => self.core.device_void(device, &mut self.actions),
            pager::Event::SpaceGone { space } => {
                let mask = self.core.space_gone(space);
                self.forget_space(space);
                self.broadcast(mask, &mirror::Event::SpaceGone { space });
            }
            // For clients' agents; the pager does not send it here.
            pager::Event::Frames { .. } => {}
        }
        self.act();
    }

    fn broadcast(&mut self, device_mask: u8, event: &mirror::Event) {
        for (conn, session) in &self.sessions {
            if session.device.is_some_and(|device| device_mask & (1 << device) != 0) {
                self.service.reactor.event(*conn, Event::Mirror(event.clone()), TraceId::default());
            }
        }
    }

    fn act(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Start { device, invalidation, sequence } => {
                    let event = mirror::Event::Invalidate {
                        id: invalidation.id,
                        space: invalidation.space,
                        region: invalidation.range.region,
                        first_page: invalidation.range.first_page,
                        page_count: invalidation.range.page_count,
                        unmap: invalidation.unmap,
                        sequence,
                    };
                    self.broadcast(1 << device, &event);
                }
                Action::Finished { id, late_mask } => {
                    if let Some(begun) = self.invalidations.remove(&id) {
                        self.note_end(begun, What::InvalidateDone);
                    }
                    let done = pager::Call::InvalidateDone { id, late_mask };
                    self.service.reactor.call(self.pager, Call::Pager(done), TraceId::default(), None);
                }
            }
        }
        self.actions = actions;
        self.arm_deadline();
    }

    fn arm_deadline(&mut self) {
        let next = self.core.next_deadline_ms();
        if next == self.timer.as_ref().map(|(_, at_ms)| *at_ms) {
            return;
        }
        if let Some((timer, _)) = self.timer.take() {
            self.service.reactor.cancel_timer(timer);
        }
        if let Some(at_ms) = next {
            let wait = Duration::from_millis(at_ms.saturating_sub(self.now_ms()));
            self.timer = Some((self.service.reactor.add_timer(wait, TIMER_DEADLINE), at_ms));
        }
    }

    fn tell(&self, each: &mut Each<'_>) {
        let counters = self.core.counters();
        let mirrors = self.core.open_mirrors().map(|(_, mask)| u64::from(mask.count_ones())).sum();
        for (name, kind, value) in [
            ("invalidations", Kind::Counter, counters.invalidations),
            ("invalidate_starts", Kind::Counter, counters.invalidate_starts),
            ("late_devices", Kind::Counter, counters.late_devices),
            ("device_faults", Kind::Counter, counters.faults),
            ("device_fault_retries", Kind::Counter, counters.fault_retries),
            ("device_fault_trims", Kind::Counter, counters.fault_trims),
            ("intervals", Kind::Gauge, self.core.interval_count() as u64),
            ("pending_invalidations", Kind::Gauge, self.core.pending_count() as u64),
            ("open_mirrors", Kind::Gauge, mirrors),
        ] {
            each(format_args!("{name}"), kind, value);
        }
    }
}

/// A region that is not mirrored may have been replaced by another one: the driver looks its address up again.
fn code_of(refusal: &Refusal) -> ErrorCode {
    match refusal {
        Refusal::NotOpen { .. } => ErrorCode::Permission,
        Refusal::NotMirrored { .. } => ErrorCode::NotFound,
    }
}

fn unexpected() -> WireError {
    WireError::new(ErrorCode::Protocol, "The pager answered with something else than was asked")
}
