//! Requests that wait for something that ends without a word, and content that is given up while others fail: what random histories found.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::sim::{Config, Faults, Op, Simulator};
use uhmm_pager_core::{
    Action, Backing, DeviceId, Entry, Event, FillStop, PageState, Pages, RegionId, ReqId, SpaceId, StepResult, Target,
    Ticket,
};

const REGION: RegionId = RegionId(1);
const OTHER: RegionId = RegionId(2);
const DEVICE: DeviceId = DeviceId(0);

fn simulator(private_mask: u8, seed: u64) -> Simulator {
    let (page_counts, frame_counts, faults) = (vec![4, 4], vec![3, 3], Faults::default());
    let mut simulator =
        Simulator::new(Config { page_counts, frame_counts, private_mask, faults, coherent: false, seed });
    simulator.finish().expect("an untouched machine is at rest");
    simulator
}

fn settle(simulator: &mut Simulator, ops: &[Op]) {
    for op in ops {
        simulator.apply(*op).expect("legal");
        simulator.finish().expect("it comes to rest");
    }
}

fn recover(machine: &mut Machine, region: RegionId, backing: Backing) {
    let space = SpaceId(region.0);
    let strays = Vec::new();
    machine.send(Event::RecoverRegion { region, space, page_count: PAGES, backing, strays });
}

fn device_up(machine: &mut Machine, frame_count: u32) -> Vec<Action> {
    machine.send(Event::DeviceUp {
        device: DEVICE,
        frame_count,
        fresh_mappings: false,
        memory_known: true,
        memory_lost: false,
        coherent: false,
    })
}

fn fill(actions: &[Action]) -> Option<Ticket> {
    actions.iter().find_map(|action| if let Action::Fill { ticket, .. } = action { Some(*ticket) } else { None })
}

/// What so many ticks bring.
fn ticks(machine: &mut Machine, count: u32) -> Vec<Action> {
    (0..count).flat_map(|_| machine.send(Event::Tick)).collect()
}

fn is_answered(actions: &[Action], of: ReqId) -> bool {
    actions.iter().any(|action| matches!(action, Action::Reply { req, .. } if *req == of))
}

#[test]
fn an_eviction_from_a_device_that_a_new_pager_finds_given_up_is_answered() {
    for seed in 0..12 {
        let mut simulator = simulator(0, seed);
        settle(&mut simulator, &[Op::Cpu { region: 0, page: 0, write: true }, Op::DriverHeld { device: 0 }]);
        simulator.crash().expect("nothing is broken by a crash");
        settle(&mut simulator, &[Op::Evict { region: 0, device: 0, count: 0 }]);
        assert_eq!(simulator.world.waiting().1, 0);
    }
}

#[test]
fn a_copy_of_a_page_that_nobody_has_touched_is_a_copy_of_zeros() {
    for (private_mask, seed) in [(0, 1), (1, 1), (0, 2), (1, 2)] {
        let mut simulator = simulator(private_mask, seed);
        let read = Op::Device { device: 1, region: 0, page: 2, around: 0, write: false };
        let busy = Op::Device { device: 1, region: 1, page: 0, around: 0, write: true };
        settle(&mut simulator, &[Op::ReadMostly { region: 0, on: true }, busy, read]);
        let entry = |slot, page| simulator.world.entry(simulator.region(slot), page);
        assert_eq!(entry(0, 2).state(), PageState::Duplicated);
        assert_eq!(entry(1, 0).state(), PageState::Device, "nobody had to make room for nothing");
        simulator.finish_and_read_all().expect("zeros");
    }
}

#[test]
fn who_looks_in_the_instant_in_which_all_of_a_homecoming_turns_out_to_be_given_up_does_not_wait_for_it() {
    let mut machine = Machine::with(&[(REGION, 0, Entry::on_device(DEVICE, 0))]);
    recover(&mut machine, REGION, Backing::Private);
    device_up(&mut machine, 1);
    let fault = Event::CpuFault { region: REGION, page: 0, write: false, wp: false, minor: false };
    let ticket = fill(&machine.send(fault)).expect("it comes home");
    machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Again) });
    machine.send(Event::Removed { region: REGION, pages: Pages::one(0) });
    machine.send(Event::Pin { req: ReqId(7), region: REGION, pages: Pages::one(0), on: true });
    assert!(is_answered(&ticks(&mut machine, 6), ReqId(7)));
    assert_eq!(machine.entry(REGION, 0).state(), PageState::Absent);
}

#[test]
fn what_is_given_up_while_a_new_pager_finds_no_page_and_no_copy_of_it_stays_so() {
    let moving = Entry::on_device(DEVICE, 0).with_state(PageState::MovingHome);
    let mut machine = Machine::with(&[(REGION, 0, moving)]);
    recover(&mut machine, REGION, Backing::Private);
    let ticket = fill(&device_up(&mut machine, 1)).expect("it goes on");
    machine.send(Event::Removed { region: REGION, pages: Pages::one(0) });
    let actions = machine.send(Event::FillDone { ticket, done_pages: 0, stop: Some(FillStop::Io) });
    assert!(actions.iter().any(|action| matches!(action, Action::Continue { .. })), "it is looked for: {actions:?}");
    machine.send(Event::CpuFillDone { ticket, done_pages: 0, stop: Some(FillStop::NoPage) });
    assert_eq!(machine.entry(REGION, 0), Entry::ABSENT);
}

#[test]
fn who_waits_for_the_frames_of_a_region_on_its_end_is_told_that_it_had_none() {
    let mut machine = Machine::with(&[(OTHER, 0, Entry::SYSTEM.with_mapped_mask(1))]);
    recover(&mut machine, REGION, Backing::Shared);
    recover(&mut machine, OTHER, Backing::Shared);
    device_up(&mut machine, 1);
    // The only frame cannot be scrubbed: it is nobody's for good.
    let scrub = |action: &Action| if let Action::Scrub { ticket, .. } = action { Some(*ticket) } else { None };
    let ticket = ticks(&mut machine, 4).iter().find_map(scrub).expect("a scrub");
    machine.send(Event::ScrubDone { ticket, result: StepResult::Io });
    machine.send(Event::RegionFree { req: Some(ReqId(8)), region: OTHER });
    let target = Target::Device(DEVICE);
    machine.send(Event::Migrate { req: ReqId(7), region: REGION, pages: Pages::one(0), target });
    let revoke = |action: &Action| if let Action::Revoke { ticket, .. } = action { Some(*ticket) } else { None };
    let ticket = ticks(&mut machine, 4).iter().find_map(revoke).expect("the device lets go");
    machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
    let actions = ticks(&mut machine, 8);
    assert!(is_answered(&actions, ReqId(8)) && is_answered(&actions, ReqId(7)), "{actions:?}");
}
