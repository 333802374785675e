//! What goes wrong between the driver and its controller.

use uhmm_kernel_hook::HookError;
use uhmm_pci::PciError;

use crate::machine::{Phase, RequestError};

/// Every variant says what became of the request or the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvmeError {
    /// The way to the device.
    #[error("NVMe controller cannot be reached")]
    Pci(#[from] PciError),
    /// Memory or descriptors.
    #[error("Memory of the NVMe driver failed")]
    Hook(#[from] HookError),
    /// Not a controller for us.
    #[error("{device} cannot be driven: {problem}")]
    Unsuitable {
        /// Which device.
        device: String,
        /// What it lacks.
        problem: &'static str,
    },
    /// It did not come up.
    #[error("{device} does not come up: {reason}")]
    Setup {
        /// Which device.
        device: String,
        /// The last report.
        reason: String,
        /// Where it stopped.
        phase: Phase,
    },
    /// It could not be switched off after its last driver, and a reset failed too.
    #[error("{device} of the last incarnation cannot be stopped: power it off and on")]
    Stop {
        /// Which device.
        device: String,
    },
    /// A request failed; the frames or pages that it was to write hold anything.
    #[error("NVMe transfer failed")]
    Request(#[from] RequestError),
    /// Not pages, or outside.
    #[error("Memory or blocks of a transfer are not whole, or lie outside")]
    Bounds,
    /// Waiting for an interrupt.
    #[error("Waiting for the NVMe controller failed")]
    Wait(#[from] rustix::io::Errno),
    /// The namespace's header.
    #[error(transparent)]
    Header(#[from] crate::header::HeaderError),
}
