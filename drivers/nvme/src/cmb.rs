//! The controller's own memory buffer as device memory that the CPU reaches: `cmb = true` in the manifest.
//!
//! It is plain memory behind a BAR, so frames, their mark and adoption are those of `uhmm-driver-bar`. What is special: it has to be switched on,
//! and then the controller finds it at an address of ours too, so its commands can read and write it without crossing the bus.
//! The namespace is not touched, and no queue is made.

use uhmm_driver_bar::memory::BarMemory;
use uhmm_driver_kit::{DeviceError, MemoryOrigin};
use uhmm_ipc::message::Fd;
use uhmm_pci::PciDevice;

use crate::error::NvmeError;
use crate::protocol::registers::{CAP, CMBLOC, CMBMSC, CMBSZ};
use crate::protocol::{Capabilities, CmbInfo};

/// Where the controller sees its buffer: far above everything that is mapped for DMA (from below, see `IovaAllocator`).
pub const CMB_ADDRESS: u64 = 1 << 46;
/// CMBLOC and CMBSZ tell the truth.
const REGISTERS_ON: u64 = 1;

/// Switches the buffer on, at [`CMB_ADDRESS`] for the controller.
///
/// # Errors
/// `Unsuitable`: there is none, or not one that fills its BAR.
pub fn switch_on(device: &PciDevice) -> Result<CmbInfo, NvmeError> {
    let unsuitable = |problem| NvmeError::Unsuitable { device: device.describe(), problem };
    let bar = device.bar(0)?;
    if Capabilities(bar.load_u64(CAP)?).has_cmb_control() {
        let control = bar.load_u64(CMBMSC)?;
        bar.store_u64(CMBMSC, control | REGISTERS_ON)?;
    }
    let info = CmbInfo::decode(bar.load_u32(CMBLOC)?, bar.load_u32(CMBSZ)?);
    let info = info.ok_or_else(|| unsuitable("it has no memory buffer: remove `cmb`"))?;
    bar.store_u64(CMBMSC, CmbInfo::control(CMB_ADDRESS))?;
    let whole = info.offset_bytes == 0 && device.bar(info.bar)?.len_bytes() == info.len_bytes;
    if whole { Ok(info) } else { Err(unsuitable("its memory buffer shares a BAR with other things")) }
}

/// The buffer as device memory, at most `limit_bytes` of it.
///
/// # Errors
/// As [`switch_on`]; the BAR cannot be mapped.
pub fn open(
    device: PciDevice,
    kept: &[(String, Fd)],
    limit_bytes: u64,
) -> Result<(BarMemory, MemoryOrigin), DeviceError> {
    let info = switch_on(&device)?;
    BarMemory::open(device, kept, Some(info.bar), limit_bytes)
}
