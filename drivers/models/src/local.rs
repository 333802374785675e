//! A model in the driver's own process: what unit tests of drivers run against, without sockets.
//!
//! Dropping the backend is the death of the driver; a new one on the same [`Machine`] finds the device as it was.

use std::io;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::EventFd;
use uhmm_pci::{DmaMemory, DmaRight, InterruptKind, IovaRange, PciBackend, PciError, RegionIndex, RegionInfo};

use crate::machine::{Machine, MachineError};
use crate::model::DeviceModel;

const NAME: &str = "device model in this process";

/// See the module head.
#[derive(Debug)]
pub struct ModelBackend {
    machine: Machine,
    adopted: bool,
}

impl ModelBackend {
    /// Powers a model up and connects to it.
    ///
    /// # Errors
    /// The model is no PCI device.
    pub fn start(model: Box<dyn DeviceModel>) -> Result<Self, MachineError> {
        Self::connect(&Machine::start(model)?)
    }

    /// Connects to a device that runs.
    ///
    /// # Errors
    /// `Busy` while another backend has it; `Removed`.
    pub fn connect(machine: &Machine) -> Result<Self, MachineError> {
        let adopted = machine.connect()?;
        Ok(Self { machine: machine.clone(), adopted })
    }

    /// The machine, to be looked at, pulled out, or connected to again after this backend is gone.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
}

impl Drop for ModelBackend {
    fn drop(&mut self) {
        self.machine.disconnect();
    }
}

impl PciBackend for ModelBackend {
    fn describe(&self) -> String {
        NAME.to_owned()
    }

    fn is_adopted(&self) -> bool {
        self.adopted
    }

    fn region(&self, region: RegionIndex) -> Option<RegionInfo> {
        self.machine.region(region)
    }

    fn read(&self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError> {
        self.machine.read(region, offset, bytes).map_err(|error| access_error(region, offset, error))
    }

    fn write(&self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        self.machine.write(region, offset, bytes).map_err(|error| access_error(region, offset, error))
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        vec![IovaRange { start: 0, end: 1 << 48 }]
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, right: DmaRight) -> Result<(), PciError> {
        let len = memory.len_bytes();
        self.machine
            .dma_map(iova, &memory.fd, memory.offset_bytes, len, right)
            .map_err(|error| map_error(iova, len, error))
    }

    fn dma_unmap(&self, iova: u64, len_bytes: u64) -> Result<(), PciError> {
        self.machine.dma_unmap(iova, len_bytes).map_err(|error| map_error(iova, len_bytes, error))
    }

    fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        self.machine.interrupt_count(kind)
    }

    fn set_interrupts(&self, kind: InterruptKind, events: &[EventFd]) -> Result<(), PciError> {
        let count = self.machine.interrupt_count(kind) as usize;
        let mut all = events.iter().map(|event| event.try_clone().map(Some)).collect::<Result<Vec<_>, _>>()?;
        while all.len() < count {
            all.push(None);
        }
        self.machine.set_interrupts(kind, 0, all).map_err(|error| match error {
            MachineError::Removed => gone(&error),
            other => PciError::Interrupts { kind, source: io::Error::other(other) },
        })
    }

    fn reset(&self) -> Result<(), PciError> {
        self.machine.reset().map_err(|error| gone(&error))
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        Vec::new()
    }
}

fn gone(error: &MachineError) -> PciError {
    PciError::Gone { device: NAME.to_owned(), problem: error.to_string() }
}

fn access_error(region: RegionIndex, offset: u64, error: MachineError) -> PciError {
    match error {
        MachineError::Removed => gone(&error),
        other => PciError::Access { region, offset, source: io::Error::other(other) },
    }
}

fn map_error(iova: u64, len: u64, error: MachineError) -> PciError {
    match error {
        MachineError::Removed => gone(&error),
        other => PciError::Map {
            iova,
            len,
            hint: "give it whole pages of a sealed memfd, at addresses that are free",
            source: io::Error::other(other),
        },
    }
}
