//! What a device model implements, and what it is given.

use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;

/// How the device introduces itself in config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass, programming interface: `0x010802` is NVMe.
    pub class: u32,
    /// MSI-X vectors.
    pub vectors: u16,
}

/// What is behind a base address register.
#[derive(Clone, Debug)]
pub enum BarKind {
    /// Every access is a call of [`DeviceModel::read`] or [`DeviceModel::write`].
    Registers {
        /// Bytes, a power of two.
        len_bytes: u64,
    },
    /// Plain memory that the driver maps.
    Memory {
        /// A sealed memfd.
        fd: Fd,
        /// Bytes, a power of two.
        len_bytes: u64,
    },
}

/// The device touched an address that nobody mapped for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA to unmapped I/O addresses {iova:#x}+{len_bytes:#x}")]
pub struct DmaFault {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub len_bytes: u64,
}

/// The machine around the device.
pub trait Host {
    /// The device reads memory.
    ///
    /// # Errors
    /// Some of it is not mapped; `bytes` are unspecified then.
    fn dma_read(&self, iova: u64, bytes: &mut [u8]) -> Result<(), DmaFault>;

    /// The device writes memory.
    ///
    /// # Errors
    /// Some of it is not mapped for writing; nothing was written then.
    fn dma_write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault>;

    /// Signals an MSI-X vector, if the driver has set it.
    fn interrupt(&self, vector: u16);

    /// The device is pulled out: this call is its last one.
    fn unplug(&self);
}

/// A device. Never called twice at once; nothing may wait, and a call does a bounded piece of work (a driver's access waits for it).
pub trait DeviceModel: Send {
    /// Who it is.
    fn identity(&self) -> Identity;

    /// Its base address registers, by number; each once.
    fn bars(&self) -> Vec<(u8, BarKind)>;

    /// The driver reads registers (1, 2, 4 or 8 bytes, aligned, inside the BAR).
    fn read(&mut self, bar: u8, offset: u64, bytes: &mut [u8]);

    /// The driver writes registers.
    fn write(&mut self, bar: u8, offset: u64, bytes: &[u8], host: &dyn Host);

    /// Work that does not end inside a register access. Returns when it wants to be called again; `None`: at the next access. Called
    /// only while a driver is there and bus mastering is on, so an `Instant` of an earlier call may be long past.
    fn advance(&mut self, now: Instant, host: &dyn Host) -> Option<Duration>;

    /// Function-level reset: registers and queues as after power-up, device memory as it is.
    fn reset(&mut self);
}
