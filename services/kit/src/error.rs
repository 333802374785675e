//! Why a service could not start.

use std::path::PathBuf;

use uhmm_ipc::message::WireError;

use crate::KEY_VARIABLE;

/// See the module head.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// Started by hand.
    #[error("{KEY_VARIABLE} is missing: services are started by the supervisor (`uhmm up`)")]
    NoKey,
    /// Not the supervisor's command line.
    #[error("Argument {option} is missing, unknown or wrong: services are started by the supervisor (`uhmm up`)")]
    Arguments {
        /// Which.
        option: String,
    },
    /// A token that cannot be shown.
    #[error("Token file {path} cannot be used: {problem}", path = path.display())]
    Token {
        /// Where.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The folder with the sockets.
    #[error("Socket folder {path} cannot be used: {problem}", path = path.display())]
    Folder {
        /// Where.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The manifest does not let this process in.
    #[error("The supervisor does not let this process in")]
    NotLetIn {
        /// What it said.
        #[source]
        error: WireError,
    },
    /// Unknown service or incarnation.
    #[error("The supervisor refused to register this service")]
    Refused {
        /// What it said.
        #[source]
        error: WireError,
    },
    /// The supervisor is of another version.
    #[error("The supervisor answered {question} with something else")]
    StrangeReply {
        /// What was asked.
        question: &'static str,
    },
    /// The plan could not be read.
    #[error("The supervisor's plan is not readable")]
    Plan(#[from] uhmm_manifest::ManifestError),
    /// A descriptor could not be duplicated.
    #[error("A descriptor could not be duplicated: raise the limit of open files")]
    Descriptor {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused the restriction.
    #[error("The service could not give up gaining privileges")]
    NoNewPrivs {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The event loop.
    #[error("The event loop failed")]
    Ipc(#[from] uhmm_ipc::IpcError),
    /// A system call.
    #[error("A system call failed")]
    Hook(#[from] uhmm_kernel_hook::HookError),
}
