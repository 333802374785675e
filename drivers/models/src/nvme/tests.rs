//! The model as a driver sees it: registers, queues in memory, completions. Commands are laid out here by hand.

use std::cell::RefCell;

use super::*;
use crate::model::DmaFault;

const SUBMIT: u64 = 0x1000;
const COMPLETE: u64 = 0x2000;
const LIST: u64 = 0x3000;
const DATA: u64 = 0x10_000;
const MEMORY_BYTES: u64 = 0x40_000;

/// Memory at I/O address 0, and the interrupts that came.
struct Memory {
    window: Window,
    interrupts: RefCell<Vec<u16>>,
}

impl Host for Memory {
    fn dma_read(&self, iova: u64, bytes: &mut [u8]) -> Result<(), DmaFault> {
        let fault = DmaFault { iova, len_bytes: bytes.len() as u64 };
        self.window.read(iova, bytes).map_err(|_| fault)
    }

    fn dma_write(&self, iova: u64, bytes: &[u8]) -> Result<(), DmaFault> {
        let fault = DmaFault { iova, len_bytes: bytes.len() as u64 };
        self.window.write(iova, bytes).map_err(|_| fault)
    }

    fn interrupt(&self, vector: u16) {
        self.interrupts.borrow_mut().push(vector);
    }

    // This model plays its own removal: every register reads as ones.
    fn unplug(&self) {
        unreachable!("the model asks for no unplugging");
    }
}

struct Bench {
    model: NvmeModel,
    control: NvmeControl,
    memory: Memory,
    tail: u32,
    taken: u64,
}

impl Bench {
    fn new(options: NvmeOptions) -> Self {
        let (model, control) = NvmeModel::new(options).unwrap();
        let memory = Memory { window: Window::anonymous(MEMORY_BYTES).unwrap(), interrupts: RefCell::default() };
        Self { model, control, memory, tail: 0, taken: 0 }
    }

    /// Enabled, with an admin queue of 16 entries.
    fn enabled(options: NvmeOptions) -> Self {
        let mut bench = Self::new(options);
        bench.store(0x24, 15 | 15 << 16);
        bench.model.write(0, 0x28, &SUBMIT.to_le_bytes(), &bench.memory);
        bench.model.write(0, 0x30, &COMPLETE.to_le_bytes(), &bench.memory);
        bench.store(0x14, 0x0046_0001);
        assert_eq!(bench.load(0x1c), 1);
        bench
    }

    fn store(&mut self, offset: u64, value: u32) {
        self.model.write(0, offset, &value.to_le_bytes(), &self.memory);
    }

    fn load(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.model.read(0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// A command through the admin queue: its status and result.
    fn admin(&mut self, words: &[(usize, u32)]) -> (u16, u32) {
        let mut command = [0_u32; 16];
        words.iter().for_each(|(place, value)| command[*place] = *value);
        command[0] |= self.tail << 16;
        for (place, word) in command.iter().enumerate() {
            self.memory.window.store_u32(SUBMIT + u64::from(self.tail) * 64 + 4 * place as u64, *word).unwrap();
        }
        self.tail = (self.tail + 1) % 16;
        self.store(0x1000, self.tail);
        while self.model.advance(Instant::now(), &self.memory).is_some() {}
        let (at, phase) = (COMPLETE + self.taken % 16 * 16, u32::from((self.taken / 16).is_multiple_of(2)));
        let last = self.memory.window.load_u32(at + 12).unwrap();
        assert_eq!(last >> 16 & 1, phase, "it was completed");
        assert_eq!(last & 0xffff, command[0] >> 16);
        self.taken += 1;
        self.store(0x1004, (self.taken % 16) as u32);
        ((last >> 17) as u16, self.memory.window.load_u32(at).unwrap())
    }

    /// An I/O command, carried out at once: no queues are needed for that.
    fn io(&mut self, opcode: u32, lba: u32, blocks: u32, first: u64, second: u64) -> u16 {
        let words =
            [opcode, 1, 0, 0, 0, 0, first as u32, (first >> 32) as u32, second as u32, 0, lba, 0, blocks - 1, 0, 0, 0];
        let mut bytes = [0; 64];
        bytes.chunks_mut(4).zip(words).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        self.model.io(&Command::new(bytes), &self.memory).status
    }
}

#[test]
fn nvme_model_tells_what_it_is() {
    let mut bench = Bench::enabled(NvmeOptions { block_shift: 12, ..NvmeOptions::default() });
    assert_eq!((bench.load(0) & 0xffff, bench.load(4) >> 5 & 1, bench.load(0x3c)), (255, 1, 0));
    assert_eq!(bench.admin(&[(0, 6), (6, DATA as u32), (10, 1)]), (0, 0));
    let mut serial = [0; 12];
    bench.memory.window.read(DATA + 4, &mut serial).unwrap();
    assert_eq!(&serial, b"uhmm-model  ");
    assert_eq!(bench.admin(&[(0, 6), (1, 1), (6, DATA as u32)]), (0, 0));
    assert_eq!(bench.memory.window.load_u64(DATA).unwrap(), 64 << 8);
    assert_eq!(bench.memory.window.load_u8(DATA + 132 + 2).unwrap(), 12);
    assert_eq!(bench.admin(&[(0, 9), (10, 7), (11, 63 | 3 << 16)]), (0, 7 | 3 << 16));
    assert_eq!(bench.admin(&[(0, 0x7f)]).0, 0x4001);
}

#[test]
fn nvme_model_makes_queues_in_order_and_rings_their_vector() {
    let mut bench = Bench::enabled(NvmeOptions::default());
    assert_eq!(
        bench.admin(&[(0, 1), (6, 0x5000), (10, 1 | 7 << 16), (11, 1 | 1 << 16)]).0,
        0x4101,
        "no completion queue yet"
    );
    assert_eq!(bench.admin(&[(0, 5), (6, 0x4000), (10, 1 | 7 << 16), (11, 3 | 2 << 16)]).0, 0);
    assert_eq!(bench.admin(&[(0, 1), (6, 0x5000), (10, 1 | 7 << 16), (11, 1 | 1 << 16)]).0, 0);
    bench.memory.interrupts.borrow_mut().clear();
    bench.memory.window.store_u32(0x5000 + 4, 1).unwrap();
    bench.store(0x1008, 1);
    bench.model.advance(Instant::now(), &bench.memory);
    assert_eq!(*bench.memory.interrupts.borrow(), [2], "a flush on queue 1 rings vector 2");
    assert_eq!(bench.memory.window.load_u32(0x4000 + 12).unwrap(), 1 << 16);
    assert_eq!(bench.control.counters().flushes, 1);
    bench.store(0x1008, 1);
    assert_eq!(bench.control.counters().bad_doorbells, 1, "the value that stood there");
}

#[test]
fn nvme_model_follows_page_lists_and_refuses_what_is_not_mapped() {
    let mut bench = Bench::new(NvmeOptions::default());
    for page in 0..5_u64 {
        bench.memory.window.fill(DATA + page * 4096, 4096, 0x10 + page as u8).unwrap();
        // The list is in reverse, so contiguous memory would not do.
        bench.memory.window.store_u64(LIST + 8 * page, DATA + (4 - page) * 4096).unwrap();
    }
    assert_eq!(bench.io(1, 8, 40, DATA, LIST + 8), 0);
    let blocks = &bench.model.blocks;
    let at = |page: u64| blocks.load_u8((8 << 9) + page * 4096).unwrap();
    assert_eq!([at(0), at(1), at(2), at(3), at(4)], [0x10, 0x13, 0x12, 0x11, 0x10]);
    assert_eq!(bench.io(2, 8, 16, 0x20_000, 0x22_000), 0);
    assert_eq!(bench.memory.window.load_u8(0x22_000).unwrap(), 0x13, "two pages need no list");
    assert_eq!(bench.io(2, 8, 8, MEMORY_BYTES, 0), STATUS_TRANSFER_ERROR);
    assert_eq!(bench.io(2, (64 << 11) - 1, 2, DATA, 0), 0x4080);
    assert_eq!(bench.io(2, 0, 512, DATA, LIST), 0x4002, "more than a transfer may have");
    assert_eq!((bench.io(8, 8, 8, 0, 0), bench.model.blocks.load_u8(8 << 9).unwrap()), (0, 0));
    assert_eq!(bench.control.counters().dma_faults, 1);
}

#[test]
fn nvme_model_data_can_be_in_its_own_buffer_once_that_is_switched_on() {
    let mut bench = Bench::new(NvmeOptions { cmb_bytes: 1 << 20, ..NvmeOptions::default() });
    assert_eq!((bench.load(4) >> 25 & 1, bench.load(0x3c)), (1, 0));
    let base = 0x4_0000_0000_u64;
    assert_eq!(bench.io(2, 0, 8, base + 4096, 0), STATUS_TRANSFER_ERROR);
    bench.model.write(0, 0x50, &(base | 3).to_le_bytes(), &bench.memory);
    assert_eq!((bench.load(0x38), bench.load(0x3c)), (2, 1 << 12 | 2 << 8 | 0x18));
    bench.model.blocks.fill(0, 4096, 0x77).unwrap();
    assert_eq!(bench.io(2, 0, 8, base + 4096, 0), 0);
    let (_, window) = bench.model.cmb.as_ref().unwrap();
    assert_eq!((window.load_u8(4095).unwrap(), window.load_u8(4096).unwrap()), (0, 0x77));
}

#[test]
fn nvme_model_forgets_its_queues_but_not_its_blocks_in_a_reset() {
    let mut bench = Bench::enabled(NvmeOptions::default());
    bench.model.blocks.fill(0, 512, 1).unwrap();
    bench.control.set_stubborn();
    bench.store(0x14, 0);
    assert_eq!(bench.load(0x1c), 1, "as it was told");
    bench.model.reset();
    assert_eq!((bench.load(0x1c), bench.load(0x14), bench.model.blocks.load_u8(0).unwrap()), (0, 0, 1));
    bench.control.vanish();
    assert_eq!(bench.load(0x1c), u32::MAX);
}
