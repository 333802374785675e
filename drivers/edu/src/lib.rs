//! QEMU's educational PCI device.
//!
//! * [`hardware`]: its registers, and what they do.

pub mod hardware;
