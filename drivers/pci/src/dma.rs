//! Memory for DMA, and mappings that live exactly as long as somebody holds them.
//!
//! ```text
//!   DmaMemory (memfd + window) --PciDevice::map_dma--> DmaMapping{iova} --drop--> unmapped, IOVA free, memory released
//! ```

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{Prot, Window, memfd};

use crate::backend::PciBackend;
use crate::error::PciError;
use crate::iova::IovaAllocator;

/// What the device may do with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaRight {
    /// The device reads.
    Read,
    /// The device reads and writes.
    ReadWrite,
}

/// Memory that has an address here (VFIO maps by address) and a descriptor (vfio-user passes it on).
#[derive(Clone, Debug)]
pub struct DmaMemory {
    /// The file.
    pub fd: Fd,
    /// Where in the file the window begins, a multiple of the page size.
    pub offset_bytes: u64,
    /// All of it.
    pub window: Arc<Window>,
}

impl DmaMemory {
    /// New zeroed memory, whole pages, allocated now: a device cannot wait for a page.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn create(name: &str, len_bytes: u64) -> Result<Self, PciError> {
        let fd: Fd = Arc::new(memfd::create_sealed(name, len_bytes)?);
        memfd::allocate(fd.as_fd(), 0, len_bytes)?;
        Self::adopt(fd, len_bytes)
    }

    /// Memory of an earlier incarnation, or of somebody else.
    ///
    /// # Errors
    /// The file is not sealed, or has another size.
    pub fn adopt(fd: Fd, len_bytes: u64) -> Result<Self, PciError> {
        memfd::check_sealed(fd.as_fd(), len_bytes)?;
        let window = Arc::new(Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?);
        Ok(Self { fd, offset_bytes: 0, window })
    }

    /// Bytes.
    pub fn len_bytes(&self) -> u64 {
        self.window.len()
    }
}

/// Memory that the device reaches, until this is dropped.
#[derive(Debug)]
pub struct DmaMapping {
    iova: u64,
    memory: DmaMemory,
    backend: Arc<dyn PciBackend>,
    iovas: Arc<Mutex<IovaAllocator>>,
}

impl DmaMapping {
    /// Called with addresses that are taken already; gives them back when the mapping fails.
    pub(crate) fn new(
        backend: Arc<dyn PciBackend>,
        iovas: Arc<Mutex<IovaAllocator>>,
        iova: u64,
        memory: DmaMemory,
        right: DmaRight,
    ) -> Result<Self, PciError> {
        let mapped = backend.dma_map(iova, &memory, right);
        Self::after(mapped, backend, iovas, iova, memory)
    }

    /// The same for a mapping of an earlier incarnation.
    pub(crate) fn adopted(
        backend: Arc<dyn PciBackend>,
        iovas: Arc<Mutex<IovaAllocator>>,
        iova: u64,
        memory: DmaMemory,
        right: DmaRight,
    ) -> Result<Self, PciError> {
        let mapped = backend.dma_adopt(iova, &memory, right);
        Self::after(mapped, backend, iovas, iova, memory)
    }

    fn after(
        mapped: Result<(), PciError>,
        backend: Arc<dyn PciBackend>,
        iovas: Arc<Mutex<IovaAllocator>>,
        iova: u64,
        memory: DmaMemory,
    ) -> Result<Self, PciError> {
        match mapped {
            Ok(()) => Ok(Self { iova, memory, backend, iovas }),
            Err(error) => {
                iovas.lock().unwrap_or_else(PoisonError::into_inner).free(iova);
                Err(error)
            }
        }
    }

    /// Where the device finds byte `offset`.
    pub fn iova(&self, offset: u64) -> u64 {
        self.iova + offset
    }

    /// The memory.
    pub fn memory(&self) -> &DmaMemory {
        &self.memory
    }

    /// The memory, as this process sees it.
    pub fn window(&self) -> &Window {
        &self.memory.window
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        match self.backend.dma_unmap(self.iova, self.memory.len_bytes()) {
            Ok(()) => self.iovas.lock().unwrap_or_else(PoisonError::into_inner).free(self.iova),
            // The device may still write there: the addresses are never used again, and the memory must not be either.
            Err(error) => {
                tracing::error!(%error, iova = self.iova, "DMA mapping could not be removed: its memory is given up");
                std::mem::forget(self.memory.clone());
            }
        }
    }
}
