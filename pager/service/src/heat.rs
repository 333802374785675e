//! Hot ranges: what devices use, by 2 MiB of addresses. Devices with a page table that the pager can read mark the entries they use;
//! this file collects the marks while somebody wants to know, and tells.
//!
//! ```text
//!   HotRanges -> the space is watched -> sweep: every entry of its tables, SLICE_PAGES at a time, other work in between
//!                  ^                      |  marks -> Event::Used (eviction forgets nothing that a sweep took away)
//!                  |  100 ms              |        -> Heat: pages used in this period
//!                  +--- end of period <---+  average = (average + used) / 2, whoever waits is answered
//! ```
//!
//! Nobody asks for [`WATCH`]: the sweeps end and the heat is forgotten. It is in this process alone: a restart of the pager forgets
//! it too, and the next question begins again with what is marked then. Eviction takes marks by itself
//! ([`uhmm_pager_core::Directory::take_used`]), watched or not, and they count as heat as well. A fault costs nothing of this.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use uhmm_ipc::message::pager::HotRange;
use uhmm_ipc::message::{ErrorCode, Reply, pager};
use uhmm_ipc::{CallId, ConnId, TimerToken};
use uhmm_pager_core::{DeviceId, Event, Pages, RegionId};

use crate::calls::{Answer, refuse};
use crate::requests::ANSWER_RUNS_MAX;
use crate::service::Pager;
use crate::space::Segment;

/// Timers of watched spaces are this with the space's id.
pub(crate) const TIMER_HEAT: u64 = 1 << 56;

/// From the end of a sweep to the next one.
const PERIOD: Duration = Duration::from_millis(100);
/// A space is watched this long after the last question.
const WATCH: Duration = Duration::from_secs(5);
/// Entries looked at in one go: some tens of microseconds, then faults have their turn.
const SLICE_PAGES: u64 = 16_384;
const SLICE_PAUSE: Duration = Duration::from_micros(200);

const RANGE_BYTES: u64 = 2 << 20;
const RANGE_PAGES: u32 = 512;
/// Averages are kept in 1/1024 of a page: what was used once is forgotten within two seconds.
const AVERAGE_SHIFT: u32 = 10;

/// 2 MiB that a device uses.
#[derive(Clone, Copy, Debug, Default)]
struct Warm {
    /// Pages with a mark in the period that runs.
    used_pages: u32,
    /// See [`AVERAGE_SHIFT`].
    average: u32,
}

impl Warm {
    fn end_period(&mut self) {
        // A page may be marked again after eviction took its mark: no more than all of them are used.
        let used = std::mem::take(&mut self.used_pages).min(RANGE_PAGES);
        self.average = (self.average + (used << AVERAGE_SHIFT)) / 2;
    }

    fn permille(self) -> u16 {
        let whole = RANGE_PAGES << AVERAGE_SHIFT;
        (self.average * 1000).div_ceil(whole) as u16
    }
}

/// What was used lately, of the spaces that are watched.
#[derive(Debug, Default)]
pub(crate) struct Heat {
    /// By space and device, then by number of the range.
    watched: BTreeMap<u64, BTreeMap<(u8, u64), Warm>>,
}

impl Heat {
    fn watch(&mut self, space: u64) {
        self.watched.entry(space).or_default();
    }

    fn forget(&mut self, space: u64) {
        self.watched.remove(&space);
    }

    /// The device has used the page at this address. Nothing for a space that is not watched.
    pub fn note(&mut self, space: u64, device: u8, addr: u64) {
        if let Some(ranges) = self.watched.get_mut(&space) {
            ranges.entry((device, addr / RANGE_BYTES)).or_default().used_pages += 1;
        }
    }

    fn end_period(&mut self, space: u64) {
        if let Some(ranges) = self.watched.get_mut(&space) {
            ranges.retain(|_, warm| {
                warm.end_period();
                warm.average > 0
            });
        }
    }

    fn hottest(&self, space: u64, device: u8) -> Vec<HotRange> {
        let ranges =
            self.watched.get(&space).into_iter().flat_map(|ranges| ranges.range((device, 0)..=(device, u64::MAX)));
        let told = |(&(_, index), warm): (&(u8, u64), &Warm)| HotRange {
            addr: index * RANGE_BYTES,
            heat_permille: warm.permille(),
        };
        let mut ranges: Vec<HotRange> = ranges.map(told).collect();
        ranges.sort_by_key(|range| (std::cmp::Reverse(range.heat_permille), range.addr));
        ranges.truncate(ANSWER_RUNS_MAX);
        ranges
    }
}

/// A table that a sweep has not finished.
#[derive(Clone, Copy, Debug)]
struct Part {
    segment: u64,
    device: u8,
    /// Next entry.
    next: u64,
    end: u64,
}

/// A space whose client wants to know.
#[derive(Debug)]
pub(crate) struct Watch {
    until: Instant,
    /// What is left of the sweep that runs.
    todo: Vec<Part>,
    /// A sweep has ended: there is something to tell.
    swept: bool,
    readers: Vec<(ConnId, CallId, u8)>,
}

impl Pager {
    /// Answers when the first sweep is through, later at once.
    pub(crate) fn hot_ranges(&mut self, conn: ConnId, call: CallId, device: u8) -> Answer {
        let space = match self.space_of(conn) {
            Ok(space) => space,
            Err(error) => return Some(Err(error)),
        };
        if self.service.plan.device(device).is_none() {
            return refuse(ErrorCode::NotFound, format!("There is no device {device}"));
        }
        let logged_in = self.devices.get(usize::from(device)).and_then(Option::as_ref);
        if logged_in.is_some_and(|device| device.gate.is_none()) {
            let text = format!(
                "Device {device} has no aperture, so its page table is its driver's alone: who uses what is not known here"
            );
            return refuse(ErrorCode::NotFound, text);
        }
        let until = Instant::now() + WATCH;
        let mut is_new = false;
        let watch = self.watches.entry(space).or_insert_with(|| {
            is_new = true;
            Watch { until, todo: Vec::new(), swept: false, readers: Vec::new() }
        });
        watch.until = until;
        if watch.swept && watch.todo.is_empty() {
            let ranges = self.regions.heat.borrow().hottest(space, device);
            return Some(Ok(pager::Reply::HotRanges { ranges }));
        }
        watch.readers.push((conn, call, device));
        if is_new {
            self.regions.heat.borrow_mut().watch(space);
            self.sweep(space);
        }
        None
    }

    /// The timer of a watched space: the next slice, or the next sweep, or the end.
    pub(crate) fn sweep(&mut self, space: u64) {
        let Some(mut watch) = self.watches.remove(&space) else { return };
        if watch.todo.is_empty() {
            if !self.spaces.contains_key(&space) || Instant::now() > watch.until {
                self.regions.heat.borrow_mut().forget(space);
                return;
            }
            watch.todo = self.tables_of(space);
            self.stats.heat_sweeps += 1;
        }
        self.sweep_slice(&mut watch.todo);
        let pause = if watch.todo.is_empty() {
            self.regions.heat.borrow_mut().end_period(space);
            watch.swept = true;
            for (conn, call, device) in watch.readers.drain(..) {
                let ranges = self.regions.heat.borrow().hottest(space, device);
                self.service.reactor.reply(conn, call, Ok(Reply::Pager(pager::Reply::HotRanges { ranges })));
            }
            PERIOD
        } else {
            SLICE_PAUSE
        };
        self.watches.insert(space, watch);
        self.service.reactor.add_timer(pause, TimerToken(TIMER_HEAT | space));
    }

    fn tables_of(&self, space: u64) -> Vec<Part> {
        let segments = self.spaces.get(&space).into_iter().flat_map(|space| space.segments.values());
        let segments = segments.filter_map(|id| self.regions.segment(*id));
        let tables = |segment: &Segment| {
            let id = segment.id;
            let with_table = (0u8..).zip(&segment.tables).filter_map(|(device, table)| Some((device, table.as_ref()?)));
            let mut parts = Vec::new();
            for (device, table) in with_table {
                let part = |entries: Range<u64>| Part { segment: id, device, next: entries.start, end: entries.end };
                table.in_use(0..segment.page_count, |entries| parts.push(part(entries)));
            }
            parts
        };
        segments.flat_map(tables).collect()
    }

    /// Takes the marks of at most [`SLICE_PAGES`] entries, from the last part of the list on.
    fn sweep_slice(&mut self, todo: &mut Vec<Part>) {
        let mut left = SLICE_PAGES;
        while left > 0
            && let Some(part) = todo.last_mut()
        {
            let segment = self.regions.segment(part.segment);
            let end = segment.map_or(0, |segment| segment.page_count.min(part.end).min(part.next + left));
            if let Some(segment) = segment {
                let (region, device) = (RegionId(segment.region), DeviceId(part.device));
                let runs = self.regions.take_marks(segment, part.device, part.next..end);
                self.events.extend(runs.into_iter().map(|pages| Event::Used { region, pages, device }));
            }
            left -= end.saturating_sub(part.next);
            part.next = end;
            if segment.is_none_or(|segment| end >= segment.page_count.min(part.end)) {
                todo.pop();
            }
        }
    }

    /// Spaces that are watched now, for `uhmm stats`.
    pub(crate) fn watched_spaces(&self) -> u64 {
        self.watches.len() as u64
    }
}

/// Adds a page to runs that are in order.
pub(crate) fn add_page(runs: &mut Vec<Pages>, page: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == page => run.count += 1,
        _ => runs.push(Pages::one(page)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: u64 = 7;

    fn heat_after(periods: &[u32]) -> Heat {
        let mut heat = Heat::default();
        heat.watch(SPACE);
        for used in periods {
            (0..*used).for_each(|page| heat.note(SPACE, 1, 5 * RANGE_BYTES + u64::from(page) * 4096));
            heat.end_period(SPACE);
        }
        heat
    }

    fn told(heat: &Heat) -> Option<u16> {
        heat.hottest(SPACE, 1).first().map(|range| range.heat_permille)
    }

    #[test]
    fn heat_grows_with_use_and_halves_without() {
        assert_eq!(told(&heat_after(&[512])), Some(500));
        assert_eq!(told(&heat_after(&[512, 512])), Some(750));
        assert_eq!(told(&heat_after(&[512; 20])), Some(1000));
        assert_eq!(told(&heat_after(&[512, 0, 0])), Some(125));
        assert_eq!(told(&heat_after(&[1])), Some(1), "one page once is told too");
        let mut cooling = vec![0; 21];
        cooling[0] = 512;
        assert_eq!(told(&heat_after(&cooling)), None, "and forgotten within two seconds");
        assert_eq!(told(&heat_after(&[5000])), Some(500), "marks taken twice are no more than all pages");
    }

    #[test]
    fn the_hottest_range_of_the_device_that_was_asked_for_comes_first() {
        let mut heat = heat_after(&[]);
        for (device, range, pages) in [(1, 3, 10), (1, 9, 40), (1, 4, 10), (2, 8, 500)] {
            (0..pages).for_each(|page| heat.note(SPACE, device, range * RANGE_BYTES + page * 4096));
        }
        heat.note(SPACE + 1, 1, 0);
        heat.end_period(SPACE);
        let addrs: Vec<u64> = heat.hottest(SPACE, 1).iter().map(|range| range.addr / RANGE_BYTES).collect();
        assert_eq!(addrs, [9, 3, 4]);
        assert!(heat.hottest(SPACE, 0).is_empty() && heat.hottest(SPACE + 1, 1).is_empty(), "nobody watches that");
        heat.forget(SPACE);
        assert!(heat.hottest(SPACE, 1).is_empty());
    }

    #[test]
    fn an_answer_has_a_limit() {
        let mut heat = heat_after(&[]);
        (0..3000).for_each(|range| heat.note(SPACE, 1, range * RANGE_BYTES));
        heat.end_period(SPACE);
        assert_eq!(heat.hottest(SPACE, 1).len(), ANSWER_RUNS_MAX);
    }

    #[test]
    fn neighbours_are_one_run() {
        let mut runs = Vec::new();
        [3, 4, 5, 9, 11, 12].into_iter().for_each(|page| add_page(&mut runs, page));
        let run = |first, count| Pages { first, count };
        assert_eq!(runs, [run(3, 3), run(9, 1), run(11, 2)]);
    }
}
