//! The vault: descriptors by owner and name. Bounded, sorted, nothing else.

use std::collections::BTreeMap;
use std::ops::Bound;

use uhmm_ipc::message::Fd;

/// Most entries of one service: five a client process and two a region add up.
const ENTRIES_MAX: usize = 16_384;
/// Longest name.
const NAME_BYTES_MAX: usize = 128;
/// Descriptors in one answer.
const PAGE_ENTRIES: usize = 12;

/// See the module head.
#[derive(Debug, Default)]
pub struct Vault {
    owners: BTreeMap<String, BTreeMap<String, Fd>>,
}

impl Vault {
    /// Keeps, or replaces.
    pub fn put(&mut self, owner: &str, name: String, fd: Fd) -> Result<(), String> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(format!("Vault name of {} bytes is not allowed: use 1 to {NAME_BYTES_MAX}", name.len()));
        }
        let entries = self.owners.entry(owner.to_owned()).or_default();
        if entries.len() >= ENTRIES_MAX && !entries.contains_key(&name) {
            return Err(format!("{owner} keeps {ENTRIES_MAX} descriptors already: remove some"));
        }
        entries.insert(name, fd);
        Ok(())
    }

    /// One page of what is below a prefix; true when more follows.
    pub fn page(&self, owner: &str, prefix: &str, after: &str) -> (Vec<(String, Fd)>, bool) {
        let entries = self.owners.get(owner);
        let below = entries.into_iter().flatten().filter(|(name, _)| name.starts_with(prefix) && name.as_str() > after);
        let mut page: Vec<(String, Fd)> =
            below.take(PAGE_ENTRIES + 1).map(|(name, fd)| (name.clone(), fd.clone())).collect();
        let more = page.len() > PAGE_ENTRIES;
        page.truncate(PAGE_ENTRIES);
        (page, more)
    }

    /// Forgets what is below a prefix.
    pub fn remove(&mut self, owner: &str, prefix: &str) {
        if let Some(entries) = self.owners.get_mut(owner) {
            let below = entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
            let below = below.map(|(name, _)| name).take_while(|name| name.starts_with(prefix));
            for name in below.cloned().collect::<Vec<_>>() {
                entries.remove(&name);
            }
        }
    }

    /// By owner and name.
    pub fn get(&self, owner: &str, name: &str) -> Option<Fd> {
        self.owners.get(owner)?.get(name).cloned()
    }

    /// How many an owner keeps.
    pub fn count(&self, owner: &str) -> usize {
        self.owners.get(owner).map_or(0, BTreeMap::len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use super::*;

    fn fd() -> Fd {
        Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").expect("/dev/null")))
    }

    #[test]
    fn pages_are_sorted_complete_and_private_to_the_owner() {
        let mut vault = Vault::default();
        for index in 0..30 {
            vault.put("pager", format!("space/{index:02}/uffd"), fd()).expect("put");
        }
        vault.put("soft0", "space/99/uffd".into(), fd()).expect("put");
        let (mut names, mut after) = (Vec::new(), String::new());
        loop {
            let (page, more) = vault.page("pager", "space/", &after);
            names.extend(page.into_iter().map(|(name, _)| name));
            after = names.last().cloned().unwrap_or_default();
            if !more {
                break;
            }
        }
        assert_eq!(names.len(), 30);
        assert!(names.is_sorted());
        vault.remove("pager", "space/0");
        assert_eq!((vault.count("pager"), vault.count("soft0")), (20, 1));
    }

    #[test]
    fn names_and_counts_are_bounded() {
        let mut vault = Vault::default();
        assert!(vault.put("pager", String::new(), fd()).is_err());
        assert!(vault.put("pager", "x".repeat(129), fd()).is_err());
        let shared = fd();
        for index in 0..ENTRIES_MAX {
            vault.put("pager", format!("{index}"), shared.clone()).expect("put");
        }
        assert!(vault.put("pager", "one more".into(), shared.clone()).is_err());
        assert!(vault.put("pager", "7".into(), shared).is_ok(), "replacing is possible when full");
    }
}
