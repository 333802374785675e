//! An NVMe controller with one namespace: admin queue, I/O queues, MSI-X, and on demand a controller memory buffer.
//!
//! ```text
//!   registers, doorbells -> NvmeModel: fetch -> pending (latency, faults) -> commands.rs: blocks <-> memory -> completion, interrupt
//! ```
//! Written from the device's side, with its own view of where each field is: a driver that misplaces one finds no understanding here.
//! Blocks lie in a memfd, so they outlive resets and drivers. Commands are carried out in `advance`, a bounded number a call.

mod commands;
mod control;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{HookError, Prot, Window, memfd};

use crate::model::{BarKind, DeviceModel, Host, Identity};
use crate::nvme::commands::{Command, Outcome};
pub use crate::nvme::control::{NvmeControl, NvmeCounters, NvmeFault};

const REGISTER_BYTES: u64 = 16 << 10;
const DOORBELLS: u64 = 0x1000;
const ENTRIES_MAX: u32 = 256;
const CMB_BAR: u8 = 2;
const COMMANDS_A_CALL: usize = 64;
/// I/O queues of each kind.
const QUEUES_MAX: u16 = 8;
const CC_ENABLE: u32 = 1;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const STATUS_TRANSFER_ERROR: u16 = 0x04;

/// What kind of controller.
#[derive(Clone, Debug)]
pub struct NvmeOptions {
    /// Size of the namespace.
    pub len_bytes: u64,
    /// 9 or 12: the logarithm of the block size.
    pub block_shift: u8,
    /// Largest transfer is 4096 << this; 0: no limit.
    pub mdts: u8,
    /// Has Write Zeroes.
    pub write_zeroes: bool,
    /// Size of the controller memory buffer, a power of two of at least 1 MiB; 0: none.
    pub cmb_bytes: u64,
    /// Serial number.
    pub serial: String,
}

impl Default for NvmeOptions {
    fn default() -> Self {
        let serial = "uhmm-model".to_owned();
        Self { len_bytes: 64 << 20, block_shift: 9, mdts: 5, write_zeroes: true, cmb_bytes: 0, serial }
    }
}

#[derive(Debug)]
struct Completions {
    base: u64,
    entries: u32,
    tail: u32,
    head: u32,
    phase: bool,
    vector: Option<u16>,
}

#[derive(Debug)]
struct Submissions {
    base: u64,
    entries: u32,
    head: u32,
    tail: u32,
    completions: u16,
    stuck: bool,
}

/// A command that was fetched.
#[derive(Debug)]
struct Pending {
    due: Option<Instant>,
    queue: u16,
    command: Command,
    fault: Option<NvmeFault>,
}

/// See the module head.
#[derive(Debug)]
pub struct NvmeModel {
    options: NvmeOptions,
    control: NvmeControl,
    blocks: Window,
    blocks_fd: Fd,
    cmb: Option<(Fd, Window)>,
    configuration: u32,
    status: u32,
    admin_sizes: u32,
    admin_queues: [u64; 2],
    cmb_control: u64,
    submissions: BTreeMap<u16, Submissions>,
    completions: BTreeMap<u16, Completions>,
    pending: VecDeque<Pending>,
}

impl NvmeModel {
    /// A controller that was just powered up; its namespace is zero.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn new(options: NvmeOptions) -> Result<(Self, NvmeControl), HookError> {
        let fd: Fd = Arc::new(memfd::create_sealed("uhmm-nvme-blocks", options.len_bytes)?);
        Self::with_blocks(options, fd)
    }

    /// The same with the blocks of another one ([`NvmeModel::blocks`]): a machine that was switched off and on.
    ///
    /// # Errors
    /// The file has another size; out of descriptors.
    pub fn with_blocks(options: NvmeOptions, blocks_fd: Fd) -> Result<(Self, NvmeControl), HookError> {
        memfd::check_sealed(blocks_fd.as_fd(), options.len_bytes)?;
        let blocks = Window::map(blocks_fd.as_fd(), 0, options.len_bytes, Prot::ReadWrite)?;
        let cmb = match options.cmb_bytes {
            0 => None,
            len => {
                let fd: Fd = Arc::new(memfd::create_sealed("uhmm-nvme-cmb", len)?);
                let window = Window::map(fd.as_fd(), 0, len, Prot::ReadWrite)?;
                Some((fd, window))
            }
        };
        let control = NvmeControl::default();
        let model = Self {
            options,
            control: control.clone(),
            blocks,
            blocks_fd,
            cmb,
            configuration: 0,
            status: 0,
            admin_sizes: 0,
            admin_queues: [0; 2],
            cmb_control: 0,
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            pending: VecDeque::new(),
        };
        Ok((model, control))
    }

    /// The namespace's bytes.
    pub fn blocks(&self) -> Fd {
        self.blocks_fd.clone()
    }

    fn register(&self, offset: u64) -> u32 {
        // Capabilities: 256 entries, contiguous queues, 500 ms, doorbells 4 bytes apart, NVM commands, pages of 4 KiB, buffer control.
        let cmb = u64::from(self.cmb.is_some());
        let capabilities = u64::from(ENTRIES_MAX - 1) | 1 << 16 | 1 << 24 | 1 << 37 | cmb << 57;
        let [submission, completion] = self.admin_queues;
        let (low, high) = (|value: u64| value as u32, |value: u64| (value >> 32) as u32);
        let cmb_on = self.cmb_control & 1 != 0;
        match offset {
            0x00 => low(capabilities),
            0x04 => high(capabilities),
            0x08 => 0x0001_0400,
            0x14 => self.configuration,
            0x1c => self.status,
            0x24 => self.admin_sizes,
            0x28 => low(submission),
            0x2c => high(submission),
            0x30 => low(completion),
            0x34 => high(completion),
            // The buffer begins at the start of its BAR; data may be read and written there, in units of 1 MiB.
            0x38 if cmb_on => u32::from(CMB_BAR),
            0x3c if cmb_on => ((self.options.cmb_bytes >> 20) as u32) << 12 | 2 << 8 | 3 << 3,
            0x50 => low(self.cmb_control),
            0x54 => high(self.cmb_control),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let replace = |old: u64, high: bool| {
            let (shift, keep) = if high { (32, 0xffff_ffff) } else { (0, !0xffff_ffff) };
            old & keep | u64::from(value) << shift
        };
        match offset {
            0x14 => self.configure(value),
            0x24 => self.admin_sizes = value,
            0x28 | 0x2c => self.admin_queues[0] = replace(self.admin_queues[0], offset == 0x2c),
            0x30 | 0x34 => self.admin_queues[1] = replace(self.admin_queues[1], offset == 0x34),
            0x50 | 0x54 if self.cmb.is_some() => self.cmb_control = replace(self.cmb_control, offset == 0x54),
            _ => {}
        }
    }

    fn configure(&mut self, value: u32) {
        let (was, is) = (self.configuration & CC_ENABLE != 0, value & CC_ENABLE != 0);
        if was && !is && self.control.orders().stubborn {
            return;
        }
        self.configuration = value;
        if was && !is {
            self.stop();
        }
        if !was && is {
            self.control.orders().seen.enables += 1;
            let size = |shift: u32| (self.admin_sizes >> shift & 0xfff) + 1;
            let [submission, completion] = self.admin_queues;
            self.completions.insert(0, Completions::new(completion, size(16), Some(0)));
            self.submissions.insert(0, Submissions::new(submission, size(0), 0));
            // Pages of 4 KiB, entries of 64 and 16 bytes: nothing else is supported.
            let fits = value >> 7 & 0xf == 0 && value >> 16 & 0xff == 0x46;
            self.status = if fits { CSTS_READY } else { CSTS_FATAL };
        }
    }

    /// Queues are gone, and nothing of what was in flight touches memory any more.
    fn stop(&mut self) {
        self.status = 0;
        self.submissions.clear();
        self.completions.clear();
        self.pending.clear();
    }

    fn doorbell(&mut self, index: u64, value: u32) {
        let queue = (index / 2) as u16;
        let (place, entries) = match (index % 2, self.submissions.get_mut(&queue), self.completions.get_mut(&queue)) {
            (0, Some(ring), _) => (&mut ring.tail, ring.entries),
            (1, _, Some(ring)) => (&mut ring.head, ring.entries),
            _ => return self.control.orders().seen.bad_doorbells += 1,
        };
        if value >= entries || value == *place {
            self.control.orders().seen.bad_doorbells += 1;
        }
        if value < entries {
            *place = value;
        }
    }

    /// Commands out of the submission queues. False: a queue is not mapped.
    fn fetch(&mut self, now: Instant, host: &dyn Host) -> bool {
        for (queue, ring) in &mut self.submissions {
            while ring.head != ring.tail && !ring.stuck && self.pending.len() < COMMANDS_A_CALL {
                let mut bytes = [0; 64];
                if host.dma_read(ring.base + u64::from(ring.head) * 64, &mut bytes).is_err() {
                    self.control.orders().seen.dma_faults += 1;
                    return false;
                }
                ring.head = (ring.head + 1) % ring.entries;
                let mut orders = self.control.orders();
                let fault = if *queue == 0 { None } else { orders.next_fault() };
                let due = (*queue != 0 && !orders.latency.is_zero()).then(|| now + orders.latency);
                if fault == Some(NvmeFault::StuckQueue) {
                    ring.stuck = true;
                } else {
                    self.pending.push_back(Pending { due, queue: *queue, command: Command::new(bytes), fault });
                }
            }
        }
        true
    }

    fn perform(&mut self, pending: &Pending, host: &dyn Host) -> bool {
        let Pending { queue, command, fault, .. } = pending;
        let outcome = match fault {
            Some(NvmeFault::Status(status)) => Outcome::failed(*status),
            Some(NvmeFault::Fatal) => return false,
            Some(NvmeFault::Removal) => {
                host.unplug();
                return true;
            }
            Some(NvmeFault::WildAddress) => {
                let wild = host.dma_read(0xdead << 32, &mut [0; 64]);
                self.control.orders().seen.dma_faults += u64::from(wild.is_err());
                Outcome::failed(STATUS_TRANSFER_ERROR)
            }
            _ if *queue == 0 => self.admin(command, host),
            _ => self.io(command, host),
        };
        let mut id = command.id();
        let times = match fault {
            Some(NvmeFault::DropCompletion) => 0,
            Some(NvmeFault::DoubleCompletion) => 2,
            Some(NvmeFault::WrongId) => {
                id ^= 0x7f00;
                1
            }
            _ => 1,
        };
        (0..times).all(|_| self.complete(*queue, id, outcome, host))
    }

    /// False: the completion queue is not mapped.
    fn complete(&mut self, queue: u16, id: u16, outcome: Outcome, host: &dyn Host) -> bool {
        let Some(from) = self.submissions.get(&queue) else { return true };
        let head = from.head;
        let Some(ring) = self.completions.get_mut(&from.completions) else { return true };
        let mut entry = [0; 16];
        entry[..4].copy_from_slice(&outcome.result.to_le_bytes());
        entry[8..10].copy_from_slice(&(head as u16).to_le_bytes());
        entry[10..12].copy_from_slice(&queue.to_le_bytes());
        entry[12..14].copy_from_slice(&id.to_le_bytes());
        entry[14..16].copy_from_slice(&(outcome.status << 1 | u16::from(ring.phase)).to_le_bytes());
        // The word with the phase goes last, as a device's write does.
        let at = ring.base + u64::from(ring.tail) * 16;
        let written = host.dma_write(at, &entry[..8]).and_then(|()| host.dma_write(at + 8, &entry[8..]));
        if written.is_err() {
            self.control.orders().seen.dma_faults += 1;
            return false;
        }
        ring.tail += 1;
        if ring.tail == ring.entries {
            (ring.tail, ring.phase) = (0, !ring.phase);
        }
        if let Some(vector) = ring.vector {
            host.interrupt(vector);
        }
        true
    }

    fn has_room(&self, queue: u16) -> bool {
        let ring = self.submissions.get(&queue).and_then(|ring| self.completions.get(&ring.completions));
        ring.is_none_or(|ring| (ring.tail + 1) % ring.entries != ring.head)
    }
}

impl Completions {
    fn new(base: u64, entries: u32, vector: Option<u16>) -> Self {
        Self { base, entries, tail: 0, head: 0, phase: true, vector }
    }
}

impl Submissions {
    fn new(base: u64, entries: u32, completions: u16) -> Self {
        Self { base, entries, head: 0, tail: 0, completions, stuck: false }
    }
}

impl DeviceModel for NvmeModel {
    fn identity(&self) -> Identity {
        Identity { vendor: 0x1b36, device: 0x0010, class: 0x01_0802, vectors: QUEUES_MAX + 1 }
    }

    fn bars(&self) -> Vec<(u8, BarKind)> {
        let registers = (0, BarKind::Registers { len_bytes: REGISTER_BYTES });
        let cmb = self
            .cmb
            .as_ref()
            .map(|(fd, window)| (CMB_BAR, BarKind::Memory { fd: fd.clone(), len_bytes: window.len() }));
        std::iter::once(registers).chain(cmb).collect()
    }

    fn read(&mut self, _bar: u8, offset: u64, bytes: &mut [u8]) {
        if self.control.orders().vanished {
            return bytes.fill(0xff);
        }
        for (n, byte) in bytes.iter_mut().enumerate() {
            let at = offset + n as u64;
            *byte = self.register(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    fn write(&mut self, _bar: u8, offset: u64, bytes: &[u8], _host: &dyn Host) {
        if self.control.orders().vanished {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(bytes.chunks_exact(4)) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            if at >= DOORBELLS {
                self.doorbell((at - DOORBELLS) / 4, value);
            } else {
                self.write_register(at, value);
            }
        }
    }

    fn advance(&mut self, now: Instant, host: &dyn Host) -> Option<Duration> {
        if self.status != CSTS_READY || self.control.orders().vanished {
            return None;
        }
        if !self.fetch(now, host) {
            self.status |= CSTS_FATAL;
            return None;
        }
        let mut next: Option<Duration> = None;
        let mut index = 0;
        while let Some(pending) = self.pending.get(index) {
            let wait = pending.due.map_or(Duration::ZERO, |due| due.saturating_duration_since(now));
            if !wait.is_zero() || !self.has_room(pending.queue) {
                let wait = if wait.is_zero() { Duration::from_millis(1) } else { wait };
                next = Some(next.map_or(wait, |next| next.min(wait)));
                index += 1;
                continue;
            }
            let Some(pending) = self.pending.remove(index) else { break };
            if !self.perform(&pending, host) {
                self.status |= CSTS_FATAL;
                self.pending.clear();
                return None;
            }
            // An abort takes others out.
            index = 0;
        }
        let more = self.submissions.values().any(|ring| ring.head != ring.tail && !ring.stuck);
        if more && self.pending.len() < COMMANDS_A_CALL { Some(Duration::ZERO) } else { next }
    }

    fn reset(&mut self) {
        self.control.orders().stubborn = false;
        self.control.orders().seen.function_resets += 1;
        self.stop();
        self.configuration = 0;
        self.admin_sizes = 0;
        self.admin_queues = [0; 2];
        self.cmb_control = 0;
    }
}
