//! Recognisable page contents: every 8-byte word says which page, which word and which seed it belongs to.

/// The word at `index` (counted in 8-byte words from the region's start) under `seed`.
pub fn word(seed: u64, index: u64) -> u64 {
    let mixed = (index ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// A small generator for seeded tests; the same seed gives the same test.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Seeded.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }

    /// Next 64 bits (xorshift64*).
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }
}

/// A moment, counted in steps of this thread: a timer is too coarse for the middle of something short.
pub fn spin(steps: u64) {
    (0..steps).for_each(|_| std::hint::spin_loop());
}
