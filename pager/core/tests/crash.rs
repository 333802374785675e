//! The pager dies at every single action of a history, and the next one goes on from what it finds (invariant 3).

use uhmm_pager_core::sim::{Config, Faults, Op, Simulator, Violation};

const SEEDS: u64 = 12;

fn machine(private_mask: u8, seed: u64) -> Simulator {
    let config = Config {
        page_counts: vec![4, 4],
        frame_counts: vec![6, 3],
        faults: Faults::default(),
        private_mask,
        coherent: false,
        seed,
    };
    let mut simulator = Simulator::new(config);
    simulator.finish().expect("an untouched machine is at rest");
    simulator
}

fn run(simulator: &mut Simulator, ops: &[Op]) -> Result<(), Violation> {
    ops.iter().try_for_each(|op| simulator.apply(*op).and_then(|()| simulator.finish()))
}

fn write(page: u8) -> Op {
    Op::Cpu { region: 0, page, write: true }
}

fn device_write(device: u8, page: u8) -> Op {
    Op::Device { device, region: 0, page, around: 0, write: true }
}

fn migrate(device: Option<u8>) -> Op {
    Op::Migrate { region: 0, page: 0, count: 4, device }
}

/// Runs `setup`, then `history` with a crash before its action 0, 1, 2 ... until there is no such action any more; in shared and in
/// private memory.
fn die_everywhere(setup: &[Op], history: &[Op]) {
    for private_mask in [0, 1] {
        let points: u32 = (0..SEEDS).map(|seed| die_at_every_action(private_mask, seed, setup, history)).sum();
        assert!(u64::from(points) > SEEDS * 4, "only {points} crashes happened");
    }
}

fn die_at_every_action(private_mask: u8, seed: u64, setup: &[Op], history: &[Op]) -> u32 {
    let mut points = 0;
    for actions in 0..=u8::MAX {
        let mut simulator = machine(private_mask, seed);
        simulator.log = Some(Vec::new());
        let result = run(&mut simulator, setup)
            .and_then(|()| simulator.apply(Op::CrashAfter { actions }))
            .and_then(|()| run(&mut simulator, history))
            .and_then(|()| simulator.finish_and_read_all());
        if let Err(violation) = result {
            let log = simulator.log.unwrap_or_default().join("\n");
            panic!("private {private_mask}, seed {seed}, crash before action {actions}: {violation}\n{log}");
        }
        if simulator.crash_count == 0 {
            break;
        }
        points += 1;
    }
    points
}

#[test]
fn inv3_a_crash_anywhere_on_the_way_out_keeps_every_byte() {
    die_everywhere(&[write(0), write(1), write(2)], &[migrate(Some(0))]);
}

#[test]
fn inv3_a_crash_anywhere_on_the_way_out_of_pages_mapped_in_place_keeps_every_byte() {
    let setup = [Op::Advise { region: 0, in_place: true }, device_write(0, 0), device_write(1, 1), write(2)];
    die_everywhere(&setup, &[migrate(Some(1)), write(0)]);
}

#[test]
fn inv3_a_crash_anywhere_on_the_way_home_keeps_every_byte() {
    let setup = [write(0), write(1), migrate(Some(0)), device_write(0, 0), device_write(0, 1)];
    die_everywhere(&setup, &[migrate(None)]);
}

#[test]
fn inv3_a_crash_anywhere_in_a_cpu_fault_on_a_device_page_keeps_every_byte() {
    let setup = [write(0), migrate(Some(0)), device_write(0, 0)];
    die_everywhere(&setup, &[write(0), write(1)]);
}

#[test]
fn inv3_a_crash_anywhere_between_two_devices_keeps_every_byte() {
    let setup = [write(0), migrate(Some(0)), device_write(0, 0)];
    die_everywhere(&setup, &[device_write(1, 0), migrate(Some(1)), device_write(0, 1)]);
}

#[test]
fn inv3_a_crash_anywhere_in_an_eviction_keeps_every_byte() {
    let other = Op::Migrate { region: 1, page: 0, count: 4, device: Some(1) };
    let setup = [write(0), write(1), device_write(1, 0), device_write(1, 1), device_write(1, 2)];
    die_everywhere(&setup, &[Op::Cpu { region: 1, page: 0, write: true }, other]);
}

#[test]
fn inv3_a_crash_anywhere_in_a_drop_harms_no_neighbour() {
    let setup = [write(0), write(1), write(2), migrate(Some(0)), device_write(0, 0), device_write(0, 1)];
    die_everywhere(&setup, &[Op::Unmap { region: 0, page: 1, count: 2 }, device_write(0, 3)]);
}

#[test]
fn inv3_a_crash_anywhere_in_a_teardown_leaves_no_frame_and_no_byte_behind() {
    let setup = [write(0), migrate(Some(0)), device_write(0, 0), device_write(0, 1)];
    die_everywhere(&setup, &[Op::Free { region: 0, end_space: true }, Op::Create { region: 0 }, write(0)]);
}

#[test]
fn inv3_a_crash_while_a_device_comes_back_with_other_memory_poisons_only_what_was_there() {
    let setup = [write(0), write(1), Op::Migrate { region: 0, page: 0, count: 1, device: Some(0) }];
    let lost = Op::DriverDies { device: 0, memory_lost: true };
    die_everywhere(&setup, &[lost, write(1), write(2)]);
}

const DROP_TWO: Op = Op::DontNeed { region: 0, page: 1, count: 2 };

#[test]
fn inv3_a_crash_anywhere_in_a_discard_brings_nothing_back_and_harms_no_neighbour() {
    let setup = [write(0), write(1), write(2), migrate(Some(0)), device_write(0, 1), device_write(0, 3)];
    die_everywhere(&setup, &[DROP_TWO, write(2), device_write(0, 1)]);
}

#[test]
fn inv3_a_crash_anywhere_in_a_discard_beside_a_revocation_brings_nothing_back() {
    let setup = [write(0), write(1), write(2), migrate(Some(0)), device_write(0, 1), device_write(0, 2)];
    for seed in 0..SEEDS {
        for actions in 0..30 {
            let mut simulator = machine(1, seed);
            run(&mut simulator, &setup).expect("the pages are on the device");
            simulator.apply(Op::CrashAfter { actions }).expect("armed");
            let revoke = Op::Revoke { region: 0, page: 0, count: 4, devices: 1 };
            for op in [revoke, Op::Pump { count: 1 }, Op::Tick, Op::Pump { count: 1 }, DROP_TWO, device_write(0, 0)] {
                simulator.apply(op).expect("legal");
            }
            let end = simulator.finish_and_read_all();
            assert_eq!(end, Ok(()), "seed {seed}, crash before action {actions}");
            assert!((1..3).all(|page| !simulator.world.entry(simulator.region(0), page).discarded()));
        }
    }
}

#[test]
fn inv3_a_crash_anywhere_beside_read_only_copies_keeps_every_byte() {
    let read = |device, page| Op::Device { device, region: 0, page, around: 0, write: false };
    let setup = [write(0), write(1), Op::ReadMostly { region: 0, on: true }, read(0, 0), read(1, 1), read(0, 3)];
    die_everywhere(&setup, &[read(0, 2), write(0), DROP_TWO, device_write(1, 1), migrate(None)]);
}

#[test]
fn inv3_a_cpu_write_between_fill_and_publish_survives_a_crash() {
    for seed in 0..SEEDS {
        let mut simulator = machine(0, seed);
        run(&mut simulator, &[write(0), migrate(Some(0)), device_write(0, 0)]).expect("the page is on the device");
        simulator.apply(migrate(None)).expect("accepted");
        // The device maps the page: its revocation ends, then its fill; the answer to the fill stays unread.
        for step in
            [Op::Pump { count: 1 }, Op::Tick, Op::Pump { count: 1 }, Op::Deliver { index: 0 }, Op::Pump { count: 1 }]
        {
            simulator.apply(step).expect("on the way home");
        }
        simulator.apply(Op::Deliver { index: 0 }).expect("the fill has happened");
        simulator.apply(write(0)).expect("the CPU may write at once");
        assert_eq!(simulator.world.waiting().0, 0, "the CPU did not have to wait");
        assert_eq!(format!("{:?}", simulator.world.entry(simulator.region(0), 0).state()), "MovingHome");
        simulator.crash().expect("nothing is broken by a crash");
        simulator.finish_and_read_all().expect("the write survives");
    }
}
