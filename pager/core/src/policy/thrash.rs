//! Thrashing: CPU and device take a block from each other again and again, and move data instead of using it.
//!
//! ```text
//!   Calm --- 3 turns, each within two lapses after the last ---> Throttled: a device fault waits one lapse
//!    ^                                                              |  10 waits
//!    |                                                              v
//!    +--- 300 lapses later, or 16 lapses of quiet ----------- Pinned: devices use the pages in place if they can
//! ```
//!
//! From the second turn on a device also has a timeslice: a CPU fault waits until the device has had the page for some time. That
//! is drm_gpusvm's remedy; without it a CPU that touches a page in a loop takes it away before the device's answer has arrived.
//!
//! Who hands a page over is not fighting for it: a job ends, the CPU reads what it has written, the next job begins. There every wait
//! would be for nothing. A page's use mark tells: taken away at a CPU fault and not set again soon, the device is done with the page, the
//! slice ends, and what would have been a throttled turn is only counted: who goes on like that has the page pinned as soon, since it moves
//! as often.
//!
//! The shape and the counts are those of NVIDIA's driver (hmm-semantics.md, section 3.4). The lapse is longer, because a turn costs
//! tens of microseconds here, and it is a device's own: one that takes 100 ms for a page is fought for at another pace.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};

use crate::event::{Pages, RegionId};

/// The lapse of a device that moves a page faster than this. A turn that begins within two lapses after the last one has ended belongs to
/// one fight.
const LAPSE_MIN_US: u64 = 2_000;
/// No device makes others wait for longer.
const LAPSE_MAX_US: u64 = 100_000;
/// A device that goes on using a page has marked it again after so long.
const STILL_USED_US: u64 = 100;
const TURNS_TO_THROTTLE: u8 = 6;
const THROTTLES_TO_PIN: u8 = 10;
const PINNED_LAPSES: u64 = 300;
const QUIET_LAPSES: u64 = 16;
const BLOCK_PAGES: u64 = 512;
/// Blocks remembered; those that are quiet make room for others.
const BLOCKS_MAX: usize = 4096;
/// Blocks looked at for that in one fault: however many there are, it costs the same.
const LOOKS: usize = 16;

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

/// What is known of the device's use of what it got last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Not used yet, or nobody can tell.
    Unknown,
    /// It was, and the mark was taken then.
    Until(u64),
    /// No more.
    Over,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    last: Direction,
    last_us: u64,
    /// What a page takes on its way, within limits: time that is spent moving is compared with time that is not.
    lapse_us: u64,
    device_use: Use,
    /// The device was done with it when the CPU took it last.
    handed_over: bool,
    /// And is taken for done the next time: every second turn is looked at.
    trusted: bool,
    turns: u8,
    throttles: u8,
    waits_until_us: u64,
    pinned_until_us: u64,
}

impl Block {
    fn is_quiet(&self, now_us: u64) -> bool {
        now_us.saturating_sub(self.last_us) > QUIET_LAPSES * self.lapse_us
    }
}

/// Blocks that moved lately.
#[derive(Debug)]
pub(super) struct Thrash {
    blocks: BTreeMap<(RegionId, u64), Block>,
    /// Where a search for quiet ones goes on.
    hand: (RegionId, u64),
}

impl Default for Thrash {
    fn default() -> Self {
        Self { blocks: BTreeMap::new(), hand: (RegionId(0), 0) }
    }
}

impl Thrash {
    pub fn moved(&mut self, region: RegionId, pages: Pages, direction: Direction, time_us: &Range<u64>) {
        let last = pages.end().saturating_sub(1) / BLOCK_PAGES;
        let each_us = time_us.end.saturating_sub(time_us.start) / pages.count.max(1);
        let lapse_us = each_us.clamp(LAPSE_MIN_US, LAPSE_MAX_US);
        for index in pages.first / BLOCK_PAGES..=last {
            self.block_moved((region, index), direction, time_us, lapse_us);
        }
    }

    fn block_moved(&mut self, key: (RegionId, u64), direction: Direction, time_us: &Range<u64>, lapse_us: u64) {
        let now_us = time_us.end;
        if self.blocks.len() >= BLOCKS_MAX && !self.blocks.contains_key(&key) && !self.forget_quiet(now_us) {
            return;
        }
        let fresh = Block {
            last: direction,
            last_us: now_us,
            lapse_us,
            device_use: Use::Unknown,
            handed_over: false,
            trusted: false,
            turns: 0,
            throttles: 0,
            waits_until_us: 0,
            pinned_until_us: 0,
        };
        let block = self.blocks.entry(key).or_insert(fresh);
        // What the device takes for a turn says nothing about how much the page is wanted.
        let pause_us = time_us.start.saturating_sub(block.last_us);
        let was_over = std::mem::replace(&mut block.device_use, Use::Unknown) == Use::Over;
        if direction == Direction::Home {
            (block.handed_over, block.trusted) = (was_over, was_over && !block.trusted);
        }
        if pause_us > QUIET_LAPSES * block.lapse_us {
            (block.turns, block.throttles) = (0, 0);
        } else if block.last != direction && pause_us <= 2 * block.lapse_us {
            block.turns = block.turns.saturating_add(1);
        }
        (block.last, block.last_us, block.lapse_us) = (direction, now_us, lapse_us);
    }

    /// Looks at some blocks, others each time, and forgets those that are quiet. Whether there were any.
    fn forget_quiet(&mut self, now_us: u64) -> bool {
        let after = self.blocks.range((Bound::Excluded(self.hand), Bound::Unbounded));
        let looked_at: Vec<_> = after.take(LOOKS).map(|(key, block)| (*key, block.is_quiet(now_us))).collect();
        self.hand = looked_at.get(LOOKS - 1).map_or((RegionId(0), 0), |(key, _)| *key);
        let quiet = looked_at.iter().filter(|(_, is_quiet)| *is_quiet);
        quiet.fold(false, |any, (key, _)| self.blocks.remove(key).is_some() || any)
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
        if block.turns < TURNS_TO_THROTTLE || block.is_quiet(now_us) {
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
            block.pinned_until_us = now_us + PINNED_LAPSES * block.lapse_us;
            return Verdict::Pinned;
        }
        block.throttles += 1;
        if block.handed_over {
            return Verdict::Calm;
        }
        block.waits_until_us = now_us + block.lapse_us;
        Verdict::Wait { until_us: block.waits_until_us }
    }

    /// In a fight a device keeps what it has got for three quarters of a lapse, several times what an answer takes to reach it: else it is
    /// taken away before it was used once. `take_used` tells whether it was, since it was asked last.
    pub fn cpu_waits_until_us(
        &mut self,
        region: RegionId,
        page: u64,
        now_us: u64,
        take_used: impl Fn() -> bool,
    ) -> Option<u64> {
        let block = self.blocks.get_mut(&(region, page / BLOCK_PAGES))?;
        let end_us = block.last_us + block.lapse_us * 3 / 4;
        if block.turns < 2 || block.last != Direction::Out || now_us >= end_us {
            return None;
        }
        if block.trusted {
            block.device_use = Use::Over;
        }
        match block.device_use {
            Use::Over => return None,
            Use::Until(at_us) if now_us < at_us + STILL_USED_US => return Some(end_us.min(at_us + STILL_USED_US)),
            Use::Unknown | Use::Until(_) if take_used() => block.device_use = Use::Until(now_us),
            Use::Unknown => return Some(end_us),
            Use::Until(_) => {
                block.device_use = Use::Over;
                return None;
            }
        }
        Some(end_us.min(now_us + STILL_USED_US))
    }

    /// The block was pinned and nobody has looked since it ended: that is decided at the next fault.
    pub fn is_pinned(&self, region: RegionId, page: u64) -> bool {
        self.blocks.get(&(region, page / BLOCK_PAGES)).is_some_and(|block| block.pinned_until_us != 0)
    }

    pub fn forget(&mut self, region: RegionId) {
        let mine: Vec<_> = self.blocks.range((region, 0)..=(region, u64::MAX)).map(|(key, _)| *key).collect();
        for key in mine {
            self.blocks.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_blocks_make_room_for_each_other_a_few_at_a_time() {
        let mut thrash = Thrash::default();
        let move_one = |thrash: &mut Thrash, block: u64, now_us: u64| {
            let page = Pages::one(block * BLOCK_PAGES);
            thrash.moved(RegionId(1), page, Direction::Home, &(now_us..now_us));
        };
        let blocks = BLOCKS_MAX as u64;
        (0..2 * blocks).for_each(|block| move_one(&mut thrash, block, 0));
        assert_eq!(thrash.blocks.len(), BLOCKS_MAX, "none was quiet");
        let later_us = 1_000_000;
        for block in 0..blocks {
            let before = thrash.blocks.len();
            move_one(&mut thrash, 10 * blocks + block, later_us);
            assert!(before - thrash.blocks.len().min(before) < LOOKS, "no more than its share is looked at");
        }
        let new = thrash.blocks.keys().filter(|(_, index)| *index >= 10 * blocks).count();
        assert!(new + LOOKS >= BLOCKS_MAX, "all that were quiet have made room: {new}");
    }
}
