//! Coherent device memory: the program's own mapping of a frame is revoked before anybody takes the frame away.

mod machine;

use machine::{Machine, PAGES};
use uhmm_pager_core::sim::{Config, Faults, Op, Simulator};
use uhmm_pager_core::{
    Action, Backing, CPU, DeviceId, Entry, Event, PageState, Pages, RegionId, ReqId, SpaceId, StepResult, Target,
    Ticket,
};

const REGION: RegionId = RegionId(1);
const DEVICE: DeviceId = DeviceId(0);
const ALL: Pages = Pages { first: 0, count: PAGES };

/// A machine with a device.
fn with(entry: impl Fn(u64) -> Entry, recover: bool, coherent: bool) -> Machine {
    let mut machine = entries(entry);
    let (region, space, page_count, backing) = (REGION, SpaceId(1), ALL.count, Backing::Shared);
    machine.send(if recover {
        Event::RecoverRegion { region, space, page_count, backing, strays: Vec::new() }
    } else {
        Event::RegionAdded { region, space, page_count, backing }
    });
    machine.send(Event::DeviceUp {
        device: DEVICE,
        frame_count: 8,
        fresh_mappings: !recover,
        memory_known: recover,
        memory_lost: false,
        coherent,
    });
    machine
}

/// All pages on the device; what the end of the way out orders.
fn moved_out(coherent: bool) -> (Machine, Vec<Action>) {
    let mut machine = with(|_| Entry::SYSTEM, false, coherent);
    let target = Target::Device(DEVICE);
    machine.send(Event::Migrate { req: ReqId(1), region: REGION, pages: ALL, target });
    let protect = machine.send(Event::Tick);
    let ticket =
        protect.iter().find_map(|a| if let Action::WriteProtect { ticket, .. } = a { Some(*ticket) } else { None });
    let copy = machine.send(Event::WpDone { ticket: ticket.expect("protected first"), result: StepResult::Ok });
    let ticket = copy.iter().find_map(|a| if let Action::CopyOut { ticket, .. } = a { Some(*ticket) } else { None });
    let mut actions = machine.send(Event::CopyDone { ticket: ticket.expect("then copied"), result: StepResult::Ok });
    let punch = actions.iter().find_map(|a| if let Action::Punch { ticket, .. } = a { Some(*ticket) } else { None });
    actions.extend(machine.send(Event::PunchDone { ticket: punch.expect("then punched"), result: StepResult::Ok }));
    machine.send(Event::Tick);
    (machine, actions)
}

fn shown() -> Machine {
    let (mut machine, actions) = moved_out(true);
    let (ticket, _) = maps(&actions)[0];
    machine.send(Event::CpuMapped { ticket, result: StepResult::Ok });
    machine
}

fn fault(machine: &mut Machine, page: u64) -> Vec<Action> {
    machine.send(Event::CpuFault { region: REGION, page, write: false, wp: false, minor: false })
}

fn entries(entry: impl Fn(u64) -> Entry) -> Machine {
    Machine::with(&(0..PAGES).map(|page| (REGION, page, entry(page))).collect::<Vec<_>>())
}

fn maps(actions: &[Action]) -> Vec<(Ticket, Pages)> {
    let map = |a: &Action| if let Action::MapCpu { ticket, pages, .. } = a { Some((*ticket, *pages)) } else { None };
    actions.iter().filter_map(map).collect()
}

fn revokes(actions: &[Action]) -> Vec<(Ticket, Pages, u16)> {
    let revoke = |a: &Action| match a {
        Action::Revoke { ticket, pages, devices, .. } => Some((*ticket, *pages, *devices)),
        _ => None,
    };
    actions.iter().filter_map(revoke).collect()
}

fn fills(actions: &[Action]) -> usize {
    actions.iter().filter(|action| matches!(action, Action::Fill { .. })).count()
}

#[test]
fn pages_that_arrive_on_a_coherent_device_are_shown_to_the_cpu_and_say_so_before() {
    let (machine, actions) = moved_out(true);
    assert_eq!(maps(&actions).iter().map(|(_, pages)| *pages).collect::<Vec<_>>(), [ALL]);
    let published = actions.iter().position(|action| matches!(action, Action::Publish { .. }));
    let ordered = actions.iter().position(|action| matches!(action, Action::MapCpu { .. }));
    assert!(published < ordered, "a crash between the two must not forget who maps the frames");
    assert!(ALL.iter().all(|page| machine.entry(REGION, page).cpu_mapped()));
    let (machine, actions) = moved_out(false);
    assert!(maps(&actions).is_empty() && machine.entry(REGION, 0).mapped_mask() == 0);
}

#[test]
fn the_way_home_begins_with_the_cpus_mapping() {
    let mut machine = shown();
    machine.send(Event::Migrate { req: ReqId(2), region: REGION, pages: ALL, target: Target::Home });
    let actions = machine.send(Event::Tick);
    let [(ticket, ALL, CPU)] = revokes(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!(fills(&actions), 0, "the program may still write the frames");
    assert!(machine.entry(REGION, 0).cpu_mapped(), "a crash now must not forget it");
    let actions = machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
    assert_eq!(fills(&actions), 1);
}

#[test]
fn a_device_that_wants_pages_for_itself_gets_them_when_the_cpu_has_them_no_more() {
    let mut machine = shown();
    let resolve = Event::Resolve {
        req: ReqId(2),
        region: REGION,
        pages: ALL,
        fault_page: 0,
        device: DEVICE,
        write: true,
        whole: true,
        exclusive: true,
    };
    let mut actions = machine.send(resolve);
    actions.extend(machine.send(Event::Tick));
    let [(ticket, ALL, CPU)] = revokes(&actions)[..] else { panic!("{actions:?}") };
    assert!(ALL.iter().all(|page| machine.entry(REGION, page).state() == PageState::Device));
    machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
    for _ in 0..8 {
        machine.send(Event::Tick);
    }
    assert!(ALL.iter().all(|page| machine.entry(REGION, page).state() == PageState::Exclusive));
    assert_eq!(machine.entry(REGION, 0).mapped_mask(), 1);
}

#[test]
fn a_fault_waits_for_the_mapping_and_after_a_crash_asks_for_it_again() {
    let (mut machine, actions) = moved_out(true);
    assert!(fault(&mut machine, 1).is_empty(), "the mapping is under way");
    let woken = machine.send(Event::CpuMapped { ticket: maps(&actions)[0].0, result: StepResult::Ok });
    assert_eq!(woken, [Action::Wake { region: REGION, pages: ALL }]);
    let mut next = with(|page| machine.entry(REGION, page), true, true);
    // Recovery punches once more what has left.
    let punch = fault(&mut next, 1);
    assert!(punch.is_empty(), "{punch:?}");
    next.send(Event::PunchDone { ticket: Ticket(1), result: StepResult::Ok });
    let again = fault(&mut next, 1);
    assert_eq!(maps(&again).iter().map(|(_, pages)| *pages).collect::<Vec<_>>(), [Pages { first: 1, count: 3 }]);
}

#[test]
fn frames_that_cannot_be_shown_come_home_by_fault_like_any_others() {
    let (mut machine, actions) = moved_out(true);
    let actions = machine.send(Event::CpuMapped { ticket: maps(&actions)[0].0, result: StepResult::Io });
    let [(ticket, ALL, CPU)] = revokes(&actions)[..] else { panic!("some may be mapped: {actions:?}") };
    machine.send(Event::RevokeDone { ticket, result: StepResult::Ok });
    assert_eq!((machine.entry(REGION, 0).state(), machine.entry(REGION, 0).mapped_mask()), (PageState::Device, 0));
    let actions = fault(&mut machine, 0);
    assert_eq!((maps(&actions).len(), fills(&actions) > 0), (0, true));
}

#[test]
fn lost_frames_are_taken_from_the_program_before_it_meets_the_poison() {
    let mut machine = shown();
    let lost = Event::DeviceUp {
        device: DEVICE,
        frame_count: 8,
        fresh_mappings: true,
        memory_known: false,
        memory_lost: true,
        coherent: true,
    };
    let actions = machine.send(lost);
    assert_eq!(revokes(&actions).len(), 4);
    assert!(machine.entry(REGION, 0).cpu_mapped() && machine.entry(REGION, 0).state() == PageState::Poisoned);
    // A pager that dies now leaves it to the next one.
    let mut next = entries(|page| machine.entry(REGION, page));
    let (region, space, page_count, backing) = (REGION, SpaceId(1), ALL.count, Backing::Shared);
    let actions = next.send(Event::RecoverRegion { region, space, page_count, backing, strays: Vec::new() });
    let [(ticket, ALL, CPU)] = revokes(&actions)[..] else { panic!("{actions:?}") };
    next.send(Event::RevokeDone { ticket, result: StepResult::Ok });
    assert!(matches!(fault(&mut next, 0)[..], [Action::Poison { .. }]));
}

fn machine(seed: u64) -> Simulator {
    let config = Config {
        page_counts: vec![4, 4],
        frame_counts: vec![6, 3],
        faults: Faults::default(),
        private_mask: 0,
        coherent: true,
        seed,
    };
    let mut simulator = Simulator::new(config);
    simulator.finish().expect("an untouched machine is at rest");
    simulator
}

#[test]
fn inv3_a_crash_anywhere_on_coherent_memory_keeps_every_byte() {
    let write = |page| Op::Cpu { region: 0, page, write: true };
    let migrate = |device| Op::Migrate { region: 0, page: 0, count: 4, device };
    let device = |device, page| Op::Device { device, region: 0, page, around: 0, write: true };
    let histories: [&[Op]; 5] = [
        &[migrate(Some(0)), write(0), write(3)],
        &[migrate(Some(0)), write(1), migrate(None), write(1)],
        &[migrate(Some(0)), write(1), device(1, 1), device(0, 1), write(1)],
        &[migrate(Some(0)), write(2), Op::Free { region: 0, end_space: true }, Op::Create { region: 0 }, write(0)],
        &[migrate(Some(0)), write(2), Op::Unmap { region: 0, page: 1, count: 2 }, write(0), migrate(None)],
    ];
    let mut crashes = 0;
    for (seed, history) in (0..12).flat_map(|seed| histories.iter().map(move |history| (seed, history))) {
        for actions in 0..=u8::MAX {
            let mut simulator = machine(seed);
            simulator.log = Some(Vec::new());
            simulator.apply(Op::CrashAfter { actions }).expect("armed");
            let mut steps = [write(0), write(1)].into_iter().chain(history.iter().copied());
            let mut run = steps.try_for_each(|op| simulator.apply(op).and_then(|()| simulator.finish()));
            run = run.and_then(|()| simulator.finish_and_read_all());
            if let Err(violation) = run {
                let log = simulator.log.unwrap_or_default().join("\n");
                panic!("seed {seed}, crash before action {actions} of {history:?}: {violation}\n{log}");
            }
            if simulator.crash_count == 0 {
                break;
            }
            crashes += 1;
        }
    }
    assert!(crashes > 500, "only {crashes} crashes happened");
}
