//! Supervisor, pager and mirror played by the test, over real sockets; the driver service runs in a thread of its own.
//!
//! Each fake does what its messages promise and no more: the mirror knows one region, the pager gives page N frame N + 10.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_driver_soft::run;
use uhmm_ipc::message::pager::{MapKind, MapRun};
use uhmm_ipc::message::{
    Aperture, Call, ErrorCode, Event, Fd, Interface, Metric, Reply, Role, TraceId, WireError, common, driver, mirror,
    pager, supervisor,
};
use uhmm_ipc::{CallId, ConnId, Endpoint, Identity, Limits, LinkId, Reactor, Wake};
use uhmm_kernel_hook::{Prot, SeqListener, Window, memfd};
use uhmm_kit::{KEY_VARIABLE, LogFormat, ServiceArgs};
use uhmm_manifest::Manifest;

pub const SPACE: u64 = 7;
pub const REGION: u64 = 3;
pub const AT: u64 = 0x7000_0000_0000;
pub const PAGES: u64 = 256;
pub const PAGE_BYTES: u64 = 4096;
pub const TOKEN: &[u8] = b"sixteen bytes ok";
/// Frame of region page 0; the others follow.
pub const FIRST_FRAME: u64 = 10;

pub type AnyError = Box<dyn std::error::Error + Send + Sync>;
pub type Outcome = Result<driver::Reply, WireError>;

const TURN: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(30);

/// Everything the driver talks to.
pub struct World {
    pub dir: tempfile::TempDir,
    plan_toml: String,
    driver_name: String,
    socket_path: PathBuf,
    supervisor: Reactor,
    pager: Reactor,
    mirror: Reactor,
    pub client: Reactor,
    pub link: LinkId,
    listener: Fd,
    upstream: [SeqListener; 2],
    service: Option<JoinHandle<Result<(), String>>>,
    incarnation: u32,
    pub vault: BTreeMap<String, Fd>,
    supervisor_conn: Option<ConnId>,
    mirror_conn: Option<ConnId>,
    pub memory: Fd,
    pub logins: Vec<(u64, u32, Option<Aperture>, Option<pager::CopyRing>)>,
    pub tables: Vec<Fd>,
    pub acks: Vec<u64>,
    pub asked: Vec<(u64, bool)>,
    /// Range faults: first page, pages, exclusive.
    pub ranges: Vec<(u64, u64, bool)>,
    /// Faults to answer with EBUSY before the next good answer.
    pub busy: u32,
    pub write_refused: bool,
    pub ready: bool,
    /// Turns for which the supervisor keeps the next incarnation waiting for its vault: clients are faster than that.
    pub slow_vault_turns: u32,
    vault_question: Option<(ConnId, CallId, supervisor::Call)>,
    /// The client's process lives.
    pub space_lives: bool,
    /// What this incarnation of the mirror was told.
    opened: bool,
    looked_up: bool,
    pub done: BTreeMap<CallId, Result<Reply, WireError>>,
}

fn reactor(name: &str, role: Role, interface: Option<Interface>) -> Result<Reactor, AnyError> {
    let limits = Limits::default();
    Ok(Reactor::new(Identity { name: name.to_owned(), role, incarnation: 1, interface, limits })?)
}

impl World {
    /// One test: a world with a running driver, which must end well. The service frame wants the supervisor's key in its
    /// environment, so the test starts itself again with it; the child plays.
    pub fn play(
        test: &str,
        manifest: &str,
        act: impl FnOnce(&mut Self) -> Result<(), AnyError>,
    ) -> Result<(), AnyError> {
        if std::env::var_os(KEY_VARIABLE).is_none() {
            let mut child = Command::new(std::env::current_exe()?);
            let status = child.args(["--exact", test, "--nocapture"]).env(KEY_VARIABLE, "6b6579").status()?;
            return if status.success() { Ok(()) } else { Err(format!("Child test ended with {status}").into()) };
        }
        let mut world = Self::new(manifest)?;
        world.start_driver()?;
        act(&mut world)?;
        world.stop_driver()
    }

    /// Listening fakes, no driver yet.
    fn new(manifest: &str) -> Result<Self, AnyError> {
        let dir = tempfile::tempdir()?;
        let plan = Manifest::parse(manifest)?.resolve()?;
        let listen = |name: &str| SeqListener::bind(&dir.path().join(format!("{name}.sock")));
        let mut supervisor = reactor("supervisor", Role::Supervisor, Some(Interface::Supervisor))?;
        supervisor.listen(listen("supervisor")?)?;
        let mut pager = reactor("pager", Role::Pager, Some(Interface::Pager))?;
        let upstream = [listen("pager")?, listen("mirror")?];
        pager.listen(upstream[0].try_clone()?)?;
        let mut mirror = reactor("mirror", Role::Mirror, Some(Interface::Mirror))?;
        mirror.listen(upstream[1].try_clone()?)?;
        let driver_name = "soft0".to_owned();
        for fake in [&mut supervisor, &mut pager, &mut mirror] {
            fake.set_channel_key(&driver_name, b"key".to_vec());
        }
        let path = plan.endpoint_path(dir.path(), &driver_name);
        let listener: Fd = Arc::new(SeqListener::bind(&path)?.into_fd());
        let mut client = reactor("test", Role::Client, None)?;
        let link = client.link(Endpoint { path: path.clone(), interface: Interface::Driver, key: Vec::new() });
        Ok(Self {
            dir,
            plan_toml: plan.to_toml(),
            driver_name,
            socket_path: path,
            supervisor,
            pager,
            mirror,
            client,
            link,
            listener,
            upstream,
            service: None,
            incarnation: 0,
            vault: BTreeMap::new(),
            supervisor_conn: None,
            mirror_conn: None,
            memory: Arc::new(memfd::create_sealed("uhmm-test-region", PAGES * PAGE_BYTES)?),
            logins: Vec::new(),
            tables: Vec::new(),
            acks: Vec::new(),
            asked: Vec::new(),
            ranges: Vec::new(),
            busy: 0,
            write_refused: false,
            ready: false,
            slow_vault_turns: 0,
            vault_question: None,
            space_lives: true,
            opened: false,
            looked_up: false,
            done: BTreeMap::new(),
        })
    }

    /// Starts the next incarnation and waits until it is ready.
    pub fn start_driver(&mut self) -> Result<(), AnyError> {
        self.incarnation += 1;
        self.ready = false;
        let args = ServiceArgs {
            name: self.driver_name.clone(),
            incarnation: Some(self.incarnation),
            token_file: None,
            run_dir: PathBuf::from(self.dir.path()),
            log: LogFormat::Text,
        };
        let name = format!("driver-{}", self.incarnation);
        self.service = Some(std::thread::Builder::new().name(name).spawn(move || run(args).map_err(chain))?);
        self.turn_until("the driver is ready", |world| world.ready)
    }

    /// Tells the driver to stop and waits for its end.
    pub fn stop_driver(&mut self) -> Result<(), AnyError> {
        let conn = self.supervisor_conn.ok_or("The driver is connected")?;
        self.supervisor.event(conn, Event::Supervisor(supervisor::Event::Stop), TraceId::default());
        self.turn_until("the driver stops", |world| world.service.as_ref().is_none_or(JoinHandle::is_finished))?;
        match self.service.take().map(JoinHandle::join) {
            Some(Ok(result)) => Ok(result?),
            _ => Err("The driver panicked".into()),
        }
    }

    /// Calls the driver and waits for the answer.
    pub fn call(&mut self, call: driver::Call) -> Result<Outcome, AnyError> {
        let id = self.send(call);
        self.answer(id)
    }

    pub fn send(&mut self, call: driver::Call) -> CallId {
        self.client.call(self.link, Call::Driver(call), TraceId::fresh(), None)
    }

    pub fn answer(&mut self, id: CallId) -> Result<Outcome, AnyError> {
        self.turn_until("the driver answers", |world| world.done.contains_key(&id))?;
        match self.done.remove(&id) {
            Some(Ok(Reply::Driver(reply))) => Ok(Ok(reply)),
            Some(Err(error)) => Ok(Err(error)),
            other => Err(format!("The driver answered {other:?}").into()),
        }
    }

    /// Another connection of the client.
    pub fn new_client_link(&mut self) -> LinkId {
        let path = self.socket_path.clone();
        self.client.link(Endpoint { path, interface: Interface::Driver, key: Vec::new() })
    }

    pub fn stats(&mut self) -> Result<Vec<Metric>, AnyError> {
        let id = self.client.call(self.link, Call::Common(common::Call::Stats), TraceId::fresh(), None);
        self.turn_until("the driver counts", |world| world.done.contains_key(&id))?;
        match self.done.remove(&id) {
            Some(Ok(Reply::Common(common::Reply::Stats(metrics)))) => Ok(metrics),
            other => Err(format!("The driver answered {other:?}").into()),
        }
    }

    pub fn open_queue(&mut self) -> Result<Outcome, AnyError> {
        self.call(driver::Call::OpenQueue { space: SPACE, token: TOKEN.to_vec() })
    }

    pub fn submit(&mut self, kernel: &str, args: &[u64]) -> Result<Outcome, AnyError> {
        self.call(submit(kernel, args))
    }

    /// Sends an event from the mirror.
    pub fn mirror_says(&mut self, event: mirror::Event) -> Result<(), AnyError> {
        let conn = self.mirror_conn.ok_or("The driver is linked to the mirror")?;
        self.mirror.event(conn, Event::Mirror(event), TraceId::default());
        Ok(())
    }

    /// The mirror dies and comes back knowing nothing.
    pub fn restart_mirror(&mut self) -> Result<(), AnyError> {
        let mut mirror = reactor("mirror", Role::Mirror, Some(Interface::Mirror))?;
        mirror.set_channel_key(&self.driver_name, b"key".to_vec());
        mirror.listen(self.upstream[1].try_clone()?)?;
        self.mirror = mirror;
        (self.opened, self.looked_up, self.mirror_conn) = (false, false, None);
        Ok(())
    }

    /// The pager dies and comes back.
    pub fn restart_pager(&mut self) -> Result<(), AnyError> {
        let mut pager = reactor("pager", Role::Pager, Some(Interface::Pager))?;
        pager.set_channel_key(&self.driver_name, b"key".to_vec());
        pager.listen(self.upstream[0].try_clone()?)?;
        self.pager = pager;
        Ok(())
    }

    /// Device memory through the aperture of the last login.
    pub fn aperture(&self) -> Result<Window, AnyError> {
        let (_, frame_count, aperture, _) = self.logins.last().ok_or("The driver logged in")?;
        let aperture = aperture.as_ref().ok_or("The device has an aperture")?;
        Ok(Window::map(
            aperture.fd.as_fd(),
            aperture.offset_bytes,
            u64::from(*frame_count) * PAGE_BYTES,
            Prot::ReadWrite,
        )?)
    }

    /// Device memory as the vault keeps it, whether or not the CPU is shown it.
    pub fn device_memory(&self) -> Result<Window, AnyError> {
        let fd = self.vault.get("driver/vram").ok_or("The vault keeps device memory")?;
        Ok(Window::map(fd.as_fd(), 0, memfd::len(fd.as_fd())?, Prot::ReadWrite)?)
    }

    /// A direct access of pages of the region; the buffer has the bytes afterwards.
    pub fn access(&mut self, op: driver::AccessOp, first_page: u64, bytes: &mut [u8]) -> Result<Outcome, AnyError> {
        let len_bytes = bytes.len() as u64;
        let buffer: Fd = Arc::new(memfd::create_sealed("uhmm-test-buffer", len_bytes)?);
        let window = Window::map(buffer.as_fd(), 0, len_bytes, Prot::ReadWrite)?;
        window.write(0, bytes)?;
        let addr = AT + first_page * PAGE_BYTES;
        let buffer = Some(buffer);
        let outcome = self.call(driver::Call::Access { space: SPACE, addr, len_bytes, op, buffer })?;
        window.read(0, bytes)?;
        Ok(outcome)
    }

    /// Plays everybody until `done`.
    pub fn turn_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<(), AnyError> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > deadline {
                return Err(format!("Waited too long until {what}").into());
            }
            if what != "the driver stops" && self.service.as_ref().is_some_and(JoinHandle::is_finished) {
                let end = self.service.take().map(JoinHandle::join);
                return Err(format!("The driver ended before {what}: {end:?}").into());
            }
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<(), AnyError> {
        let mut wakes = Vec::new();
        self.supervisor.poll(Some(TURN), &mut wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Call { conn, call, body: Call::Supervisor(body), .. } = wake {
                self.supervisor_conn = Some(conn);
                if self.slow_vault_turns > 0 && matches!(body, supervisor::Call::VaultGet { .. }) {
                    self.vault_question = Some((conn, call, body));
                    continue;
                }
                let reply = self.supervise(body);
                self.supervisor.reply(conn, call, Ok(Reply::Supervisor(reply)));
            }
        }
        if let Some((conn, call, body)) = self.vault_question.take() {
            self.slow_vault_turns = self.slow_vault_turns.saturating_sub(1);
            if self.slow_vault_turns > 0 {
                self.vault_question = Some((conn, call, body));
            } else {
                let reply = self.supervise(body);
                self.supervisor.reply(conn, call, Ok(Reply::Supervisor(reply)));
            }
        }
        self.pager.poll(Some(Duration::ZERO), &mut wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Call { conn, call, body: Call::Pager(body), .. } = wake {
                self.page(body);
                self.pager.reply(conn, call, Ok(Reply::Pager(pager::Reply::Done)));
            }
        }
        self.mirror.poll(Some(Duration::ZERO), &mut wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Call { conn, call, body: Call::Mirror(body), .. } = wake {
                self.mirror_conn = Some(conn);
                let reply = self.reflect(body);
                self.mirror.reply(conn, call, reply.map(Reply::Mirror));
            }
        }
        self.client.poll(Some(Duration::ZERO), &mut wakes)?;
        for wake in wakes.drain(..) {
            if let Wake::Done { call, result, .. } = wake {
                self.done.insert(call, result);
            }
        }
        Ok(())
    }

    fn supervise(&mut self, call: supervisor::Call) -> supervisor::Reply {
        match call {
            supervisor::Call::Register { .. } => supervisor::Reply::Registered {
                plan_toml: self.plan_toml.clone(),
                listener: Some(self.listener.clone()),
                channel_keys: vec![("pager".to_owned(), b"key".to_vec()), ("mirror".to_owned(), b"key".to_vec())],
            },
            supervisor::Call::VaultGet { prefix, after } => {
                let entries = self.vault.iter().filter(|(name, _)| name.starts_with(&prefix) && **name > after);
                let entries = entries.map(|(name, fd)| (name.clone(), fd.clone())).collect();
                supervisor::Reply::Vault { entries, more: false }
            }
            supervisor::Call::VaultPut { name, fd } => {
                self.vault.insert(name, fd);
                supervisor::Reply::Done
            }
            supervisor::Call::Ready => {
                self.ready = true;
                supervisor::Reply::Done
            }
            _ => supervisor::Reply::Done,
        }
    }

    fn page(&mut self, call: pager::Call) {
        match call {
            pager::Call::DriverLogin { generation, frame_count, aperture, copy_ring, .. } => {
                assert!(self.vault.contains_key("driver/vram"), "memory is in the vault before the pager relies on it");
                self.logins.push((generation, frame_count, aperture, copy_ring));
            }
            pager::Call::AttachTable { space: SPACE, region: REGION, table } => self.tables.push(table),
            other => panic!("Not a driver's call: {other:?}"),
        }
    }

    fn reflect(&mut self, call: mirror::Call) -> Result<mirror::Reply, WireError> {
        match call {
            mirror::Call::Open { token, .. } if token != TOKEN || !self.space_lives => {
                Err(WireError::new(ErrorCode::Permission, "Space does not exist or the token is not its own"))
            }
            mirror::Call::Open { .. } => {
                self.opened = true;
                Ok(mirror::Reply::Done)
            }
            mirror::Call::Login { .. } | mirror::Call::Close { .. } => Ok(mirror::Reply::Done),
            mirror::Call::Lookup { .. } | mirror::Call::Fault { .. } if !self.opened => {
                Err(WireError::new(ErrorCode::Permission, "Open the space first"))
            }
            mirror::Call::Fault { .. } if !self.looked_up => {
                Err(WireError::new(ErrorCode::Permission, "Look the region up first"))
            }
            mirror::Call::Ack { id } => {
                self.acks.push(id);
                Ok(mirror::Reply::Done)
            }
            mirror::Call::Lookup { addr, .. } if (AT..AT + PAGES * PAGE_BYTES).contains(&addr) => {
                self.looked_up = true;
                let (len_bytes, memory) = (PAGES * PAGE_BYTES, self.memory.clone());
                let memory = pager::Memory::Sealed { memory, offset_bytes: 0 };
                Ok(mirror::Reply::Region { region: REGION, addr: AT, len_bytes, device_read_only: false, memory })
            }
            mirror::Call::Lookup { addr, .. } => {
                Err(WireError::new(ErrorCode::NotFound, format!("No region holds {addr:#x}")))
            }
            mirror::Call::Fault { first_page, page_count, fault_page, write, whole, exclusive, .. } => {
                self.asked.push((fault_page, write));
                if whole {
                    self.ranges.push((first_page, page_count, exclusive));
                }
                if self.busy > 0 {
                    self.busy -= 1;
                    return Err(WireError::new(ErrorCode::Busy, "Invalidated meanwhile"));
                }
                if write && self.write_refused {
                    return Err(WireError::new(ErrorCode::Permission, "Region is read-only for devices"));
                }
                let kind = MapKind::Frame((FIRST_FRAME + first_page) as u32);
                let writable = write && !self.write_refused;
                Ok(mirror::Reply::Mapped { sequence: 1, runs: vec![MapRun { first_page, page_count, kind, writable }] })
            }
        }
    }
}

pub fn submit(kernel: &str, args: &[u64]) -> driver::Call {
    submit_with(kernel, args, Vec::new())
}

/// Of a job that names what it uses.
pub fn submit_with(kernel: &str, args: &[u64], ranges: Vec<driver::JobRange>) -> driver::Call {
    driver::Call::Submit {
        space: SPACE,
        kernel: kernel.to_owned(),
        args: args.to_vec(),
        idempotent: kernel != "atomic_add",
        ranges,
    }
}

fn chain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
