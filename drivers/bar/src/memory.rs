//! Device memory behind a BAR.
//!
//! ```text
//!   open: mark in the BAR = mark in the vault?  --yes--> Adopted: the bytes are those of the last incarnation
//!                                               --no---> new mark into the vault's memfd, every frame zero, mark into the BAR: Created
//! ```
//! Neither a kept descriptor nor a process that still runs proves that the bytes are still there: a device may have been reset, or
//! exchanged, or its model started again. So the last page of the BAR bears a random mark, and the vault has the same. It is
//! written after everything else: an incarnation that dies while it clears the memory leaves none.

use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_driver_kit::{CopyEngine, DeviceError, DeviceMemory, Frames, MemoryOrigin, PAGE_BYTES, Staging};
use uhmm_ipc::message::{Aperture, Fd, TraceId};
use uhmm_kernel_hook::{Prot, Window, memfd};
use uhmm_pci::{Bar, PciDevice, PciError, RemovalWatch};

/// Vault name of the mark.
const MARK_NAME: &str = "driver/bar-mark";
const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-bar");
/// Magic and random number, in the last page of the BAR and in the vault.
const MARK_WORDS: [u64; 2] = [0, 8];

/// Why a BAR is no device memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BarError {
    /// Not the device for this driver.
    #[error("{device} has no BAR that can be mapped and holds two pages: it is no device for driver \"bar\"")]
    NoMemory {
        /// Which device.
        device: String,
    },
    /// The manifest names one of registers.
    #[error("BAR {bar} of {device} cannot be mapped as memory of two pages or more: name another `bar`, or none")]
    Unusable {
        /// Which device.
        device: String,
        /// Its BAR.
        bar: u8,
    },
}

/// The memory, mapped; keeps the device open.
#[derive(Debug)]
pub struct BarMemory {
    device: PciDevice,
    shown: (Fd, u64),
    window: Arc<Window>,
    frame_count: u32,
    mark: Fd,
    removal: Option<RemovalWatch>,
}

impl BarMemory {
    /// Takes at most `limit_bytes` of the BAR. `kept`: what the last incarnation had in the vault.
    ///
    /// # Errors
    /// [`BarError`]; the device does not answer; out of memory.
    pub fn open(
        device: PciDevice,
        kept: &[(String, Fd)],
        number: Option<u8>,
        limit_bytes: u64,
    ) -> Result<(Self, MemoryOrigin), DeviceError> {
        let (number, bar) = choose(&device, number)?;
        let unusable = || BarError::Unusable { device: device.describe(), bar: number };
        let window = bar.window().cloned().ok_or_else(unusable)?;
        let shown = bar.mappable().ok_or_else(unusable)?;
        let mark_at = bar.len_bytes() - PAGE_BYTES;
        let frame_count = u32::try_from(mark_at.min(limit_bytes) / PAGE_BYTES)?;
        let old = kept.iter().find(|(name, _)| name == MARK_NAME).map(|(_, fd)| fd.clone());
        let adopted = match old {
            Some(mark) if is_marked(&mark, &window, mark_at)? => Some(mark),
            _ => None,
        };
        let (mark, origin) = match adopted {
            Some(mark) => (mark, MemoryOrigin::Adopted),
            None => {
                let mark = new_mark()?;
                window.fill(mark_at, PAGE_BYTES, 0)?;
                window.fill(0, u64::from(frame_count) * PAGE_BYTES, 0)?;
                copy_mark(&mark, &window, mark_at)?;
                (mark, MemoryOrigin::Created)
            }
        };
        let adopted = device.is_adopted();
        tracing::info!(device = device.describe(), bar = number, len_bytes = bar.len_bytes(), adopted, "Device memory");
        Ok((Self { device, shown, window, frame_count, mark, removal: None }, origin))
    }

    /// The watch lives as long as the memory: the driver itself is done once it has opened the device.
    pub(crate) fn keep_watch(&mut self, removal: RemovalWatch) {
        self.removal = Some(removal);
    }

    /// What units access, frame 0 at offset 0.
    pub fn window(&self) -> Arc<Window> {
        self.window.clone()
    }
}

/// The named BAR, or the largest one that can be mapped.
fn choose(device: &PciDevice, number: Option<u8>) -> Result<(u8, Bar), DeviceError> {
    let mut best: Option<(u8, Bar)> = None;
    for candidate in number.map_or(0..6, |number| number..number + 1) {
        let bar = match device.bar(candidate) {
            Ok(bar) => bar,
            Err(PciError::OutOfRegion { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let largest = best.as_ref().is_none_or(|(_, best)| bar.len_bytes() > best.len_bytes());
        if bar.window().is_some() && bar.len_bytes() >= 2 * PAGE_BYTES && largest {
            best = Some((candidate, bar));
        }
    }
    let device = || device.describe();
    best.ok_or_else(|| match number {
        Some(bar) => BarError::Unusable { device: device(), bar }.into(),
        None => BarError::NoMemory { device: device() }.into(),
    })
}

fn new_mark() -> Result<Fd, DeviceError> {
    let fd: Fd = Arc::new(memfd::create_sealed("uhmm-bar-mark", PAGE_BYTES)?);
    let words = Window::map(fd.as_fd(), 0, PAGE_BYTES, Prot::ReadWrite)?;
    words.store_u64(MARK_WORDS[0], MAGIC)?;
    words.store_u64(MARK_WORDS[1], TraceId::fresh().0)?;
    Ok(fd)
}

fn marks(mark: &Fd) -> Result<Window, DeviceError> {
    memfd::check_sealed(mark.as_fd(), PAGE_BYTES)?;
    Ok(Window::map(mark.as_fd(), 0, PAGE_BYTES, Prot::ReadWrite)?)
}

fn is_marked(mark: &Fd, window: &Window, mark_at: u64) -> Result<bool, DeviceError> {
    let words = marks(mark)?;
    for at in MARK_WORDS {
        if window.load_u64(mark_at + at)? != words.load_u64(at)? {
            tracing::warn!("Device memory does not bear the mark of the last incarnation: its content is given up");
            return Ok(false);
        }
    }
    Ok(true)
}

/// The number first: a torn mark has no magic.
fn copy_mark(mark: &Fd, window: &Window, mark_at: u64) -> Result<(), DeviceError> {
    let words = marks(mark)?;
    for at in MARK_WORDS.into_iter().rev() {
        window.store_u64(mark_at + at, words.load_u64(at)?)?;
    }
    Ok(())
}

impl DeviceMemory for BarMemory {
    fn frame_count(&self) -> u32 {
        self.frame_count
    }

    fn aperture(&self) -> Option<Aperture> {
        let (fd, offset_bytes) = self.shown.clone();
        Some(Aperture { fd, offset_bytes })
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        let mut kept = self.device.kept();
        kept.push((MARK_NAME.to_owned(), self.mark.clone()));
        kept
    }
}

/// The copy engine of a device that needs none: everybody sees its memory.
#[derive(Debug)]
pub enum Unused {}

impl CopyEngine for Unused {
    fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
        match *self {}
    }

    fn copy_in(&mut self, _: &Staging, _: u32, _: Frames) -> Result<(), DeviceError> {
        match *self {}
    }

    fn copy_out(&mut self, _: Frames, _: &Staging, _: u32) -> Result<(), DeviceError> {
        match *self {}
    }

    fn scrub(&mut self, _: Frames) -> Result<(), DeviceError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests;
