//! A migration of some of the pages: those that are not selected stay where they are, and say so.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, Only, Outcome, PageStatus, Pages, RegionId, ReqId, SpaceId, StepResult,
    Target,
};

const REGION: RegionId = RegionId(1);
const ALL: Pages = Pages { first: 0, count: PAGES };
const HERE: DeviceId = DeviceId(0);
const ELSEWHERE: DeviceId = DeviceId(1);

/// One page here, one elsewhere, one in system memory, one never touched.
fn spread() -> Machine {
    let entries = [Entry::on_device(HERE, 0), Entry::on_device(ELSEWHERE, 0), Entry::SYSTEM, Entry::ABSENT];
    let entries: Vec<_> = (0..).zip(entries).map(|(page, entry)| (REGION, page, entry)).collect();
    let mut machine = Machine::with(&entries);
    let (space, backing) = (SpaceId(1), Backing::Shared);
    let recovered =
        machine.send(Event::RecoverRegion { region: REGION, space, page_count: PAGES, backing, strays: Vec::new() });
    for action in recovered {
        let result = StepResult::Ok;
        match action {
            Action::Punch { ticket, .. } => drop(machine.send(Event::PunchDone { ticket, result })),
            Action::WriteProtect { ticket, .. } => drop(machine.send(Event::WpDone { ticket, result })),
            _ => {}
        }
    }
    for device in [HERE, ELSEWHERE] {
        let (fresh_mappings, memory_known, memory_lost, coherent) = (false, true, false, false);
        machine.send(Event::DeviceUp { device, frame_count: 8, fresh_mappings, memory_known, memory_lost, coherent });
    }
    machine.send(Event::Recovered);
    machine
}

/// Fates that are known before anything is copied: the request is answered when what it has begun is over, so only what it begins is seen.
fn begun(target: Target, only: Only) -> (Vec<Action>, Machine) {
    let mut machine = spread();
    let mut actions = machine.send(Event::MigrateOnly { req: ReqId(1), region: REGION, pages: ALL, target, only });
    for _ in 0..4 {
        actions.extend(machine.send(Event::Tick));
    }
    (actions, machine)
}

#[test]
fn what_is_on_another_device_stays_there_when_system_memory_was_selected() {
    let (actions, machine) = begun(Target::Device(HERE), Only::InSystem);
    let leaves = |action: &Action| matches!(action, Action::CopyAcross { .. } | Action::Fill { .. });
    assert!(!actions.iter().any(leaves), "{actions:?}");
    assert!(machine.entry(REGION, 2).is_moving(), "the system page is on its way");
    assert_eq!(machine.entry(REGION, 1).device(), ELSEWHERE);
}

#[test]
fn only_the_pages_of_the_device_come_home() {
    let (_, machine) = begun(Target::Home, Only::OnDevice(HERE));
    assert!(machine.entry(REGION, 0).is_moving(), "its page is on its way");
    assert!(machine.entry(REGION, 1).lives_on_device(), "the other device's is not");
}

#[test]
fn a_range_of_which_nothing_is_selected_is_answered_at_once_with_each_pages_fate() {
    let mut machine = spread();
    let (region, pages) = (REGION, Pages { first: 1, count: 3 });
    let (target, only) = (Target::Home, Only::OnDevice(HERE));
    let mut actions = machine.send(Event::MigrateOnly { req: ReqId(1), region, pages, target, only });
    for _ in 0..4 {
        actions.extend(machine.send(Event::Tick));
    }
    let answer = actions.iter().find_map(|action| match action {
        Action::Reply { outcome: Outcome::Migrated { runs, moved_pages }, .. } => Some((runs.clone(), *moved_pages)),
        _ => None,
    });
    let (runs, moved_pages) = answer.expect("it is answered");
    let fates: Vec<_> = runs.iter().map(|run| (run.first, run.count, run.status)).collect();
    assert_eq!(moved_pages, 0);
    assert_eq!(fates, [(1, 1, PageStatus::NotSelected), (2, 2, PageStatus::AlreadyThere)]);
}
