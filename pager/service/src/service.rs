//! The pager's loop and its state. One thread: a fault, a chunk of a migration and a message never run at the same time.
//!
//! ```text
//!  poll -> wakes -> { uffd readable: fault.rs | driver rang: execute.rs | message: calls.rs | pidfd: a client died }
//!       -> core events -> core decides -> execute.rs does -> ... until the core has nothing to do
//!       -> Tick: one more chunk of whatever migrates, then poll again (without waiting while there is work)
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::pager::FaultPoint;
use uhmm_ipc::message::{
    Call, ErrorCode, Event as WireEvent, Interface, Reply, Role, TraceId, WireError, pager, supervisor,
};
use uhmm_ipc::{CallId, ConnId, FdToken, Peer, TimerToken, Wake};
use uhmm_kernel_hook::uffd::EventJournal;
use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{HookError, PAGE_SIZE, Prot, memfd};
use uhmm_kit::record;
use uhmm_kit::{Handled, Service, ServiceArgs};
use uhmm_pager_core::{Action, Core, DefaultPolicy, Event, Pages, RegionId, ReqId};

use crate::agent::Changed;
use crate::agent_life::TIMER_AGENT;
use crate::agent_ops::Parts;
use crate::claims::ClaimTable;
use crate::closing::ClosingBook;
use crate::copies::Deferred;
use crate::create::Wanted;
use crate::devices::{DeviceRecords, Devices};
use crate::directory::SegmentRecord;
use crate::failures::Failures;
use crate::follow::Follower;
use crate::fork::TIMER_CHILDREN;
use crate::heat::{TIMER_HEAT, Watch};
use crate::home::HomeBook;
use crate::hot::{HotPoll, several_cpus};
use crate::keepers::Keepers;
use crate::noted::Noted;
use crate::requests::{Group, PendingRequest};
use crate::rest::{Resting, TIMER_REST};
use crate::revalidate::LettingGo;
use crate::revoke::PendingRevokes;
use crate::revoking::GateWatch;
use crate::scrubs::Scrubs;
use crate::short_wait::ShortWait;
use crate::space::{Regions, Space};
use crate::stats::ShellStats;
use crate::trace::TraceRing;

/// How long a revocation by message may take before the driver is fenced.
pub(crate) const REVOKE_DEADLINE_MS: u32 = 2_000;
/// Retry of what the kernel answered with EAGAIN although no event was readable (the address space is changing).
const AGAIN_RETRY: Duration = Duration::from_micros(500);

const TIMER_AGAIN: TimerToken = TimerToken(1);
pub(crate) const TIMER_GATE: TimerToken = TimerToken(2);

const KIND_UFFD: u64 = 1 << 56;
const KIND_PIDFD: u64 = 2 << 56;
const KIND_ENGINE: u64 = 3 << 56;
pub(crate) const KIND_DONE: u64 = 6 << 56;
pub(crate) const KIND_AGENT: u64 = 7 << 56;
pub(crate) const KIND_KEEPER: u64 = 8 << 56;
const KIND_SHORT_WAIT: u64 = 9 << 56;
const KIND_MASK: u64 = 0xff << 56;

/// Why the pager stopped.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The service frame failed.
    #[error("Pager service failed")]
    Kit(#[from] uhmm_kit::KitError),
    /// The reactor failed.
    #[error("Pager event loop failed")]
    Ipc(#[from] uhmm_ipc::IpcError),
    /// Something of the kernel failed.
    #[error("Pager system call failed")]
    Hook(#[from] uhmm_kernel_hook::HookError),
}

/// Something that waits until the vault has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum VaultWait {
    /// A space may be reported to its client.
    Space { space: u64, conn: ConnId, call: CallId },
    /// The same, to a forked child.
    Child { space: u64, conn: ConnId, call: CallId },
    /// A forked child's userfaultfd need not be looked for in this process any more.
    Born { space: u64 },
    /// A region may be registered and reported.
    Region { region: u64, conn: ConnId, call: CallId },
}

/// A connection and what it has shown itself to be.
#[derive(Debug)]
pub(crate) struct Session {
    pub peer: Peer,
    pub space: Option<u64>,
    pub device: Option<u8>,
}

/// See the module head.
pub struct Pager {
    pub(crate) service: Service,
    pub(crate) core: Core<DefaultPolicy>,
    pub(crate) regions: Regions,
    pub(crate) spaces: BTreeMap<u64, Space>,
    pub(crate) devices: Devices,
    pub(crate) records: DeviceRecords,
    pub(crate) claims: ClaimTable,
    pub(crate) sessions: HashMap<ConnId, Session>,
    pub(crate) mirror: Option<ConnId>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) actions: Vec<Action>,
    pub(crate) requests: HashMap<ReqId, PendingRequest>,
    pub(crate) next_request: u64,
    /// Calls over several regions.
    pub(crate) groups: HashMap<u64, Group>,
    pub(crate) next_group: u64,
    pub(crate) revokes: PendingRevokes,
    pub(crate) gate_watches: Vec<GateWatch>,
    pub(crate) copies: VecDeque<Deferred>,
    /// Frames to be scrubbed, some each turn.
    pub(crate) scrubs: VecDeque<Deferred>,
    /// Those that have not ended.
    pub(crate) scrubs_begun: Scrubs,
    /// Spaces whose regions are given up, some each turn.
    pub(crate) ending: VecDeque<u64>,
    /// Spaces that are not removed yet although their process is dead or said goodbye.
    pub(crate) dying_spaces: usize,
    /// Spaces that have more to say than their share of a turn.
    pub(crate) unread: BTreeSet<u64>,
    pub(crate) engine_jobs: HashMap<u64, Deferred>,
    pub(crate) next_engine_job: u64,
    pub(crate) vault_calls: HashMap<CallId, VaultWait>,
    /// Fences that the supervisor has not answered: (device, incarnation).
    pub(crate) fences: HashMap<CallId, (u8, u32)>,
    pub(crate) vault_left: BTreeMap<VaultWait, u32>,
    /// Regions whose owner waits for FreeRegion's answer.
    pub(crate) freeing: HashMap<u64, (ConnId, CallId)>,
    /// (space, device) pairs whose client gave its token to the device; told again by the mirror after the pager's restart.
    pub(crate) open_mirrors: BTreeSet<(u64, u8)>,
    /// Spaces with an unread event.
    pub(crate) reread: BTreeSet<u64>,
    /// Punched pages whose protection is to be forgotten once events have been read.
    pub(crate) marks_due: Vec<(RegionId, Pages)>,
    /// Spaces whose last fill found no memory.
    pub(crate) without_memory: BTreeSet<u64>,
    /// Pages to be poisoned once events have been read.
    pub(crate) poisons_due: Vec<(RegionId, Pages)>,
    /// A dead pager may have read what is not dealt with yet: nothing is put in place, and no agent is given orders.
    pub(crate) is_recovering: bool,
    /// Pages of the faults that are being served: no guards.
    pub(crate) faulted: Vec<(RegionId, u64)>,
    /// Pages that the program has dropped, in the events that are being read.
    pub(crate) overtaken: Vec<(RegionId, Pages, Changed)>,
    pub(crate) next_space: u64,
    pub(crate) next_region: u64,
    pub(crate) next_segment: u64,
    /// Regions that a call makes and that are not kept yet.
    pub(crate) makings: HashMap<(ConnId, CallId), u32>,
    /// Calls that make a region where devices may still see an earlier one.
    pub(crate) waiting_makes: Vec<(ConnId, CallId, Wanted)>,
    /// Revalidations that wait for unread events: caller and range.
    pub(crate) waiting_revalidations: Vec<(ConnId, CallId, u64, u64)>,
    /// Callers who wait until devices have let go of addresses.
    pub(crate) letting_go: Vec<LettingGo>,
    /// Segments of the vault, until all spaces are there.
    pub(crate) recovered_segments: Vec<(u64, SegmentRecord)>,
    /// Parts of revocations by ticket.
    pub(crate) revoke_parts: HashMap<u64, u32>,
    /// What agents work on, by ticket.
    pub(crate) parts: HashMap<u64, Parts>,
    /// Private pages with a second chance on their way out.
    pub(crate) resting: Resting,
    /// Copies between devices in the pager's own memory.
    pub(crate) bounces: HashMap<u64, Window>,
    pub(crate) next_bounce: u64,
    /// Copies that shall fail, by space.
    pub(crate) injections: HashMap<(u64, FaultPoint), u32>,
    pub(crate) home: HomeBook,
    pub(crate) failures: Failures,
    pub(crate) closing: ClosingBook,
    pub(crate) traces: HashMap<u64, TraceRing>,
    /// Spaces whose hot ranges are asked for.
    pub(crate) watches: BTreeMap<u64, Watch>,
    /// What a sentinel page is filled from.
    pub(crate) sentinel_page: Window,
    /// Events that are being acted on.
    pub(crate) journal: EventJournal,
    /// Keep what this one and those before have read and not put into the vault.
    pub(crate) keepers: Keepers,
    pub(crate) uffd_events: Vec<uhmm_kernel_hook::uffd::UffdEvent>,
    pub(crate) stats: ShellStats,
    pub(crate) noted: Noted,
    again_armed: bool,
    pub(crate) children_armed: bool,
    pub(crate) hot: HotPoll,
    pub(crate) follower: Follower,
    short_wait: ShortWait,
    started: Instant,
}

/// Runs the pager until it is told to stop.
pub fn run(args: ServiceArgs) -> Result<(), PagerError> {
    let service = Service::start(args, Role::Pager, Interface::Pager)?;
    if let Err(error) = uhmm_kernel_hook::process::lock_memory_best_effort() {
        tracing::warn!(%error, "Pager memory is not locked: on a host with swap a fault may wait for the disk");
    }
    let mut pager = Pager::new(service)?;
    pager.recover()?;
    pager.go_on_being_home();
    pager.service.record.define(record::names(|each| pager.tell(each)));
    pager.service.ready();
    let (mut wakes, mut due) = (Vec::new(), false);
    loop {
        let timeout = pager.poll_timeout();
        if due || timeout != Some(Duration::ZERO) {
            pager.publish_record();
        }
        pager.service.reactor.poll(timeout, &mut wakes)?;
        due = pager.service.record.is_due(wakes.is_empty());
        for wake in wakes.drain(..) {
            match pager.service.on_wake(&wake) {
                Handled::Exit(_) => return Ok(()),
                Handled::Yes => {}
                Handled::No => pager.on_wake(wake),
            }
            pager.drain();
        }
        pager.turn();
    }
}

/// The one of the vault, or a new one.
fn journal(service: &mut Service) -> Result<EventJournal, HookError> {
    const VAULT_NAME: &str = "journal";
    let len = EventJournal::LEN_BYTES;
    let kept = service.vault.take(VAULT_NAME).into_iter().next().map(|(_, fd)| fd);
    let kept = kept.filter(|fd| memfd::check_sealed(fd.as_fd(), len).is_ok());
    let fd = match kept {
        Some(fd) => fd,
        None => {
            let fd = Arc::new(memfd::create_sealed("uhmm-journal", len)?);
            service.vault.put(&mut service.reactor, VAULT_NAME, fd.clone());
            fd
        }
    };
    Window::map(fd.as_fd(), 0, len, Prot::ReadWrite).map(|window| EventJournal::new(window, service.incarnation))
}

/// What was given out, or the place for it.
fn claims(service: &mut Service) -> Result<ClaimTable, PagerError> {
    let kept = service.vault.take(ClaimTable::VAULT_NAME).into_iter().next();
    if let Some(claims) = kept.map(|(_, fd)| ClaimTable::adopt(fd)).transpose()?.flatten() {
        return Ok(claims);
    }
    let claims = ClaimTable::create()?;
    service.vault.put(&mut service.reactor, ClaimTable::VAULT_NAME, claims.fd());
    Ok(claims)
}

impl Pager {
    fn new(mut service: Service) -> Result<Self, PagerError> {
        let kept = service.vault.take(DeviceRecords::VAULT_NAME).into_iter().next();
        let adopted = kept.map(|(_, fd)| DeviceRecords::adopt(fd)).transpose()?.flatten();
        let records = match adopted {
            Some(records) => records,
            None => {
                let records = DeviceRecords::create()?;
                service.vault.put(&mut service.reactor, DeviceRecords::VAULT_NAME, records.fd());
                records
            }
        };
        let claims = claims(&mut service)?;
        let journal = journal(&mut service)?;
        let keepers = Keepers::start(&mut service);
        let noted = Noted::new(&mut service);
        let short_wait = ShortWait::new(&mut service.reactor, FdToken(KIND_SHORT_WAIT));
        let incarnation = service.incarnation;
        let first_id = u64::from(incarnation) << 32 | 1;
        Ok(Self {
            service,
            core: Core::new(DefaultPolicy::default()),
            regions: Regions::default(),
            spaces: BTreeMap::new(),
            devices: Devices::default(),
            records,
            claims,
            sessions: HashMap::new(),
            mirror: None,
            events: VecDeque::new(),
            actions: Vec::new(),
            requests: HashMap::new(),
            next_request: 1,
            groups: HashMap::new(),
            next_group: 1,
            revokes: PendingRevokes::new(incarnation),
            gate_watches: Vec::new(),
            copies: VecDeque::new(),
            scrubs: VecDeque::new(),
            scrubs_begun: Scrubs::default(),
            ending: VecDeque::new(),
            dying_spaces: 0,
            unread: BTreeSet::new(),
            engine_jobs: HashMap::new(),
            next_engine_job: 1,
            vault_calls: HashMap::new(),
            fences: HashMap::new(),
            vault_left: BTreeMap::new(),
            freeing: HashMap::new(),
            open_mirrors: BTreeSet::new(),
            reread: BTreeSet::new(),
            marks_due: Vec::new(),
            without_memory: BTreeSet::new(),
            poisons_due: Vec::new(),
            is_recovering: false,
            faulted: Vec::new(),
            overtaken: Vec::new(),
            // Ids are not given again: mirror and drivers may know those of a dead pager that the vault does not.
            next_space: first_id,
            next_region: first_id,
            next_segment: first_id,
            makings: HashMap::new(),
            waiting_makes: Vec::new(),
            waiting_revalidations: Vec::new(),
            letting_go: Vec::new(),
            recovered_segments: Vec::new(),
            revoke_parts: HashMap::new(),
            parts: HashMap::new(),
            resting: Resting::default(),
            bounces: HashMap::new(),
            next_bounce: 1,
            injections: HashMap::new(),
            home: HomeBook::default(),
            failures: Failures::default(),
            closing: ClosingBook::default(),
            traces: HashMap::new(),
            watches: BTreeMap::new(),
            sentinel_page: Window::anonymous(PAGE_SIZE)?,
            uffd_events: Vec::new(),
            journal,
            keepers,
            stats: ShellStats::default(),
            noted,
            again_armed: false,
            children_armed: false,
            hot: HotPoll::new(several_cpus()),
            follower: Follower::new(),
            short_wait,
            started: Instant::now(),
        })
    }

    /// After the messages: everything that grows with something has its share of each turn, and the next turn begins with messages.
    fn turn(&mut self) {
        self.leave_if_quiet();
        self.read_on();
        self.reread_spaces();
        self.end_some();
        self.scrub_some();
        self.go_on_homing();
        self.go_on_closing();
        self.push(Event::Tick);
        self.drain();
    }

    pub(crate) fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Work at hand: do not wait. Just after a fault: look again for a while. Otherwise sleep.
    fn poll_timeout(&mut self) -> Option<Duration> {
        let homes = !self.home.homings.is_empty() || self.closing.works();
        let works = homes || !self.unread.is_empty() || !self.ending.is_empty() || self.has_scrubs();
        if self.core.has_runnable_work() || works {
            if self.core.has_runnable_work() || homes {
                self.works_apart();
            }
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        if self.hot.looks(now) {
            return Some(Duration::ZERO);
        }
        let now_us = self.now_us();
        let core_wait = |until_us: u64| Duration::from_micros(until_us.saturating_sub(now_us));
        let waits = [self.core.next_deadline_us().map(core_wait), self.follower.wait(now)];
        waits.into_iter().flatten().min().map(|wait| self.short_wait.exactly(wait))
    }

    fn on_wake(&mut self, wake: Wake) {
        match wake {
            Wake::Fd(FdToken(token)) => self.on_fd(token),
            Wake::Call { conn, call, trace, body, .. } => self.on_call(conn, call, trace, body),
            Wake::Connected { conn, peer } => {
                self.sessions.insert(conn, Session { peer, space: None, device: None });
            }
            Wake::Closed { conn, .. } => self.on_closed(conn),
            Wake::Done { call, result, .. } => self.supervisor_answered(call, result),
            Wake::Event { body: WireEvent::Supervisor(event), .. } => self.on_supervisor_event(event),
            Wake::Timer(TIMER_AGAIN) => self.again_armed = false,
            Wake::Timer(TIMER_GATE) => self.check_gates(),
            Wake::Timer(TIMER_REST) => self.end_rests_that_are_over(),
            Wake::Timer(TIMER_CHILDREN) => {
                self.children_armed = false;
                self.check_children();
            }
            Wake::Timer(TimerToken(token)) if token & KIND_MASK == TIMER_HEAT => self.sweep(token & !KIND_MASK),
            Wake::Timer(TimerToken(token)) if token & KIND_MASK == TIMER_AGENT => {
                self.agent_is_late(token & !KIND_MASK)
            }
            _ => {}
        }
    }

    fn on_fd(&mut self, token: u64) {
        let id = token & !KIND_MASK;
        match token & KIND_MASK {
            KIND_UFFD => self.read_uffd(id),
            KIND_PIDFD => self.client_exited(id),
            KIND_DONE => self.take_answers(id),
            KIND_AGENT => self.agent_ended(id),
            KIND_KEEPER => self.keepers.ended(&mut self.service, id as usize),
            KIND_ENGINE => {
                let device_id = id as u8;
                let engine = self.devices[usize::from(device_id)].as_ref().and_then(|device| device.engine.as_ref());
                if let Some(Err(error)) = engine.map(|engine| engine.completion_event.drain()) {
                    tracing::warn!(%error, "Reading a completion event failed");
                }
                self.reap_copies(device_id);
            }
            _ => {}
        }
    }

    /// Watches the descriptors of a space.
    pub(crate) fn watch_space(&mut self, space: &Space) -> Result<(), PagerError> {
        self.service.reactor.add_fd(&space.uffd, FdToken(KIND_UFFD | space.state.id))?;
        if let Some(pidfd) = &space.pidfd {
            self.service.reactor.add_fd(pidfd, FdToken(KIND_PIDFD | space.state.id))?;
        }
        Ok(())
    }

    /// Watches a process that has just said which one it is.
    pub(crate) fn watch_pid(&mut self, space_id: u64) -> Result<(), PagerError> {
        if let Some(pidfd) = self.spaces.get(&space_id).and_then(|space| space.pidfd.as_ref()) {
            self.service.reactor.add_fd(pidfd, FdToken(KIND_PIDFD | space_id))?;
        }
        Ok(())
    }

    /// Watches the completion event of a copy engine.
    pub(crate) fn watch_engine(&mut self, device_id: u8) -> Result<(), PagerError> {
        let engine = self.devices[usize::from(device_id)].as_ref().and_then(|device| device.engine.as_ref());
        if let Some(engine) = engine {
            let token = FdToken(KIND_ENGINE | u64::from(device_id));
            self.service.reactor.add_fd(&engine.completion_event.as_fd(), token)?;
        }
        Ok(())
    }

    /// Spaces whose fills met an unread event are read now; if that changes nothing, a timer tries again.
    fn reread_spaces(&mut self) {
        if self.reread.is_empty() {
            return;
        }
        for space in std::mem::take(&mut self.reread) {
            self.read_uffd(space);
        }
        self.drain();
        self.make_waiting_regions();
        self.revalidate_what_waits();
        self.drain();
        if !self.again_armed {
            self.again_armed = true;
            self.service.reactor.add_timer(AGAIN_RETRY, TIMER_AGAIN);
        }
    }

    fn on_closed(&mut self, conn: ConnId) {
        let Some(session) = self.sessions.remove(&conn) else { return };
        self.home.faults.retain(|fault| fault.conn != conn);
        self.noted.begun.retain(|(of, _), _| *of != conn);
        if self.mirror == Some(conn) {
            tracing::warn!("The mirror's session is lost: revocations by message wait for the next one");
            self.mirror = None;
        }
        if let Some(device) = session.device {
            self.driver_session_lost(device, conn);
        }
        if let Some(space) = session.space {
            self.client_disconnected(space, conn);
            self.check_children_soon();
        }
        // A client that only lost its connection still faults through its userfaultfd; its pidfd tells when it dies.
    }

    fn on_supervisor_event(&mut self, event: supervisor::Event) {
        let supervisor::Event::ServiceDied { service, incarnation, held } = event else { return };
        if let Some(device) = self.service.plan.driver_service(&service).map(|device| device.id) {
            self.driver_died(device, incarnation, held);
        }
    }

    fn supervisor_answered(&mut self, call: CallId, result: Result<Reply, WireError>) {
        let Some((device, incarnation)) = self.fences.remove(&call) else {
            self.vault_acknowledged(call, result);
            return;
        };
        // Killed now: `ServiceDied` follows when the process is reaped. Dead before: nobody will tell again.
        if result.is_err_and(|error| error.code == ErrorCode::Stale) {
            self.driver_died(device, incarnation, false);
        }
    }

    /// Counts down the vault's acknowledgements of a space or region.
    fn vault_acknowledged(&mut self, call: CallId, result: Result<Reply, WireError>) {
        let Some(wait) = self.vault_calls.remove(&call) else { return };
        if let Err(error) = result {
            tracing::error!(%error, "The vault refused a descriptor");
            self.vault_left.remove(&wait);
            self.creation_failed(wait, error);
            return;
        }
        let Some(left) = self.vault_left.get_mut(&wait) else { return };
        *left -= 1;
        if *left == 0 {
            self.vault_left.remove(&wait);
            self.creation_kept(wait);
        }
    }

    pub(crate) fn tell_mirror(&mut self, event: pager::Event) {
        if let Some(conn) = self.mirror {
            self.service.reactor.event(conn, WireEvent::Pager(event), TraceId::default());
        }
    }

    /// Asks the supervisor to kill a driver that does not stop using memory.
    pub(crate) fn fence(&mut self, device_id: u8, reason: &str) {
        let Some(service) = self.service.plan.device(device_id).map(|device| device.service.clone()) else { return };
        // A device that has not logged in since this pager started may still run in the incarnation on record.
        let incarnation = match &mut self.devices[usize::from(device_id)] {
            Some(device) if device.fenced => return,
            Some(device) => {
                device.fenced = true;
                device.incarnation
            }
            None => self.records.get(device_id).0 as u32,
        };
        tracing::error!(device = device_id, service, incarnation, reason, "Fencing the driver");
        let fence = supervisor::Call::Fence { service, incarnation, reason: reason.to_owned() };
        let supervisor = self.service.supervisor;
        let call = self.service.reactor.call(supervisor, Call::Supervisor(fence), TraceId::default(), None);
        self.fences.insert(call, (device_id, incarnation));
    }
}
