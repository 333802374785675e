//! Supervisor interface: services register, keep descriptors in the vault and answer heartbeats; the operator asks for status.

use super::Fd;

/// Requests to the supervisor. All are idempotent.
#[derive(Clone, Debug)]
pub enum Call {
    /// A started service reports for duty. The pid is checked against SO_PEERCRED. After the supervisor's own restart a running
    /// service sends the same call again, then puts its vault entries back ("re-collect").
    Register {
        /// Name from the manifest.
        service: String,
        /// Incarnation that the supervisor gave on the command line.
        incarnation: u32,
    },
    /// The service's loop turns and its sockets are served.
    Ready,
    /// Keep a duplicate of the descriptor under `name`; replaces an older one of that name. Names are paths: `space/7/uffd`.
    VaultPut {
        /// Vault name, owned by the calling service.
        name: String,
        /// The descriptor.
        fd: Fd,
    },
    /// Names and descriptors below `prefix`, sorted by name, at most as many as fit in one message, beginning after `after`.
    VaultGet {
        /// Prefix; empty for all that the calling service owns.
        prefix: String,
        /// Last name of the previous page, or empty.
        after: String,
    },
    /// Forget every name that starts with `prefix`.
    VaultRemove {
        /// Prefix; must not be empty.
        prefix: String,
    },
    /// Kill this incarnation because it does not revoke (pager and mirror only).
    Fence {
        /// Service to kill.
        service: String,
        /// Its incarnation: a younger one is left alone.
        incarnation: u32,
        /// Why, for the log and `uhmm status`.
        reason: String,
    },
    /// Operator: state of everything.
    Status,
    /// Operator: stop all services and exit.
    Shutdown,
    /// Operator and tests: kill -9 one service, as a fault-isolation drill.
    Kill {
        /// Service name.
        service: String,
    },
    /// Operator: what a service has recorded of itself (`uhmm_shared::record`), living or dead; for reading.
    Record {
        /// Service name, or `supervisor`.
        service: String,
    },
    /// Operator: what a service's operators show it. Who is shown the sockets of clients alone cannot ask.
    OperatorKey {
        /// Name of its socket's file.
        socket: String,
    },
    /// A heartbeat's answer.
    Pong {
        /// From [`Event::Ping`].
        sequence: u64,
    },
    /// A process that the supervisor has not started wants to be a service (or the holder). Its hello's name is [`join_name`] of it, its key
    /// the manifest's token. Answered when its turn has come: while another process is that service, it waits.
    Join {
        /// One byte sent there ends the process at once, wherever it runs.
        guard: Option<Fd>,
    },
}

/// The name in the hello of a process that asks to be `service`. No service can have such a name.
pub fn join_name(service: &str) -> String {
    format!("{JOIN_PREFIX}{service}")
}

/// Which service a process of that name asks to be.
pub fn joining(name: &str) -> Option<&str> {
    name.strip_prefix(JOIN_PREFIX)
}

const JOIN_PREFIX: &str = "join:";
/// The key in the hello of a process that is known by its user alone.
pub const KEY_OF_USER: &[u8] = b"by user";

/// Answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// Answer to `Register`.
    Registered {
        /// The resolved plan as TOML (see `uhmm_manifest::Plan`).
        plan_toml: String,
        /// The service's listening socket (SOCK_SEQPACKET), kept in the vault across incarnations. Absent when the service has none.
        listener: Option<Fd>,
        /// Keys of the channels this service may use: (peer service name, key).
        channel_keys: Vec<(String, Vec<u8>)>,
    },
    /// Answer to `VaultGet`.
    Vault {
        /// Name and descriptor.
        entries: Vec<(String, Fd)>,
        /// More names follow the last one.
        more: bool,
    },
    /// Answer to `Status`.
    Status(Vec<ServiceStatus>),
    /// Answer to `Kill`.
    Killed {
        /// The incarnation that was killed.
        incarnation: u32,
        /// Its pid.
        pid: u32,
    },
    /// Answer to `Join`: begin.
    Joined {
        /// Times the service was started, this one included.
        incarnation: u32,
        /// Key of the channel to the supervisor.
        key: Vec<u8>,
        /// Of a holder: its listening socket.
        listener: Option<Fd>,
        /// Of a holder: keys by name.
        keys_toml: String,
    },
    /// Answer to `Record`: the memfd.
    Record(Fd),
    /// Answer to `OperatorKey`.
    Key(Vec<u8>),
}

/// One line of `uhmm status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStatus {
    /// Name from the manifest.
    pub name: String,
    /// Process id, 0 when not running.
    pub pid: u32,
    /// Times started.
    pub incarnation: u32,
    /// `starting`, `ready`, `backoff`, `held`, `stopped`.
    pub state: String,
    /// Why it last ended, empty if it never did.
    pub last_exit: String,
    /// Milliseconds since it became ready.
    pub uptime_ms: u64,
    /// Heartbeats missed in a row.
    pub missed_heartbeats: u32,
    /// Milliseconds from the last death to ready again.
    pub last_recovery_ms: u64,
    /// Descriptors in the vault.
    pub vault_entries: u32,
}

/// Downward events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Answer with [`Call::Pong`] from the event loop.
    Ping {
        /// Echo it.
        sequence: u64,
    },
    /// A service's process is gone (reaped): its mappings are void. Sent to every registered service.
    ServiceDied {
        /// Name.
        service: String,
        /// Which incarnation.
        incarnation: u32,
        /// True when it will not be restarted ("held").
        held: bool,
    },
    /// Finish and exit with 0.
    Stop,
}
