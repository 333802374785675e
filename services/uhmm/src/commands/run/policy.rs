//! What shall leave when a program is over its limit: a policy says so block by block, and is never trusted.
//!
//! [`Limit`](super::limit::Limit) walks over the program's resident memory, asks the policy about each block, and does what it says as far as
//! that makes sense: it decides itself how much must leave, and a policy that keeps everything is overruled in the next lap. Whatever a policy
//! answers, the pager checks each move like any other: the worst one costs time and never a byte.

use std::collections::HashMap;

/// Bytes of a block: a fault of 64 KiB from a disk costs little more than one of 4 KiB.
pub const BLOCK_BYTES: u64 = 64 << 10;

/// Which block of which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Process id.
    pub pid: u32,
    /// First address, a multiple of [`BLOCK_BYTES`].
    pub addr: u64,
}

/// What a policy is told of a block that has pages in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Which.
    pub place: Place,
    /// How many of its pages are in memory.
    pub resident_pages: u64,
    /// It had been sent away, and the program has touched it since then, and nobody has been told so yet.
    pub came_back: bool,
}

/// What shall become of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Send,
    /// It stays for this lap.
    Keep,
}

/// Chooses victims. One a limit; called from one thread.
pub trait Policy {
    /// Shall this block leave? Called in order of addresses, from where the last answer was, round and round.
    fn judge(&mut self, block: &Block) -> Verdict;

    /// The process has ended: what is remembered of it is of no use.
    fn ended(&mut self, pid: u32);
}

/// Round and round, and what came back since it was sent stays for so many laps more, doubled each time up to eight: what a program uses all the
/// time comes back soon after it has left, and soon is left alone.
#[derive(Debug, Default)]
pub struct Clock {
    /// Laps that a block stays for yet, and how many it was given the last time.
    earned: HashMap<Place, (u8, u8)>,
}

/// Laps a block is left alone for at most.
const LAPS_MAX: u8 = 8;

impl Policy for Clock {
    fn judge(&mut self, block: &Block) -> Verdict {
        if block.came_back {
            let (left, given) = self.earned.entry(block.place).or_default();
            *given = (*given * 2).clamp(1, LAPS_MAX);
            *left = *given;
        }
        match self.earned.get_mut(&block.place) {
            Some((left, _)) if *left > 0 => {
                *left -= 1;
                Verdict::Keep
            }
            _ => Verdict::Send,
        }
    }

    fn ended(&mut self, pid: u32) {
        self.earned.retain(|place, _| place.pid != pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(came_back: bool) -> Block {
        Block { place: Place { pid: 1, addr: 0 }, resident_pages: 16, came_back }
    }

    #[test]
    fn what_was_never_away_leaves_at_once() {
        assert_eq!(Clock::default().judge(&block(false)), Verdict::Send);
    }

    #[test]
    fn what_comes_back_again_and_again_stays_longer_each_time() {
        let mut clock = Clock::default();
        for laps in [1, 2, 4, 8, 8] {
            let mut kept = 1;
            assert_eq!(clock.judge(&block(true)), Verdict::Keep);
            while clock.judge(&block(false)) == Verdict::Keep {
                kept += 1;
            }
            assert_eq!(kept, laps);
        }
        clock.ended(1);
        assert!(clock.earned.is_empty());
    }
}
