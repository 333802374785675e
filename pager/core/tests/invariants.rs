//! The invariants of the design, each by name, and what random histories once found.

use uhmm_pager_core::sim::{Config, Faults, Op, Simulator};
use uhmm_pager_core::{DeviceId, Event, PageState, Pages};

const SEEDS: u64 = 24;
const SURE_AGAIN: Faults = Faults { again: 100, io: 0, partial: 0 };
const SURE_IO: Faults = Faults { again: 0, io: 100, partial: 0 };

fn machine(seed: u64) -> Simulator {
    let config = Config {
        page_counts: vec![4, 4],
        frame_counts: vec![6, 3],
        faults: Faults::default(),
        private_mask: 0,
        coherent: false,
        seed,
    };
    let mut simulator = Simulator::new(config);
    simulator.finish().expect("an untouched machine is at rest");
    simulator.log = Some(Vec::new());
    simulator
}

/// The same test with machines whose copies read early or late and complete in another order.
fn for_every_seed(test: impl Fn(&mut Simulator)) {
    for seed in 0..SEEDS {
        let mut simulator = machine(seed);
        test(&mut simulator);
        if let Err(violation) = simulator.finish_and_read_all() {
            panic!("seed {seed}: {violation}\n{}", simulator.log.unwrap_or_default().join("\n"));
        }
    }
}

fn apply(simulator: &mut Simulator, ops: &[Op]) {
    for op in ops {
        if let Err(violation) = simulator.apply(*op) {
            let log = simulator.log.take().unwrap_or_default().join("\n");
            panic!("{op:?}: {violation}\n{log}");
        }
    }
}

/// One thing after the other, each with all its consequences.
fn settle(simulator: &mut Simulator, ops: &[Op]) {
    for op in ops {
        apply(simulator, &[*op]);
        simulator.finish().expect("it comes to rest");
    }
}

fn state(simulator: &Simulator, page: u64) -> PageState {
    simulator.world.entry(simulator.region(0), page).state()
}

fn seen(simulator: &Simulator, what: &str) -> bool {
    simulator.log.as_ref().is_some_and(|log| log.iter().any(|line| line.contains(what)))
}

fn cpu(page: u8, write: bool) -> Op {
    Op::Cpu { region: 0, page, write }
}

fn device(device: u8, page: u8) -> Op {
    Op::Device { device, region: 0, page, around: 0, write: true }
}

fn migrate(count: u8, device: Option<u8>) -> Op {
    Op::Migrate { region: 0, page: 0, count, device }
}

const PUMP: Op = Op::Pump { count: 200 };
const TICK: Op = Op::Tick;
const DELIVER: Op = Op::Deliver { index: 0 };

#[test]
fn inv1_cpu_and_two_devices_write_in_turn_and_each_sees_the_last_value() {
    for_every_seed(|simulator| {
        for turn in 0..4 {
            settle(simulator, &[cpu(0, true), device(0, 0), device(1, 0), cpu(0, false), device(turn % 2, 0)]);
            assert_eq!(state(simulator, 0), PageState::Device);
        }
    });
}

#[test]
fn inv2_nothing_is_copied_before_the_revocation_is_acknowledged() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), device(0, 0)]);
        apply(simulator, &[cpu(0, false), PUMP, TICK, TICK, PUMP]);
        assert!(seen(simulator, "Revoke {") && !seen(simulator, "-> Fill {"), "the device still maps the page");
        apply(simulator, &[device(0, 0), DELIVER, PUMP]);
        assert!(seen(simulator, "-> Fill {"), "the device has stopped");
    });
}

#[test]
fn inv4_a_frame_is_named_until_the_cpu_can_see_the_page() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), migrate(1, Some(0))]);
        apply(simulator, &[cpu(0, false), PUMP]);
        let region = simulator.region(0);
        assert!(simulator.world.entry(region, 0).owns_frame(), "the fill is under way");
        apply(simulator, &[DELIVER]);
        assert!(simulator.world.regions[&region].pages[0].mapped && simulator.world.entry(region, 0).owns_frame());
        apply(simulator, &[PUMP]);
        assert_eq!(state(simulator, 0), PageState::System);
    });
}

#[test]
fn inv4_nothing_of_a_dead_client_stays_on_a_device() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), cpu(1, true), migrate(3, Some(1)), migrate(1, None)]);
        settle(simulator, &[Op::Free { region: 0, end_space: true }]);
        assert!(simulator.world.devices[1].frames.iter().all(|value| *value == 0), "scrubbed");
    });
}

#[test]
fn inv4_a_copy_that_failed_half_way_leaves_nothing_of_a_dead_client() {
    for_every_seed(|simulator| {
        let other = Op::Migrate { region: 1, page: 0, count: 1, device: Some(1) };
        settle(simulator, &[cpu(0, true), cpu(1, true), cpu(2, true), migrate(3, Some(1)), migrate(3, None)]);
        apply(simulator, &[Op::Cpu { region: 1, page: 0, write: true }, PUMP, other, PUMP, TICK, PUMP]);
        simulator.set_faults(SURE_IO);
        apply(simulator, &[DELIVER, PUMP]);
        settle(simulator, &[Op::Free { region: 0, end_space: true }]);
    });
}

#[test]
fn inv5_a_failed_copy_is_reported_per_page_and_the_page_stays() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true)]);
        simulator.set_faults(SURE_IO);
        apply(simulator, &[migrate(1, Some(0)), PUMP, TICK, PUMP, DELIVER, PUMP, TICK, PUMP]);
        assert!(seen(simulator, "status: Io"), "the requester is told");
        assert_eq!(state(simulator, 0), PageState::System);
        assert_eq!(simulator.core.stats().copy_failures, 1);
    });
}

#[test]
fn inv5_a_page_that_cannot_leave_one_device_for_another_is_reported() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), migrate(1, Some(0))]);
        simulator.set_faults(SURE_IO);
        apply(simulator, &[migrate(1, Some(1)), PUMP, TICK, PUMP, DELIVER, PUMP, TICK, PUMP, TICK, PUMP]);
        assert_eq!(simulator.world.waiting().1, 0, "answered although no copy works");
        assert_eq!(state(simulator, 0), PageState::Device);
    });
}

#[test]
fn inv5_a_range_larger_than_the_device_goes_through_it_and_harms_nothing() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), cpu(3, true), migrate(4, Some(1))]);
        assert!(!seen(simulator, "status: NoMemory"), "four pages, three frames: the first ones make room");
        assert_eq!(state(simulator, 3), PageState::Device);
    });
}

#[test]
fn inv7_two_devices_that_want_the_same_pages_both_get_them() {
    let both = |device, page| Op::Device { device, region: 0, page, around: 4, write: true };
    for_every_seed(|simulator| {
        apply(simulator, &[cpu(1, true), PUMP, both(0, 2), both(1, 2), both(0, 3), both(1, 3), cpu(2, true)]);
        simulator.finish().expect("nobody undoes the other's work for ever");
    });
}

#[test]
fn inv7_two_clients_that_want_the_last_frames_both_get_them() {
    let want = |region, page| Op::Device { device: 1, region, page, around: 4, write: true };
    for_every_seed(|simulator| {
        apply(simulator, &[want(0, 0), want(1, 0), want(0, 3), want(1, 3), want(0, 1), want(1, 1)]);
        simulator.finish().expect("nobody undoes the other's work for ever");
    });
}

#[test]
fn an_unprotect_that_is_tried_again_leaves_pages_alone_that_move_meanwhile() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true)]);
        simulator.crash().expect("the next pager unprotects everything");
        simulator.set_faults(SURE_AGAIN);
        apply(simulator, &[PUMP]);
        simulator.set_faults(Faults::default());
        // A device fault acts at once; the second try comes with the tick, when the copy is under way.
        apply(simulator, &[device(0, 0), PUMP, TICK, PUMP, cpu(0, true), DELIVER, PUMP]);
    });
}

#[test]
fn a_zero_fill_that_is_tried_again_leaves_pages_alone_that_have_left_meanwhile() {
    for_every_seed(|simulator| {
        simulator.set_faults(SURE_AGAIN);
        apply(simulator, &[cpu(0, true), PUMP]);
        simulator.set_faults(Faults::default());
        apply(simulator, &[device(0, 0), PUMP, TICK, PUMP, DELIVER, PUMP]);
    });
}

#[test]
fn a_page_whose_old_copy_could_not_be_punched_is_used_by_nobody() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), cpu(1, true)]);
        apply(simulator, &[migrate(2, Some(0)), PUMP, TICK, PUMP, DELIVER]);
        simulator.set_faults(SURE_IO);
        apply(simulator, &[PUMP, device(0, 0), cpu(1, true), migrate(2, Some(1)), PUMP]);
        assert!(simulator.world.devices[0].mappings.is_empty(), "the CPU still reads the old copy");
        simulator.crash().expect("nothing is broken by a crash");
        apply(simulator, &[PUMP, device(0, 0), PUMP]);
    });
}

#[test]
fn an_unpunched_page_of_a_device_that_is_given_up_gets_its_signal() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true)]);
        apply(simulator, &[migrate(1, Some(0)), PUMP, TICK, PUMP, DELIVER]);
        simulator.set_faults(SURE_IO);
        apply(simulator, &[Op::Pump { count: 1 }, Op::DriverHeld { device: 0 }, PUMP, cpu(0, true), PUMP]);
    });
}

/// Device 1 has three frames and has met four pages: page 0 had to go, and the marks of the others are taken.
fn full_device(simulator: &mut Simulator) {
    settle(simulator, &[device(1, 0), device(1, 1), device(1, 2), device(1, 3)]);
    let states = [0, 1, 2, 3].map(|page| state(simulator, page));
    assert_eq!(states, [PageState::System, PageState::Device, PageState::Device, PageState::Device]);
}

#[test]
fn a_page_that_the_device_keeps_using_survives_an_eviction_and_a_cold_one_goes() {
    for_every_seed(|simulator| {
        full_device(simulator);
        // Through the page table, so nobody is told: only the accessed mark shows it. Page 1 is the next one of the clock.
        settle(simulator, &[device(1, 1), device(1, 0)]);
        assert_eq!((state(simulator, 1), state(simulator, 2)), (PageState::Device, PageState::System));
    });
}

#[test]
fn a_mark_that_was_harvested_before_counts_in_an_eviction() {
    for_every_seed(|simulator| {
        full_device(simulator);
        let (region, pages, device_id) = (simulator.region(0), Pages { first: 0, count: 2 }, DeviceId(1));
        simulator.world.events.push_back(Event::Used { region, pages, device: device_id });
        settle(simulator, &[device(1, 0)]);
        assert_eq!((state(simulator, 1), state(simulator, 2)), (PageState::Device, PageState::System));
    });
}

#[test]
fn what_nobody_uses_any_more_goes_in_turn() {
    for_every_seed(|simulator| {
        full_device(simulator);
        settle(simulator, &[device(1, 0)]);
        assert_eq!((state(simulator, 1), state(simulator, 2)), (PageState::System, PageState::Device));
    });
}

#[test]
fn frames_of_a_region_that_is_torn_down_are_not_evicted_under_it() {
    for_every_seed(|simulator| {
        settle(simulator, &[device(1, 0), device(1, 1), device(1, 2)]);
        let other = Op::Migrate { region: 1, page: 0, count: 3, device: Some(1) };
        apply(simulator, &[Op::Free { region: 0, end_space: true }, PUMP, TICK, PUMP, other, PUMP, TICK, PUMP]);
    });
}

#[test]
fn a_failed_copy_after_a_restart_does_not_undo_a_homecoming() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), migrate(1, Some(0))]);
        apply(simulator, &[cpu(0, true), PUMP, DELIVER, cpu(0, true)]);
        simulator.crash().expect("the fill has happened, nobody has read its answer");
        simulator.set_faults(SURE_IO);
        apply(simulator, &[PUMP, TICK, PUMP, DELIVER, PUMP, TICK, PUMP, DELIVER, PUMP]);
        simulator.finish().expect("the CPU's value survives");
        assert_eq!(state(simulator, 0), PageState::System);
    });
}

#[test]
fn a_device_that_is_given_up_after_a_restart_leaves_nothing_on_the_move() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), migrate(1, Some(0))]);
        apply(simulator, &[cpu(0, true), PUMP, Op::DriverHeld { device: 0 }, PUMP]);
        simulator.crash().expect("nothing is broken by a crash");
        simulator.finish().expect("nobody waits for a device that will not return");
        settle(simulator, &[cpu(0, true), Op::DriverDies { device: 0, memory_lost: true }, device(0, 1)]);
    });
}

fn lose_memory_in_the_middle(simulator: &mut Simulator) {
    let out = Op::Migrate { region: 0, page: 2, count: 2, device: Some(0) };
    settle(simulator, &[cpu(0, true), device(0, 0), migrate(2, Some(0))]);
    apply(simulator, &[cpu(0, false), cpu(1, false), out, PUMP, TICK, PUMP]);
    apply(simulator, &[Op::DriverDies { device: 0, memory_lost: true }]);
}

#[test]
fn memory_lost_in_the_middle_of_transfers_is_neither_read_nor_freed_twice() {
    for_every_seed(|simulator| {
        lose_memory_in_the_middle(simulator);
        apply(simulator, &[PUMP, DELIVER, PUMP, DELIVER, PUMP, device(0, 3), PUMP]);
    });
}

#[test]
fn what_was_lost_in_the_middle_of_transfers_stays_lost_after_a_crash() {
    for_every_seed(|simulator| {
        lose_memory_in_the_middle(simulator);
        apply(simulator, &[Op::Pump { count: 2 }]);
        simulator.crash().expect("nothing is broken by a crash");
    });
}

#[test]
fn a_scrub_that_outlives_the_memory_it_scrubs_frees_nothing() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), migrate(2, Some(0))]);
        apply(simulator, &[Op::Free { region: 0, end_space: true }, PUMP, TICK, PUMP, TICK, PUMP]);
        // A core that looks at few pages a step takes some more.
        for _ in 0..16 {
            if !seen(simulator, "-> Scrub {") {
                apply(simulator, &[TICK, PUMP]);
            }
        }
        assert!(seen(simulator, "-> Scrub {"));
        apply(simulator, &[Op::DriverDies { device: 0, memory_lost: true }, PUMP, DELIVER, PUMP]);
    });
}

#[test]
fn a_fault_that_comes_before_its_device_does_not_bring_a_page_home_twice() {
    for_every_seed(|simulator| {
        settle(simulator, &[cpu(0, true), cpu(1, true), migrate(3, Some(0))]);
        // The way home of page 0 begins; the pager dies, and the fault on page 1 reaches the next one before the device does.
        apply(simulator, &[cpu(0, false), PUMP]);
        simulator.crash().expect("nothing is broken by a crash");
        apply(simulator, &[PUMP, cpu(1, true), PUMP, TICK, PUMP, TICK, PUMP]);
    });
}
