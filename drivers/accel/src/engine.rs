//! The copy engine's ring: one command at a time, each with a deadline, each done or undone when the call returns.
//!
//! ```text
//!   submit -> completion of this id with status 0 -------------------------------> done
//!          -> late | another id | a status | the engine stopped -> off, on, again -> the same a second time -> error
//!          -> the device is gone ---------------------------------------------------------------------------> error
//! ```
//! Switching the engine off ends what it does: after that it touches nothing of the command's memory, so a failure that is told is final.
//! All commands may be carried out twice.

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use uhmm_kernel_hook::{EventFd, HookError, PAGE_SIZE};
use uhmm_pci::{Bar, DmaMapping, DmaMemory, DmaRight, InterruptKind, PciDevice, PciError};

/// Vendor and device id.
const ID: (u16, u16) = (0x1b36, 0x00ac);
const MAGIC: u32 = u32::from_le_bytes(*b"ACCL");
/// Places of each ring; both rings lie in one page.
const ENTRIES: u64 = 32;
const DESCRIPTOR_BYTES: u64 = 32;
const COMPLETION_BYTES: u64 = 16;
const COMPLETIONS_AT: u64 = 2048;
/// For one attempt. Two of them stay well below what the pager grants a revocation, and a command takes a millisecond at most.
const ATTEMPT_LIMIT: Duration = Duration::from_millis(600);

/// Registers of BAR 0.
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const MEMORY_BYTES: u64 = 0x08;
    pub const ENABLE: u64 = 0x10;
    pub const STATUS: u64 = 0x14;
    pub const RING: u64 = 0x18;
    pub const COMPLETIONS: u64 = 0x20;
    pub const ENTRIES: u64 = 0x28;
    pub const TAIL: u64 = 0x2c;
}

/// What the engine is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Host memory to device memory.
    CopyIn {
        /// From here.
        iova: u64,
        /// To here.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Device memory to host memory.
    CopyOut {
        /// To here.
        iova: u64,
        /// From here.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Device memory becomes zero.
    Zero {
        /// From here.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Why device memory was not reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelError {
    /// Another device.
    #[error(
        "{device} is no accelerator of this kind (id {vendor:04x}:{id:04x}): name another driver for it in the manifest"
    )]
    NotOurs {
        /// Which.
        device: String,
        /// Its vendor.
        vendor: u16,
        /// Its device id.
        id: u16,
    },
    /// Two attempts failed.
    #[error("The accelerator failed twice at {command:?}: {problem}")]
    Failed {
        /// What it was to do.
        command: Command,
        /// The second time.
        problem: String,
    },
    /// The way to the device.
    #[error("The accelerator cannot be reached")]
    Pci(#[from] PciError),
    /// The system.
    #[error("System call for the accelerator failed")]
    Hook(#[from] HookError),
    /// Waiting for an interrupt.
    #[error("The accelerator's interrupt cannot be waited for")]
    Wait(#[source] std::io::Error),
}

/// What went wrong with one attempt; another one may go well.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("no completion within {} ms", ATTEMPT_LIMIT.as_millis())]
    Late,
    #[error("the completion names command {found}, which nobody sent, instead of {expected}")]
    WrongId { found: u32, expected: u32 },
    #[error("the command ended with status {0}")]
    Status(u32),
    #[error("the engine stopped with status {0}")]
    Stopped(u32),
    #[error(transparent)]
    Fatal(AccelError),
}

impl<E: Into<AccelError>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Fatal(error.into())
    }
}

/// The device, opened.
#[derive(Debug)]
pub struct Accel {
    device: PciDevice,
    registers: Bar,
    memory_bytes: u64,
    ring: Mutex<Ring>,
}

#[derive(Debug)]
struct Ring {
    memory: DmaMapping,
    interrupt: EventFd,
    /// Both since the engine was switched on.
    submitted: u32,
    completed: u32,
    /// Never repeats soon, also across restarts of the engine.
    next_id: u32,
    restarts: u64,
}

impl Accel {
    /// Takes the device over, whatever it is doing: that was asked by somebody who is gone, and is ended.
    ///
    /// # Errors
    /// `NotOurs`, `Pci`.
    pub fn open(device: PciDevice) -> Result<Self, AccelError> {
        let (vendor, id) = device.id()?;
        let registers = device.bar(0)?;
        if (vendor, id) != ID || registers.load_u32(register::MAGIC)? != MAGIC {
            return Err(AccelError::NotOurs { device: device.describe(), vendor, id });
        }
        registers.store_u32(register::ENABLE, 0)?;
        device.finish_adoption()?;
        let memory_bytes = registers.load_u64(register::MEMORY_BYTES)?;
        let memory = DmaMemory::create("uhmm-accel-rings", PAGE_SIZE)?;
        let memory = device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX)?;
        let mut interrupts = device.interrupts(InterruptKind::Msix, 1)?;
        let interrupt =
            interrupts.pop().ok_or(PciError::Unsupported { device: device.describe(), what: "interrupt" })?;
        device.allow_dma()?;
        let mut ring = Ring { memory, interrupt, submitted: 0, completed: 0, next_id: 1, restarts: 0 };
        ring.switch_on(&registers)?;
        Ok(Self { device, registers, memory_bytes, ring: Mutex::new(ring) })
    }

    /// The device.
    pub fn device(&self) -> &PciDevice {
        &self.device
    }

    /// Its memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// How often the engine was switched off and on because of trouble.
    pub fn restarts(&self) -> u64 {
        self.lock().restarts
    }

    /// Returns when the command is done, or when the device does nothing of it any more.
    ///
    /// # Errors
    /// `Failed` after two attempts; `Pci` when the device is gone.
    pub fn run(&self, command: Command) -> Result<(), AccelError> {
        let mut ring = self.lock();
        for last in [false, true] {
            let trouble = match ring.attempt(&self.registers, command) {
                Ok(()) => return Ok(()),
                Err(Trouble::Fatal(error)) => return Err(error),
                Err(trouble) => trouble,
            };
            tracing::warn!(%trouble, ?command, "The accelerator is in trouble: its engine is restarted");
            ring.restarts += 1;
            ring.switch_on(&self.registers)?;
            if last {
                return Err(AccelError::Failed { command, problem: trouble.to_string() });
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// Off, with everything it had, and on again.
    fn switch_on(&mut self, registers: &Bar) -> Result<(), AccelError> {
        registers.store_u32(register::ENABLE, 0)?;
        self.memory.window().fill(0, PAGE_SIZE, 0)?;
        (self.submitted, self.completed) = (0, 0);
        registers.store_u64(register::RING, self.memory.iova(0))?;
        registers.store_u64(register::COMPLETIONS, self.memory.iova(COMPLETIONS_AT))?;
        registers.store_u32(register::ENTRIES, ENTRIES as u32)?;
        registers.store_u32(register::ENABLE, 1)?;
        Ok(())
    }

    fn attempt(&mut self, registers: &Bar, command: Command) -> Result<(), Trouble> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let (op, [iova, offset, len]) = match command {
            Command::CopyIn { iova, offset, len } => (1, [iova, offset, len]),
            Command::CopyOut { iova, offset, len } => (2, [iova, offset, len]),
            Command::Zero { offset, len } => (3, [0, offset, len]),
        };
        let at = u64::from(self.submitted) % ENTRIES * DESCRIPTOR_BYTES;
        let window = self.memory.window();
        window.store_u32(at, op)?;
        window.store_u32(at + 4, id)?;
        for (place, value) in [8, 16, 24].into_iter().zip([iova, offset, len]) {
            window.store_u64(at + place, value)?;
        }
        self.submitted = self.submitted.wrapping_add(1);
        registers.store_u32(register::TAIL, self.submitted)?;
        let deadline = Instant::now() + ATTEMPT_LIMIT;
        loop {
            if let Some((found, status)) = self.completion()? {
                return match (found, status) {
                    (found, 0) if found == id => Ok(()),
                    (found, status) if found == id => Err(Trouble::Status(status)),
                    (found, _) => Err(Trouble::WrongId { found, expected: id }),
                };
            }
            let interrupted = self.wait(deadline)?;
            // The interrupt may announce the completion that the next look finds.
            if self.peek()?.is_some() {
                continue;
            }
            match registers.load_u32(register::STATUS)? {
                0 if interrupted => {}
                0 => return Err(Trouble::Late),
                status => return Err(Trouble::Stopped(status)),
            }
        }
    }

    /// The next completion, taken.
    fn completion(&mut self) -> Result<Option<(u32, u32)>, HookError> {
        let found = self.peek()?;
        if found.is_some() {
            self.completed = self.completed.wrapping_add(1);
        }
        Ok(found)
    }

    fn peek(&self) -> Result<Option<(u32, u32)>, HookError> {
        let at = COMPLETIONS_AT + u64::from(self.completed) % ENTRIES * COMPLETION_BYTES;
        let round = (self.completed / ENTRIES as u32).wrapping_add(1);
        let window = self.memory.window();
        if window.load_u32(at + 8)? != round {
            return Ok(None);
        }
        Ok(Some((window.load_u32(at)?, window.load_u32(at + 4)?)))
    }

    /// False: the deadline passed.
    fn wait(&self, deadline: Instant) -> Result<bool, AccelError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::from_borrowed_fd(self.interrupt.as_fd(), PollFlags::IN)], Some(&limit)) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => {
                    self.interrupt.drain()?;
                    return Ok(true);
                }
                Err(error) => return Err(AccelError::Wait(error.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests;
