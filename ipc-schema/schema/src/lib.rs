//! Cap'n Proto bindings of every uhmm interface, one module a schema file.
//!
//! The schemas (`*.capnp` beside this crate) are the protocol's definition and its documentation: what every method means,
//! whether it may be repeated and since when it exists. `uhmm-ipc` turns these bindings into owned Rust messages; nothing
//! else uses them directly.
//!
//! ```text
//!   *.capnp --(./regenerate, by hand)--> request.bin --(build.rs)--> generated::*_capnp --(uhmm-ipc codec)--> message enums
//! ```

pub use generated::{common_capnp, driver_capnp, mirror_capnp, pager_capnp, sdk_capnp, supervisor_capnp};

/// Generated code. The one place where lints are switched off: nobody edits it.
#[allow(missing_docs, unused, clippy::all)]
mod generated {
    pub mod common_capnp {
        include!(concat!(env!("OUT_DIR"), "/common_capnp.rs"));
    }
    pub mod driver_capnp {
        include!(concat!(env!("OUT_DIR"), "/driver_capnp.rs"));
    }
    pub mod mirror_capnp {
        include!(concat!(env!("OUT_DIR"), "/mirror_capnp.rs"));
    }
    pub mod pager_capnp {
        include!(concat!(env!("OUT_DIR"), "/pager_capnp.rs"));
    }
    pub mod sdk_capnp {
        include!(concat!(env!("OUT_DIR"), "/sdk_capnp.rs"));
    }
    pub mod supervisor_capnp {
        include!(concat!(env!("OUT_DIR"), "/supervisor_capnp.rs"));
    }
}
