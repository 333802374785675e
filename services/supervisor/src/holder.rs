//! The holder: a process that keeps a second copy of the vault and does nothing else. It shares no fate with the supervisor: whichever of
//! the two dies, the other one has everything, and the dead one is started again and filled.
//!
//! ```text
//!   supervisor --socket pair on stdin: {listening socket, keys}--> holder: holder.sock
//!   services   --Register, VaultPut ..., WHOLE_NAME, VaultPut, VaultRemove ...--> (uhmm_kit::Vault)
//!   supervisor --Register, VaultPut "state"; after its own death: VaultGet of everything -->
//! ```
//! It answers a service only when it has read all that the service's dead predecessor had sent. It ends when its run directory is gone, and
//! by the supervisor's hand; without a supervisor it waits for the next one for ever, because the memory of programs depends on it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use uhmm_ipc::message::{Call, ErrorCode, Interface, Metric, Reply, Role, WireError, common, supervisor};
use uhmm_ipc::{CallId, ConnId, Identity, Limits, Peer, Reactor, TimerToken, Wake};
use uhmm_kernel_hook::{RecvStatus, SeqListener, SeqPacket};
use uhmm_kit::LogFormat;

use crate::service::SupervisorError;
use crate::state::{HOLDER, unhex};
use crate::vault::Vault;

const TIMER_ORPHAN: TimerToken = TimerToken(1);
/// Looks whether the run directory is still there while the supervisor is away.
const ORPHAN_CHECK: Duration = Duration::from_secs(1);
/// Keys of all services fit.
const KEYS_BYTES_MAX: usize = 1 << 16;

/// How the supervisor starts a holder.
#[derive(Clone, Debug)]
pub struct HolderOptions {
    /// Where the sockets are.
    pub run_dir: PathBuf,
    /// How many times it has been started; `None`: the supervisor has not started it, and is asked.
    pub incarnation: Option<u32>,
    /// Of one that joins: the token that it shows.
    pub token_file: Option<PathBuf>,
    /// Log format.
    pub log: LogFormat,
}

/// What a new holder is given: keys by name, as TOML, and its listening socket.
pub(crate) fn keys_text(keys: &BTreeMap<String, String>) -> String {
    toml::to_string(keys).unwrap_or_default()
}

struct Holder {
    run_dir: PathBuf,
    reactor: Reactor,
    vault: Vault,
    /// Connections by owner; the last one is the living process's.
    owners: BTreeMap<String, Vec<ConnId>>,
    peers: BTreeMap<ConnId, Peer>,
    /// Whose `Register` waits for its predecessor's last words.
    waiting: BTreeMap<String, (ConnId, CallId)>,
    puts: u64,
    looking: bool,
}

/// Runs until the run directory is gone.
///
/// # Errors
/// It was not started by the supervisor, or the event loop failed.
pub fn run_holder(options: HolderOptions) -> Result<(), SupervisorError> {
    uhmm_kit::init_log(options.log, HOLDER, options.incarnation.unwrap_or(0));
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| SupervisorError::NotStartedBySupervisor { problem: errno.to_string() })?;
    if let Err(error) = uhmm_kernel_hook::process::raise_descriptor_limit() {
        tracing::warn!(%error, "The descriptor limit stays what it is: it also limits the number of clients");
    }
    let (incarnation, keys, listener) = match options.incarnation {
        Some(incarnation) => inherited().map(|(keys, listener)| (incarnation, keys, listener))?,
        None => joined(&options)?,
    };
    let mut reactor = Reactor::new(Identity {
        name: HOLDER.to_owned(),
        role: Role::Supervisor,
        incarnation,
        interface: Some(Interface::Supervisor),
        limits: Limits::default(),
    })?;
    for (name, key) in &keys {
        reactor.set_channel_key(name, unhex(key));
    }
    reactor.listen(listener)?;
    let mut holder = Holder {
        run_dir: options.run_dir,
        reactor,
        vault: Vault::default(),
        owners: BTreeMap::new(),
        peers: BTreeMap::new(),
        waiting: BTreeMap::new(),
        puts: 0,
        looking: false,
    };
    holder.look_later();
    let mut wakes = Vec::new();
    loop {
        holder.reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            if !holder.on_wake(wake) {
                return Ok(());
            }
        }
    }
}

type Keys = BTreeMap<String, String>;

/// From a container or unit of its own.
fn joined(options: &HolderOptions) -> Result<(u32, Keys, SeqListener), SupervisorError> {
    let args = uhmm_kit::ServiceArgs {
        name: HOLDER.to_owned(),
        incarnation: None,
        token_file: options.token_file.clone(),
        run_dir: options.run_dir.clone(),
        log: options.log,
    };
    let joined = uhmm_kit::join(&args, Role::Supervisor)?;
    let strange = |problem: &str| SupervisorError::NotStartedBySupervisor { problem: problem.to_owned() };
    let keys = toml::from_str(&joined.keys_toml).map_err(|_| strange("it was given something else than keys"))?;
    let listener = joined.listener.ok_or_else(|| strange("it was given no socket"))?;
    let listener = listener.try_clone().map_err(|error| strange(&error.to_string()))?;
    Ok((joined.incarnation, keys, SeqListener::from_fd(listener)?))
}

/// What the supervisor has sent through standard input.
fn inherited() -> Result<(Keys, SeqListener), SupervisorError> {
    let strange = |problem: &str| SupervisorError::NotStartedBySupervisor { problem: problem.to_owned() };
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().map_err(|error| strange(&error.to_string()))?;
    let socket = SeqPacket::from_fd(stdin).map_err(|_| strange("standard input is no socket"))?;
    let (mut text, mut fds): (Vec<u8>, Vec<OwnedFd>) = (vec![0; KEYS_BYTES_MAX], Vec::new());
    let len = loop {
        match socket.recv(&mut text, &mut fds, 1).map_err(|_| strange("standard input is no socket"))? {
            RecvStatus::Message { len, truncated: false, .. } => break len,
            RecvStatus::WouldBlock => {
                let mut entry = [PollFd::new(&socket, PollFlags::IN)];
                rustix::event::poll(&mut entry, None).map_err(|errno| strange(&errno.to_string()))?;
            }
            RecvStatus::Message { .. } | RecvStatus::Closed => return Err(strange("the supervisor is gone")),
        }
    };
    let text = std::str::from_utf8(&text[..len]).map_err(|_| strange("it was given something else than keys"))?;
    let keys = toml::from_str(text).map_err(|_| strange("it was given something else than keys"))?;
    let listener = fds.pop().ok_or_else(|| strange("it was given no socket"))?;
    Ok((keys, SeqListener::from_fd(listener)?))
}

impl Holder {
    /// `false`: nobody will ever come again.
    fn on_wake(&mut self, wake: Wake) -> bool {
        match wake {
            Wake::Connected { conn, peer } => {
                self.peers.insert(conn, peer);
            }
            Wake::Closed { conn, .. } => self.closed(conn),
            Wake::Call { conn, call, body, .. } => self.called(conn, call, body),
            Wake::Timer(TIMER_ORPHAN) => {
                if !self.run_dir.exists() {
                    tracing::warn!("The run directory is gone: ending");
                    return false;
                }
                self.looking = false;
                self.look_later();
            }
            _ => {}
        }
        true
    }

    /// As long as nobody is there who would end this process.
    fn look_later(&mut self) {
        if !self.looking && !self.peers.values().any(|peer| peer.role == Role::Supervisor) {
            self.looking = true;
            self.reactor.add_timer(ORPHAN_CHECK, TIMER_ORPHAN);
        }
    }

    fn closed(&mut self, conn: ConnId) {
        let Some(peer) = self.peers.remove(&conn) else { return };
        let owners = self.owners.entry(peer.name.clone()).or_default();
        let registered = owners.contains(&conn);
        owners.retain(|other| *other != conn);
        if registered && owners.is_empty() {
            self.vault.owner_gone(&peer.name);
        }
        if self.waiting.get(&peer.name).is_some_and(|(waiting, _)| *waiting == conn) {
            self.waiting.remove(&peer.name);
        }
        self.register_waiting(&peer.name);
        if peer.role == Role::Supervisor {
            self.look_later();
        }
    }

    fn called(&mut self, conn: ConnId, call: CallId, body: Call) {
        let Some(peer) = self.peers.get(&conn).cloned() else { return };
        let answer = match body {
            Call::Common(common::Call::Stats) => Ok(Reply::Common(common::Reply::Stats(self.metrics()))),
            Call::Supervisor(supervisor::Call::Register { service, .. }) if service == peer.name => {
                self.waiting.insert(service, (conn, call));
                for old in self.owners.get(&peer.name).into_iter().flatten().filter(|old| **old != conn) {
                    self.reactor.close_after_last_words(*old);
                }
                return self.register_waiting(&peer.name);
            }
            Call::Supervisor(request) if self.owners.get(&peer.name).is_some_and(|owners| owners.contains(&conn)) => {
                self.request(&peer, request).map(Reply::Supervisor)
            }
            _ => Err(WireError::new(
                ErrorCode::Permission,
                "The holder keeps descriptors of services that have registered",
            )),
        };
        self.reactor.reply(conn, call, answer);
    }

    /// The next process of a service is let in when the one before has been read to its end.
    fn register_waiting(&mut self, name: &str) {
        let Some((conn, call)) = self.waiting.get(name).copied() else { return };
        let owners = self.owners.entry(name.to_owned()).or_default();
        if owners.iter().any(|old| *old != conn) {
            return;
        }
        if !owners.contains(&conn) {
            owners.push(conn);
        }
        self.waiting.remove(name);
        self.vault.begin(name);
        self.reactor.reply(conn, call, Ok(Reply::Supervisor(supervisor::Reply::Done)));
    }

    fn request(&mut self, peer: &Peer, request: supervisor::Call) -> Result<supervisor::Reply, WireError> {
        match request {
            supervisor::Call::VaultPut { name, fd } => {
                self.puts += 1;
                self.vault.put(&peer.name, name, fd).map_err(|text| WireError::new(ErrorCode::NoMemory, text))?;
            }
            supervisor::Call::VaultGet { after, .. } if peer.role == Role::Supervisor => {
                let (entries, more) = self.vault.page_of_all(&after);
                return Ok(supervisor::Reply::Vault { entries, more });
            }
            supervisor::Call::VaultGet { prefix, after } => {
                let (entries, more) = self.vault.page(&peer.name, &prefix, &after);
                return Ok(supervisor::Reply::Vault { entries, more });
            }
            supervisor::Call::VaultRemove { prefix } => self.vault.remove(&peer.name, &prefix),
            _ => return Err(WireError::new(ErrorCode::Protocol, "Not a call of the holder's")),
        }
        Ok(supervisor::Reply::Done)
    }

    fn metrics(&self) -> Vec<Metric> {
        let metric = |name: &str, value: u64| Metric { name: name.to_owned(), value };
        vec![
            metric("pid", u64::from(std::process::id())),
            metric("vault_entries", self.vault.len() as u64),
            metric("vault_puts", self.puts),
            metric("owners", self.owners.values().filter(|conns| !conns.is_empty()).count() as u64),
        ]
    }
}
