//! The guest harness: real VFIO on a machine without it, in a QEMU guest that boots in seconds.
//!
//! ```text
//!   host                                               guest
//!   guest-run: kernel, static binaries, initramfs
//!     | qemu, with a deadline ------------------------> guest-init (pid 1): modules, bind to vfio-pci, /dev/vfio/N to uid 1000
//!     |                                                   | one process a test, as uid 1000, each with a deadline
//!     | <---- second serial line: one JSON record a test -+
//!   JUnit, logs, "N passed, N failed"
//! ```
//! A suite is a file in `tests/guest/tests`, its tests are ordinary `#[test]`s that are ignored outside of the guest.
//! The guest has no disk: what it leaves behind is what it wrote to the two serial lines, however it ends.

pub mod devices;
pub mod records;
pub mod running;
pub mod tier;
pub mod victim;
pub mod wait;
