//! The kernel hook: every ioctl, mmap and SCM_RIGHTS of uhmm, behind functions that are safe to call.
//!
//! This is the one crate of the project with `unsafe`; each block says why it is sound. What leaves it is either plain data or
//! an owner (descriptor, mapping) that releases itself. Three things cannot be proved by types and hold by contract instead:
//!
//! * **Shared memory may change under us.** Another process (a driver, a client) may write to a mapped page at any time. The
//!   accessors of [`MappedBytes`] therefore never form a `&[u8]` over mapped memory: they go through atomics and raw copies.
//! * **Addresses of a userfaultfd belong to the process that made it.** Calls of [`Userfaultfd`] take plain numbers. A number
//!   outside a registered range is refused by the kernel, and a fill never replaces a page that is there; only
//!   [`Userfaultfd::move_pages`] takes pages away, so its caller must own the source range (the SDK's agent does).
//! * **The pager is trusted with client memory.** It brings the same bytes home, so a typed value in a [`ManagedMapping`] may
//!   leave and return between two instructions of its owner.
//!
//! ```text
//!   range, error     words everybody uses: AddrRange, PAGE_SIZE, HookError
//!   abi, sys         kernel structs and ioctl numbers (the build machine's headers are older than the kernel)
//!   guarded          bulk copies of memory that may vanish
//!   bytes            MappedBytes: the safe accessors      -> window: Window, managed: ManagedMapping -> bump: Bump
//!   uffd             Userfaultfd, FillOutcome             memfd, procmap, pagemap, smaps: files and /proc
//!   socket, event    SeqPacket, SeqListener, Stream, EventFd      process: PidFd, memory and scheduling of processes
//!   disk             transfers between files and memory, many at once
//!   confine          what a process gives up before it runs its program: seccomp, Landlock, capabilities, namespaces
//!   fd_keeper        descriptors of a process that was killed
//!   own_memory       this process's own ranges by number (the SDK's agent)
//!   agent            the SDK's agent: its memory and its process
//!   secluded         a thread with descriptors of its own
//!   threads          what the kernel writes when a thread of this process ends
//!   stand_in         a mapping that takes the place of another one
//!   huge_file        writing to files of huge pages
//!   program, fork    memory and children of test programs -> huge_pool: huge pages for them
//!   vfio             a PCI device and what it may reach
//!   manager          what a service manager and a service tell each other
//!   hostile          what a hostile driver tries, for tests
//!   probe            what this kernel and account offer (for `uhmm doctor`)
//! ```
#![allow(unsafe_code)] // Reason: the workspace denies unsafe everywhere else, so that all of it is reviewed here.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("uhmm needs 64-bit Linux");

mod abi;
pub mod agent;
pub mod bump;
pub mod bytes;
pub mod confine;
pub mod cpus;
pub mod disk;
pub mod error;
pub mod event;
pub mod fatal;
pub mod fd_keeper;
pub mod fork;
pub mod guard;
mod guarded;
pub mod heap;
pub mod hostile;
pub mod huge_file;
pub mod huge_pool;
pub mod managed;
pub mod manager;
pub mod memfd;
pub mod own_memory;
pub mod pagemap;
pub mod probe;
pub mod process;
pub mod procmap;
pub mod program;
pub mod range;
pub mod secluded;
pub mod signal;
pub mod smaps;
pub mod socket;
pub mod stand_in;
mod sys;
pub mod sysv;
pub mod threads;
pub mod uffd;
pub mod vfio;
pub mod window;

pub use bump::{Bump, Full};
pub use bytes::{Advice, MappedBytes};
pub use disk::{Disk, DiskMode};
pub use error::HookError;
pub use event::EventFd;
pub use managed::ManagedMapping;
pub use probe::Probe;
pub use process::{PidFd, random_bytes};
pub use range::{AddrRange, PAGE_SIZE};
pub use socket::stream::{Stream, StreamListener, StreamStatus};
pub use socket::{RecvStatus, SendStatus, SeqListener, SeqPacket};
pub use uffd::{
    CopyMode, Features, FillOutcome, FillStop, RegisterMode, RegistrationProbe, UffdEvent, UffdKind, UffdState,
    Userfaultfd, WpOutcome,
};
pub use window::{Prot, Window};
