//! The link thread: one thread of the SDK that talks to the services, so that every app thread can wait in its own way.
//!
//! ```text
//!   app threads --- Command ---> channel + summons ---> link thread: Reactor --- links ---> pager, drivers
//!        ^                                                   |
//!        +------------------ Pending<T> <--------- Done / Preamble / LinkDown
//! ```
//!
//! **Nobody needs it for a page to move or come home**: the agent, a process of its own (`agent.rs`), takes its orders from the pager through
//! memory, and faults are the pager's. (One exception: frames of coherent devices are mapped by this thread, see `frames.rs`.)
//!
//! **It lives in the program and shares as little with it as a thread can** (`uhmm_kernel_hook::secluded`): all signals are blocked, and
//! descriptors and working directory are its own. So whatever needs a descriptor of the SDK's runs here ([`Links::ask`],
//! [`Links::call_made`]), a descriptor that an app thread must know of is a [`Held`], and nothing of the program's may run here: callbacks
//! and log records go to the callback thread (`callbacks.rs`).
//!
//! After a restart of a service its link connects again, sends the preamble (who we are: `AttachSpace` or `OpenQueue`) and then,
//! in order, every idempotent call that was not answered. The preamble of the pager begins as `OpenSpace` and becomes
//! `AttachSpace` when the space's token is known.

mod abandoned;
mod closing;
mod held;
mod introduced;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Call, Event, Fd, Reply, Role, TraceId, driver, pager};
use uhmm_ipc::{CallId, Endpoint, FdToken, Identity, Limits, LinkId, Reactor, TimerToken, Wake};
use uhmm_kernel_hook::secluded::{self, LifeWatch, Summons, SummonsFd};
use uhmm_kernel_hook::{AddrRange, UffdKind, UffdState, Userfaultfd, fatal, signal};

use crate::Error;
use crate::agent::{AgentHost, AgentKind};
use crate::callbacks;
use crate::child::Sentinel;
use crate::frames::{Allocations, Frames, Order};
use crate::own::{self, Noted};
use crate::pending::{Completer, Pending, pair};
use crate::validation::{Validated, Validations};
pub(crate) use closing::Left;
use closing::{Closing, Goodbye, Standing};
pub(crate) use held::Held;
use introduced::clone_of;

/// Name of the thread.
pub(crate) const LINK_THREAD: &str = "uhmm-links";
const SUMMONS: FdToken = FdToken(1);
const AGENT: FdToken = FdToken(2);
const AGENT_ROOM: TimerToken = TimerToken(1);
const LOOK: TimerToken = TimerToken(2);

/// Turns an answer into what the app asked for and delivers it.
pub(crate) type Deliver = Box<dyn FnOnce(Result<Reply, Error>) + Send>;
/// Makes a call from what lives on the link thread.
pub(crate) type Make = Box<dyn FnOnce(&mut Loop) -> Result<Call, Error> + Send>;

/// Which service a call is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    Pager,
    Driver(String),
}

/// What `OpenSpace` brought.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub(crate) id: u64,
    pub(crate) token: Vec<u8>,
    pub(crate) features: u64,
}

enum Command {
    OpenDriver {
        name: String,
        space: u64,
        token: Vec<u8>,
    },
    Call {
        peer: Peer,
        make: Make,
        trace: TraceId,
        deadline: Option<Duration>,
        deliver: Deliver,
    },
    /// A call to a driver for which the pager first takes back what devices may not do any more.
    Validated {
        driver: String,
        /// What the device will use; nothing: anything.
        range: Option<AddrRange>,
        make: Make,
        trace: TraceId,
        deadline: Option<Duration>,
        deliver: Deliver,
    },
    /// Whatever needs the thread's own descriptors.
    Do(Box<dyn FnOnce(&mut Loop) + Send>),
    /// The session is over.
    Close(Goodbye),
}

/// The app's side of the thread, until [`Links::close`].
pub(crate) struct Links {
    commands: Sender<Command>,
    summons: Summons,
    life: LifeWatch,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// How this process introduces itself to the pager.
pub(crate) enum Identification {
    /// As a new client.
    Open { nonce: u64 },
    /// As the child that a client has forked.
    Child { space: u64, token: Vec<u8> },
}

/// What the thread needs to begin.
pub(crate) struct Introduction {
    pub(crate) run_dir: PathBuf,
    pub(crate) who: Identification,
    pub(crate) sentinel: Sentinel,
    /// What the session allocates.
    pub(crate) allocations: Arc<Allocations>,
}

/// What a thread that has begun says of itself.
struct Started {
    summons: Summons,
    life: LifeWatch,
    kind: UffdKind,
}

impl Links {
    /// Starts the thread; the answer to `OpenSpace` arrives in the second value. Third: what this process's userfaultfd can do.
    pub(crate) fn start(introduction: Introduction) -> Result<(Self, Pending<Space>, UffdKind), Error> {
        callbacks::ensure_started_for_logs()?;
        let (commands, inbox) = mpsc::channel();
        let (started, has_started) = mpsc::channel();
        let (opened, space) = pair(TraceId::fresh(), None);
        let body = move || {
            let _logs = callbacks::forward_logs();
            match Loop::new(introduction, inbox, opened) {
                Ok((mut links, about)) => {
                    if started.send(Ok(about)).is_ok() {
                        links.run();
                    }
                    links.end();
                }
                Err(error) => drop(started.send(Err(error))),
            }
        };
        // No signal of the program's ever lands there.
        let spawned = signal::with_all_blocked(|| std::thread::Builder::new().name(LINK_THREAD.into()).spawn(body));
        let thread = spawned.map_err(Error::kernel("Blocking signals"))?.map_err(Error::Thread)?;
        let Started { summons, life, kind } = has_started.recv().map_err(|_| Error::AgentGone)??;
        let space = space.watched(life.clone());
        Ok((Self { commands, summons, life, thread: Mutex::new(Some(thread)) }, space, kind))
    }

    /// Asks a driver to work for the space from now on. Calls that follow wait until it answers.
    pub(crate) fn open_driver(&self, name: &str, space: &Space) {
        self.send(Command::OpenDriver { name: name.to_owned(), space: space.id, token: space.token.clone() });
    }

    /// Sends a call without descriptors; `convert` runs on the link thread and picks the answer apart.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        peer: Peer,
        call: Call,
        deadline: Option<Duration>,
        convert: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        self.call_made(peer, |_| Ok(call), deadline, convert)
    }

    /// [`Links::call`], of a call that is made on the link thread: its descriptors are opened there or [held](Links::hold).
    pub(crate) fn call_made<T: Send + 'static>(
        &self,
        peer: Peer,
        make: impl FnOnce(&mut Loop) -> Result<Call, Error> + Send + 'static,
        deadline: Option<Duration>,
        convert: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let (pending, trace, deliver) = self.answer_to(convert);
        self.send(Command::Call { peer, make: Box::new(make), trace, deadline, deliver });
        pending
    }

    /// [`Links::call_made`] to a driver, which uses `range` (nothing: any of the process's memory). The pager is asked first, so that the
    /// device does nothing there that the program may not do by now itself. Calls to one driver keep their order.
    pub(crate) fn call_validated<T: Send + 'static>(
        &self,
        driver: &str,
        range: Option<AddrRange>,
        make: impl FnOnce(&mut Loop) -> Result<Call, Error> + Send + 'static,
        deadline: Option<Duration>,
        convert: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let (pending, trace, deliver) = self.answer_to(convert);
        let driver = driver.to_owned();
        self.send(Command::Validated { driver, range, make: Box::new(make), trace, deadline, deliver });
        pending
    }

    fn answer_to<T: Send + 'static>(
        &self,
        convert: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
    ) -> (Pending<T>, TraceId, Deliver) {
        let trace = TraceId::fresh();
        let (completer, pending): (Completer<T>, _) = pair(trace, Some(self.life.clone()));
        let sent = Instant::now();
        let deliver = Box::new(move |result: Result<Reply, Error>| {
            let elapsed_us = sent.elapsed().as_micros() as u64;
            match &result {
                Ok(_) => tracing::debug!(trace = format_args!("{:016x}", trace.0), elapsed_us, "Call answered"),
                Err(error) => {
                    tracing::debug!(trace = format_args!("{:016x}", trace.0), elapsed_us, %error, "Call failed");
                }
            }
            completer.complete(result.and_then(convert));
        });
        (pending, trace, deliver)
    }

    /// Does something on the link thread and waits for it.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Loop) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (completer, pending) = pair(TraceId::default(), Some(self.life.clone()));
        self.send(Command::Do(Box::new(move |links: &mut Loop| completer.complete(what(links)))));
        pending.wait()
    }

    /// The link thread is asked before a signal ends the process that dumps core.
    pub(crate) fn ask_before_fatal_signals(&self, patience: Duration) -> Result<(), Error> {
        // It lives, and knows that it may be asked.
        self.ask(|_| Ok(()))?;
        fatal::ask_before(self.summons, patience).map(drop).map_err(Error::kernel("Handling fatal signals"))
    }

    /// A command that cannot be delivered is dropped, and its completer answers `AgentGone`.
    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok()
            && let Err(error) = self.summons.call()
        {
            tracing::error!(%error, "The link thread cannot be woken");
        }
    }
}

/// What lives on the link thread.
pub(crate) struct Loop {
    reactor: Reactor,
    run_dir: PathBuf,
    inbox: Receiver<Command>,
    summons: SummonsFd,
    pager: LinkId,
    drivers: HashMap<String, LinkId>,
    waiting: HashMap<(LinkId, CallId), Deliver>,
    validations: Validations,
    opening: Option<Completer<Space>>,
    /// Who we are, for a forked child.
    child: Option<(u64, Vec<u8>)>,
    /// Never closed before the last region is gone: without any reference left the kernel would turn every page that is on a device
    /// into zeros. (The agent and the vault have one too.)
    uffd: Option<Userfaultfd>,
    sentinel: Sentinel,
    /// Its entry in the registry of what is never managed for the program.
    _sentinel_noted: Noted,
    held: HashMap<u64, Fd>,
    agent: AgentHost,
    frames: Frames,
    standing: Standing,
    goodbye: Option<Closing>,
}

impl Loop {
    fn new(
        introduction: Introduction,
        inbox: Receiver<Command>,
        opened: Completer<Space>,
    ) -> Result<(Self, Started), Error> {
        let Introduction { run_dir, who, sentinel, allocations } = introduction;
        seclude();
        let (summons_fd, summons) = SummonsFd::new().map_err(Error::kernel("Making the link thread's signalfd"))?;
        let mut reactor = client_reactor(Role::Client)?;
        reactor.add_fd(&summons_fd, SUMMONS)?;
        let pager = reactor.link(endpoint(&run_dir, "pager"));
        let mut agent = AgentHost::new()?;
        let life = agent.life();
        let sentinel_addr = sentinel.range().start;
        let links_dir = run_dir.clone();
        let links = |uffd, child, frames, agent| Self {
            reactor,
            run_dir,
            inbox,
            summons: summons_fd,
            pager,
            drivers: HashMap::new(),
            waiting: HashMap::new(),
            validations: Validations::default(),
            opening: Some(opened),
            child,
            uffd,
            _sentinel_noted: own::note(sentinel.range(), "uhmm's sentinel page"),
            sentinel,
            held: HashMap::new(),
            agent,
            frames,
            standing: Standing::default(),
            goodbye: None,
        };
        let (mut links, hello, kind) = match who {
            Identification::Open { nonce } => {
                let device = introduced::userfaultfd_device(&links_dir)?;
                let (uffd, kind) = Userfaultfd::create(device.as_ref().map(AsFd::as_fd))
                    .map_err(Error::kernel("Making this process's userfaultfd"))?;
                agent.start(&uffd)?;
                let sent = clone_of(&uffd)?.into_fd();
                let frames = Frames::new(Some(clone_of(&uffd)?), allocations);
                let (full, memory) = (kind == UffdKind::Full, agent.memory()?);
                let (uffd_sent, claim) = (Arc::new(sent), crate::paths::claim()?);
                let open = pager::Call::OpenSpace { nonce, uffd: uffd_sent, full, sentinel_addr, agent: memory, claim };
                (links(Some(uffd), None, frames, agent), open, kind)
            }
            Identification::Child { space, token } => {
                // Its userfaultfd comes with the answer, and then its agent begins.
                let attach = pager::Call::AttachSpace { space, token: token.clone(), agent: Some(agent.memory()?) };
                let frames = Frames::new(None, allocations);
                (links(None, Some((space, token)), frames, agent), attach, UffdKind::Full)
            }
        };
        links.reactor.set_preamble(pager, vec![Call::Pager(hello)]);
        links.watch_agent()?;
        Ok((links, Started { summons, life, kind }))
    }

    fn run(&mut self) {
        let mut wakes = Vec::new();
        loop {
            if !self.take_commands() {
                return;
            }
            if let Err(error) = self.reactor.poll(None, &mut wakes) {
                tracing::error!(%error, "The link thread's event loop failed");
                return;
            }
            for wake in wakes.drain(..) {
                self.on_wake(wake);
            }
        }
    }

    /// False when the session is over.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Command::OpenDriver { name, space, token }) => self.open_driver(name, space, token),
                Ok(Command::Call { peer, make, trace, deadline, deliver }) => match make(self) {
                    Ok(call) => self.send(peer, call, trace, deadline, deliver),
                    Err(error) => deliver(Err(error)),
                },
                Ok(Command::Validated { deliver, .. }) if self.standing.abandoned => {
                    deliver(Err(self.nobody_serves()));
                }
                Ok(Command::Validated { driver, range, make, trace, deadline, deliver }) => {
                    if self.validations.stands(&driver, range, self.agent.view()) {
                        match make(self) {
                            Ok(call) => self.send(Peer::Driver(driver), call, trace, deadline, deliver),
                            Err(error) => deliver(Err(error)),
                        }
                        continue;
                    }
                    let (addr, len_bytes) = range.map_or((0, 0), |range| (range.start, range.len));
                    let revalidate = Call::Pager(pager::Call::Revalidate { addr, len_bytes });
                    let id = self.reactor.call(self.pager, revalidate, trace, deadline);
                    let until = deadline.map(|deadline| Instant::now() + deadline);
                    let view = self.agent.view();
                    self.validations.asked(id, range, view, Validated { driver, make, trace, until, deliver });
                }
                Ok(Command::Do(what)) => what(self),
                Ok(Command::Close(goodbye)) => self.say_goodbye(goodbye),
                Err(TryRecvError::Empty) => return !self.is_over(),
                Err(TryRecvError::Disconnected) => return self.goodbye.is_some() && !self.is_over(),
            }
        }
    }

    /// Whether the pager has read all that this process's threads have told by munmap, mremap and fork.
    pub(crate) fn uffd_state(&self) -> Result<UffdState, Error> {
        if self.standing.abandoned {
            return Err(self.nobody_serves());
        }
        let state = self.uffd.as_ref().map(Userfaultfd::state);
        state.unwrap_or(Ok(UffdState::Quiet)).map_err(Error::kernel("Asking for unread events"))
    }

    /// This process's userfaultfd; a forked child has none before it is attached.
    pub(crate) fn uffd(&self) -> Option<&Userfaultfd> {
        self.uffd.as_ref()
    }

    /// What is allocated can be exchanged for frames from now on.
    pub(crate) fn frames(&mut self) -> &mut Frames {
        &mut self.frames
    }

    /// Test hook.
    pub(crate) fn pause_agent(&self, duration: Duration) -> Result<(), Error> {
        self.agent.pause(duration)
    }

    /// Who carries out the pager's orders.
    pub(crate) fn agent_kind(&self) -> AgentKind {
        self.agent.kind()
    }

    fn open_driver(&mut self, name: String, space: u64, token: Vec<u8>) {
        let (reactor, run_dir) = (&mut self.reactor, &self.run_dir);
        self.drivers.entry(name).or_insert_with_key(|name| {
            let link = reactor.link(endpoint(run_dir, name));
            reactor.set_preamble(link, vec![Call::Driver(driver::Call::OpenQueue { space, token })]);
            link
        });
    }

    fn send(&mut self, peer: Peer, call: Call, trace: TraceId, deadline: Option<Duration>, deliver: Deliver) {
        let link = match &peer {
            Peer::Pager => Some(self.pager),
            Peer::Driver(name) => self.drivers.get(name).copied(),
        };
        let Some(link) = link else { return deliver(Err(Error::AgentGone)) };
        if self.standing.abandoned {
            return deliver(Err(self.nobody_serves()));
        }
        tracing::debug!(trace = format_args!("{:016x}", trace.0), ?peer, call = call_name(&call), "Call sent");
        let id = self.reactor.call(link, call, trace, deadline);
        self.waiting.insert((link, id), deliver);
    }

    fn on_wake(&mut self, wake: Wake) {
        match wake {
            Wake::Fd(SUMMONS) => {
                self.summons.drain();
                if fatal::was_asked() {
                    self.home_before_the_end();
                }
            }
            Wake::Fd(AGENT) => self.agent_ended(),
            Wake::Timer(AGENT_ROOM) => self.start_agent_again(),
            Wake::Timer(LOOK) => self.look_for_pager(),
            Wake::Done { link, call, result } if link == self.pager && self.validations.answered(call, &result) => {
                self.send_validated();
            }
            Wake::Done { link, call, result } if link == self.pager && self.is_goodbye(call) => {
                self.goodbye_answered(result)
            }
            Wake::Done { link, call, result } => {
                if let Some(deliver) = self.waiting.remove(&(link, call)) {
                    deliver(result.map_err(Error::from));
                }
            }
            Wake::Event { link, body: Event::Pager(event), .. } if link == self.pager => self.on_order(event),
            Wake::Preamble { link, result, .. } if link == self.pager => self.on_introduced(result),
            Wake::Preamble {
                result: Ok(Reply::Driver(driver::Reply::QueueOpened { coherent: Some(memory) })), ..
            } => {
                self.frames.know_aperture(memory);
            }
            Wake::Preamble { result: Err(error), .. } => tracing::warn!(%error, "A driver refused this session"),
            // Before the first connection there is no call that could be told, and who waits for the session would hear that nobody answers.
            Wake::Refused { link, error } if link == self.pager && self.opening.is_some() => {
                self.on_introduced(Err(error));
            }
            Wake::LinkUp { link, reconnected, .. } => {
                if link == self.pager {
                    self.pager_is_back();
                }
                if reconnected {
                    tracing::info!(service = self.name_of(link), "Reconnected");
                }
            }
            Wake::LinkDown { link } => {
                if link == self.pager {
                    self.pager_is_away();
                }
                tracing::info!(service = self.name_of(link), "Connection lost");
            }
            _ => {}
        }
    }

    fn send_validated(&mut self) {
        while let Some((Validated { driver, make, trace, until, deliver }, refused)) = self.validations.next() {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            match refused.map_or_else(|| make(self), |error| Err(error.into())) {
                Ok(call) => self.send(Peer::Driver(driver), call, trace, left, deliver),
                Err(error) => deliver(Err(error)),
            }
        }
    }

    /// A fatal signal is about to end the process: its core dump cannot wait for pages.
    fn home_before_the_end(&mut self) {
        let (home, deliver) = (pager::Call::Home { pid: 0, stay: true, process: 0 }, Box::new(|_| fatal::answer()));
        self.send(Peer::Pager, Call::Pager(home), TraceId::fresh(), None, deliver);
    }

    /// The pager asks for memory to be mapped.
    fn on_order(&mut self, event: pager::Event) {
        let pager::Event::Frames { id, region, first_page, addr, page_count, op } = event else { return };
        let done = self.frames.run(&Order { id, region, first_page, addr, page_count, op });
        tracing::trace!(id, region, first_page, page_count, ?op, done, "Order of the pager");
        self.reactor.call(self.pager, Call::Pager(pager::Call::FramesDone { id, done }), TraceId::default(), None);
    }

    fn name_of(&self, link: LinkId) -> &str {
        if link == self.pager {
            return "pager";
        }
        self.drivers.iter().find(|(_, id)| **id == link).map_or("unknown", |(name, _)| name)
    }
}

/// What a filter forbids is done without: the program's descriptors and folders are shared then, and closing or leaving them ends the session.
fn seclude() {
    for result in [secluded::own_descriptors(&[]), secluded::own_folders()] {
        if let Err(error) = result {
            tracing::warn!(%error, "The link thread shares this with the program");
        }
    }
}

/// A reactor for a process that only asks.
pub(crate) fn client_reactor(role: Role) -> Result<Reactor, Error> {
    let name = std::env::current_exe().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| "client".into());
    Ok(Reactor::new(Identity { name, role, incarnation: 0, interface: None, limits: Limits::default() })?)
}

/// Clients and operators have no channel key.
pub(crate) fn endpoint(run_dir: &Path, service: &str) -> Endpoint {
    let (path, interface) = crate::paths::service(run_dir, service);
    Endpoint { path, interface, key: Vec::new() }
}

fn call_name(call: &Call) -> &'static str {
    match call {
        Call::Pager(pager::Call::CreateRegion { .. }) => "CreateRegion",
        Call::Pager(pager::Call::FreeRegion { .. }) => "FreeRegion",
        Call::Pager(pager::Call::Migrate { .. }) => "Migrate",
        Call::Pager(pager::Call::Query { .. }) => "Query",
        Call::Pager(pager::Call::Advise { .. }) => "Advise",
        Call::Pager(pager::Call::CloseSpace) => "CloseSpace",
        Call::Driver(driver::Call::Info) => "Info",
        Call::Driver(driver::Call::Submit { .. }) => "Submit",
        _ => "other",
    }
}
