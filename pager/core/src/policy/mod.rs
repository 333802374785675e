//! Policy: how much comes along with a fault, and what a device fault does. Mechanism asks, policy answers; nothing here
//! changes any state but its own.
//!
//! ```text
//!   streams.rs    walks in order bring more and more neighbours along
//!   thrash.rs     blocks that CPU and device take from each other: first slowed down, then left in place, then forgotten
//! ```
//!
//! What a client has advised ([`Attr`]) goes before everything that is guessed here:
//!
//! ```text
//!   device fault on a system page        no access -> refused (by the core)
//!                                        in place, pinned, a file -> in place (by the core)
//!                                        preferred in system memory, and reachable -> in place
//!                                        read-mostly, and only read -> copy
//!                                        thrashing -> wait, then in place if reachable
//!                                        else -> move
//!   CPU fault on a device page           granularity -> that block
//!                                        a huge page -> all of it
//!                                        sent away by who holds a program to a limit -> 64 KiB around it, or the stream's window
//!                                        else -> the stream's window
//! ```

mod streams;
mod thrash;

use std::collections::BTreeSet;
use std::ops::Range;

use crate::attr::Attr;
use crate::event::{DeviceId, Pages, RegionId, Target};
use streams::Streams;
use thrash::{Thrash, Verdict};

/// A device met a system page that it does not map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// Region.
    pub region: RegionId,
    /// Page.
    pub page: u64,
    /// Device.
    pub device: DeviceId,
    /// It wants to write.
    pub write: bool,
    /// What was advised.
    pub attr: Attr,
    /// The device could use the page where it is.
    pub in_place: bool,
    /// Clock.
    pub now_us: u64,
}

/// What a device fault on a system page does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFaultAction {
    /// The page moves to the device.
    Migrate,
    /// The device gets a copy to read, the system page stays.
    Copy,
    /// Later: the page was taken too often lately.
    Wait {
        /// When to ask again.
        until_us: u64,
    },
}

/// A CPU met a page that lives on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFault {
    /// Region.
    pub region: RegionId,
    /// Page.
    pub page: u64,
    /// What was advised.
    pub attr: Attr,
    /// The page is part of a huge page.
    pub huge: bool,
    /// First page whose address is a multiple of 2 MiB.
    pub huge_phase: u64,
}

/// The interface of every policy.
pub trait Policy {
    /// Which pages a CPU fault on a device page brings home; the faulting one is among them. The core cuts them to the region.
    fn cpu_fault(&mut self, fault: CpuFault) -> Pages;
    /// Until when a CPU fault on a device page waits: a device that has just got the page shall get to use it.
    /// `take_used` tells whether it has since this asked last, and is not asked for nothing.
    fn cpu_waits_until_us(
        &mut self,
        region: RegionId,
        page: u64,
        now_us: u64,
        take_used: impl Fn() -> bool,
    ) -> Option<u64>;
    /// How many pages, beginning with the faulting one, a first touch zeroes (at least 1).
    fn fault_around_zero(&mut self, region: RegionId, page: u64) -> u64;
    /// What a device fault on a system page does.
    fn device_fault(&mut self, fault: DeviceFault) -> DeviceFaultAction;
    /// Whether a system page that devices could use in place shall stay.
    fn keeps_in_place(&self, region: RegionId, page: u64, attr: Attr) -> bool;
    /// Pages have arrived on a device, after having been under way from the first time to the second one.
    fn moved_out(&mut self, region: RegionId, pages: Pages, device: DeviceId, time_us: Range<u64>);
    /// Pages have come home.
    fn moved_home(&mut self, region: RegionId, pages: Pages, device: DeviceId, time_us: Range<u64>);
    /// Pages of it leave because somebody holds the program to a limit, not because a device wants them: they come home again by the
    /// program's faults, and neighbours that have left together are used together.
    fn is_held_to_a_limit(&mut self, _region: RegionId) {}
    /// A region ended: forget it.
    fn region_gone(&mut self, region: RegionId);
}

/// Most pages that one CPU fault brings home (256 KiB: 1.6 us a page against 8.6 for one, paging-floors.md section 3).
const HOME_PAGES_MAX: u64 = 64;
/// What comes home at least with a fault in memory that is held to a limit (64 KiB): a page alone costs nearly as much from a disk, and loses
/// to the kernel's swap, whose readahead brings as much.
const LIMITED_PAGES: u64 = 16;
/// Most pages that one first touch zeroes (2 MiB).
const ZERO_PAGES_MAX: u64 = 512;
const HUGE_PAGES: u64 = 512;

/// The built-in policy.
#[derive(Debug, Default)]
pub struct DefaultPolicy {
    home: Streams,
    zero: Streams,
    thrash: Thrash,
    /// Regions that are held to a limit.
    limited: BTreeSet<RegionId>,
}

/// The aligned block of `size` pages that holds `page`, where page `phase` begins a block.
fn block(page: u64, size: u64, phase: u64) -> Pages {
    let into = (page + size - phase % size) % size;
    let first = page.saturating_sub(into);
    Pages { first, count: size - into + (page - first) }
}

impl Policy for DefaultPolicy {
    fn cpu_fault(&mut self, fault: CpuFault) -> Pages {
        let CpuFault { region, page, attr, huge, huge_phase } = fault;
        if let Some(log2) = attr.granularity_log2_pages() {
            // Larger than any region: all of it.
            return block(page, 1 << log2.min(40), huge_phase);
        }
        if huge {
            return block(page, HUGE_PAGES, huge_phase);
        }
        let window = Pages { first: page, count: self.home.window(region, page, HOME_PAGES_MAX) };
        if window.count >= LIMITED_PAGES || !self.limited.contains(&region) {
            return window;
        }
        let block = block(page, LIMITED_PAGES, huge_phase);
        self.home.goes_on_behind(region, window.end(), block);
        block
    }

    fn cpu_waits_until_us(
        &mut self,
        region: RegionId,
        page: u64,
        now_us: u64,
        take_used: impl Fn() -> bool,
    ) -> Option<u64> {
        self.thrash.cpu_waits_until_us(region, page, now_us, take_used)
    }

    fn fault_around_zero(&mut self, region: RegionId, page: u64) -> u64 {
        self.zero.window(region, page, ZERO_PAGES_MAX)
    }

    fn device_fault(&mut self, fault: DeviceFault) -> DeviceFaultAction {
        if fault.attr.read_mostly() && !fault.write {
            return DeviceFaultAction::Copy;
        }
        match self.thrash.verdict(fault.region, fault.page, fault.now_us) {
            Verdict::Wait { until_us } => DeviceFaultAction::Wait { until_us },
            Verdict::Calm | Verdict::Pinned => DeviceFaultAction::Migrate,
        }
    }

    fn keeps_in_place(&self, region: RegionId, page: u64, attr: Attr) -> bool {
        attr.preferred() == Some(Target::Home) || self.thrash.is_pinned(region, page)
    }

    fn moved_out(&mut self, region: RegionId, pages: Pages, _device: DeviceId, time_us: Range<u64>) {
        self.thrash.moved(region, pages, thrash::Direction::Out, &time_us);
    }

    fn moved_home(&mut self, region: RegionId, pages: Pages, _device: DeviceId, time_us: Range<u64>) {
        self.thrash.moved(region, pages, thrash::Direction::Home, &time_us);
    }

    fn is_held_to_a_limit(&mut self, region: RegionId) {
        self.limited.insert(region);
    }

    fn region_gone(&mut self, region: RegionId) {
        self.limited.remove(&region);
        self.home.forget(region);
        self.zero.forget(region);
        self.thrash.forget(region);
    }
}

#[cfg(test)]
mod tests;
