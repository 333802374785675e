//! What an operator sees of a running system, and of one that has died: metrics, `uhmm top`, events, traces, post-mortems.
//!
//! ```text
//!   records of services (shared memory, see uhmm_shared::record) --.
//!   supervisor: who runs ------------------------------------------+--> Sample --> metrics (OpenMetrics) --> http
//!   pager: where pages are ----------------------------------------'        `----> top
//!   records' events, merged by time --> events | trace | post_mortem
//! ```
//! Nobody is asked for what lies in a record: a service that hangs is seen as well as one that works, and being watched costs it nothing.
//! Everything but [`sample`], [`http`], [`follow`] and [`screen`] is pure.

pub mod catalog;
pub mod events;
pub mod follow;
pub mod http;
pub mod metrics;
pub mod post_mortem;
pub mod record;
pub mod sample;
pub mod screen;
pub mod top;
pub mod trace;
