//! The agent: a process that shares a program's address space and nothing else, and does there what Linux lets only a process of that
//! address space do (UFFDIO_MOVE, MADV_DONTNEED, MADV_POPULATE_WRITE). The pager orders, through shared memory; the SDK starts it.
//!
//! ```text
//!   SDK: clone(CLONE_VM) --> [close what is not ours, own process group, default signals] --> sleep on bell and life (futex_waitv)
//!                                                                                        |  ^
//!                           bell: order there --> do it (orders.rs) --> answer, eventfd -+--+
//!                           life: the SDK's thread is dead --> does anybody still use this memory? (life.rs) --> no: exit
//! ```
//!
//! It takes part in none of the program's malloc, signals, descriptors, root folder, user id, seccomp filters and threads, so nothing
//! that the program does to these can hold it up, and none of them may be touched here:
//!
//! * **no allocation, no thread-local memory, no panic, no lock, no libc.** `fs` is the register of the thread that cloned us, so a
//!   single access through it (errno, a stack protector, `thread_local!`) would be an access to somebody else's variable. The
//!   test `integration_the_agents_object_code_is_free_of_tls_allocation_and_panics` in `tests/object_code.rs` looks at the machine code.
//! * **no managed memory.** Who brings a page home may have to wait for the agent. Its stack, its records, scratch and staging lie in
//!   mappings of the SDK that are refused for adoption; what it moves it names by number only, and it reads pages in place through
//!   /proc/self/mem, which answers with an error where a touch would wait.
//!
//! `unsafe` is opened here as in the kernel hook, because the kernel hook needs the standard library: all of it is in `sys.rs` (system
//! calls and the few raw accesses), `memory.rs` and `life.rs` (words at a fixed address) and `spawn.rs` (clone).
#![cfg_attr(not(test), no_std)]
#![allow(unsafe_code)] // Reason: see the last paragraph of the head.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("The agent is written for Linux on x86-64");

mod huge;
mod life;
mod look;
mod memory;
mod orders;
mod spawn;
mod sys;
mod taken;

pub use memory::{SCRATCH_BYTES, Work};
pub use spawn::{Spawned, run_as_thread, spawn};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of a scratch block and of a staging slot.
pub const BLOCK_BYTES: u64 = uhmm_shared::agent::ORDER_PAGES * PAGE_BYTES;

/// What the agent is given: descriptors by number, memory by address. It lies in memory that is never managed and stays there for as
/// long as the agent runs.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Config {
    /// The session's userfaultfd.
    pub uffd: i32,
    /// /proc/self/pagemap of the program, open for reading.
    pub pagemap: i32,
    /// /proc/self/maps of the program, open for reading.
    pub maps: i32,
    /// /proc/self/mem of the program, open for reading; -1: read-only memory cannot be copied.
    pub mem: i32,
    /// The eventfd that tells the pager of answers.
    pub done_event: i32,
    /// Address of [`uhmm_shared::agent::WORDS`] words: the orders.
    pub orders: u64,
    /// Address of [`uhmm_shared::agent::SLOTS`] staging slots.
    pub staging: u64,
    /// Address of [`SCRATCH_BYTES`] bytes of private memory, aligned to a block.
    pub scratch: u64,
    /// Address of the agent's own records, zeroed before its first start.
    pub work: u64,
    /// Address of the lock word of a robust mutex that the SDK's thread holds for its life. 0: there is none.
    pub life: u64,
    /// This agent's number, from 1; no two of an address space have the same.
    pub number: u32,
    /// It is a process, whose timer and death are its own; otherwise a thread of the program.
    pub is_process: bool,
    /// It is the only one of its address space, so whoever else shares that is the program or a child of it. Otherwise it ends with the
    /// SDK's thread.
    pub only_one: bool,
}

/// Why an agent has ended: its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum End {
    /// It was told to.
    Told = 0,
    /// Nobody else uses this memory any more.
    Alone = 1,
    /// The ring holds what no pager writes: nothing can be taken from it or put there any more.
    BadRing = 2,
}
