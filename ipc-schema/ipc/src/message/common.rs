//! What every interface shares: the handshake, the closed error enum, metrics.

use crate::message::Fd;

/// A window onto device memory: what to map, and where in it frame 0 is.
#[derive(Clone, Debug)]
pub struct Aperture {
    /// A sealed memfd, or a device's own descriptor (a BAR through VFIO): that one may vanish, and it lets its holder do more than map.
    pub fd: Fd,
    /// In bytes, page aligned.
    pub offset_bytes: u64,
}

/// Which service a connection is for. Sent in [`Hello`]; a mismatch refuses the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Interface {
    /// `supervisor.sock`
    Supervisor,
    /// `pager.sock`
    Pager,
    /// `mirror.sock`
    Mirror,
    /// `driver-NAME.sock`
    Driver,
}

/// Who is calling. Service roles prove themselves by the channel key that the supervisor gave to both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// An application through the SDK.
    Client,
    /// The operator's command line.
    Operator,
    /// The pager.
    Pager,
    /// The mirror.
    Mirror,
    /// A driver service.
    Driver,
    /// The supervisor itself.
    Supervisor,
}

/// First message of a connection, from the side that connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Protocol version the caller speaks; the callee must have the same major number.
    pub major: u16,
    /// Highest minor version the caller understands.
    pub minor: u16,
    /// Interface the caller wants.
    pub interface: Interface,
    /// What the caller is.
    pub role: Role,
    /// Service name from the manifest, or the program's name for clients.
    pub name: String,
    /// How many times the calling service has been started; 0 for clients.
    pub incarnation: u32,
    /// Channel key (service roles), empty for clients and operators.
    pub key: Vec<u8>,
    /// Largest message the caller accepts, in bytes.
    pub max_message_bytes: u32,
    /// Most descriptors the caller accepts with one message.
    pub max_fds: u16,
}

/// Answer to [`Hello`]: everything is the minimum of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Protocol major version.
    pub major: u16,
    /// Negotiated minor version.
    pub minor: u16,
    /// Service name of the callee.
    pub name: String,
    /// Incarnation of the callee.
    pub incarnation: u32,
    /// Negotiated message limit in bytes.
    pub max_message_bytes: u32,
    /// Negotiated descriptor limit per message.
    pub max_fds: u16,
}

/// The closed set of errors on the wire, with the kernel's meanings (design brief, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// EFAULT: the address cannot be read.
    Fault,
    /// EPERM: write to a read-only mapping, or a peer that may not do this.
    Permission,
    /// EINVAL: hole, misaligned or malformed.
    Invalid,
    /// ENOENT: nothing there.
    NotFound,
    /// EBUSY: invalidated meanwhile, retry.
    Busy,
    /// ENOMEM: device full.
    NoMemory,
    /// EIO: the device failed.
    Io,
    /// ESTALE: the incarnation that was asked is dead; the call may or may not have happened.
    Stale,
    /// ETIMEDOUT: the deadline passed.
    TimedOut,
    /// EPROTO: the message was malformed, oversized or of an unknown version.
    Protocol,
}

/// An error answer: code for programs, text for people (what was wrong and what to do).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text} ({code:?})")]
pub struct WireError {
    /// The closed enum.
    pub code: ErrorCode,
    /// Capital letter first, names the range or the name that was wrong.
    pub text: String,
}

impl WireError {
    /// Shorthand for services.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// One counter or histogram bucket. Names carry the unit: `fault_latency_p99_ns`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name with unit.
    pub name: String,
    /// Value.
    pub value: u64,
}

/// Calls that every service answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// All counters of the service.
    Stats,
}

/// Answers to [`Call`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Answer to [`Call::Stats`].
    Stats(Vec<Metric>),
}
