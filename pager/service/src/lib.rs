//! The pager service: owns every region's directory and userfaultfd, answers CPU faults, moves pages.
//!
//! The decisions are in `uhmm-pager-core` (pure); this crate does what it decides. One file a concern:
//!
//! | file | what |
//! | --- | --- |
//! | `service` | the loop |
//! | `ends` | the end of clients and regions |
//! | `fault` | userfaultfd events |
//! | `execute`, `fill`, `copies` | the core's actions: every system call of the data path |
//! | `kernel_view` | what is at a client's addresses now: the kernel is asked, nothing is remembered |
//! | `revoke`, `revoking` | revocation, direct and by message |
//! | `agent`, `agent_ops`, `agent_life` | private memory: what only the client itself can do |
//! | `rest` | a second chance for private pages on their way out |
//! | `coherent` | frames that the program maps itself, and who may use such a device |
//! | `bounce` | device to device without two apertures |
//! | `calls`, `requests`, `then` | messages in, answers out |
//! | `operator` | where anybody's pages are, and moving them, for the operator |
//! | `noted`, `timing`, `stats` | what is recorded: faults and their times, causes of migrations, counters |
//! | `hot`, `follow`, `short_wait` | how the loop waits: looking again, on the CPU of whoever faults, for microseconds |
//! | `advise`, `protection`, `trace` | advice and its cousins; what the client's own protection allows; what happened |
//! | `granted`, `revalidate` | what devices were allowed, and taking back what the program itself may not do any more |
//! | `clients`, `create` | making spaces and regions, checking what clients say |
//! | `segments`, `moved`, `fork` | which addresses show which pages, through munmap, mremap and fork |
//! | `drivers` | driver sessions |
//! | `home` | a process that stays at home, a device that is emptied; why pages stayed |
//! | `heat` | what devices use, as long as somebody asks |
//! | `devices`, `space`, `directory`, `words` | what there is, and how it lies in the vault |
//! | `recover` | a new incarnation's first act |

mod advise;
mod agent;
mod agent_life;
mod agent_ops;
mod bounce;
mod calls;
mod claims;
mod clients;
mod closing;
mod coherent;
mod copies;
mod create;
mod devices;
mod directory;
mod drivers;
mod ends;
mod execute;
mod failures;
mod fault;
mod fill;
mod follow;
mod fork;
mod granted;
mod heat;
mod home;
mod hot;
mod keepers;
mod kernel_view;
mod moved;
mod noted;
mod operator;
mod protection;
mod put_back;
mod recover;
mod registered;
mod requests;
mod rest;
mod revalidate;
mod revoke;
mod revoking;
mod rules;
mod scrubs;
mod segments;
mod service;
mod short_wait;
mod space;
mod stats;
mod then;
mod timing;
mod trace;
mod words;

pub use service::{Pager, PagerError, run};
