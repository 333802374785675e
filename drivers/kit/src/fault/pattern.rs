//! How much to ask for with one fault: 64 pages, and up to 512 for a job that marches through a region.

use crate::device::PageRange;

/// Pages of an ordinary window, aligned: 256 KiB. The answer costs one hop whatever its size, and 64 pages are what the
/// pager moves in about the time of that hop.
pub const WINDOW_PAGES: u64 = 64;
/// Pages of a sequential window, up to the next multiple of it: 2 MiB, the pager's chunk.
pub const SEQUENTIAL_WINDOW_PAGES: u64 = 512;
/// Windows in a row that make a march.
const SEQUENTIAL_AFTER: u32 = 2;
/// Marches followed at once in one region (as many as a device has busy workers, roughly).
const STREAMS: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    next_page: u64,
    windows_in_a_row: u32,
    last_used: u64,
}

/// What a region's past faults look like.
#[derive(Debug, Default)]
pub(super) struct Pattern {
    streams: [Stream; STREAMS],
    faults: u64,
}

impl Pattern {
    /// The window around `page`: aligned, inside the region, free of `outstanding` windows (none of which holds the page).
    pub(super) fn window(
        &mut self,
        page: u64,
        page_count: u64,
        outstanding: impl Iterator<Item = PageRange>,
    ) -> PageRange {
        self.faults += 1;
        let base = page - page % WINDOW_PAGES;
        let slot = self.stream_for(base);
        let stream = &mut self.streams[slot];
        let unit = if stream.windows_in_a_row >= SEQUENTIAL_AFTER { SEQUENTIAL_WINDOW_PAGES } else { WINDOW_PAGES };
        let mut end = ((base / unit + 1) * unit).min(page_count);
        let mut first = base;
        for other in outstanding {
            if other.first > page {
                end = end.min(other.first);
            } else {
                first = first.max(other.end());
            }
        }
        stream.next_page = end;
        stream.last_used = self.faults;
        PageRange { first, count: end - first }
    }

    /// The march that expects this window, one step longer; or the oldest, begun anew.
    fn stream_for(&mut self, base: u64) -> usize {
        if let Some(slot) = self.streams.iter().position(|s| s.last_used > 0 && s.next_page == base) {
            self.streams[slot].windows_in_a_row += 1;
            return slot;
        }
        let oldest = (0..STREAMS).min_by_key(|&slot| self.streams[slot].last_used).unwrap_or(0);
        self.streams[oldest] = Stream::default();
        oldest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(pattern: &mut Pattern, page: u64) -> (u64, u64) {
        let range = pattern.window(page, 10_000, std::iter::empty());
        (range.first, range.count)
    }

    #[test]
    fn single_faults_get_aligned_windows_that_hold_the_page() {
        let mut pattern = Pattern::default();
        assert_eq!(window(&mut pattern, 1000), (960, 64));
        assert_eq!(window(&mut pattern, 63), (0, 64));
        assert_eq!(window(&mut pattern, 64 * 50), (64 * 50, 64));
    }

    #[test]
    fn a_march_grows_to_big_windows_that_end_at_their_multiples() {
        let mut pattern = Pattern::default();
        assert_eq!(window(&mut pattern, 0), (0, 64));
        assert_eq!(window(&mut pattern, 64), (64, 64));
        assert_eq!(window(&mut pattern, 128), (128, 384));
        assert_eq!(window(&mut pattern, 512), (512, 512));
        assert_eq!(window(&mut pattern, 1024), (1024, 512));
    }

    #[test]
    fn interleaved_marches_are_told_apart() {
        let mut pattern = Pattern::default();
        let mut sizes = Vec::new();
        for step in 0..3 {
            for start in [0, 2048, 4096] {
                sizes.push(window(&mut pattern, start + step * 64).1);
            }
        }
        assert_eq!(sizes, [64, 64, 64, 64, 64, 64, 384, 384, 384]);
    }

    #[test]
    fn windows_never_leave_the_region_nor_overlap() {
        let mut pattern = Pattern::default();
        let last = pattern.window(99, 100, std::iter::empty());
        assert_eq!(last, PageRange { first: 64, count: 36 });
        let others = [PageRange { first: 0, count: 10 }, PageRange { first: 20, count: 10 }];
        assert_eq!(pattern.window(12, 100, others.into_iter()), PageRange { first: 10, count: 10 });
    }
}
