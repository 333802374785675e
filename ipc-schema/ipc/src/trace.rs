//! Trace ids: drawn where a request enters the system, carried by every message that it causes.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::message::TraceId;

static SEED: LazyLock<u64> = LazyLock::new(|| {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
});
static DRAWN: AtomicU64 = AtomicU64::new(0);

impl TraceId {
    /// A new id, never 0, unlike every other of this process and almost surely of the machine. Not a secret.
    pub fn fresh() -> Self {
        let count = DRAWN.fetch_add(1, Ordering::Relaxed);
        // The finalizer of SplitMix64: a bijection, so that ids of one process never collide.
        let mut x = SEED.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        if x == 0 { Self::fresh() } else { Self(x) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn fresh_ids_differ_and_are_never_the_untraced_one() {
        let ids: HashSet<TraceId> = (0..10_000).map(|_| TraceId::fresh()).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(!ids.contains(&TraceId::default()));
    }
}
