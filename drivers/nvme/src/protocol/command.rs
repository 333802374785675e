//! Submission queue entries.

/// Bytes of an entry.
pub const COMMAND_BYTES: u64 = 64;

/// 0: admin. From 1 on: I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u16);

impl QueueId {
    /// The admin queue.
    pub const ADMIN: Self = Self(0);

    /// Its place among all queues.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// What an I/O command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Opcode {
    /// Everything written is durable when it ends.
    Flush,
    /// Memory to blocks.
    Write,
    /// Memory to blocks, durable when it ends.
    WriteThrough,
    /// Blocks to memory.
    Read,
    /// Blocks become zero, without data.
    WriteZeroes,
}

const FORCE_UNIT_ACCESS: u32 = 1 << 30;
const PHYSICALLY_CONTIGUOUS: u32 = 1;
const INTERRUPTS: u32 = 2;
const FEATURE_QUEUE_COUNT: u32 = 7;
const IDENTIFY_CONTROLLER: u32 = 1;

/// One entry, as sixteen little-endian words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command {
    words: [u32; 16],
}

impl Command {
    fn new(opcode: u8, namespace: u32, words: [u32; 3]) -> Self {
        let mut command = Self::default();
        command.words[0] = u32::from(opcode);
        command.words[1] = namespace;
        command.words[10..13].copy_from_slice(&words);
        command
    }

    /// 4 KiB about the controller.
    pub fn identify_controller() -> Self {
        Self::new(0x06, 0, [IDENTIFY_CONTROLLER, 0, 0])
    }

    /// 4 KiB about a namespace.
    pub fn identify_namespace(namespace: u32) -> Self {
        Self::new(0x06, namespace, [0, 0, 0])
    }

    /// Asks for this many pairs of I/O queues; the answer is [`crate::protocol::Completion::queue_pairs_granted`].
    pub fn set_queue_count(count: u16) -> Self {
        let last = u32::from(count.max(1) - 1);
        Self::new(0x09, 0, [FEATURE_QUEUE_COUNT, last | last << 16, 0])
    }

    /// A completion queue that raises this interrupt vector, or none.
    pub fn create_completion_queue(queue: QueueId, entries: u16, vector: Option<u16>) -> Self {
        let interrupts = vector.map_or(0, |vector| INTERRUPTS | u32::from(vector) << 16);
        Self::new(0x05, 0, [sizes(queue, entries), PHYSICALLY_CONTIGUOUS | interrupts, 0])
    }

    /// A submission queue that completes into the completion queue of the same number.
    pub fn create_submission_queue(queue: QueueId, entries: u16) -> Self {
        Self::new(0x01, 0, [sizes(queue, entries), PHYSICALLY_CONTIGUOUS | u32::from(queue.0) << 16, 0])
    }

    /// Asks the controller to end a command.
    pub fn abort(queue: QueueId, id: u16) -> Self {
        Self::new(0x08, 0, [u32::from(queue.0) | u32::from(id) << 16, 0, 0])
    }

    /// I/O; `blocks` is 1 to 65536 (of no meaning for a flush).
    pub fn io(opcode: Opcode, namespace: u32, lba: u64, blocks: u32) -> Self {
        let range = [lba as u32, (lba >> 32) as u32, blocks.wrapping_sub(1) & 0xffff];
        match opcode {
            Opcode::Flush => Self::new(0x00, namespace, [0; 3]),
            Opcode::Write => Self::new(0x01, namespace, range),
            Opcode::WriteThrough => Self::new(0x01, namespace, [range[0], range[1], range[2] | FORCE_UNIT_ACCESS]),
            Opcode::Read => Self::new(0x02, namespace, range),
            Opcode::WriteZeroes => Self::new(0x08, namespace, range),
        }
    }

    /// With the two words that say where its memory is.
    #[must_use]
    pub fn with_memory(mut self, first: u64, second: u64) -> Self {
        for (place, value) in [(6, first), (8, second)] {
            self.words[place] = value as u32;
            self.words[place + 1] = (value >> 32) as u32;
        }
        self
    }

    /// With its id.
    #[must_use]
    pub fn with_id(mut self, id: u16) -> Self {
        self.words[0] = self.words[0] & 0xffff | u32::from(id) << 16;
        self
    }

    /// Its id.
    pub fn id(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    /// As it lies in the queue.
    pub fn encode(&self) -> [u8; COMMAND_BYTES as usize] {
        let mut bytes = [0; COMMAND_BYTES as usize];
        for (place, word) in bytes.chunks_exact_mut(4).zip(self.words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

fn sizes(queue: QueueId, entries: u16) -> u32 {
    u32::from(queue.0) | u32::from(entries.max(2) - 1) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: Command) -> Vec<u32> {
        let bytes = command.encode();
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
    }

    #[test]
    fn a_read_has_its_fields_in_their_places() {
        let command = Command::io(Opcode::Read, 1, 0x1_0000_0002, 256)
            .with_memory(0xaaaa_0000_1000, 0xbbbb_0000_2000)
            .with_id(0x1234);
        let words = words(command);
        assert_eq!((words[0], words[1], command.id()), (0x1234_0002, 1, 0x1234));
        assert_eq!(words[6..10], [0x1000, 0xaaaa, 0x2000, 0xbbbb]);
        assert_eq!(words[10..16], [2, 1, 255, 0, 0, 0]);
    }

    #[test]
    fn the_largest_io_has_65536_blocks_and_write_through_says_so() {
        assert_eq!(words(Command::io(Opcode::WriteZeroes, 1, 0, 65536))[12], 0xffff);
        assert_eq!(words(Command::io(Opcode::WriteThrough, 1, 0, 1))[12], 1 << 30);
    }

    #[test]
    fn queues_are_made_with_sizes_counted_from_zero() {
        let completion = words(Command::create_completion_queue(QueueId(3), 64, Some(2)));
        assert_eq!((completion[0], completion[10], completion[11]), (5, 3 | 63 << 16, 3 | 2 << 16));
        assert_eq!(words(Command::create_completion_queue(QueueId(1), 64, None))[11], 1);
        let submission = words(Command::create_submission_queue(QueueId(3), 64));
        assert_eq!((submission[0], submission[10], submission[11]), (1, 3 | 63 << 16, 1 | 3 << 16));
        assert_eq!(words(Command::set_queue_count(4))[10..12], [7, 3 | 3 << 16]);
        assert_eq!(words(Command::abort(QueueId(2), 9))[10], 2 | 9 << 16);
    }
}
