//! The typed messages of every interface, as owned Rust values.
//!
//! One file an interface, the twin of one `schema/*.capnp` file. Services match on these enums and never see Cap'n Proto;
//! the conversions live in `crate::codec`. Descriptors are fields here ([`Fd`]) and travel by SCM_RIGHTS beside the bytes.

mod agent;
mod claims;
pub mod common;
pub mod driver;
pub mod mirror;
pub mod pager;
mod policy;
pub mod supervisor;
mod traces;

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use common::{Aperture, ErrorCode, Hello, Interface, Metric, Role, Welcome, WireError};

/// A descriptor inside a message. Shared, so that an idempotent call can be sent again after a restart.
pub type Fd = Arc<OwnedFd>;

/// Follows one request from the client's call to the device's copy; `0` means "not traced".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TraceId(pub u64);

/// A request of any interface; exactly one [`Reply`] or [`WireError`] answers it.
#[derive(Clone, Debug)]
pub enum Call {
    /// Common to every service.
    Common(common::Call),
    /// To the supervisor.
    Supervisor(supervisor::Call),
    /// To the pager.
    Pager(pager::Call),
    /// To the mirror.
    Mirror(mirror::Call),
    /// To a driver.
    Driver(driver::Call),
}

/// A successful answer.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Common to every service.
    Common(common::Reply),
    /// From the supervisor.
    Supervisor(supervisor::Reply),
    /// From the pager.
    Pager(pager::Reply),
    /// From the mirror.
    Mirror(mirror::Reply),
    /// From a driver.
    Driver(driver::Reply),
}

/// A one-way message, always downward (from a service to those who logged in to it).
#[derive(Clone, Debug)]
pub enum Event {
    /// From the supervisor.
    Supervisor(supervisor::Event),
    /// From the pager.
    Pager(pager::Event),
    /// From the mirror.
    Mirror(mirror::Event),
}

impl Call {
    /// Whether the call may be sent again after the callee restarted. The link does so by itself; a call that is not
    /// idempotent ends with [`ErrorCode::Stale`] instead.
    pub fn idempotent(&self) -> bool {
        match self {
            Call::Common(_) | Call::Supervisor(_) | Call::Pager(_) | Call::Mirror(_) => true,
            Call::Driver(call) => call.idempotent(),
        }
    }
}
