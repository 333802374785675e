//! Which frames are free, so that a run of them is found in a few steps however large and however full the device is: a tree over groups of
//! 64 frames, whose nodes know the longest run below them.
//!
//! ```text
//!   node    | before: free at its start | longest | after: free at its end | block: has 512 aligned ones |
//!            two neighbours: longest = max(left, right, left.after + right.before)
//!   leaf    a word, one bit a frame
//! ```

use crate::frames::HUGE_PAGES;

const LEAF: u32 = 64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Node {
    before: u32,
    longest: u32,
    after: u32,
    block: bool,
}

impl Node {
    fn of_word(word: u64) -> Self {
        if word == u64::MAX {
            return Self { before: LEAF, longest: LEAF, after: LEAF, block: false };
        }
        let (mut longest, mut left) = (0, word);
        while left != 0 {
            left &= left << 1;
            longest += 1;
        }
        Self { before: word.trailing_ones(), longest, after: word.leading_ones(), block: false }
    }

    /// Of two neighbours of `len` frames each.
    fn of(left: Self, right: Self, len: u32) -> Self {
        let longest = left.longest.max(right.longest).max(left.after + right.before);
        Self {
            before: if left.before == len { len + right.before } else { left.before },
            longest,
            after: if right.after == len { len + left.after } else { right.after },
            block: left.block || right.block || len * 2 == HUGE_PAGES && longest == HUGE_PAGES,
        }
    }
}

/// A search for a run of free frames.
struct Search {
    /// No frame below counts.
    from: u64,
    want: u32,
    /// Free frames that end where the search has come to.
    carry: u32,
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct FreeFrames {
    words: Vec<u64>,
    /// The root is 1; the children of n are 2n and 2n + 1.
    nodes: Vec<Node>,
    leaves: usize,
    /// Nodes that searches have looked at.
    #[cfg(test)]
    looks: std::cell::Cell<u32>,
}

impl FreeFrames {
    /// All free.
    pub fn new(count: u32) -> Self {
        let leaves = (count.div_ceil(LEAF).max(HUGE_PAGES / LEAF) as usize).next_power_of_two();
        let mut free = Self {
            words: vec![0; leaves],
            nodes: vec![Node::default(); leaves * 2],
            leaves,
            #[cfg(test)]
            looks: std::cell::Cell::default(),
        };
        free.set(0, count, true);
        free
    }

    /// A frame is in use, and no search is made before [`Self::settle`].
    pub fn take(&mut self, frame: u32) {
        self.words[(frame / LEAF) as usize] &= !(1 << (frame % LEAF));
    }

    /// After many were taken.
    pub fn settle(&mut self) {
        for (leaf, word) in self.words.iter().enumerate() {
            self.nodes[self.leaves + leaf] = Node::of_word(*word);
        }
        self.join(self.leaves, self.leaves * 2 - 1);
    }

    /// Frames are free from now on, or in use.
    pub fn set(&mut self, first: u32, count: u32, is_free: bool) {
        if count == 0 {
            return;
        }
        let (low, high) = ((first / LEAF) as usize, ((first + count - 1) / LEAF) as usize);
        for leaf in low..=high {
            let start = leaf as u32 * LEAF;
            let (from, to) = (first.max(start) - start, (first + count).min(start + LEAF) - start);
            let bits = u64::MAX >> (LEAF - (to - from)) << from;
            let word = &mut self.words[leaf];
            *word = if is_free { *word | bits } else { *word & !bits };
            self.nodes[self.leaves + leaf] = Node::of_word(*word);
        }
        self.join(low + self.leaves, high + self.leaves);
    }

    /// Nodes of one level have changed: so do those above.
    fn join(&mut self, mut low: usize, mut high: usize) {
        let mut len = LEAF;
        while low > 1 {
            (low, high) = (low / 2, high / 2);
            for node in low..=high {
                self.nodes[node] = Node::of(self.nodes[node * 2], self.nodes[node * 2 + 1], len);
            }
            len *= 2;
        }
    }

    /// First run of `want` frames from `next` on, else from the start, else the longest one: first frame and count.
    pub fn find(&self, want: u32, next: u32) -> Option<(u32, u32)> {
        let longest = self.nodes[1].longest;
        if longest == 0 || want == 0 {
            return None;
        }
        let want = want.min(longest);
        let found = self.find_from(want, next).or_else(|| self.find_from(want, 0));
        found.map(|start| (start, want))
    }

    fn find_from(&self, want: u32, from: u32) -> Option<u32> {
        let mut search = Search { from: u64::from(from), want, carry: 0 };
        let whole = self.leaves as u64 * u64::from(LEAF);
        self.visit(1, 0, whole, &mut search).map(|start| start as u32)
    }

    fn visit(&self, at: usize, start: u64, len: u64, search: &mut Search) -> Option<u64> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        if start + len <= search.from {
            return None;
        }
        let node = self.nodes[at];
        let is_whole = start >= search.from;
        if is_whole && search.carry + node.before >= search.want {
            return Some(start - u64::from(search.carry));
        }
        if is_whole && node.longest < search.want {
            search.carry = if u64::from(node.before) == len { search.carry + node.before } else { node.after };
            return None;
        }
        if at >= self.leaves {
            return self.visit_leaf(at - self.leaves, start, search);
        }
        let half = len / 2;
        let left = self.visit(at * 2, start, half, search);
        left.or_else(|| self.visit(at * 2 + 1, start + half, half, search))
    }

    fn visit_leaf(&self, leaf: usize, start: u64, search: &mut Search) -> Option<u64> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        let word = self.words[leaf];
        let from = search.from.saturating_sub(start);
        for bit in from..u64::from(LEAF) {
            search.carry = if word >> bit & 1 != 0 { search.carry + 1 } else { 0 };
            if search.carry == search.want {
                return Some(start + bit + 1 - u64::from(search.want));
            }
        }
        None
    }

    /// The first 512 free frames that begin at a multiple of 512.
    pub fn find_block(&self) -> Option<u32> {
        let mut at = 1;
        let mut len = self.leaves as u32 / (HUGE_PAGES / LEAF);
        if !self.nodes[at].block {
            return None;
        }
        let mut start = 0;
        while len > 1 {
            #[cfg(test)]
            self.looks.set(self.looks.get() + 1);
            len /= 2;
            at *= 2;
            if !self.nodes[at].block {
                (at, start) = (at + 1, start + len);
            }
        }
        Some(start * HUGE_PAGES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: &mut u64, below: u32) -> u32 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*seed >> 33) as u32 % below
    }

    /// Frame by frame.
    fn naive(free: &[bool], want: u32, next: u32) -> Option<(u32, u32)> {
        let run_at = |start: usize| free[start..].iter().take_while(|free| **free).count() as u32;
        let longest = (0..free.len()).map(run_at).max().filter(|longest| *longest > 0)?;
        let want = want.min(longest);
        let start = (next as usize..free.len()).chain(0..free.len()).find(|start| run_at(*start) >= want)?;
        Some((start as u32, want))
    }

    #[test]
    fn what_is_found_is_what_a_look_at_every_frame_finds() {
        let mut seed = 1;
        for count in [1, 63, 64, 65, 700, 1100, 2048] {
            let mut free = FreeFrames::new(count);
            let mut array = vec![true; count as usize];
            for _ in 0..600 {
                let first = random(&mut seed, count);
                let run = 1 + random(&mut seed, (count - first).min(150));
                let on = random(&mut seed, 3) == 0;
                free.set(first, run, on);
                array[first as usize..(first + run) as usize].fill(on);
                let (want, next) = (1 + random(&mut seed, 90), random(&mut seed, count));
                assert_eq!(free.find(want, next), naive(&array, want, next), "{want} from {next} of {count}");
                let block = array.chunks_exact(512).position(|block| block.iter().all(|free| *free));
                assert_eq!(free.find_block(), block.map(|block| block as u32 * 512));
                if random(&mut seed, 40) == 0 {
                    (free, array) = (FreeFrames::new(count), vec![true; count as usize]);
                    for frame in (0..count).filter(|_| random(&mut seed, 100) == 0) {
                        free.take(frame);
                        array[frame as usize] = false;
                    }
                    free.settle();
                }
            }
        }
    }

    #[test]
    fn a_search_of_a_device_that_is_nearly_full_takes_as_many_steps_as_its_size_has_bits() {
        for count in [1 << 16, 1 << 22] {
            let mut free = FreeFrames::new(count);
            free.set(0, count, false);
            // Crumbs everywhere, three in a row far away, and a block at the end.
            (0..count).step_by(1000).for_each(|frame| free.set(frame, 1, true));
            free.set(count / 4 * 3 + 17, 3, true);
            free.set(count - 512, 512, true);
            let steps = |search: &dyn Fn() -> Option<(u32, u32)>, found| {
                free.looks.set(0);
                assert_eq!(search(), Some(found));
                free.looks.get()
            };
            let most = 8 * count.ilog2();
            assert!(steps(&|| free.find(3, 5), (count / 4 * 3 + 17, 3)) <= most);
            assert!(steps(&|| free.find(400, 5), (count - 512, 400)) <= most);
            assert!(steps(&|| free.find(4000, count - 100), (count - 512, 512)) <= most, "there is no longer one");
            assert!(steps(&|| free.find_block().map(|start| (start, 512)), (count - 512, 512)) <= most);
        }
    }
}
