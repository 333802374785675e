//! Content that is discarded while its pages are on the way: it never returns, and its neighbours never go with it.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, CopyRun, CopyStatus, DeviceId, Entry, Event, PageState, Pages, RegionId, ReqId, SpaceId,
    StepResult, Target, Ticket,
};

const REGION: RegionId = RegionId(1);

/// All pages with these entries.
fn all(entry: impl Fn(u64) -> Entry) -> Machine {
    Machine::with(&(0..PAGES).map(|page| (REGION, page, entry(page))).collect::<Vec<_>>())
}

/// Four system pages are being taken out.
fn copying() -> (Machine, Ticket) {
    let mut machine = all(|_| Entry::SYSTEM);
    machine.send(Event::RegionAdded { region: REGION, space: SpaceId(1), page_count: 4, backing: Backing::Private });
    let (device, pages) = (DeviceId(0), Pages { first: 0, count: 4 });
    machine.send(Event::DeviceUp {
        device,
        frame_count: 8,
        fresh_mappings: true,
        memory_known: false,
        memory_lost: false,
        coherent: false,
    });
    let target = Target::Device(device);
    let mut actions = machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages, target });
    actions.extend(machine.send(Event::Tick));
    let copy = actions.iter().find_map(|action| match action {
        Action::CopyOut { ticket, .. } => Some(*ticket),
        _ => None,
    });
    (machine, copy.expect("the copy begins"))
}

/// Page 1 is discarded meanwhile, and the copy fails.
fn failed_copy_with_a_discard() -> (Machine, Vec<Action>) {
    let (mut machine, ticket) = copying();
    machine.send(Event::Removed { region: REGION, pages: Pages::one(1) });
    let runs = vec![CopyRun { count: 4, status: CopyStatus::Io }];
    let actions = machine.send(Event::CopiedRuns { ticket, runs });
    (machine, actions)
}

#[test]
fn what_is_discarded_while_a_driver_fetches_it_is_not_put_in_place() {
    let mut machine = all(|page| Entry::on_device(DeviceId(0), page as u32));
    let (device, pages) = (DeviceId(0), Pages { first: 0, count: 4 });
    let backing = Backing::Private;
    for (ticket, _) in punched(&machine.send(Event::RecoverRegion {
        region: REGION,
        space: SpaceId(1),
        page_count: 4,
        backing,
        strays: vec![Pages { first: 0, count: 4 }],
    })) {
        machine.send(Event::PunchDone { ticket, result: StepResult::Ok });
    }
    machine.send(Event::DeviceUp {
        device,
        frame_count: 8,
        fresh_mappings: true,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    machine.send(Event::Recovered);
    let mut actions = machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages, target: Target::Home });
    actions.extend(machine.send(Event::Tick));
    let fill =
        |action: &Action| if let Action::Fill { ticket, pages, .. } = action { Some((*ticket, *pages)) } else { None };
    let (ticket, all) = actions.iter().find_map(fill).expect("a fill");
    assert_eq!((all, machine.core.fill_limit(ticket)), (pages, 4));
    machine.send(Event::Removed { region: REGION, pages: Pages::one(2) });
    assert_eq!(machine.core.fill_limit(ticket), 2);
    machine.send(Event::Removed { region: REGION, pages: Pages::one(0) });
    assert_eq!(machine.core.fill_limit(ticket), 0);
    let actions = machine.send(Event::FillDone { ticket, done_pages: 0, stop: None });
    assert_eq!(actions.iter().find_map(fill).map(|(_, pages)| pages), Some(Pages::one(1)), "{actions:?}");
}

fn moved_back(actions: &[Action]) -> Vec<Pages> {
    actions.iter().filter_map(|a| if let Action::MoveBack { pages, .. } = a { Some(*pages) } else { None }).collect()
}

fn punched(actions: &[Action]) -> Vec<(Ticket, Pages)> {
    let punch = |a: &Action| if let Action::Punch { ticket, pages, .. } = a { Some((*ticket, *pages)) } else { None };
    actions.iter().filter_map(punch).collect()
}

#[test]
fn a_failed_copy_gives_the_neighbours_of_a_discarded_page_back() {
    let (_, actions) = failed_copy_with_a_discard();
    assert_eq!(moved_back(&actions), [Pages::one(0), Pages { first: 2, count: 2 }]);
    assert_eq!(punched(&actions).iter().map(|(_, pages)| *pages).collect::<Vec<_>>(), [Pages::one(1)]);
}

#[test]
fn a_drop_of_a_discarded_page_that_is_tried_again_does_not_bring_it_back() {
    let (mut machine, actions) = failed_copy_with_a_discard();
    for (ticket, _) in punched(&actions) {
        machine.send(Event::PunchDone { ticket, result: StepResult::Again });
    }
    let again = machine.send(Event::Tick);
    assert_eq!(moved_back(&again), []);
    assert_eq!(punched(&again).iter().map(|(_, pages)| *pages).collect::<Vec<_>>(), [Pages::one(1)]);
}

#[test]
fn a_discard_after_a_restart_frees_the_frames_of_its_own_pages() {
    let on_device = |page: u64| Entry::on_device(DeviceId(0), 4 + page as u32);
    let mut machine = all(on_device);
    let backing = Backing::Private;
    let recover = Event::RecoverRegion {
        region: REGION,
        space: SpaceId(1),
        page_count: 4,
        backing,
        strays: vec![Pages { first: 0, count: 4 }],
    };
    let punches = punched(&machine.send(recover));
    machine.send(Event::Recovered);
    machine.send(Event::Removed { region: REGION, pages: Pages { first: 2, count: 2 } });
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 8,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    for (ticket, _) in punches {
        machine.send(Event::PunchDone { ticket, result: StepResult::Ok });
    }
    assert_eq!(
        [0, 1].map(|page| machine.entry(REGION, page)),
        [0, 1].map(on_device),
        "its neighbours stay where they are"
    );
    assert_eq!([2, 3].map(|page| machine.entry(REGION, page)), [Entry::ABSENT; 2]);
    // Room for four pages, and none of it is a neighbour's.
    let pages = Pages { first: 2, count: 2 };
    machine.send(Event::Migrate { req: ReqId(2), region: REGION, pages, target: Target::Device(DeviceId(0)) });
    let moved = [2, 3].map(|page| machine.entry(REGION, page));
    assert!(moved.iter().all(|entry| entry.device() == DeviceId(0) && !(4..6).contains(&entry.frame())), "{moved:?}");
}

/// A thread drops a range while another one drops a part of it, or the next pager repeats what the dead one had read.
#[test]
fn what_is_discarded_twice_while_it_is_punched_is_dropped_once() {
    let mut machine = all(|page| Entry::on_device(DeviceId(0), 4 + page as u32));
    let backing = Backing::Private;
    let recover = Event::RecoverRegion {
        region: REGION,
        space: SpaceId(1),
        page_count: 4,
        backing,
        strays: vec![Pages { first: 0, count: 4 }],
    };
    let punches = punched(&machine.send(recover));
    machine.send(Event::Recovered);
    for pages in [Pages { first: 1, count: 2 }, Pages { first: 0, count: 4 }, Pages { first: 2, count: 2 }] {
        machine.send(Event::Removed { region: REGION, pages });
    }
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 8,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    for (ticket, _) in punches {
        machine.send(Event::PunchDone { ticket, result: StepResult::Ok });
    }
    assert_eq!([0, 1, 2, 3].map(|page| machine.entry(REGION, page)), [Entry::ABSENT; 4]);
}

/// Pages on a device that devices map, while these mappings are taken away by message.
fn while_revoking(begin: impl FnOnce(&mut Machine) -> Vec<Action>) -> (Machine, Ticket) {
    let mut machine = all(|page| Entry::on_device(DeviceId(0), 4 + page as u32).with_mapped_mask(1));
    let backing = Backing::Private;
    let recover =
        Event::RecoverRegion { region: REGION, space: SpaceId(1), page_count: 4, backing, strays: Vec::new() };
    assert!(punched(&machine.send(recover)).is_empty(), "nothing of them is in the address space");
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 8,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    machine.send(Event::Recovered);
    let mut actions = begin(&mut machine);
    actions.extend(machine.send(Event::Tick));
    let ticket = revoked(&actions).expect("the device is asked");
    (machine, ticket)
}

fn revoked(actions: &[Action]) -> Option<Ticket> {
    actions.iter().find_map(|a| if let Action::Revoke { ticket, .. } = a { Some(*ticket) } else { None })
}

#[test]
fn what_is_discarded_while_a_device_lets_go_of_it_stays_dropped() {
    let pages = Pages { first: 0, count: 4 };
    let advice = |machine: &mut Machine| {
        machine.send(Event::RevokeMappings { req: ReqId(1), region: REGION, pages, devices: 1 })
    };
    let child = RegionId(2);
    let fork = move |machine: &mut Machine| {
        let (space, page_count, backing) = (SpaceId(2), 4, Backing::Private);
        machine.send(Event::RegionAdded { region: child, space, page_count, backing });
        machine.send(Event::Forked { parent: REGION, child, space })
    };
    for (mut machine, ticket) in [while_revoking(advice), while_revoking(fork)] {
        machine.send(Event::Removed { region: REGION, pages: Pages { first: 1, count: 2 } });
        let mut actions = machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
        while let Some(ticket) = revoked(&actions) {
            actions = machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
        }
        assert_eq!([1, 2].map(|page| machine.entry(REGION, page)), [Entry::ABSENT; 2]);
        assert!([0, 3].iter().all(|page| machine.entry(REGION, *page).lives_on_device()), "its neighbours stay");
    }
}

/// Copies on a device that nobody maps end within the step of the request that wants them gone.
#[test]
fn a_request_goes_on_when_what_it_waits_for_ends_at_once() {
    let copy = |page: u64| Entry::on_device(DeviceId(0), 4 + page as u32).with_state(PageState::Duplicated);
    let mut machine = all(copy);
    let (backing, pages) = (Backing::Private, Pages { first: 0, count: 4 });
    machine.send(Event::RecoverRegion {
        region: REGION,
        space: SpaceId(1),
        page_count: 4,
        backing,
        strays: Vec::new(),
    });
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 16,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    machine.send(Event::Recovered);
    let target = Target::Device(DeviceId(0));
    let mut actions = machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages, target });
    for _ in 0..8 {
        actions.extend(machine.send(Event::Tick));
    }
    let copies = |action: &Action| matches!(action, Action::CopyOut { .. });
    assert!(actions.iter().any(copies), "the way out begins: {actions:?}");
}

fn recover(machine: &mut Machine) -> Vec<Action> {
    let backing = Backing::Private;
    let region = Event::RecoverRegion { region: REGION, space: SpaceId(1), page_count: PAGES, backing, strays: vec![] };
    let mut actions = machine.send(region);
    actions.extend(machine.send(Event::Recovered));
    actions
}

fn device_returns(machine: &mut Machine, fresh_mappings: bool, memory_lost: bool) -> Vec<Action> {
    machine.send(Event::DeviceUp {
        device: DeviceId(0),
        frame_count: 8,
        fresh_mappings,
        memory_known: true,
        memory_lost,
        coherent: false,
    })
}

/// The event was told once; a pager that dies before it is done leaves it in the entries.
#[test]
fn what_is_discarded_on_the_way_out_stays_dropped_when_the_pager_dies() {
    let (machine, _) = failed_copy_with_a_discard();
    let left: Vec<_> = (0..PAGES).map(|page| (REGION, page, machine.entry(REGION, page))).collect();
    assert!(left.iter().all(|(_, page, entry)| entry.is_moving() && entry.discarded() == (*page == 1)), "{left:?}");
    let mut next = Machine::with(&left);
    let backs: Vec<_> = recover(&mut next)
        .iter()
        .filter_map(|a| if let Action::MoveBack { ticket, pages, .. } = a { Some((*ticket, *pages)) } else { None })
        .collect();
    let wanted = |(ticket, pages): &(Ticket, Pages)| (*pages, next.core.alike_in_front(*ticket, *pages));
    let expected =
        [(Pages::one(0), (1, false)), (Pages::one(1), (1, true)), (Pages { first: 2, count: 2 }, (2, false))];
    assert_eq!(backs.iter().map(wanted).collect::<Vec<_>>(), expected);
    for (ticket, _) in backs {
        next.send(Event::MoveBackDone { ticket, result: StepResult::Ok });
    }
    assert!((0..PAGES).all(|page| next.entry(REGION, page) == Entry::SYSTEM));
}

#[test]
fn what_is_discarded_on_a_device_stays_dropped_when_the_pager_dies() {
    for memory_lost in [false, true] {
        let mut machine = all(|page| Entry::on_device(DeviceId(0), page as u32).with_mapped_mask(1));
        recover(&mut machine);
        device_returns(&mut machine, false, false);
        let actions = machine.send(Event::Removed { region: REGION, pages: Pages { first: 1, count: 2 } });
        assert!(actions.iter().any(|action| matches!(action, Action::Revoke { .. })), "{actions:?}");
        let left: Vec<_> = (0..PAGES).map(|page| (REGION, page, machine.entry(REGION, page))).collect();
        let mut next = Machine::with(&left);
        let mut actions = recover(&mut next);
        actions.extend(device_returns(&mut next, true, memory_lost));
        if let Some(ticket) = revoked(&actions) {
            actions.extend(next.send(Event::RevokeDone { ticket, result: StepResult::Ok }));
        }
        assert_eq!([1, 2].map(|page| next.entry(REGION, page)), [Entry::ABSENT; 2], "{actions:?}");
        assert!(!actions.iter().any(|a| matches!(a, Action::Fill { .. } | Action::Continue { .. })), "{actions:?}");
        let neighbours = [0, 3].map(|page| next.entry(REGION, page).state());
        let expected = if memory_lost { PageState::Poisoned } else { PageState::Device };
        assert_eq!(neighbours, [expected; 2]);
    }
}

/// It had just arrived: its system pages were punched when it was discarded, and then the pager died.
#[test]
fn what_is_discarded_when_it_has_just_arrived_stays_dropped_when_the_pager_dies() {
    for (memory_lost, touched) in [(false, false), (true, false), (false, true)] {
        let entry = |page: u64| Entry::on_device(DeviceId(0), page as u32).with_discarded(page == 1);
        let mut next = all(entry);
        let mut actions = recover(&mut next);
        if touched {
            // The program touches it before the device is there.
            let page = 1;
            actions.extend(next.send(Event::CpuFault { region: REGION, page, write: true, wp: false, minor: false }));
        }
        actions.extend(device_returns(&mut next, true, memory_lost));
        assert_eq!(next.entry(REGION, 1), Entry::ABSENT, "{actions:?}");
        let fills = |a: &Action| matches!(a, Action::Fill { pages, .. } if pages.contains(1));
        assert!(!actions.iter().any(fills), "{actions:?}");
        assert!(actions.iter().any(|a| matches!(a, Action::Wake { pages, .. } if pages.contains(1))), "{actions:?}");
        let expected = if memory_lost { PageState::Poisoned } else { PageState::Device };
        assert_eq!([0, 2, 3].map(|page| next.entry(REGION, page).state()), [expected; 3]);
    }
}

/// The program goes on as soon as the next pager runs; its device comes later.
#[test]
fn what_a_dead_pager_was_bringing_home_and_is_discarded_before_its_device_is_there_stays_dropped() {
    for memory_lost in [false, true] {
        let moving = |page: u64| Entry::on_device(DeviceId(0), page as u32).with_state(PageState::MovingHome);
        let mut next = all(moving);
        recover(&mut next);
        next.send(Event::Removed { region: REGION, pages: Pages { first: 1, count: 2 } });
        let actions = device_returns(&mut next, true, memory_lost);
        assert_eq!([1, 2].map(|page| next.entry(REGION, page)), [Entry::ABSENT; 2], "{actions:?}");
        let touches = |a: &Action| matches!(a, Action::Fill { pages, .. } | Action::Continue { pages, .. } if pages.contains(1) || pages.contains(2));
        assert!(!actions.iter().any(touches), "{actions:?}");
        assert!([0, 3].iter().all(|page| next.entry(REGION, *page).state() == PageState::MovingHome), "{actions:?}");
    }
}

#[test]
fn a_child_that_discards_what_waits_for_its_parents_way_out_finds_a_hole() {
    let (mut machine, _) = copying();
    let child = RegionId(2);
    machine.send(Event::Forked { parent: REGION, child, space: SpaceId(2) });
    assert_eq!(machine.entry(child, 1), Entry::WAITS_FOR_PARENT);
    let actions = machine.send(Event::Removed { region: child, pages: Pages::one(1) });
    assert!(actions.iter().any(|a| matches!(a, Action::Wake { region, .. } if *region == child)), "{actions:?}");
    assert_eq!(machine.entry(child, 1), Entry::SYSTEM);
    assert_eq!([0, 2].map(|page| machine.entry(child, page)), [Entry::WAITS_FOR_PARENT; 2]);
}
