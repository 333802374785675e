//! NVMe namespaces as a memory tier far larger than RAM.
//!
//! ```text
//!   driver      the parts for the kit; cmb: the controller's own memory instead of the namespace
//!   kit's copy thread, compute units --- engine: staging, pages, mapped for DMA      (seal = "none")
//!                                    \-- sealed: lanes of uhmm-driver-block over mapped buffers
//!                                          |
//!   namespace   frames -> blocks, the header in front of them, taking it at the start
//!   shell       registers, queue memory, interrupts, who waits for whom
//!   start       what a controller begins with
//!   machine     the controller's life and everything in flight: event, now -> actions       (pure)
//!   queue       one queue pair as bookkeeping: slots, ids, phases                            (pure)
//!   book        what of it the next incarnation has to know, in the vault's memory
//!   protocol    registers, commands, completions, identify pages as data; layout: what lies where
//! ```

pub mod book;
pub mod cmb;
mod driver;
pub mod engine;
pub mod error;
pub mod header;
pub mod layout;
pub mod machine;
pub mod namespace;
pub mod protocol;
pub mod queue;
pub mod sealed;
pub mod shell;
mod start;

pub use driver::{NvmeDriver, run};
