//! The agent: one thread that owns the reactor, so that every app thread can wait in its own way.
//!
//! ```text
//!   app threads --- Command ---> channel + waker ---> agent thread: Reactor --- links ---> pager, drivers
//!        ^                                                   |
//!        +------------------ Pending<T> <--------- Done / Preamble / LinkDown
//! ```
//!
//! The agent never touches managed memory: a fault there is answered by the pager, and the agent is the one who would have
//! to carry messages meanwhile. So nothing here keeps a reference to a region, and descriptors are only passed through.
//!
//! For private memory the agent also works: the pager's orders come as events of its link and are carried out one after the other
//! (`executor.rs`), on this thread, between other messages.
//!
//! After a restart of a service its link connects again, sends the preamble (who we are: `AttachSpace` or `OpenQueue`) and then,
//! in order, every idempotent call that was not answered. The preamble of the pager begins as `OpenSpace` and becomes
//! `AttachSpace` when the space's token is known.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_ipc::message::pager::AgentMemory;
use uhmm_ipc::message::{Call, Event, Fd, Reply, Role, TraceId, WireError, driver, pager};
use uhmm_ipc::{CallId, Endpoint, Identity, Limits, LinkId, Reactor, Wake, Waker};
use uhmm_kernel_hook::{HookError, Userfaultfd};

use crate::Error;
use crate::executor::{Allocations, Executor, Order};
use crate::pending::{Completer, Pending, pair};

/// Name of the agent's thread.
pub(crate) const AGENT_THREAD: &str = "uhmm-agent";

/// Turns an answer into what the app asked for and delivers it.
type Deliver = Box<dyn FnOnce(Result<Reply, Error>) + Send>;

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
    /// A forked child's own userfaultfd, kept open for the same reason as the parent's.
    pub(crate) uffd: Option<Arc<Userfaultfd>>,
}

enum Command {
    OpenDriver {
        name: String,
        space: u64,
        token: Vec<u8>,
    },
    Call {
        peer: Peer,
        call: Call,
        trace: TraceId,
        deadline: Option<Duration>,
        deliver: Deliver,
    },
    /// Test hook: stand still.
    Pause(Duration),
    Stop,
}

/// The app's side of the agent; dropping it stops the thread.
pub(crate) struct Agent {
    commands: Sender<Command>,
    waker: Waker,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// How this process introduces itself to the pager.
pub(crate) enum Identification {
    /// As a new client.
    Open { nonce: u64, uffd: Fd, full: bool, sentinel_addr: u64 },
    /// As the child that a client has forked.
    Child { space: u64, token: Vec<u8> },
}

/// What the agent needs to begin.
pub(crate) struct Introduction {
    pub(crate) run_dir: PathBuf,
    pub(crate) who: Identification,
    pub(crate) memory: AgentMemory,
    /// This process's userfaultfd; a forked child's comes with the pager's answer.
    pub(crate) uffd: Option<Userfaultfd>,
    /// What the session allocates.
    pub(crate) allocations: Arc<Allocations>,
}

impl Agent {
    /// Starts the thread; the answer to `OpenSpace` arrives in the second value.
    pub(crate) fn start(introduction: Introduction) -> Result<(Self, Pending<Space>), Error> {
        let (commands, inbox) = mpsc::channel();
        let (started, has_started) = mpsc::channel();
        let (opened, space) = pair(TraceId::fresh());
        let thread = std::thread::Builder::new()
            .name(AGENT_THREAD.into())
            .spawn(move || match Loop::new(introduction, inbox, opened) {
                Ok((mut agent, waker)) => {
                    if started.send(Ok(waker)).is_ok() {
                        agent.run();
                    }
                }
                Err(error) => drop(started.send(Err(error))),
            })
            .map_err(Error::Thread)?;
        let waker = has_started.recv().map_err(|_| Error::AgentGone)??;
        Ok((Self { commands, waker, thread: Mutex::new(Some(thread)) }, space))
    }

    /// Asks a driver to work for the space from now on. Calls that follow wait until it answers.
    pub(crate) fn open_driver(&self, name: &str, space: &Space) {
        self.send(Command::OpenDriver { name: name.to_owned(), space: space.id, token: space.token.clone() });
    }

    /// Sends a call; `convert` runs on the agent thread and picks the answer apart.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        peer: Peer,
        call: Call,
        deadline: Option<Duration>,
        convert: impl FnOnce(Reply) -> Result<T, Error> + Send + 'static,
    ) -> Pending<T> {
        let trace = TraceId::fresh();
        let (completer, pending): (Completer<T>, _) = pair(trace);
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
        self.send(Command::Call { peer, call, trace, deadline, deliver });
        pending
    }

    /// Test hook: the thread does nothing for a while.
    pub(crate) fn pause(&self, duration: Duration) {
        self.send(Command::Pause(duration));
    }

    /// A command that cannot be delivered is dropped, and its completer answers `AgentGone`.
    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The last handle may be dropped by a callback on the agent thread itself, which cannot wait for its own end.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id())
            && thread.join().is_err()
        {
            tracing::error!("The agent thread panicked");
        }
    }
}

/// What lives on the agent thread.
struct Loop {
    reactor: Reactor,
    run_dir: PathBuf,
    inbox: Receiver<Command>,
    pager: LinkId,
    drivers: HashMap<String, LinkId>,
    waiting: HashMap<(LinkId, CallId), Deliver>,
    opening: Option<Completer<Space>>,
    /// Who we are, for a forked child.
    child: Option<(u64, Vec<u8>)>,
    staging: Fd,
    allocations: Arc<Allocations>,
    executor: Option<Executor>,
}

impl Loop {
    fn new(
        introduction: Introduction,
        inbox: Receiver<Command>,
        opened: Completer<Space>,
    ) -> Result<(Self, Waker), Error> {
        let Introduction { run_dir, who, memory, uffd, allocations } = introduction;
        let mut reactor = client_reactor(Role::Client)?;
        let waker = reactor.waker();
        let pager = reactor.link(endpoint(&run_dir, "pager"));
        let staging = memory.staging.clone();
        let (hello, child) = match who {
            Identification::Open { nonce, uffd, full, sentinel_addr } => {
                (pager::Call::OpenSpace { nonce, uffd, full, sentinel_addr, agent: memory }, None)
            }
            Identification::Child { space, token } => {
                let attach = pager::Call::AttachSpace { space, token: token.clone(), agent: Some(memory) };
                (attach, Some((space, token)))
            }
        };
        reactor.set_preamble(pager, vec![Call::Pager(hello)]);
        let executor = uffd.map(|uffd| make_executor(uffd, &staging, &allocations)).transpose()?;
        let (drivers, waiting) = (HashMap::new(), HashMap::new());
        let opening = Some(opened);
        let agent =
            Self { reactor, run_dir, inbox, pager, drivers, waiting, opening, child, staging, allocations, executor };
        Ok((agent, waker))
    }

    fn run(&mut self) {
        let mut wakes = Vec::new();
        loop {
            if !self.take_commands() {
                return;
            }
            if let Err(error) = self.reactor.poll(None, &mut wakes) {
                tracing::error!(%error, "The agent's event loop failed");
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
                Ok(Command::Call { peer, call, trace, deadline, deliver }) => {
                    self.send(peer, call, trace, deadline, deliver);
                }
                // The one place where standing still is what is asked for.
                Ok(Command::Pause(duration)) => std::thread::park_timeout(duration),
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            }
        }
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
        tracing::debug!(trace = format_args!("{:016x}", trace.0), ?peer, call = call_name(&call), "Call sent");
        let id = self.reactor.call(link, call, trace, deadline);
        self.waiting.insert((link, id), deliver);
    }

    fn on_wake(&mut self, wake: Wake) {
        match wake {
            Wake::Done { link, call, result } => {
                if let Some(deliver) = self.waiting.remove(&(link, call)) {
                    deliver(result.map_err(Error::from));
                }
            }
            Wake::Event { link, body: Event::Pager(event), .. } if link == self.pager => self.on_order(event),
            Wake::Preamble { link, result, .. } if link == self.pager => self.on_introduced(result),
            Wake::Preamble { result: Ok(Reply::Driver(driver::Reply::QueueOpened { coherent })), .. } => {
                if let (Some(executor), Some(memory)) = (&mut self.executor, coherent) {
                    executor.know_aperture(memory);
                }
            }
            Wake::Preamble { result: Err(error), .. } => tracing::warn!(%error, "A driver refused this session"),
            Wake::LinkUp { link, reconnected: true, .. } => tracing::info!(service = self.name_of(link), "Reconnected"),
            Wake::LinkDown { link } => tracing::info!(service = self.name_of(link), "Connection lost"),
            _ => {}
        }
    }

    /// The pager knows us: from now on connections begin with `AttachSpace`.
    fn on_introduced(&mut self, result: Result<Reply, WireError>) {
        let result = match result {
            Ok(Reply::Pager(pager::Reply::SpaceOpened { space, token, features })) => {
                self.attach_from_now_on(space, token.clone());
                Ok(Space { id: space, token, features, uffd: None })
            }
            Ok(Reply::Pager(pager::Reply::ChildAttached { uffd, features })) => self.on_child_attached(uffd, features),
            Ok(Reply::Pager(pager::Reply::Done)) => return,
            Ok(_) => Err(Error::StrangeReply { question: "OpenSpace" }),
            Err(error) => {
                tracing::error!(%error, "The pager refused this session");
                Err(error.into())
            }
        };
        if let Some(opening) = self.opening.take() {
            opening.complete(result);
        }
    }

    fn attach_from_now_on(&mut self, space: u64, token: Vec<u8>) {
        let attach = pager::Call::AttachSpace { space, token, agent: None };
        self.reactor.set_preamble(self.pager, vec![Call::Pager(attach)]);
    }

    /// The pager had this process's userfaultfd, from the kernel; now we keep one too.
    fn on_child_attached(&mut self, uffd: Fd, features: u64) -> Result<Space, Error> {
        let Some((space, token)) = self.child.clone() else {
            return Err(Error::StrangeReply { question: "OpenSpace" });
        };
        let own = uffd
            .try_clone()
            .map_err(|source| Error::kernel("Keeping the userfaultfd")(HookError::call("dup", None, source)))?;
        let uffd = Userfaultfd::from_fd(own).map_err(Error::kernel("Keeping the userfaultfd"))?;
        let kept = uffd.try_clone().map_err(Error::kernel("Keeping the userfaultfd"))?;
        self.executor = Some(make_executor(uffd, &self.staging, &self.allocations)?);
        self.attach_from_now_on(space, token.clone());
        Ok(Space { id: space, token, features, uffd: Some(Arc::new(kept)) })
    }

    /// The pager asks for something that only this process can do.
    fn on_order(&mut self, event: pager::Event) {
        let pager::Event::Agent { id, region, first_page, addr, page_count, op } = event else { return };
        let Some(executor) = &mut self.executor else { return };
        let runs = executor.run(&Order { id, region, first_page, addr, page_count, op });
        tracing::trace!(id, region, first_page, page_count, ?op, ?runs, "Order of the pager");
        let done = Call::Pager(pager::Call::AgentDone { id, runs });
        self.reactor.call(self.pager, done, TraceId::default(), None);
    }

    fn name_of(&self, link: LinkId) -> &str {
        if link == self.pager {
            return "pager";
        }
        self.drivers.iter().find(|(_, id)| **id == link).map_or("unknown", |(name, _)| name)
    }
}

fn make_executor(uffd: Userfaultfd, staging: &Fd, allocations: &Arc<Allocations>) -> Result<Executor, Error> {
    let executor = Executor::new(uffd, staging.as_fd(), Arc::clone(allocations));
    executor.map_err(Error::kernel("Preparing the agent's memory"))
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
