//! `uhmm bench`: what uhmm takes for its work, each figure beside the floor's of the same run: the same work done with the kernel hook and
//! nothing else. Rounds of both alternate, so that a machine that is slow for a while is slow for both. Only ratios mean anything.
//!
//! ```text
//!   uhmm bench --+-- uhmm up (a system of its own)
//!                +-- uhmm bench-floor: one handler of every bare client's userfaultfd
//!                `-- uhmm bench-client, some for each side: they do a round when they are told, all at once
//! ```

mod client;
mod floor;
mod party;
mod scale;

use std::process::ExitCode;

use anyhow::bail;

pub use client::{BenchClientArgs, bench_client};
pub use floor::{BenchFloorArgs, bench_floor};

/// What there is to measure.
const NAMES: [&str; 1] = ["scale"];

/// `uhmm bench`
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Which ones [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Rounds of each case; the middle one is shown
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print an array of JSON objects instead of the table
    #[arg(long)]
    json: bool,
    /// Only the case of this name, or those whose names have this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// One figure.
struct Figure {
    bench: &'static str,
    case: String,
    unit: &'static str,
    /// Of each round: uhmm's and the floor's.
    rounds: Vec<(f64, f64)>,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figure {
    fn value(&self) -> f64 {
        median(self.rounds.iter().map(|(value, _)| *value))
    }

    fn floor(&self) -> f64 {
        median(self.rounds.iter().map(|(_, floor)| *floor))
    }

    /// The middle of the rounds' own ratios: both sides of a round have met the same machine.
    fn ratio(&self) -> f64 {
        median(self.rounds.iter().map(|(value, floor)| value / floor))
    }

    /// How far apart the ratios of the rounds are, as a part of the middle one.
    fn spread(&self) -> f64 {
        let ratios = self.rounds.iter().map(|(value, floor)| value / floor);
        let (low, high) = ratios.fold((f64::MAX, f64::MIN), |(low, high), ratio| (low.min(ratio), high.max(ratio)));
        (high - low) / self.ratio()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "bench": self.bench, "case": self.case, "value": self.value(), "unit": self.unit,
            "floor": self.floor(), "ratio": self.ratio(), "spread": self.spread(),
        })
    }

    fn row(&self) -> String {
        let Self { bench, case, unit, .. } = self;
        let (value, floor) = (self.value(), self.floor());
        format!(
            "{bench:<8} {case:<22} {value:>10.2} {floor:>10.2} {:>7.2} {:>6.2}  {unit}",
            self.ratio(),
            self.spread()
        )
    }
}

/// Runs them and prints their figures.
pub fn bench(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    if let Some(unknown) = args.names.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("There is no bench {unknown:?}: take some of {}", NAMES.join(", "));
    }
    let figures = scale::run(args.rounds, args.only.as_deref())?;
    if args.json {
        println!("{}", serde_json::Value::from_iter(figures.iter().map(Figure::json)));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<8} {:<22} {:>10} {:>10} {:>7} {:>6}  unit", "bench", "case", "uhmm", "floor", "ratio", "spread");
    figures.iter().for_each(|figure| println!("{}", figure.row()));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_compares_the_two_sides_of_each_round() {
        // The second round met a machine of half the speed.
        let rounds = vec![(10.0, 20.0), (5.0, 10.0), (12.0, 20.0)];
        let figure = Figure { bench: "scale", case: "a case".to_owned(), unit: "us", rounds };
        assert_eq!((figure.value(), figure.floor(), figure.ratio()), (10.0, 20.0, 0.5));
        assert!((figure.spread() - 0.2).abs() < 1e-9);
        assert_eq!(figure.json()["ratio"], 0.5);
    }
}
