//! Does a fault cost the same however many clients and regions there are? Faults on pages that live on the device, one page each.
//!
//! * clients: thousands of faults a second, of all clients together; ratio: the part of the floor's. Beside it the same as a part of what one
//!   client gets: a floor that has to change between many processes falls too, or rises.
//! * regions: the p50 of one client's faults in microseconds; ratio: times the floor's.

use std::path::Path;
use std::process::Command;

use super::party::{Helper, Party, Round, Shape, Side};
use super::{Figure, median};
use crate::demo::System;

const MANIFEST: &str = r#"
[[service]]
name = "pager"
kind = "pager"

[[service]]
name = "mirror"
kind = "mirror"

[[service]]
name = "soft0"
kind = "driver"
driver = "soft"

[[device]]
name = "soft0"
service = "soft0"
memory_bytes = "256MiB"
populate = true
"#;

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

fn cases(only: Option<&str>) -> Vec<Case> {
    let clients = CLIENTS.map(|clients| Case {
        name: format!("clients {clients}"),
        shape: Shape { clients, regions: 1, pages: FAULTS / clients },
        unit: "thousand faults/s",
        measure: rate,
    });
    let regions = REGIONS.map(|regions| Case {
        name: format!("regions {regions}"),
        shape: Shape { clients: 1, regions, pages: FAULTS / regions },
        unit: "us, p50 of a fault",
        measure: p50_us,
    });
    let all: Vec<Case> = clients.into_iter().chain(regions).collect();
    // `regions 1` is not `regions 10`.
    let named = all.iter().any(|case| Some(case.name.as_str()) == only);
    let wanted = |case: &Case| only.is_none_or(|text| if named { case.name == text } else { case.name.contains(text) });
    all.into_iter().filter(wanted).collect()
}

pub(super) fn run(rounds: u32, only: Option<&str>) -> anyhow::Result<Vec<Figure>> {
    let run_dir = std::env::temp_dir().join(format!("uhmm-bench-{}", std::process::id()));
    let system = System::start(run_dir, MANIFEST)?;
    let socket = system.run_dir().join("bench-floor.sock");
    let _handler = Helper::start(Command::new(std::env::current_exe()?).arg("bench-floor").arg(&socket))?;
    let mut figures = Vec::new();
    for case in cases(only) {
        figures.push(measure(&case, rounds, system.run_dir(), &socket)?);
    }
    Ok(figures)
}

fn measure(case: &Case, rounds: u32, run_dir: &Path, socket: &Path) -> anyhow::Result<Figure> {
    let mut uhmm = Party::start(Side::Uhmm(run_dir), case.shape)?;
    let mut floor = Party::start(Side::Floor(socket), case.shape)?;
    let mut figure = Figure { bench: "scale", case: case.name.clone(), unit: case.unit, rounds: Vec::new() };
    // The first round of both touches everything for the first time.
    for round in 0..=rounds {
        let pair = (uhmm.round()?, floor.round()?);
        if round > 0 {
            figure.rounds.push(((case.measure)(case.shape, &pair.0), (case.measure)(case.shape, &pair.1)));
        }
    }
    Ok(figure)
}
