//! One manifest (TOML) says what runs; resolved once into an immutable plan that can be printed and drawn.
//!
//! ```text
//!   text --parse--> Manifest (as written; unknown keys refused) --resolve--> Plan (checked, complete, in start order)
//! ```
//!
//! Wiring is data: which services there are, which device each drives, who may talk to whom, quotas, restart policy, sandbox.
//! Services get the plan from the supervisor when they register and never see the manifest.

mod accounts;
mod clients;
mod error;
mod nbd;
mod parse;
mod plan;
mod resolve;
mod show;

pub use clients::Client;
pub use error::ManifestError;
pub use nbd::{NbdPlace, NbdUrl, Urls};
pub use parse::{
    ByteSize, ClientEntry, Device, Holder, Join, Kind, Manifest, Quota, Restart, Sandbox, SandboxMode, Seal, Service,
    Supervisor,
};
pub use plan::{Account, Channel, ClientPlan, DevicePlan, Plan, RemotePlan, ServicePlan};
pub use resolve::MEMORY_BYTES_MAX;

/// Devices that one plan can have: one bit each in a directory entry.
pub const DEVICE_COUNT_MAX: usize = 8;

#[cfg(test)]
mod tests;
