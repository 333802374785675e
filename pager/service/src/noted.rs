//! What the pager puts into its record: faults and their times, migrations and their causes, who came and went. See `uhmm_kit::record`.
//!
//! First touches and the like are counted and timed, and are no events: a program that fills its memory would push everything else out.

use std::collections::HashMap;

use uhmm_ipc::message::TraceId;
use uhmm_ipc::{CallId, ConnId};
use uhmm_kit::record::{self, HistogramId, Place, What, Why};
use uhmm_kit::{Recorder, Service};
use uhmm_pager_core::{Cause, Entry, EntryRun, PageState, Pages, RegionId, ReqId, Target, TraceKind};

use crate::service::Pager;
use crate::then::Then;
use crate::timing::{Flight, Timing, Waiting};

/// Kinds of CPU faults, each with a histogram.
pub(crate) const FAULT_KINDS: [Why; 6] = [Why::Zero, Why::Minor, Why::Protected, Why::Moving, Why::Device, Why::Lost];
/// Causes of migrations that are counted.
pub(crate) const CAUSES: [Why; 6] =
    [Why::User, Why::Prefetch, Why::CpuFault, Why::DeviceFault, Why::Eviction, Why::AddressSpace];
/// Ways of pages.
pub(crate) const WAYS: [&str; 3] = ["out", "home", "peer"];

/// See the module head.
#[derive(Debug)]
pub(crate) struct Noted {
    pub timing: Timing,
    faults: [HistogramId; FAULT_KINDS.len()],
    requests: HistogramId,
    device_faults: HistogramId,
    /// Migrations, and their pages, by cause and way.
    pub moved: [[(u64, u64); WAYS.len()]; CAUSES.len()],
    /// Clients that were told that they have their share.
    pub quota_refusals: u64,
    /// Requests that are not answered.
    pub begun: HashMap<(ConnId, CallId), record::Event>,
    /// Revocations and copies that are not through, by ticket or job.
    pub steps: HashMap<(What, u64), record::Event>,
}

impl Noted {
    pub(crate) fn new(service: &mut Service) -> Self {
        let record: &mut Recorder = &mut service.record;
        let faults = FAULT_KINDS.map(|why| record.histogram(&format!("fault;kind={}", why.name())));
        Self {
            timing: Timing::default(),
            faults,
            requests: record.histogram("request"),
            device_faults: record.histogram("device_fault"),
            moved: Default::default(),
            quota_refusals: 0,
            begun: HashMap::new(),
            steps: HashMap::new(),
        }
    }
}

impl Pager {
    /// What kind of fault it is, as the directory has it now.
    fn kind_of_fault(&self, region: RegionId, page: u64, wp: bool, minor: bool) -> Why {
        let raw = self.regions.get(region.0).map_or(0, |region| region.directory.load(page));
        let Ok(entry) = Entry::decode(raw) else { return Why::Lost };
        match entry.state() {
            PageState::MovingOut | PageState::MovingHome => Why::Moving,
            PageState::Device | PageState::Exclusive => Why::Device,
            PageState::Poisoned => Why::Lost,
            _ if wp => Why::Protected,
            _ if minor => Why::Minor,
            PageState::Absent | PageState::System | PageState::Duplicated => Why::Zero,
        }
    }

    pub(crate) fn note_fault(
        &mut self,
        space: u64,
        addr: u64,
        (region, page): (RegionId, u64),
        (wp, minor): (bool, bool),
    ) {
        let why = self.kind_of_fault(region, page, wp, minor);
        let begun_ns = record::now_ns();
        let tells = tells(why);
        let trace = if tells { TraceId::fresh().0 } else { 0 };
        let fault = Waiting { space, addr, trace, ..Waiting::new(region, page, why, begun_ns) };
        if self.noted.timing.begin(fault) && tells {
            let event = record::Event::new(What::CpuFault, begun_ns);
            self.service.record.event(&record::Event { why, trace, space, addr, pages: 1, ..event });
        }
    }

    /// The program has some pages.
    pub(crate) fn note_served(&mut self, region: RegionId, pages: Pages, moved: bool) {
        if pages.count == 0 || !self.noted.timing.has_faults() {
            return;
        }
        let Noted { timing, faults, .. } = &mut self.noted;
        let mut now_ns = 0;
        for fault in timing.served(region, pages, moved) {
            if now_ns == 0 {
                now_ns = record::now_ns();
            }
            fault_done(&mut self.service.record, faults, &fault, now_ns);
        }
    }

    /// Pages that have come home in other ways than by a fill (the client's agent moves them) are there when their entries say so.
    pub(crate) fn note_published(&mut self, region: RegionId, first: u64, entries: EntryRun) {
        if !self.noted.timing.has_faults() {
            return;
        }
        let (EntryRun::Same { entry, count } | EntryRun::Frames { entry_of_first: entry, count }) = entries;
        if entry.state() == PageState::System {
            self.note_served(region, Pages { first, count }, true);
        }
    }

    pub(crate) fn note_woken(&mut self, region: RegionId, pages: Pages) {
        if self.noted.timing.has_faults() {
            self.noted.timing.woken(region, pages, record::now_ns());
        }
    }

    /// When there is time: faults that were served by a wake-up, and the counters.
    pub(crate) fn publish_record(&mut self) {
        if self.noted.timing.has_faults() {
            let Noted { timing, faults, .. } = &mut self.noted;
            for (fault, at_ns) in timing.settled(record::now_ns()) {
                fault_done(&mut self.service.record, faults, &fault, at_ns);
            }
        }
        self.service.record.publish(|each| self.tell(each));
    }

    /// The core's word of a migration.
    pub(crate) fn note_migration(
        &mut self,
        (kind, cause, req): (TraceKind, Cause, ReqId),
        region: RegionId,
        pages: Pages,
        (space, addr): (u64, u64),
        (from, to): (Target, Target),
    ) {
        let now_ns = record::now_ns();
        let what = match kind {
            TraceKind::MigrateStart => What::MigrateStart,
            TraceKind::MigrateEnd => What::MigrateEnd,
            TraceKind::Invalidate => return,
            TraceKind::Throttle => What::Thrash,
        };
        let (why, trace) = self.cause_of(cause, req, region, pages);
        let event = record::Event { why, trace, space, addr, pages: pages.count, ..record::Event::new(what, now_ns) };
        let mut event = record::Event { from: place(from), to: place(to), ..event };
        if what == What::MigrateStart {
            self.noted.timing.depart(Flight { region, pages, why, trace, begun_ns: now_ns });
        }
        if what == What::MigrateEnd {
            if let Some(flight) = self.noted.timing.arrive(region, pages) {
                event.value = now_ns.saturating_sub(flight.begun_ns);
                (event.why, event.trace) = (flight.why, flight.trace);
            }
            let way = match (from, to) {
                (Target::Home, _) => 0,
                (_, Target::Home) => 1,
                _ => 2,
            };
            let cause = CAUSES.iter().position(|cause| *cause == event.why);
            if let Some((count, moved)) = cause.map(|cause| &mut self.noted.moved[cause][way]) {
                (*count, *moved) = (*count + 1, *moved + pages.count);
            }
        }
        self.service.record.event(&event);
    }

    fn cause_of(&self, cause: Cause, req: ReqId, region: RegionId, pages: Pages) -> (Why, u64) {
        let asked = self.requests.get(&req);
        let prefetch =
            || asked.and_then(|asked| self.groups.get(&asked.group)).is_some_and(|g| g.then == Then::Prefetched);
        let why = match cause {
            Cause::Prefetch if prefetch() => Why::Prefetch,
            Cause::Prefetch => Why::User,
            Cause::CpuFault => Why::CpuFault,
            Cause::DeviceFault => Why::DeviceFault,
            Cause::Eviction => Why::Eviction,
            Cause::AddressSpace => Why::AddressSpace,
        };
        let fault = || self.noted.timing.fault_in(region, pages).map(|fault| fault.trace);
        let trace = asked.map(|asked| asked.trace.0).or_else(fault).unwrap_or_default();
        (why, trace)
    }

    /// Something on the way of a migration or fault begins: a revocation by message, a copy by an engine.
    pub(crate) fn begin_step(&mut self, what: What, id: u64, region: RegionId, pages: Pages, at: Place) {
        let event = self.step(what, region, pages, at);
        self.service.record.event(&event);
        self.noted.steps.insert((what, id), event);
    }

    fn step(&self, what: What, region: RegionId, pages: Pages, at: Place) -> record::Event {
        let flight = self.noted.timing.flight_of(region, pages);
        let (why, trace) = flight.map_or((Why::None, 0), |flight| (flight.why, flight.trace));
        record::Event { why, trace, from: at, ..self.event_at(what, region, pages) }
    }

    /// It is through.
    pub(crate) fn end_step(&mut self, what: What, id: u64, ok: bool) {
        let Some(begun) = self.noted.steps.remove(&(what, id)) else { return };
        let time_ns = record::now_ns();
        let (what, value) = (done(what), time_ns.saturating_sub(begun.time_ns));
        let why = if ok { begun.why } else { Why::Failed };
        self.service.record.event(&record::Event { what, why, time_ns, value, ..begun });
    }

    /// A copy that the pager has done itself, since `begun_ns`.
    pub(crate) fn note_copy(&mut self, region: RegionId, pages: Pages, device: u8, begun_ns: u64) {
        let event = self.step(What::CopyDone, region, pages, Place::Device(device));
        let value = event.time_ns.saturating_sub(begun_ns);
        self.service.record.event(&record::Event { value, ..event });
    }

    /// An event about pages of a region.
    pub(crate) fn event_at(&self, what: What, region: RegionId, pages: Pages) -> record::Event {
        let shown = self.regions.showing(region.0, pages).next();
        let (space, addr) = shown.map_or((0, 0), |(segment, part)| (segment.space, segment.addr_of(part.first)));
        record::Event { space, addr, pages: pages.count, ..record::Event::new(what, record::now_ns()) }
    }

    /// A client's or device's request begins.
    pub(crate) fn begin_request(&mut self, conn: ConnId, call: CallId, event: record::Event) {
        self.service.record.event(&event);
        self.noted.begun.insert((conn, call), event);
    }

    /// It is answered.
    pub(crate) fn end_request(&mut self, conn: ConnId, call: CallId, ok: bool) {
        let Some(begun) = self.noted.begun.remove(&(conn, call)) else { return };
        let time_ns = record::now_ns();
        let value = time_ns.saturating_sub(begun.time_ns);
        let (what, histogram) = match begun.what {
            What::DeviceFault => (What::DeviceFaultDone, self.noted.device_faults),
            _ => (What::RequestDone, self.noted.requests),
        };
        let why = if ok { begun.why } else { Why::Failed };
        self.service.record.observe(histogram, value);
        self.service.record.event(&record::Event { what, why, time_ns, value, ..begun });
    }

    /// A process comes or goes.
    pub(crate) fn note_space(&mut self, what: What, space: u64, pid: u32) {
        let event = record::Event::new(what, record::now_ns());
        self.service.record.event(&record::Event { space, value: pid.into(), ..event });
    }

    /// A driver's session begins or ends.
    pub(crate) fn note_device(&mut self, what: What, device: u8, frame_count: u32) {
        let event = record::Event::new(what, record::now_ns());
        self.service.record.event(&record::Event { from: Place::Device(device), value: frame_count.into(), ..event });
    }

    /// A client was told that it has its share.
    pub(crate) fn note_refusal(&mut self, space: u64, pages: u64) {
        self.noted.quota_refusals += 1;
        let event = record::Event::new(What::QuotaRefused, record::now_ns());
        self.service.record.event(&record::Event { space, pages, ..event });
    }
}

/// Whether a fault is an event. What is not there by nothing but a first touch is not.
fn tells(why: Why) -> bool {
    matches!(why, Why::Moving | Why::Device | Why::Lost)
}

fn fault_done(record: &mut Recorder, histograms: &[HistogramId], fault: &Waiting, now_ns: u64) {
    let Waiting { why, trace, space, addr, begun_ns, .. } = *fault;
    let value = now_ns.saturating_sub(begun_ns);
    if let Some(kind) = FAULT_KINDS.iter().position(|kind| *kind == why) {
        record.observe(histograms[kind], value);
    }
    if tells(why) {
        let event = record::Event::new(What::CpuFaultDone, now_ns);
        record.event(&record::Event { why, trace, space, addr, pages: 1, value, ..event });
    }
}

fn done(what: What) -> What {
    match what {
        What::Copy => What::CopyDone,
        What::Invalidate => What::InvalidateDone,
        other => other,
    }
}

pub(crate) fn place(target: Target) -> Place {
    match target {
        Target::Home => Place::Home,
        Target::Device(device) => Place::Device(device.0),
    }
}
