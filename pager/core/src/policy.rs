//! Policy: how much comes along with a fault, and what a device fault does. Mechanism asks, policy answers; nothing here
//! changes any state but its own.

use crate::event::{Pages, RegionId};

/// What a device fault on a system page does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFaultAction {
    /// The page moves to the device.
    Migrate,
    /// The device maps the system page.
    MapInPlace,
}

/// The interface of every policy.
pub trait Policy {
    /// How many pages, beginning with the faulting one, a CPU fault on a device page brings home (at least 1).
    fn fault_around_home(&mut self, region: RegionId, page: u64) -> u64;
    /// How many pages, beginning with the faulting one, a first touch zeroes (at least 1).
    fn fault_around_zero(&mut self, region: RegionId, page: u64) -> u64;
    /// What a device fault on system pages does.
    fn device_fault(&mut self, region: RegionId, pages: Pages, advised_in_place: bool) -> DeviceFaultAction;
    /// A region ended: forget it.
    fn region_gone(&mut self, region: RegionId);
}

/// Most pages that one CPU fault brings home (256 KiB: 1.6 us a page against 8.6 for one, paging-floors.md section 3).
const HOME_PAGES_MAX: u64 = 64;
/// Most pages that one first touch zeroes (2 MiB).
const ZERO_PAGES_MAX: u64 = 512;

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

/// Adaptive fault-around: a few streams a kind, because several threads walk at once.
#[derive(Debug, Default)]
struct Streams {
    streams: Vec<Stream>,
    next_victim: usize,
}

const STREAMS_MAX: usize = 16;

impl Streams {
    fn window(&mut self, region: RegionId, page: u64, max: u64) -> u64 {
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
}

/// The built-in policy.
#[derive(Debug, Default)]
pub struct DefaultPolicy {
    home: Streams,
    zero: Streams,
}

impl Policy for DefaultPolicy {
    fn fault_around_home(&mut self, region: RegionId, page: u64) -> u64 {
        self.home.window(region, page, HOME_PAGES_MAX)
    }

    fn fault_around_zero(&mut self, region: RegionId, page: u64) -> u64 {
        self.zero.window(region, page, ZERO_PAGES_MAX)
    }

    fn device_fault(&mut self, _region: RegionId, _pages: Pages, advised_in_place: bool) -> DeviceFaultAction {
        if advised_in_place { DeviceFaultAction::MapInPlace } else { DeviceFaultAction::Migrate }
    }

    fn region_gone(&mut self, region: RegionId) {
        self.home.streams.retain(|stream| stream.region != region);
        self.zero.streams.retain(|stream| stream.region != region);
        self.home.next_victim = 0;
        self.zero.next_victim = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_walk_doubles_and_a_jump_starts_again() {
        let mut policy = DefaultPolicy::default();
        let mut page = 100;
        let mut windows = Vec::new();
        for _ in 0..9 {
            let window = policy.fault_around_home(RegionId(1), page);
            windows.push(window);
            page += window;
        }
        assert_eq!(windows, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(policy.fault_around_home(RegionId(1), 5), 1);
        assert_eq!(policy.fault_around_home(RegionId(2), page), 1, "another region is another stream");
    }

    #[test]
    fn interleaved_streams_do_not_disturb_each_other() {
        let mut policy = DefaultPolicy::default();
        let (mut a, mut b) = (0, 10_000);
        for _ in 0..5 {
            a += policy.fault_around_zero(RegionId(1), a);
            b += policy.fault_around_zero(RegionId(1), b);
        }
        assert_eq!((a, b), (31, 10_031));
    }
}
