//! A core and its directories, without a shell: every event is sent by the test, every action is seen.

use std::collections::BTreeMap;

use uhmm_pager_core::{Action, Attr, Core, DefaultPolicy, DeviceId, Directory, Entry, Event, RegionId};

/// Pages of every region, if no entry says more.
pub const PAGES: u64 = 4;

/// What the shell keeps in memfds.
pub struct Tables {
    entries: BTreeMap<(RegionId, u64), u64>,
    attr: Attr,
}

impl Directory for Tables {
    fn attr(&self, _region: RegionId, _page: u64) -> Attr {
        self.attr
    }
    fn huge_phase(&self, _region: RegionId) -> u64 {
        0
    }
    fn load(&self, region: RegionId, page: u64) -> u64 {
        self.entries.get(&(region, page)).copied().unwrap_or(0)
    }
    fn alike(&self, _region: RegionId, _page: u64) -> u64 {
        1
    }
    fn page_count(&self, region: RegionId) -> u64 {
        let last = self.entries.range((region, 0)..=(region, u64::MAX)).next_back();
        last.map_or(0, |((_, page), _)| page + 1).max(PAGES)
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
        let entries = entries.iter().map(|(region, page, entry)| ((*region, *page), entry.bits())).collect();
        Self { core: Core::new(DefaultPolicy::default()), tables: Tables { entries, attr: Attr::default() } }
    }

    /// One event, after what must come before it; what is published is in the directories afterwards.
    pub fn send(&mut self, event: Event) -> Vec<Action> {
        self.send_at(0, event)
    }

    /// The same at some time, in microseconds.
    pub fn send_at(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        while let Some(first) = self.core.first(&event) {
            actions.extend(self.handle(now_us, first));
        }
        actions.extend(self.handle(now_us, event));
        actions
    }

    fn handle(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.core.handle(&self.tables, now_us, event, &mut out);
        for action in &out {
            if let Action::Publish { region, first, entries } = action {
                for (at, entry) in entries.iter().enumerate() {
                    let page = first + at as u64;
                    let before = Entry::decode(self.tables.load(*region, page)).unwrap_or(entry);
                    self.tables.entries.insert((*region, page), before.followed_by(entry).bits());
                }
            }
        }
        out
    }

    /// For all pages.
    #[allow(dead_code, reason = "not every test advises")]
    pub fn advise(&mut self, attr: Attr) {
        self.tables.attr = attr;
    }

    /// One page.
    pub fn entry(&self, region: RegionId, page: u64) -> Entry {
        Entry::decode(self.tables.load(region, page)).expect("the core publishes legal entries")
    }
}
