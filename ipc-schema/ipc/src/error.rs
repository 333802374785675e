//! Errors of the reactor itself. What a peer does wrong is no error here: it ends that peer's connection.

use uhmm_kernel_hook::HookError;

/// A call into the [`Reactor`](crate::Reactor) that could not be done.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// epoll failed.
    #[error("The event loop cannot {action}")]
    Poll {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A limit is out of its range.
    #[error("The limit {name} is {value}: choose {allowed}")]
    Limit {
        /// Field of [`Limits`](crate::Limits).
        name: &'static str,
        /// What was asked.
        value: u32,
        /// What is possible.
        allowed: &'static str,
    },
    /// The name does not fit into a handshake.
    #[error("The name of this process has {len_bytes} bytes: choose one of 1 to {max_bytes}")]
    Name {
        /// Its length.
        len_bytes: usize,
        /// Most.
        max_bytes: u32,
    },
    /// `listen` without an interface to serve.
    #[error("Nothing is served on the listener: set Identity::interface before listening")]
    NothingServed,
    /// The descriptor is not among those being watched.
    #[error("The descriptor {raw_fd} is not watched: add it first")]
    NotWatched {
        /// Its number.
        raw_fd: i32,
    },
    /// A system call of the kernel hook failed.
    #[error("The event loop's socket failed")]
    Hook(#[from] HookError),
}
