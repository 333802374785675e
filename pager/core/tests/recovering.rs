//! What a dead pager has left is recovered in turns: nobody waits for all of it, and whoever meets a page meets a recovered one.

use uhmm_pager_core::sim::{Config, Faults, Op, Simulator};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, PageState, Pages, RegionId, ReqId, SpaceId, StepResult,
};

mod machine;
use machine::Machine;

const LARGE: RegionId = RegionId(5);
const LARGE_PAGES: u64 = 100_000;
const OTHER: RegionId = RegionId(9);
/// What one step looks at.
const STEP: u64 = 8192;

/// A large region on a device, but for some pages that were on their way there; and how many of the others are not known to be gone from the
/// page cache.
struct Left {
    machine: Machine,
    unpunched: u64,
}

const MOVING: [u64; 3] = [7, LARGE_PAGES / 2, LARGE_PAGES - 3];

impl Left {
    fn by_a_dead_pager(backing: Backing) -> (Self, Vec<Action>) {
        let entry = |page: u64| match MOVING.contains(&page) {
            true => Entry::SYSTEM.with_state(PageState::MovingOut),
            false => Entry::on_device(DeviceId(0), page as u32),
        };
        let entries: Vec<_> = (0..LARGE_PAGES).map(|page| (LARGE, page, entry(page))).collect();
        let mut left = Self { machine: Machine::with(&entries), unpunched: LARGE_PAGES - 3 };
        let (space, page_count, strays) = (SpaceId(1), LARGE_PAGES, Vec::new());
        let actions = left.send(Event::RecoverRegion { region: LARGE, space, page_count, backing, strays });
        (left, actions)
    }

    /// One event, with what the shell answers at once.
    fn send(&mut self, event: Event) -> Vec<Action> {
        let mut actions = self.machine.send(event);
        let mut next = 0;
        while next < actions.len() {
            let answer = match &actions[next] {
                Action::Punch { ticket, pages, .. } => {
                    self.unpunched -= pages.count;
                    Some(Event::PunchDone { ticket: *ticket, result: StepResult::Ok })
                }
                Action::MoveBack { ticket, .. } => {
                    Some(Event::MoveBackDone { ticket: *ticket, result: StepResult::Ok })
                }
                Action::WriteProtect { ticket, .. } => Some(Event::WpDone { ticket: *ticket, result: StepResult::Ok }),
                Action::Fill { ticket, pages, .. } => {
                    Some(Event::FillDone { ticket: *ticket, done_pages: pages.count, stop: None })
                }
                Action::Scrub { ticket, .. } => Some(Event::ScrubDone { ticket: *ticket, result: StepResult::Ok }),
                _ => None,
            };
            actions.extend(answer.into_iter().flat_map(|answer| self.machine.send(answer)).collect::<Vec<_>>());
            next += 1;
        }
        actions
    }

    fn fault(&mut self, page: u64) -> Vec<Action> {
        self.send(Event::CpuFault { region: LARGE, page, write: true, wp: false, minor: false })
    }

    fn state(&self, page: u64) -> PageState {
        self.machine.entry(LARGE, page).state()
    }

    fn device_up(&mut self) {
        let (device, frame_count) = (DeviceId(0), LARGE_PAGES as u32);
        let (fresh_mappings, memory_known, memory_lost, coherent) = (false, true, false, false);
        self.send(Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost, coherent });
    }

    /// Turns until nothing is to be done.
    fn settle(&mut self) -> u64 {
        let mut turns = 0;
        while self.machine.core.has_runnable_work() {
            self.send(Event::Tick);
            turns += 1;
            assert!(turns < 1000);
        }
        turns
    }
}

fn wakes(actions: &[Action], page: u64) -> bool {
    let wakes = |action: &Action| matches!(action, Action::Wake { region: LARGE, pages } if pages.contains(page));
    actions.iter().any(wakes)
}

#[test]
fn a_fault_is_answered_however_much_is_left_and_each_turn_does_a_part() {
    for backing in [Backing::Shared, Backing::Private] {
        let (mut left, actions) = Left::by_a_dead_pager(backing);
        let all = [0, LARGE_PAGES / 3, LARGE_PAGES - 1];
        assert!(all.iter().all(|page| wakes(&actions, *page)), "whom the dead pager had heard asks again");
        assert_eq!(MOVING.map(|page| left.state(page) == PageState::System), [true, false, false], "{backing:?}");
        left.device_up();
        // One on its way out, and one on the device; each is raised again by the wake-up.
        for page in [MOVING[2], LARGE_PAGES - 2000] {
            let actions = left.fault(page);
            assert!(wakes(&actions, page), "it is raised again");
            left.fault(page);
            assert_eq!(left.state(page), PageState::System, "{backing:?}, page {page}");
        }
        assert_eq!(left.state(MOVING[1]), PageState::MovingOut, "all others' turn has not come");
        let before = left.unpunched;
        let turns = left.settle();
        // Once the entries are recovered, once their frames are claimed, and free ones scrubbed.
        assert!((LARGE_PAGES / STEP..3 * LARGE_PAGES / STEP + 20).contains(&turns), "{turns} turns");
        assert_eq!(MOVING.map(|page| left.state(page)), [PageState::System; 3]);
        if backing == Backing::Shared {
            assert!(before > LARGE_PAGES / 2, "{before} are left after the first answer");
            assert_eq!(left.unpunched, 0, "each once");
        }
    }
}

#[test]
fn requests_of_others_do_not_wait_and_its_own_do() {
    let turns_of = |req, event| {
        let (mut left, _) = Left::by_a_dead_pager(Backing::Shared);
        let (region, space, page_count, backing) = (OTHER, SpaceId(2), 4, Backing::Private);
        left.send(Event::RegionAdded { region, space, page_count, backing });
        let replies = |action: &Action| matches!(action, Action::Reply { req: to, .. } if *to == req);
        let mut answered = left.send(event).iter().any(replies);
        let mut turns = 0;
        while !answered && turns < 1000 {
            answered = left.send(Event::Tick).iter().any(replies);
            turns += 1;
        }
        turns
    };
    let pin = |req, region| Event::Pin { req: ReqId(req), region, pages: Pages { first: 0, count: 2 }, on: false };
    let turns = turns_of(ReqId(1), pin(1, OTHER));
    assert!(turns <= 8, "{turns} turns");
    let turns = turns_of(ReqId(2), pin(2, LARGE));
    // It looks again whenever something has ended, every other turn.
    assert!((LARGE_PAGES / STEP - 1..2 * LARGE_PAGES / STEP + 8).contains(&turns), "{turns} turns");
}

#[test]
fn what_the_program_has_dropped_comes_after_what_is_left_of_its_region() {
    let (mut left, _) = Left::by_a_dead_pager(Backing::Private);
    let removed = Event::Removed { region: LARGE, pages: Pages::one(MOVING[1]) };
    assert!(matches!(left.machine.core.first(&removed), Some(Event::RecoverNow { region: LARGE })));
    left.send(removed.clone());
    assert!(left.machine.core.first(&removed).is_none());
    assert!(MOVING.iter().all(|page| left.state(*page) == PageState::System));
}

/// The pager dies, and the next one before every single action of its recovery and of what programs and devices do meanwhile.
#[test]
fn inv3_a_crash_anywhere_in_a_recovery_keeps_every_byte() {
    let write = |page| Op::Cpu { region: 0, page, write: true };
    let on_device = |page| Op::Device { device: 0, region: 0, page, around: 0, write: true };
    let away = |page, count| Op::Migrate { region: 0, page, count, device: Some(0) };
    let mut points = 0;
    for (private_mask, seed) in [0, 1].into_iter().flat_map(|mask| (1..24).map(move |seed| (mask, seed))) {
        for (steps, actions) in (1..6).flat_map(|steps| (0..40).map(move |actions| (steps * 2, actions))) {
            let (page_counts, frame_counts) = (vec![16, 4], vec![20, 3]);
            let (faults, coherent) = (Faults::default(), false);
            let mut simulator =
                Simulator::new(Config { page_counts, frame_counts, faults, private_mask, coherent, seed });
            let history = (|| {
                simulator.finish()?;
                for op in [write(0), write(5), write(9), write(12), write(15), away(4, 6)] {
                    simulator.apply(op)?;
                    simulator.finish()?;
                }
                // On its way out, and on its way home.
                for op in [away(0, 4), away(11, 5), Op::Tick, write(5), on_device(12)] {
                    simulator.apply(op)?;
                }
                for _ in 0..steps {
                    simulator.pump(1)?;
                    simulator.deliver(0)?;
                }
                simulator.crash()?;
                simulator.apply(Op::CrashAfter { actions })?;
                let dropped = Op::DontNeed { region: 0, page: 8, count: 3 };
                for op in [write(15), Op::Pump { count: 4 }, on_device(1), Op::Tick, write(6), Op::Fork { region: 0 }] {
                    simulator.apply(op)?;
                    simulator.pump(3)?;
                }
                for op in [dropped, away(12, 4), write(9)] {
                    simulator.apply(op)?;
                    simulator.pump(2)?;
                }
                simulator.finish_and_read_all()
            })();
            assert_eq!(history, Ok(()), "private {private_mask}, seed {seed}, {steps} steps, action {actions}");
            points += u64::from(simulator.crash_count > 1);
        }
    }
    assert!(points > 4000, "only {points} crashes happened");
}
