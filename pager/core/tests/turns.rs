//! Nobody waits for what somebody else has much of.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{Action, Backing, DeviceId, Entry, Event, Outcome, PageState, Pages, RegionId, ReqId, SpaceId};

const CLIENT: RegionId = RegionId(1_000_000);
const ASKED: ReqId = ReqId(7);

fn region_added(region: RegionId, space: u64) -> Event {
    Event::RegionAdded { region, space: SpaceId(space), page_count: PAGES, backing: Backing::Shared }
}

/// Ticks until the request is answered.
fn turns(machine: &mut Machine) -> usize {
    let answered = |actions: &[Action]| {
        actions.iter().any(|action| matches!(action, Action::Reply { req: ASKED, outcome: Outcome::Done }))
    };
    (1..100_000).find(|_| answered(&machine.send(Event::Tick))).expect("an answer")
}

fn pin() -> Event {
    Event::Pin { req: ASKED, region: CLIENT, pages: Pages { first: 0, count: PAGES }, on: true }
}

#[test]
fn a_request_takes_as_many_turns_beside_a_thousand_ends_of_regions_as_alone_but_one_each() {
    let mut machine = Machine::with(&[]);
    machine.send(region_added(CLIENT, 2));
    machine.send(pin());
    let alone = turns(&mut machine);
    for id in 0..1000 {
        machine.send(region_added(RegionId(id), 1));
        machine.send(Event::RegionFree { req: None, region: RegionId(id) });
    }
    machine.send(Event::Pin { req: ReqId(1), region: CLIENT, pages: Pages { first: 0, count: PAGES }, on: false });
    machine.send(pin());
    let beside = turns(&mut machine);
    assert!(beside <= 4 * alone + 4, "{alone} turns alone, {beside} beside the ends of others");
}

#[test]
fn a_request_takes_few_turns_beside_a_client_that_asks_for_thousands_of_things() {
    let mut machine = Machine::with(&[]);
    machine.send(region_added(CLIENT, 2));
    machine.send(region_added(RegionId(1), 1));
    for req in 0..1000 {
        let pages = Pages { first: 0, count: PAGES };
        machine.send(Event::Pin { req: ReqId(1000 + req), region: RegionId(1), pages, on: req % 2 == 0 });
    }
    machine.send(pin());
    assert!(turns(&mut machine) <= 8);
}

#[test]
fn what_a_region_leaves_on_a_device_is_scrubbed_and_nothing_else() {
    let frames = |region, first: u32| {
        (0..PAGES).map(move |page| (region, page, Entry::on_device(DeviceId(0), first + page as u32)))
    };
    let entries: Vec<_> = frames(RegionId(1), 10).chain(frames(CLIENT, 20)).collect();
    let mut machine = Machine::with(&entries);
    for region in [RegionId(1), CLIENT] {
        let (space, page_count, backing, strays) = (SpaceId(region.0), PAGES, Backing::Private, Vec::new());
        machine.send(Event::RecoverRegion { region, space, page_count, backing, strays });
    }
    let (device, frame_count) = (DeviceId(0), 1 << 16);
    let (fresh_mappings, memory_known, memory_lost, coherent) = (false, false, false, false);
    machine.send(Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost, coherent });
    let mut actions = machine.send(Event::RegionFree { req: Some(ASKED), region: RegionId(1) });
    actions.extend((0..8).flat_map(|_| machine.send(Event::Tick)));
    let scrubbed: Vec<_> = actions
        .iter()
        .filter_map(|action| if let Action::Scrub { runs, .. } = action { Some(runs.clone()) } else { None })
        .collect();
    assert_eq!(scrubbed, [vec![(10, PAGES as u32)]]);
    assert!(actions.iter().any(|action| matches!(action, Action::DropRegion { region: RegionId(1) })));
    assert!((0..PAGES).all(|page| machine.entry(CLIENT, page).state() == PageState::Device));
}
