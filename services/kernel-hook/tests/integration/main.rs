//! The kernel hook against the real kernel: second processes, userfaultfds that travel over sockets, other accounts.
//! Needs Linux 6.11 and root (or the rights that `uhmm doctor` names); each test runs in a second at most and leaves nothing behind.
#![allow(unsafe_code)] // Reason: fork, waitpid and setuid have no safe wrapper, and a test of two processes needs them.

mod agent_bed;
mod agent_killed;
mod agent_life;
mod agent_orders;
mod common;
mod forks;
mod huge;
mod own;
mod private;
mod process;
mod uffd;
