//! What is known of each frame of a device, in words that are zero as long as nothing is known: a table of a terabyte is made in no time, and
//! takes memory only where frames were used.
//!
//! ```text
//!   words 0, 1   region and page of the owner
//!   word 2       the client whose bytes it holds
//!   word 3       bit 0 owned, bit 1 used lately, bits 2-3 what it holds (0: as the table began), bits 16-31 who pays
//! ```

use crate::event::{RegionId, SpaceId};
use crate::frames::Owner;

const OWNED: u64 = 1;
const REFERENCED: u64 = 1 << 1;
const HOLDER_SHIFT: u32 = 2;
const HOLDER_MASK: u64 = 3;
const GROUP_SHIFT: u32 = 16;

const AS_BEGUN: u64 = 0;
const CLEAN: u64 = 1;
const UNKNOWN: u64 = 2;
const SPACE: u64 = 3;

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub owner: Option<Owner>,
    /// Whose bytes it may still hold while free.
    pub last_space: Holder,
    /// Used lately: the clock passes once.
    pub referenced: bool,
    /// Who pays for it while it is owned; 0: nobody.
    pub group: u16,
}

/// Whose bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Holder {
    /// Scrubbed.
    Clean,
    /// Not known (after a pager's restart).
    Unknown,
    Space(SpaceId),
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct Slots {
    words: Vec<[u64; 4]>,
    /// What frames hold that nobody has had.
    begun: Holder,
}

impl Slots {
    /// All free, and they hold `begun`.
    pub fn new(count: u32, begun: Holder) -> Self {
        // Zeroes come from the kernel page by page, when they are looked at.
        Self { words: vec![[0; 4]; count as usize], begun }
    }

    pub fn count(&self) -> u32 {
        self.words.len() as u32
    }

    /// `None`: there is no such frame.
    pub fn get(&self, frame: u32) -> Option<Frame> {
        let [region, page, space, bits] = *self.words.get(frame as usize)?;
        let last_space = match bits >> HOLDER_SHIFT & HOLDER_MASK {
            AS_BEGUN => self.begun,
            CLEAN => Holder::Clean,
            UNKNOWN => Holder::Unknown,
            _ => Holder::Space(SpaceId(space)),
        };
        Some(Frame {
            owner: (bits & OWNED != 0).then_some(Owner { region: RegionId(region), page }),
            last_space,
            referenced: bits & REFERENCED != 0,
            group: (bits >> GROUP_SHIFT) as u16,
        })
    }

    /// Of a frame that there is.
    pub fn at(&self, frame: u32) -> Frame {
        self.get(frame).unwrap_or(Frame { owner: None, last_space: self.begun, referenced: false, group: 0 })
    }

    pub fn owner(&self, frame: u32) -> Option<Owner> {
        let [region, page, _, bits] = *self.words.get(frame as usize)?;
        (bits & OWNED != 0).then_some(Owner { region: RegionId(region), page })
    }

    pub fn set(&mut self, frame: u32, to: Frame) {
        let Some(words) = self.words.get_mut(frame as usize) else { return };
        let (region, page) = to.owner.map_or((0, 0), |owner| (owner.region.0, owner.page));
        let (holder, space) = match to.last_space {
            Holder::Clean => (CLEAN, 0),
            Holder::Unknown => (UNKNOWN, 0),
            Holder::Space(space) => (SPACE, space.0),
        };
        let owned = if to.owner.is_some() { OWNED } else { 0 };
        let referenced = if to.referenced { REFERENCED } else { 0 };
        let bits = owned | referenced | holder << HOLDER_SHIFT | u64::from(to.group) << GROUP_SHIFT;
        *words = [region, page, space, bits];
    }

    /// Changes a frame; gives what `change` gives.
    pub fn change<T>(&mut self, frame: u32, change: impl FnOnce(&mut Frame) -> T) -> T {
        let mut changed = self.at(frame);
        let answer = change(&mut changed);
        self.set(frame, changed);
        answer
    }

    /// Takes the mark that it was used lately.
    pub fn take_referenced(&mut self, frame: u32) -> bool {
        let Some([.., bits]) = self.words.get_mut(frame as usize) else { return false };
        let was = *bits & REFERENCED != 0;
        *bits &= !REFERENCED;
        was
    }

    /// Marks it as used lately.
    pub fn reference(&mut self, frame: u32) {
        if let Some([.., bits]) = self.words.get_mut(frame as usize) {
            *bits |= REFERENCED;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_written_and_an_untouched_one_is_as_the_table_began() {
        for begun in [Holder::Clean, Holder::Unknown] {
            let mut slots = Slots::new(3, begun);
            let untouched = Frame { owner: None, last_space: begun, referenced: false, group: 0 };
            assert_eq!((slots.at(1), slots.get(3), slots.count()), (untouched, None, 3));
            let owner = Some(Owner { region: RegionId(u64::MAX), page: u64::MAX });
            for holder in [Holder::Clean, Holder::Unknown, Holder::Space(SpaceId(0)), Holder::Space(SpaceId(u64::MAX))]
            {
                for (owner, referenced, group) in [(owner, true, u16::MAX), (None, false, 7), (owner, false, 0)] {
                    let frame = Frame { owner, last_space: holder, referenced, group };
                    slots.set(1, frame);
                    assert_eq!((slots.at(1), slots.owner(1), slots.at(0)), (frame, owner, untouched));
                    slots.reference(1);
                    assert_eq!(slots.at(1), Frame { referenced: true, ..frame });
                    assert!(slots.take_referenced(1) && !slots.take_referenced(1));
                }
            }
        }
    }
}
