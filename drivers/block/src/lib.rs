//! Device memory in blocks of a medium that everybody has: a file on a local disk, a partition, or an export of a block server.
//!
//! ```text
//!   driver      the parts for the kit; taking a medium or going on with it
//!   engine      kit's copy thread, compute units: a lane each
//!   lane        the machine's orders carried out: seal, send, check
//!   machine     requests in flight, reads first, lateness, tries: event, now -> actions     (pure)
//!   store       frames and blocks; what rests and what is free                               (pure, over the table)
//!   runs        free blocks                                                                 (pure)
//!   table       block, generation and tag of every page, in the vault's memory
//!   backend     what a medium has to do         file: O_DIRECT, by io_uring or threads; nbd: block servers
//!   header      whose medium it is
//! ```
//! docs/block.md says what it promises, docs/remote.md what block servers add.

pub mod backend;
mod driver;
pub mod engine;
pub mod file;
pub mod header;
pub mod lane;
pub mod machine;
pub mod nbd;
pub mod runs;
pub mod store;
pub mod table;

pub use driver::{FileDriver, Taken, run, take};
pub use nbd::run as run_nbd;
