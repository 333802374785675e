//! Driver interface, for SDK clients: open a queue, submit jobs on virtual addresses.

use super::{Aperture, Fd};

/// What a device does with a range of virtual addresses on its own, without a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessOp {
    /// Range to buffer.
    Read,
    /// Buffer to range.
    Write,
    /// Adds to every aligned 8-byte word of the range, wrapping; the buffer gets the words from before. Not idempotent.
    FetchAdd(u64),
    /// The pages become the device's alone; nothing is read or written.
    MakeExclusive,
    /// Pages are brought and mapped as for a read; nothing is read or written.
    Map,
    /// Range to buffer, up to the first page that the device does not map: nothing is brought. NotFound when that is the first one.
    Peek,
    /// As `Map`, so that the device may write the pages.
    MapForWrite,
}

/// Whole pages that a job uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct JobRange {
    /// First address, page aligned.
    pub addr: u64,
    /// Bytes, a multiple of the page size.
    pub len_bytes: u64,
    /// The job writes there.
    pub write: bool,
}

/// Requests to a driver.
#[derive(Clone, Debug)]
pub enum Call {
    /// What the device is.
    Info,
    /// Work on behalf of a space; the token proves that the caller owns it. Idempotent.
    OpenQueue {
        /// Space.
        space: u64,
        /// From the pager's `SpaceOpened`.
        token: Vec<u8>,
    },
    /// Run a kernel. The reply comes when the job has ended.
    Submit {
        /// Space of an opened queue.
        space: u64,
        /// Kernel name, as listed by `Info`.
        kernel: String,
        /// Arguments: addresses, lengths, constants.
        args: Vec<u64>,
        /// The job may be run again from its start (it only reads, or writes absolute values).
        idempotent: bool,
        /// What it uses: brought and mapped before it starts, as far as there is room; what is missing then is faulted in.
        ranges: Vec<JobRange>,
    },
    /// Read or write a range through the device. Missing pages are faulted in with one range fault.
    Access {
        /// Space of an opened queue.
        space: u64,
        /// First address, page aligned.
        addr: u64,
        /// Bytes, a multiple of the page size.
        len_bytes: u64,
        /// What.
        op: AccessOp,
        /// Sealed memfd of at least `len_bytes`; where no bytes go nobody looks at it.
        buffer: Option<Fd>,
    },
}

impl Call {
    /// See [`super::Call::idempotent`].
    pub fn idempotent(&self) -> bool {
        match self {
            Call::Info | Call::OpenQueue { .. } => true,
            Call::Submit { idempotent, .. } => *idempotent,
            Call::Access { op, .. } => !matches!(op, AccessOp::FetchAdd(_)),
        }
    }
}

/// A coherent device's memory, for the agent of a client that has proven itself to map.
#[derive(Clone, Debug)]
pub struct CoherentMemory {
    /// Device id in the plan.
    pub device: u8,
    /// Names the memory, as in the pager's `DriverLogin`.
    pub generation: u64,
    /// All of it.
    pub memory: Aperture,
}

/// Answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Answer to `Info`.
    Info {
        /// Driver's name, e.g. `soft`.
        driver: String,
        /// Device id in the plan.
        device: u8,
        /// Device memory in bytes.
        memory_bytes: u64,
        /// The CPU can see device memory.
        aperture: bool,
        /// The program reaches pages of allocated memory there without bringing them home.
        coherent: bool,
        /// Kernels that `Submit` takes, with their argument lists, one line each.
        kernels: Vec<String>,
    },
    /// Answer to `OpenQueue`.
    QueueOpened {
        /// Its memory, if the device is coherent.
        coherent: Option<CoherentMemory>,
    },
    /// Answer to `Access`: all pages were done.
    Accessed {
        /// Pages.
        page_count: u64,
        /// Device faults it met: 1 when nothing was mapped and nobody interfered.
        fault_count: u64,
    },
    /// Answer to `Submit`.
    Finished {
        /// What the kernel returned.
        results: Vec<u64>,
        /// Device faults the job met.
        fault_count: u64,
        /// Time on the device.
        run_time_ns: u64,
    },
}
