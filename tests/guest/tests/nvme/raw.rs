//! The least that drives a queue: what the engine is measured against. One pair of queues, commands written beforehand but for their ids,
//! completions looked for in a loop; no retries, no time limits, nothing that outlives a crash.

use uhmm_driver_nvme::layout::{Layout, PAGE, pages_of};
use uhmm_driver_nvme::protocol::registers::{ACQ, AQA, ASQ, CAP, CC, CC_DISABLED, CC_ENABLED, CSTS};
use uhmm_driver_nvme::protocol::{Capabilities, Command, Completion, ControllerStatus, Opcode, QueueId};
use uhmm_pci::{Bar, DmaMapping, DmaMemory, DmaRight, PciDevice};

const LAYOUT: Layout = Layout { entries: 64, pairs: 1 };
const IO: QueueId = QueueId(1);

#[derive(Default)]
struct Ring {
    tail: u16,
    head: u16,
    phase: bool,
}

pub struct Raw {
    bar: Bar,
    capabilities: Capabilities,
    queues: DmaMapping,
    pub data: DmaMapping,
    rings: [Ring; 2],
}

impl Raw {
    pub fn start(device: &PciDevice, data_bytes: u64) -> Self {
        let map = |bytes| {
            let memory = DmaMemory::create("raw", bytes).unwrap();
            device.map_dma(&memory, DmaRight::ReadWrite, u64::MAX).unwrap()
        };
        let (queues, data) = (map(LAYOUT.len_bytes()), map(data_bytes));
        let bar = device.bar(0).unwrap();
        let capabilities = Capabilities(bar.load_u64(CAP).unwrap());
        let ring = || Ring { phase: true, ..Ring::default() };
        let mut raw = Self { bar, capabilities, queues, data, rings: [ring(), ring()] };
        raw.switch(CC_DISABLED, false);
        raw.bar.store_u32(AQA, 63 | 63 << 16).unwrap();
        raw.bar.store_u64(ASQ, raw.queues.iova(LAYOUT.submission(QueueId::ADMIN))).unwrap();
        raw.bar.store_u64(ACQ, raw.queues.iova(LAYOUT.completion(QueueId::ADMIN))).unwrap();
        raw.switch(CC_ENABLED, true);
        let completion = raw.queues.iova(LAYOUT.completion(IO));
        let submission = raw.queues.iova(LAYOUT.submission(IO));
        raw.admin(Command::set_queue_count(1));
        raw.admin(Command::create_completion_queue(IO, LAYOUT.entries, None).with_memory(completion, 0));
        raw.admin(Command::create_submission_queue(IO, LAYOUT.entries).with_memory(submission, 0));
        raw
    }

    fn switch(&self, configuration: u32, ready: bool) {
        self.bar.store_u32(CC, configuration).unwrap();
        while ControllerStatus(self.bar.load_u32(CSTS).unwrap()).is_ready() != ready {
            std::thread::yield_now();
        }
    }

    pub fn stop(self) {
        self.switch(CC_DISABLED, false);
    }

    fn submit(&mut self, queue: QueueId, command: Command) {
        let ring = &mut self.rings[queue.index()];
        let at = LAYOUT.submission(queue) + u64::from(ring.tail) * 64;
        self.queues.window().write(at, &command.encode()).unwrap();
        ring.tail = (ring.tail + 1) % LAYOUT.entries;
        self.bar.store_u32(self.capabilities.tail_doorbell(queue.0), u32::from(ring.tail)).unwrap();
    }

    fn completed(&mut self, queue: QueueId) -> Option<Completion> {
        let ring = &mut self.rings[queue.index()];
        let at = LAYOUT.completion(queue) + u64::from(ring.head) * 16;
        let high = self.queues.window().load_u64(at + 8).unwrap();
        if Completion::phase_of(high) != ring.phase {
            return None;
        }
        let entry = Completion::decode(self.queues.window().load_u64(at).unwrap(), high);
        ring.head = (ring.head + 1) % LAYOUT.entries;
        ring.phase ^= ring.head == 0;
        self.bar.store_u32(self.capabilities.head_doorbell(queue.0), u32::from(ring.head)).unwrap();
        assert!(entry.status.is_ok(), "{entry:?}");
        Some(entry)
    }

    fn admin(&mut self, command: Command) {
        self.submit(QueueId::ADMIN, command.with_id(1));
        while self.completed(QueueId::ADMIN).is_none() {
            std::hint::spin_loop();
        }
    }

    /// `count` commands of `bytes` each, one behind the other in the namespace, `depth` of them in flight.
    pub fn transfer(&mut self, opcode: Opcode, count: u64, bytes: u64, depth: u64) {
        let room = self.data.memory().len_bytes() / bytes;
        let blocks = bytes >> 9;
        for place in 0..depth.min(room) {
            let list = LAYOUT.list(IO, place as u16);
            for page in 1..bytes / PAGE {
                let iova = self.data.iova(place * bytes + page * PAGE);
                self.queues.window().store_u64(list + 8 * (page - 1), iova).unwrap();
            }
        }
        let mut free: Vec<u16> = (0..depth.min(room) as u16).collect();
        let (mut sent, mut ended) = (0, 0);
        while ended < count {
            while sent < count
                && let Some(place) = free.pop()
            {
                let list = self.queues.iova(LAYOUT.list(IO, place));
                let pages = pages_of(self.data.iova(u64::from(place) * bytes), bytes, list);
                let command = Command::io(opcode, 1, 4096 + sent * blocks, blocks as u32);
                self.submit(IO, command.with_memory(pages.first, pages.second).with_id(place));
                sent += 1;
            }
            while let Some(entry) = self.completed(IO) {
                free.push(entry.id);
                ended += 1;
            }
            std::hint::spin_loop();
        }
    }
}
