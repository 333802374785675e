//! Completion queue entries.

use std::fmt;

/// Bytes of an entry.
pub const COMPLETION_BYTES: u64 = 16;

/// How a command ended; 15 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

impl Status {
    /// Well.
    pub const OK: Self = Self(0);
    /// Asked by an abort.
    pub const ABORTED: Self = Self(0x07);

    /// It ended well.
    pub fn is_ok(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// Because of an abort.
    pub fn is_aborted(self) -> bool {
        self.0 & 0x7ff == Self::ABORTED.0
    }

    /// The device says that the same command will fail again.
    pub fn is_final(self) -> bool {
        self.0 >> 14 & 1 != 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, code) = (self.0 >> 8 & 7, self.0 & 0xff);
        let meaning = match (kind, code) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field",
            (0, 0x04) => "data transfer error",
            (0, 0x05) => "power loss",
            (0, 0x06) => "internal error",
            (0, 0x07) => "aborted on request",
            (0, 0x0b) => "invalid namespace or format",
            (0, 0x13) => "invalid PRP offset",
            (0, 0x80) => "LBA out of range",
            (0, 0x81) => "capacity exceeded",
            (0, 0x82) => "namespace not ready",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x86) => "access denied",
            (2, _) => "media error",
            _ => "error",
        };
        write!(f, "{meaning} (type {kind}, code {code:#04x}{})", if self.is_final() { ", final" } else { "" })
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Command specific.
    pub result: u32,
    /// How far the device has fetched commands.
    pub submission_head: u16,
    /// Whose command.
    pub submission_queue: u16,
    /// Its id.
    pub id: u16,
    /// Changes with each round through the queue.
    pub phase: bool,
    /// How it ended.
    pub status: Status,
}

impl Completion {
    /// From the queue, as two words; the second holds the phase and is loaded first.
    pub fn decode(low: u64, high: u64) -> Self {
        Self {
            result: low as u32,
            submission_head: high as u16,
            submission_queue: (high >> 16) as u16,
            id: (high >> 32) as u16,
            phase: high >> 48 & 1 != 0,
            status: Status((high >> 49) as u16),
        }
    }

    /// The phase alone, from the second word.
    pub fn phase_of(high: u64) -> bool {
        high >> 48 & 1 != 0
    }

    /// Answer to [`crate::protocol::Command::set_queue_count`].
    pub fn queue_pairs_granted(&self) -> u32 {
        (self.result & 0xffff).min(self.result >> 16) + 1
    }

    /// Answer to an abort: the command ended, or will.
    pub fn was_aborted(&self) -> bool {
        self.result & 1 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_taken_apart() {
        let high = 17 | 3 << 16 | 0xabcd << 32 | 1 << 48 | (0x281_u64 | 1 << 14) << 49;
        let entry = Completion::decode(5 | 9 << 16, high);
        assert_eq!((entry.submission_head, entry.submission_queue, entry.id, entry.phase), (17, 3, 0xabcd, true));
        assert!(entry.status.is_final() && !entry.status.is_ok() && !entry.status.is_aborted());
        assert_eq!(entry.status.to_string(), "unrecovered read error (type 2, code 0x81, final)");
        assert_eq!(entry.queue_pairs_granted(), 6);
        assert!(Completion::phase_of(high) && Status(0).is_ok() && Status(7).is_aborted());
    }
}
