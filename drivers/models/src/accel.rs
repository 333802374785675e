//! An accelerator: memory of its own, seen through BAR 2, and an engine that copies between it and the memory of the host.
//!
//! ```text
//!   driver: descriptor into the ring, doorbell --> engine: fetch by DMA, copy by DMA, completion by DMA, MSI-X vector 0
//!
//!   descriptor (32 bytes)   op u32 | id u32 | iova u64 | device offset u64 | bytes u64
//!   completion (16 bytes)   id u32 | status u32 | round u32 | descriptors taken u32
//! ```
//! Both rings have the same number of places; numbers of descriptors and completions run freely through 32 bits, and their place is the number
//! modulo the entries. `round` is the completion's number divided by the entries, plus one: a place that was not written in this round
//! bears another one. A driver has at most as many commands under way as there are entries. BAR 0 ([`register`]) tells a driver that takes
//! over how far the engine has come.
//!
//! When the engine cannot reach its rings, or the doorbell makes no sense, it stops with [`register::STATUS`] telling why, until it is
//! disabled and enabled again.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{HookError, PAGE_SIZE, Prot, Window, memfd};

use crate::faults::{Fault, FaultPlan};
use crate::model::{BarKind, DeviceModel, DmaFault, Host, Identity};

/// Vendor (one that is free for experiments).
pub const VENDOR: u16 = 0x1b36;
/// Device.
pub const DEVICE: u16 = 0x00ac;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u64 = 32;
/// Bytes of a completion.
pub const COMPLETION_BYTES: u64 = 16;
/// The most places of a ring.
pub const MAX_ENTRIES: u32 = 4096;
/// Copied in one go; other accesses to the device wait that long.
const PIECE_BYTES: u64 = 256 << 10;

/// Where BAR 0 has what. 32 bits each, 64 where it says so.
pub mod register {
    /// [`super::MAGIC`].
    pub const MAGIC: u64 = 0x00;
    /// Device memory in bytes, 64 bits.
    pub const MEMORY_BYTES: u64 = 0x08;
    /// 1: the engine runs. Changing it to 0 drops what is in the ring.
    pub const ENABLE: u64 = 0x10;
    /// See [`super::status`].
    pub const STATUS: u64 = 0x14;
    /// Where the descriptors are, 64 bits, and the completions, 64 bits. Set while disabled.
    pub const RING: u64 = 0x18;
    /// See [`RING`].
    pub const COMPLETIONS: u64 = 0x20;
    /// Places of each ring, a power of two. Set while disabled.
    pub const ENTRIES: u64 = 0x28;
    /// The number of descriptors that the driver has written: the doorbell.
    pub const TAIL: u64 = 0x2c;
    /// How many the engine has taken.
    pub const HEAD: u64 = 0x30;
    /// How many completions it has written.
    pub const COMPLETED: u64 = 0x34;
}

/// What the magic register reads as.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ACCL");

/// Descriptors' operations.
pub mod op {
    /// Host to device.
    pub const COPY_IN: u32 = 1;
    /// Device to host.
    pub const COPY_OUT: u32 = 2;
    /// Device memory becomes the low byte of `iova`.
    pub const FILL: u32 = 3;
}

/// Status of the engine and of completions.
pub mod status {
    /// All is well.
    pub const OK: u32 = 0;
    /// No such operation.
    pub const BAD_COMMAND: u32 = 1;
    /// Host memory that the device may not reach; a part may have been copied.
    pub const DMA_FAULT: u32 = 2;
    /// Device memory that there is not.
    pub const OUT_OF_MEMORY: u32 = 3;
    /// The device failed.
    pub const INTERNAL: u32 = 4;
    /// The doorbell, or the shape of the rings, makes no sense. Only of the engine.
    pub const BAD_RING: u32 = 5;
}

#[derive(Clone, Copy, Debug)]
struct Command {
    op: u32,
    id: u32,
    iova: u64,
    offset: u64,
    len: u64,
    done: u64,
    fault: Option<Fault>,
}

/// See the module head.
#[derive(Debug)]
pub struct Accel {
    memory: Fd,
    window: Window,
    faults: FaultPlan,
    engine: Engine,
    running: Option<Command>,
    piece: Vec<u8>,
}

#[derive(Debug, Default)]
struct Engine {
    enabled: bool,
    status: u32,
    stuck: bool,
    ring: u64,
    completions: u64,
    entries: u32,
    tail: u32,
    head: u32,
    completed: u32,
}

impl Accel {
    /// Powers one up with zeroed memory of `memory_bytes`, a power of two.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn new(memory_bytes: u64, faults: FaultPlan) -> Result<Self, HookError> {
        let memory: Fd = Arc::new(memfd::create_sealed("uhmm-accel", memory_bytes)?);
        let window = Window::map(memory.as_fd(), 0, memory_bytes, Prot::ReadWrite)?;
        let piece = vec![0; PIECE_BYTES as usize];
        Ok(Self { memory, window, faults, engine: Engine::default(), running: None, piece })
    }

    fn word(&self, offset: u64) -> u32 {
        let engine = &self.engine;
        match offset {
            register::MAGIC => MAGIC,
            register::MEMORY_BYTES => self.window.len() as u32,
            0x0c => (self.window.len() >> 32) as u32,
            register::ENABLE => u32::from(engine.enabled),
            register::STATUS => engine.status,
            register::RING => engine.ring as u32,
            0x1c => (engine.ring >> 32) as u32,
            register::COMPLETIONS => engine.completions as u32,
            0x24 => (engine.completions >> 32) as u32,
            register::ENTRIES => engine.entries,
            register::TAIL => engine.tail,
            register::HEAD => engine.head,
            register::COMPLETED => engine.completed,
            _ => 0,
        }
    }

    fn set_word(&mut self, offset: u64, value: u32) {
        let engine = &mut self.engine;
        let low = |old: u64| old >> 32 << 32 | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            register::ENABLE => self.enable(value & 1 != 0),
            register::TAIL if engine.enabled => engine.ring_doorbell(value),
            // The rings stay where they are while the engine runs.
            _ if engine.enabled => {}
            register::RING => engine.ring = low(engine.ring),
            0x1c => engine.ring = high(engine.ring),
            register::COMPLETIONS => engine.completions = low(engine.completions),
            0x24 => engine.completions = high(engine.completions),
            register::ENTRIES => engine.entries = value,
            _ => {}
        }
    }

    fn enable(&mut self, on: bool) {
        let engine = &mut self.engine;
        if on == engine.enabled {
            return;
        }
        let sane = engine.entries.is_power_of_two() && engine.entries <= MAX_ENTRIES;
        let status = if on && !sane { status::BAD_RING } else { status::OK };
        let (ring, completions, entries) = (engine.ring, engine.completions, engine.entries);
        *engine = Engine { enabled: on, status, ring, completions, entries, ..Engine::default() };
        self.running = None;
    }

    fn fetch(&mut self, host: &dyn Host) -> Result<Command, DmaFault> {
        let engine = &self.engine;
        let mut bytes = [0; DESCRIPTOR_BYTES as usize];
        let place = u64::from(engine.head & (engine.entries - 1));
        host.dma_read(engine.ring.wrapping_add(place * DESCRIPTOR_BYTES), &mut bytes)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let fault = self.faults.next_command();
        let stray = if fault == Some(Fault::StrayDma) { 1 << 47 } else { 0 };
        let (iova, offset, len) = (long(8).wrapping_add(stray), long(16), long(24));
        Ok(Command { op: word(0), id: word(4), iova, offset, len, done: 0, fault })
    }

    /// A piece of the command. `Some`: it is done, with this status.
    fn work(&mut self, command: &mut Command, host: &dyn Host) -> Option<u32> {
        if command.fault == Some(Fault::CommandError) {
            return Some(status::INTERNAL);
        }
        if command.offset.checked_add(command.len).is_none_or(|end| end > self.window.len()) {
            return Some(status::OUT_OF_MEMORY);
        }
        let len = (command.len - command.done).min(PIECE_BYTES);
        let (offset, iova) = (command.offset + command.done, command.iova.wrapping_add(command.done));
        let piece = &mut self.piece[..len as usize];
        let copied = match command.op {
            op::COPY_IN => host.dma_read(iova, piece).map(|()| self.window.write(offset, piece)),
            op::COPY_OUT => match self.window.read(offset, piece) {
                Ok(()) => host.dma_write(iova, piece).map(Ok),
                Err(error) => Ok(Err(error)),
            },
            op::FILL => Ok(self.window.fill(offset, len, command.iova as u8)),
            _ => return Some(status::BAD_COMMAND),
        };
        command.done += len;
        match copied {
            Err(DmaFault { .. }) => Some(status::DMA_FAULT),
            Ok(Err(error)) => {
                tracing::error!(%error, "The accelerator's memory failed");
                Some(status::INTERNAL)
            }
            Ok(Ok(())) => (command.done == command.len).then_some(status::OK),
        }
    }

    fn step(&mut self, host: &dyn Host) -> Result<(), DmaFault> {
        let mut command = match self.running.take() {
            Some(command) => command,
            None => {
                let command = self.fetch(host)?;
                self.engine.head = self.engine.head.wrapping_add(1);
                command
            }
        };
        match command.fault {
            Some(Fault::StuckQueue) => self.engine.stuck = true,
            Some(Fault::Removal) => host.unplug(),
            _ => match self.work(&mut command, host) {
                None => self.running = Some(command),
                Some(_) if command.fault == Some(Fault::DropCompletion) => {}
                Some(status) => self.engine.complete(&command, status, host)?,
            },
        }
        Ok(())
    }
}

impl Engine {
    fn ring_doorbell(&mut self, tail: u32) {
        if tail.wrapping_sub(self.head) > self.entries {
            self.status = status::BAD_RING;
        } else {
            self.tail = tail;
        }
    }

    fn has_work(&self) -> bool {
        self.enabled && self.status == status::OK && !self.stuck && self.head != self.tail
    }

    fn complete(&mut self, command: &Command, status: u32, host: &dyn Host) -> Result<(), DmaFault> {
        let id = if command.fault == Some(Fault::CorruptId) { command.id ^ 0x8000_0000 } else { command.id };
        let place = u64::from(self.completed & (self.entries - 1));
        let round = (self.completed / self.entries).wrapping_add(1);
        let mut bytes = Vec::with_capacity(COMPLETION_BYTES as usize);
        for word in [id, status, round, self.head] {
            bytes.extend(word.to_le_bytes());
        }
        let at = self.completions.wrapping_add(place * COMPLETION_BYTES);
        // The round is what the driver waits for: it comes last.
        host.dma_write(at, &bytes[..8])?;
        host.dma_write(at.wrapping_add(8), &bytes[8..])?;
        self.completed = self.completed.wrapping_add(1);
        host.interrupt(0);
        Ok(())
    }
}

impl DeviceModel for Accel {
    fn identity(&self) -> Identity {
        Identity { vendor: VENDOR, device: DEVICE, class: 0x12_00_00, vectors: 1 }
    }

    fn bars(&self) -> Vec<(u8, BarKind)> {
        let memory = BarKind::Memory { fd: Arc::clone(&self.memory), len_bytes: self.window.len() };
        vec![(0, BarKind::Registers { len_bytes: PAGE_SIZE }), (2, memory)]
    }

    fn read(&mut self, _bar: u8, offset: u64, bytes: &mut [u8]) {
        let long = u64::from(self.word(offset & !7)) | u64::from(self.word((offset & !7) + 4)) << 32;
        for (byte, value) in bytes.iter_mut().zip((long >> (offset % 8 * 8)).to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&mut self, _bar: u8, offset: u64, bytes: &[u8], _host: &dyn Host) {
        // Registers are written whole; anything else is lost, as on the bus.
        for (index, word) in bytes.chunks_exact(4).enumerate() {
            self.set_word(offset + 4 * index as u64, u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        }
    }

    fn advance(&mut self, _now: Instant, host: &dyn Host) -> Option<Duration> {
        if self.running.is_none() && !self.engine.has_work() {
            return None;
        }
        if let Err(DmaFault { .. }) = self.step(host) {
            self.engine.status = status::DMA_FAULT;
            self.running = None;
            host.interrupt(0);
        }
        Some(Duration::ZERO)
    }

    fn reset(&mut self) {
        self.engine = Engine::default();
        self.running = None;
    }
}

#[cfg(test)]
mod tests;
