//! A CPU fault on a page that is part of a huge one on its device: the huge page comes home as one, or as 512 small ones where there is none.

mod machine;

use machine::Machine;
use uhmm_pager_core::{
    Action, Attr, Backing, DeviceId, Entry, Event, FillStop, PageState, Pages, RegionId, SpaceId, Ticket,
};

const REGION: RegionId = RegionId(1);
const DEVICE: DeviceId = DeviceId(0);
const HUGE: u64 = 512;

/// So many huge pages on a device that is up.
fn on_device(huge_pages: u64, backing: Backing) -> Machine {
    let entry = |page| Entry::on_device(DEVICE, page as u32).with_huge(true);
    let page_count = huge_pages * HUGE;
    let entries: Vec<_> = (0..page_count).map(|page| (REGION, page, entry(page))).collect();
    let mut machine = Machine::with(&entries);
    let (space, strays) = (SpaceId(1), Vec::new());
    machine.send(Event::RecoverRegion { region: REGION, space, page_count, backing, strays });
    machine.send(Event::DeviceUp {
        device: DEVICE,
        frame_count: page_count as u32,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    });
    machine
}

fn fault_at(machine: &mut Machine, now_us: u64, page: u64) -> Vec<Action> {
    machine.send_at(now_us, Event::CpuFault { region: REGION, page, write: false, wp: false, minor: false })
}

fn huge_fills(actions: &[Action]) -> Vec<(Ticket, Pages)> {
    let fill = |action: &Action| match action {
        Action::FillHuge { ticket, pages, .. } => Some((*ticket, *pages)),
        _ => None,
    };
    actions.iter().filter_map(fill).collect()
}

fn fills(actions: &[Action]) -> Vec<(Ticket, Pages)> {
    let fill = |action: &Action| match action {
        Action::Fill { ticket, pages, .. } => Some((*ticket, *pages)),
        _ => None,
    };
    actions.iter().filter_map(fill).collect()
}

fn whole(index: u64) -> Pages {
    Pages { first: index * HUGE, count: HUGE }
}

#[test]
fn a_fault_brings_the_huge_page_home_as_one() {
    let mut machine = on_device(3, Backing::Private);
    let actions = fault_at(&mut machine, 0, 700);
    let [(ticket, pages)] = huge_fills(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!((pages, fills(&actions)), (whole(1), vec![]));
    assert_eq!(machine.entry(REGION, 600).state(), PageState::MovingHome);
    assert!(fills(&fault_at(&mut machine, 10, 512)).is_empty(), "who comes now waits for it");
    machine.send(Event::FillDone { ticket, done_pages: HUGE, stop: None });
    let states = |from: u64, to: u64| (from..to).map(|page| machine.entry(REGION, page)).collect::<Vec<_>>();
    assert!(states(512, 1024).iter().all(|entry| entry.state() == PageState::System && !entry.huge()));
    assert!(states(0, 512).iter().chain(&states(1024, 1536)).all(|entry| entry.huge()), "the others are as they were");
}

#[test]
fn without_a_huge_page_small_ones_come_and_the_next_fault_does_not_ask() {
    let mut machine = on_device(4, Backing::Private);
    let [(ticket, _)] = huge_fills(&fault_at(&mut machine, 0, 5))[..] else { panic!("it asks once") };
    let none = machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::NotHuge) });
    assert_eq!(fills(&none), [(ticket, whole(0))]);
    machine.send(Event::FillDone { ticket, done_pages: HUGE, stop: None });
    let next = fault_at(&mut machine, 1_000, HUGE + 5);
    assert!(huge_fills(&next).is_empty());
    assert_eq!(fills(&next).iter().map(|(_, pages)| pages.count).sum::<u64>(), HUGE, "all of it, small");
    assert_eq!(fills(&next)[0].1.first, HUGE + 5, "the page that is waited for first");
    let later = fault_at(&mut machine, 2_000_000, 3 * HUGE + 5);
    assert_eq!(huge_fills(&later).len(), 1, "there may be some again");
}

#[test]
fn who_asks_for_small_pages_or_shares_memory_gets_small_pages() {
    let mut machine = on_device(2, Backing::Private);
    machine.advise(Attr::default().with_granularity(Some(0)));
    let small = fault_at(&mut machine, 0, 5);
    assert!(huge_fills(&small).is_empty());
    assert_eq!(fills(&small).iter().map(|(_, pages)| *pages).collect::<Vec<_>>(), [Pages::one(5)]);
    machine.advise(Attr::default());
    assert!(huge_fills(&fault_at(&mut machine, 0, 7)).is_empty(), "it is not whole any more");
    let mut shared = on_device(1, Backing::Shared);
    assert!(huge_fills(&fault_at(&mut shared, 0, 5)).is_empty());
}

#[test]
fn who_reads_on_finds_the_next_huge_pages_there() {
    let mut machine = on_device(16, Backing::Private);
    let (mut faults, mut ahead) = (0, 0);
    for index in 0..16 {
        if machine.entry(REGION, index * HUGE).state() == PageState::System {
            continue;
        }
        faults += 1;
        let mut actions = fault_at(&mut machine, 0, index * HUGE);
        assert_eq!(huge_fills(&actions)[0].1, whole(index), "the one that is waited for first");
        while let [(ticket, _), ..] = huge_fills(&actions)[..] {
            machine.send(Event::FillDone { ticket, done_pages: HUGE, stop: None });
            actions.retain(|action| !matches!(action, Action::FillHuge { ticket: done, .. } if *done == ticket));
            actions.extend(machine.send(Event::Tick));
            ahead += 1;
        }
    }
    assert_eq!((faults, ahead), (4, 16), "0; 1 and 2..6; 6 and 7..11; 11 and 12..16");
    let mut random = on_device(16, Backing::Private);
    for index in [9, 3, 12, 0, 6] {
        let actions = fault_at(&mut random, 0, index * HUGE);
        let more = (0..4).flat_map(|_| random.send(Event::Tick)).collect::<Vec<_>>();
        assert_eq!((huge_fills(&actions).len(), huge_fills(&more).len()), (1, 0), "nobody reads on");
    }
}

#[test]
fn what_advice_names_beyond_the_huge_page_follows_without_another_touch() {
    let mut machine = on_device(8, Backing::Private);
    machine.advise(Attr::default().with_granularity(Some(30)));
    let mut actions = fault_at(&mut machine, 0, 4 * HUGE + 7);
    assert_eq!(huge_fills(&actions)[0].1, whole(4), "the one that is waited for first");
    for _ in 0..64 {
        for (ticket, pages) in huge_fills(&actions).into_iter().chain(fills(&actions)) {
            machine.send(Event::FillDone { ticket, done_pages: pages.count, stop: None });
        }
        actions = machine.send(Event::Tick);
    }
    assert!((0..8 * HUGE).all(|page| machine.entry(REGION, page).state() == PageState::System));
}
