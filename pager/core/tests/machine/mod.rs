//! A core and its directories, without a shell: every event is sent by the test, every action is seen.

use std::collections::BTreeMap;

use uhmm_pager_core::{Action, Attr, Core, DefaultPolicy, DeviceId, Directory, Entry, Event, RegionId};

/// Pages of every region.
pub const PAGES: u64 = 4;

/// What the shell keeps in memfds.
pub struct Tables(BTreeMap<(RegionId, u64), u64>);

impl Directory for Tables {
    fn attr(&self, _region: RegionId, _page: u64) -> Attr {
        Attr::default()
    }
    fn huge_phase(&self, _region: RegionId) -> u64 {
        0
    }
    fn load(&self, region: RegionId, page: u64) -> u64 {
        self.0.get(&(region, page)).copied().unwrap_or(0)
    }
    fn alike(&self, _region: RegionId, _page: u64) -> u64 {
        1
    }
    fn page_count(&self, _region: RegionId) -> u64 {
        PAGES
    }
    fn take_used(&self, _region: RegionId, _page: u64, _device: DeviceId) -> bool {
        false
    }
}

/// See the module head.
pub struct Machine {
    pub core: Core<DefaultPolicy>,
    tables: Tables,
}

impl Machine {
    /// A new core; the entries are what a dead one has left.
    pub fn with(entries: &[(RegionId, u64, Entry)]) -> Self {
        let tables = entries.iter().map(|(region, page, entry)| ((*region, *page), entry.bits())).collect();
        Self { core: Core::new(DefaultPolicy::default()), tables: Tables(tables) }
    }

    /// One event; what is published is in the directories afterwards.
    pub fn send(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.core.handle(&self.tables, 0, event, &mut out);
        for action in &out {
            if let Action::Publish { region, first, entries } = action {
                for (at, entry) in entries.iter().enumerate() {
                    let page = first + at as u64;
                    let before = Entry::decode(self.tables.load(*region, page)).unwrap_or(entry);
                    self.tables.0.insert((*region, page), before.followed_by(entry).bits());
                }
            }
        }
        out
    }

    /// One page.
    pub fn entry(&self, region: RegionId, page: u64) -> Entry {
        Entry::decode(self.tables.load(region, page)).expect("the core publishes legal entries")
    }
}
