//! Fault-around that adapts: a walk in order doubles its window with every fault, a jump falls back to one page. Several threads
//! walk at once, so a few streams of each kind are remembered.

use crate::event::{Pages, RegionId};

#[derive(Clone, Copy, Debug)]
struct Stream {
    region: RegionId,
    /// Page that the next fault of a sequential walk meets.
    expected: u64,
    window: u64,
}

impl Stream {
    /// Doubles the window on a sequential fault, falls back to one page on any other.
    fn next_window(&mut self, page: u64, max: u64) -> u64 {
        self.window = if page == self.expected { (self.window * 2).min(max) } else { 1 };
        self.expected = page + self.window;
        self.window
    }
}

/// Adaptive fault-around of one kind.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    next_victim: usize,
}

const STREAMS_MAX: usize = 16;

impl Streams {
    pub fn window(&mut self, region: RegionId, page: u64, max: u64) -> u64 {
        let known = self.streams.iter_mut().find(|stream| stream.region == region && stream.expected == page);
        if let Some(stream) = known {
            return stream.next_window(page, max);
        }
        let stream = Stream { region, expected: page + 1, window: 1 };
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(stream);
        } else {
            self.streams[self.next_victim] = stream;
            self.next_victim = (self.next_victim + 1) % STREAMS_MAX;
        }
        1
    }

    /// Of the stream that expects this page: all of the block comes, so a walk in order meets the page behind it.
    pub fn goes_on_behind(&mut self, region: RegionId, expected: u64, block: Pages) {
        let known = self.streams.iter_mut().find(|stream| stream.region == region && stream.expected == expected);
        if let Some(stream) = known {
            (stream.expected, stream.window) = (block.end(), block.count);
        }
    }

    /// A region ended.
    pub fn forget(&mut self, region: RegionId) {
        self.streams.retain(|stream| stream.region != region);
        self.next_victim = 0;
    }
}
