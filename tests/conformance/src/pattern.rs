//! Recognisable contents: every 8-byte word says which seed and which word it belongs to.

/// The word at `index` (counted in 8-byte words from the start of the range) under `seed`. Never zero, so that lost pages show.
pub(crate) fn word(seed: u64, index: u64) -> u64 {
    let mixed = (index ^ seed.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 31)) | 1
}

/// `len_bytes` bytes of the pattern, from byte `offset` of the range on. Both are multiples of eight.
pub(crate) fn bytes(seed: u64, offset: u64, len_bytes: u64) -> Vec<u8> {
    (offset / 8..(offset + len_bytes) / 8).flat_map(|index| word(seed, index).to_ne_bytes()).collect()
}

/// Where two equally long byte strings first differ, in words that a person can use.
pub(crate) fn difference(found: &[u8], expected: &[u8], offset: u64) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} bytes where {} were expected", found.len(), expected.len()));
    }
    let at = found.iter().zip(expected).position(|(a, b)| a != b)?;
    let count = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    let word = |bytes: &[u8]| {
        let start = at / 8 * 8;
        let mut eight = [0; 8];
        let end = bytes.len().min(start + 8);
        eight[..end - start].copy_from_slice(&bytes[start..end]);
        u64::from_ne_bytes(eight)
    };
    let place = offset + at as u64;
    Some(format!(
        "{count} of {} bytes differ, the first at offset {place:#x} (page {}): {:#018x} where {:#018x} was expected",
        found.len(),
        place / 4096,
        word(found),
        word(expected),
    ))
}

/// Small seeded generator (xorshift64*); the same seed gives the same run.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// Seeded.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }

    /// Next 64 bits.
    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }
}

/// A number that differs for different names: each case has its own seeds.
pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_differ_by_seed_and_place_and_are_never_zero() {
        assert_ne!(word(1, 0), word(2, 0));
        assert_ne!(word(1, 0), word(1, 1));
        assert!((0..100_000).all(|index| word(0, index) != 0));
        assert_eq!(bytes(7, 16, 8), word(7, 2).to_ne_bytes());
    }

    #[test]
    fn a_difference_names_place_and_values() {
        let good = bytes(1, 0, 8192);
        assert_eq!(difference(&good, &good, 0), None);
        let mut bad = good.clone();
        bad[4104..4112].fill(0);
        let text = difference(&bad, &good, 0x10000).unwrap();
        assert!(text.contains("page 17") && text.contains("0x11008") && text.contains("0x0000000000000000"), "{text}");
        assert!(difference(&good[..8], &good, 0).is_some());
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let draw = |seed| (0..4).map(|_| Rng::new(seed).below(1000)).collect::<Vec<_>>();
        assert_eq!(draw(5), draw(5));
        let mut rng = Rng::new(5);
        assert!((0..1000).map(|_| rng.below(10)).all(|value| value < 10));
    }
}
