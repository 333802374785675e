//! Device faults as a pure state machine: `event -> actions`, no I/O and no clock.
//!
//! ```text
//!   job faults                                               Lookup: no such address ----> Resume(EFAULT)
//!      |                                                    /
//!      v       region unknown            one Lookup a space
//!   [ fault ] ------------------> unplaced ------------------> Attach ----> Attached
//!      |                                                                      |
//!      |       region known: same window as an outstanding one -> join it     |
//!      v                                                                      v
//!   window:   Ask (begin PENDING, mirror Fault) --Mapped--> install --covered--> Resume(Ok)
//!                ^      |                                      |
//!                |      +-- EBUSY / lost race --> RetryAfter --+     (bounded: MAX_ATTEMPTS without progress)
//!                +----------------------------------------------
//! ```
//! A window is the unit of asking: faults on its other pages join instead of asking again. The mirror guarantees only the
//! page asked for, so after each answer the next page still missing becomes the one asked for.

mod event;
mod pattern;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use uhmm_ipc::message::pager::MapRun;
use uhmm_ipc::message::{ErrorCode, WireError};

use crate::device::{FaultId, JobId, PAGE_BYTES, PageRange, RegionKey};
pub use event::{FaultAction, FaultEvent, FaultRange, Retry, WindowId};
use pattern::Pattern;
pub use pattern::{SEQUENTIAL_WINDOW_PAGES, WINDOW_PAGES};

/// Answers in a row that helped nobody before a fault fails. With the back-off below this is about four seconds of lost races: longer
/// than any thrashing protection of the pager, and than a page stays busy because a service is being restarted.
pub const MAX_ATTEMPTS: u32 = 200;
/// First pause after a lost race.
const FIRST_PAUSE: Duration = Duration::from_micros(200);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// Pages of one range fault: an answer has at most 2048 runs, and a quarter of these pages in the worst case.
pub const RANGE_PAGES_MAX: u64 = 8192;
/// How often one fault looks its address up again because its region went away under it.
const MAX_LOOKUPS: u32 = 4;

#[derive(Clone, Copy, Debug)]
struct Waiter {
    fault: FaultId,
    job: JobId,
    space: u64,
    addr: u64,
    write: bool,
    range: Option<FaultRange>,
    lookups: u32,
}

#[derive(Debug)]
struct Region {
    key: RegionKey,
    page_count: u64,
    attached: bool,
    waiting: Vec<Waiter>,
    pattern: Pattern,
}

#[derive(Debug, Default)]
struct Space {
    regions: BTreeMap<u64, Region>,
    unplaced: VecDeque<Waiter>,
    /// Address of the lookup in flight (or pausing before it is repeated).
    lookup: Option<u64>,
    lookup_attempts: u32,
}

/// An outstanding question to the mirror and those who wait for its answer.
#[derive(Debug)]
pub struct Window {
    /// Region.
    pub key: RegionKey,
    /// Pages.
    pub pages: PageRange,
    /// Nonce of the question in flight.
    pub nonce: u32,
    region_addr: u64,
    fault_page: u64,
    attempt: u32,
    /// Asked for as a whole, for one waiter; nobody joins.
    range: Option<FaultRange>,
    waiters: Vec<Waiter>,
}

/// The fault book of one driver.
#[derive(Debug, Default)]
pub struct FaultBook {
    spaces: HashMap<u64, Space>,
    windows: BTreeMap<WindowId, Window>,
    next_window: u64,
    next_nonce: u32,
}

impl FaultBook {
    /// An empty book.
    pub fn new() -> Self {
        Self::default()
    }

    /// The window behind an answer, if anybody still wants it.
    pub fn window(&self, window: WindowId) -> Option<&Window> {
        self.windows.get(&window)
    }

    /// Nothing is outstanding and nobody waits.
    pub fn idle(&self) -> bool {
        self.windows.is_empty()
            && self.spaces.values().all(|space| {
                space.unplaced.is_empty() && space.regions.values().all(|region| region.waiting.is_empty())
            })
    }

    /// One step.
    pub fn handle(&mut self, event: FaultEvent, out: &mut Vec<FaultAction>) {
        match event {
            FaultEvent::Fault { fault, job, space, addr, write, range } => {
                self.place(Waiter { fault, job, space, addr, write, range, lookups: 0 }, out);
            }
            FaultEvent::Found { key, addr, page_count } => self.found(key, addr, page_count, out),
            FaultEvent::LookupFailed { space, error } => self.lookup_failed(space, &error, out),
            FaultEvent::Attached { key } => self.attached(key, out),
            FaultEvent::AttachFailed { key, error } => {
                for waiter in self.forget_region(key) {
                    out.push(fail(&waiter, error.code, &error.text));
                }
            }
            FaultEvent::Installed { window, runs, refused } => self.installed(window, &runs, &refused, out),
            FaultEvent::Failed { window, error } => self.failed(window, &error, out),
            FaultEvent::RetryDue(Retry::Window(window)) => self.ask_again(window, out),
            FaultEvent::RetryDue(Retry::Lookup(space)) => self.repeat_lookup(space, out),
            FaultEvent::Unmapped { key } => {
                for waiter in self.forget_region(key) {
                    self.place_again(waiter, out);
                }
            }
            FaultEvent::SpaceGone { space } => {
                self.spaces.remove(&space);
                self.windows.retain(|_, window| window.key.space != space);
            }
            FaultEvent::JobGone { job } => self.forget_job(job),
        }
    }

    /// Finds the window for a fault, or starts finding its region.
    fn place(&mut self, waiter: Waiter, out: &mut Vec<FaultAction>) {
        let space = self.spaces.entry(waiter.space).or_default();
        let Some((&region_addr, region)) = region_at(&mut space.regions, waiter.addr) else {
            space.unplaced.push_back(waiter);
            if space.lookup.is_none() {
                space.lookup = Some(waiter.addr);
                space.lookup_attempts = 0;
                out.push(FaultAction::Lookup { job: waiter.job, space: waiter.space, addr: waiter.addr });
            }
            return;
        };
        if !region.attached {
            region.waiting.push(waiter);
            return;
        }
        let page = (waiter.addr - region_addr) / PAGE_BYTES;
        let key = region.key;
        let joinable = |w: &&mut Window| w.key == key && w.range.is_none() && w.pages.contains(page);
        if waiter.range.is_none()
            && let Some(window) = self.windows.values_mut().find(joinable)
        {
            window.waiters.push(waiter);
            return;
        }
        let pages = match waiter.range {
            Some(range) => {
                let wanted = range.end.saturating_sub(waiter.addr).div_ceil(PAGE_BYTES);
                let count = wanted.min(region.page_count - page).clamp(1, RANGE_PAGES_MAX);
                PageRange { first: page, count }
            }
            None => {
                let same = |w: &&Window| w.key == key && w.range.is_none();
                let outstanding = self.windows.values().filter(same).map(|w| w.pages);
                region.pattern.window(page, region.page_count, outstanding)
            }
        };
        self.next_window += 1;
        let id = WindowId(self.next_window);
        self.windows.insert(
            id,
            Window {
                key,
                pages,
                nonce: 0,
                region_addr,
                fault_page: page,
                attempt: 0,
                range: waiter.range,
                waiters: vec![waiter],
            },
        );
        self.ask_again(id, out);
    }

    /// A fault whose region went away looks its address up again, but not for ever.
    fn place_again(&mut self, mut waiter: Waiter, out: &mut Vec<FaultAction>) {
        waiter.lookups += 1;
        if waiter.lookups > MAX_LOOKUPS {
            out.push(fail(
                &waiter,
                ErrorCode::Fault,
                "Its region was freed again and again while the device waited for it",
            ));
        } else {
            self.place(waiter, out);
        }
    }

    fn found(&mut self, key: RegionKey, addr: u64, page_count: u64, out: &mut Vec<FaultAction>) {
        let Some(space) = self.spaces.get_mut(&key.space) else { return };
        let Some(asked) = space.lookup.take() else { return };
        let end = page_count.checked_mul(PAGE_BYTES).and_then(|len| addr.checked_add(len));
        let holds = end.is_some_and(|end| addr.is_multiple_of(PAGE_BYTES) && (addr..end).contains(&asked));
        if !holds {
            space.lookup = Some(asked);
            let text = format!("The mirror answered with {key}, which does not hold the address");
            return self.lookup_failed(key.space, &WireError::new(ErrorCode::Protocol, text), out);
        }
        let overlapping: Vec<RegionKey> = space
            .regions
            .iter()
            .filter(|(start, old)| **start < end.unwrap_or(u64::MAX) && addr < **start + old.page_count * PAGE_BYTES)
            .map(|(_, old)| old.key)
            .collect();
        let mut displaced = Vec::new();
        for old in overlapping {
            // Its `unmap` is still on the way; the address belongs to the new region already.
            displaced.extend(self.forget_region(old));
            if old != key {
                out.push(FaultAction::Drop { key: old });
            }
        }
        if let Some(space) = self.spaces.get_mut(&key.space) {
            let region = Region { key, page_count, attached: false, waiting: Vec::new(), pattern: Pattern::default() };
            space.regions.insert(addr, region);
            displaced.extend(std::mem::take(&mut space.unplaced));
        }
        out.push(FaultAction::Attach { key });
        for waiter in displaced {
            self.place(waiter, out);
        }
    }

    fn lookup_failed(&mut self, space_id: u64, error: &WireError, out: &mut Vec<FaultAction>) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let Some(asked) = space.lookup else { return };
        if transient(error.code) && space.lookup_attempts < MAX_ATTEMPTS {
            space.lookup_attempts += 1;
            let after = pause(space.lookup_attempts);
            out.push(FaultAction::RetryAfter { retry: Retry::Lookup(space_id), after });
            return;
        }
        space.lookup = None;
        let page = asked / PAGE_BYTES;
        let (failed, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut space.unplaced).into_iter().partition(|waiter| waiter.addr / PAGE_BYTES == page);
        // A hole in the managed memory is a fault of the job, not of the mirror.
        let code = if error.code == ErrorCode::NotFound { ErrorCode::Fault } else { error.code };
        out.extend(failed.iter().map(|waiter| fail(waiter, code, &error.text)));
        for waiter in rest {
            self.place(waiter, out);
        }
    }

    fn repeat_lookup(&mut self, space_id: u64, out: &mut Vec<FaultAction>) {
        let Some(space) = self.spaces.get_mut(&space_id) else { return };
        let Some(addr) = space.lookup else { return };
        match space.unplaced.front() {
            Some(waiter) => out.push(FaultAction::Lookup { job: waiter.job, space: space_id, addr }),
            None => space.lookup = None,
        }
    }

    fn attached(&mut self, key: RegionKey, out: &mut Vec<FaultAction>) {
        let Some(region) = self.region_mut(key) else { return };
        region.attached = true;
        for waiter in std::mem::take(&mut region.waiting) {
            self.place(waiter, out);
        }
    }

    fn installed(&mut self, id: WindowId, runs: &[MapRun], refused: &[u64], out: &mut Vec<FaultAction>) {
        let Some(window) = self.windows.get_mut(&id) else { return };
        out.push(FaultAction::Abandon { key: window.key, pages: window.pages, nonce: window.nonce });
        let region_addr = window.region_addr;
        let (served, left): (Vec<_>, Vec<_>) = std::mem::take(&mut window.waiters).into_iter().partition(|waiter| {
            let page = (waiter.addr - region_addr) / PAGE_BYTES;
            let mapped = runs.iter().any(|run| {
                PageRange { first: run.first_page, count: run.page_count }.contains(page)
                    && (run.writable || !waiter.write)
            });
            mapped && !refused.contains(&page)
        });
        window.waiters = left;
        let progress = !served.is_empty();
        out.extend(served.into_iter().map(|waiter| FaultAction::Resume { fault: waiter.fault, outcome: Ok(()) }));
        if progress {
            window.attempt = 0;
            self.ask_again(id, out);
        } else {
            self.pause_window(id, "the page was taken away again before the device could map it", out);
        }
    }

    fn failed(&mut self, id: WindowId, error: &WireError, out: &mut Vec<FaultAction>) {
        let Some(window) = self.windows.get_mut(&id) else { return };
        let key = window.key;
        out.push(FaultAction::Abandon { key, pages: window.pages, nonce: window.nonce });
        if transient(error.code) {
            return self.pause_window(id, &error.text, out);
        }
        if error.code == ErrorCode::NotFound {
            let waiters = self.forget_region(key);
            out.push(FaultAction::Drop { key });
            for waiter in waiters {
                self.place_again(waiter, out);
            }
            return;
        }
        // The answer is about the page asked for (and, when a write was refused, about writes alone).
        let (page, region_addr) = (window.fault_page, window.region_addr);
        let asked_write = window.asked_write();
        let (failed, left): (Vec<_>, Vec<_>) = std::mem::take(&mut window.waiters).into_iter().partition(|waiter| {
            (waiter.addr - region_addr) / PAGE_BYTES == page
                && (error.code != ErrorCode::Permission || waiter.write == asked_write)
        });
        window.waiters = left;
        out.extend(failed.iter().map(|waiter| fail(waiter, error.code, &error.text)));
        self.ask_again(id, out);
    }

    /// Asks for the first page that somebody still waits for; a window that nobody waits for ends.
    fn ask_again(&mut self, id: WindowId, out: &mut Vec<FaultAction>) {
        let Some(window) = self.windows.get_mut(&id) else { return };
        let Some(first) = window.waiters.first() else {
            self.windows.remove(&id);
            return;
        };
        window.fault_page = (first.addr - window.region_addr) / PAGE_BYTES;
        self.next_nonce = self.next_nonce.checked_add(1).unwrap_or(1);
        window.nonce = self.next_nonce;
        out.push(FaultAction::Ask {
            window: id,
            job: first.job,
            key: window.key,
            pages: window.pages,
            fault_page: window.fault_page,
            write: window.asked_write(),
            range: window.range,
            nonce: window.nonce,
        });
    }

    fn pause_window(&mut self, id: WindowId, why: &str, out: &mut Vec<FaultAction>) {
        let Some(window) = self.windows.get_mut(&id) else { return };
        window.attempt += 1;
        if window.attempt <= MAX_ATTEMPTS && !window.waiters.is_empty() {
            out.push(FaultAction::RetryAfter { retry: Retry::Window(id), after: pause(window.attempt) });
            return;
        }
        let text = format!("Gave up after {MAX_ATTEMPTS} attempts: {why}");
        out.extend(window.waiters.iter().map(|waiter| fail(waiter, ErrorCode::Busy, &text)));
        self.windows.remove(&id);
    }

    /// Removes a region and its windows; returns who waited for them.
    fn forget_region(&mut self, key: RegionKey) -> Vec<Waiter> {
        let mut waiters = Vec::new();
        self.windows.retain(|_, window| {
            if window.key == key {
                waiters.append(&mut window.waiters);
            }
            window.key != key
        });
        if let Some(space) = self.spaces.get_mut(&key.space) {
            space.regions.retain(|_, region| {
                if region.key == key {
                    waiters.append(&mut region.waiting);
                }
                region.key != key
            });
        }
        waiters
    }

    fn forget_job(&mut self, job: JobId) {
        for window in self.windows.values_mut() {
            window.waiters.retain(|waiter| waiter.job != job);
        }
        for space in self.spaces.values_mut() {
            space.unplaced.retain(|waiter| waiter.job != job);
            for region in space.regions.values_mut() {
                region.waiting.retain(|waiter| waiter.job != job);
            }
        }
    }

    fn region_mut(&mut self, key: RegionKey) -> Option<&mut Region> {
        self.spaces.get_mut(&key.space)?.regions.values_mut().find(|region| region.key == key)
    }
}

impl Window {
    /// Whose range this is, and whether only writable pages are an answer.
    pub(crate) fn range_job(&self) -> Option<(JobId, bool)> {
        let range = self.range?;
        self.waiters.first().map(|waiter| (waiter.job, waiter.write || range.exclusive))
    }

    /// Anybody on the page asked for wants to write it.
    fn asked_write(&self) -> bool {
        let on_page = |waiter: &&Waiter| (waiter.addr - self.region_addr) / PAGE_BYTES == self.fault_page;
        self.waiters.iter().filter(on_page).any(|waiter| waiter.write)
    }
}

fn region_at(regions: &mut BTreeMap<u64, Region>, addr: u64) -> Option<(&u64, &mut Region)> {
    regions.range_mut(..=addr).next_back().filter(|(start, region)| (addr - **start) / PAGE_BYTES < region.page_count)
}

/// Errors that another attempt may not meet.
fn transient(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Busy | ErrorCode::Stale | ErrorCode::TimedOut)
}

fn pause(attempt: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << attempt.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

fn fail(waiter: &Waiter, code: ErrorCode, why: &str) -> FaultAction {
    let verb = if waiter.write { "write" } else { "read" };
    let text = format!("Device {verb} of address {:#x} failed: {why}", waiter.addr);
    FaultAction::Resume { fault: waiter.fault, outcome: Err(WireError::new(code, text)) }
}
