//! A device that works and has some pages no more: exactly these are poisoned, and what was discarded or is at home is no loss.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, FillStop, PageState, Pages, RegionId, ReqId, SpaceId, Target, Ticket,
};

const REGION: RegionId = RegionId(1);
const DEVICE: DeviceId = DeviceId(0);

/// All pages of a region on a device that is up.
fn on_device(state: PageState) -> (Machine, Vec<Action>) {
    let entry = |page| Entry::on_device(DEVICE, page as u32).with_state(state);
    let entries: Vec<_> = (0..PAGES).map(|page| (REGION, page, entry(page))).collect();
    let mut machine = Machine::with(&entries);
    let (space, strays) = (SpaceId(1), Vec::new());
    let recover = Event::RecoverRegion { region: REGION, space, page_count: PAGES, backing: Backing::Private, strays };
    machine.send(recover);
    let actions = machine.send(Event::DeviceUp {
        device: DEVICE,
        frame_count: PAGES as u32,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    (machine, actions)
}

fn fill(actions: &[Action]) -> Option<(Ticket, Pages)> {
    actions.iter().find_map(|action| match action {
        Action::Fill { ticket, pages, .. } => Some((*ticket, *pages)),
        _ => None,
    })
}

fn all_home(machine: &mut Machine) -> Ticket {
    let pages = Pages { first: 0, count: PAGES };
    let mut actions = machine.send(Event::Migrate { req: ReqId(7), region: REGION, pages, target: Target::Home });
    actions.extend((0..4).flat_map(|_| machine.send(Event::Tick)));
    let (ticket, filled) = fill(&actions).expect("it comes home");
    assert_eq!(filled, pages);
    ticket
}

fn states(machine: &Machine) -> Vec<PageState> {
    (0..PAGES).map(|page| machine.entry(REGION, page).state()).collect()
}

#[test]
fn what_lies_between_comes_home_and_only_what_is_lost_is_poisoned() {
    let (mut machine, _) = on_device(PageState::Device);
    let ticket = all_home(&mut machine);
    // The first page came; the second one is lost; the other two are asked for again.
    let actions = machine.send(Event::FillDone { ticket, done_pages: 1, stop: Some(FillStop::Lost { page_count: 1 }) });
    let poisoned = |action: &Action| matches!(action, Action::Poison { pages, .. } if *pages == Pages::one(1));
    assert!(actions.iter().any(poisoned), "{actions:?}");
    assert_eq!(fill(&actions), Some((ticket, Pages { first: 2, count: 2 })));
    let mut actions = machine.send(Event::FillDone { ticket, done_pages: 2, stop: None });
    use PageState::{Poisoned, System};
    assert_eq!(states(&machine), [System, Poisoned, System, System]);
    actions.extend((0..4).flat_map(|_| machine.send(Event::Tick)));
    let answered = |action: &Action| matches!(action, Action::Reply { req: ReqId(7), .. });
    assert!(actions.iter().any(answered), "{actions:?}");
}

#[test]
fn a_driver_that_names_more_than_was_asked_for_loses_no_more() {
    let (mut machine, _) = on_device(PageState::Device);
    let fault = Event::CpuFault { region: REGION, page: 3, write: false, wp: false, minor: false };
    let (ticket, pages) = fill(&machine.send(fault)).expect("it comes home");
    assert_eq!(pages, Pages::one(3));
    machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Lost { page_count: u64::MAX }) });
    use PageState::{Device, Poisoned};
    assert_eq!(states(&machine), [Device, Device, Device, Poisoned]);
}

#[test]
fn what_was_discarded_meanwhile_is_no_loss() {
    let (mut machine, _) = on_device(PageState::Device);
    let ticket = all_home(&mut machine);
    machine.send(Event::Removed { region: REGION, pages: Pages { first: 0, count: 2 } });
    machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Lost { page_count: 3 }) });
    use PageState::{Absent, MovingHome, Poisoned};
    assert_eq!(states(&machine), [Absent, Absent, Poisoned, MovingHome]);
}

#[test]
fn after_a_restart_a_page_at_home_is_looked_for_first() {
    let (mut machine, actions) = on_device(PageState::MovingHome);
    let (ticket, _) = fill(&actions).expect("it goes on");
    let actions = machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Lost { page_count: 1 }) });
    assert!(actions.iter().any(|action| matches!(action, Action::Continue { .. })), "it is looked for: {actions:?}");
    machine.send(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(FillStop::Exists) });
    assert_eq!(machine.entry(REGION, 0).state(), PageState::System);
}
