//! The kernels of the units: ordinary loops that touch memory only by virtual address, through a [`DeviceView`].
//!
//! A kernel never learns about pages or faults: a load either gives the bytes (perhaps after the job was suspended for a while)
//! or ends the job with an error. So the same code runs on the device's MMU and, in tests, on a view that faults at every access.

pub mod atomic;
pub mod bulk;
pub mod index;
pub mod list;
#[cfg(test)]
mod tests;

use uhmm_driver_kit::{KernelSpec, PAGE_BYTES};
use uhmm_ipc::message::{ErrorCode, WireError};

/// Result of everything a kernel does; the error becomes the job's answer.
pub type KernelResult<T> = Result<T, WireError>;

/// Virtual memory as a kernel sees it. Any access may suspend the job; an error ends it.
pub trait DeviceView {
    /// Copies bytes out; may cross pages, and is then not atomic as a whole.
    fn read(&mut self, addr: u64, out: &mut [u8]) -> KernelResult<()>;

    /// Copies bytes in; may cross pages.
    fn write(&mut self, addr: u64, bytes: &[u8]) -> KernelResult<()>;

    /// Loads eight bytes; atomic when the address is a multiple of eight.
    fn load_u64(&mut self, addr: u64) -> KernelResult<u64>;

    /// Stores eight bytes; atomic when the address is a multiple of eight.
    fn store_u64(&mut self, addr: u64, value: u64) -> KernelResult<()>;

    /// Adds (wrapping) in one atomic step, CPU and other devices included, and returns the value before.
    /// [`ErrorCode::Invalid`] unless the address is a multiple of eight.
    fn fetch_add_u64(&mut self, addr: u64, value: u64) -> KernelResult<u64>;

    /// Loads four bytes.
    fn load_u32(&mut self, addr: u64) -> KernelResult<u32> {
        let mut bytes = [0; 4];
        self.read(addr, &mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }
}

/// A kernel: what `Info` shows of it, and its code.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Name in `Submit`.
    pub name: &'static str,
    /// Arguments and results, one line.
    pub usage: &'static str,
    /// How many arguments.
    pub argument_count: usize,
    /// Running it twice gives what running it once gives.
    pub idempotent: bool,
    /// Called with exactly `argument_count` arguments.
    pub run: fn(&mut dyn DeviceView, &[u64]) -> KernelResult<Vec<u64>>,
}

impl Kernel {
    /// What the driver kit shows to clients.
    pub fn spec(&self) -> KernelSpec {
        KernelSpec {
            name: self.name,
            usage: self.usage,
            argument_count: self.argument_count,
            idempotent: self.idempotent,
        }
    }
}

/// All kernels, in the order of their numbers.
pub fn all() -> Vec<Kernel> {
    [bulk::KERNELS, list::KERNELS, index::KERNELS, atomic::KERNELS].concat()
}

/// Address of a field; a pointer so high that the field would wrap around is a wild pointer.
pub(crate) fn field(addr: u64, offset: u64) -> KernelResult<u64> {
    addr.checked_add(offset).ok_or_else(|| {
        WireError::new(ErrorCode::Fault, format!("Address {addr:#x} + {offset} leaves the address space"))
    })
}

/// The pieces of a byte range that lie in one page each: what one gate section may touch.
pub(crate) fn page_pieces(addr: u64, len_bytes: u64) -> KernelResult<impl Iterator<Item = (u64, usize)>> {
    let end = field(addr, len_bytes)?;
    let mut at = addr;
    Ok(std::iter::from_fn(move || {
        let len = (PAGE_BYTES - at % PAGE_BYTES).min(end - at);
        let piece = (at, usize::try_from(len).ok()?);
        at += len;
        (len > 0).then_some(piece)
    }))
}

pub(crate) fn invalid<T>(text: String) -> KernelResult<T> {
    Err(WireError::new(ErrorCode::Invalid, text))
}
