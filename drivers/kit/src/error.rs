//! Why a driver service stopped.

use crate::device::DeviceError;

/// Ends the driver's process; the supervisor starts it again.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The service frame failed.
    #[error("Driver service failed")]
    Kit(#[from] uhmm_kit::KitError),
    /// The event loop failed.
    #[error("Driver event loop failed")]
    Ipc(#[from] uhmm_ipc::IpcError),
    /// A system call failed.
    #[error("Driver system call failed")]
    Hook(#[from] uhmm_kernel_hook::HookError),
    /// The copy ring could not be made.
    #[error("Copy ring of the driver failed")]
    Ring(#[from] uhmm_ipc::ring::RingError),
    /// The plan has no device for this service.
    #[error("Service {name} drives no device in the plan: add a [[device]] with this service to the manifest")]
    NoDevice {
        /// Service name.
        name: String,
    },
    /// The device could not be opened.
    #[error("Device {device} could not be opened")]
    Open {
        /// Device name.
        device: String,
        /// The driver's reason.
        #[source]
        source: DeviceError,
    },
    /// It was there, and is not any more.
    #[error("Device {device} is lost: {reason}")]
    Lost {
        /// Device name.
        device: String,
        /// How that was noticed.
        reason: String,
    },
    /// Neither aperture nor engine.
    #[error("Driver {driver} offers neither an aperture nor a copy engine: device memory is out of reach")]
    NoCopyPath {
        /// Driver name.
        driver: &'static str,
    },
    /// The vault did not take device memory: it would be lost with this process.
    #[error("The vault refused a descriptor of the device: {text}")]
    Vault {
        /// The supervisor's answer.
        text: String,
    },
    /// The engine cannot reach memory that it is to copy from and to.
    #[error("The copy engine cannot use its staging area")]
    Staging(#[source] DeviceError),
    /// The copy thread could not be started.
    #[error("The copy thread could not be started")]
    Thread(#[source] std::io::Error),
}
