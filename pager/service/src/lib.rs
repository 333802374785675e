//! The pager service: owns every region's directory and userfaultfd, answers CPU faults, moves pages.
//!
//! The decisions are in `uhmm-pager-core` (pure); this crate does what it decides. One file a concern:
//!
//! | file | what |
//! | --- | --- |
//! | `service` | the loop, life and death of spaces and regions |
//! | `fault` | userfaultfd events |
//! | `execute` | the core's actions: every system call of the data path |
//! | `revoke`, `revoking` | revocation, direct and by message |
//! | `calls`, `requests` | messages in, answers out |
//! | `clients` | making spaces and regions, checking what clients say |
//! | `drivers` | driver sessions |
//! | `devices`, `space`, `directory` | what there is, and how it lies in the vault |
//! | `recover` | a new incarnation's first act |

mod calls;
mod clients;
mod devices;
mod directory;
mod drivers;
mod execute;
mod fault;
mod recover;
mod requests;
mod revoke;
mod revoking;
mod service;
mod space;
mod stats;

pub use service::{Pager, PagerError, run};
