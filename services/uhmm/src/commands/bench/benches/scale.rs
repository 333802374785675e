//! Does a fault cost the same however many clients and regions there are? Faults on pages that live on the device, one page each.
//!
//! * clients: thousands of faults a second, of all clients together; ratio: the part of the floor's. Beside it the same as a part of what one
//!   client gets: a floor that has to change between many processes falls too, or rises.
//! * regions: the p50 of one client's faults in microseconds; ratio: times the floor's.

use std::collections::HashMap;

use super::super::bed::{Bed, Spec};
use super::super::figure::{Reach, median};
use super::super::floor::bare::Bare;
use super::super::place::Place;
use super::super::run::Run;
use super::party::{Party, Round, Shape, Side};

/// Faults of a round, about.
const FAULTS: u64 = 8192;
const CLIENTS: [u64; 4] = [1, 8, 32, 64];
const REGIONS: [u64; 4] = [1, 10, 100, 1000];

struct Case {
    name: String,
    shape: Shape,
    unit: &'static str,
    measure: fn(Shape, &Round) -> f64,
}

fn rate(shape: Shape, round: &Round) -> f64 {
    (shape.clients * shape.regions * shape.pages) as f64 / round.took.as_secs_f64() / 1000.0
}

fn p50_us(_: Shape, round: &Round) -> f64 {
    median(round.p50_ns.iter().map(|ns| *ns as f64 / 1000.0))
}

fn cases(run: &Run<'_>) -> Vec<Case> {
    let faults = if run.short { 1024 } else { FAULTS };
    let clients = CLIENTS.map(|clients| Case {
        name: format!("clients {clients}"),
        shape: Shape { clients, regions: 1, pages: faults / clients },
        unit: "thousand faults/s",
        measure: rate,
    });
    let regions = REGIONS.map(|regions| Case {
        name: format!("regions {regions}"),
        shape: Shape { clients: 1, regions, pages: (faults / regions).max(1) },
        unit: "us, p50 of a fault",
        measure: p50_us,
    });
    let all: Vec<Case> = clients.into_iter().chain(regions).collect();
    // `regions 1` is not `regions 10`.
    let named = all.iter().any(|case| Some(case.name.as_str()) == run.only);
    let wanted = |case: &Case| if named { Some(case.name.as_str()) == run.only } else { run.wants(&case.name) };
    all.into_iter().filter(wanted).collect()
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let Some(bed) = run.bed(Spec::of(256 << 20), "")? else { return Ok(()) };
    let bare = Bare::start(run, Place::Free, &[])?;
    let mut firsts: HashMap<&str, f64> = HashMap::new();
    for case in cases(run) {
        let rounds = measure(run, &case, &bed, &bare)?;
        let value = median(rounds.iter().map(|(value, _)| *value));
        let first = *firsts.entry(case.unit).or_insert(value);
        let flat =
            if case.shape.regions > 1 || case.shape.clients == 1 { Reach::AtMost(1.2) } else { Reach::AtLeast(0.8) };
        let beside_first = rounds.iter().map(|(value, _)| (*value, first)).collect();
        run.figure(&case.name, case.unit, Reach::Shown, rounds);
        if (case.shape.clients, case.shape.regions) != (1, 1) {
            run.figure(format!("{} : one", case.name), case.unit, flat, beside_first);
        }
    }
    if run.wants("a region of") {
        super::sizes::large_regions(run, &bed)?;
    }
    if run.wants("adopt, migrate, release") {
        super::sizes::cost_a_page(run, &bed)?;
    }
    Ok(())
}

fn measure(run: &Run<'_>, case: &Case, bed: &Bed, bare: &Bare) -> anyhow::Result<Vec<(f64, f64)>> {
    let mut uhmm = Party::start(Side::Uhmm(bed.run_dir(), bed.device(0)), case.shape)?;
    let mut floor = Party::start(Side::Floor(bare.socket()), case.shape)?;
    let mut rounds = Vec::new();
    // The first round of both touches everything for the first time.
    for round in run.rounds(7) {
        let pair = (uhmm.round()?, floor.round()?);
        if round > 0 {
            rounds.push(((case.measure)(case.shape, &pair.0), (case.measure)(case.shape, &pair.1)));
        }
    }
    Ok(rounds)
}
