//! The vault: descriptors by owner and name. Bounded, sorted, nothing else. Supervisor and holder have one each, with the same in it
//! (`uhmm_kit::Vault` has the owner's side).
//!
//! ```text
//!   begin(owner)  put ...  put(WHOLE_NAME)      what was kept of the owner is replaced by the new set in one step
//!        \____ owner is gone before the mark: the old set stays
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use uhmm_ipc::message::Fd;
use uhmm_kit::WHOLE_NAME;

/// Most entries of one service: five a client process and two a region add up.
const ENTRIES_MAX: usize = 16_384;
/// Longest name.
const NAME_BYTES_MAX: usize = 128;
/// Descriptors in one answer.
const PAGE_ENTRIES: usize = 12;
/// Between owner and name where both are told. Less than every character of a service's name, so that both are sorted alike.
const SEPARATOR: char = '!';

type Entries = BTreeMap<String, Fd>;

#[derive(Debug, Default)]
struct Owner {
    kept: Entries,
    /// A new set that is being handed over.
    coming: Option<Entries>,
}

/// See the module head.
#[derive(Debug, Default)]
pub struct Vault {
    owners: BTreeMap<String, Owner>,
    /// Owner and name of what was put or removed, while somebody wants to know.
    changed: Option<BTreeSet<(String, String)>>,
}

impl Vault {
    /// From now on [`Vault::take_changed`] tells; first of all that there is.
    pub fn tell_changes(&mut self) {
        let all = self.owners.iter().flat_map(|(owner, of)| of.kept.keys().map(|name| (owner.clone(), name.clone())));
        self.changed = Some(all.collect());
    }

    /// Owner and name of what was put, replaced or removed since the last call.
    pub fn take_changed(&mut self) -> BTreeSet<(String, String)> {
        self.changed.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Keeps, or replaces.
    pub fn put(&mut self, owner: &str, name: String, fd: Fd) -> Result<(), String> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(format!("Vault name of {} bytes is not allowed: use 1 to {NAME_BYTES_MAX}", name.len()));
        }
        // Names are parts of lines that the service manager reads (`store.rs`).
        if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':') {
            return Err(format!("Vault name {name:?} is not allowed: use visible ASCII characters without ':'"));
        }
        let of = self.owners.entry(owner.to_owned()).or_default();
        if name == WHOLE_NAME
            && let Some(coming) = of.coming.take()
        {
            let before = std::mem::replace(&mut of.kept, coming);
            note(&mut self.changed, owner, before.keys().chain(of.kept.keys()));
        }
        let coming = of.coming.is_some();
        let entries = of.coming.as_mut().unwrap_or(&mut of.kept);
        if entries.len() >= ENTRIES_MAX && !entries.contains_key(&name) {
            return Err(format!("{owner} keeps {ENTRIES_MAX} descriptors already: remove some"));
        }
        if !coming {
            note(&mut self.changed, owner, [&name]);
        }
        entries.insert(name, fd);
        Ok(())
    }

    /// The owner hands everything over: see the module head.
    pub fn begin(&mut self, owner: &str) {
        self.owners.entry(owner.to_owned()).or_default().coming = Some(Entries::new());
    }

    /// The owner is gone. What it has not handed over to the end does not count.
    pub fn owner_gone(&mut self, owner: &str) {
        if let Some(of) = self.owners.get_mut(owner) {
            of.coming = None;
        }
    }

    /// Whether there is all that the owner has given.
    pub fn is_whole(&self, owner: &str) -> bool {
        self.get(owner, WHOLE_NAME).is_some()
    }

    /// What was copied from somewhere else may lack what its owner has given meanwhile.
    pub fn doubt(&mut self, owner: &str) {
        self.remove(owner, WHOLE_NAME);
    }

    /// The same for every owner.
    pub fn doubt_all(&mut self) {
        for owner in self.owners.keys().cloned().collect::<Vec<_>>() {
            self.doubt(&owner);
        }
    }

    /// One page of what is below a prefix; true when more follows.
    pub fn page(&self, owner: &str, prefix: &str, after: &str) -> (Vec<(String, Fd)>, bool) {
        let Some(of) = self.owners.get(owner) else { return (Vec::new(), false) };
        let left = of.kept.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
        cut(&mut left.filter(|(name, _)| name.starts_with(prefix)).map(|(name, fd)| (name.clone(), fd)))
    }

    /// The same of all owners, each name behind its owner's ([`split`]).
    pub fn page_of_all(&self, after: &str) -> (Vec<(String, Fd)>, bool) {
        let (owner, name) = split(after).unwrap_or_default();
        let owners = self.owners.range::<str, _>((Bound::Included(owner), Bound::Unbounded));
        let mut all = owners.flat_map(|(of, entries)| {
            let seen = if of == owner { Bound::Excluded(name) } else { Bound::Unbounded };
            let left = entries.kept.range::<str, _>((seen, Bound::Unbounded));
            left.map(move |(name, fd)| (joined(of, name), fd))
        });
        cut(&mut all)
    }

    /// Forgets what is below a prefix.
    pub fn remove(&mut self, owner: &str, prefix: &str) {
        if let Some(of) = self.owners.get_mut(owner) {
            let coming = of.coming.is_some();
            let entries = of.coming.as_mut().unwrap_or(&mut of.kept);
            let below = entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
            let below = below.map(|(name, _)| name).take_while(|name| name.starts_with(prefix));
            for name in below.cloned().collect::<Vec<_>>() {
                if !coming {
                    note(&mut self.changed, owner, [&name]);
                }
                entries.remove(&name);
            }
        }
    }

    /// By owner and name.
    pub fn get(&self, owner: &str, name: &str) -> Option<Fd> {
        self.owners.get(owner)?.kept.get(name).cloned()
    }

    /// Everything, under joined names.
    pub fn all(&self) -> Vec<(String, Option<Fd>)> {
        let of = |(owner, of): (&String, &Owner)| {
            of.kept.iter().map(|(name, fd)| (joined(owner, name), Some(fd.clone()))).collect::<Vec<_>>()
        };
        self.owners.iter().flat_map(of).collect()
    }

    /// How many an owner keeps.
    pub fn count(&self, owner: &str) -> usize {
        self.owners.get(owner).map_or(0, |of| of.kept.len())
    }

    /// How many all of them keep.
    pub fn len(&self) -> usize {
        self.owners.values().map(|of| of.kept.len()).sum()
    }
}

fn note<'a>(
    changed: &mut Option<BTreeSet<(String, String)>>,
    owner: &str,
    names: impl IntoIterator<Item = &'a String>,
) {
    if let Some(changed) = changed {
        changed.extend(names.into_iter().map(|name| (owner.to_owned(), name.clone())));
    }
}

/// The other direction of [`split`].
pub fn joined(owner: &str, name: &str) -> String {
    format!("{owner}{SEPARATOR}{name}")
}

/// Owner and name of an entry of [`Vault::page_of_all`].
pub fn split(name: &str) -> Option<(&str, &str)> {
    name.split_once(SEPARATOR)
}

fn cut(entries: &mut dyn Iterator<Item = (String, &Fd)>) -> (Vec<(String, Fd)>, bool) {
    let mut page: Vec<(String, Fd)> = entries.take(PAGE_ENTRIES + 1).map(|(name, fd)| (name, fd.clone())).collect();
    let more = page.len() > PAGE_ENTRIES;
    page.truncate(PAGE_ENTRIES);
    (page, more)
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
        for name in ["two\nlines", "a:b", "a b", "\u{fc}"] {
            assert!(vault.put("pager", name.into(), fd()).is_err_and(|text| text.contains("ASCII")), "{name}");
        }
        let shared = fd();
        for index in 0..ENTRIES_MAX {
            vault.put("pager", format!("{index}"), shared.clone()).expect("put");
        }
        assert!(vault.put("pager", "one more".into(), shared.clone()).is_err());
        assert!(vault.put("pager", "7".into(), shared).is_ok(), "replacing is possible when full");
    }

    #[test]
    fn a_set_that_is_handed_over_replaces_the_old_one_at_its_end_and_not_before() {
        let mut vault = Vault::default();
        vault.put("pager", "old".into(), fd()).expect("put");
        assert!(!vault.is_whole("pager"));
        for last_words in [true, false] {
            vault.begin("pager");
            vault.put("pager", "new".into(), fd()).expect("put");
            vault.put("pager", "gone".into(), fd()).expect("put");
            vault.remove("pager", "gone");
            assert!(vault.get("pager", "old").is_some() && vault.get("pager", "new").is_none());
            if last_words {
                vault.owner_gone("pager");
                assert!(vault.get("pager", "old").is_some() && !vault.is_whole("pager"));
                vault.put("pager", "late".into(), fd()).expect("put");
            } else {
                vault.put("pager", WHOLE_NAME.into(), fd()).expect("put");
            }
        }
        assert!(vault.is_whole("pager"));
        assert_eq!(vault.count("pager"), 2, "new and the mark");
        vault.put("pager", "later".into(), fd()).expect("put");
        assert!(vault.is_whole("pager") && vault.get("pager", "later").is_some());
        vault.doubt_all();
        assert!(!vault.is_whole("pager") && vault.get("pager", "later").is_some());
    }

    #[test]
    fn changes_are_told_once_and_a_set_that_is_coming_is_none_before_its_end() {
        let pair = |owner: &str, name: &str| (owner.to_owned(), name.to_owned());
        let mut vault = Vault::default();
        vault.put("pager", "old".into(), fd()).expect("put");
        assert!(vault.take_changed().is_empty(), "nobody has asked");
        vault.tell_changes();
        assert_eq!(vault.take_changed(), [pair("pager", "old")].into());
        vault.begin("pager");
        vault.put("pager", "new".into(), fd()).expect("put");
        vault.remove("pager", "new");
        vault.put("pager", "new".into(), fd()).expect("put");
        assert!(vault.take_changed().is_empty());
        vault.put("pager", WHOLE_NAME.into(), fd()).expect("put");
        assert_eq!(vault.take_changed(), ["old", "new", WHOLE_NAME].map(|name| pair("pager", name)).into());
        vault.remove("pager", "n");
        assert_eq!(vault.take_changed(), [pair("pager", "new")].into());
        vault.doubt_all();
        assert_eq!(vault.take_changed(), [pair("pager", WHOLE_NAME)].into());
        assert!(vault.take_changed().is_empty());
    }

    #[test]
    fn all_owners_are_told_page_by_page() {
        let mut vault = Vault::default();
        for index in 0..30 {
            let owner = ["a", "a-b", "b"][index % 3];
            vault.put(owner, format!("{index:02}"), fd()).expect("put");
        }
        let (mut names, mut after) = (Vec::new(), String::new());
        loop {
            let (page, more) = vault.page_of_all(&after);
            names.extend(page.into_iter().map(|(name, _)| name));
            after = names.last().cloned().unwrap_or_default();
            if !more {
                break;
            }
        }
        assert_eq!((names.len(), vault.len()), (30, 30));
        assert_eq!(names.iter().filter(|name| split(name).is_some_and(|(owner, _)| owner == "a-b")).count(), 10);
    }
}
