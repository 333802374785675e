//! What every service does the same way: register with the supervisor, get plan, socket and vault, answer heartbeats, log.
//!
//! ```text
//!   start: link to supervisor.sock -> Register -> (plan, listening socket, channel keys) -> VaultGet ... -> the service's own start -> Ready
//!          link to holder.sock: the second keeper of the vault (`vault.rs`)
//!   later: Ping -> Pong, from the service's own loop (a loop that hangs is noticed)
//!          supervisor died: the service lives on; when a new one listens: Register, put every vault entry back, Ready
//!          holder died: the same without Ready
//!          run directory gone: nobody will ever come back: exit
//! ```

mod error;
mod join;
mod log;
pub mod record;
mod vault;

pub use error::KitError;
pub use join::{Joined, TOKEN_BYTES, join, read_token};
pub use log::init as init_log;
pub use log::{LogFormat, say};
pub use record::Recorder;
pub use vault::{Vault, WHOLE_NAME};

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uhmm_ipc::message::{Call, Event, Interface, Reply, Role, TraceId, supervisor};
use uhmm_ipc::{Endpoint, Identity, Limits, LinkId, Reactor, TimerToken, Wake};
use uhmm_kernel_hook::{PAGE_SIZE, SeqListener, memfd};
use uhmm_manifest::{Kind, Plan, SandboxMode};

/// Environment variable with the key (hexadecimal) that proves a service to the supervisor.
pub const KEY_VARIABLE: &str = "UHMM_SUPERVISOR_KEY";
/// Vault name of the service's own listening socket.
pub const LISTENER_NAME: &str = "kit/listener";
/// Vault name of the socket that other services, and nobody else, see in the place of the first one.
pub const INNER_LISTENER_NAME: &str = "kit/inner";
/// Where the vault's second keeper listens, in the run directory.
pub const HOLDER_SOCKET: &str = "holder.sock";

/// Looks whether the run directory is still there while the supervisor is away.
const ORPHAN_CHECK: Duration = Duration::from_secs(1);
const TIMER_ORPHAN: TimerToken = TimerToken(u64::MAX);

/// What the supervisor passes to a service on its command line, or somebody else to one that joins.
#[derive(Clone, Debug)]
pub struct ServiceArgs {
    /// Name in the manifest.
    pub name: String,
    /// How many times it has been started; `None`: the supervisor has not started it, and is asked.
    pub incarnation: Option<u32>,
    /// Of one that joins: the token that it shows. Without it it is known by its user.
    pub token_file: Option<PathBuf>,
    /// Where the sockets are.
    pub run_dir: PathBuf,
    /// Log format.
    pub log: LogFormat,
}

impl ServiceArgs {
    /// For a driver that is a program of its own: `--run-dir DIR --name NAME --incarnation N --log text|json`, in any order. Without
    /// `--incarnation` it joins, with `--token-file FILE` or as its user; its image may say the folder in `UHMM_RUN_DIR` then.
    ///
    /// # Errors
    /// `Arguments`.
    pub fn from_command_line() -> Result<Self, KitError> {
        Self::parse(std::env::args_os().skip(1), std::env::var_os("UHMM_RUN_DIR").map(PathBuf::from))
    }

    fn parse(words: impl Iterator<Item = OsString>, run_dir: Option<PathBuf>) -> Result<Self, KitError> {
        let (mut name, mut incarnation, mut run_dir, mut log, mut token_file) = (None, None, run_dir, None, None);
        let mut words = words;
        while let Some(option) = words.next() {
            let bad = || KitError::Arguments { option: option.to_string_lossy().into_owned() };
            let value = words.next().ok_or_else(bad)?;
            let text = value.to_str();
            match option.to_str() {
                Some("--run-dir") => run_dir = Some(PathBuf::from(&value)),
                Some("--name") => name = Some(text.ok_or_else(bad)?.to_owned()),
                Some("--incarnation") => incarnation = Some(text.and_then(|text| text.parse().ok()).ok_or_else(bad)?),
                Some("--token-file") => token_file = Some(PathBuf::from(&value)),
                Some("--log") if text == Some("text") => log = Some(LogFormat::Text),
                Some("--log") if text == Some("json") => log = Some(LogFormat::Json),
                _ => return Err(bad()),
            }
        }
        let missing = |option: &str| KitError::Arguments { option: option.to_owned() };
        Ok(Self {
            name: name.ok_or_else(|| missing("--name"))?,
            incarnation,
            token_file,
            run_dir: run_dir.ok_or_else(|| missing("--run-dir"))?,
            log: log.unwrap_or_default(),
        })
    }
}

/// What to do with a wake-up after [`Service::on_wake`] has seen it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// It was the kit's.
    Yes,
    /// It is the service's.
    No,
    /// The service shall end.
    Exit(Ending),
}

/// Why a service shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The whole system ends, and the vault with it: nobody will ever go on where this process stops. (The supervisor says `Stop` for nothing
    /// else: whom it wants to start again it kills.)
    ForGood,
    /// Another process is this service by now, and may be at work.
    Replaced,
}

/// The common part of a running service.
pub struct Service {
    /// The loop.
    pub reactor: Reactor,
    /// What runs.
    pub plan: Plan,
    /// Link to the supervisor.
    pub supervisor: LinkId,
    /// Of this process.
    pub incarnation: u32,
    /// Name in the manifest.
    pub name: String,
    /// Descriptors that outlive this process.
    pub vault: Vault,
    /// What this service tells of itself.
    pub record: Recorder,
    run_dir: PathBuf,
    channel_keys: Vec<(String, Vec<u8>)>,
    ready: bool,
    supervisor_up: bool,
}

impl Service {
    /// Registers and loads the vault. Returns when the service can begin its own start. A process that joins becomes two (`join.rs`): call it
    /// before there are other threads.
    pub fn start(args: ServiceArgs, role: Role, interface: Interface) -> Result<Self, KitError> {
        log::init(args.log, &args.name, args.incarnation.unwrap_or(0));
        // Nothing that a service executes can gain what the service does not have.
        rustix::thread::set_no_new_privs(true).map_err(|errno| KitError::NoNewPrivs { source: errno.into() })?;
        if let Err(error) = uhmm_kernel_hook::process::raise_descriptor_limit() {
            tracing::warn!(%error, "The descriptor limit stays what it is: it also limits the number of clients");
        }
        let (incarnation, key) = match args.incarnation {
            Some(incarnation) => (incarnation, supervisor_key()?),
            None => join::join(&args, role).map(|joined| (joined.incarnation, joined.key))?,
        };
        let mut reactor = Reactor::new(Identity {
            name: args.name.clone(),
            role,
            incarnation,
            interface: Some(interface),
            limits: Limits::default(),
        })?;
        let path = args.run_dir.join("supervisor.sock");
        let supervisor = reactor.link(Endpoint { path, interface: Interface::Supervisor, key: key.clone() });
        let register = supervisor::Call::Register { service: args.name.clone(), incarnation };
        reactor.set_preamble(supervisor, vec![Call::Supervisor(register.clone())]);
        // What comes before the service's own loop runs, and is not an answer to what is asked here.
        let mut early = Vec::new();
        let (plan_toml, listener, channel_keys) = registered(&mut reactor, supervisor, &mut early)?;
        let plan = Plan::from_toml(&plan_toml)?;
        // Not even another process of the same user may look at what clients have here.
        if plan.service(&args.name).is_none_or(|service| service.sandbox.mode != SandboxMode::Off) {
            uhmm_kernel_hook::confine::hide_memory()?;
        }
        reactor.set_max_connections(plan.quota.max_spaces.max(Limits::default().max_connections));
        let path = args.run_dir.join(HOLDER_SOCKET);
        let holder_expected = path.exists();
        let holder = reactor.link(Endpoint { path, interface: Interface::Supervisor, key });
        reactor.set_preamble(holder, vec![Call::Supervisor(register)]);
        let mut vault = Vault::new(supervisor, holder, Arc::new(memfd::create_sealed("uhmm-whole", PAGE_SIZE)?));
        for (peer, key) in &channel_keys {
            reactor.set_channel_key(peer, key.clone());
            if let Some(kind) = plan.service(peer).map(|service| service.kind) {
                reactor.set_channel_role(peer, role_of(kind));
            }
        }
        if let Some(listener) = &listener {
            vault.remember(LISTENER_NAME, listener.clone());
        }
        vault.load(&mut reactor, holder_expected, &mut early)?;
        // Last, because loading the vault looks at its own answers only: whoever calls now must find a loop that listens.
        if let Some(listener) = listener {
            let own = listener.try_clone().map_err(|source| KitError::Descriptor { source })?;
            reactor.listen(SeqListener::from_fd(own)?)?;
            vault.remember(LISTENER_NAME, listener);
        }
        let kept = vault.take(record::RECORD_NAME).into_iter().next().map(|(_, fd)| fd);
        let record = Recorder::open(kept, incarnation);
        if let Some(fd) = record.fd() {
            vault.put(&mut reactor, record::RECORD_NAME, fd.clone());
        }
        if let Some(inner) = vault.get(INNER_LISTENER_NAME) {
            let own = inner.try_clone().map_err(|source| KitError::Descriptor { source })?;
            reactor.listen_to_services(SeqListener::from_fd(own)?)?;
        }
        early.into_iter().for_each(|wake| reactor.put_back(wake));
        Ok(Self {
            reactor,
            plan,
            supervisor,
            incarnation,
            name: args.name,
            vault,
            record,
            run_dir: args.run_dir,
            channel_keys,
            ready: false,
            supervisor_up: true,
        })
    }

    /// The service's own start is through.
    pub fn ready(&mut self) {
        self.ready = true;
        self.tell(supervisor::Call::Ready);
        self.record.event(&record::Event::new(record::What::Ready, record::now_ns()));
        tracing::info!("Ready");
    }

    /// Where the only service of a kind listens: `"pager"`, `"mirror"`.
    pub fn endpoint_path(&self, kind_or_name: &str) -> PathBuf {
        self.plan.endpoint_path(&self.run_dir, &self.service_name(kind_or_name))
    }

    /// The key of the channel to that service; empty when the plan has no such channel.
    pub fn channel_key(&self, kind_or_name: &str) -> Vec<u8> {
        let name = self.service_name(kind_or_name);
        self.channel_keys.iter().find(|(peer, _)| *peer == name).map(|(_, key)| key.clone()).unwrap_or_default()
    }

    fn service_name(&self, kind_or_name: &str) -> String {
        let kind = match kind_or_name {
            "pager" => Some(Kind::Pager),
            "mirror" => Some(Kind::Mirror),
            _ => None,
        };
        let of_kind = kind.and_then(|kind| self.plan.service_of_kind(kind));
        of_kind.map_or(kind_or_name, |service| service.name.as_str()).to_owned()
    }

    fn tell(&mut self, call: supervisor::Call) {
        self.reactor.call(self.supervisor, Call::Supervisor(call), TraceId::default(), None);
    }

    /// The kit's share of a wake-up.
    pub fn on_wake(&mut self, wake: &Wake) -> Handled {
        if self.vault.is_about_holder(&mut self.reactor, wake) {
            return Handled::Yes;
        }
        match wake {
            Wake::Event { link, body: Event::Supervisor(event), .. } if *link == self.supervisor => match event {
                supervisor::Event::Ping { sequence } => {
                    self.tell(supervisor::Call::Pong { sequence: *sequence });
                    Handled::Yes
                }
                supervisor::Event::Stop => {
                    tracing::info!("Told to stop");
                    Handled::Exit(Ending::ForGood)
                }
                supervisor::Event::ServiceDied { .. } => Handled::No,
            },
            Wake::LinkDown { link } if *link == self.supervisor => {
                tracing::warn!("The supervisor is gone: going on without it");
                self.supervisor_up = false;
                self.reactor.add_timer(ORPHAN_CHECK, TIMER_ORPHAN);
                Handled::Yes
            }
            Wake::Timer(TIMER_ORPHAN) => self.check_orphaned(),
            Wake::LinkUp { link, reconnected, .. } if *link == self.supervisor => {
                self.supervisor_up = true;
                if *reconnected {
                    self.hand_back();
                }
                Handled::Yes
            }
            Wake::Preamble { link, result: Err(error), .. } if *link == self.supervisor => {
                tracing::error!(%error, "The supervisor does not know this process: ending");
                Handled::Exit(Ending::Replaced)
            }
            _ => Handled::No,
        }
    }

    fn check_orphaned(&mut self) -> Handled {
        if !self.run_dir.exists() {
            tracing::warn!("The run directory is gone: ending");
            return Handled::Exit(Ending::ForGood);
        }
        if !self.supervisor_up {
            self.reactor.add_timer(ORPHAN_CHECK, TIMER_ORPHAN);
        }
        Handled::Yes
    }

    /// A new supervisor has registered this service: it gets everything that the old one kept.
    fn hand_back(&mut self) {
        tracing::info!("A supervisor is there again: handing the vault back");
        self.vault.hand_back(&mut self.reactor);
        if self.ready {
            self.tell(supervisor::Call::Ready);
        }
    }
}

type Registered = (String, Option<uhmm_ipc::message::Fd>, Vec<(String, Vec<u8>)>);

/// Waits for the preamble's answer.
fn registered(reactor: &mut Reactor, supervisor: LinkId, early: &mut Vec<Wake>) -> Result<Registered, KitError> {
    let mut wakes = Vec::new();
    loop {
        reactor.poll(None, &mut wakes)?;
        while !wakes.is_empty() {
            let Wake::Preamble { link, result, .. } = wakes.remove(0) else { continue };
            if link != supervisor {
                continue;
            }
            early.append(&mut wakes);
            return match result {
                Ok(Reply::Supervisor(supervisor::Reply::Registered { plan_toml, listener, channel_keys })) => {
                    Ok((plan_toml, listener, channel_keys))
                }
                Ok(_) => Err(KitError::StrangeReply { question: "Register" }),
                Err(error) => Err(KitError::Refused { error }),
            };
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

fn supervisor_key() -> Result<Vec<u8>, KitError> {
    let text = std::env::var(KEY_VARIABLE).map_err(|_| KitError::NoKey)?;
    let digits: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()))
        .collect();
    digits.filter(|key| !key.is_empty()).ok_or(KitError::NoKey)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<ServiceArgs, KitError> {
        ServiceArgs::parse(line.split(' ').map(OsString::from), None)
    }

    #[test]
    fn the_supervisors_command_line_is_read_and_any_other_is_refused() {
        let args = parse("--run-dir /run/u --name chip0 --incarnation 3 --log json").unwrap();
        assert_eq!((args.name.as_str(), args.incarnation, args.log), ("chip0", Some(3), LogFormat::Json));
        let joins = parse("--run-dir /run/u --name chip0 --token-file /t").unwrap();
        assert_eq!((joins.incarnation, joins.token_file), (None, Some(PathBuf::from("/t"))));
        assert_eq!(args.run_dir, PathBuf::from("/run/u"));
        let of_image = |line: &str| {
            let words = line.split(' ').map(OsString::from);
            ServiceArgs::parse(words, Some(PathBuf::from("/image"))).unwrap().run_dir
        };
        assert_eq!(of_image("--name chip0"), PathBuf::from("/image"));
        assert_eq!(of_image("--name chip0 --run-dir /run/u"), PathBuf::from("/run/u"));
        for (line, option) in [
            ("--name chip0 --incarnation 3", "--run-dir"),
            ("--run-dir /r --name chip0 --incarnation three", "--incarnation"),
            ("--run-dir /r --name chip0 --incarnation 1 --log loud", "--log"),
            ("--verbose yes", "--verbose"),
            ("--name", "--name"),
        ] {
            let error = parse(line).map(drop).map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|error| error.contains(option)), "{line}: {error:?}");
        }
    }
}
