//! What a controller begins with: as a killed driver left it, or switched off and with queues that are begun anew.

use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_pci::{Bar, DmaMapping, DmaMemory, DmaRight, PciDevice};

use crate::book::{Book, Found};
use crate::error::NvmeError;
use crate::layout::Layout;
use crate::protocol::registers::{CC, CC_DISABLED, CSTS};
use crate::protocol::{Capabilities, ControllerStatus};

/// Pause between two looks at CSTS while the controller changes its state.
pub(crate) const STATUS_PAUSE: Duration = Duration::from_millis(1);

/// EN = 0, and waits for RDY = 0; a function-level reset if that does not come.
pub(crate) fn stop(device: &PciDevice, bar: &Bar, capabilities: Capabilities) -> Result<(), NvmeError> {
    bar.store_u32(CC, CC_DISABLED)?;
    let end = Instant::now() + capabilities.timeout();
    while Instant::now() < end {
        let status = ControllerStatus(bar.load_u32(CSTS)?);
        if status.is_gone() || !status.is_ready() {
            return Ok(());
        }
        std::thread::sleep(STATUS_PAUSE);
    }
    device.reset()?;
    let status = ControllerStatus(bar.load_u32(CSTS)?);
    if status.is_gone() || !status.is_ready() { Ok(()) } else { Err(NvmeError::Stop { device: device.describe() }) }
}

/// Whether this driver can drive it.
pub(crate) fn check(device: &PciDevice, capabilities: Capabilities, vectors: u32) -> Result<(), NvmeError> {
    let problem = if capabilities.0 == u64::MAX {
        "its registers read as all ones: it is gone, or memory accesses are off"
    } else if !capabilities.has_nvm_commands() {
        "it has no NVM command set"
    } else if !capabilities.has_small_pages() {
        "it has no pages of 4 KiB"
    } else if capabilities.queue_entries_max() < 4 {
        "its queues have less than 4 entries"
    } else if vectors < 2 {
        "it has less than two MSI-X vectors"
    } else {
        return Ok(());
    };
    Err(NvmeError::Unsuitable { device: device.describe(), problem })
}

/// What a controller begins with.
pub(crate) struct Prepared {
    pub(crate) memory: DmaMapping,
    /// It runs, with this many pairs of I/O queues.
    pub(crate) adopted: Option<u16>,
}

/// Takes the controller and its memory over as they are, or switches it off and gives it memory.
pub(crate) fn prepare(
    device: &PciDevice,
    bar: &Bar,
    capabilities: Capabilities,
    kept: Option<Fd>,
    namespace: u32,
    layout: Layout,
) -> Result<Prepared, NvmeError> {
    let found = kept.and_then(|fd| adoptable_memory(fd, namespace, layout));
    let status = ControllerStatus(bar.load_u32(CSTS)?);
    let runs = bar.load_u32(CC)? & 1 != 0 && status.is_ready() && !status.is_fatal() && !status.is_gone();
    if let Some((found, memory)) = &found
        && device.is_adopted()
        && runs
        && found.pairs > 0
    {
        match device.adopt_dma(found.iova, memory, DmaRight::ReadWrite) {
            Ok(memory) => return Ok(Prepared { memory, adopted: Some(found.pairs) }),
            Err(error) => tracing::warn!(%error, "Queue memory cannot be adopted: the controller is reset"),
        }
    }
    if device.is_adopted() {
        stop(device, bar, capabilities)?;
        device.finish_adoption()?;
    }
    // Kept memory says what the namespace holds; its queues are begun anew.
    let keep_content = found.is_some();
    let memory = match found {
        Some((_, memory)) => memory,
        None => DmaMemory::create("uhmm-nvme", layout.len_bytes())?,
    };
    let memory = map_new(device, &memory, layout, namespace, keep_content)?;
    Ok(Prepared { memory, adopted: None })
}

/// The memory of the last incarnation if it fits.
fn adoptable_memory(fd: Fd, namespace: u32, wanted: Layout) -> Option<(Found, DmaMemory)> {
    let memory = DmaMemory::adopt(fd, wanted.len_bytes());
    let memory = memory.inspect_err(|error| tracing::warn!(%error, "Kept queue memory does not fit")).ok()?;
    let found = Book::find(&memory.window).ok().flatten()?;
    (found.layout == wanted && found.namespace == namespace).then_some((found, memory))
}

fn map_new(
    device: &PciDevice,
    memory: &DmaMemory,
    layout: Layout,
    namespace: u32,
    keep_content: bool,
) -> Result<DmaMapping, NvmeError> {
    let mapping = device.map_dma(memory, DmaRight::ReadWrite, u64::MAX)?;
    let book = Book::new(mapping.window(), layout);
    let content = if keep_content { book.content()? } else { None };
    book.begin(mapping.iova(0), namespace)?;
    if let Some(content) = content {
        book.set_content(content)?;
    }
    Ok(mapping)
}
