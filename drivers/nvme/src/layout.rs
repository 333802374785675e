//! What lies where in the one memory that the controller and its driver share, and how a command names its pages.
//!
//! ```text
//!   page 0        state page            1..        one page for each queue: counters, commands in flight       (book.rs)
//!   identify, scratch, zeroes           then for each queue: submission ring, completion ring, a list page for each place
//! ```

use crate::protocol::QueueId;
use crate::protocol::command::COMMAND_BYTES;
use crate::protocol::completion::COMPLETION_BYTES;

/// A page, for the controller too.
pub const PAGE: u64 = 4096;
/// Most bytes of one command: a list page has 512 entries, and more than this makes nothing faster.
pub const PIECE_BYTES_MAX: u64 = 128 << 10;
/// Zeroes for controllers that cannot make them.
pub const ZEROES_BYTES: u64 = PIECE_BYTES_MAX;

/// See the module head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries of each queue.
    pub entries: u16,
    /// Pairs of I/O queues that there is room for.
    pub pairs: u16,
}

impl Layout {
    fn pages(bytes: u64) -> u64 {
        bytes.next_multiple_of(PAGE)
    }

    /// Counters and marks of a queue.
    pub fn queue_state(&self, queue: QueueId) -> u64 {
        PAGE * (1 + u64::from(queue.0))
    }

    /// Where identify pages come to.
    pub fn identify(&self) -> u64 {
        self.queue_state(QueueId(self.pairs + 1))
    }

    /// One page for the namespace's header.
    pub fn scratch(&self) -> u64 {
        self.identify() + PAGE
    }

    /// [`ZEROES_BYTES`] that nobody writes.
    pub fn zeroes(&self) -> u64 {
        self.scratch() + PAGE
    }

    fn submission_bytes(&self) -> u64 {
        Self::pages(u64::from(self.entries) * COMMAND_BYTES)
    }

    fn completion_bytes(&self) -> u64 {
        Self::pages(u64::from(self.entries) * COMPLETION_BYTES)
    }

    fn queue_bytes(&self) -> u64 {
        self.submission_bytes() + self.completion_bytes() + u64::from(self.entries) * PAGE
    }

    /// Submission ring.
    pub fn submission(&self, queue: QueueId) -> u64 {
        self.zeroes() + ZEROES_BYTES + u64::from(queue.0) * self.queue_bytes()
    }

    /// Completion ring.
    pub fn completion(&self, queue: QueueId) -> u64 {
        self.submission(queue) + self.submission_bytes()
    }

    /// Both rings, one behind the other: what is cleared before a queue is used.
    pub fn rings(&self, queue: QueueId) -> (u64, u64) {
        (self.submission(queue), self.submission_bytes() + self.completion_bytes())
    }

    /// List page of a place.
    pub fn list(&self, queue: QueueId, place: u16) -> u64 {
        self.completion(queue) + self.completion_bytes() + u64::from(place) * PAGE
    }

    /// All of it.
    pub fn len_bytes(&self) -> u64 {
        self.submission(QueueId(self.pairs + 1))
    }
}

/// How a command names memory that is contiguous for the device and begins at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// First word of the command.
    pub first: u64,
    /// Second word.
    pub second: u64,
    /// What has to be in the list page: this many addresses, beginning with this one, a page apart.
    pub list: Option<(u64, u64)>,
}

/// `list_page`: where this command's list page is for the device.
pub fn pages_of(iova: u64, bytes: u64, list_page: u64) -> Pages {
    match bytes.div_ceil(PAGE) {
        0 | 1 => Pages { first: iova, second: 0, list: None },
        2 => Pages { first: iova, second: iova + PAGE, list: None },
        count => Pages { first: iova, second: list_page, list: Some((iova + PAGE, count - 1)) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        for (entries, pairs) in [(64, 4), (4, 1), (128, 8), (33, 2)] {
            let layout = Layout { entries, pairs };
            let mut parts = vec![(0, PAGE), (layout.identify(), PAGE), (layout.scratch(), PAGE)];
            parts.push((layout.zeroes(), ZEROES_BYTES));
            for queue in (0..=pairs).map(QueueId) {
                parts.push((layout.queue_state(queue), PAGE));
                parts.push((layout.submission(queue), u64::from(entries) * COMMAND_BYTES));
                parts.push((layout.completion(queue), u64::from(entries) * COMPLETION_BYTES));
                parts.extend((0..entries).map(|place| (layout.list(queue, place), PAGE)));
            }
            parts.sort_unstable();
            assert!(parts.iter().all(|(start, _)| start.is_multiple_of(PAGE)));
            assert!(parts.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "{parts:?}");
            assert!(parts.last().is_some_and(|(start, len)| start + len <= layout.len_bytes()));
        }
    }

    #[test]
    fn one_two_and_many_pages() {
        assert_eq!(pages_of(0x10000, 512, 9), Pages { first: 0x10000, second: 0, list: None });
        assert_eq!(pages_of(0x10000, 4096, 9), Pages { first: 0x10000, second: 0, list: None });
        assert_eq!(pages_of(0x10000, 8192, 9), Pages { first: 0x10000, second: 0x11000, list: None });
        assert_eq!(
            pages_of(0x10000, 0x20000, 0x7000),
            Pages { first: 0x10000, second: 0x7000, list: Some((0x11000, 31)) }
        );
    }
}
