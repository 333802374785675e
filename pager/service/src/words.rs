//! An array of one word a page that costs nothing for what is all the same: in a directory's memfd, in two levels.
//!
//! ```text
//!   block words, one for 512 pages:   0: as the array began   1 (MIXED): see below   anything else: !word of all 512 (never 0 or 1)
//!   page words, one a page:           valid where the block is MIXED
//! ```
//! Nothing is looked at that was never written (a look alone would make a page of the memfd), so a terabyte that nobody touched costs
//! neither memory nor time. A block becomes MIXED after its 512 words were written, and whole again by one store: a pager that dies leaves
//! the old words or the new ones.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Release};

use uhmm_kernel_hook::window::Window;
use uhmm_kernel_hook::{HookError, PAGE_SIZE};

/// Pages of a block.
const BLOCK: u64 = 512;
const MIXED: u64 = 1;
/// Block words in a page of the memfd: 1 GiB of memory.
const SHEET: u64 = PAGE_SIZE / 8;
/// Most block words that one question looks at.
const LOOKS_MAX: u32 = 8192;

/// See the module head.
#[derive(Debug)]
pub struct Words {
    /// Where it lies in the file.
    offset: u64,
    count: u64,
    /// What was never written is.
    default: u64,
    /// What is known of the blocks of each page of block words. The first one lies here: most arrays have no other.
    sheet: Sheet,
    sheets: Vec<Sheet>,
}

/// What is known of a page of block words.
#[derive(Clone, Debug, Default)]
struct Sheet {
    /// Some may have been written.
    written: Cell<bool>,
    /// Blocks that are known to be MIXED, a bit each: their words need not be looked at.
    mixed: [Cell<u64>; SHEET as usize / 64],
}

impl Sheet {
    fn bit(&self, block: u64) -> (&Cell<u64>, u64) {
        let in_sheet = block % SHEET;
        (&self.mixed[(in_sheet / 64) as usize], 1 << (in_sheet % 64))
    }

    fn is_mixed(&self, block: u64) -> bool {
        let (word, bit) = self.bit(block);
        word.get() & bit != 0
    }

    fn set_mixed(&self, block: u64, on: bool) {
        let (word, bit) = self.bit(block);
        word.set(if on { word.get() | bit } else { word.get() & !bit });
    }
}

/// A block, as its word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    All(u64),
    Mixed,
}

fn blocks(count: u64) -> u64 {
    count.div_ceil(BLOCK)
}

impl Words {
    /// Bytes that an array takes, a multiple of the page size.
    pub fn bytes(count: u64) -> u64 {
        (blocks(count) * 8).next_multiple_of(PAGE_SIZE) + (count * 8).next_multiple_of(PAGE_SIZE)
    }

    /// The array at an offset. `fresh`: nothing of it was ever written.
    pub fn at(offset: u64, count: u64, default: u64, fresh: bool) -> Self {
        let sheet = Sheet { written: Cell::new(!fresh), ..Sheet::default() };
        let more = blocks(count).div_ceil(SHEET).saturating_sub(1);
        Self { offset, count, default, sheets: vec![sheet.clone(); more as usize], sheet }
    }

    fn block_offset(&self, block: u64) -> u64 {
        self.offset + block * 8
    }

    fn page_offset(&self, page: u64) -> u64 {
        self.offset + (blocks(self.count) * 8).next_multiple_of(PAGE_SIZE) + page * 8
    }

    /// Of a block of this array.
    fn sheet(&self, block: u64) -> &Sheet {
        match (block / SHEET).checked_sub(1) {
            None => &self.sheet,
            Some(more) => self.sheets.get(more as usize).unwrap_or(&self.sheet),
        }
    }

    fn was_written(&self, block: u64) -> bool {
        self.sheet(block).written.get()
    }

    fn block(&self, window: &Window, block: u64) -> Block {
        let sheet = self.sheet(block);
        if !sheet.written.get() {
            return Block::All(self.default);
        }
        if sheet.is_mixed(block) {
            return Block::Mixed;
        }
        match window.atomic_u64(self.block_offset(block)).map_or(0, |word| word.load(Acquire)) {
            0 => Block::All(self.default),
            MIXED => {
                sheet.set_mixed(block, true);
                Block::Mixed
            }
            word => Block::All(!word),
        }
    }

    /// One word; outside of the array it is the default.
    pub fn load(&self, window: &Window, page: u64) -> u64 {
        if page >= self.count {
            return self.default;
        }
        match self.block(window, page / BLOCK) {
            Block::All(word) => word,
            Block::Mixed => window.atomic_u64(self.page_offset(page)).map_or(self.default, |word| word.load(Acquire)),
        }
    }

    /// How many words from this one on are known to be the same, and the word.
    pub fn look(&self, window: &Window, page: u64) -> (u64, u64) {
        if page >= self.count {
            return (1, self.default);
        }
        match self.block(window, page / BLOCK) {
            Block::All(word) => (self.alike(window, page), word),
            Block::Mixed => (1, self.load(window, page)),
        }
    }

    /// How many words from this one on are known to be the same: at least one.
    pub fn alike(&self, window: &Window, page: u64) -> u64 {
        if page >= self.count {
            return 1;
        }
        let first = page / BLOCK;
        let Block::All(word) = self.block(window, first) else { return 1 };
        let mut block = first + 1;
        let mut looks = 0;
        while block < blocks(self.count) && looks < LOOKS_MAX {
            looks += 1;
            if !self.was_written(block) && word == self.default {
                block = (block / SHEET + 1) * SHEET;
            } else if self.block(window, block) == Block::All(word) {
                block += 1;
            } else {
                break;
            }
        }
        (block * BLOCK).min(self.count) - page
    }

    /// Writes one word.
    pub fn store(&self, window: &Window, page: u64, word: u64) -> Result<(), HookError> {
        self.update(window, page, 1, |_| word)
    }

    /// Replaces each word of a range by what `change` makes of it. Blocks whose words are all the same are asked for once, and are so again if
    /// they lie in the range as a whole.
    pub fn update(
        &self,
        window: &Window,
        first: u64,
        count: u64,
        change: impl Fn(u64) -> u64,
    ) -> Result<(), HookError> {
        self.in_blocks(first, count, |block, pages, whole| match self.block(window, block) {
            Block::All(word) if change(word) == word => Ok(()),
            Block::All(word) if whole => self.set_block(window, block, Block::All(change(word))),
            Block::All(word) => {
                self.mix(window, block, word)?;
                pages.into_iter().try_for_each(|page| self.set_page(window, page, change(word)))
            }
            Block::Mixed => pages.into_iter().try_for_each(|page| {
                let word = self.load(window, page);
                if change(word) == word { Ok(()) } else { self.set_page(window, page, change(word)) }
            }),
        })
    }

    /// As `update`, with one word for all: what was of many kinds is of one again.
    pub fn fill(&self, window: &Window, first: u64, count: u64, word: u64) -> Result<(), HookError> {
        self.in_blocks(first, count, |block, pages, whole| match self.block(window, block) {
            Block::All(old) if old == word => Ok(()),
            _ if whole => self.set_block(window, block, Block::All(word)),
            Block::All(old) => {
                self.mix(window, block, old)?;
                pages.into_iter().try_for_each(|page| self.set_page(window, page, word))
            }
            Block::Mixed => pages.into_iter().try_for_each(|page| self.set_page(window, page, word)),
        })
    }

    /// Block by block: its number, its pages in the range, and whether these are all of them.
    fn in_blocks(
        &self,
        first: u64,
        count: u64,
        mut each: impl FnMut(u64, Range<u64>, bool) -> Result<(), HookError>,
    ) -> Result<(), HookError> {
        let end = first.saturating_add(count).min(self.count);
        let mut page = first;
        while page < end {
            let block = page / BLOCK;
            let block_end = ((block + 1) * BLOCK).min(self.count);
            each(block, page..end.min(block_end), page == block * BLOCK && end >= block_end)?;
            page = block_end;
        }
        Ok(())
    }

    /// From here on the page words count.
    fn mix(&self, window: &Window, block: u64, word: u64) -> Result<(), HookError> {
        let end = ((block + 1) * BLOCK).min(self.count);
        (block * BLOCK..end).try_for_each(|page| self.set_page(window, page, word))?;
        self.set_block(window, block, Block::Mixed)
    }

    fn set_page(&self, window: &Window, page: u64, word: u64) -> Result<(), HookError> {
        window.atomic_u64(self.page_offset(page))?.store(word, Release);
        Ok(())
    }

    fn set_block(&self, window: &Window, block: u64, value: Block) -> Result<(), HookError> {
        let sheet = self.sheet(block);
        sheet.written.set(true);
        // The word itself is stored below; what is known of it is this pager's alone.
        sheet.set_mixed(block, value == Block::Mixed);
        let word = match value {
            Block::Mixed => MIXED,
            Block::All(word) if word == self.default => 0,
            Block::All(word) => !word,
        };
        window.atomic_u64(self.block_offset(block))?.store(word, Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use uhmm_kernel_hook::memfd;
    use uhmm_kernel_hook::window::Prot;

    use super::*;

    fn memory(count: u64) -> Window {
        let fd = memfd::create_sealed("uhmm-test", Words::bytes(count)).unwrap();
        Window::map(fd.as_fd(), 0, Words::bytes(count), Prot::ReadWrite).unwrap()
    }

    fn random(seed: &mut u64, below: u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*seed >> 33) % below
    }

    /// Changes both in some way.
    fn change(seed: &mut u64, window: &Window, words: &Words, array: &mut [u64]) {
        let count_all = array.len() as u64;
        let (mut first, mut count, word) = (random(seed, count_all), random(seed, 900), random(seed, 4));
        if random(seed, 2) == 0 {
            (first, count) = (first / BLOCK * BLOCK, random(seed, 4) * BLOCK);
        }
        let range = first as usize..(first + count).min(count_all) as usize;
        match random(seed, 3) {
            0 => {
                words.fill(window, first, count, word).unwrap();
                array[range].fill(word);
            }
            1 => {
                words.store(window, first, word).unwrap();
                array[first as usize] = word;
            }
            _ => {
                words.update(window, first, count, |old| old ^ word).unwrap();
                array[range].iter_mut().for_each(|old| *old ^= word);
            }
        }
    }

    #[test]
    fn words_are_those_of_an_array_also_for_the_next_pager() {
        let mut seed = 1u64;
        for default in [0, 1] {
            let count = 5 * BLOCK + 17;
            let window = memory(count);
            let mut words = Words::at(0, count, default, true);
            let mut array = vec![default; count as usize];
            for round in 0..300 {
                change(&mut seed, &window, &words, &mut array);
                let seen: Vec<u64> = (0..count).map(|page| words.load(&window, page)).collect();
                assert_eq!(seen, array, "round {round}");
                for page in 0..count {
                    let alike = words.alike(&window, page);
                    let run = &array[page as usize..(page + alike) as usize];
                    assert!(alike > 0 && run.iter().all(|word| *word == run[0]));
                    assert_eq!(words.look(&window, page), (alike, run[0]));
                }
                if round % 50 == 49 {
                    words = Words::at(0, count, default, false);
                }
            }
        }
    }

    #[test]
    fn a_terabyte_that_is_all_the_same_costs_next_to_nothing() {
        let count = 1 << 28;
        let fd = memfd::create_sealed("uhmm-test", Words::bytes(count)).unwrap();
        let window = Window::map(fd.as_fd(), 0, Words::bytes(count), Prot::ReadWrite).unwrap();
        let words = Words::at(0, count, 1, true);
        assert_eq!(words.alike(&window, 0), count);
        assert_eq!((words.load(&window, count - 1), words.load(&window, count)), (1, 1));
        words.fill(&window, 0, count, 1).unwrap();
        assert_eq!(held_bytes(&fd), 0, "nothing was changed, and a look makes no page");
        words.update(&window, 0, count, |_| 7).unwrap();
        assert_eq!(words.load(&window, 12_345_678), 7);
        assert!(held_bytes(&fd) <= 4 << 20, "one word for 512 pages");
        words.store(&window, 12_345_678, 8).unwrap();
        let changed = [12_345_677, 12_345_678, 12_345_679].map(|page| words.load(&window, page));
        assert_eq!(changed, [7, 8, 7]);
        words.fill(&window, 0, count, 1).unwrap();
        assert_eq!(words.load(&window, 12_345_678), 1);
    }

    fn held_bytes(fd: &std::os::fd::OwnedFd) -> u64 {
        let file = std::fs::File::from(fd.try_clone().unwrap());
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512
    }
}
