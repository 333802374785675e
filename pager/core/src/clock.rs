//! Who makes room: the clock over a device's frames. What was used since the hand last came by is passed over once.
//!
//! A search goes on where it was interrupted: four rounds at most, the first one clears reference bits, in the last two nobody is asked any
//! more whether the device has used a page. Of that it takes a share at a time, so that a device of which nothing may be taken, however large
//! it is, stops nobody.

use crate::frames::{FrameTable, Owner};

/// Most frames that one search for a victim passes over because the device has used them. Asking takes about 0.1 us each: no more
/// than the copy of the chunk that makes the room.
pub const SECOND_CHANCES_MAX: u32 = 4096;

/// Frames that a search looks at before others get their turn: well below a millisecond.
pub const LOOKS_PER_TURN: u32 = 8192;

/// How far a search has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    looks: u64,
    /// The next frame. Its own: two searches that take turns under one hand would each see the frames of every other turn only.
    next: Option<u32>,
    /// Frames that got a second chance.
    pub chances: u32,
}

/// What it has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The owner of the first of consecutive frames that hold consecutive pages, and how many.
    Victim(Owner, u32),
    /// Nothing yet: go on.
    NotYet,
    /// Nothing may be taken.
    Nothing,
}

impl FrameTable {
    /// Goes on with a search: `want` frames at most in one run. `spare` says which owners must not be taken; `used` whether the device
    /// used an owner's page since it was asked last.
    pub fn victims(
        &mut self,
        want: u32,
        search: &mut Search,
        spare: impl Fn(Owner) -> bool,
        used: impl Fn(Owner) -> bool,
    ) -> Found {
        let total = self.frame_count();
        for _ in 0..LOOKS_PER_TURN {
            if search.looks >= u64::from(total) * 4 {
                return Found::Nothing;
            }
            let may_ask = search.looks < u64::from(total) * 2;
            search.looks += 1;
            let at = search.next.unwrap_or(self.hand);
            search.next = Some((at + 1) % total);
            let Some(owner) = self.frames.owner(at) else { continue };
            // What must stay is not asked about: its mark is of use when it may go.
            let passes = self.frames.take_referenced(at) || spare(owner);
            if passes {
                continue;
            }
            if may_ask && search.chances < SECOND_CHANCES_MAX && self.any_owner(at, owner, &used) {
                // As good as new: the hand may come by again before the device has had time to mark it.
                self.frames.reference(at);
                search.chances += 1;
                continue;
            }
            let mut count = 1;
            while count < want && self.follows(at, owner, count, &spare) {
                let next = at + count;
                let expected = Owner { page: owner.page + u64::from(count), ..owner };
                if may_ask && search.chances < SECOND_CHANCES_MAX && self.any_owner(next, expected, &used) {
                    // The mark is taken: it is kept here until the hand comes by.
                    self.frames.reference(next);
                    search.chances += 1;
                    break;
                }
                count += 1;
            }
            self.hand = (at + count) % total;
            return Found::Victim(owner, count);
        }
        Found::NotYet
    }

    /// The frame `offset` frames on holds the page `offset` pages on and may be taken with it.
    fn follows(&self, at: u32, owner: Owner, offset: u32, spare: impl Fn(Owner) -> bool) -> bool {
        let expected = Owner { page: owner.page + u64::from(offset), ..owner };
        let next = self.frames.get(at + offset);
        next.is_some_and(|next| next.owner == Some(expected) && !next.referenced) && !spare(expected)
    }

    /// Asks for every page that the frame holds, so that all marks are taken.
    fn any_owner(&self, frame: u32, owner: Owner, used: impl Fn(Owner) -> bool) -> bool {
        let others = self.sharers.get(&frame).map_or(&[][..], Vec::as_slice);
        others.iter().fold(used(owner), |any, other| used(*other) || any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{RegionId, SpaceId};

    fn owner(page: u64) -> Owner {
        Owner { region: RegionId(1), page }
    }

    /// A whole search: what it finds, if anything, and how many got a second chance.
    fn victims(
        table: &mut FrameTable,
        want: u32,
        spare: impl Fn(Owner) -> bool,
        used: impl Fn(Owner) -> bool,
    ) -> (Option<(Owner, u32)>, u32) {
        let mut search = Search::default();
        loop {
            match table.victims(want, &mut search, &spare, &used) {
                Found::NotYet => {}
                Found::Nothing => return (None, search.chances),
                Found::Victim(owner, count) => return (Some((owner, count)), search.chances),
            }
        }
    }

    #[test]
    fn a_search_in_vain_takes_no_more_than_its_share_of_a_turn_however_large_the_device_is() {
        for frame_count in [1000, 100_000] {
            let mut table = FrameTable::new(frame_count);
            table.allocate(frame_count, owner(0), SpaceId(1));
            let (looks, mut most, mut turns) = (std::cell::Cell::new(0), 0, 0);
            let nothing_goes = |_| {
                looks.set(looks.get() + 1);
                true
            };
            let mut search = Search::default();
            loop {
                looks.set(0);
                turns += 1;
                let found = table.victims(4, &mut search, nothing_goes, |_| false);
                most = most.max(looks.get());
                if found == Found::Nothing {
                    break;
                }
                assert_eq!(found, Found::NotYet);
            }
            assert!(most <= LOOKS_PER_TURN, "{most} owners were looked at in one turn");
            assert_eq!(turns, 4 * frame_count / LOOKS_PER_TURN + 1, "and it comes to an end");
        }
    }

    #[test]
    fn searches_that_take_turns_each_see_every_frame() {
        let frame_count = 2 * LOOKS_PER_TURN;
        let mut table = FrameTable::new(frame_count);
        table.allocate(frame_count, owner(0), SpaceId(1));
        let last = u64::from(frame_count) - 1;
        let (mut vain, mut good) = (Search::default(), Search::default());
        let mut found = Found::NotYet;
        while found == Found::NotYet {
            table.victims(8, &mut vain, |_| true, |_| false);
            found = table.victims(8, &mut good, |owner| owner.page != last, |_| false);
        }
        assert_eq!(found, Found::Victim(owner(last), 1));
    }

    #[test]
    fn a_search_that_was_interrupted_finds_what_it_would_have_found() {
        let frame_count = 3 * LOOKS_PER_TURN;
        let mut table = FrameTable::new(frame_count);
        table.allocate(frame_count, owner(0), SpaceId(1));
        let last = u64::from(frame_count) - 1;
        assert_eq!(victims(&mut table, 8, |owner| owner.page != last, |_| false), (Some((owner(last), 1)), 0));
    }

    #[test]
    fn the_clock_gives_a_second_chance_and_takes_runs() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        let unused = |_| false;
        let (all, none) = (|_| true, |_| false);
        let first = victims(&mut table, 4, none, unused);
        assert_eq!(first, (Some((owner(0), 4)), 0), "all were referenced: one round clears");
        table.touch(4);
        assert_eq!(victims(&mut table, 4, none, unused).0, Some((owner(5), 3)));
        assert_eq!(victims(&mut table, 4, all, unused).0, None, "nothing may be taken");
    }

    #[test]
    fn what_the_device_uses_is_passed_over_once_for_each_mark() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        assert_eq!(
            victims(&mut table, 8, |_| false, |_| false).0,
            Some((owner(0), 8)),
            "the reference bits are gone now"
        );
        let marks = std::cell::RefCell::new(std::collections::BTreeSet::from([0, 1, 4]));
        let used = |owner: Owner| marks.borrow_mut().remove(&owner.page);
        assert_eq!(victims(&mut table, 8, |_| false, used), (Some((owner(2), 2)), 3), "pages 0, 1 and 4 are hot");
        assert_eq!(
            victims(&mut table, 8, |_| false, used),
            (Some((owner(5), 3)), 0),
            "the mark of page 4 was not lost"
        );
        assert_eq!(
            victims(&mut table, 8, |_| false, used).0,
            Some((owner(2), 6)),
            "pages 0 and 1 are passed once more"
        );
        assert_eq!(victims(&mut table, 8, |_| false, used), (Some((owner(0), 8)), 0), "not used again: all may go");
    }

    #[test]
    fn a_device_that_uses_everything_still_gives_something_up() {
        let frame_count = SECOND_CHANCES_MAX + 100;
        let mut table = FrameTable::new(frame_count);
        table.allocate(frame_count, owner(0), SpaceId(1));
        let asked = std::cell::Cell::new(0);
        let used = |_| {
            asked.set(asked.get() + 1);
            true
        };
        let (victim, chances) = victims(&mut table, 4, |_| false, used);
        assert_eq!((victim, chances), (Some((owner(u64::from(SECOND_CHANCES_MAX)), 4)), SECOND_CHANCES_MAX));
        assert_eq!(asked.get(), SECOND_CHANCES_MAX, "nobody is asked more often than that");
    }

    #[test]
    fn a_small_device_that_is_used_all_the_time_gives_something_up_too() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        let only_the_last_two = |owner: Owner| owner.page < 6;
        assert_eq!(victims(&mut table, 4, only_the_last_two, |_| true).0, Some((owner(6), 2)));
    }

    #[test]
    fn a_shared_frame_is_used_if_any_of_its_owners_is() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::new(2);
        table.allocate(2, owner(0), SpaceId(1));
        assert!(table.share(0, other));
        assert_eq!(victims(&mut table, 2, |_| false, |_| false).0, Some((owner(0), 2)));
        assert_eq!(victims(&mut table, 2, |_| false, |owner| owner == other).0, Some((owner(1), 1)));
    }
}
