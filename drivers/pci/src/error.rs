//! What goes wrong between a driver and its PCI device.

use std::path::PathBuf;

use crate::backend::{InterruptKind, RegionIndex};

/// Nothing was changed unless a variant says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// The manifest's `pci` text.
    #[error("{text:?} names no PCI device: write an address like \"0000:00:05.0\", or \"vfio-user:/path/to/socket\"")]
    Path {
        /// As written.
        text: String,
    },
    /// The device could not be opened or adopted.
    #[error("{device} could not be opened: {problem}")]
    Open {
        /// Which device.
        device: String,
        /// What was wrong and what to do.
        problem: String,
        /// The reason below it, if there is one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The device has no such region, or it is too short.
    #[error("{region} has no bytes {offset:#x}+{len:#x} (it has {region_len:#x}): the driver does not fit this device")]
    OutOfRegion {
        /// Which one.
        region: RegionIndex,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes there are.
        region_len: u64,
    },
    /// An access to a register or to config space failed.
    #[error("Access to {region} at {offset:#x} failed")]
    Access {
        /// Which one.
        region: RegionIndex,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The IOMMU (or the device's process) refused a mapping.
    #[error("DMA mapping of {len:#x} bytes at IOVA {iova:#x} failed: {hint}")]
    Map {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
        /// What to do.
        hint: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No room that the device can address.
    #[error("No {len:#x} bytes of IOVA below {limit:#x} are free: the device addresses no more, map less at once")]
    NoIova {
        /// Bytes asked for.
        len: u64,
        /// One past the last address that was allowed.
        limit: u64,
    },
    /// IOVAs that somebody uses, or that this platform reserves.
    #[error("IOVA {iova:#x}+{len:#x} is in use or reserved: choose others")]
    IovaTaken {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// Interrupts could not be routed.
    #[error("{kind:?} interrupts could not be set")]
    Interrupts {
        /// Which ones.
        kind: InterruptKind,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The device cannot do what was asked.
    #[error("{device} cannot {what}")]
    Unsupported {
        /// Which device.
        device: String,
        /// What it cannot do.
        what: &'static str,
    },
    /// The device, or the process that plays it, is gone or does not answer.
    #[error("{device} is gone: {problem}")]
    Gone {
        /// Which device.
        device: String,
        /// How that was noticed.
        problem: String,
    },
    /// The reset failed; the device's state is unknown.
    #[error("{device} could not be reset: its state is unknown")]
    Reset {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("System call for a PCI device failed")]
    Hook(#[from] uhmm_kernel_hook::HookError),
    /// A file of the device failed (sysfs, socket).
    #[error("{} failed", .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
