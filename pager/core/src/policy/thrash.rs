//! Thrashing: CPU and device take a block from each other again and again, and move data instead of using it.
//!
//! ```text
//!   Calm --- 3 turns within a lapse of each other ---> Throttled: a device fault waits one lapse
//!    ^                                                    |  10 waits
//!    |                                                    v
//!    +--- 300 lapses later, or 16 lapses of quiet --- Pinned: devices use the pages in place if they can
//! ```
//!
//! From the second turn on a device also has a timeslice: a CPU fault waits until the device has had the page for some time. That
//! is drm_gpusvm's remedy; without it a CPU that touches a page in a loop takes it away before the device's answer has arrived.
//!
//! The shape and the counts are those of NVIDIA's driver (hmm-semantics.md, section 3.4); the lapse is longer, because a turn costs
//! tens of microseconds here.

use std::collections::HashMap;

use crate::event::{Pages, RegionId};

/// Two turns closer than this are one fight.
const LAPSE_US: u64 = 2_000;
/// How long a device keeps pages that the CPU fights it for: several times what an answer takes to reach the device.
const TIMESLICE_US: u64 = 1_500;
const TURNS_TO_THROTTLE: u8 = 6;
const THROTTLES_TO_PIN: u8 = 10;
const PINNED_LAPSES: u64 = 300;
const QUIET_LAPSES: u64 = 16;
const BLOCK_PAGES: u64 = 512;
/// Blocks remembered; the oldest ones are forgotten first.
const BLOCKS_MAX: usize = 4096;

/// Which way pages went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Out,
    Home,
}

/// What a device fault shall do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Calm,
    Wait { until_us: u64 },
    Pinned,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    last: Direction,
    last_us: u64,
    turns: u8,
    throttles: u8,
    waits_until_us: u64,
    pinned_until_us: u64,
}

/// Blocks that moved lately.
#[derive(Debug, Default)]
pub(super) struct Thrash {
    blocks: HashMap<(RegionId, u64), Block>,
}

impl Thrash {
    pub fn moved(&mut self, region: RegionId, pages: Pages, direction: Direction, now_us: u64) {
        let last = pages.end().saturating_sub(1) / BLOCK_PAGES;
        for index in pages.first / BLOCK_PAGES..=last {
            self.block_moved((region, index), direction, now_us);
        }
    }

    fn block_moved(&mut self, key: (RegionId, u64), direction: Direction, now_us: u64) {
        if self.blocks.len() >= BLOCKS_MAX && !self.blocks.contains_key(&key) {
            self.blocks.retain(|_, block| now_us.saturating_sub(block.last_us) < QUIET_LAPSES * LAPSE_US);
        }
        if self.blocks.len() >= BLOCKS_MAX && !self.blocks.contains_key(&key) {
            return;
        }
        let fresh =
            Block { last: direction, last_us: now_us, turns: 0, throttles: 0, waits_until_us: 0, pinned_until_us: 0 };
        let block = self.blocks.entry(key).or_insert(fresh);
        let pause_us = now_us.saturating_sub(block.last_us);
        if pause_us > QUIET_LAPSES * LAPSE_US {
            (block.turns, block.throttles) = (0, 0);
        } else if block.last != direction && pause_us <= 2 * LAPSE_US {
            block.turns = block.turns.saturating_add(1);
        }
        (block.last, block.last_us) = (direction, now_us);
    }

    /// A device wants a page of the block.
    pub fn verdict(&mut self, region: RegionId, page: u64, now_us: u64) -> Verdict {
        let Some(block) = self.blocks.get_mut(&(region, page / BLOCK_PAGES)) else { return Verdict::Calm };
        if block.pinned_until_us > now_us {
            return Verdict::Pinned;
        }
        if block.pinned_until_us != 0 {
            self.blocks.remove(&(region, page / BLOCK_PAGES));
            return Verdict::Calm;
        }
        let quiet = now_us.saturating_sub(block.last_us) > QUIET_LAPSES * LAPSE_US;
        if block.turns < TURNS_TO_THROTTLE || quiet {
            return Verdict::Calm;
        }
        if block.waits_until_us > now_us {
            return Verdict::Wait { until_us: block.waits_until_us };
        }
        if block.waits_until_us != 0 {
            // It has waited: this time it may go, the next time it waits again.
            block.waits_until_us = 0;
            return Verdict::Calm;
        }
        if block.throttles >= THROTTLES_TO_PIN {
            block.pinned_until_us = now_us + PINNED_LAPSES * LAPSE_US;
            return Verdict::Pinned;
        }
        block.throttles += 1;
        block.waits_until_us = now_us + LAPSE_US;
        Verdict::Wait { until_us: block.waits_until_us }
    }

    /// In a fight a device keeps what it has got for a while: else it is taken away before it was used once.
    pub fn timeslice_end_us(&self, region: RegionId, page: u64, now_us: u64) -> Option<u64> {
        let block = self.blocks.get(&(region, page / BLOCK_PAGES))?;
        let end_us = block.last_us + TIMESLICE_US;
        (block.turns >= 2 && block.last == Direction::Out && now_us < end_us).then_some(end_us)
    }

    /// The block was pinned and nobody has looked since it ended: that is decided at the next fault.
    pub fn is_pinned(&self, region: RegionId, page: u64) -> bool {
        self.blocks.get(&(region, page / BLOCK_PAGES)).is_some_and(|block| block.pinned_until_us != 0)
    }

    pub fn forget(&mut self, region: RegionId) {
        self.blocks.retain(|(of, _), _| *of != region);
    }
}
