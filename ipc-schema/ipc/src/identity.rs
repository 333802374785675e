//! Who we are, what we serve and what we accept.

use std::path::PathBuf;

use crate::message::{Interface, Role};

/// Bounds on what peers may cost. Message and descriptor limits are negotiated to the minimum of both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest message in bytes, either direction. At least [`Limits::MIN_MESSAGE_BYTES`], at most
    /// [`Limits::MAX_MESSAGE_BYTES`].
    pub max_message_bytes: u32,
    /// Most descriptors beside one message.
    pub max_fds: u16,
    /// Accepted connections of clients. Services with a valid key get in above this, and some operators.
    pub max_connections: u32,
    /// Unanswered calls of one connection: a link sends no more than this before answers come, an accepted connection is not
    /// read further while it has more.
    pub max_inflight_per_conn: u32,
}

impl Limits {
    /// A handshake must fit.
    pub const MIN_MESSAGE_BYTES: u32 = 1 << 10;
    /// Fits into the default send buffer of a Unix socket.
    pub const MAX_MESSAGE_BYTES: u32 = 128 << 10;
    /// SCM_MAX_FD of the kernel is 253; nobody needs that many.
    pub const MAX_FDS: u16 = 64;
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_message_bytes: 64 << 10, max_fds: 16, max_connections: 256, max_inflight_per_conn: 1024 }
    }
}

/// Sent in every handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Service name from the manifest, or the program's name for clients.
    pub name: String,
    /// What we are.
    pub role: Role,
    /// How often we have been started; 0 for clients.
    pub incarnation: u32,
    /// What accepted connections may ask for; `None` when nothing is served.
    pub interface: Option<Interface>,
    /// What we accept.
    pub limits: Limits,
}

/// Where a link goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Socket of the callee.
    pub path: PathBuf,
    /// What we want from it.
    pub interface: Interface,
    /// Channel key of service roles, empty for clients and operators.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Endpoint {
    /// Without the key: it must not get into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("path", &self.path).field("interface", &self.interface).finish_non_exhaustive()
    }
}
