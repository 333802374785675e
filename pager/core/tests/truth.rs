//! What the shell finds out by asking the kernel, not by an event: guards and memory that was replaced on the way home, and strays.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, FillStop, Outcome, PageState, PageStatus, Pages, RegionId, ReqId, SpaceId,
    StepResult, Target, Ticket,
};

const REGION: RegionId = RegionId(1);
const DEVICE: DeviceId = DeviceId(0);
const ALL: Pages = Pages { first: 0, count: PAGES };

fn recovered(entry: impl Fn(u64) -> Entry, strays: Vec<Pages>) -> (Machine, Vec<Action>) {
    let entries: Vec<_> = (0..PAGES).map(|page| (REGION, page, entry(page))).collect();
    let mut machine = Machine::with(&entries);
    let (space, backing) = (SpaceId(1), Backing::Private);
    let mut actions = machine.send(Event::RecoverRegion { region: REGION, space, page_count: PAGES, backing, strays });
    actions.extend(machine.send(Event::DeviceUp {
        device: DEVICE,
        frame_count: 8,
        fresh_mappings: true,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    }));
    actions.extend(machine.send(Event::Recovered));
    (machine, actions)
}

fn fills(actions: &[Action]) -> Vec<(Ticket, Pages)> {
    let fill = |a: &Action| if let Action::Fill { ticket, pages, .. } = a { Some((*ticket, *pages)) } else { None };
    actions.iter().filter_map(fill).collect()
}

fn states(machine: &Machine) -> Vec<PageState> {
    (0..PAGES).map(|page| machine.entry(REGION, page).state()).collect()
}

#[test]
fn what_became_a_guard_is_dropped_and_what_lies_behind_it_comes_home() {
    let (mut machine, _) = recovered(|page| Entry::on_device(DEVICE, page as u32), Vec::new());
    let mut actions = machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages: ALL, target: Target::Home });
    actions.extend(machine.send(Event::Tick));
    let [(ticket, all)] = fills(&actions)[..] else { panic!("one fill: {actions:?}") };
    assert_eq!(all, ALL);
    let actions =
        machine.send(Event::FillDone { ticket, done_pages: 1, stop: Some(FillStop::Dropped { page_count: 2 }) });
    assert_eq!(fills(&actions), [(ticket, Pages::one(3))]);
    use PageState::{Absent, MovingHome, System};
    assert_eq!(states(&machine), [System, Absent, Absent, MovingHome]);
    let mut actions = machine.send(Event::FillDone { ticket, done_pages: 1, stop: None });
    actions.extend(machine.send(Event::Tick));
    assert_eq!(states(&machine), [System, Absent, Absent, System]);
    let runs = actions.iter().find_map(|action| match action {
        Action::Reply { outcome: Outcome::Migrated { runs, moved_pages: 2 }, .. } => Some(runs),
        _ => None,
    });
    let fates: Vec<_> = runs.expect("an answer").iter().map(|run| (run.count, run.status)).collect();
    assert_eq!(fates, [(1, PageStatus::Ok), (2, PageStatus::Gone), (1, PageStatus::Ok)]);
}

#[test]
fn more_than_is_left_is_not_dropped() {
    let (mut machine, _) = recovered(|page| Entry::on_device(DEVICE, page as u32), Vec::new());
    let pages = Pages { first: 0, count: 2 };
    let mut actions = machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages, target: Target::Home });
    actions.extend(machine.send(Event::Tick));
    let (ticket, _) = fills(&actions)[0];
    machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Dropped { page_count: 99 }) });
    use PageState::{Absent, Device};
    assert_eq!(states(&machine), [Absent, Absent, Device, Device]);
}

/// Conformance G02 under `--chaos 1` found page 618 read as zero: the page that the agent had brought home before it met a guard was a
/// stray for the pager, which was killed while it was taken away. The next one found it, took it for home, and then it went.
#[test]
fn a_stray_that_is_being_taken_away_when_the_pager_dies_is_not_taken_for_what_came_home() {
    let moving = |page: u64| Entry::on_device(DEVICE, page as u32).with_state(PageState::MovingHome);
    let (mut machine, actions) = recovered(moving, vec![Pages::one(1)]);
    let punches: Vec<_> = actions
        .iter()
        .filter_map(|a| if let Action::Punch { ticket, pages, .. } = a { Some((*ticket, *pages)) } else { None })
        .collect();
    let [(ticket, page)] = punches[..] else { panic!("one punch: {actions:?}") };
    assert_eq!(page, Pages::one(1));
    assert!(fills(&actions).iter().all(|(_, pages)| !pages.contains(1)), "{actions:?}");
    assert_eq!(machine.entry(REGION, 1).state(), PageState::Device, "its frame is the content still");
    machine.send(Event::PunchDone { ticket, result: StepResult::Ok });
    let fault = Event::CpuFault { region: REGION, page: 1, write: false, wp: false, minor: false };
    let mut actions = machine.send(fault);
    actions.extend(machine.send(Event::Tick));
    assert!(fills(&actions).iter().any(|(_, pages)| pages.contains(1)), "{actions:?}");
}
