//! The C interface of the SDK: `libuhmm.so` and `include/uhmm.h`.
//!
//! ```text
//!   C program ---- uhmm_x(handle, pointers, lengths) ----> guard: catches panics, keeps the text of an error for the thread
//!                                                            |
//!      0 or -errno  <---- number of the error ----           |-- handles: number -> Arc<object>; never dereferenced
//!                                                            |-- buffers: null, alignment and length are checked, then used
//!                                                            v
//!                                                          uhmm_sdk
//! ```
//!
//! Every exported function has the same shape: a closure in `error::guard` that turns what came from C into checked Rust values
//! first and only then calls the SDK. `include/uhmm.h` is generated from this source by `tests/header.rs`, which also
//! fails when the committed file is not what the source says (`UHMM_BLESS=1` writes it).
#![allow(unsafe_code, reason = "pointers of C programs are read and written here, and nowhere else in the SDK")]
#![allow(non_camel_case_types, reason = "type names are those of the C header")]
#![allow(clippy::missing_safety_doc, reason = "the one contract on pointers is written at the head of uhmm.h")]

mod buffers;
pub mod device;
pub mod device_async;
pub mod error;
pub mod everything;
mod handles;
mod home;
pub mod jobs;
pub mod memory;
pub mod migrate;
pub mod observe;
pub mod pending;
pub mod policy;
pub mod session;
pub mod stats;
