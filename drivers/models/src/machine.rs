//! The machine around a model: one lock, one thread, and everything that PCI adds to a device.
//!
//! ```text
//!   driver's access -> lock -> model.read/write ---------+-> Host: DMA through the table, interrupts to eventfds
//!   thread          -> lock -> model.advance -> wait ----+
//!
//!   powered --connect--> idle --bus mastering on--> running: `advance` is called
//!                         ^  ^---bus mastering off--'  |
//!                         '--disconnect: mappings and interrupts gone, registers, queues and memory stay
//! ```
//! Time passes for a model only while bus mastering is on, so that a device whose driver died stands still until the next driver
//! has mapped what it needs.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{EventFd, HookError, PAGE_SIZE, Prot, Window};
use uhmm_pci::{DmaRight, InterruptKind, RegionIndex, RegionInfo};

use crate::config::{BarShape, COMMAND_BUS_MASTER, COMMAND_MEMORY, CONFIG_BYTES, ConfigSpace, MsixPlace};
use crate::dma::{DmaTable, MapError};
use crate::model::{BarKind, DeviceModel, DmaFault, Host};

const MSIX_ENTRY_BYTES: u64 = 16;

/// Why the machine did not do what it was asked; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The model describes no device that PCI knows.
    #[error("The model is no PCI device: {problem}")]
    Model {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A driver has it.
    #[error("The device has a driver already: stop that one first")]
    Busy,
    /// It was pulled out.
    #[error("The device was removed")]
    Removed,
    /// No such place, or not in this width.
    #[error("{region} has no {len}-byte access at {offset:#x}: use 1, 2, 4 or 8 bytes, aligned, inside")]
    Access {
        /// Which region.
        region: RegionIndex,
        /// Where.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// More interrupts than the device has.
    #[error("The device has {count} vectors of {kind:?}: set no others")]
    Vectors {
        /// Which ones.
        kind: InterruptKind,
        /// How many there are.
        count: u32,
    },
    /// A DMA mapping.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The system refused something.
    #[error("The device model ran out of something")]
    Hook(#[from] HookError),
    /// The thread could not be started.
    #[error("The device's thread could not be started")]
    Thread(#[source] std::io::Error),
}

/// A device with its thread. Cheap to clone; ends with the last clone.
#[derive(Clone, Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    _thread: Arc<Runner>,
}

impl Machine {
    /// Powers the device up.
    ///
    /// # Errors
    /// The model is no PCI device, or the system is out of memory, descriptors or threads.
    pub fn start(model: Box<dyn DeviceModel>) -> Result<Self, MachineError> {
        let state = State::new(model)?;
        let bars = state.bars.iter().map(|bar| (bar.shape, bar.region_info())).collect();
        let vectors = u32::from(state.model.identity().vectors);
        let (state, wake) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { state, wake, waiting: AtomicU32::new(0), bars, vectors });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("device".into())
            .spawn(move || of_thread.run())
            .map_err(MachineError::Thread)?;
        let runner = Runner { shared: Arc::clone(&shared), thread: Some(thread) };
        Ok(Self { shared, _thread: Arc::new(runner) })
    }

    /// A driver takes the device, alone. Returns whether an earlier driver left it as it was (not reset since).
    ///
    /// # Errors
    /// `Busy`, `Removed`.
    pub fn connect(&self) -> Result<bool, MachineError> {
        let mut state = self.shared.access();
        state.check_present()?;
        if state.connected {
            return Err(MachineError::Busy);
        }
        state.connected = true;
        Ok(state.config.command() & COMMAND_MEMORY != 0)
    }

    /// The driver is gone: see the crate's head. The device reaches none of its memory when this returns.
    pub fn disconnect(&self) {
        self.shared.access().disconnect();
    }

    /// Pulls the device out: every access fails from now on, it reaches nothing, and the driver's `Request` and `Error` events are
    /// signalled.
    pub fn remove(&self) {
        self.shared.access().remove();
        self.shared.wake.notify_all();
    }

    /// Waits until the device is pulled out, by [`Machine::remove`] or by the model itself.
    pub fn wait_removed(&self) {
        let mut state = self.shared.access();
        while !state.removed {
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// `None`: there is no such region.
    pub fn region(&self, region: RegionIndex) -> Option<RegionInfo> {
        match region {
            RegionIndex::Config => Some(RegionInfo { len_bytes: CONFIG_BYTES as u64, mappable: None }),
            RegionIndex::Bar(number) => {
                self.shared.bars.iter().find(|(shape, _)| shape.number == number).map(|(_, info)| info.clone())
            }
        }
    }

    /// The driver reads.
    ///
    /// # Errors
    /// `Access`, `Removed`.
    pub fn read(&self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), MachineError> {
        let mut state = self.shared.access();
        state.check_present()?;
        state.check_access(region, offset, bytes.len() as u64)?;
        state.read(region, offset, bytes)
    }

    /// The driver writes.
    ///
    /// # Errors
    /// `Access`, `Removed`.
    pub fn write(&self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        let mut state = self.shared.access();
        state.check_present()?;
        state.check_access(region, offset, bytes.len() as u64)?;
        let done = state.write(region, offset, bytes);
        self.shared.wake.notify_all();
        done
    }

    /// The device reaches this memory.
    ///
    /// # Errors
    /// `Map`, `Removed`.
    pub fn dma_map(&self, iova: u64, fd: &Fd, offset: u64, len: u64, right: DmaRight) -> Result<(), MachineError> {
        use std::os::fd::AsFd;
        let mut state = self.shared.access();
        state.check_present()?;
        Ok(state.dma.map(iova, fd.as_fd(), offset, len, right)?)
    }

    /// The device reaches nothing there any more when this returns. One that was removed reaches nothing anyway.
    ///
    /// # Errors
    /// `Map`.
    pub fn dma_unmap(&self, iova: u64, len: u64) -> Result<(), MachineError> {
        let mut state = self.shared.access();
        if state.removed { Ok(()) } else { Ok(state.dma.unmap(iova, len)?) }
    }

    /// The device reaches nothing at all any more when this returns.
    pub fn dma_unmap_all(&self) {
        self.shared.access().dma.clear();
    }

    /// Vectors of a kind. `Error` and `Request` belong to the machine, the others to the model.
    pub fn interrupt_count(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::Msi => 0,
            InterruptKind::Msix => self.shared.vectors,
            InterruptKind::Error | InterruptKind::Request => 1,
        }
    }

    /// Vector `start + n` signals `events[n]`; `None` switches that vector off.
    ///
    /// # Errors
    /// `Vectors`, `Removed`.
    pub fn set_interrupts(
        &self,
        kind: InterruptKind,
        start: u32,
        events: Vec<Option<EventFd>>,
    ) -> Result<(), MachineError> {
        let count = self.interrupt_count(kind);
        if start.checked_add(events.len() as u32).is_none_or(|end| end > count) {
            return Err(MachineError::Vectors { kind, count });
        }
        let mut state = self.shared.access();
        state.check_present()?;
        for (vector, event) in (start as usize..).zip(events) {
            match kind {
                InterruptKind::Msi => {}
                InterruptKind::Msix => state.msix[vector] = event,
                InterruptKind::Error => state.error = event,
                InterruptKind::Request => state.request = event,
            }
        }
        Ok(())
    }

    /// Function-level reset. Mappings and interrupts stay; bus mastering is off after it.
    ///
    /// # Errors
    /// `Removed`.
    pub fn reset(&self) -> Result<(), MachineError> {
        let mut state = self.shared.access();
        state.check_present()?;
        state.config.reset();
        state.model.reset();
        Ok(())
    }

    /// DMA that was refused since power-up.
    pub fn dma_fault_count(&self) -> u64 {
        self.shared.access().dma.fault_count()
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Accesses that wait for the lock: a device that is busy all the time lets them in first.
    waiting: AtomicU32,
    bars: Vec<(BarShape, RegionInfo)>,
    vectors: u32,
}

impl Shared {
    fn access(&self) -> MutexGuard<'_, State> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.lock();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stopped {
            let pause = state.advance();
            if state.removed {
                self.wake.notify_all();
            }
            state = match pause {
                Some(Duration::ZERO) => {
                    drop(state);
                    while self.waiting.load(Ordering::SeqCst) > 0 {
                        std::thread::yield_now();
                    }
                    self.lock()
                }
                Some(pause) => self.wake.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[derive(Debug)]
struct Runner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.shared.access().stopped = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("The device model panicked");
        }
    }
}

enum Behind {
    Model,
    Memory { fd: Fd, window: Window },
    MsixTable { bytes: Vec<u8>, pending_offset: u64 },
}

struct BarSlot {
    shape: BarShape,
    behind: Behind,
}

impl BarSlot {
    fn region_info(&self) -> RegionInfo {
        let mappable = match &self.behind {
            Behind::Memory { fd, .. } => Some((Arc::clone(fd), 0)),
            Behind::Model | Behind::MsixTable { .. } => None,
        };
        RegionInfo { len_bytes: self.shape.len_bytes, mappable }
    }
}

struct State {
    model: Box<dyn DeviceModel>,
    config: ConfigSpace,
    bars: Vec<BarSlot>,
    dma: DmaTable,
    msix: Vec<Option<EventFd>>,
    error: Option<EventFd>,
    request: Option<EventFd>,
    connected: bool,
    removed: bool,
    stopped: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("connected", &self.connected).field("dma", &self.dma).finish_non_exhaustive()
    }
}

impl State {
    fn new(model: Box<dyn DeviceModel>) -> Result<Self, MachineError> {
        let identity = model.identity();
        let mut bars = model.bars().into_iter().map(bar_slot).collect::<Result<Vec<_>, _>>()?;
        let msix = (identity.vectors > 0).then(|| msix_slot(&bars, identity.vectors)).transpose()?;
        let place = msix.as_ref().map(|(_, place)| *place);
        bars.extend(msix.map(|(slot, _)| slot));
        check_bars(&bars)?;
        let shapes: Vec<BarShape> = bars.iter().map(|bar| bar.shape).collect();
        Ok(Self {
            config: ConfigSpace::new(&identity, &shapes, place),
            model,
            bars,
            dma: DmaTable::default(),
            msix: (0..identity.vectors).map(|_| None).collect(),
            error: None,
            request: None,
            connected: false,
            removed: false,
            stopped: false,
        })
    }

    fn check_present(&self) -> Result<(), MachineError> {
        if self.removed { Err(MachineError::Removed) } else { Ok(()) }
    }

    fn check_access(&self, region: RegionIndex, offset: u64, len: u64) -> Result<(), MachineError> {
        let (region_len, any_width) = match region {
            RegionIndex::Config => (CONFIG_BYTES as u64, true),
            RegionIndex::Bar(number) => match self.bars.iter().find(|bar| bar.shape.number == number) {
                Some(bar) => (bar.shape.len_bytes, !matches!(bar.behind, Behind::Model)),
                None => (0, true),
            },
        };
        let inside = offset.checked_add(len).is_some_and(|end| end <= region_len);
        let width = any_width || (matches!(len, 1 | 2 | 4 | 8) && offset.is_multiple_of(len));
        if inside && width { Ok(()) } else { Err(MachineError::Access { region, offset, len }) }
    }

    fn read(&mut self, region: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), MachineError> {
        let RegionIndex::Bar(number) = region else {
            self.config.read(offset, bytes);
            return Ok(());
        };
        // Nobody answers on the bus then, and that reads as ones.
        bytes.fill(0xff);
        if self.config.command() & COMMAND_MEMORY == 0 {
            return Ok(());
        }
        match self.bars.iter().find(|bar| bar.shape.number == number).map(|bar| &bar.behind) {
            Some(Behind::Model) => self.model.read(number, offset, bytes),
            Some(Behind::Memory { window, .. }) => window.read(offset, bytes)?,
            Some(Behind::MsixTable { bytes: table, .. }) => {
                for (place, byte) in (offset as usize..).zip(bytes) {
                    *byte = table.get(place).copied().unwrap_or(0);
                }
            }
            None => {}
        }
        Ok(())
    }

    fn write(&mut self, region: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), MachineError> {
        let RegionIndex::Bar(number) = region else {
            self.config.write(offset, bytes);
            return Ok(());
        };
        if self.config.command() & COMMAND_MEMORY == 0 {
            return Ok(());
        }
        let host = MachineHost::new(&self.dma, &self.msix, self.is_master());
        match self.bars.iter_mut().find(|bar| bar.shape.number == number).map(|bar| &mut bar.behind) {
            Some(Behind::Model) => self.model.write(number, offset, bytes, &host),
            Some(Behind::Memory { window, .. }) => window.write(offset, bytes)?,
            Some(Behind::MsixTable { bytes: table, pending_offset }) => {
                // Pending bits are for reading only.
                for (place, byte) in (offset..*pending_offset).zip(bytes) {
                    table[place as usize] = *byte;
                }
            }
            None => {}
        }
        if host.unplugged.get() {
            self.remove();
        }
        Ok(())
    }

    fn is_master(&self) -> bool {
        self.config.command() & COMMAND_BUS_MASTER != 0
    }

    /// When to come again; `None`: after the next access.
    fn advance(&mut self) -> Option<Duration> {
        if !self.connected || self.removed || !self.is_master() {
            return None;
        }
        let host = MachineHost::new(&self.dma, &self.msix, true);
        let pause = self.model.advance(Instant::now(), &host);
        if host.unplugged.get() {
            self.remove();
            return None;
        }
        pause
    }

    fn remove(&mut self) {
        self.removed = true;
        self.dma.clear();
        for event in [self.request.take(), self.error.take()].into_iter().flatten() {
            signal(&event, "removal");
        }
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.dma.clear();
        self.msix.fill_with(|| None);
        (self.error, self.request) = (None, None);
        self.config.stop_bus_master();
    }
}

/// What a model sees during one call.
struct MachineHost<'a> {
    dma: &'a DmaTable,
    msix: &'a [Option<EventFd>],
    master: bool,
    unplugged: Cell<bool>,
}

impl<'a> MachineHost<'a> {
    fn new(dma: &'a DmaTable, msix: &'a [Option<EventFd>], master: bool) -> Self {
        Self { dma, msix, master, unplugged: Cell::new(false) }
    }
}

impl Host for MachineHost<'_> {
    fn dma_read(&self, iova: u64, bytes: &mut [u8]) -> Result<(), DmaFault> {
        if self.master { self.dma.read(iova, bytes) } else { Err(self.dma.refuse(iova, bytes.len() as u64)) }
    }

    fn dma_write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        if self.master { self.dma.write(iova, bytes) } else { Err(self.dma.refuse(iova, bytes.len() as u64)) }
    }

    fn interrupt(&self, vector: u16) {
        // A message-signalled interrupt is a DMA write: without bus mastering there is none.
        if let Some(Some(event)) = self.msix.get(usize::from(vector)).filter(|_| self.master) {
            signal(event, "interrupt");
        }
    }

    fn unplug(&self) {
        self.unplugged.set(true);
    }
}

/// The descriptor came from the driver: if it is no eventfd, only the driver misses something.
fn signal(event: &EventFd, what: &'static str) {
    if let Err(error) = event.signal() {
        tracing::warn!(%error, what, "The driver's event could not be signalled");
    }
}

fn bar_slot((number, kind): (u8, BarKind)) -> Result<BarSlot, MachineError> {
    Ok(match kind {
        BarKind::Registers { len_bytes } => {
            let shape = BarShape { number, len_bytes, is_64_bit: false, prefetchable: false };
            BarSlot { shape, behind: Behind::Model }
        }
        BarKind::Memory { fd, len_bytes } => {
            use std::os::fd::AsFd;
            uhmm_kernel_hook::memfd::check_sealed(fd.as_fd(), len_bytes)?;
            let window = Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?;
            let shape = BarShape { number, len_bytes, is_64_bit: true, prefetchable: true };
            BarSlot { shape, behind: Behind::Memory { fd, window } }
        }
    })
}

/// The table gets a BAR of its own, in the highest free place.
fn msix_slot(bars: &[BarSlot], vectors: u16) -> Result<(BarSlot, MsixPlace), MachineError> {
    let free = (0..6).rev().find(|number| bars.iter().all(|bar| !places(&bar.shape).contains(number)));
    let number = free.ok_or(MachineError::Model { problem: "it has vectors, but no BAR is free for their table" })?;
    if vectors > 2048 {
        return Err(MachineError::Model { problem: "it has more than 2048 vectors" });
    }
    let pending_offset = (u64::from(vectors) * MSIX_ENTRY_BYTES).next_multiple_of(PAGE_SIZE);
    let shape = BarShape {
        number,
        len_bytes: (pending_offset + PAGE_SIZE).next_power_of_two(),
        is_64_bit: false,
        prefetchable: false,
    };
    let behind = Behind::MsixTable { bytes: vec![0; pending_offset as usize], pending_offset };
    Ok((BarSlot { shape, behind }, MsixPlace { bar: number, pending_offset: pending_offset as u32 }))
}

/// The registers that a BAR takes.
fn places(shape: &BarShape) -> std::ops::RangeInclusive<u8> {
    shape.number..=shape.number + u8::from(shape.is_64_bit)
}

fn check_bars(bars: &[BarSlot]) -> Result<(), MachineError> {
    let mut taken = [false; 6];
    for shape in bars.iter().map(|bar| bar.shape) {
        if shape.len_bytes < PAGE_SIZE || !shape.len_bytes.is_power_of_two() {
            return Err(MachineError::Model { problem: "a BAR is not a power of two of at least a page" });
        }
        if !shape.is_64_bit && shape.len_bytes > 1 << 31 {
            return Err(MachineError::Model { problem: "a BAR of registers has more than 2 GiB" });
        }
        for place in places(&shape) {
            match taken.get_mut(usize::from(place)) {
                Some(slot) if !*slot => *slot = true,
                _ => return Err(MachineError::Model { problem: "BARs overlap (memory takes two), or are beyond 5" }),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
