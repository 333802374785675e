//! The VFIO way to a PCI device, as an ordinary user: QEMU's edu is driven, nvme and ivshmem lend their special features.

mod adoption;
mod common;
mod device;
mod isolation;
mod refusal;
