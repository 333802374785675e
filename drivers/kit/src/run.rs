//! The main loop of every driver, and its life from start to end.
//!
//! ```text
//!   Service::start -> Driver::open (adopt or create memory) -> vault keeps memory and generation
//!        -> links: mirror [Login, Open*, Lookup*], pager [DriverLogin, AttachTable*] (session.rs) -> ready -> loop until Stop
//!        -> units and copy engine stop -> DeviceMemory::give_back
//!
//!   poll -> wakes -> { client's call: clients.rs | device event, answer: resolve.rs | invalidation: invalidate.rs }
//! ```
//! One thread owns everything here; device threads talk to it through [`DevicePort`]. After a crash the next incarnation finds
//! its memory in the vault, comes with empty tables (so every mapping of the old one is void), and clients' stubs submit their
//! idempotent jobs again.
//!
//! The pager relies on the vault: `DriverLogin` is sent only after the supervisor has acknowledged what holds the memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Aperture, Call, Event, Interface, Role, TraceId, mirror, pager};
use uhmm_ipc::{CallId, ConnId, TimerId, TimerToken, Wake};
use uhmm_kernel_hook::Window;
use uhmm_kit::record::{self, Each, HistogramId};
use uhmm_kit::{Ending, Handled, Service, ServiceArgs};
use uhmm_manifest::DevicePlan;

use crate::access::AccessBook;
use crate::access::engine::EngineLane;
use crate::copy_service::CopyService;
use crate::device::{
    DeviceMemory, DevicePageTable, Driver, DriverParts, FaultId, JobId, JobQueue, OpenContext, PAGE_BYTES, RegionKey,
    RegionMap,
};
use crate::error::DriverError;
use crate::fault::{FaultBook, Retry, WindowId};
use crate::invalidate::AfterQuiescence;
use crate::job::JobBook;
use crate::port::DevicePort;
use crate::state::{Generation, STATE_NAME};
use crate::stats::Stats;
use crate::uplink::{Uplink, Upstream};

/// Vault names of every driver begin with this.
const VAULT_PREFIX: &str = "driver/";
/// Those of descriptors that keep a device open (`uhmm_pci`'s `PciBackend::kept`).
const OPEN_DEVICE_PREFIX: &str = "driver/pci-";
/// How long a driver that has lost its device waits for vault and pager, if they are down.
const LET_GO_PATIENCE: Duration = Duration::from_secs(2);
/// A driver calls itself ready when it is logged in, or after this: a pager that is down must not look like a dead driver.
const READY_AFTER: Duration = Duration::from_secs(2);
/// Pause before a refused session is tried again.
pub(crate) const RELINK_PAUSE: Duration = Duration::from_millis(50);
/// The same when the login itself was refused, which only an operator can mend.
pub(crate) const LOGIN_PAUSE: Duration = Duration::from_secs(1);
/// Our timer tokens begin here; those below belong to the service frame.
const FIRST_TIMER: u64 = 1 << 32;

/// What an unanswered call upward was for.
#[derive(Debug)]
pub(crate) enum Asked {
    Lookup {
        space: u64,
    },
    Fault {
        window: WindowId,
    },
    Open {
        space: u64,
        token: Vec<u8>,
        client: Option<(ConnId, CallId)>,
    },
    Attach {
        key: RegionKey,
    },
    /// Ack and Close: nothing follows.
    Told,
}

/// An open to be asked again.
pub(crate) type Reopen = (u64, Vec<u8>, Option<(ConnId, CallId)>);

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Retry(Retry),
    Quiesce(u64),
    Relink(Upstream),
    Reopen,
    Ready,
    JobDeadline(JobId),
    /// An access paused.
    Access(JobId),
}

/// An attached (or soon attached) region.
#[derive(Clone, Debug)]
pub(crate) struct Attached {
    pub(crate) map: RegionMap,
    /// Table shown to the pager.
    pub(crate) table: Option<uhmm_ipc::message::Fd>,
}

/// What of device memory the pager is told at login.
pub(crate) struct MemoryShown {
    pub(crate) device: u8,
    generation: u64,
    frame_count: u32,
    aperture: Option<Aperture>,
    gate: Option<uhmm_ipc::message::Fd>,
}

/// See the module head.
pub(crate) struct DriverLoop<D: Driver> {
    pub(crate) service: Service,
    pub(crate) driver_name: &'static str,
    pub(crate) plan: DevicePlan,
    /// Names the content of device memory.
    pub(crate) generation: u64,
    pub(crate) memory: D::Memory,
    pub(crate) table: D::Table,
    pub(crate) queue: D::Queue,
    pub(crate) copy: Option<CopyService<D::Engine>>,
    pub(crate) port: DevicePort,
    pub(crate) book: FaultBook,
    pub(crate) jobs: JobBook<ConnId, CallId>,
    pub(crate) accesses: AccessBook,
    /// To the copy thread.
    pub(crate) lane: EngineLane,
    /// Device memory as the loop itself sees it.
    pub(crate) window: Option<Window>,
    pub(crate) stats: Stats,
    /// Waits of device faults, in the record.
    pub(crate) fault_waits: HistogramId,
    /// How questions to the mirror began, for the record.
    pub(crate) fault_begins: HashMap<WindowId, record::Event>,
    pub(crate) mirror: Uplink,
    pub(crate) pager: Uplink,
    pub(crate) conns: HashSet<ConnId>,
    /// Opened spaces and their tokens.
    pub(crate) spaces: BTreeMap<u64, Vec<u8>>,
    pub(crate) regions: BTreeMap<RegionKey, Attached>,
    pub(crate) asked: HashMap<CallId, (Upstream, Asked)>,
    /// Opens that a refused session swallowed: space, token, who waits.
    pub(crate) reopen: Vec<Reopen>,
    pub(crate) quiescing: HashMap<u64, AfterQuiescence>,
    pub(crate) next_ticket: u64,
    /// Suspended jobs: since when.
    pub(crate) suspended: HashMap<FaultId, (JobId, Instant)>,
    pub(crate) job_timers: HashMap<JobId, (TimerId, TimerToken)>,
    timers: HashMap<TimerToken, Due>,
    next_timer: u64,
    pub(crate) shown: MemoryShown,
    ready: bool,
}

/// Runs a driver service until it is told to stop. The whole of a driver's `main`.
///
/// # Errors
/// When the service cannot go on: the process should end, and the supervisor starts the next incarnation.
pub fn run_driver<D: Driver>(args: ServiceArgs, driver: D) -> Result<(), DriverError> {
    let name = args.name.clone();
    let service = Service::start(args, Role::Driver, Interface::Driver)?;
    // It lives as long as its loop: it may hold what watches the device.
    let mut driver = driver;
    let Some((mut driver_loop, early)) = DriverLoop::open(service, &name, &mut driver)? else { return Ok(()) };
    let outcome = driver_loop.run(early);
    driver_loop.queue.stop();
    if let Some(copy) = driver_loop.copy.take() {
        copy.stop();
    }
    end(&mut driver_loop.memory, outcome?);
    Ok(())
}

/// Nobody uses device memory any more.
fn end<M: DeviceMemory>(memory: &mut M, ending: Ending) {
    if ending == Ending::ForGood
        && let Err(error) = memory.give_back()
    {
        tracing::warn!(error, "Device could not be given back: it looks as if this driver had been killed");
    }
}

/// The device, and which content its memory has.
fn open_device<D: Driver>(
    service: &mut Service,
    plan: &DevicePlan,
    port: &DevicePort,
    driver: &mut D,
) -> Result<(DriverParts<D>, Generation), DriverError> {
    let (state, kept): (Vec<_>, Vec<_>) =
        service.vault.take(VAULT_PREFIX).into_iter().partition(|(name, _)| name == STATE_NAME);
    let context = OpenContext { plan, kept, port: port.clone() };
    let parts = driver.open(context).map_err(|source| DriverError::Open { device: plan.name.clone(), source })?;
    let frame_count = parts.memory.frame_count();
    let state = state.into_iter().next().map(|(_, fd)| fd);
    let generation = Generation::settle(state, parts.origin, frame_count)?;
    tracing::info!(
        device = %plan.name, frame_count, origin = ?parts.origin, generation = generation.number,
        aperture = parts.memory.aperture().is_some(), "Device is open"
    );
    Ok((parts, generation))
}

impl<D: Driver> DriverLoop<D> {
    /// Everything up to the first turn of the loop, and the wakes that came before it; `None` when told to stop.
    fn open(mut service: Service, name: &str, driver: &mut D) -> Result<Option<(Self, Vec<Wake>)>, DriverError> {
        let plan = service.plan.driver_service(name).cloned();
        let plan = plan.ok_or_else(|| DriverError::NoDevice { name: name.to_owned() })?;
        let waker = service.reactor.waker();
        let port = DevicePort::new(move || waker.wake());
        let (mut parts, generation) = open_device(&mut service, &plan, &port, driver)?;
        let frame_count = parts.memory.frame_count();
        let early = match keep_in_vault(&mut service, &parts.memory, &generation)? {
            ControlFlow::Continue(early) => early,
            ControlFlow::Break(ending) => {
                parts.queue.stop();
                end(&mut parts.memory, ending);
                return Ok(None);
            }
        };

        let len_bytes = u64::from(frame_count) * PAGE_BYTES;
        let map_all = |memory: Aperture| Window::map_aperture(memory.fd.as_fd(), memory.offset_bytes, len_bytes);
        let window = parts.memory.aperture().map(map_all).transpose();
        let window = window.map_err(|source| DriverError::Open { device: plan.name.clone(), source: source.into() })?;
        let (stats, lane) = (Stats::new(), EngineLane::new(port.clone()));
        let copies = Arc::clone(&stats.copy);
        let copy = match (parts.memory.aperture(), parts.engine) {
            (Some(_), _) => None,
            (None, Some(engine)) => {
                Some(CopyService::start(engine, frame_count, plan.staging_bytes, copies, lane.clone())?)
            }
            (None, None) => return Err(DriverError::NoCopyPath { driver: driver.name() }),
        };
        let fault_waits = service.record.histogram("device_fault_wait");
        let shown = MemoryShown {
            device: plan.id,
            generation: generation.number,
            frame_count,
            aperture: parts.memory.aperture(),
            gate: parts.memory.aperture().and_then(|_| parts.table.gate()),
        };
        let mirror = Uplink::open(&mut service, Upstream::Mirror, vec![mirror_login(plan.id)]);
        let pager_login = shown.login(copy.as_ref().map(CopyService::ring));
        let pager = Uplink::open(&mut service, Upstream::Pager, vec![pager_login]);
        let mut driver_loop = Self {
            driver_name: driver.name(),
            jobs: JobBook::new(driver.kernels()),
            accesses: AccessBook::default(),
            lane,
            window,
            service,
            plan,
            generation: generation.number,
            memory: parts.memory,
            table: parts.table,
            queue: parts.queue,
            copy,
            port,
            book: FaultBook::new(),
            stats,
            fault_waits,
            fault_begins: HashMap::new(),
            mirror,
            pager,
            conns: HashSet::new(),
            spaces: BTreeMap::new(),
            regions: BTreeMap::new(),
            asked: HashMap::new(),
            reopen: Vec::new(),
            quiescing: HashMap::new(),
            next_ticket: 0,
            suspended: HashMap::new(),
            job_timers: HashMap::new(),
            timers: HashMap::new(),
            next_timer: FIRST_TIMER,
            shown,
            ready: false,
        };
        driver_loop.after(READY_AFTER, Due::Ready);
        driver_loop.service.record.define(record::names(|each| driver_loop.tell(each)));
        Ok(Some((driver_loop, early)))
    }

    fn run(&mut self, early: Vec<Wake>) -> Result<Ending, DriverError> {
        for wake in early {
            self.on_wake(wake)?;
        }
        let mut wakes = Vec::new();
        loop {
            let timeout = self.accesses.has_work().then_some(Duration::ZERO);
            self.service.reactor.poll(timeout, &mut wakes)?;
            let idle = wakes.is_empty();
            for wake in wakes.drain(..) {
                match self.service.on_wake(&wake) {
                    Handled::Exit(ending) => return Ok(ending),
                    Handled::Yes => {}
                    Handled::No => self.on_wake(wake)?,
                }
            }
            self.device_events()?;
            self.engine_events();
            self.step_access();
            if self.service.record.is_due(idle) || timeout.is_none() {
                self.service.record.publish(|each| self.tell(each));
            }
        }
    }

    fn tell(&self, each: &mut Each<'_>) {
        self.stats.tell(self.suspended.len(), self.jobs.running(), each);
        self.memory.tell(each);
    }

    fn on_wake(&mut self, wake: Wake) -> Result<(), DriverError> {
        match wake {
            Wake::Connected { conn, .. } => {
                self.conns.insert(conn);
            }
            Wake::Closed { conn, .. } => self.client_gone(conn),
            Wake::Call { conn, call, trace, deadline, body } => self.on_call(conn, call, trace, deadline, body),
            Wake::Done { call, result, .. } => self.answered(call, result),
            Wake::Event { link, trace, body: Event::Mirror(event) } if link == self.mirror.link => {
                self.on_mirror_event(event, trace);
            }
            Wake::LinkUp { link, reconnected, .. } => self.link_up(link, reconnected),
            Wake::LinkDown { link } => self.link_down(link)?,
            Wake::Preamble { link, call, result } => self.preamble_answered(link, &call, &result),
            Wake::Timer(token) => self.timer_fired(token),
            // Device events are drained after every batch.
            _ => {}
        }
        Ok(())
    }

    /// Whoever takes a device away waits until nobody has it open or mapped: vault and pager must not. Returns when they have let go.
    pub(crate) fn let_go_of_device(&mut self) -> Result<(), DriverError> {
        let lost = Call::Pager(pager::Call::DeviceLost { device: self.plan.id });
        let mut asked = HashSet::from([
            self.service.reactor.call(self.pager.link, lost, TraceId::default(), None),
            self.service.vault.remove(&mut self.service.reactor, OPEN_DEVICE_PREFIX),
        ]);
        let deadline = Instant::now() + LET_GO_PATIENCE;
        let mut wakes = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            self.service.reactor.poll(Some(left), &mut wakes)?;
            for wake in wakes.drain(..) {
                if let Wake::Done { call, .. } = wake {
                    asked.remove(&call);
                }
            }
            if asked.is_empty() || left.is_zero() {
                return Ok(());
            }
        }
    }

    fn link_up(&mut self, link: uhmm_ipc::LinkId, reconnected: bool) {
        if link == self.pager.link && reconnected {
            self.open_spaces_again();
        }
    }

    fn link_down(&mut self, link: uhmm_ipc::LinkId) -> Result<(), DriverError> {
        if link == self.mirror.link {
            tracing::warn!("Link to the mirror lost: device faults wait");
            self.mirror.down();
        } else if link == self.pager.link {
            tracing::warn!("Link to the pager lost: migration waits");
            self.pager.down();
            if let Some(copy) = self.copy.take() {
                // The ring belonged to the lost session; the next login brings a new one.
                let engine = copy.stop().ok_or(DriverError::NoCopyPath { driver: self.driver_name })?;
                let counters = Arc::clone(&self.stats.copy);
                let (frame_count, staging_bytes) = (self.memory.frame_count(), self.plan.staging_bytes);
                self.copy = Some(CopyService::start(engine, frame_count, staging_bytes, counters, self.lane.clone())?);
                self.refresh_preambles();
            }
        }
        Ok(())
    }

    pub(crate) fn maybe_ready(&mut self) {
        if !self.ready && self.mirror.logged_in && self.pager.logged_in {
            self.ready = true;
            self.service.ready();
        }
    }

    pub(crate) fn ask_mirror(&mut self, call: mirror::Call, trace: TraceId, asked: Asked) {
        let id = self.service.reactor.call(self.mirror.link, Call::Mirror(call), trace, None);
        self.asked.insert(id, (Upstream::Mirror, asked));
    }

    pub(crate) fn ask_pager(&mut self, call: pager::Call, trace: TraceId, asked: Asked) {
        let id = self.service.reactor.call(self.pager.link, Call::Pager(call), trace, None);
        self.asked.insert(id, (Upstream::Pager, asked));
    }

    pub(crate) fn after(&mut self, wait: Duration, due: Due) -> (TimerId, TimerToken) {
        let token = TimerToken(self.next_timer);
        self.next_timer += 1;
        self.timers.insert(token, due);
        (self.service.reactor.add_timer(wait, token), token)
    }

    pub(crate) fn cancel_timer(&mut self, (timer, token): (TimerId, TimerToken)) {
        self.timers.remove(&token);
        self.service.reactor.cancel_timer(timer);
    }

    fn timer_fired(&mut self, token: TimerToken) {
        match self.timers.remove(&token) {
            Some(Due::Retry(retry)) => self.step_faults(crate::fault::FaultEvent::RetryDue(retry)),
            Some(Due::Quiesce(ticket)) => self.quiesce(ticket),
            Some(Due::Relink(upstream)) => self.relink(upstream),
            Some(Due::Reopen) => {
                for (space, token, client) in std::mem::take(&mut self.reopen) {
                    self.open_space(space, token, client, TraceId::default());
                }
            }
            Some(Due::Access(job)) => self.access_rested(job),
            Some(Due::JobDeadline(job)) => self.job_expired(job),
            Some(Due::Ready) if !self.ready => {
                self.ready = true;
                self.service.ready();
            }
            Some(Due::Ready) | None => {}
        }
    }
}

impl MemoryShown {
    pub(crate) fn login(&self, copy_ring: Option<pager::CopyRing>) -> Call {
        let login = pager::Call::DriverLogin {
            device: self.device,
            generation: self.generation,
            frame_count: self.frame_count,
            aperture: self.aperture.clone(),
            gate: self.gate.clone(),
            copy_ring,
        };
        Call::Pager(login)
    }
}

pub(crate) fn mirror_login(device: u8) -> Call {
    Call::Mirror(mirror::Call::Login { device })
}

/// Returns after the supervisor has acknowledged everything: from then on the memory outlives this process. Gives back what
/// came meanwhile (clients that connected), or why the service was told to end.
fn keep_in_vault<M: DeviceMemory>(
    service: &mut Service,
    memory: &M,
    generation: &Generation,
) -> Result<ControlFlow<Ending, Vec<Wake>>, DriverError> {
    let entries = memory.kept().into_iter().chain([(STATE_NAME.to_owned(), generation.fd.clone())]);
    let mut open: HashSet<CallId> = HashSet::new();
    for (name, fd) in entries {
        open.insert(service.vault.put(&mut service.reactor, &name, fd));
    }
    let mut early = Vec::new();
    let mut wakes = Vec::new();
    while !open.is_empty() {
        service.reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            match service.on_wake(&wake) {
                Handled::Exit(ending) => return Ok(ControlFlow::Break(ending)),
                Handled::Yes => {}
                Handled::No => match wake {
                    Wake::Done { call, result, .. } if open.remove(&call) => {
                        result.map_err(|error| DriverError::Vault { text: error.to_string() })?;
                    }
                    wake => early.push(wake),
                },
            }
        }
    }
    Ok(ControlFlow::Continue(early))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceError;

    /// Counts how often it was given back.
    struct Counting(u32);

    impl DeviceMemory for Counting {
        fn frame_count(&self) -> u32 {
            1
        }

        fn aperture(&self) -> Option<Aperture> {
            None
        }

        fn kept(&self) -> Vec<(String, uhmm_ipc::message::Fd)> {
            Vec::new()
        }

        fn give_back(&mut self) -> Result<(), DeviceError> {
            self.0 += 1;
            Err("a device that is stuck stops nobody from ending".into())
        }
    }

    #[test]
    fn a_process_that_was_replaced_gives_nothing_back() {
        let mut memory = Counting(0);
        end(&mut memory, Ending::Replaced);
        assert_eq!(memory.0, 0, "another process is at work on the device");
        end(&mut memory, Ending::ForGood);
        assert_eq!(memory.0, 1);
    }
}
