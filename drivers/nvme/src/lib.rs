//! NVMe, from the wire up: what the driver of NVMe namespaces as device memory is made of.
//!
//! ```text
//!   protocol   registers, commands, completions, identify pages as data
//!   layout     what lies where in the memory that controller and driver share
//!   queue      one queue pair as bookkeeping: slots, ids, phases
//!   machine    the controller's life and everything in flight: event, now -> actions
//! ```
//! Nothing here does I/O.

pub mod layout;
pub mod machine;
pub mod protocol;
pub mod queue;
