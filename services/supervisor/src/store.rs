//! The vault's third keeper: the descriptor store of the service manager that has started the supervisor (systemd's
//! `FileDescriptorStoreMax=`). It lives through the death of every process of the unit at once. Pure: changes in, datagrams out.
//!
//! ```text
//!   vault changed: {names}                        a name of the store: OWNER!NAME, as the holder tells them
//!     one new, or one gone:  FDSTORE | FDSTOREREMOVE                one datagram, so the store is always whole
//!     anything else:         FDSTORE supervisor!moving  ...  FDSTOREREMOVE supervisor!moving
//!                              \___ everybody is killed in between: the store is not believed
//! ```
//! The manager ignores a descriptor whose open file it keeps already, under whatever name. So what is replaced goes before the new one comes,
//! and memory files are handed over as open files of their own.

use std::collections::BTreeSet;

use uhmm_ipc::message::Fd;
use uhmm_kit::WHOLE_NAME;

use crate::vault::{Vault, joined, split};

/// While it is there, the rest is not whole.
const MOVING: &str = "supervisor!moving";
/// The supervisor's saved state, as the holder calls it.
pub(crate) const STATE: &str = "supervisor!state";

/// One datagram.
#[derive(Debug)]
pub(crate) enum Order {
    /// Keep it.
    Keep(String, What),
    /// Forget it.
    Forget(String),
}

/// What is kept.
#[derive(Debug)]
pub(crate) enum What {
    /// An entry of the vault.
    Entry(Fd),
    /// Only its name says something.
    Mark,
    /// This text.
    State(String),
}

/// What the store holds. See the module head.
#[derive(Debug, Default)]
pub(crate) struct Store {
    limit: usize,
    names: BTreeSet<String>,
    /// Something has no room: nobody shall believe what there is.
    full: bool,
}

impl Store {
    /// `inherited`: what earlier processes have left, by name.
    pub(crate) fn new(limit: usize, inherited: impl Iterator<Item = String>) -> Self {
        Self { limit, names: inherited.collect(), full: false }
    }

    pub(crate) fn is_absent(&self) -> bool {
        self.limit == 0
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// This process begins: what is there is taken for nothing until it was replaced.
    pub(crate) fn begin(&mut self, out: &mut Vec<Order>) {
        let old = std::mem::take(&mut self.names);
        self.keep(MOVING.to_owned(), What::Mark, out);
        out.extend(old.into_iter().filter(|name| name != MOVING).map(Order::Forget));
    }

    /// Makes the store what the vault is, as far as `changed` says, and the state this text, if there is a new one.
    pub(crate) fn follow(
        &mut self,
        vault: &Vault,
        changed: &BTreeSet<(String, String)>,
        state: Option<String>,
        out: &mut Vec<Order>,
    ) {
        let mut entries: Vec<(String, Option<Fd>)> =
            changed.iter().map(|(owner, name)| (joined(owner, name), vault.get(owner, name))).collect();
        if self.full {
            // What had no room must come too, as soon as there is some.
            entries = vault.all();
            let gone = self
                .names
                .iter()
                .filter(|name| split(name).is_some_and(|(owner, name)| vault.get(owner, name).is_none()));
            entries.extend(gone.filter(|name| *name != MOVING && *name != STATE).map(|name| (name.clone(), None)));
        }
        let mut wanted: Vec<(String, Option<What>)> =
            entries.into_iter().map(|(name, fd)| (name.clone(), fd.map(|fd| of_entry(&name, fd)))).collect();
        wanted.extend(state.map(|text| (STATE.to_owned(), Some(What::State(text)))));
        wanted.retain(|(name, what)| what.is_some() || self.names.contains(name));
        let begun = self.names.contains(MOVING);
        let simple = match wanted.as_slice() {
            [] => !begun,
            [(name, what)] => !begun && (what.is_none() || !self.names.contains(name)),
            _ => false,
        };
        if !simple && !begun {
            self.keep(MOVING.to_owned(), What::Mark, out);
        }
        self.full = false;
        for (name, _) in &wanted {
            self.forget(name, out);
        }
        for (name, what) in wanted {
            if let Some(what) = what {
                self.keep(name, what, out);
            }
        }
        if !simple && !self.full {
            self.forget(MOVING, out);
        }
    }

    fn keep(&mut self, name: String, what: What, out: &mut Vec<Order>) {
        // One place is the mark's.
        if name != MOVING && self.names.len() + usize::from(!self.names.contains(MOVING)) >= self.limit {
            self.full = true;
            if !self.names.contains(MOVING) {
                self.keep(MOVING.to_owned(), What::Mark, out);
            }
            return;
        }
        self.names.insert(name.clone());
        out.push(Order::Keep(name, what));
    }

    fn forget(&mut self, name: &str, out: &mut Vec<Order>) {
        if self.names.remove(name) {
            out.push(Order::Forget(name.to_owned()));
        }
    }
}

/// A mark may be any file, that of another entry too.
fn of_entry(name: &str, fd: Fd) -> What {
    if split(name).is_some_and(|(_, name)| name == WHOLE_NAME) { What::Mark } else { What::Entry(fd) }
}

/// What an earlier process has left is whole.
pub(crate) fn is_whole<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    let mut any = false;
    names.all(|name| {
        any = true;
        name != MOVING
    }) && any
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::sync::Arc;

    use super::*;

    /// What systemd keeps: by name, and no open file twice.
    #[derive(Default)]
    struct Manager(BTreeMap<String, i32>);

    impl Manager {
        fn obey(&mut self, orders: Vec<Order>, mut check: impl FnMut(&Self)) {
            let mut fresh = -1;
            for order in orders {
                match order {
                    Order::Keep(name, what) => {
                        let file = match what {
                            What::Entry(fd) => fd.as_raw_fd(),
                            What::Mark | What::State(_) => fresh,
                        };
                        fresh -= 1;
                        if !self.0.values().any(|kept| *kept == file) {
                            self.0.insert(name, file);
                        }
                    }
                    Order::Forget(name) => drop(self.0.remove(&name)),
                }
                check(self);
            }
        }

        fn whole(&self) -> bool {
            is_whole(self.0.keys().map(String::as_str))
        }

        fn names(&self) -> Vec<&str> {
            self.0.keys().map(String::as_str).collect()
        }
    }

    fn fd() -> Fd {
        Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").expect("/dev/null")))
    }

    struct World {
        vault: Vault,
        store: Store,
        manager: Manager,
    }

    impl World {
        fn new(limit: usize) -> Self {
            let mut vault = Vault::default();
            vault.tell_changes();
            Self { vault, store: Store::new(limit, std::iter::empty()), manager: Manager::default() }
        }

        fn follow(&mut self, state: Option<&str>, check: impl FnMut(&Manager)) {
            let (changed, mut out) = (self.vault.take_changed(), Vec::new());
            self.store.follow(&self.vault, &changed, state.map(str::to_owned), &mut out);
            self.manager.obey(out, check);
        }
    }

    #[test]
    fn whatever_happens_the_store_is_the_old_one_or_the_new_one_or_is_not_believed() {
        let mut world = World::new(100);
        let (old, new) = (fd(), fd());
        world.vault.put("pager", "a".into(), old.clone()).expect("put");
        world.follow(None, |manager| assert!(manager.whole()));
        world.vault.put("pager", "a".into(), new.clone()).expect("put");
        world.vault.put("soft0", "b".into(), fd()).expect("put");
        world.follow(Some("state"), |manager| {
            let complete = manager.names() == ["pager!a", "soft0!b", STATE] && manager.0["pager!a"] == new.as_raw_fd();
            assert!(
                !manager.whole() || complete || manager.0.get("pager!a") == Some(&old.as_raw_fd()),
                "{:?}",
                manager.0
            );
        });
        assert!(world.manager.whole() && world.manager.0.len() == 3, "{:?}", world.manager.0);
        // The same file under another name: the old name goes first.
        world.vault.put("pager", "c".into(), new).expect("put");
        world.vault.remove("pager", "a");
        world.follow(None, |_| {});
        assert_eq!(world.manager.names(), ["pager!c", "soft0!b", STATE]);
        world.vault.remove("pager", "c");
        world.follow(None, |manager| assert!(manager.whole()));
        assert_eq!(world.manager.names(), ["soft0!b", STATE]);
    }

    #[test]
    fn what_has_no_room_makes_the_rest_unbelievable_until_there_is_room() {
        let mut world = World::new(3);
        for name in ["a", "b", "c"] {
            world.vault.put("pager", name.into(), fd()).expect("put");
        }
        world.follow(None, |_| {});
        assert!(world.store.is_full() && !world.manager.whole() && world.manager.0.len() == 3, "{:?}", world.manager.0);
        world.vault.remove("pager", "a");
        world.follow(None, |_| {});
        assert!(!world.store.is_full() && world.manager.whole());
        assert_eq!(world.manager.names(), ["pager!b", "pager!c"]);
    }

    #[test]
    fn a_new_process_replaces_all_that_it_finds() {
        let mut world = World::new(100);
        world.vault.put("pager", "a".into(), fd()).expect("put");
        world.vault.put("pager", "b".into(), fd()).expect("put");
        world.follow(Some("state"), |_| {});
        let found = world.manager.0.keys().cloned().collect::<Vec<_>>();
        world.store = Store::new(100, found.into_iter());
        world.vault.remove("pager", "b");
        world.vault.tell_changes();
        let mut out = Vec::new();
        world.store.begin(&mut out);
        world.manager.obey(out, |manager| assert!(!manager.whole()));
        world.follow(Some("state"), |_| {});
        assert!(world.manager.whole());
        assert_eq!(world.manager.names(), ["pager!a", STATE]);
        assert!(!is_whole([].into_iter()), "nothing is not whole");
    }
}
