//! NVMe as data: registers, 64-byte commands, 16-byte completions, identify pages. Nothing here talks to anybody.

pub mod command;
pub mod completion;
pub mod identify;
pub mod registers;

pub use command::{Command, Opcode, QueueId};
pub use completion::{Completion, Status};
pub use identify::{ControllerInfo, IdentifyError, NamespaceInfo};
pub use registers::{Capabilities, CmbInfo, Status as ControllerStatus};
