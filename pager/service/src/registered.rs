//! Where a region is registered with userfaultfd. What was unmapped or has moved away is taken off the list as soon as its event is
//! read: by the time the region is dropped, another thread may have moved something of its own to these addresses, and must not
//! lose the registration that came along.

use uhmm_kernel_hook::AddrRange;

/// Ranges to unregister when the region is dropped, with their spaces.
#[derive(Debug, Default)]
pub struct Registered(Vec<(u64, AddrRange)>);

impl Registered {
    /// One range.
    pub fn of(space: u64, range: AddrRange) -> Self {
        Self(vec![(space, range)])
    }

    /// One more.
    pub fn add(&mut self, space: u64, range: AddrRange) {
        self.0.push((space, range));
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u64, AddrRange)> {
        self.0.iter().copied()
    }

    /// The same ranges in a forked child.
    pub fn in_child(&self, space: u64) -> Self {
        Self(self.0.iter().map(|(_, range)| (space, *range)).collect())
    }

    /// Addresses that are not the region's any more.
    pub fn left(&mut self, space: u64, gone: AddrRange) {
        let rest = |(of, range): (u64, AddrRange)| {
            let hit = (of == space).then(|| range.intersection(&gone)).flatten();
            let (start, end) = hit.map_or((range.end(), range.end()), |hit| (hit.start, hit.end()));
            let before = AddrRange { start: range.start, len: start - range.start };
            let after = AddrRange { start: end, len: range.end() - end };
            [before, after].into_iter().filter(|part| part.len > 0).map(move |part| (of, part))
        };
        self.0 = std::mem::take(&mut self.0).into_iter().flat_map(rest).collect();
    }
}

impl FromIterator<(u64, AddrRange)> for Registered {
    fn from_iter<T: IntoIterator<Item = (u64, AddrRange)>>(ranges: T) -> Self {
        Self(ranges.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddrRange {
        AddrRange { start, len: end - start }
    }

    #[test]
    fn what_was_unmapped_is_not_unregistered_later() {
        let mut registered = Registered::of(1, range(10, 20));
        registered.add(1, range(30, 40));
        registered.left(2, range(0, 100));
        registered.left(1, range(12, 14));
        registered.left(1, range(18, 33));
        let left: Vec<_> = registered.iter().collect();
        assert_eq!(left, [(1, range(10, 12)), (1, range(14, 18)), (1, range(33, 40))]);
        registered.left(1, range(0, 100));
        assert_eq!(registered.iter().count(), 0);
    }
}
