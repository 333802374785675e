//! Shared memory as atomic 64-bit words.

use core::ops::Range;
use core::sync::atomic::Ordering;

/// An array of atomic words. Callers keep indices below [`word_count`](Self::word_count).
pub trait Words {
    /// Words there are; never changes.
    fn word_count(&self) -> usize;
    /// Atomic load.
    fn load(&self, index: usize, order: Ordering) -> u64;
    /// Atomic store.
    fn store(&self, index: usize, value: u64, order: Ordering);
    /// Atomic exchange.
    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64;
    /// Atomic compare-and-exchange (strong).
    fn compare_exchange(
        &self,
        index: usize,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64>;
    /// Memory fence.
    fn fence(&self, order: Ordering);
    /// Calls `each` for the parts of a range in which any word was ever written, or more: what is left out reads as zero, and looking at it
    /// would make memory of nothing. What others write meanwhile may be left out.
    fn in_use(&self, range: Range<usize>, each: &mut dyn FnMut(Range<usize>)) {
        each(range);
    }
}

macro_rules! forward {
    ($($handle:ty),*) => {$(
        impl<W: Words + ?Sized> Words for $handle {
            fn word_count(&self) -> usize {
                (**self).word_count()
            }
            fn load(&self, index: usize, order: Ordering) -> u64 {
                (**self).load(index, order)
            }
            fn store(&self, index: usize, value: u64, order: Ordering) {
                (**self).store(index, value, order);
            }
            fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
                (**self).swap(index, value, order)
            }
            fn compare_exchange(
                &self,
                index: usize,
                current: u64,
                new: u64,
                success: Ordering,
                failure: Ordering,
            ) -> Result<u64, u64> {
                (**self).compare_exchange(index, current, new, success, failure)
            }
            fn fence(&self, order: Ordering) {
                (**self).fence(order);
            }
            fn in_use(&self, range: Range<usize>, each: &mut dyn FnMut(Range<usize>)) {
                (**self).in_use(range, each);
            }
        }
    )*};
}

forward!(&W, alloc::sync::Arc<W>);
