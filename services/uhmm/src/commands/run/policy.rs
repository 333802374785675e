//! What shall leave when a program is over its limit: a policy says so block by block, and is never trusted.
//!
//! [`Limit`](super::limit::Limit) walks over the program's resident memory, asks the policy about each block, and does what it says as far as
//! that makes sense: it decides itself how much must leave, cuts every answer to what there is, and a policy that keeps everything is overruled in the
//! next lap. Whatever a policy answers, the pager checks each move like any other: the worst one costs time and never a byte.

use std::collections::HashMap;
use std::time::Duration;

use uhmm_kernel_hook::AddrRange;

/// Bytes of a block: a fault of 64 KiB from a disk costs little more than one of 4 KiB.
pub const BLOCK_BYTES: u64 = 64 << 10;
/// The largest piece of memory that rests as one, and as large as a huge page.
pub const PIECE_BYTES: u64 = 2 << 20;

/// What is asked of the pager at once.
pub const MOVE_BYTES: u64 = 4 << 20;

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
    /// Since the last touch that anybody has noticed; `None`: none was.
    pub age: Option<Duration>,
}

/// What shall become of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Send {
        /// What it leaves with, as one piece, if that shall leave too.
        range: AddrRange,
        /// Only if nobody touches it for so long, see `pager/service/src/rest.rs`. `None`: at once.
        rest: Option<Duration>,
    },
    /// It stays for this lap.
    Keep,
}

/// Chooses victims. One a limit; called from one thread.
pub trait Policy {
    /// Shall this block leave? Called in order of addresses, from where the last answer was, round and round.
    fn judge(&mut self, block: &Block) -> Verdict;

    /// The program has touched what was resting on its way out, so it stays.
    fn touched(&mut self, pid: u32, range: AddrRange);

    /// The process has ended: what is remembered of it is of no use.
    fn ended(&mut self, pid: u32);
}

/// The aligned piece of so many bytes that an address lies in.
pub fn piece_at(addr: u64, len: u64) -> AddrRange {
    AddrRange { start: addr - addr % len, len }
}

/// Laps that blocks are left alone for.
#[derive(Debug)]
struct Earned {
    /// Laps that a block stays for yet, and how many it was given the last time.
    laps: HashMap<Place, (u8, u8)>,
    most: u8,
}

impl Earned {
    fn new(most: u8) -> Self {
        Self { laps: HashMap::new(), most }
    }

    /// It was used: twice as many laps as the last time.
    fn used(&mut self, place: Place) {
        let (left, given) = self.laps.entry(place).or_default();
        *given = given.saturating_mul(2).clamp(1, self.most);
        *left = *given;
    }

    /// Whether it stays for this lap.
    fn stays(&mut self, place: Place) -> bool {
        match self.laps.get_mut(&place) {
            Some((left, _)) if *left > 0 => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

/// Round and round, and what came back since it was sent stays for so many laps more, doubled each time up to eight: what a program uses all the
/// time comes back soon after it has left, and soon is left alone.
#[derive(Debug)]
pub struct Clock(Earned);

/// Laps a block is left alone for at most, where nobody says otherwise.
pub const LAPS_MAX: u8 = 8;

impl Clock {
    pub fn new(laps_max: u8) -> Self {
        Self(Earned::new(laps_max))
    }
}

impl Policy for Clock {
    fn judge(&mut self, block: &Block) -> Verdict {
        if block.came_back {
            self.0.used(block.place);
        }
        if self.0.stays(block.place) {
            return Verdict::Keep;
        }
        Verdict::Send { range: piece_at(block.place.addr, MOVE_BYTES), rest: None }
    }

    fn touched(&mut self, _pid: u32, _range: AddrRange) {}

    fn ended(&mut self, pid: u32) {
        self.0.laps.retain(|place, _| place.pid != pid);
    }
}

/// As [`Clock`], but nothing goes that was not left alone for a while: pieces of up to 2 MiB rest out of the program's reach, and what it touches then
/// it has back at once and stays, as what came back from the device does. A piece that was touched is tried in halves the next time, down to a block: what is
/// used all over is left alone, and what is used in places is left alone in those.
#[derive(Debug)]
pub struct Aged {
    earned: Earned,
    rest: Duration,
    min_age: Duration,
    /// How often the pieces of 2 MiB that begin there were halved.
    halved: HashMap<Place, u8>,
}

const HALVED_MAX: u8 = (PIECE_BYTES / BLOCK_BYTES).trailing_zeros() as u8;

impl Aged {
    /// `rest`: so long nobody touches what leaves; `min_age`: what was touched later than that is not tried.
    pub fn new(rest: Duration, min_age: Duration, laps_max: u8) -> Self {
        Self { earned: Earned::new(laps_max), rest, min_age, halved: HashMap::new() }
    }

    fn whole(place: Place) -> Place {
        Place { addr: place.addr - place.addr % PIECE_BYTES, ..place }
    }
}

impl Policy for Aged {
    fn judge(&mut self, block: &Block) -> Verdict {
        if block.came_back {
            self.earned.used(block.place);
        }
        let young = block.age.is_some_and(|age| age < self.min_age);
        if self.earned.stays(block.place) || young {
            return Verdict::Keep;
        }
        let halved = self.halved.get(&Self::whole(block.place)).copied().unwrap_or(0);
        Verdict::Send { range: piece_at(block.place.addr, PIECE_BYTES >> halved), rest: Some(self.rest) }
    }

    fn touched(&mut self, pid: u32, range: AddrRange) {
        let halved = self.halved.entry(Self::whole(Place { pid, addr: range.start })).or_default();
        let finest = *halved == HALVED_MAX;
        *halved = (*halved + 1).min(HALVED_MAX);
        for addr in (range.start..range.end()).step_by(BLOCK_BYTES as usize) {
            let place = Place { pid, addr };
            self.earned.used(place);
            // Who of a larger piece it was is not known: all are asked again soon.
            if !finest && let Some((left, given)) = self.earned.laps.get_mut(&place) {
                (*left, *given) = (1, 1);
            }
        }
    }

    fn ended(&mut self, pid: u32) {
        self.earned.laps.retain(|place, _| place.pid != pid);
        self.halved.retain(|place, _| place.pid != pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(addr: u64, came_back: bool) -> Block {
        Block { place: Place { pid: 1, addr }, resident_pages: 16, came_back, age: None }
    }

    fn sends(start: u64, len: u64, rest: Option<Duration>) -> Verdict {
        Verdict::Send { range: AddrRange { start, len }, rest }
    }

    #[test]
    fn what_was_never_away_leaves_at_once() {
        assert_eq!(Clock::new(LAPS_MAX).judge(&block(0, false)), sends(0, MOVE_BYTES, None));
    }

    #[test]
    fn what_comes_back_again_and_again_stays_longer_each_time() {
        let mut clock = Clock::new(LAPS_MAX);
        for laps in [1, 2, 4, 8, 8] {
            let mut kept = 1;
            assert_eq!(clock.judge(&block(0, true)), Verdict::Keep);
            while clock.judge(&block(0, false)) == Verdict::Keep {
                kept += 1;
            }
            assert_eq!(kept, laps);
        }
        clock.ended(1);
        assert!(clock.0.laps.is_empty());
    }

    fn aged() -> Aged {
        Aged::new(Duration::from_millis(50), Duration::from_millis(200), LAPS_MAX)
    }

    #[test]
    fn what_is_touched_while_it_rests_is_tried_in_halves_until_it_is_a_block() {
        let rest = Some(Duration::from_millis(50));
        let mut aged = aged();
        for len in [PIECE_BYTES, 1 << 20, 512 << 10, 256 << 10, 128 << 10, BLOCK_BYTES, BLOCK_BYTES] {
            let Verdict::Send { range, .. } = aged.judge(&block(PIECE_BYTES, false)) else { panic!("kept") };
            assert_eq!(Verdict::Send { range, rest }, sends(PIECE_BYTES, len, rest));
            aged.touched(1, range);
            let mut kept = 0;
            while aged.judge(&block(PIECE_BYTES, false)) == Verdict::Keep {
                kept += 1;
            }
            assert!((1..=4).contains(&kept), "{kept} laps");
        }
        // Its neighbour was not touched since, and is asked as a block, too.
        let neighbour = 2 * PIECE_BYTES - BLOCK_BYTES;
        assert_eq!(aged.judge(&block(neighbour, false)), Verdict::Keep);
        assert_eq!(aged.judge(&block(neighbour, false)), sends(neighbour, BLOCK_BYTES, rest));
        aged.ended(1);
        assert!(aged.earned.laps.is_empty() && aged.halved.is_empty());
    }

    #[test]
    fn a_piece_begins_and_ends_where_pieces_end_and_what_is_young_stays() {
        let mut aged = aged();
        let rest = Some(Duration::from_millis(50));
        assert_eq!(aged.judge(&block(PIECE_BYTES + BLOCK_BYTES, false)), sends(PIECE_BYTES, PIECE_BYTES, rest));
        let young = Block { age: Some(Duration::from_millis(199)), ..block(0, false) };
        assert_eq!(aged.judge(&young), Verdict::Keep);
    }

    #[test]
    fn what_came_back_from_the_device_stays_for_laps_too() {
        let mut aged = aged();
        assert_eq!(aged.judge(&block(0, true)), Verdict::Keep);
        assert!(matches!(aged.judge(&block(0, false)), Verdict::Send { .. }));
    }
}
