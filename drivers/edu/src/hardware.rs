//! The device itself: registers in BAR 0, and what they do. Nothing here knows of uhmm.
//!
//! ```text
//!   0x00 identification        0x20 status: 0x80 = interrupt when the factorial is done      0x80 DMA from    0x90 bytes
//!   0x04 liveness (inverts)    0x24 which interrupts are raised   0x64 acknowledge them       0x88 DMA to      0x98 command
//!   0x08 factorial of what is written                             DMA buffer of 4 KiB at 0x40000 of the device's own addresses
//! ```
//! A DMA takes 100 ms. The device addresses 28 bits. It has one interrupt for everything, so whoever waits looks at the registers
//! when it is woken, and again after it has acknowledged.

use std::fmt;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_kernel_hook::{EventFd, HookError};
use uhmm_pci::{Bar, InterruptKind, PciDevice, PciError};

/// Vendor and device id.
pub const ID: (u16, u16) = (0x1234, 0x11e8);
/// One past the last bus address that the device can form.
pub const DMA_LIMIT: u64 = 1 << 28;
/// Bytes of the DMA buffer.
pub const BUFFER_BYTES: u64 = 4096;
/// QEMU 7.2 ends itself when a DMA reaches the last byte of the buffer: that byte cannot be used by DMA.
pub const REACHABLE_BYTES: u64 = BUFFER_BYTES - 1;

const IDENT: u64 = 0x00;
const LIVENESS: u64 = 0x04;
const FACTORIAL: u64 = 0x08;
const STATUS: u64 = 0x20;
const STATUS_BUSY: u32 = 0x01;
const STATUS_WITH_INTERRUPT: u32 = 0x80;
const RAISED: u64 = 0x24;
const ACKNOWLEDGE: u64 = 0x64;
const DMA_FROM: u64 = 0x80;
const DMA_TO: u64 = 0x88;
const DMA_BYTES: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const COMMAND_RUN: u64 = 0x1;
const COMMAND_TO_MEMORY: u64 = 0x2;
const COMMAND_WITH_INTERRUPT: u64 = 0x4;

/// Upper half: version. Lower half: the letters of the trade.
const IDENT_MASK: u32 = 0x0000_ffff;
const IDENT_EXPECTED: u32 = 0x0000_00ed;
/// Where the DMA buffer lies in the device's own addresses.
const BUFFER_AT: u64 = 0x4_0000;
/// Twenty times what a DMA takes.
const PATIENCE: Duration = Duration::from_secs(2);

/// What goes wrong with the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EduError {
    /// Another device.
    #[error(
        "{device} is {found}, not QEMU's educational device (1234:11e8, identification 0x..0000ed): give another address"
    )]
    OtherDevice {
        /// Which.
        device: String,
        /// What it says that it is.
        found: String,
    },
    /// It does not answer in time.
    #[error("The device did not finish {what} within {} s: it is stuck, or gone", PATIENCE.as_secs())]
    Stuck {
        /// What.
        what: &'static str,
    },
    /// A transfer that the device cannot do.
    #[error("The device cannot transfer {len} bytes at {offset} of its buffer at bus address {iova:#x}")]
    Transfer {
        /// Bus address.
        iova: u64,
        /// In the buffer.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Below.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Below.
    #[error(transparent)]
    Hook(#[from] HookError),
}

/// Which way a DMA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads memory.
    FromMemory,
    /// The device writes memory.
    ToMemory,
}

/// The device. One user at a time: its registers hold one DMA and one factorial.
pub struct Edu {
    bar: Bar,
    interrupt: EventFd,
}

impl fmt::Debug for Edu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Edu")
    }
}

impl Edu {
    /// Makes sure that it is one, and takes its interrupt. Changes nothing that is in flight.
    ///
    /// # Errors
    /// `OtherDevice`, or the device does not answer.
    pub fn new(device: &PciDevice) -> Result<Self, EduError> {
        let other_device = |found: String| EduError::OtherDevice { device: device.describe(), found };
        let id = device.id()?;
        if id != ID {
            return Err(other_device(format!("{:04x}:{:04x}", id.0, id.1)));
        }
        let bar = device.bar(0)?;
        let ident = bar.load_u32(IDENT)?;
        if ident & IDENT_MASK != IDENT_EXPECTED {
            return Err(other_device(format!("identification {ident:#010x}")));
        }
        let mut events = device.interrupts(InterruptKind::Msi, 1)?;
        let interrupt = events.pop().ok_or(EduError::Stuck { what: "setting its interrupt" })?;
        Ok(Self { bar, interrupt })
    }

    /// What was last stored with [`Edu::set_scratch`]: the liveness register answers with the complement.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn scratch(&self) -> Result<u32, EduError> {
        Ok(!self.bar.load_u32(LIVENESS)?)
    }

    /// 32 bits that the device keeps beside its buffer.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn set_scratch(&self, value: u32) -> Result<(), EduError> {
        Ok(self.bar.store_u32(LIVENESS, value)?)
    }

    /// n! modulo 2^32, computed by the device.
    ///
    /// # Errors
    /// `Stuck`, or the device does not answer.
    pub fn factorial(&self, n: u32) -> Result<u32, EduError> {
        self.bar.store_u32(STATUS, STATUS_WITH_INTERRUPT)?;
        self.bar.store_u32(FACTORIAL, n)?;
        self.wait("a factorial", || Ok(self.bar.load_u32(STATUS)? & STATUS_BUSY == 0))?;
        Ok(self.bar.load_u32(FACTORIAL)?)
    }

    /// Starts a DMA between bus address `iova` and byte `offset` of the buffer, and returns at once.
    ///
    /// # Errors
    /// `Transfer` for what the device cannot do, `Stuck` when it is at another one; it does not answer.
    pub fn start(&self, direction: Direction, iova: u64, offset: u64, len: u64) -> Result<(), EduError> {
        let inside = |end: u64, limit| offset.max(len) <= limit && end <= limit;
        let on_bus = iova.checked_add(len).is_some_and(|end| end <= DMA_LIMIT);
        if len == 0 || !on_bus || !inside(offset.saturating_add(len), REACHABLE_BYTES) {
            return Err(EduError::Transfer { iova, offset, len });
        }
        if self.is_busy()? {
            return Err(EduError::Stuck { what: "the DMA before" });
        }
        let (from, to, way) = match direction {
            Direction::FromMemory => (iova, BUFFER_AT + offset, 0),
            Direction::ToMemory => (BUFFER_AT + offset, iova, COMMAND_TO_MEMORY),
        };
        self.bar.store_u64(DMA_FROM, from)?;
        self.bar.store_u64(DMA_TO, to)?;
        self.bar.store_u64(DMA_BYTES, len)?;
        Ok(self.bar.store_u64(DMA_COMMAND, COMMAND_RUN | way | COMMAND_WITH_INTERRUPT)?)
    }

    /// A DMA is in flight, perhaps one of an earlier incarnation of the driver.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn is_busy(&self) -> Result<bool, EduError> {
        Ok(self.bar.load_u64(DMA_COMMAND)? & COMMAND_RUN != 0)
    }

    /// Returns when no DMA is in flight. The device does not say whether it went well: an address that it may not reach is
    /// blocked by the IOMMU, and only the kernel's log tells.
    ///
    /// # Errors
    /// `Stuck`, or the device does not answer.
    pub fn finish(&self) -> Result<(), EduError> {
        self.wait("a DMA", || Ok(!self.is_busy()?))
    }

    /// [`Edu::start`] and [`Edu::finish`].
    ///
    /// # Errors
    /// Of both.
    pub fn transfer(&self, direction: Direction, iova: u64, offset: u64, len: u64) -> Result<(), EduError> {
        self.start(direction, iova, offset, len)?;
        self.finish()
    }

    fn wait(&self, what: &'static str, done: impl Fn() -> Result<bool, EduError>) -> Result<(), EduError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.interrupt.drain()?;
            let raised = self.bar.load_u32(RAISED)?;
            if raised != 0 {
                self.bar.store_u32(ACKNOWLEDGE, raised)?;
            }
            if done()? {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(EduError::Stuck { what });
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::from_borrowed_fd(self.interrupt.as_fd(), PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(HookError::call("poll", None, error).into()),
            }
        }
    }
}
