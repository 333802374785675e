//! Rust messages to Cap'n Proto bytes plus descriptors, and back.
//!
//! Writing trusts our own code but checks the bounds that the peer will check. Reading trusts nobody: small traversal and
//! nesting limits, a bound on every list, text and blob, unknown enum and union members refused, every descriptor named exactly
//! once and in order, none left over. The bytes are a private copy by then, so nothing changes under the parser.
//!
//! ```text
//!   Frame { header, body } --encode--> Outgoing { bytes, fds } ==socket==> aligned bytes, fds --decode--> Frame
//!                                         (both buffers are reused from message to message)
//! ```

mod common;
mod driver;
mod envelope;
mod error;
mod fds;
mod limits;
mod mirror;
mod pager;
mod supervisor;
#[cfg(test)]
mod tests;

pub(crate) use envelope::{BodyRef, Encoder, Frame, FrameBody, Header, decode};
pub(crate) use error::DecodeError;
