//! What a comparison has found, as a table for people and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::Outcome;
use super::arrange::{Arrangement, Costs};

/// What a run came to and what it cost, or why it did not end.
pub type Ended = Result<(Outcome, Costs), String>;

/// One program, with one part of its working set.
#[derive(Debug)]
pub struct Row {
    /// Of the program.
    pub program: &'static str,
    /// Of the plain run.
    pub set_bytes: u64,
    /// What it may have.
    pub ram_bytes: u64,
    /// `1/2`.
    pub part: String,
    /// Runs by arrangement. `Err`: why it failed, or that it hangs.
    pub runs: BTreeMap<Arrangement, Vec<Ended>>,
}

fn median(mut numbers: Vec<f64>) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    (!numbers.is_empty()).then(|| numbers[numbers.len() / 2])
}

impl Row {
    fn good(&self, arrangement: Arrangement) -> impl Iterator<Item = &(Outcome, Costs)> {
        self.runs.get(&arrangement).into_iter().flatten().flatten()
    }

    fn median(&self, arrangement: Arrangement, pick: impl Fn(&(Outcome, Costs)) -> Option<f64>) -> Option<f64> {
        median(self.good(arrangement).filter_map(pick).collect())
    }

    /// How many times as long the second takes as the first.
    fn ratio(&self, arrangement: Arrangement, to: Arrangement, pick: impl Fn(&Outcome) -> Option<f64>) -> Option<f64> {
        let number = |arrangement| self.median(arrangement, |(outcome, _)| pick(outcome));
        Some(number(to)? / number(arrangement)?)
    }

    /// Faults of the mechanism: what failed, or hung.
    pub fn failures(&self) -> Vec<&str> {
        let failed = self.runs.values().flatten().filter_map(|run| run.as_ref().err());
        failed.map(String::as_str).collect()
    }

    fn line(&self) -> String {
        use Arrangement::{Plain, SwapFile, Uhmm, Zram};
        let seconds = |outcome: &Outcome| Some(outcome.seconds);
        let p99 = |outcome: &Outcome| outcome.p99_us;
        let ratio = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.2}"));
        let mib = |number: Option<f64>| {
            number.map_or_else(|| "-".to_owned(), |number| format!("{:.0}", number / f64::from(1 << 20)))
        };
        let away = |arrangement| mib(self.median(arrangement, |(_, costs)| Some(costs.away_bytes as f64)));
        let faults = |arrangement| {
            self.median(arrangement, |(_, costs)| Some(costs.faults as f64))
                .map_or_else(|| "-".to_owned(), |count| format!("{count:.0}"))
        };
        let mut line = format!(
            "| {} | {} | {} | {}",
            self.program,
            self.part,
            mib(Some(self.ram_bytes as f64)),
            ratio(self.median(Plain, |(outcome, _)| Some(outcome.seconds)))
        );
        for arrangement in [Uhmm, Zram, SwapFile] {
            // Writing to a String cannot fail.
            let _ = write!(line, " | {}", ratio(self.ratio(arrangement, Plain, seconds)));
        }
        for other in [Zram, SwapFile] {
            let _ = write!(line, " | {}", ratio(self.ratio(Uhmm, other, seconds)));
        }
        let p99_ratio = self.ratio(Zram, Uhmm, p99);
        let _ = write!(line, " | {} | {} / {} / {}", ratio(p99_ratio), away(Uhmm), away(Zram), away(SwapFile));
        let _ = write!(line, " | {} / {} / {} |", faults(Uhmm), faults(Zram), faults(SwapFile));
        line
    }

    fn json(&self) -> serde_json::Value {
        let run = |run: &Result<(Outcome, Costs), String>| match run {
            Ok((outcome, costs)) => serde_json::json!({
                "seconds": outcome.seconds, "p99_us": outcome.p99_us, "result": outcome.result,
                "resident_bytes": costs.resident_bytes, "away_bytes": costs.away_bytes, "faults": costs.faults,
            }),
            Err(why) => serde_json::json!({ "failed": why }),
        };
        let runs =
            self.runs.iter().map(|(arrangement, runs)| (arrangement.name().to_owned(), runs.iter().map(run).collect()));
        serde_json::json!({
            "program": self.program, "set_bytes": self.set_bytes, "ram_bytes": self.ram_bytes, "part": self.part,
            "runs": runs.collect::<serde_json::Map<String, serde_json::Value>>(),
        })
    }
}

/// Of what was measured, and where.
pub fn head() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("Linux {}, {cpus} processors, load {}", kernel.trim(), load.split(' ').next().unwrap_or_default())
}

/// The table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| program | part | MiB | plain s | uhmm | zram | swap file | uhmm : zram | uhmm : swap file | p99 : zram's | MiB away | faults |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for row in rows {
        text += &row.line();
        text.push('\n');
    }
    text
}

/// Everything.
pub fn json(rows: &[Row], head: &str) -> serde_json::Value {
    serde_json::json!({ "machine": head, "rows": rows.iter().map(Row::json).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: f64, p99_us: f64) -> Result<(Outcome, Costs), String> {
        let outcome = Outcome { result: "1".into(), seconds, p99_us: Some(p99_us) };
        Ok((outcome, Costs { resident_bytes: 1 << 20, away_bytes: 3 << 20, faults: 7 }))
    }

    #[test]
    fn a_row_has_medians_as_ratios_of_throughput() {
        let runs = [
            (Arrangement::Plain, vec![run(1.0, 10.0)]),
            (Arrangement::Uhmm, vec![run(9.0, 5.0), run(2.0, 5.0), run(2.0, 5.0)]),
            (Arrangement::Zram, vec![run(4.0, 50.0)]),
            (Arrangement::SwapFile, vec![Err("it hangs".into())]),
        ];
        let row = Row { program: "p", set_bytes: 8 << 20, ram_bytes: 4 << 20, part: "1/2".into(), runs: runs.into() };
        let expected = "| p | 1/2 | 4 | 1.00 | 0.50 | 0.25 | - | 2.00 | - | 0.10 | 3 / 3 / - | 7 / 7 / - |";
        assert_eq!(row.line(), expected);
        assert_eq!(row.failures(), ["it hangs"]);
        assert_eq!(json(&[row], "here")["rows"][0]["runs"]["uhmm"][1]["seconds"], 2.0);
    }
}
