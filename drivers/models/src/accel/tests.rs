//! The accelerator, driven as a driver drives it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_kernel_hook::EventFd;
use uhmm_pci::{Bar, DmaMapping, DmaMemory, DmaRight, InterruptKind, PciDevice, PciError};

use super::*;
use crate::faults::PlannedFault;
use crate::local::ModelBackend;
use crate::machine::Machine;

const ENTRIES: u64 = 4;
const MEMORY: u64 = 1 << 20;
/// Completions begin here in the ring memory.
const COMPLETIONS_AT: u64 = 2048;

struct Rig {
    machine: Machine,
    bar: Bar,
    interrupt: EventFd,
    rings: DmaMapping,
    data: DmaMapping,
    submitted: u32,
    seen: u32,
}

impl Rig {
    fn new(faults: &[&str]) -> Self {
        let planned: Vec<PlannedFault> = faults.iter().map(|text| text.parse().unwrap()).collect();
        let accel = Accel::new(MEMORY, FaultPlan::new(planned)).unwrap();
        let machine = Machine::start(Box::new(accel)).unwrap();
        let device = PciDevice::new(Arc::new(ModelBackend::connect(&machine).unwrap())).unwrap();
        let interrupt = EventFd::new().unwrap();
        device.set_interrupts(InterruptKind::Msix, &[interrupt.try_clone().unwrap()]).unwrap();
        let map = |len| {
            let memory = DmaMemory::create("uhmm-test", len).unwrap();
            device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap()
        };
        let (rings, data) = (map(PAGE_SIZE), map(MEMORY));
        let rig = Self { machine, bar: device.bar(0).unwrap(), interrupt, rings, data, submitted: 0, seen: 0 };
        assert_eq!(rig.bar.load_u32(register::MAGIC).unwrap(), MAGIC);
        assert_eq!(rig.bar.load_u64(register::MEMORY_BYTES).unwrap(), MEMORY);
        rig.bar.store_u64(register::RING, rig.rings.iova(0)).unwrap();
        rig.bar.store_u64(register::COMPLETIONS, rig.rings.iova(COMPLETIONS_AT)).unwrap();
        rig.bar.store_u32(register::ENTRIES, ENTRIES as u32).unwrap();
        rig.bar.store_u32(register::ENABLE, 1).unwrap();
        rig
    }

    fn submit(&mut self, op: u32, iova: u64, offset: u64, len: u64) {
        let at = u64::from(self.submitted) % ENTRIES * DESCRIPTOR_BYTES;
        let ring = self.rings.window();
        ring.store_u32(at, op).unwrap();
        ring.store_u32(at + 4, 100 + self.submitted).unwrap();
        for (index, value) in [iova, offset, len].into_iter().enumerate() {
            ring.store_u64(at + 8 + 8 * index as u64, value).unwrap();
        }
        self.submitted += 1;
        self.bar.store_u32(register::TAIL, self.submitted).unwrap();
    }

    fn wait(&self) {
        let mut fds = [PollFd::from_borrowed_fd(self.interrupt.as_fd(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })), Ok(1), "no interrupt within 10 s");
        self.interrupt.drain().unwrap();
    }

    /// Id and status of the next completion.
    fn next(&mut self) -> (u32, u32) {
        let at = COMPLETIONS_AT + u64::from(self.seen) % ENTRIES * COMPLETION_BYTES;
        let round = self.seen / ENTRIES as u32 + 1;
        let ring = self.rings.window();
        while ring.load_u32(at + 8).unwrap() != round {
            self.wait();
        }
        self.seen += 1;
        (ring.load_u32(at).unwrap(), ring.load_u32(at + 4).unwrap())
    }

    fn run(&mut self, op: u32, iova: u64, offset: u64, len: u64) -> (u32, u32) {
        self.submit(op, iova, offset, len);
        self.next()
    }
}

#[test]
fn data_goes_in_comes_out_and_is_filled() {
    let mut rig = Rig::new(&[]);
    let len = MEMORY / 2 + 12345;
    let text: Vec<u8> = (0..len).map(|n| (n * 7 % 251) as u8).collect();
    rig.data.window().write(3, &text).unwrap();
    assert_eq!(rig.run(op::COPY_IN, rig.data.iova(3), 777, len), (100, status::OK));
    rig.data.window().fill(0, MEMORY, 0).unwrap();
    assert_eq!(rig.run(op::FILL, 0x5a, 777, 10), (101, status::OK));
    assert_eq!(rig.run(op::COPY_OUT, rig.data.iova(0), 777, len), (102, status::OK));
    assert!(rig.data.window().compare(0, &[0x5a; 10]).unwrap());
    assert!(rig.data.window().compare(10, &text[10..]).unwrap());
    assert!(rig.data.window().compare(len, &[0; 4]).unwrap());
    // More than a round of the rings, several at once.
    for round in 0..5 {
        for _ in 0..ENTRIES {
            rig.submit(op::FILL, round, 0, 4096);
        }
        for _ in 0..ENTRIES {
            assert_eq!(rig.next().1, status::OK);
        }
    }
    assert_eq!(rig.bar.load_u32(register::COMPLETED).unwrap(), rig.seen);
}

#[test]
fn what_makes_no_sense_is_refused_and_the_next_command_runs() {
    let mut rig = Rig::new(&[]);
    let inside = rig.data.iova(0);
    assert_eq!(rig.run(9, inside, 0, 1).1, status::BAD_COMMAND);
    assert_eq!(rig.run(op::COPY_IN, inside, MEMORY - 1, 2).1, status::OUT_OF_MEMORY);
    assert_eq!(rig.run(op::COPY_IN, inside, u64::MAX, 2).1, status::OUT_OF_MEMORY);
    assert_eq!(rig.run(op::COPY_OUT, inside + MEMORY - 4096, 0, 8192).1, status::DMA_FAULT);
    assert_eq!(rig.run(op::COPY_IN, u64::MAX, 0, 8192).1, status::DMA_FAULT);
    assert_eq!(rig.run(op::COPY_OUT, inside, 0, 0).1, status::OK);
    assert_eq!(rig.machine.dma_fault_count(), 2);
    rig.bar.store_u32(register::TAIL, rig.submitted + ENTRIES as u32 + 1).unwrap();
    assert_eq!(rig.bar.load_u32(register::STATUS).unwrap(), status::BAD_RING);
}

#[test]
fn an_engine_that_cannot_reach_its_rings_stops_and_says_so() {
    let mut rig = Rig::new(&[]);
    rig.bar.store_u32(register::ENABLE, 0).unwrap();
    rig.bar.store_u64(register::COMPLETIONS, 1 << 40).unwrap();
    rig.bar.store_u32(register::ENABLE, 1).unwrap();
    rig.submit(op::FILL, 0, 0, 1);
    rig.wait();
    assert_eq!(rig.bar.load_u32(register::STATUS).unwrap(), status::DMA_FAULT);
}

#[test]
fn injected_faults_hit_their_command_and_look_like_their_kind() {
    let plan = ["command-error@1", "corrupt-id@2", "stray-dma@3", "drop-completion@4", "stuck-queue@6"];
    let mut rig = Rig::new(&plan);
    let iova = rig.data.iova(0);
    assert_eq!(rig.run(op::COPY_IN, iova, 0, 64), (100, status::INTERNAL));
    assert_eq!(rig.run(op::COPY_IN, iova, 0, 64), (101 ^ 0x8000_0000, status::OK));
    assert_eq!(rig.run(op::COPY_IN, iova, 0, 64), (102, status::DMA_FAULT));
    assert_eq!(rig.machine.dma_fault_count(), 1);
    rig.submit(op::FILL, 1, 0, 64);
    assert_eq!(rig.run(op::FILL, 1, 0, 64).0, 104, "the completion of 103 is lost");
    rig.submit(op::FILL, 1, 0, 64);
    rig.submit(op::FILL, 1, 0, 64);
    while rig.bar.load_u32(register::HEAD).unwrap() < 6 {
        std::thread::yield_now();
    }
    assert_eq!(rig.bar.load_u32(register::COMPLETED).unwrap(), 4);
    // Switching it off and on begins anew.
    rig.bar.store_u32(register::ENABLE, 0).unwrap();
    rig.bar.store_u32(register::ENABLE, 1).unwrap();
    rig.rings.window().fill(0, PAGE_SIZE, 0).unwrap();
    (rig.submitted, rig.seen) = (0, 0);
    assert_eq!(rig.run(op::FILL, 1, 0, 64), (100, status::OK));
}

#[test]
fn a_removed_accelerator_is_gone() {
    let mut rig = Rig::new(&["removal@1"]);
    rig.submit(op::FILL, 1, 0, 64);
    rig.machine.wait_removed();
    assert!(matches!(rig.bar.load_u32(register::MAGIC), Err(PciError::Gone { .. })));
}
