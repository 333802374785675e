//! Which frame of a device belongs to whom. Derived state: a frame is in use exactly if a directory entry names it, so a
//! new pager rebuilds this table from the directories and there is nothing to reconcile.
//!
//! After a fork several entries name one frame: one owner stands in the frame, the others in `sharers`. The frame is free when
//! the last of them has given it back.

use std::collections::{BTreeMap, HashMap};

use crate::event::{RegionId, SpaceId};

/// Frames and pages of a huge page.
pub const HUGE_PAGES: u32 = 512;

/// Most frames that one search for a victim passes over because the device has used them. Asking takes about 0.1 us each: no more
/// than the copy of the chunk that makes the room.
pub const SECOND_CHANCES_MAX: u32 = 4096;

/// Owner of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Region.
    pub region: RegionId,
    /// Page of it.
    pub page: u64,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    owner: Option<Owner>,
    /// Whose bytes it may still hold while free.
    last_space: Holder,
    /// Used lately: the clock passes once.
    referenced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// Scrubbed.
    Clean,
    /// Not known (after a pager's restart).
    Unknown,
    Space(SpaceId),
}

/// Frames of one device.
#[derive(Debug)]
pub struct FrameTable {
    frames: Vec<Frame>,
    free_count: u32,
    /// Where the next search begins.
    next: u32,
    /// Hand of the eviction clock.
    hand: u32,
    /// Owners beside the one that stands in the frame.
    sharers: HashMap<u32, Vec<Owner>>,
    /// Free frames that hold something.
    dirty: BTreeMap<Holder, Dirty>,
}

/// Free frames that hold somebody's bytes: how many, and none below `from`. So that a client that leaves nothing costs no search, and one
/// that leaves little a short one.
#[derive(Clone, Copy, Debug)]
struct Dirty {
    count: u32,
    from: u32,
}

impl FrameTable {
    /// All free; what they hold is unknown.
    pub fn new(frame_count: u32) -> Self {
        let frame = Frame { owner: None, last_space: Holder::Unknown, referenced: false };
        Self {
            frames: vec![frame; frame_count as usize],
            free_count: frame_count,
            next: 0,
            hand: 0,
            sharers: HashMap::new(),
            dirty: BTreeMap::from([(Holder::Unknown, Dirty { count: frame_count, from: 0 })]),
        }
    }

    /// The frame, which is free, holds what it is said to.
    fn is_dirty(&mut self, frame: u32) {
        let holder = self.frames[frame as usize].last_space;
        if holder != Holder::Clean {
            let dirty = self.dirty.entry(holder).or_insert(Dirty { count: 0, from: frame });
            *dirty = Dirty { count: dirty.count + 1, from: dirty.from.min(frame) };
        }
    }

    /// The frame, which was free, is so no more, or holds something else.
    fn no_longer_dirty(&mut self, frame: u32) {
        let holder = self.frames[frame as usize].last_space;
        if let Some(dirty) = self.dirty.get_mut(&holder) {
            dirty.count -= 1;
            if dirty.count == 0 {
                self.dirty.remove(&holder);
            }
        }
    }

    /// The memory is new: there is nothing in it.
    pub fn mark_all_clean(&mut self) {
        for frame in &mut self.frames {
            frame.last_space = Holder::Clean;
        }
        self.dirty.clear();
    }

    /// Size.
    pub fn frame_count(&self) -> u32 {
        self.frames.len() as u32
    }

    /// Frames without an owner.
    pub fn free_count(&self) -> u32 {
        self.free_count
    }

    /// Who owns it.
    pub fn owner(&self, frame: u32) -> Option<Owner> {
        self.frames.get(frame as usize)?.owner
    }

    /// Takes up to `want` consecutive free frames for consecutive pages; fewer when memory is fragmented, `None` when it is full.
    pub fn allocate(&mut self, want: u32, first: Owner, space: SpaceId) -> Option<(u32, u32)> {
        if self.free_count == 0 || want == 0 {
            return None;
        }
        let (start, count) = self.find_run(want)?;
        self.occupy(start, count, first, space);
        Some((start, count))
    }

    /// Takes 512 aligned frames for 512 pages, or none.
    pub fn allocate_huge(&mut self, first: Owner, space: SpaceId) -> Option<u32> {
        if self.free_count < HUGE_PAGES {
            return None;
        }
        let free = |start: &u32| {
            let block = &self.frames[*start as usize..(*start + HUGE_PAGES) as usize];
            block.iter().all(|frame| frame.owner.is_none())
        };
        let start = (0..self.frame_count() / HUGE_PAGES).map(|block| block * HUGE_PAGES).find(free)?;
        self.occupy(start, HUGE_PAGES, first, space);
        Some(start)
    }

    fn occupy(&mut self, start: u32, count: u32, first: Owner, space: SpaceId) {
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            self.no_longer_dirty(start + offset);
            let frame = &mut self.frames[(start + offset) as usize];
            *frame = Frame { owner: Some(owner), last_space: Holder::Space(space), referenced: true };
        }
        self.free_count -= count;
        self.next = (start + count) % self.frame_count();
    }

    /// First run long enough after `next`, wrapping; otherwise the longest one seen.
    fn find_run(&self, want: u32) -> Option<(u32, u32)> {
        let total = self.frame_count();
        let mut best: Option<(u32, u32)> = None;
        for (from, to) in [(self.next, total), (0, self.next)] {
            let mut at = from;
            while at < to {
                if self.frames[at as usize].owner.is_some() {
                    at += 1;
                    continue;
                }
                let run = self.frames[at as usize..to as usize].iter().take(want as usize);
                let count = run.take_while(|frame| frame.owner.is_none()).count() as u32;
                if best.is_none_or(|(_, longest)| count > longest) {
                    best = Some((at, count));
                }
                if count == want {
                    return best;
                }
                at += count;
            }
        }
        best
    }

    /// Recovery: the directory says who owns the frame; `shared` entries may name one together. `false`: out of range or owned
    /// already.
    pub fn claim(&mut self, frame: u32, owner: Owner, space: SpaceId, shared: bool) -> bool {
        match self.frames.get(frame as usize) {
            Some(slot) if slot.owner.is_none() => {
                self.no_longer_dirty(frame);
                let last_space = Holder::Space(space);
                self.frames[frame as usize] = Frame { owner: Some(owner), last_space, referenced: false };
                self.free_count -= 1;
                true
            }
            Some(_) if shared => self.share(frame, owner),
            _ => false,
        }
    }

    /// Another entry names the frame from now on. `false`: nobody owns it.
    pub fn share(&mut self, frame: u32, owner: Owner) -> bool {
        let Some(slot) = self.frames.get_mut(frame as usize).filter(|slot| slot.owner.is_some()) else { return false };
        // Whose bytes they are cannot be told any more: they are scrubbed when the last one has gone.
        slot.last_space = Holder::Unknown;
        self.sharers.entry(frame).or_default().push(owner);
        true
    }

    /// Several entries name the frame.
    pub fn is_shared(&self, frame: u32) -> bool {
        self.sharers.contains_key(&frame)
    }

    /// One of several owners goes: the frame stays in use. `false`: there are no others.
    fn unshare(&mut self, frame: u32, owner: Owner) -> bool {
        let Some(others) = self.sharers.get_mut(&frame) else { return false };
        match others.iter().position(|other| *other == owner) {
            Some(place) => drop(others.swap_remove(place)),
            None if self.frames[frame as usize].owner == Some(owner) => {
                self.frames[frame as usize].owner = others.pop()
            }
            None => {}
        }
        if others.is_empty() {
            self.sharers.remove(&frame);
        }
        true
    }

    /// `first` and the owners of the pages after it give consecutive frames back. What they hold stays noted until they are
    /// scrubbed or overwritten. Returns whether a frame needs a scrub.
    pub fn release(&mut self, frame: u32, count: u32, first: Owner) -> bool {
        // Frames that were used lately are warm in every mapping of the device: they go out again first.
        self.next = self.next.min(frame);
        let mut unknown = false;
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            if self.unshare(frame + offset, owner) {
                continue;
            }
            let slot = &mut self.frames[(frame + offset) as usize];
            debug_assert!(slot.owner.is_some(), "frame was free");
            let was_used = slot.owner.take().is_some();
            unknown |= slot.last_space == Holder::Unknown;
            if was_used {
                self.free_count += 1;
                self.is_dirty(frame + offset);
            }
        }
        unknown
    }

    /// Gives frames back whose content is anybody's guess: they need a scrub.
    pub fn release_unknown(&mut self, frame: u32, count: u32, first: Owner) {
        self.release(frame, count, first);
        for frame in frame..frame + count {
            let is_free = self.frames[frame as usize].owner.is_none();
            if is_free {
                self.no_longer_dirty(frame);
            }
            self.frames[frame as usize].last_space = Holder::Unknown;
            if is_free {
                self.is_dirty(frame);
            }
        }
    }

    /// Marks a frame as used lately.
    pub fn touch(&mut self, frame: u32) {
        if let Some(frame) = self.frames.get_mut(frame as usize) {
            frame.referenced = true;
        }
    }

    /// Takes the free frames that may hold the space's bytes (or, with `None`, anybody's) out of use for a scrub.
    /// At most `max` frames. They are marked clean at once: they are owned by nobody until [`Self::scrubbed`] gives them back.
    pub fn begin_scrub(&mut self, space: Option<SpaceId>, keeper: Owner, max: usize) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let holder = space.map_or(Holder::Unknown, Holder::Space);
        let mut taken = 0;
        while taken < max
            && let Some(Dirty { from, .. }) = self.dirty.get(&holder).copied()
        {
            let holds = |frame: &Frame| frame.owner.is_none() && frame.last_space == holder;
            let found = self.frames[from as usize..].iter().position(holds);
            // Counted and not there: nothing is lost by not scrubbing what does not exist.
            let Some(at) = found.map(|offset| from + offset as u32) else { break };
            self.no_longer_dirty(at);
            if let Some(dirty) = self.dirty.get_mut(&holder) {
                dirty.from = at + 1;
            }
            self.frames[at as usize] = Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false };
            self.free_count -= 1;
            taken += 1;
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == at => run.1 += 1,
                _ => runs.push((at, 1)),
            }
        }
        runs
    }

    /// A region ended: consecutive frames of `first` and the pages after it go to `keeper` for a scrub, and are added to `runs`, except
    /// those that others name too, and those that are somebody else's by now (the memory was replaced meanwhile).
    pub fn hand_over(&mut self, frame: u32, count: u32, first: Owner, keeper: Owner, runs: &mut Vec<(u32, u32)>) {
        for offset in 0..count {
            let (at, owner) = (frame + offset, Owner { page: first.page + u64::from(offset), ..first });
            if self.unshare(at, owner) || self.owner(at) != Some(owner) {
                continue;
            }
            self.frames[at as usize] = Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false };
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == at => run.1 += 1,
                _ => runs.push((at, 1)),
            }
        }
    }

    /// The scrub of these runs is through.
    pub fn scrubbed(&mut self, runs: &[(u32, u32)]) {
        for (first, count) in runs {
            for slot in &mut self.frames[*first as usize..(*first + *count) as usize] {
                self.free_count += u32::from(slot.owner.take().is_some());
            }
            self.next = self.next.min(*first);
        }
    }

    /// Next victims by the clock: owners of consecutive frames that hold consecutive pages, `want` at most in one run.
    /// `spare` says which owners must not be taken; `used` whether the device used an owner's page since it was asked last.
    /// Four rounds at most: the first one clears reference bits, in the last two nobody is asked any more. Also returns how many
    /// frames got a second chance by `used`: no more than [`SECOND_CHANCES_MAX`], so that a device that uses all of its memory
    /// costs no long search.
    pub fn victims(
        &mut self,
        want: u32,
        spare: impl Fn(Owner) -> bool,
        used: impl Fn(Owner) -> bool,
    ) -> (Option<(Owner, u32)>, u32) {
        let total = self.frame_count();
        let mut chances = 0;
        for step in 0..u64::from(total) * 4 {
            let may_ask = step < u64::from(total) * 2;
            let at = self.hand;
            self.hand = (self.hand + 1) % total;
            let Some(owner) = self.frames[at as usize].owner else { continue };
            // What must stay is not asked about: its mark is of use when it may go.
            let passes = std::mem::take(&mut self.frames[at as usize].referenced) || spare(owner);
            if passes {
                continue;
            }
            if may_ask && chances < SECOND_CHANCES_MAX && self.any_owner(at, owner, &used) {
                // As good as new: the hand may come by again before the device has had time to mark it.
                self.frames[at as usize].referenced = true;
                chances += 1;
                continue;
            }
            let mut count = 1;
            while count < want && self.follows(at, owner, count, &spare) {
                let next = at + count;
                let expected = Owner { page: owner.page + u64::from(count), ..owner };
                if may_ask && chances < SECOND_CHANCES_MAX && self.any_owner(next, expected, &used) {
                    // The mark is taken: it is kept here until the hand comes by.
                    self.frames[next as usize].referenced = true;
                    chances += 1;
                    break;
                }
                count += 1;
            }
            self.hand = (at + count) % total;
            return (Some((owner, count)), chances);
        }
        (None, chances)
    }

    /// The frame `offset` frames on holds the page `offset` pages on and may be taken with it.
    fn follows(&self, at: u32, owner: Owner, offset: u32, spare: impl Fn(Owner) -> bool) -> bool {
        let expected = Owner { page: owner.page + u64::from(offset), ..owner };
        let next = self.frames.get((at + offset) as usize);
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

    fn owner(page: u64) -> Owner {
        Owner { region: RegionId(1), page }
    }

    #[test]
    fn allocation_prefers_whole_runs_and_gives_fragments_when_it_must() {
        let mut table = FrameTable::new(16);
        assert_eq!(table.allocate(4, owner(0), SpaceId(1)), Some((0, 4)));
        assert_eq!(table.allocate(4, owner(4), SpaceId(1)), Some((4, 4)));
        table.release(1, 2, owner(1));
        assert_eq!(table.allocate(10, owner(20), SpaceId(1)), Some((8, 8)), "the longest run there is");
        assert_eq!(table.allocate(4, owner(40), SpaceId(1)), Some((1, 2)));
        assert_eq!(table.allocate(1, owner(50), SpaceId(1)), None);
        assert_eq!(table.free_count(), 0);
    }

    #[test]
    fn a_frame_is_claimed_once() {
        let mut table = FrameTable::new(2);
        assert!(table.claim(1, owner(0), SpaceId(1), false));
        assert!(!table.claim(1, owner(1), SpaceId(1), false));
        assert!(!table.claim(2, owner(1), SpaceId(1), false));
    }

    #[test]
    fn scrubbing_covers_what_a_space_left_and_nothing_else() {
        let mut table = FrameTable::new(8);
        assert_eq!(table.begin_scrub(None, owner(0), usize::MAX), [(0, 8)], "nothing is known at first");
        table.scrubbed(&[(0, 8)]);
        table.allocate(2, owner(0), SpaceId(1));
        table.allocate(2, owner(9), SpaceId(2));
        table.release(0, 2, owner(0));
        assert_eq!(table.begin_scrub(Some(SpaceId(2)), owner(0), usize::MAX), []);
        let runs = table.begin_scrub(Some(SpaceId(1)), owner(0), usize::MAX);
        assert_eq!(runs, [(0, 2)]);
        assert_eq!(table.free_count(), 4, "frames under scrub cannot be allocated");
        table.scrubbed(&runs);
        assert_eq!(table.free_count(), 6);
        assert_eq!(table.begin_scrub(Some(SpaceId(1)), owner(0), usize::MAX), []);
    }

    #[test]
    fn the_clock_gives_a_second_chance_and_takes_runs() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        let unused = |_| false;
        let (all, none) = (|_| true, |_| false);
        let first = table.victims(4, none, unused);
        assert_eq!(first, (Some((owner(0), 4)), 0), "all were referenced: one round clears");
        table.touch(4);
        assert_eq!(table.victims(4, none, unused).0, Some((owner(5), 3)));
        assert_eq!(table.victims(4, all, unused).0, None, "nothing may be taken");
    }

    #[test]
    fn what_the_device_uses_is_passed_over_once_for_each_mark() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        assert_eq!(table.victims(8, |_| false, |_| false).0, Some((owner(0), 8)), "the reference bits are gone now");
        let marks = std::cell::RefCell::new(std::collections::BTreeSet::from([0, 1, 4]));
        let used = |owner: Owner| marks.borrow_mut().remove(&owner.page);
        assert_eq!(table.victims(8, |_| false, used), (Some((owner(2), 2)), 3), "pages 0, 1 and 4 are hot");
        assert_eq!(table.victims(8, |_| false, used), (Some((owner(5), 3)), 0), "the mark of page 4 was not lost");
        assert_eq!(table.victims(8, |_| false, used).0, Some((owner(2), 6)), "pages 0 and 1 are passed once more");
        assert_eq!(table.victims(8, |_| false, used), (Some((owner(0), 8)), 0), "not used again: all may go");
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
        let (victim, chances) = table.victims(4, |_| false, used);
        assert_eq!((victim, chances), (Some((owner(u64::from(SECOND_CHANCES_MAX)), 4)), SECOND_CHANCES_MAX));
        assert_eq!(asked.get(), SECOND_CHANCES_MAX, "nobody is asked more often than that");
    }

    #[test]
    fn a_small_device_that_is_used_all_the_time_gives_something_up_too() {
        let mut table = FrameTable::new(8);
        table.allocate(8, owner(0), SpaceId(1));
        let only_the_last_two = |owner: Owner| owner.page < 6;
        assert_eq!(table.victims(4, only_the_last_two, |_| true).0, Some((owner(6), 2)));
    }

    #[test]
    fn a_shared_frame_is_used_if_any_of_its_owners_is() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::new(2);
        table.allocate(2, owner(0), SpaceId(1));
        assert!(table.share(0, other));
        assert_eq!(table.victims(2, |_| false, |_| false).0, Some((owner(0), 2)));
        assert_eq!(table.victims(2, |_| false, |owner| owner == other).0, Some((owner(1), 1)));
    }

    #[test]
    fn a_shared_frame_is_free_when_its_last_owner_has_gone() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::new(4);
        table.mark_all_clean();
        table.allocate(2, owner(0), SpaceId(1));
        assert!(table.share(0, other) && table.is_shared(0) && !table.is_shared(1));
        assert!(!table.release(0, 1, owner(0)), "the other one keeps it");
        assert_eq!((table.owner(0), table.free_count()), (Some(other), 2));
        assert!(table.release(0, 1, other), "whose bytes they were is not known any more");
        assert_eq!(table.free_count(), 3);
        assert_eq!(table.begin_scrub(None, owner(9), usize::MAX), [(0, 1)]);
        assert!(!table.share(3, other), "a free frame cannot be shared");
    }

    #[test]
    fn a_region_that_ends_leaves_shared_frames_to_the_others() {
        let other = Owner { region: RegionId(2), page: 0 };
        let mut table = FrameTable::new(4);
        table.allocate(3, owner(0), SpaceId(1));
        table.share(1, other);
        let keeper = Owner { region: RegionId(99), page: 0 };
        let mut runs = Vec::new();
        table.hand_over(0, 3, owner(0), keeper, &mut runs);
        assert_eq!(runs, [(0, 1), (2, 1)]);
        assert_eq!((table.owner(1), table.is_shared(1)), (Some(other), false));
        assert_eq!((table.owner(0), table.owner(2), table.free_count()), (Some(keeper), Some(keeper), 1));
    }

    #[test]
    fn what_is_counted_as_dirty_is_there() {
        let mut table = FrameTable::new(40);
        let mut used: Vec<(u32, u32, Owner)> = Vec::new();
        let mut seed = 1u64;
        for _ in 0..4000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (choice, space) = ((seed >> 33) % 8, SpaceId((seed >> 40) % 3));
            let first = owner(seed % 1000 * 100);
            match choice {
                0..=3 => used.extend(table.allocate(5, first, space).map(|(frame, count)| (frame, count, first))),
                4 | 5 if !used.is_empty() => {
                    let (frame, count, first) = used.swap_remove(seed as usize % used.len());
                    if choice == 4 {
                        table.release(frame, count, first);
                    } else {
                        table.release_unknown(frame, count, first);
                    }
                }
                6 => {
                    let runs = table.begin_scrub(Some(space), owner(7), usize::MAX);
                    table.scrubbed(&runs);
                }
                _ => {
                    let runs = table.begin_scrub(None, owner(7), 3);
                    table.scrubbed(&runs);
                }
            }
            for holder in (0..3).map(|space| Holder::Space(SpaceId(space))).chain([Holder::Unknown]) {
                let holds = |frame: &Frame| frame.owner.is_none() && frame.last_space == holder;
                let there = table.frames.iter().filter(|frame| holds(frame)).count() as u32;
                let first = table.frames.iter().position(holds).map_or(u32::MAX, |first| first as u32);
                let known = table.dirty.get(&holder);
                assert_eq!(known.map_or(0, |dirty| dirty.count), there, "{holder:?}");
                assert!(known.is_none_or(|dirty| dirty.from <= first), "{holder:?}");
            }
        }
    }

    #[test]
    fn a_region_that_ends_takes_no_frame_that_is_somebody_elses_by_now() {
        let other = Owner { region: RegionId(2), page: 0 };
        let keeper = Owner { region: RegionId(99), page: 0 };
        let mut table = FrameTable::new(4);
        table.allocate(2, other, SpaceId(2));
        let mut runs = Vec::new();
        table.hand_over(0, 3, owner(0), keeper, &mut runs);
        assert_eq!(runs, [], "the device came back with other memory");
        assert_eq!((table.owner(0), table.free_count()), (Some(other), 2));
    }

    #[test]
    fn huge_frames_are_aligned_or_refused() {
        let mut table = FrameTable::new(1024 + 100);
        table.allocate(1, owner(0), SpaceId(1));
        assert_eq!(table.allocate_huge(owner(512), SpaceId(1)), Some(512));
        assert_eq!(table.allocate_huge(owner(1024), SpaceId(1)), None, "only 511 and 100 are left in a row");
    }
}
