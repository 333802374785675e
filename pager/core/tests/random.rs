//! Random histories: two clients, two small devices, and a pager that may die between any two actions.

use proptest::prelude::*;
use uhmm_pager_core::sim::{Config, Faults, Op, Simulator};

/// A few seconds in the dev profile.
const CASES: u32 = 10_000;

fn op() -> impl Strategy<Value = Op> {
    let page = 0..8u8;
    prop_oneof![
        8 => (0..4u8, page.clone(), any::<bool>()).prop_map(|(region, page, write)| Op::Cpu { region, page, write }),
        8 => (0..2u8, 0..4u8, page.clone(), 0..5u8, any::<bool>())
            .prop_map(|(device, region, page, around, write)| Op::Device { device, region, page, around, write }),
        6 => (0..4u8, page.clone(), 1..9u8, proptest::option::weighted(0.7, 0..2u8))
            .prop_map(|(region, page, count, device)| Op::Migrate { region, page, count, device }),
        2 => (0..4u8, page.clone(), 1..9u8, any::<bool>())
            .prop_map(|(region, page, count, on)| Op::Pin { region, page, count, on }),
        1 => (0..4u8, any::<bool>()).prop_map(|(region, in_place)| Op::Advise { region, in_place }),
        2 => (0..4u8, any::<bool>()).prop_map(|(region, on)| Op::ReadMostly { region, on }),
        3 => (0..4u8, page.clone(), 1..9u8, 1..4u8)
            .prop_map(|(region, page, count, devices)| Op::Revoke { region, page, count, devices }),
        1 => (0..4u8, 0..2u8, 0..4u8).prop_map(|(region, device, count)| Op::Evict { region, device, count }),
        6 => (0..4u8, page.clone(), 1..5u8).prop_map(|(region, page, count)| Op::DontNeed { region, page, count }),
        1 => (0..4u8, page.clone(), 1..4u8, any::<bool>())
            .prop_map(|(region, page, count, on)| Op::Guard { region, page, count, on }),
        1 => (0..4u8).prop_map(|region| Op::Fork { region }),
        1 => (0..4u8, page, 1..4u8).prop_map(|(region, page, count)| Op::Unmap { region, page, count }),
        1 => (0..4u8, any::<bool>()).prop_map(|(region, end_space)| Op::Free { region, end_space }),
        1 => (0..4u8).prop_map(|region| Op::Create { region }),
        1 => (0..2u8, proptest::bool::weighted(0.3))
            .prop_map(|(device, memory_lost)| Op::DriverDies { device, memory_lost }),
        1 => (0..2u8).prop_map(|device| Op::DriverHeld { device }),
        12 => (1..6u8).prop_map(|count| Op::Pump { count }),
        10 => any::<u8>().prop_map(|index| Op::Deliver { index }),
        8 => Just(Op::Tick),
        2 => (0..25u8).prop_map(|actions| Op::CrashAfter { actions }),
    ]
}

fn faults() -> impl Strategy<Value = Faults> {
    prop_oneof![
        Just(Faults::default()),
        (0..30u8, 0..20u8, 0..30u8).prop_map(|(again, io, partial)| Faults { again, io, partial }),
    ]
}

/// `UHMM_SIM_CASES` makes a longer session. What a session finds becomes a named test in `invariants.rs` or `crash.rs`, not a saved
/// seed: seeds mean something else as soon as an operation is added.
fn config() -> ProptestConfig {
    let cases = std::env::var("UHMM_SIM_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_history_loses_a_write_or_leaves_anybody_waiting(
        ops in proptest::collection::vec(op(), 1..120), faults in faults(), seed in any::<u64>(),
        pace in 0..4u8, coherent in any::<bool>(), private_mask in 0..4u8,
    ) {
        let config = Config { page_counts: vec![8, 6], frame_counts: vec![5, 3], private_mask, faults, coherent, seed };
        let mut simulator = Simulator::new(config);
        simulator.log = std::env::var_os("UHMM_SIM_LOG").map(|_| Vec::new());
        // From a pager that lags behind to one that has nearly everything done before the next thing happens.
        let keep_up = |simulator: &mut Simulator| {
            simulator.pump(u32::from(pace) * 4)?;
            if pace == 3 {
                simulator.apply(Op::Tick)?;
                simulator.deliver(seed as usize % 5)?;
            }
            Ok(())
        };
        let mut run = ops.into_iter().try_for_each(|op| simulator.apply(op).and_then(|()| keep_up(&mut simulator)));
        run = run.and_then(|()| simulator.finish_and_read_all());
        if let Err(violation) = run {
            let log = simulator.log.unwrap_or_default();
            let last = log[log.len().saturating_sub(80)..].join("\n");
            return Err(TestCaseError::fail(format!("{violation}\n{last}")));
        }
    }
}
