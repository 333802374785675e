//! Forks that a pager's death interrupts: the child reads its parent's bytes, or learns that they are lost, and never zeros instead.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, PageState, Pages, RegionId, ReqId, SpaceId, StepResult, Ticket,
};

const PARENT: RegionId = RegionId(1);
const CHILD: RegionId = RegionId(2);
const ALL: Pages = Pages { first: 0, count: PAGES };

fn recover(machine: &mut Machine, region: RegionId) -> Vec<Action> {
    let space = SpaceId(region.0);
    machine.send(Event::RecoverRegion {
        region,
        space,
        page_count: PAGES,
        backing: Backing::Private,
        strays: Vec::new(),
    })
}

fn ready(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::ForkReady { region: CHILD }))
}

#[test]
fn what_devices_may_write_of_the_parents_is_revoked_again_before_the_child_is_served() {
    let shared = Entry::on_device(DeviceId(0), 5).with_shared(true);
    let mut machine = Machine::with(&[(PARENT, 2, shared.with_mapped_mask(0b101)), (CHILD, 2, shared)]);
    recover(&mut machine, PARENT);
    recover(&mut machine, CHILD);
    machine.send(Event::Recovered);
    let actions = machine.send(Event::ForkedBefore { parent: PARENT, child: CHILD });
    let ticket = actions.iter().find_map(|action| match action {
        Action::Revoke { ticket, region: PARENT, pages: ALL, devices: 0b101 } => Some(*ticket),
        _ => None,
    });
    assert!(!ready(&actions), "not before the revocation is through");
    let actions = machine.send(Event::RevokeDone { ticket: ticket.expect("a revocation"), result: StepResult::Ok });
    assert!(ready(&actions));
    assert_eq!(machine.entry(PARENT, 2).mapped_mask(), 0);
}

#[test]
fn a_child_of_a_parent_that_no_device_maps_is_served_at_once() {
    let mut machine = Machine::with(&[(PARENT, 0, Entry::on_device(DeviceId(0), 5).with_mapped_mask(1))]);
    recover(&mut machine, PARENT);
    recover(&mut machine, CHILD);
    let actions = machine.send(Event::ForkedBefore { parent: PARENT, child: CHILD });
    assert!(ready(&actions), "what only the parent owns concerns no child");
    assert!(ready(&machine.send(Event::ForkedBefore { parent: RegionId(9), child: CHILD })), "the parent has gone");
}

#[test]
fn a_childs_page_that_waited_for_its_parents_way_out_is_poisoned_and_not_zero() {
    let own = Entry::SYSTEM.with_state(PageState::MovingOut);
    let mut machine =
        Machine::with(&[(CHILD, 0, own), (CHILD, 1, Entry::WAITS_FOR_PARENT), (CHILD, 2, Entry::WAITS_FOR_PARENT)]);
    let actions = recover(&mut machine, CHILD);
    let (ticket, lost) = poison(&actions, CHILD);
    assert_eq!(lost, Pages { first: 1, count: 2 });
    let back = actions.iter().any(|action| matches!(action, Action::MoveBack { pages, .. } if *pages == Pages::one(0)));
    assert!(back, "its own way out is undone: {actions:?}");
    assert_eq!([1, 2].map(|page| machine.entry(CHILD, page)), [Entry::WAITS_FOR_PARENT; 2], "no poison is there yet");
    let actions = machine.send(Event::PoisonDone { ticket, result: StepResult::Ok });
    assert_eq!([1, 2].map(|page| machine.entry(CHILD, page)), [Entry::SYSTEM; 2]);
    assert!(actions.contains(&Action::Wake { region: CHILD, pages: lost }), "{actions:?}");
}

/// The one order to poison: its ticket, and what.
fn poison(actions: &[Action], of: RegionId) -> (Ticket, Pages) {
    let lost = |action: &Action| match action {
        Action::PoisonLost { ticket, region, pages } if *region == of => Some((*ticket, *pages)),
        _ => None,
    };
    let all: Vec<_> = actions.iter().filter_map(lost).collect();
    assert_eq!(all.len(), 1, "{actions:?}");
    all[0]
}

/// A child whose pages 1 and 2 are to be poisoned, by the ticket.
fn losing() -> (Machine, Ticket) {
    let mut machine = Machine::with(&[(CHILD, 1, Entry::WAITS_FOR_PARENT), (CHILD, 2, Entry::WAITS_FOR_PARENT)]);
    let (ticket, _) = poison(&recover(&mut machine, CHILD), CHILD);
    (machine, ticket)
}

#[test]
fn poison_that_the_kernel_does_not_take_yet_is_tried_until_it_is_there() {
    let (mut machine, ticket) = losing();
    machine.send(Event::PoisonDone { ticket, result: StepResult::Again });
    assert_eq!(poison(&machine.send(Event::Tick), CHILD), (ticket, Pages { first: 1, count: 2 }));
    machine.send(Event::PoisonDone { ticket, result: StepResult::Later });
    assert!(machine.send(Event::Tick).is_empty(), "later");
    assert!(machine.core.next_deadline_us().is_some());
    assert_eq!([1, 2].map(|page| machine.entry(CHILD, page)), [Entry::WAITS_FOR_PARENT; 2]);
}

/// The kernel has copied the child's page table before the poison was there.
#[test]
fn what_is_lost_to_a_child_is_lost_to_its_child() {
    let (mut machine, ticket) = losing();
    machine.send(Event::PoisonDone { ticket, result: StepResult::Again });
    let grandchild = RegionId(3);
    let actions = fork(&mut machine, CHILD, grandchild);
    let (its, lost) = poison(&actions, grandchild);
    assert_eq!(lost, Pages { first: 1, count: 2 });
    assert_eq!([1, 2].map(|page| machine.entry(grandchild, page)), [Entry::WAITS_FOR_PARENT; 2]);
    for (ticket, region) in [(ticket, CHILD), (its, grandchild)] {
        machine.send(Event::PoisonDone { ticket, result: StepResult::Ok });
        assert_eq!([1, 2].map(|page| machine.entry(region, page)), [Entry::SYSTEM; 2]);
    }
}

#[test]
fn a_child_that_drops_what_is_lost_to_it_finds_a_hole_and_no_poison() {
    let (mut machine, old) = losing();
    let actions = machine.send(Event::Removed { region: CHILD, pages: Pages::one(1) });
    assert_eq!(machine.entry(CHILD, 1), Entry::SYSTEM);
    let (ticket, lost) = poison(&actions, CHILD);
    assert_eq!(lost, Pages::one(2), "its neighbour is not dropped");
    machine.send(Event::PoisonDone { ticket: old, result: StepResult::Ok });
    assert_eq!(machine.entry(CHILD, 2), Entry::WAITS_FOR_PARENT, "that answer is not its own");
    machine.send(Event::PoisonDone { ticket, result: StepResult::Ok });
    assert_eq!(machine.entry(CHILD, 2), Entry::SYSTEM);
    assert!(machine.core.idle());
}

#[test]
fn a_device_that_asks_before_its_frames_are_known_gets_no_shared_frame_to_write() {
    let shared = Entry::on_device(DeviceId(0), 5).with_shared(true);
    let mut machine = Machine::with(&[(PARENT, 2, shared), (CHILD, 2, shared)]);
    for region in [PARENT, CHILD] {
        let punches: Vec<_> = recover(&mut machine, region)
            .iter()
            .filter_map(|action| if let Action::Punch { ticket, .. } = action { Some(*ticket) } else { None })
            .collect();
        for ticket in punches {
            machine.send(Event::PunchDone { ticket, result: StepResult::Ok });
        }
    }
    machine.send(Event::Recovered);
    let (device, pages) = (DeviceId(0), Pages::one(2));
    let wish = Event::Resolve {
        req: ReqId(1),
        region: PARENT,
        pages,
        fault_page: 2,
        device,
        write: true,
        whole: false,
        exclusive: false,
    };
    machine.send(wish);
    machine.send(Event::Tick);
    assert!(machine.entry(PARENT, 2).shared(), "the child names it too");
    let mut actions = machine.send(Event::DeviceUp {
        device,
        frame_count: 8,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    actions.extend(machine.send(Event::Tick));
    let home =
        |action: &Action| matches!(action, Action::Fill { region: PARENT, pages, .. } if *pages == Pages::one(2));
    assert!(actions.iter().any(home), "the parent gets a page of its own: {actions:?}");
}

fn added(entries: &[(RegionId, u64, Entry)]) -> Machine {
    let mut machine = Machine::with(entries);
    recover(&mut machine, PARENT);
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 8,
        fresh_mappings: false,
        memory_known: false,
        memory_lost: false,
        coherent: false,
    });
    machine
}

fn fork(machine: &mut Machine, parent: RegionId, child: RegionId) -> Vec<Action> {
    machine.send(Event::Forked { parent, child, space: SpaceId(child.0) })
}

#[test]
fn what_a_device_may_write_behind_a_page_on_its_way_home_is_revoked_too() {
    let on_device = |frame| Entry::on_device(DeviceId(0), frame);
    let mut machine = added(&[(PARENT, 0, on_device(4)), (PARENT, 1, on_device(5).with_mapped_mask(1))]);
    machine.send(Event::Migrate {
        req: ReqId(1),
        region: PARENT,
        pages: Pages::one(0),
        target: uhmm_pager_core::Target::Home,
    });
    machine.send(Event::Tick);
    assert_eq!(machine.entry(PARENT, 0).state(), PageState::MovingHome);
    let actions = fork(&mut machine, PARENT, CHILD);
    assert!(actions.iter().any(|action| matches!(action, Action::Revoke { region: PARENT, .. })), "{actions:?}");
    assert!(!ready(&actions));
}

#[test]
fn a_fork_forgets_no_mapping_that_it_did_not_revoke() {
    let copy = Entry::on_device(DeviceId(1), 0).with_state(PageState::Duplicated).with_mapped_mask(0b10);
    let mut machine = added(&[(PARENT, 0, Entry::on_device(DeviceId(0), 4).with_mapped_mask(1)), (PARENT, 1, copy)]);
    let actions = fork(&mut machine, PARENT, CHILD);
    let revoke = |action: &Action| if let Action::Revoke { ticket, .. } = action { Some(*ticket) } else { None };
    let ticket = actions.iter().find_map(revoke).expect("a revocation");
    assert!(ready(&machine.send(Event::RevokeDone { ticket, result: StepResult::Ok })));
    assert_eq!(machine.entry(PARENT, 0).mapped_mask(), 0);
    assert_eq!(machine.entry(PARENT, 1), copy, "device 1 was not asked");
}

#[test]
fn a_grandchild_gets_what_its_grandparent_was_sending_out() {
    let grandchild = RegionId(3);
    let mut machine = added(&[(PARENT, 0, Entry::SYSTEM)]);
    let target = uhmm_pager_core::Target::Device(DeviceId(0));
    machine.send(Event::Migrate { req: ReqId(1), region: PARENT, pages: Pages::one(0), target });
    let copy = |action: &Action| if let Action::CopyOut { ticket, .. } = action { Some(*ticket) } else { None };
    let ticket = machine.send(Event::Tick).iter().find_map(copy).expect("a copy");
    fork(&mut machine, PARENT, CHILD);
    fork(&mut machine, CHILD, grandchild);
    let runs = vec![uhmm_pager_core::CopyRun { count: 1, status: uhmm_pager_core::CopyStatus::Ok }];
    let actions = machine.send(Event::CopiedRuns { ticket, runs });
    for region in [CHILD, grandchild] {
        let fills = |action: &Action| matches!(action, Action::Fill { region: of, .. } if *of == region);
        assert!(actions.iter().any(fills), "{actions:?}");
    }
}
