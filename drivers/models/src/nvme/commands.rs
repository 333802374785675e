//! What commands do.

use uhmm_kernel_hook::PAGE_SIZE;

use crate::model::{DmaFault, Host};
use crate::nvme::{Completions, ENTRIES_MAX, NvmeModel, QUEUES_MAX, STATUS_TRANSFER_ERROR, Submissions};

const INVALID_OPCODE: u16 = 0x4001;
const INVALID_FIELD: u16 = 0x4002;
const ABORTED: u16 = 0x0007;
const INVALID_NAMESPACE: u16 = 0x400b;
const OUT_OF_RANGE: u16 = 0x4080;
const INVALID_QUEUE: u16 = 0x4101;
const INVALID_QUEUE_SIZE: u16 = 0x4102;
const NAMESPACE: u32 = 1;
const LIST_ENTRIES: u64 = PAGE_SIZE / 8;

/// 64 bytes.
#[derive(Clone, Debug)]
pub(super) struct Command([u8; 64]);

impl Command {
    pub(super) fn new(bytes: [u8; 64]) -> Self {
        Self(bytes)
    }

    fn word(&self, index: usize) -> u32 {
        let at = index * 4;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn long(&self, index: usize) -> u64 {
        u64::from(self.word(index)) | u64::from(self.word(index + 1)) << 32
    }

    pub(super) fn id(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }
}

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) result: u32,
    pub(super) status: u16,
}

impl Outcome {
    const OK: Self = Self { result: 0, status: 0 };

    pub(super) fn failed(status: u16) -> Self {
        Self { result: 0, status }
    }
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToMemory,
    FromMemory,
}

impl NvmeModel {
    pub(super) fn admin(&mut self, command: &Command, host: &dyn Host) -> Outcome {
        let (queue, size) = ((command.word(10) & 0xffff) as u16, (command.word(10) >> 16) + 1);
        match command.0[0] {
            0x01 | 0x05 if queue == 0 || queue > QUEUES_MAX => Outcome::failed(INVALID_QUEUE),
            0x01 | 0x05 if !(2..=ENTRIES_MAX).contains(&size) => Outcome::failed(INVALID_QUEUE_SIZE),
            0x01 | 0x05 if command.word(11) & 1 == 0 => Outcome::failed(INVALID_FIELD),
            0x05 => {
                let flags = command.word(11);
                let vector = (flags & 2 != 0).then_some((flags >> 16) as u16);
                self.completions.insert(queue, Completions::new(command.long(6), size, vector));
                Outcome::OK
            }
            0x01 => {
                let completions = (command.word(11) >> 16) as u16;
                if completions == 0 || !self.completions.contains_key(&completions) {
                    return Outcome::failed(INVALID_QUEUE);
                }
                self.submissions.insert(queue, Submissions::new(command.long(6), size, completions));
                Outcome::OK
            }
            0x06 => self.identify(command, host),
            0x08 => self.abort(command, host),
            0x09 | 0x0a if command.word(10) & 0xff == 7 => {
                let most = u32::from(QUEUES_MAX - 1);
                Outcome {
                    result: (command.word(11) & 0xffff).min(most) | (command.word(11) >> 16).min(most) << 16,
                    status: 0,
                }
            }
            0x09 | 0x0a => Outcome::failed(INVALID_FIELD),
            _ => Outcome::failed(INVALID_OPCODE),
        }
    }

    fn identify(&mut self, command: &Command, host: &dyn Host) -> Outcome {
        let mut page = vec![0; PAGE_SIZE as usize];
        match command.word(10) & 0xff {
            0 if command.word(1) != NAMESPACE => {}
            0 => {
                let blocks = self.options.len_bytes >> self.options.block_shift;
                for at in [0, 8, 16] {
                    page[at..at + 8].copy_from_slice(&blocks.to_le_bytes());
                }
                // Two formats, the second one in use.
                (page[25], page[26]) = (1, 1);
                (page[128 + 2], page[132 + 2]) =
                    (if self.options.block_shift == 9 { 12 } else { 9 }, self.options.block_shift);
            }
            1 => {
                let text = |into: &mut [u8], text: &str| {
                    into.fill(b' ');
                    let len = text.len().min(into.len());
                    into[..len].copy_from_slice(&text.as_bytes()[..len]);
                };
                text(&mut page[4..24], &self.options.serial);
                text(&mut page[24..64], "uhmm device model");
                page[77] = self.options.mdts;
                (page[512], page[513]) = (0x66, 0x44);
                page[516] = NAMESPACE as u8;
                page[520] = u8::from(self.options.write_zeroes) << 3;
                page[525] = 1;
            }
            _ => return Outcome::failed(INVALID_FIELD),
        }
        self.transfer(command, &mut page, Way::ToMemory, host)
    }

    /// Ends a command that waits; says in bit 0 when there was none.
    fn abort(&mut self, command: &Command, host: &dyn Host) -> Outcome {
        self.control.orders().seen.aborts += 1;
        let (queue, id) = ((command.word(10) & 0xffff) as u16, (command.word(10) >> 16) as u16);
        let waits = self.pending.iter().position(|other| other.queue == queue && other.command.id() == id);
        let Some(waits) = waits else { return Outcome { result: 1, status: 0 } };
        self.pending.remove(waits);
        self.complete(queue, id, Outcome::failed(ABORTED), host);
        Outcome::OK
    }

    pub(super) fn io(&mut self, command: &Command, host: &dyn Host) -> Outcome {
        let opcode = command.0[0];
        let namespace = command.word(1);
        if namespace != NAMESPACE && !(opcode == 0 && namespace == u32::MAX) {
            return Outcome::failed(INVALID_NAMESPACE);
        }
        if opcode == 0x00 {
            self.control.orders().seen.flushes += 1;
            return Outcome::OK;
        }
        let shift = self.options.block_shift;
        let (first, count) = (command.long(10), u64::from(command.word(12) & 0xffff) + 1);
        let inside = first.checked_add(count).is_some_and(|end| end <= self.options.len_bytes >> shift);
        if !inside {
            return Outcome::failed(OUT_OF_RANGE);
        }
        let (at, len) = (first << shift, count << shift);
        let too_long = self.options.mdts != 0 && len > PAGE_SIZE << self.options.mdts;
        match opcode {
            0x01 | 0x02 if too_long => Outcome::failed(INVALID_FIELD),
            0x01 | 0x02 => {
                self.control.orders().seen.transfers += 1;
                let mut bytes = vec![0; len as usize];
                let way = if opcode == 0x02 { Way::ToMemory } else { Way::FromMemory };
                if way == Way::ToMemory && self.blocks.read(at, &mut bytes).is_err() {
                    return Outcome::failed(OUT_OF_RANGE);
                }
                let outcome = self.transfer(command, &mut bytes, way, host);
                if way == Way::FromMemory && outcome == Outcome::OK && self.blocks.write(at, &bytes).is_err() {
                    return Outcome::failed(OUT_OF_RANGE);
                }
                outcome
            }
            0x08 if self.options.write_zeroes => {
                self.control.orders().seen.zeroings += 1;
                match self.blocks.fill(at, len, 0) {
                    Ok(()) => Outcome::OK,
                    Err(_) => Outcome::failed(OUT_OF_RANGE),
                }
            }
            _ => Outcome::failed(INVALID_OPCODE),
        }
    }

    /// Between the command's pages and `bytes`.
    fn transfer(&mut self, command: &Command, bytes: &mut [u8], way: Way, host: &dyn Host) -> Outcome {
        let done = self.pages(command, bytes.len() as u64, host).and_then(|pages| {
            let mut pages = pages.into_iter();
            let mut rest = bytes;
            while let Some((address, len)) = pages.next().filter(|_| !rest.is_empty()) {
                let (part, behind) = rest.split_at_mut((len as usize).min(rest.len()));
                self.touch(address, part, way, host)?;
                rest = behind;
            }
            Ok(())
        });
        match done {
            Ok(()) => Outcome::OK,
            Err(_) => {
                self.control.orders().seen.dma_faults += 1;
                Outcome::failed(STATUS_TRANSFER_ERROR)
            }
        }
    }

    /// Addresses and lengths of the command's memory.
    fn pages(&self, command: &Command, len: u64, host: &dyn Host) -> Result<Vec<(u64, u64)>, DmaFault> {
        let (first, second) = (command.long(6), command.long(8));
        let first_len = (PAGE_SIZE - first % PAGE_SIZE).min(len);
        let mut pages = vec![(first, first_len)];
        let mut left = len - first_len;
        if left > PAGE_SIZE {
            let mut list = second;
            while left > 0 {
                let in_page = LIST_ENTRIES - list % PAGE_SIZE / 8;
                for n in 0..in_page {
                    let mut entry = [0; 8];
                    host.dma_read(list + n * 8, &mut entry)?;
                    let entry = u64::from_le_bytes(entry);
                    if n + 1 == in_page && left > PAGE_SIZE {
                        list = entry;
                        break;
                    }
                    pages.push((entry, left.min(PAGE_SIZE)));
                    left -= left.min(PAGE_SIZE);
                    if left == 0 {
                        break;
                    }
                }
            }
        } else if left > 0 {
            pages.push((second, left));
        }
        Ok(pages)
    }

    /// Memory of the machine, or the buffer where the driver has put it.
    fn touch(&self, address: u64, bytes: &mut [u8], way: Way, host: &dyn Host) -> Result<(), DmaFault> {
        let fault = DmaFault { iova: address, len_bytes: bytes.len() as u64 };
        if let Some((_, window)) = self.cmb.as_ref().filter(|_| self.cmb_control & 3 == 3)
            && let Some(offset) = address.checked_sub(self.cmb_control & !0xfff).filter(|at| *at < window.len())
        {
            let done = match way {
                Way::ToMemory => window.write(offset, bytes),
                Way::FromMemory => window.read(offset, bytes),
            };
            return done.map_err(|_| fault);
        }
        match way {
            Way::ToMemory => host.dma_write(address, bytes),
            Way::FromMemory => host.dma_read(address, bytes),
        }
    }
}
