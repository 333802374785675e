//! Frames and blocks: where a frame's page lies, which blocks may be written to, and which must rest. Shared by everybody who moves pages.
//!
//! ```text
//!             take                 acknowledged (publish)
//!    free ----------> being written -----------------> a frame's page ---- replaced, zeroed ----> free
//!      ^                |       |                                                 \
//!      |  refused       |       | no answer                              read right now: rests until that has ended
//!      +----------------+       v
//!      +---- answered late, or the session is known to be dead ---- rests (quarantine)
//! ```
//! Where a session can outlive its client, blocks rest too that a driver which has died had begun to write, and those that hold a page but
//! may be written late by one replica's old session do not become free before that is over (haunted).
//!
//! A block is written once a generation and never while anybody refers to it. A write without an answer may still land, so its block rests.

use uhmm_driver_kit::Frames;
use uhmm_kernel_hook::HookError;

use crate::runs::{FreeRuns, Run};
use crate::table::Table;

/// A read that holds its blocks.
pub type Pin = u64;

/// The session of a driver that has died: what it had begun may still land.
pub const PREDECESSOR: u64 = 0;

/// Why a table cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Two frames in one block, or a block that does not exist.
    #[error("The block table in the vault is damaged at frame {frame}: what the frames held is given up")]
    Damaged {
        /// Where that was noticed.
        frame: u32,
    },
    /// The table's memory.
    #[error(transparent)]
    Memory(#[from] HookError),
}

/// A piece of frames whose pages lie in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Frames.
    pub frames: Frames,
    /// The first one's block; `None`: all are zero.
    pub block: Option<u32>,
}

/// See the module head.
#[derive(Debug)]
pub struct Store {
    table: Table,
    free: FreeRuns,
    pins: Vec<(Pin, Run)>,
    next_pin: Pin,
    /// Free as soon as nobody reads them.
    read_still: Vec<Run>,
    /// A write of that session was not answered.
    resting: Vec<(u64, Run)>,
    /// The same, and other replicas have the page.
    haunted: Vec<(u64, Pin)>,
}

impl Store {
    /// Over a table, new or of an earlier incarnation: what no frame refers to is free. Nothing that the earlier one had begun may land any more.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn open(table: Table) -> Result<Self, StoreError> {
        Self::over(table, false)
    }

    /// The same, but what the earlier one had begun may land: those blocks rest until [`PREDECESSOR`] is dead.
    ///
    /// # Errors
    /// `Damaged`.
    pub fn open_after_death(table: Table) -> Result<Self, StoreError> {
        Self::over(table, true)
    }

    fn over(table: Table, may_land: bool) -> Result<Self, StoreError> {
        let mut used = vec![false; table.blocks() as usize];
        for frame in 0..table.frames() {
            let Some(block) = table.block_of(frame)? else { continue };
            match used.get_mut(block as usize) {
                Some(used) if !*used => *used = true,
                _ => return Err(StoreError::Damaged { frame }),
            }
        }
        let mut of = Vec::with_capacity(used.len());
        for (block, used) in used.into_iter().enumerate() {
            let open = table.is_open(block as u32)?;
            of.push(match (used, open && may_land) {
                (false, false) => Place::Free,
                (false, true) => Place::Rests,
                (true, false) => Place::Used,
                (true, true) => Place::Haunted,
            });
        }
        let mut store = Self {
            table,
            free: FreeRuns::default(),
            pins: Vec::new(),
            next_pin: 0,
            read_still: Vec::new(),
            resting: Vec::new(),
            haunted: Vec::new(),
        };
        let mut at = 0;
        for part in of.chunk_by(|one, other| one == other) {
            let run = Run { first: at, count: part.len() as u32 };
            match part[0] {
                Place::Free => store.free.free(run),
                Place::Rests => store.rest(PREDECESSOR, run),
                // Answered by the other replica, perhaps.
                Place::Haunted => store.haunt(PREDECESSOR, run),
                Place::Used => {}
            }
            at += run.count;
        }
        Ok(store)
    }

    /// The table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Blocks that may be taken.
    pub fn free_blocks(&self) -> u32 {
        self.free.total()
    }

    /// Blocks that rest because a write to them was not answered.
    pub fn resting_blocks(&self) -> u32 {
        self.resting.iter().map(|(_, run)| run.count).sum()
    }

    /// Blocks in a row to write to, `wanted` at most. `None`: there is none now.
    pub fn take(&mut self, wanted: u32) -> Option<Run> {
        self.free.take(wanted)
    }

    /// Taken blocks that hold nothing anybody wants, and where nothing lands any more.
    pub fn release(&mut self, run: Run) {
        if !self.is_haunted(run) {
            (run.first..run.end()).for_each(|block| self.settle(block));
        }
        let mut rest = run;
        // Parts that are read wait; what lies between them is free.
        while rest.count > 0 {
            let reader = self.pins.iter().map(|(_, pinned)| *pinned).filter(|pinned| pinned.meets(rest));
            let Some(reader) = reader.min() else { break };
            let before = reader.first.saturating_sub(rest.first);
            self.free.free(Run { first: rest.first, count: before });
            let end = reader.end().min(rest.end());
            let held = Run { first: rest.first + before, count: end - rest.first - before };
            self.read_still.push(held);
            rest = Run { first: end, count: rest.end() - end };
        }
        self.free.free(rest);
    }

    /// Taken blocks whose write may still land.
    pub fn rest(&mut self, session: u64, run: Run) {
        self.resting.push((session, run));
    }

    /// Blocks that hold a page or will, and where a write of that session may still land: the same bytes. They are not written anew before it is dead.
    pub fn haunt(&mut self, session: u64, run: Run) {
        let pin = self.pin(run);
        self.haunted.push((session, pin));
    }

    fn is_haunted(&self, run: Run) -> bool {
        let held = |pin: &Pin| self.pins.iter().any(|(other, held)| other == pin && held.meets(run));
        self.haunted.iter().any(|(_, pin)| held(pin))
    }

    fn settle(&self, block: u32) {
        if let Err(error) = self.table.settle(block) {
            tracing::error!(%error, block, "A mark in the block table cannot be taken away");
        }
    }

    /// Nothing of that session lands any more.
    pub fn session_is_dead(&mut self, session: u64) {
        let (dead, alive) = std::mem::take(&mut self.haunted).into_iter().partition(|(of, _)| *of == session);
        self.haunted = alive;
        let dead: Vec<(u64, Pin)> = dead;
        for (_, pin) in dead {
            let run = self.pins.iter().find(|(other, _)| *other == pin).map(|(_, run)| *run);
            run.into_iter().flat_map(|run| run.first..run.end()).for_each(|block| self.settle(block));
            self.unpin(pin);
        }
        let (dead, alive) = std::mem::take(&mut self.resting).into_iter().partition(|(of, _)| *of == session);
        self.resting = alive;
        let dead: Vec<(u64, Run)> = dead;
        dead.into_iter().for_each(|(_, run)| self.release(run));
    }

    /// The write to these blocks was acknowledged: they are the frames' pages from now on.
    ///
    /// # Errors
    /// The table's memory; frames that are not there.
    pub fn publish(&mut self, first_frame: u32, run: Run) -> Result<(), HookError> {
        if !self.is_haunted(run) {
            (run.first..run.end()).for_each(|block| self.settle(block));
        }
        self.point(first_frame, run.count, |at| Some(run.first + at))
    }

    /// The frames are zero from now on.
    ///
    /// # Errors
    /// As [`Store::publish`].
    pub fn zero(&mut self, frames: Frames) -> Result<(), HookError> {
        self.point(frames.first, frames.count, |_| None)
    }

    fn point(&mut self, first: u32, count: u32, to: impl Fn(u32) -> Option<u32>) -> Result<(), HookError> {
        let mut old: Option<Run> = None;
        for at in 0..count {
            let before = self.table.block_of(first + at)?;
            self.table.set_block(first + at, to(at))?;
            let Some(block) = before else { continue };
            match &mut old {
                Some(run) if run.end() == block => run.count += 1,
                _ => {
                    let run = old.replace(Run { first: block, count: 1 });
                    run.into_iter().for_each(|run| self.release(run));
                }
            }
        }
        old.into_iter().for_each(|run| self.release(run));
        Ok(())
    }

    /// Where the pages of frames lie, in pieces of at most `most` frames.
    ///
    /// # Errors
    /// As [`Store::publish`].
    pub fn parts(&self, frames: Frames, most: u32) -> Result<Vec<Part>, HookError> {
        let mut parts: Vec<Part> = Vec::new();
        for frame in frames.first..frames.first + frames.count {
            let block = self.table.block_of(frame)?;
            if let Some(Part { frames, block: begin }) = parts.last_mut() {
                let follows = match (*begin, block) {
                    (None, None) => true,
                    (Some(begin), Some(block)) => frames.count < most && begin + frames.count == block,
                    _ => false,
                };
                if follows {
                    frames.count += 1;
                    continue;
                }
            }
            parts.push(Part { frames: Frames { first: frame, count: 1 }, block });
        }
        Ok(parts)
    }

    /// A read of these blocks begins: nobody writes to them until it has ended.
    pub fn pin(&mut self, run: Run) -> Pin {
        self.next_pin += 1;
        self.pins.push((self.next_pin, run));
        self.next_pin
    }

    /// It has ended.
    pub fn unpin(&mut self, pin: Pin) {
        self.pins.retain(|(other, _)| *other != pin);
        for run in std::mem::take(&mut self.read_still) {
            self.release(run);
        }
    }
}

/// What a block is when a driver begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Free,
    Used,
    Rests,
    Haunted,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Life;

    fn store(frames: u32, blocks: u32) -> Store {
        let (table, _) = Table::create(frames, blocks, Life { owner: [1, 2], number: 3 }, true).unwrap();
        Store::open(table).unwrap()
    }

    fn frames(first: u32, count: u32) -> Frames {
        Frames { first, count }
    }

    #[test]
    fn a_page_that_is_replaced_leaves_its_block_and_a_successor_sees_the_same() {
        let mut store = store(8, 12);
        let first = store.take(4).unwrap();
        assert_eq!(store.parts(frames(0, 8), 64).unwrap(), [Part { frames: frames(0, 8), block: None }]);
        store.publish(2, first).unwrap();
        assert_eq!(store.free_blocks(), 8);
        let second = store.take(2).unwrap();
        store.publish(3, second).unwrap();
        assert_eq!(store.free_blocks(), 8, "two taken, two given back");
        let expected = [
            Part { frames: frames(0, 2), block: None },
            Part { frames: frames(2, 1), block: Some(first.first) },
            Part { frames: frames(3, 2), block: Some(second.first) },
            Part { frames: frames(5, 1), block: Some(first.first + 3) },
            Part { frames: frames(6, 2), block: None },
        ];
        assert_eq!(store.parts(frames(0, 8), 64).unwrap(), expected);
        assert_eq!(store.parts(frames(3, 2), 1).unwrap().len(), 2, "no longer than asked for");
        let next = Store::open(store.table().clone()).unwrap();
        assert_eq!((next.free_blocks(), next.parts(frames(0, 8), 64).unwrap()), (8, expected.to_vec()));
        store.zero(frames(0, 8)).unwrap();
        assert_eq!(store.free_blocks(), 12);
    }

    #[test]
    fn blocks_that_are_read_or_not_answered_for_rest() {
        let mut store = store(8, 8);
        let run = store.take(8).unwrap();
        store.publish(0, run).unwrap();
        let (one, two) = (store.pin(Run { first: 2, count: 2 }), store.pin(Run { first: 3, count: 3 }));
        store.zero(frames(0, 8)).unwrap();
        assert_eq!(store.free_blocks(), 4, "0, 1, 6, 7");
        store.unpin(one);
        assert_eq!(store.free_blocks(), 5, "3 is read by the other one too");
        store.unpin(two);
        assert_eq!(store.free_blocks(), 8);
        let run = store.take(3).unwrap();
        store.rest(7, run);
        store.session_is_dead(6);
        assert_eq!((store.free_blocks(), store.resting_blocks()), (5, 3));
        store.session_is_dead(7);
        assert_eq!((store.free_blocks(), store.resting_blocks()), (8, 0));
    }

    #[test]
    fn what_a_dead_driver_had_begun_rests_until_that_is_over() {
        let mut store = store(8, 8);
        let (written, begun) = (store.take(2).unwrap(), store.take(3).unwrap());
        for block in (written.first..written.end()).chain(begun.first..begun.end()) {
            store.table().next_generation(block).unwrap();
        }
        store.publish(0, written).unwrap();
        let settled = Store::open(store.table().clone()).unwrap();
        assert_eq!((settled.free_blocks(), settled.resting_blocks()), (6, 0));
        let mut next = Store::open_after_death(store.table().clone()).unwrap();
        assert_eq!((next.free_blocks(), next.resting_blocks()), (3, 3), "answered writes are over");
        next.session_is_dead(PREDECESSOR);
        assert_eq!((next.free_blocks(), next.resting_blocks()), (6, 0));
        let later = Store::open_after_death(store.table().clone()).unwrap();
        assert_eq!(later.free_blocks(), 6, "and that is noted");
    }

    #[test]
    fn a_page_that_one_replica_may_still_write_keeps_its_block_from_others() {
        let mut store = store(8, 8);
        let run = store.take(2).unwrap();
        (run.first..run.end()).for_each(|block| assert_eq!(store.table().next_generation(block).unwrap(), 1));
        store.haunt(5, run);
        store.publish(0, run).unwrap();
        store.zero(frames(0, 8)).unwrap();
        assert_eq!((store.free_blocks(), store.table().is_open(run.first).unwrap()), (6, true));
        store.session_is_dead(5);
        assert_eq!((store.free_blocks(), store.table().is_open(run.first).unwrap()), (8, false));
    }

    #[test]
    fn a_damaged_table_is_noticed() {
        for block in [3, 8, u32::MAX - 1] {
            let store = store(8, 8);
            store.table().set_block(1, Some(3)).unwrap();
            store.table().set_block(5, Some(block)).unwrap();
            assert!(matches!(Store::open(store.table().clone()), Err(StoreError::Damaged { frame: 5 })));
        }
    }
}
