//! Which frame of a device belongs to whom. Derived state: a frame is in use exactly if a directory entry names it, so a
//! new pager rebuilds this table from the directories and there is nothing to reconcile.

use crate::event::{RegionId, SpaceId};

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

impl FrameTable {
    /// All free; what they hold is unknown.
    pub fn new(frame_count: u32) -> Self {
        let frame = Frame { owner: None, last_space: Holder::Unknown, referenced: false };
        Self { frames: vec![frame; frame_count as usize], free_count: frame_count, next: 0, hand: 0 }
    }

    /// The memory is new: there is nothing in it.
    pub fn mark_all_clean(&mut self) {
        for frame in &mut self.frames {
            frame.last_space = Holder::Clean;
        }
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
        for offset in 0..count {
            let owner = Owner { page: first.page + u64::from(offset), ..first };
            let frame = &mut self.frames[(start + offset) as usize];
            *frame = Frame { owner: Some(owner), last_space: Holder::Space(space), referenced: true };
        }
        self.free_count -= count;
        self.next = (start + count) % self.frame_count();
        Some((start, count))
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

    /// Recovery: the directory says who owns the frame. `false`: out of range or owned already.
    pub fn claim(&mut self, frame: u32, owner: Owner, space: SpaceId) -> bool {
        match self.frames.get_mut(frame as usize) {
            Some(slot) if slot.owner.is_none() => {
                *slot = Frame { owner: Some(owner), last_space: Holder::Space(space), referenced: false };
                self.free_count -= 1;
                true
            }
            _ => false,
        }
    }

    /// Gives frames back. What they hold stays noted until they are scrubbed or overwritten.
    pub fn release(&mut self, first: u32, count: u32) {
        // Frames that were used lately are warm in every mapping of the device: they go out again first.
        self.next = self.next.min(first);
        for frame in &mut self.frames[first as usize..(first + count) as usize] {
            debug_assert!(frame.owner.is_some(), "frame was free");
            if frame.owner.take().is_some() {
                self.free_count += 1;
            }
        }
    }

    /// Gives frames back whose content is anybody's guess: they need a scrub.
    pub fn release_unknown(&mut self, first: u32, count: u32) {
        self.release(first, count);
        for frame in &mut self.frames[first as usize..(first + count) as usize] {
            frame.last_space = Holder::Unknown;
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
        let mut taken = 0;
        for index in 0..self.frames.len() {
            if taken == max {
                break;
            }
            let frame = &mut self.frames[index];
            let dirty = match (space, frame.last_space) {
                (Some(space), Holder::Space(holder)) => holder == space,
                (None, Holder::Unknown) => true,
                _ => false,
            };
            if frame.owner.is_some() || !dirty {
                continue;
            }
            *frame = Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false };
            self.free_count -= 1;
            taken += 1;
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == index as u32 => run.1 += 1,
                _ => runs.push((index as u32, 1)),
            }
        }
        runs
    }

    /// A region ended: its frames go to `keeper` for a scrub.
    pub fn hand_over(&mut self, region: RegionId, keeper: Owner) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for (index, frame) in self.frames.iter_mut().enumerate() {
            if frame.owner.is_none_or(|owner| owner.region != region) {
                continue;
            }
            *frame = Frame { owner: Some(keeper), last_space: Holder::Clean, referenced: false };
            match runs.last_mut() {
                Some(run) if run.0 + run.1 == index as u32 => run.1 += 1,
                _ => runs.push((index as u32, 1)),
            }
        }
        runs
    }

    /// The scrub of these runs is through.
    pub fn scrubbed(&mut self, runs: &[(u32, u32)]) {
        for (first, count) in runs {
            self.release(*first, *count);
        }
    }

    /// Next victims by the clock: owners of consecutive frames that hold consecutive pages, `want` at most in one run.
    /// `spare` says which owners must not be taken. Two rounds at most: the first one clears reference bits.
    pub fn victims(&mut self, want: u32, spare: impl Fn(Owner) -> bool) -> Option<(Owner, u32)> {
        let total = self.frame_count();
        for _ in 0..u64::from(total) * 2 {
            let at = self.hand;
            self.hand = (self.hand + 1) % total;
            let frame = &mut self.frames[at as usize];
            let Some(owner) = frame.owner else { continue };
            if std::mem::take(&mut frame.referenced) || spare(owner) {
                continue;
            }
            let follows = |offset: u32| {
                let next = self.frames.get((at + offset) as usize)?;
                let expected = Owner { page: owner.page + u64::from(offset), ..owner };
                (next.owner == Some(expected) && !next.referenced && !spare(expected)).then_some(())
            };
            let count = 1 + (1..want).take_while(|offset| follows(*offset).is_some()).count() as u32;
            self.hand = (at + count) % total;
            return Some((owner, count));
        }
        None
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
        table.release(1, 2);
        assert_eq!(table.allocate(10, owner(20), SpaceId(1)), Some((8, 8)), "the longest run there is");
        assert_eq!(table.allocate(4, owner(40), SpaceId(1)), Some((1, 2)));
        assert_eq!(table.allocate(1, owner(50), SpaceId(1)), None);
        assert_eq!(table.free_count(), 0);
    }

    #[test]
    fn a_frame_is_claimed_once() {
        let mut table = FrameTable::new(2);
        assert!(table.claim(1, owner(0), SpaceId(1)));
        assert!(!table.claim(1, owner(1), SpaceId(1)));
        assert!(!table.claim(2, owner(1), SpaceId(1)));
    }

    #[test]
    fn scrubbing_covers_what_a_space_left_and_nothing_else() {
        let mut table = FrameTable::new(8);
        assert_eq!(table.begin_scrub(None, owner(0), usize::MAX), [(0, 8)], "nothing is known at first");
        table.scrubbed(&[(0, 8)]);
        table.allocate(2, owner(0), SpaceId(1));
        table.allocate(2, owner(9), SpaceId(2));
        table.release(0, 2);
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
        assert_eq!(table.victims(4, |_| false), Some((owner(0), 4)), "all were referenced: one round clears");
        table.touch(4);
        assert_eq!(table.victims(4, |_| false), Some((owner(5), 3)));
        assert_eq!(table.victims(4, |_| true), None, "nothing may be taken");
    }
}
