//! A group of spaces has as many frames as it may have: what is over stays where it is, and nobody else makes room for it.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, PageState, Pages, RegionId, ReqId, SpaceId, StepResult, Target,
};

const DEVICE: DeviceId = DeviceId(0);
const SECOND: DeviceId = DeviceId(1);
const ALL: Pages = Pages { first: 0, count: PAGES };
const ONE: RegionId = RegionId(1);
const OTHER: RegionId = RegionId(2);

/// Two regions of system pages, of a space each; two devices with room for all.
fn machine(limits: &[(u64, u16, u64)]) -> Machine {
    let pages = [ONE, OTHER].into_iter().flat_map(|region| (0..PAGES).map(move |page| (region, page, Entry::SYSTEM)));
    let mut machine = Machine::with(&pages.collect::<Vec<_>>());
    for (space, group, limit_pages) in limits.iter().copied() {
        machine.send(Event::SpaceGroup { space: SpaceId(space), group, limit_pages });
    }
    for region in [ONE, OTHER] {
        let space = SpaceId(region.0);
        machine.send(Event::RegionAdded { region, space, page_count: PAGES, backing: Backing::Shared });
    }
    for device in [DEVICE, SECOND] {
        machine.send(Event::DeviceUp {
            device,
            frame_count: 4 * PAGES as u32,
            fresh_mappings: true,
            memory_known: false,
            memory_lost: false,
            coherent: false,
        });
    }
    machine
}

fn next(action: &Action) -> Option<Event> {
    let ok = StepResult::Ok;
    Some(match action {
        Action::WriteProtect { ticket, .. } => Event::WpDone { ticket: *ticket, result: ok },
        Action::CopyOut { ticket, .. } => Event::CopyDone { ticket: *ticket, result: ok },
        Action::Punch { ticket, .. } => Event::PunchDone { ticket: *ticket, result: ok },
        Action::Scrub { ticket, .. } => Event::ScrubDone { ticket: *ticket, result: ok },
        _ => return None,
    })
}

/// Everything that a request comes to; its answer as text.
fn migrate(machine: &mut Machine, region: RegionId, req: u64) -> String {
    migrate_to(machine, region, req, DEVICE)
}

fn migrate_to(machine: &mut Machine, region: RegionId, req: u64, device: DeviceId) -> String {
    let target = Target::Device(device);
    let mut left = machine.send(Event::Migrate { req: ReqId(req), region, pages: ALL, target });
    for _ in 0..100 {
        let mut more = Vec::new();
        for action in left.drain(..) {
            if let Action::Reply { req: of, outcome } = &action
                && *of == ReqId(req)
            {
                return format!("{outcome:?}");
            }
            assert!(!matches!(action, Action::Fill { .. }), "somebody makes room: {action:?}");
            more.extend(next(&action).map(|event| machine.send(event)).unwrap_or_default());
        }
        more.extend(machine.send(Event::Tick));
        left = more;
    }
    panic!("the request was never answered");
}

fn on_device(machine: &Machine, region: RegionId) -> u64 {
    ALL.iter().filter(|page| machine.entry(region, *page).state() == PageState::Device).count() as u64
}

#[test]
fn what_is_over_the_quota_stays_home_and_is_told() {
    let mut machine = machine(&[(1, 1, PAGES - 1)]);
    let answer = migrate(&mut machine, ONE, 1);
    assert!(answer.contains("NoMemory"), "{answer}");
    assert_eq!(on_device(&machine, ONE), PAGES - 1);
    let answer = migrate(&mut machine, OTHER, 2);
    assert!(!answer.contains("NoMemory"), "who has no quota: {answer}");
    assert_eq!((on_device(&machine, ONE), on_device(&machine, OTHER)), (PAGES - 1, PAGES), "and nobody paid for it");
}

#[test]
fn spaces_of_one_group_share_what_it_has() {
    let mut machine = machine(&[(1, 7, PAGES + 1), (2, 7, PAGES + 1)]);
    assert!(!migrate(&mut machine, ONE, 1).contains("NoMemory"));
    assert!(migrate(&mut machine, OTHER, 2).contains("NoMemory"));
    assert_eq!(on_device(&machine, OTHER), 1);
}

#[test]
fn a_group_with_nothing_gets_nothing() {
    let mut machine = machine(&[(1, 3, 0)]);
    assert!(migrate(&mut machine, ONE, 1).contains("NoMemory"));
    assert_eq!(on_device(&machine, ONE), 0);
}

#[test]
fn a_group_has_of_each_device_what_it_may_have_there() {
    let mut machine = machine(&[(1, 1, 2 * PAGES), (2, 1, 2 * PAGES)]);
    for (device, limit_pages) in [(DEVICE, PAGES - 2), (SECOND, 1)] {
        machine.send(Event::GroupOnDevice { group: 1, device, limit_pages });
    }
    assert!(migrate(&mut machine, ONE, 1).contains("NoMemory"));
    assert_eq!(on_device(&machine, ONE), PAGES - 2);
    // What is left of the first device's share is not the second's, and another space of the group finds what is left.
    assert!(migrate_to(&mut machine, OTHER, 2, SECOND).contains("NoMemory"));
    assert_eq!(on_device(&machine, OTHER), 1);
    // More is given.
    machine.send(Event::GroupOnDevice { group: 1, device: SECOND, limit_pages: PAGES });
    assert!(!migrate_to(&mut machine, OTHER, 3, SECOND).contains("NoMemory"));
    assert_eq!(on_device(&machine, OTHER), PAGES);
}
