//! Nobody waits for what somebody else has much of.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::{
    Action, Attr, Backing, CopyRun, CopyStatus, Core, DefaultPolicy, DeviceId, Entry, EntryRun, Event, Outcome,
    PageState, Pages, RegionId, ReqId, SpaceId, StepResult, Target,
};

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

/// Pages that one event and its actions touch, at most: no more than a step looks at, or a transfer moves.
struct Large {
    machine: Machine,
    most: u64,
}

const LARGE: RegionId = RegionId(5);
const LARGE_PAGES: u64 = 100_000;

/// Pages that some actions speak of.
fn touched(actions: &[Action]) -> u64 {
    let pages = |action: &Action| match action {
        Action::Publish { entries: EntryRun::Same { count, .. } | EntryRun::Frames { count, .. }, .. } => *count,
        Action::Fill { pages, .. } | Action::Revoke { pages, .. } | Action::Poison { pages, .. } => pages.count,
        _ => 0,
    };
    actions.iter().map(pages).sum()
}

impl Large {
    /// All of a large region is on a device.
    fn on_a_device() -> Self {
        let mut large = Self::left_by_a_dead_pager();
        large.device_up(1 << 17);
        large.settle();
        large
    }

    fn left_by_a_dead_pager() -> Self {
        let entries: Vec<_> =
            (0..LARGE_PAGES).map(|page| (LARGE, page, Entry::on_device(DeviceId(0), page as u32))).collect();
        let mut large = Self { machine: Machine::with(&entries), most: 0 };
        let (space, page_count, backing, strays) = (SpaceId(1), LARGE_PAGES, Backing::Private, Vec::new());
        large.machine.send(Event::RecoverRegion { region: LARGE, space, page_count, backing, strays });
        large
    }

    fn device_up(&mut self, frame_count: u32) {
        let device = DeviceId(0);
        let (fresh_mappings, memory_known, memory_lost, coherent) = (true, true, false, false);
        self.send(Event::DeviceUp { device, frame_count, fresh_mappings, memory_known, memory_lost, coherent });
    }

    /// One event, with what the shell answers at once.
    fn send(&mut self, event: Event) -> Vec<Action> {
        let mut actions = self.machine.send(event);
        let mut next = 0;
        while next < actions.len() {
            let answer = match &actions[next] {
                Action::Fill { ticket, pages, .. } => {
                    Some(Event::FillDone { ticket: *ticket, done_pages: pages.count, stop: None })
                }
                Action::Revoke { ticket, .. } => Some(Event::RevokeDone { ticket: *ticket, result: StepResult::Ok }),
                Action::CopyOut { ticket, pages, .. } => {
                    let runs = vec![CopyRun { count: pages.count, status: CopyStatus::Ok }];
                    Some(Event::CopiedRuns { ticket: *ticket, runs })
                }
                Action::Punch { ticket, .. } => Some(Event::PunchDone { ticket: *ticket, result: StepResult::Ok }),
                Action::Scrub { ticket, .. } => Some(Event::ScrubDone { ticket: *ticket, result: StepResult::Ok }),
                _ => None,
            };
            actions.extend(answer.into_iter().flat_map(|answer| self.machine.send(answer)).collect::<Vec<_>>());
            next += 1;
        }
        self.most = self.most.max(touched(&actions));
        actions
    }

    /// Turns until nothing is to be done.
    fn settle(&mut self) -> u64 {
        let mut turns = 0;
        while self.machine.core.has_runnable_work() {
            self.send(Event::Tick);
            turns += 1;
            assert!(turns < 10_000);
        }
        turns
    }

    fn count(&self, state: PageState) -> u64 {
        (0..LARGE_PAGES).filter(|page| self.machine.entry(LARGE, *page).state() == state).count() as u64
    }
}

/// What one turn may touch: entries of a step, and what they mean.
const TURN_PAGES: u64 = 3 * 8192;

#[test]
fn a_fault_that_brings_everything_home_is_answered_first_and_the_rest_follows_in_turns() {
    let mut large = Large::on_a_device();
    large.machine.advise(Attr::default().with_granularity(Some(40)));
    large.most = 0;
    let page = LARGE_PAGES / 2 + 3;
    let (write, wp, minor) = (true, false, false);
    let actions = large.send(Event::CpuFault { region: LARGE, page, write, wp, minor });
    let filled = actions.iter().find_map(|action| match action {
        Action::Fill { pages, .. } => Some(pages.first),
        _ => None,
    });
    assert_eq!((filled, large.machine.entry(LARGE, page).state()), (Some(page), PageState::System));
    assert!(large.count(PageState::Device) > LARGE_PAGES - 1024);
    let again = large.send(Event::CpuFault { region: LARGE, page: 7, write, wp, minor });
    assert!(touched(&again) <= TURN_PAGES);
    let turns = large.settle();
    assert_eq!(large.count(PageState::System), LARGE_PAGES, "all of it has come");
    assert!(large.most <= TURN_PAGES, "{} pages in one turn", large.most);
    assert!(turns < LARGE_PAGES / 200, "{turns} turns: the second fault has asked for what was asked for before");
}

#[test]
fn what_follows_a_fault_home_does_not_undo_what_was_sent_away_since() {
    let mut large = Large::on_a_device();
    large.machine.advise(Attr::default().with_granularity(Some(40)));
    let (write, wp, minor) = (true, false, false);
    large.send(Event::CpuFault { region: LARGE, page: 0, write, wp, minor });
    let (region, pages) = (LARGE, Pages { first: 5000, count: 10 });
    large.send(Event::Migrate { req: ASKED, region, pages, target: Target::Device(DeviceId(0)) });
    large.settle();
    assert!(pages.iter().all(|page| large.machine.entry(LARGE, page).state() == PageState::Device));
}

#[test]
fn a_range_fault_of_all_there_is_maps_a_part_each_turn_and_leaves_out_what_was_taken_away_meanwhile() {
    let mut large = Large::on_a_device();
    large.most = 0;
    let (pages, device) = (Pages { first: 0, count: LARGE_PAGES }, DeviceId(0));
    let (fault_page, write, whole, exclusive) = (9, true, true, false);
    // Half of what the device could hold is what one range fault gets.
    let got = 1 << 16;
    large.send(Event::Resolve { req: ASKED, region: LARGE, pages, fault_page, device, write, whole, exclusive });
    let mut turns = 0;
    while large.machine.entry(LARGE, 0).mapped_mask() == 0 {
        large.send(Event::Tick);
        turns += 1;
    }
    assert!(turns > got / 8192 - 2, "it was looked at in turns: {turns}");
    // A CPU takes one that is mapped already, and its fault is not kept waiting.
    large.send(Event::CpuFault { region: LARGE, page: 100, write: true, wp: false, minor: false });
    assert_eq!(large.machine.entry(LARGE, 100).state(), PageState::System);
    let answer = (0..100).find_map(|_| {
        let actions = large.send(Event::Tick);
        actions.into_iter().find_map(|action| match action {
            Action::Reply { outcome: Outcome::Resolved { runs }, .. } => Some(runs),
            _ => None,
        })
    });
    let runs: Vec<_> = answer.expect("an answer").iter().map(|run| (run.first, run.count)).collect();
    assert_eq!(runs, [(0, 100), (101, got + fault_page - 101)]);
    assert!(large.most <= TURN_PAGES, "{} pages in one turn", large.most);
    assert!(runs.iter().all(|(first, _)| large.machine.entry(LARGE, *first).mapped_mask() == 1));
}

#[test]
fn a_device_that_comes_dies_or_is_given_up_takes_a_part_of_the_pages_each_turn_and_others_go_on() {
    let mut large = Large::on_a_device();
    assert!(large.most <= TURN_PAGES, "{} pages in one turn", large.most);
    let begun: Vec<Event> =
        vec![Event::DeviceVoid { device: DeviceId(0) }, Event::DeviceFailed { device: DeviceId(0) }];
    for event in begun {
        large.machine.send(region_added(CLIENT, 2));
        large.send(event);
        assert!(large.machine.core.has_runnable_work(), "it is not done at once");
        large.machine.send(pin());
        let turns = turns(&mut large.machine);
        assert!(turns <= 8, "somebody else waits for {turns} turns");
        assert!(large.machine.core.has_runnable_work(), "it is not done yet");
        large.settle();
        large.machine.send(Event::RegionFree { req: None, region: CLIENT });
        large.settle();
    }
    assert!(large.most <= TURN_PAGES, "{} pages in one turn", large.most);
    assert_eq!(large.count(PageState::Poisoned), LARGE_PAGES);
}

#[test]
fn while_frames_are_claimed_a_page_comes_home_and_its_frame_is_free_afterwards() {
    // One that is claimed by then, and one that is not.
    for page in [0, LARGE_PAGES - 1] {
        let mut large = Large::left_by_a_dead_pager();
        large.settle();
        large.device_up(LARGE_PAGES as u32);
        assert!(large.machine.core.has_runnable_work(), "frames are being claimed");
        large.send(Event::CpuFault { region: LARGE, page, write: true, wp: false, minor: false });
        assert_eq!(large.machine.entry(LARGE, page).state(), PageState::System, "the fault does not wait for that");
        large.settle();
        let (region, pages) = (LARGE, Pages::one(page));
        large.send(Event::Migrate { req: ASKED, region, pages, target: Target::Device(DeviceId(0)) });
        let frame = (0..8).flat_map(|_| large.send(Event::Tick)).find_map(|action| match action {
            Action::CopyOut { frame, .. } => Some(u64::from(frame)),
            _ => None,
        });
        assert_eq!(frame, Some(page), "the one frame that is free");
    }
}

#[test]
fn what_a_dead_client_has_left_is_scrubbed_a_part_each_turn() {
    let mut large = Large::on_a_device();
    // Its pages have come home, and their frames hold its bytes.
    large.machine.advise(Attr::default().with_granularity(Some(40)));
    large.send(Event::CpuFault { region: LARGE, page: 0, write: true, wp: false, minor: false });
    large.settle();
    large.send(Event::RegionFree { req: None, region: LARGE });
    large.settle();
    let frames = |actions: &[Action]| -> u64 {
        let runs = |action: &Action| match action {
            Action::Scrub { runs, .. } => runs.iter().map(|(_, count)| u64::from(*count)).sum(),
            _ => 0,
        };
        actions.iter().map(runs).sum()
    };
    let mut each = vec![frames(&large.send(Event::SpaceGone { space: SpaceId(1) }))];
    while large.machine.core.has_runnable_work() {
        each.push(frames(&large.send(Event::Tick)));
    }
    assert!(each.iter().all(|count| *count <= 2 * 8192), "{each:?}");
    assert_eq!(each.iter().sum::<u64>(), LARGE_PAGES, "{each:?}");
}

#[test]
fn a_write_fault_whose_page_becomes_a_childs_too_while_its_window_is_mapped_may_write_in_the_end() {
    let entries: Vec<_> = (0..PAGES).map(|page| (LARGE, page, Entry::on_device(DeviceId(0), page as u32))).collect();
    let mut machine = Machine::with(&entries);
    machine.core = Core::new(DefaultPolicy::default()).with_budget(1);
    let (space, page_count, backing, strays) = (SpaceId(1), PAGES, Backing::Private, Vec::new());
    machine.send(Event::RecoverRegion { region: LARGE, space, page_count, backing, strays });
    let mut large = Large { machine, most: 0 };
    large.device_up(64);
    large.settle();
    let (pages, device, fault_page) = (Pages { first: 0, count: PAGES }, DeviceId(0), PAGES - 1);
    let (write, whole, exclusive) = (true, true, false);
    large.send(Event::Resolve { req: ASKED, region: LARGE, pages, fault_page, device, write, whole, exclusive });
    while large.machine.entry(LARGE, 0).mapped_mask() == 0 {
        large.send(Event::Tick);
    }
    large.send(Event::Forked { parent: LARGE, child: CLIENT, space: SpaceId(2) });
    let answer = (0..100).find_map(|_| {
        let actions = large.send(Event::Tick);
        actions.into_iter().find_map(|action| match action {
            Action::Reply { outcome: Outcome::Resolved { runs }, .. } => Some(runs),
            _ => None,
        })
    });
    let runs = answer.expect("an answer");
    let of_fault = runs.iter().find(|run| (run.first..run.first + run.count).contains(&fault_page));
    assert!(of_fault.is_some_and(|run| run.writable), "{runs:?}");
}

#[test]
fn a_frame_that_one_of_two_gives_back_before_the_other_has_claimed_it_stays_the_others() {
    let shared = Entry::on_device(DeviceId(0), 5).with_shared(true);
    let away = |large: &mut Large| drop(large.send(Event::RegionFree { req: None, region: LARGE }));
    let home = |large: &mut Large| {
        large.send(Event::CpuFault { region: LARGE, page: 0, write: true, wp: false, minor: false });
        large.send(Event::RegionFree { req: None, region: LARGE });
        large.send(Event::SpaceGone { space: SpaceId(LARGE.0) });
    };
    for leave in [&away as &dyn Fn(&mut Large), &home] {
        let mut machine = Machine::with(&[(LARGE, 0, shared), (CLIENT, 3, shared)]);
        machine.core = Core::new(DefaultPolicy::default()).with_budget(1);
        for region in [LARGE, CLIENT] {
            let (space, page_count, backing, strays) = (SpaceId(region.0), PAGES, Backing::Private, Vec::new());
            machine.send(Event::RecoverRegion { region, space, page_count, backing, strays });
        }
        let mut large = Large { machine, most: 0 };
        large.device_up(8);
        leave(&mut large);
        let mut scrubbed = Vec::new();
        for _ in 0..100 {
            let actions = large.send(Event::Tick);
            scrubbed.extend(actions.into_iter().filter_map(|action| match action {
                Action::Scrub { runs, .. } => Some(runs),
                _ => None,
            }));
        }
        let of_child = |run: &(u32, u32)| (run.0..run.0 + run.1).contains(&5);
        assert!(!scrubbed.concat().iter().any(of_child), "{scrubbed:?}");
        assert_eq!(scrubbed.concat().iter().map(|run| run.1).sum::<u32>(), 7, "all others are: {scrubbed:?}");
        assert_eq!(large.machine.entry(CLIENT, 3).state(), PageState::Device);
    }
}
