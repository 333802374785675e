//! How long faults and migrations take, for the record: what is under way, and since when. Pure; nothing here allocates after its start, and
//! what finds no room is not timed.
//!
//! ```text
//!   fault read --> begin --> filled, protection taken away: served
//!                    ^    `-> woken: served by that, unless the kernel raises it again soon
//!                    `------- raised again: the same fault goes on
//! ```

use uhmm_kit::record::Why;
use uhmm_pager_core::{Pages, RegionId};

/// Faults that are timed at once: more programs than that wait for nobody's statistics.
const FAULTS_MAX: usize = 128;
/// Migrations that are timed at once.
const FLIGHTS_MAX: usize = 64;
/// A fault that is raised again after its wake-up is back within this time, or it is another one.
const AGAIN_NS: u64 = 20_000_000;

/// A CPU fault that is being served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub region: RegionId,
    pub page: u64,
    pub space: u64,
    pub addr: u64,
    pub why: Why,
    pub trace: u64,
    pub begun_ns: u64,
    /// It may go on since then; 0: not yet.
    pub woken_ns: u64,
}

/// A migration that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    pub region: RegionId,
    pub pages: Pages,
    pub why: Why,
    pub trace: u64,
    pub begun_ns: u64,
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct Timing {
    faults: Vec<Waiting>,
    flights: Vec<Flight>,
}

impl Default for Timing {
    fn default() -> Self {
        Self { faults: Vec::with_capacity(FAULTS_MAX), flights: Vec::with_capacity(FLIGHTS_MAX) }
    }
}

impl Waiting {
    pub(crate) fn new(region: RegionId, page: u64, why: Why, begun_ns: u64) -> Self {
        Self { region, page, space: 0, addr: 0, why, trace: 0, begun_ns, woken_ns: 0 }
    }
}

impl Timing {
    /// False: this one is known already, or there is no room.
    pub(crate) fn begin(&mut self, fault: Waiting) -> bool {
        let same = |known: &&mut Waiting| known.region == fault.region && known.page == fault.page;
        if let Some(known) = self.faults.iter_mut().find(same) {
            known.woken_ns = 0;
            return false;
        }
        if self.faults.len() == FAULTS_MAX {
            return false;
        }
        self.faults.push(fault);
        true
    }

    /// The program has these pages. `moved`: what is not there by a move is not meant.
    pub(crate) fn served(&mut self, region: RegionId, pages: Pages, moved: bool) -> impl Iterator<Item = Waiting> + '_ {
        let on_the_way = |why: Why| matches!(why, Why::Device | Why::Moving);
        self.faults.extract_if(.., move |fault| {
            fault.region == region && pages.contains(fault.page) && (!moved || on_the_way(fault.why))
        })
    }

    /// Who waits there may look again.
    pub(crate) fn woken(&mut self, region: RegionId, pages: Pages, now_ns: u64) {
        for fault in &mut self.faults {
            if fault.region == region && pages.contains(fault.page) && fault.woken_ns == 0 {
                fault.woken_ns = now_ns;
            }
        }
    }

    /// Faults that a wake-up has served: when.
    pub(crate) fn settled(&mut self, now_ns: u64) -> impl Iterator<Item = (Waiting, u64)> + '_ {
        let settled =
            move |fault: &mut Waiting| fault.woken_ns != 0 && now_ns.saturating_sub(fault.woken_ns) > AGAIN_NS;
        self.faults.extract_if(.., settled).map(|fault| (fault, fault.woken_ns))
    }

    pub(crate) fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// The fault that one of these pages is awaited for.
    pub(crate) fn fault_in(&self, region: RegionId, pages: Pages) -> Option<&Waiting> {
        self.faults.iter().find(|fault| fault.region == region && pages.contains(fault.page))
    }

    pub(crate) fn forget_space(&mut self, space: u64) {
        self.faults.retain(|fault| fault.space != space);
    }

    /// Pages are on the way. What was said of them before has come to nothing.
    pub(crate) fn depart(&mut self, flight: Flight) {
        self.flights.retain(|old| old.region != flight.region || old.pages.overlap(flight.pages).is_none());
        if self.flights.len() == FLIGHTS_MAX {
            self.flights.remove(0);
        }
        self.flights.push(flight);
    }

    /// Pages have arrived; a part of a flight leaves the rest under way.
    pub(crate) fn arrive(&mut self, region: RegionId, pages: Pages) -> Option<Flight> {
        let at =
            self.flights.iter().position(|flight| flight.region == region && flight.pages.contains(pages.first))?;
        let flight = self.flights[at];
        if pages.end() >= flight.pages.end() {
            self.flights.swap_remove(at);
        }
        Some(flight)
    }

    /// The flight that one of these pages is on.
    pub(crate) fn flight_of(&self, region: RegionId, pages: Pages) -> Option<&Flight> {
        self.flights.iter().find(|flight| flight.region == region && flight.pages.overlap(pages).is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: RegionId = RegionId(1);

    fn fault(page: u64, why: Why, begun_ns: u64) -> Waiting {
        Waiting::new(REGION, page, why, begun_ns)
    }

    #[test]
    fn a_fault_that_is_raised_again_goes_on_since_it_began() {
        let mut timing = Timing::default();
        assert!(timing.begin(fault(5, Why::Moving, 100)));
        timing.woken(REGION, Pages::one(5), 200);
        assert!(!timing.begin(fault(5, Why::Moving, 300)));
        assert_eq!(timing.settled(200 + 2 * AGAIN_NS).count(), 0, "it waits again");
        let served: Vec<_> = timing.served(REGION, Pages { first: 0, count: 10 }, false).collect();
        assert_eq!(served, [fault(5, Why::Moving, 100)]);
        assert!(!timing.has_faults());
    }

    #[test]
    fn a_wake_up_serves_who_does_not_come_back() {
        let mut timing = Timing::default();
        timing.begin(fault(5, Why::Minor, 100));
        timing.woken(REGION, Pages::one(5), 200);
        timing.woken(REGION, Pages::one(5), 900);
        assert_eq!(timing.settled(200 + AGAIN_NS).count(), 0);
        let settled: Vec<_> = timing.settled(201 + AGAIN_NS).map(|(fault, at)| (fault.page, at)).collect();
        assert_eq!(settled, [(5, 200)]);
    }

    #[test]
    fn what_was_published_serves_only_faults_that_wait_for_a_move() {
        let mut timing = Timing::default();
        timing.begin(fault(1, Why::Zero, 1));
        timing.begin(fault(2, Why::Device, 1));
        let served: Vec<_> =
            timing.served(REGION, Pages { first: 0, count: 8 }, true).map(|fault| fault.page).collect();
        assert_eq!(served, [2]);
    }

    #[test]
    fn there_is_a_bound_and_beyond_it_nothing_is_timed() {
        let mut timing = Timing::default();
        let begun = (0..1000).filter(|page| timing.begin(fault(*page, Why::Zero, 1))).count();
        assert_eq!(begun, FAULTS_MAX);
        timing.forget_space(0);
        assert!(!timing.has_faults());
        (0..1000).for_each(|n| {
            let pages = Pages { first: n * 4, count: 4 };
            timing.depart(Flight { region: REGION, pages, why: Why::User, trace: n, begun_ns: n });
        });
        assert!(timing.flight_of(REGION, Pages::one(0)).is_none(), "the oldest ones had to go");
        assert_eq!(timing.flight_of(REGION, Pages::one(3999)).map(|flight| flight.trace), Some(999));
    }

    #[test]
    fn a_flight_ends_with_its_last_page() {
        let mut timing = Timing::default();
        let flight = |first, begun_ns| Flight {
            region: REGION,
            pages: Pages { first, count: 8 },
            why: Why::User,
            trace: 1,
            begun_ns,
        };
        timing.depart(flight(0, 10));
        assert_eq!(timing.arrive(REGION, Pages { first: 0, count: 3 }), Some(flight(0, 10)));
        assert_eq!(timing.arrive(REGION, Pages { first: 3, count: 5 }), Some(flight(0, 10)));
        assert_eq!(timing.arrive(REGION, Pages { first: 3, count: 5 }), None);
        timing.depart(flight(16, 20));
        timing.depart(flight(20, 30));
        assert_eq!(timing.arrive(REGION, Pages { first: 20, count: 8 }), Some(flight(20, 30)), "the older one failed");
    }
}
