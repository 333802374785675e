//! What uhmm's processes say to each other, and how.
//!
//! * [`message`]: the protocol as owned Rust enums. Services match on these and never see Cap'n Proto.
//! * [`Reactor`]: one single-threaded event loop under every process: accepts connections, keeps links to other services
//!   alive across their restarts, carries calls, replies, events, descriptors and timers.
//! * [`ring`] and [`shared`]: the structures in shared memory that save messages on the hot paths: copy ring, device page
//!   table, gate.
//!
//! ```text
//!   owner (a service, the SDK)              reactor                                   peer process
//!     poll(out: Vec<Wake>) <------------- Wake ------ decode <- recv <---- SOCK_SEQPACKET, one Envelope a datagram
//!     call / reply / event --------------------------> encode -> send ---> descriptors beside it by SCM_RIGHTS
//! ```
//!
//! A peer is never trusted: whatever arrives is copied out of the socket, bounded, parsed strictly, and a violation costs the
//! peer its connection and nobody else anything.

pub mod message;
pub mod ring;
pub mod shared;

mod codec;
mod error;
mod handshake;
mod identity;
mod ids;
mod reactor;
mod trace;
mod transport;
mod wake;

pub use error::IpcError;
pub use handshake::{OPERATORS, same_bytes};
pub use identity::{Endpoint, Identity, Limits};
pub use ids::{CallId, ConnId, FdToken, LinkId, TimerId, TimerToken};
pub use reactor::{Reactor, Waker};
pub use wake::{Peer, PeerProcess, Wake};

/// Facts of the protocol that both ends share, from the schema files.
pub mod constants {
    pub use uhmm_schema::common_capnp::{
        MAJOR_VERSION, MAX_KEY_BYTES, MAX_METRICS, MAX_NAME_BYTES, MAX_TEXT_BYTES, MINOR_VERSION,
    };
    pub use uhmm_schema::pager_capnp::{MAX_REGIONS, MAX_REST_MS};
    pub use uhmm_schema::sdk_capnp::{
        MAX_DEVICES, MAX_JOB_RANGES, MAX_JOB_WORDS, MAX_KERNELS, MAX_RUNS, MAX_TOKEN_BYTES, MAX_TRACE_RECORDS,
        PAGE_BYTES,
    };
    pub use uhmm_schema::supervisor_capnp::{MAX_CHANNEL_KEYS, MAX_PLAN_BYTES, MAX_SERVICES, MAX_VAULT_ENTRIES};
}
