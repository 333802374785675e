//! The operator's calls: state, counters, drills, shutdown. Blocking, one connection a service, used by the command line, the
//! demo and the tests.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uhmm_ipc::message::pager::{Claim, Claims, PageStatus, RegionStatus, Rest, StatusRun};
use uhmm_ipc::message::supervisor::ServiceStatus;
use uhmm_ipc::message::{
    Call, ErrorCode, Fd, Interface, Metric, Reply, Role, TraceId, WireError, common, driver, pager, supervisor,
};
use uhmm_ipc::{CallId, LinkId, Reactor, Wake};
use uhmm_kernel_hook::process::memory_available_bytes;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, PidFd};

use crate::links::{client_reactor, endpoint};
use crate::{Error, paths};

/// How long an operator waits for an answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A move that has ended, and what became of it.
pub type EndedMove = (MoveId, Result<Rested, Error>);

/// A move that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoveId(CallId);

/// What became of pages that were to leave ([`Operator::begin_move`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rested {
    /// Have left.
    pub moved_pages: u64,
    /// Nobody has touched them, and they were to stay.
    pub untouched_pages: u64,
    /// Were touched, or somebody else needs them in memory.
    pub busy_pages: u64,
    /// The device had no room, or failed.
    pub refused_pages: u64,
}

impl Rested {
    fn of(moved_pages: u64, runs: &[StatusRun]) -> Self {
        let with = |status| pages_with(runs, status);
        Self {
            moved_pages,
            untouched_pages: with(PageStatus::NotSelected),
            busy_pages: with(PageStatus::Busy) + with(PageStatus::Pinned),
            refused_pages: with(PageStatus::NoMemory) + with(PageStatus::Io),
        }
    }
}

/// A service that a drill killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// Its incarnation.
    pub incarnation: u32,
    /// Its pid.
    pub pid: u32,
}

/// An operator's connections. Calls that a restart interrupts are repeated; every call ends within ten seconds, but those that move pages.
pub struct Operator {
    run_dir: PathBuf,
    reactor: Reactor,
    links: HashMap<String, LinkId>,
    patience: Duration,
    /// Moves that are under way, and those that have ended since somebody asked.
    moving: HashSet<CallId>,
    moved: Vec<(CallId, Result<Reply, WireError>)>,
}

impl Operator {
    /// Prepares connections to the services in `run_dir` (default: see [`run_dir`](crate::run_dir)).
    ///
    /// # Errors
    /// [`Error::NotRunning`] when no supervisor has been started there.
    pub fn connect(run_dir: Option<&Path>) -> Result<Self, Error> {
        let run_dir = paths::run_dir(run_dir);
        if !paths::has_service(&run_dir, "supervisor")? {
            return Err(Error::NotRunning { run_dir });
        }
        let reactor = client_reactor(Role::Operator)?;
        let (links, moving, moved) = (HashMap::new(), HashSet::new(), Vec::new());
        Ok(Self { run_dir, reactor, links, patience: ANSWER_DEADLINE, moving, moved })
    }

    /// How long an answer is waited for, instead of ten seconds. A service that is being started again answers when it can.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// What a service has recorded of itself, living or dead: a memfd that can be read (`uhmm_shared::record`).
    pub fn record(&mut self, service: &str) -> Result<Fd, Error> {
        match self.ask("supervisor", Call::Supervisor(supervisor::Call::Record { service: service.into() }))? {
            Reply::Supervisor(supervisor::Reply::Record(fd)) => Ok(fd),
            _ => Err(Error::StrangeReply { question: "Record" }),
        }
    }

    /// Where a region's pages are, in so many cells of equal size (fewer, where it has fewer pages).
    pub fn strip(&mut self, region: u64, cells: u16) -> Result<Vec<u8>, Error> {
        match self.ask("pager", Call::Pager(pager::Call::Strip { region, cells }))? {
            Reply::Pager(pager::Reply::Strip(cells)) => Ok(cells),
            _ => Err(Error::StrangeReply { question: "Strip" }),
        }
    }

    /// Moves all of a region as its owner could: to a device, or home (`None`). Returns how many pages moved.
    pub fn move_region(&mut self, region: u64, device: Option<u8>) -> Result<u64, Error> {
        let target = device.map_or(pager::Target::Home, pager::Target::Device);
        let call = Call::Pager(pager::Call::MoveRegion { region, target });
        match self.converse("pager", call, false, None)? {
            Some(Reply::Pager(pager::Reply::Migrated { moved_pages, .. })) => Ok(moved_pages),
            Some(Reply::Pager(pager::Reply::Done)) => Ok(0),
            _ => Err(Error::StrangeReply { question: "MoveRegion" }),
        }
    }

    /// Moves what of a process is managed in a range of its addresses, as it could itself: to a device, or home (`None`). Returns how many
    /// pages moved. Parts that are not managed are no error.
    pub fn move_range(&mut self, process: &PidFd, range: AddrRange, device: Option<u8>) -> Result<u64, Error> {
        let target = device.map_or(pager::Target::Home, pager::Target::Device);
        let call = range_call(process, range, target, None);
        match self.converse("pager", call, false, None)? {
            Some(Reply::Pager(pager::Reply::Migrated { moved_pages, .. })) => Ok(moved_pages),
            Some(Reply::Pager(pager::Reply::Done)) => Ok(0),
            _ => Err(Error::StrangeReply { question: "MoveRange" }),
        }
    }

    /// Begins to move such a range to a device: [`Operator::moves_done`] tells what became of it. With `rest`, private pages go only if nobody touches
    /// them for `rest.ms`: they are out of the program's reach for so long, and who touches one has it back at once. With `rest.stays` that is
    /// all, and the answer only says what could have gone. Shared memory does not rest.
    pub fn begin_move(
        &mut self,
        process: &PidFd,
        range: AddrRange,
        device: u8,
        rest: Option<Rest>,
    ) -> Result<MoveId, Error> {
        let link = self.link("pager")?;
        let call = range_call(process, range, pager::Target::Device(device), rest);
        let id = self.reactor.call(link, call, TraceId::fresh(), None);
        self.moving.insert(id);
        Ok(MoveId(id))
    }

    /// Moves that have ended. Waits for the first one as long as `timeout` says, if any is under way.
    pub fn moves_done(&mut self, timeout: Duration) -> Result<Vec<EndedMove>, Error> {
        let end = Instant::now() + timeout;
        let mut wakes = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if !self.moved.is_empty() || self.moving.is_empty() {
                break;
            }
            self.reactor.poll(Some(left), &mut wakes)?;
            wakes.drain(..).for_each(|wake| self.note_move(wake));
            if left.is_zero() {
                break;
            }
        }
        let moved = std::mem::take(&mut self.moved);
        if moved.iter().any(|(_, result)| result.as_ref().is_err_and(|error| error.code == ErrorCode::Permission)) {
            self.links.remove("pager");
        }
        let rested = |result: Result<Reply, WireError>| match result {
            Ok(Reply::Pager(pager::Reply::Migrated { moved_pages, runs, .. })) => Ok(Rested::of(moved_pages, &runs)),
            Ok(Reply::Pager(pager::Reply::Done)) => Ok(Rested::default()),
            Ok(_) => Err(Error::StrangeReply { question: "MoveRange" }),
            Err(error) => Err(error.into()),
        };
        Ok(moved.into_iter().map(|(id, result)| (MoveId(id), rested(result))).collect())
    }

    fn note_move(&mut self, wake: Wake) {
        if let Wake::Done { call, result, .. } = wake
            && self.moving.remove(&call)
        {
            self.moved.push((call, result));
        }
    }

    /// State of every service, in start order.
    pub fn status(&mut self) -> Result<Vec<ServiceStatus>, Error> {
        match self.ask("supervisor", Call::Supervisor(supervisor::Call::Status))? {
            Reply::Supervisor(supervisor::Reply::Status(services)) => Ok(services),
            _ => Err(Error::StrangeReply { question: "Status" }),
        }
    }

    /// Counters of one service: `supervisor`, `pager`, `mirror` or a device's name.
    pub fn stats(&mut self, service: &str) -> Result<Vec<Metric>, Error> {
        match self.ask(service, Call::Common(common::Call::Stats))? {
            Reply::Common(common::Reply::Stats(metrics)) => Ok(metrics),
            _ => Err(Error::StrangeReply { question: "Stats" }),
        }
    }

    /// Kills one service with SIGKILL, as a drill.
    pub fn kill(&mut self, service: &str) -> Result<Killed, Error> {
        match self.ask("supervisor", Call::Supervisor(supervisor::Call::Kill { service: service.into() }))? {
            Reply::Supervisor(supervisor::Reply::Killed { incarnation, pid }) => Ok(Killed { incarnation, pid }),
            _ => Err(Error::StrangeReply { question: "Kill" }),
        }
    }

    /// Every region of every process, and where its pages are.
    pub fn regions(&mut self) -> Result<Vec<RegionStatus>, Error> {
        match self.ask("pager", Call::Pager(pager::Call::ListRegions))? {
            Reply::Pager(pager::Reply::Regions(regions)) => Ok(regions),
            _ => Err(Error::StrangeReply { question: "ListRegions" }),
        }
    }

    /// Brings every page of a process home and keeps it there, or lets it leave again. Returns how many pages came.
    pub fn home(&mut self, pid: u32, stay: bool) -> Result<u64, Error> {
        // Its number may be another one where the pager runs.
        let process = PidFd::open(pid).and_then(|pidfd| pidfd.name()).unwrap_or(0);
        self.evicted(pager::Call::Home { pid, stay, process })
    }

    /// Id of a device in the plan, by its name.
    pub fn device_id(&mut self, name: &str) -> Result<u8, Error> {
        match self.ask(name, Call::Driver(driver::Call::Info))? {
            Reply::Driver(driver::Reply::Info { device, .. }) => Ok(device),
            _ => Err(Error::StrangeReply { question: "Info" }),
        }
    }

    /// Brings every page of every process home from a device. Devices may fetch pages again.
    pub fn empty_device(&mut self, device: u8) -> Result<u64, Error> {
        self.evicted(pager::Call::EmptyDevice { device, then: pager::Emptied::Unchanged })
    }

    /// The same, and no page comes to the device any more, until [`Operator::undrain`].
    ///
    /// # Errors
    /// [`Error::NoRoomAtHome`]: this machine has no memory for all that is there; nothing has changed then.
    pub fn drain(&mut self, device: u8) -> Result<u64, Error> {
        fits(self.pages_on(device)? * PAGE_SIZE, memory_available_bytes())?;
        let mut moved = 0;
        // What was on its way there when the device was closed arrives all the same.
        loop {
            let came = self.evicted(pager::Call::EmptyDevice { device, then: pager::Emptied::Closed })?;
            moved += came;
            if came == 0 || self.pages_on(device)? == 0 {
                break;
            }
        }
        match self.pages_on(device)? {
            0 => Ok(moved),
            pages => Err(Error::NotEmpty { pages }),
        }
    }

    /// Pages may come to a device again.
    pub fn undrain(&mut self, device: u8) -> Result<(), Error> {
        self.evicted(pager::Call::EmptyDevice { device, then: pager::Emptied::Opened }).map(drop)
    }

    /// Gives out a claim: who shows its token has its shares of devices. Absolute: a claim of the same id is replaced.
    pub fn set_claim(&mut self, claim: &Claim) -> Result<(), Error> {
        self.done(pager::Call::SetClaim(claim.clone()), "SetClaim")
    }

    /// Takes a claim back, if there is one: its processes keep what they have on devices and get no more.
    pub fn remove_claim(&mut self, id: &str) -> Result<(), Error> {
        self.done(pager::Call::RemoveClaim { id: id.to_owned() }, "RemoveClaim")
    }

    /// Every claim, without its token, and what there is of devices.
    pub fn claims(&mut self) -> Result<Claims, Error> {
        let mut all = Claims::default();
        loop {
            let after = all.claims.last().map_or_else(String::new, |claim| claim.id.clone());
            match self.ask("pager", Call::Pager(pager::Call::ListClaims { after }))? {
                Reply::Pager(pager::Reply::Claims(mut page)) => {
                    let more = page.more && !page.claims.is_empty();
                    page.claims.splice(0..0, all.claims);
                    all = Claims { more, ..page };
                    if !more {
                        return Ok(all);
                    }
                }
                _ => return Err(Error::StrangeReply { question: "ListClaims" }),
            }
        }
    }

    fn done(&mut self, call: pager::Call, question: &'static str) -> Result<(), Error> {
        match self.ask("pager", Call::Pager(call))? {
            Reply::Pager(pager::Reply::Done) => Ok(()),
            _ => Err(Error::StrangeReply { question }),
        }
    }

    /// How many pages of all processes are there.
    fn pages_on(&mut self, device: u8) -> Result<u64, Error> {
        let on = |region: &RegionStatus| region.device_pages.get(usize::from(device)).copied().unwrap_or(0);
        Ok(self.regions()?.iter().map(on).sum())
    }

    /// Pages take the time that they take.
    fn evicted(&mut self, call: pager::Call) -> Result<u64, Error> {
        match self.converse("pager", Call::Pager(call), false, None)? {
            Some(Reply::Pager(pager::Reply::Evicted { page_count })) => Ok(page_count),
            _ => Err(Error::StrangeReply { question: "Home" }),
        }
    }

    /// Stops all services and the supervisor. Returns when the supervisor has agreed or its connection is gone.
    pub fn shutdown(mut self) -> Result<(), Error> {
        match self.converse("supervisor", Call::Supervisor(supervisor::Call::Shutdown), true, Some(ANSWER_DEADLINE))? {
            None | Some(Reply::Supervisor(supervisor::Reply::Done)) => Ok(()),
            Some(_) => Err(Error::StrangeReply { question: "Shutdown" }),
        }
    }

    fn ask(&mut self, service: &str, call: Call) -> Result<Reply, Error> {
        self.converse(service, call, false, Some(self.patience))?.ok_or(Error::AgentGone)
    }

    /// One call and its answer. With `last`, losing the connection is an answer too (`None`).
    fn converse(
        &mut self,
        service: &str,
        call: Call,
        last: bool,
        deadline: Option<Duration>,
    ) -> Result<Option<Reply>, Error> {
        let link = self.link(service)?;
        let answer = self.answer(link, call, last, deadline);
        if answer.as_ref().is_err_and(|error| error.code() == ErrorCode::Permission) {
            // Another system in the same place has another key: the next call asks for it.
            self.links.remove(service);
        }
        answer
    }

    fn answer(
        &mut self,
        link: LinkId,
        call: Call,
        last: bool,
        deadline: Option<Duration>,
    ) -> Result<Option<Reply>, Error> {
        let id = self.reactor.call(link, call, TraceId::fresh(), deadline);
        let mut wakes = Vec::new();
        loop {
            self.reactor.poll(None, &mut wakes)?;
            let mut answer = None;
            // All of them: what moves have come to is told once.
            for wake in wakes.drain(..) {
                match wake {
                    Wake::Done { call, result, .. } if call == id => answer = Some(result.map(Some)),
                    Wake::LinkDown { link: lost } if last && lost == link => answer = answer.or(Some(Ok(None))),
                    other => self.note_move(other),
                }
            }
            if let Some(answer) = answer {
                return Ok(answer?);
            }
        }
    }

    /// What makes an operator of a service: the supervisor gives it to whoever may come to it.
    fn key(&mut self, socket: &Path) -> Result<Vec<u8>, Error> {
        let socket = socket.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match self.ask("supervisor", Call::Supervisor(supervisor::Call::OperatorKey { socket }))? {
            Reply::Supervisor(supervisor::Reply::Key(key)) => Ok(key),
            _ => Err(Error::StrangeReply { question: "OperatorKey" }),
        }
    }

    fn link(&mut self, service: &str) -> Result<LinkId, Error> {
        if let Some(link) = self.links.get(service) {
            return Ok(*link);
        }
        if !paths::valid_name(service) || !paths::has_service(&self.run_dir, service)? {
            return Err(Error::NoSuchService { service: service.into(), run_dir: self.run_dir.clone() });
        }
        let mut endpoint = endpoint(&self.run_dir, service);
        if endpoint.interface != Interface::Supervisor {
            endpoint.key = self.key(&endpoint.path)?;
        }
        let link = self.reactor.link(endpoint);
        self.links.insert(service.into(), link);
        Ok(link)
    }
}

fn range_call(process: &PidFd, range: AddrRange, target: pager::Target, rest: Option<Rest>) -> Call {
    let pid = process.pid().ok().flatten().unwrap_or(0);
    let (process, addr, len_bytes) = (process.name().unwrap_or(0), range.start, range.len);
    Call::Pager(pager::Call::MoveRange { pid, process, addr, len_bytes, target, rest })
}

fn pages_with(runs: &[StatusRun], status: PageStatus) -> u64 {
    runs.iter().filter(|run| run.status == status).map(|run| run.page_count).sum()
}

/// Where the kernel does not say what there is, it is tried.
fn fits(away_bytes: u64, free_bytes: Option<u64>) -> Result<(), Error> {
    match free_bytes {
        Some(free_bytes) if free_bytes < away_bytes => Err(Error::NoRoomAtHome { away_bytes, free_bytes }),
        _ => Ok(()),
    }
}

/// [`Operator::status`] on a connection of its own.
pub fn status(run_dir: Option<&Path>) -> Result<Vec<ServiceStatus>, Error> {
    Operator::connect(run_dir)?.status()
}

/// [`Operator::stats`] on a connection of its own.
pub fn stats(run_dir: Option<&Path>, service: &str) -> Result<Vec<Metric>, Error> {
    Operator::connect(run_dir)?.stats(service)
}

/// [`Operator::kill`] on a connection of its own.
pub fn kill(run_dir: Option<&Path>, service: &str) -> Result<Killed, Error> {
    Operator::connect(run_dir)?.kill(service)
}

/// [`Operator::shutdown`] on a connection of its own.
pub fn shutdown(run_dir: Option<&Path>) -> Result<(), Error> {
    Operator::connect(run_dir)?.shutdown()
}

/// [`Operator::regions`] on a connection of its own.
pub fn regions(run_dir: Option<&Path>) -> Result<Vec<RegionStatus>, Error> {
    Operator::connect(run_dir)?.regions()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let here = memory_available_bytes().expect("the kernel says it");
        assert!(here > 1 << 20 && fits(here, Some(here)).is_ok() && fits(u64::MAX, None).is_ok());
        let text = fits(here + 1, Some(here)).expect_err("too much").to_string();
        assert!(text.contains(&here.to_string()) && text.contains(&(here + 1).to_string()), "{text}");
    }

    #[test]
    fn without_a_supervisor_the_error_names_the_place() {
        let dir = std::env::temp_dir().join(format!("uhmm-sdk-none-{}", std::process::id()));
        let error = status(Some(&dir)).unwrap_err();
        assert!(matches!(&error, Error::NotRunning { run_dir } if *run_dir == dir), "{error}");
        assert!(error.to_string().contains("uhmm up"));
    }
}
