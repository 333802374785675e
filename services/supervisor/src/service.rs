//! The supervisor's shell: sockets and messages; every decision in [`crate::core`]. Processes of services: `processes.rs`, the vault's
//! second keeper: `keeping.rs`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Call, ErrorCode, Event, Interface, Reply, Role, TraceId, WireError, common, supervisor};
use uhmm_ipc::{ConnId, FdToken, Identity, Limits, Peer, Reactor, TimerToken, Wake};
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_kernel_hook::{HookError, PidFd, SeqListener};
use uhmm_kit::record::{self, What};
use uhmm_kit::{HOLDER_SOCKET, INNER_LISTENER_NAME, LISTENER_NAME, LogFormat, Recorder, WHOLE_NAME};
use uhmm_manifest::{Kind, Manifest, Plan};

use crate::confining::{Confined, KIND_DENIED};
use crate::core::{Action, Core, State};
use crate::doors::{is_fresh, make_run_dir};
use crate::joining::{JoinBook, tokens};
use crate::keeping::{Keeping, TIMER_HOLDER, TIMER_HOLDER_PING, TOKEN_HOLDER};
use crate::manager::{Manager, TIMER_RETRY, TIMER_WATCHDOG};
use crate::state::{HOLDER, SavedState};
use crate::vault::Vault;

/// Running services find a new supervisor within their reconnect interval (200 ms at most); this is ten times that.
const ADOPT_GRACE_MS: u64 = 2_000;
/// How long what a dead supervisor has left in between may hold its socket, and between two attempts.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(1);
const BIND_PAUSE: Duration = Duration::from_millis(5);
const TIMER_TICK: TimerToken = TimerToken(1);
const TOKEN_SIGNALS: FdToken = FdToken(u64::MAX);

/// Why the supervisor cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The manifest does not resolve.
    #[error("The manifest cannot be carried out")]
    Manifest(#[from] uhmm_manifest::ManifestError),
    /// The run directory cannot be used.
    #[error("Run directory {path} cannot be used: {problem}", path = path.display())]
    RunDir {
        /// Where.
        path: PathBuf,
        /// What the system said.
        problem: String,
    },
    /// `supervisor.toml` cannot be read or written.
    #[error("State file {path} cannot be used: {problem}", path = path.display())]
    State {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A socket cannot be made; the source says whether somebody else listens there.
    #[error("Socket {path} cannot be made; if another uhmm runs there, stop it (`uhmm down`) or use `uhmm up --adopt`", path = path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: uhmm_kernel_hook::HookError,
    },
    /// A system call failed.
    #[error("A system call failed")]
    Hook(#[from] uhmm_kernel_hook::HookError),
    /// The event loop failed.
    #[error("The event loop failed")]
    Ipc(#[from] uhmm_ipc::IpcError),
    /// A token, or a holder that was not let in.
    #[error("Nobody can join")]
    Join(#[from] uhmm_kit::KitError),
    /// What a service may do cannot be made.
    #[error(transparent)]
    Sandbox(#[from] uhmm_sandbox::SandboxError),
    /// A service was asked to be confined wholly, which is not possible here.
    #[error(
        "The sandbox is not whole, which its manifest asks for (sandbox.mode = \"required\"): {missing}. See `uhmm doctor`"
    )]
    NotConfined {
        /// What is not in force.
        missing: String,
    },
    /// Of a holder.
    #[error("The holder is started by the supervisor (`uhmm up`): {problem}")]
    NotStartedBySupervisor {
        /// What is wrong.
        problem: String,
    },
}

/// How to run.
#[derive(Clone, Debug)]
pub struct SupervisorOptions {
    /// Where the sockets go; made when it is not there, mode 0700.
    pub run_dir: PathBuf,
    /// The `uhmm` program, for built-in services.
    pub exe: PathBuf,
    /// Take over what an older supervisor left running.
    pub adopt: bool,
    /// Another supervisor will go on: take over what there is, if there is something, and when told to end, end nothing else.
    pub replaceable: bool,
    /// Log format of all services.
    pub log: LogFormat,
}

pub(crate) struct Supervisor<F> {
    pub(crate) options: SupervisorOptions,
    pub(crate) plan: Plan,
    pub(crate) plan_toml: String,
    pub(crate) reactor: Reactor,
    pub(crate) core: Core,
    pub(crate) vault: Vault,
    pub(crate) saved: SavedState,
    pub(crate) children: HashMap<usize, Child>,
    pub(crate) pidfds: HashMap<usize, PidFd>,
    /// What is in force for services that this supervisor has started.
    pub(crate) confined: HashMap<usize, Confined>,
    pub(crate) sessions: HashMap<ConnId, Peer>,
    pub(crate) registered: HashMap<usize, ConnId>,
    /// Dead services whose last words are being read: how they ended.
    pub(crate) ending: HashMap<usize, String>,
    pub(crate) keeping: Keeping,
    pub(crate) manager: Manager,
    pub(crate) joins: JoinBook,
    pub(crate) actions: Vec<Action>,
    pub(crate) started: Instant,
    pub(crate) restarts: u64,
    pub(crate) record: Recorder,
    pub(crate) ready: Option<F>,
    pub(crate) done: bool,
    /// What it leaves behind is another supervisor's.
    leaves: bool,
    pub(crate) tick_armed_ms: Option<u64>,
}

/// Runs until SIGTERM, SIGINT or the operator's `Shutdown`. `ready` is called once, when every service is.
pub fn run(manifest: Manifest, mut options: SupervisorOptions, ready: impl FnOnce()) -> Result<(), SupervisorError> {
    let inherited = uhmm_kernel_hook::manager::inherited()?;
    let plan = manifest.resolve()?;
    let tokens = tokens(&plan)?;
    let signals = StopSignals::block()?;
    uhmm_kit::init_log(options.log, "supervisor", 1);
    if let Err(error) = uhmm_kernel_hook::process::raise_descriptor_limit() {
        tracing::warn!(%error, "The descriptor limit stays what it is: it also limits the number of clients");
    }
    // Services have another working directory.
    let refused = |error: std::io::Error| SupervisorError::RunDir {
        path: options.run_dir.clone(),
        problem: format!("it has no absolute path: {error}"),
    };
    let run_dir = std::path::absolute(&options.run_dir).map_err(refused)?;
    options.run_dir = run_dir;
    make_run_dir(&options.run_dir)?;
    let path = options.run_dir.join("supervisor.sock");
    options.adopt = (options.adopt || options.replaceable) && !is_fresh(&options.run_dir);
    let patience = if options.adopt { PREDECESSOR_PATIENCE } else { Duration::ZERO };
    let listener = bind_after(&path, patience).map_err(|source| SupervisorError::Socket { path, source })?;
    let inner = crate::views::bind_inner(&options.run_dir, "supervisor.sock", patience)?;
    // Before anything is written: services of an older supervisor still hold their sockets, and then only `--adopt` will do.
    let vault = if options.adopt { Vault::default() } else { listen_for_all(&options.run_dir, &plan)? };
    let mut saved = SavedState::open(&options.run_dir, options.adopt)?;
    saved.make_keys(&plan)?;
    saved.write()?;
    let mut supervisor = Supervisor::new(options, plan, saved, vault, ready)?;
    supervisor.manager = Manager::find(inherited);
    supervisor.expect_joins(tokens);
    supervisor.find_holder()?;
    supervisor.begin_store();
    supervisor.begin_record(None);
    supervisor.make_views()?;
    supervisor.begin()?;
    supervisor.open_doors()?;
    supervisor.reactor.listen(listener)?;
    supervisor.reactor.listen_to_services(inner)?;
    supervisor.reactor.add_fd(&signals, TOKEN_SIGNALS)?;
    let mut wakes = Vec::new();
    while !supervisor.done {
        supervisor.tick()?;
        supervisor.publish();
        supervisor.reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            supervisor.on_wake(wake)?;
        }
        supervisor.tell_manager();
    }
    if !supervisor.leaves {
        supervisor.end_holder();
        supervisor.clean_up();
    }
    Ok(())
}

/// A process that the dead supervisor was just starting has its socket until it runs its own program; nobody tells when that is.
pub(crate) fn bind_after(path: &Path, patience: Duration) -> Result<SeqListener, HookError> {
    let until = Instant::now() + patience;
    loop {
        match SeqListener::bind(path) {
            Err(HookError::AddrInUse { .. }) if Instant::now() < until => std::thread::sleep(BIND_PAUSE),
            bound => return bound,
        }
    }
}

/// The listening socket of a service, into the vault.
pub(crate) fn listen(run_dir: &Path, plan: &Plan, name: &str, vault: &mut Vault) -> Result<(), SupervisorError> {
    let path = plan.endpoint_path(run_dir, name);
    let listener = SeqListener::bind(&path).map_err(|source| SupervisorError::Socket { path, source })?;
    let listener = Arc::new(listener.into_fd());
    let inner = Arc::new(crate::views::bind_inner_of(run_dir, plan, name)?.into_fd());
    for (entry, fd) in [(LISTENER_NAME, &listener), (INNER_LISTENER_NAME, &inner), (WHOLE_NAME, &listener)] {
        if let Err(text) = vault.put(name, entry.to_owned(), Arc::clone(fd)) {
            tracing::error!(text, "The vault refused a listening socket");
        }
    }
    Ok(())
}

fn listen_for_all(run_dir: &Path, plan: &Plan) -> Result<Vault, SupervisorError> {
    let mut vault = Vault::default();
    for service in &plan.services {
        listen(run_dir, plan, &service.name, &mut vault)?;
    }
    Ok(vault)
}

impl<F: FnOnce()> Supervisor<F> {
    fn new(
        options: SupervisorOptions,
        plan: Plan,
        saved: SavedState,
        vault: Vault,
        ready: F,
    ) -> Result<Self, SupervisorError> {
        let reactor = Reactor::new(Identity {
            name: "supervisor".to_owned(),
            role: Role::Supervisor,
            incarnation: 1,
            interface: Some(Interface::Supervisor),
            limits: Limits::default(),
        })?;
        let core = Core::new(plan.clone(), &[], None);
        Ok(Self {
            plan_toml: plan.to_toml(),
            options,
            plan,
            reactor,
            core,
            vault,
            saved,
            children: HashMap::new(),
            pidfds: HashMap::new(),
            confined: HashMap::new(),
            sessions: HashMap::new(),
            registered: HashMap::new(),
            ending: HashMap::new(),
            keeping: Keeping::default(),
            manager: Manager::default(),
            joins: JoinBook::default(),
            actions: Vec::new(),
            started: Instant::now(),
            restarts: 0,
            record: Recorder::default(),
            ready: Some(ready),
            done: false,
            leaves: false,
            tick_armed_ms: None,
        })
    }

    /// What an older supervisor has left is known: who may connect, and who runs.
    fn begin(&mut self) -> Result<(), SupervisorError> {
        self.saved.make_keys(&self.plan)?;
        self.save_state();
        for service in &self.plan.services {
            self.reactor.set_channel_key(&service.name, self.saved.key(&service.name, "supervisor"));
            self.reactor.set_channel_role(&service.name, role_of(service.kind));
        }
        let before = |name: &str| self.saved.incarnations.get(name).copied().unwrap_or(0);
        let incarnations: Vec<u32> = self.plan.services.iter().map(|service| before(&service.name)).collect();
        self.core = Core::new(self.plan.clone(), &incarnations, self.options.adopt.then_some(ADOPT_GRACE_MS));
        if self.options.adopt { self.find_processes() } else { Ok(()) }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn tick(&mut self) -> Result<(), SupervisorError> {
        let now_ms = self.now_ms();
        self.core.tick(now_ms, &mut self.actions);
        self.act()?;
        let next = self.core.next_deadline_ms();
        if let Some(at_ms) = next
            && self.tick_armed_ms.is_none_or(|armed_ms| at_ms < armed_ms)
        {
            self.tick_armed_ms = Some(at_ms);
            self.reactor.add_timer(Duration::from_millis(at_ms.saturating_sub(self.now_ms()).max(1)), TIMER_TICK);
        }
        Ok(())
    }

    fn on_wake(&mut self, wake: Wake) -> Result<(), SupervisorError> {
        if self.is_about_holder(&wake) {
            return Ok(());
        }
        match wake {
            Wake::Timer(TIMER_TICK) => self.tick_armed_ms = None,
            Wake::Timer(TIMER_HOLDER) => self.holder_due()?,
            Wake::Timer(TIMER_HOLDER_PING) => self.ping_holder(),
            Wake::Timer(TIMER_WATCHDOG) => self.sign_of_life(),
            Wake::Timer(TIMER_RETRY) => self.tell_rest(),
            Wake::Fd(TOKEN_SIGNALS) if self.options.replaceable => {
                tracing::warn!("Told to end: what is kept waits for the next supervisor (`uhmm down` ends everything)");
                (self.done, self.leaves) = (true, true);
            }
            Wake::Fd(TOKEN_SIGNALS) => self.shutdown()?,
            Wake::Fd(TOKEN_HOLDER) => self.check_holder()?,
            Wake::Fd(FdToken(token)) if token & KIND_DENIED != 0 => {
                self.calls_denied((token & !KIND_DENIED) as usize)?
            }
            Wake::Fd(FdToken(service)) => self.check_exit(service as usize)?,
            Wake::Connected { conn, peer } => {
                self.sessions.insert(conn, peer);
            }
            Wake::Closed { conn, .. } => self.closed(conn)?,
            Wake::Call { conn, call, body: Call::Supervisor(supervisor::Call::Join { guard }), .. } => {
                self.asks_to_join(conn, call, guard)?;
                self.act()?;
            }
            Wake::Call { conn, call, body, .. } => {
                let answer = match body {
                    Call::Common(common::Call::Stats) => {
                        let mut metrics = record::metrics(|each| self.tell_metrics(each));
                        metrics.extend(self.sandbox_metrics());
                        Ok(Reply::Common(common::Reply::Stats(metrics)))
                    }
                    Call::Supervisor(request) => self.request(conn, request)?.map(Reply::Supervisor),
                    _ => Err(WireError::new(ErrorCode::Protocol, "Not a call of the supervisor interface")),
                };
                // Whoever is told that something is kept can rely on it.
                self.tell_manager();
                self.reactor.reply(conn, call, answer);
                self.act()?;
            }
            _ => {}
        }
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), SupervisorError> {
        self.manager.stopping();
        let now_ms = self.now_ms();
        self.core.shutdown(now_ms, &mut self.actions);
        self.act()
    }

    /// The service that speaks on a connection, after it registered.
    fn service_of(&self, conn: ConnId) -> Result<usize, WireError> {
        let found = self.registered.iter().find(|(_, registered)| **registered == conn).map(|(service, _)| *service);
        found.ok_or_else(|| WireError::new(ErrorCode::Permission, "Register before any other call"))
    }

    fn request(
        &mut self,
        conn: ConnId,
        request: supervisor::Call,
    ) -> Result<Result<supervisor::Reply, WireError>, SupervisorError> {
        let Some(peer) = self.sessions.get(&conn).cloned() else {
            return Ok(Err(WireError::new(ErrorCode::Protocol, "The connection is gone")));
        };
        let operators = matches!(
            request,
            supervisor::Call::Status
                | supervisor::Call::Shutdown
                | supervisor::Call::Kill { .. }
                | supervisor::Call::Record { .. }
                | supervisor::Call::OperatorKey { .. }
        );
        if operators != (peer.role == Role::Operator) {
            let text = format!("A {:?} may not make this call to the supervisor", peer.role);
            return Ok(Err(WireError::new(ErrorCode::Permission, text)));
        }
        Ok(match request {
            supervisor::Call::Register { service, incarnation } => self.register(conn, &peer, &service, incarnation)?,
            supervisor::Call::Status => Ok(supervisor::Reply::Status(self.status())),
            supervisor::Call::Shutdown => {
                self.manager.stopping();
                let now_ms = self.now_ms();
                self.core.shutdown(now_ms, &mut self.actions);
                Ok(supervisor::Reply::Done)
            }
            supervisor::Call::Kill { service } => self.drill(&service),
            supervisor::Call::Record { service } => self.record_of(&service),
            supervisor::Call::OperatorKey { socket } => self.operator_key(&socket),
            other => match self.service_of(conn) {
                Err(error) => Err(error),
                Ok(service) => self.service_request(service, other),
            },
        })
    }

    fn service_request(&mut self, service: usize, request: supervisor::Call) -> Result<supervisor::Reply, WireError> {
        let owner = self.plan.services[service].name.clone();
        match request {
            supervisor::Call::Ready => {
                let now_ms = self.now_ms();
                let starts = matches!(self.core.services()[service].state, State::Starting { .. });
                self.core.ready(service, now_ms, &mut self.actions);
                if starts {
                    self.note_ready(service);
                }
                self.tell_of_the_dead(service);
            }
            supervisor::Call::Pong { sequence } => self.core.pong(service, sequence),
            supervisor::Call::VaultPut { name, fd } => {
                self.vault.put(&owner, name, fd).map_err(|text| WireError::new(ErrorCode::NoMemory, text))?;
            }
            supervisor::Call::VaultGet { prefix, after } => {
                let (entries, more) = self.vault.page(&owner, &prefix, &after);
                return Ok(supervisor::Reply::Vault { entries, more });
            }
            supervisor::Call::VaultRemove { prefix } if prefix.is_empty() => {
                return Err(WireError::new(ErrorCode::Invalid, "An empty prefix would forget everything"));
            }
            supervisor::Call::VaultRemove { prefix } => self.vault.remove(&owner, &prefix),
            supervisor::Call::Fence { service: other, incarnation, reason } => {
                self.fence(service, &other, incarnation, &reason)?;
            }
            _ => return Err(WireError::new(ErrorCode::Protocol, "Not a service's call")),
        }
        Ok(supervisor::Reply::Done)
    }

    fn register(
        &mut self,
        conn: ConnId,
        peer: &Peer,
        name: &str,
        incarnation: u32,
    ) -> Result<Result<supervisor::Reply, WireError>, SupervisorError> {
        let refused = |text: String| Ok(Err(WireError::new(ErrorCode::Permission, text)));
        let Some(service) = self.core.index_of(name).filter(|_| peer.name == name) else {
            return refused(format!("Service {name:?} is not in the plan, or not the one that connected"));
        };
        let now_ms = self.now_ms();
        let registered = self.number_of(service, peer);
        match registered.and_then(|pid| self.core.registered(service, incarnation, pid, now_ms)) {
            Err(text) => return refused(text),
            Ok(false) => {}
            Ok(true) => {
                tracing::info!(service = name, pid = peer.pid, incarnation, "Taken over from an older supervisor");
                self.joined_before(service, peer);
                match &peer.process {
                    Some(process) => self.watch(service, process.pidfd.try_clone()?)?,
                    None => return refused("The process has ended".to_owned()),
                }
                if self.core.is_condemned(service) {
                    self.kill(service);
                }
            }
        }
        self.registered.insert(service, conn);
        if !self.vault.is_whole(name) {
            self.vault.begin(name);
        }
        Ok(Ok(supervisor::Reply::Registered {
            plan_toml: self.plan_toml.clone(),
            listener: self.vault.get(name, LISTENER_NAME),
            channel_keys: self.saved.channel_keys(&self.plan, name),
        }))
    }

    /// Those that died while this service was not there, so that it waits for none of them.
    fn tell_of_the_dead(&mut self, service: usize) {
        let dead: Vec<(usize, u32, bool)> = self.core.dead().filter(|(other, _, _)| *other != service).collect();
        for (other, incarnation, held) in dead {
            let name = self.plan.services[other].name.clone();
            self.tell(service, supervisor::Event::ServiceDied { service: name, incarnation, held });
        }
    }

    fn drill(&mut self, name: &str) -> Result<supervisor::Reply, WireError> {
        let missing = || WireError::new(ErrorCode::NotFound, format!("Service {name:?} is not running"));
        if name == HOLDER {
            let (incarnation, pid) = self.kill_holder();
            return if pid == 0 { Err(missing()) } else { Ok(supervisor::Reply::Killed { incarnation, pid }) };
        }
        let index = self.core.index_of(name).ok_or_else(missing)?;
        let (incarnation, pid) = (self.core.services()[index].incarnation, self.core.services()[index].pid);
        if !self.core.condemn(index, incarnation, "killed as a drill", &mut self.actions) {
            return Err(missing());
        }
        self.note(What::ServiceCondemned, name, incarnation.into());
        Ok(supervisor::Reply::Killed { incarnation, pid })
    }

    fn fence(&mut self, by: usize, name: &str, incarnation: u32, reason: &str) -> Result<(), WireError> {
        if self.plan.services[by].kind == Kind::Driver {
            return Err(WireError::new(ErrorCode::Permission, "Drivers fence nobody"));
        }
        let index = self.core.index_of(name);
        let index = index.ok_or_else(|| WireError::new(ErrorCode::NotFound, format!("No service {name:?}")))?;
        tracing::error!(service = name, incarnation, reason, "Fenced");
        self.note(What::ServiceCondemned, name, incarnation.into());
        if self.core.condemn(index, incarnation, reason, &mut self.actions) {
            Ok(())
        } else {
            Err(WireError::new(ErrorCode::Stale, format!("Incarnation {incarnation} of {name} is dead already")))
        }
    }

    pub(crate) fn act(&mut self) -> Result<(), SupervisorError> {
        while !self.actions.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                self.execute(action)?;
            }
        }
        Ok(())
    }

    fn execute(&mut self, action: Action) -> Result<(), SupervisorError> {
        match action {
            Action::Spawn { service } => {
                // Whatever is wrong now (a full disk, no descriptors) may be right at the next attempt; the others go on.
                if let Err(error) = self.spawn(service) {
                    let problem = format!("cannot be started: {error}");
                    tracing::error!(service, problem);
                    let now_ms = self.now_ms();
                    self.kill(service);
                    if !self.pidfds.contains_key(&service) {
                        self.core.exited(service, &problem, now_ms, &mut self.actions);
                    }
                }
            }
            Action::Admit { service } => {
                if let Err(error) = self.admit(service) {
                    tracing::error!(service, %error, "A process could not be let in");
                    let now_ms = self.now_ms();
                    self.kill(service);
                    if !self.pidfds.contains_key(&service) {
                        self.core.exited(service, "could not be let in", now_ms, &mut self.actions);
                    }
                }
            }
            Action::Kill { service } => self.kill(service),
            Action::Ping { service, sequence } => self.tell(service, supervisor::Event::Ping { sequence }),
            Action::Stop { service } => self.tell(service, supervisor::Event::Stop),
            Action::Died { service, incarnation, held } => {
                let name = self.plan.services[service].name.clone();
                tracing::warn!(service = %name, incarnation, held, how = %self.core.services()[service].last_exit, "Service died");
                self.note(if held { What::ServiceHeld } else { What::ServiceDied }, &name, incarnation.into());
                let event = supervisor::Event::ServiceDied { service: name, incarnation, held };
                for other in self.registered.values() {
                    self.reactor.event(*other, Event::Supervisor(event.clone()), TraceId::default());
                }
                if held {
                    self.refuse_joins(service);
                }
            }
            Action::AllReady => {
                if let Some(ready) = self.ready.take() {
                    ready();
                }
            }
            Action::AllStopped => self.done = true,
        }
        Ok(())
    }

    fn tell(&mut self, service: usize, event: supervisor::Event) {
        if let Some(conn) = self.registered.get(&service) {
            self.reactor.event(*conn, Event::Supervisor(event), TraceId::default());
        }
    }

    fn status(&self) -> Vec<supervisor::ServiceStatus> {
        let now_ms = self.now_ms();
        let line = |service: &crate::core::Service| {
            let (state, uptime_ms) = match service.state {
                State::Waiting => ("waiting", 0),
                State::Adopting { .. } => ("adopting", 0),
                State::Awaited => ("awaited", 0),
                State::Starting { .. } => ("starting", 0),
                State::Ready { since_ms } => ("ready", now_ms - since_ms),
                State::Backoff { .. } => ("backoff", 0),
                State::Held => ("held", 0),
                State::Stopped => ("stopped", 0),
            };
            supervisor::ServiceStatus {
                name: service.name.clone(),
                pid: service.pid,
                incarnation: service.incarnation,
                state: state.to_owned(),
                last_exit: service.last_exit.clone(),
                uptime_ms,
                missed_heartbeats: service.missed,
                last_recovery_ms: service.last_recovery_ms,
                vault_entries: self.vault.count(&service.name) as u32,
            }
        };
        self.core.services().iter().map(line).chain([self.holder_status()]).collect()
    }

    /// Everything has ended in order: leave nothing that looks like a running system.
    fn clean_up(&self) {
        self.close_doors();
        let sockets = self.plan.services.iter().map(|s| self.plan.endpoint_path(&self.options.run_dir, &s.name));
        let own = ["supervisor.sock", "supervisor.toml", HOLDER_SOCKET].map(|file| self.options.run_dir.join(file));
        crate::views::remove(&self.options.run_dir);
        for path in sockets.chain(own) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!(%error, path = %path.display(), "Was not there");
            }
        }
    }
}

fn role_of(kind: Kind) -> Role {
    match kind {
        Kind::Pager => Role::Pager,
        Kind::Mirror => Role::Mirror,
        Kind::Driver => Role::Driver,
    }
}
