//! Words of loom: tests only.

use std::sync::atomic::Ordering;

use loom::sync::atomic::AtomicU64 as LoomU64;

use super::words::Words;

/// loom's atomics in the place of shared memory: the algorithms' own code runs under the model.
pub(crate) struct ModelWords(Vec<LoomU64>);

impl ModelWords {
    /// That many zero words.
    pub(crate) fn new(word_count: u64) -> Self {
        Self((0..word_count).map(|_| LoomU64::new(0)).collect())
    }
}

impl Words for ModelWords {
    fn word_count(&self) -> usize {
        self.0.len()
    }
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.0[index].load(order)
    }
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0[index].store(value, order);
    }
    fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
        self.0[index].swap(value, order)
    }
    fn compare_exchange(
        &self,
        index: usize,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.0[index].compare_exchange(current, new, success, failure)
    }
    fn fence(&self, order: Ordering) {
        loom::sync::atomic::fence(order);
    }
}
