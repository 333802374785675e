//! Reads and writes of a file, many at once, straight between the medium and mapped memory.
//!
//! ```text
//!   submit --> io_uring, with registered file and buffers        (what kernel and container allow is tried, in this order)
//!         \--> threads that call pread and pwrite
//!   wait   <-- whatever has ended, in any order
//! ```
//! Each transfer holds its memory from submission to end, so nothing that the kernel still reads or writes is ever unmapped. What the
//! kernel does in part is gone on with; a file that ends too early is an error of that transfer.

mod pool;
mod ring;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::error::HookError;
use crate::window::Window;

/// One read or write.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// The caller's name for it.
    pub token: u64,
    /// Memory to file; else file to memory.
    pub write: bool,
    /// Where in the file.
    pub offset: u64,
    /// The memory.
    pub window: Arc<Window>,
    /// Where in it.
    pub at: u64,
    /// Bytes.
    pub len: u32,
}

/// How a transfer ended: all of it, or why not.
#[derive(Debug)]
pub struct Finished {
    /// From the transfer.
    pub token: u64,
    /// `UnexpectedEof`: the file ends before.
    pub outcome: Result<(), io::Error>,
}

/// How transfers are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskMode {
    /// io_uring where it is allowed, threads otherwise.
    #[default]
    Auto,
    /// io_uring or nothing.
    Ring,
    /// Threads.
    Threads,
}

/// See the module head. Not to be dropped before all has ended: it waits for that, for a while.
#[derive(Debug)]
pub struct Disk {
    way: Way,
}

#[derive(Debug)]
enum Way {
    Ring(Box<ring::Ring>),
    Pool(pool::Pool),
}

impl Disk {
    /// For up to `depth` transfers at once. `memory`: what most of them will use, registered where the account's limits allow it.
    ///
    /// # Errors
    /// `Call`: io_uring was asked for and is refused, or no thread can be started.
    pub fn open(file: Arc<OwnedFd>, depth: u32, memory: &[Arc<Window>], mode: DiskMode) -> Result<Self, HookError> {
        if mode != DiskMode::Threads {
            match ring::Ring::open(file.clone(), depth, memory) {
                Ok(ring) => return Ok(Self { way: Way::Ring(Box::new(ring)) }),
                Err(error) if mode == DiskMode::Ring => return Err(error),
                Err(_) => {}
            }
        }
        Ok(Self { way: Way::Pool(pool::Pool::start(file, depth)?) })
    }

    /// How transfers are made, for logs.
    pub fn describe(&self) -> &'static str {
        match &self.way {
            Way::Ring(ring) => ring.describe(),
            Way::Pool(_) => "threads with pread and pwrite",
        }
    }

    /// Starts one.
    ///
    /// # Errors
    /// `OutOfWindow`, `ReadOnly`: the memory is not what the transfer says. `Call`: `depth` are under way, or the kernel takes no more. Nothing was started.
    pub fn submit(&mut self, transfer: Transfer) -> Result<(), HookError> {
        match &mut self.way {
            Way::Ring(ring) => ring.submit(transfer),
            Way::Pool(pool) => pool.submit(transfer),
        }
    }

    /// Waits until at least one has ended or the time is over, and takes all that have. Returns at once when nothing is under way.
    ///
    /// # Errors
    /// `Call`.
    pub fn wait(&mut self, patience: Duration, done: &mut Vec<Finished>) -> Result<(), HookError> {
        match &mut self.way {
            Way::Ring(ring) => ring.wait(patience, done),
            Way::Pool(pool) => {
                pool.wait(patience, done);
                Ok(())
            }
        }
    }
}

/// The memory is there, and may be used that way.
fn check(transfer: &Transfer) -> Result<*mut u8, HookError> {
    let (at, len) = (transfer.at, u64::from(transfer.len));
    if transfer.write { transfer.window.at(at, len) } else { transfer.window.at_mut(at, len) }
}

fn full() -> HookError {
    HookError::failed("submitting a transfer", io::Error::from_raw_os_error(libc::EBUSY))
}

#[cfg(test)]
mod tests;
