//! Figures for people, for machines, and for docs/performance.md.

use super::figure::Figure;
use super::run::Run;
use super::{Bench, BenchArgs};

/// What a bench is.
pub(super) fn describe(bench: &Bench) {
    println!("{:<13} {}\n{:<13} floor: {}\n{:<13} reach: {}", bench.name, bench.what, "", bench.floor, "", bench.reach);
}

/// Everything that was found.
pub(super) fn print(run: &Run<'_>, args: &BenchArgs, statement: &str) {
    for (case, why) in &run.left_out {
        eprintln!("Left out: {case}: {why}");
    }
    if args.json {
        println!("{}", serde_json::Value::from_iter(run.figures.iter().map(json)));
    } else if args.markdown {
        markdown(run, statement);
    } else {
        table(run);
    }
}

fn json(figure: &Figure) -> serde_json::Value {
    serde_json::json!({
        "bench": figure.bench, "case": figure.case, "value": figure.value(), "unit": figure.unit,
        "floor": figure.floor(), "ratio": figure.ratio(), "spread": figure.spread(),
        "reach": figure.reach.text(), "met": figure.met(),
    })
}

fn table(run: &Run<'_>) {
    let width = run.figures.iter().map(|figure| figure.case.len()).max().unwrap_or(0).max(8);
    println!(
        "{:<12} {:<width$} {:>10} {:>10} {:>7} {:>7} {:>8}          unit",
        "bench", "case", "uhmm", "floor", "ratio", "spread", "reach"
    );
    for figure in &run.figures {
        println!(
            "{:<12} {:<width$} {:>10.2} {:>10.2} {:>7.2} {:>7.2} {:>8}  {:<6}  {}",
            figure.bench,
            figure.case,
            figure.value(),
            figure.floor(),
            figure.ratio(),
            figure.spread(),
            figure.reach.text(),
            figure.verdict(),
            figure.unit,
        );
    }
}

fn markdown(run: &Run<'_>, statement: &str) {
    println!("{statement}.\n");
    println!("| bench | case | uhmm | floor | unit | ratio | spread | reach | |");
    println!("| --- | --- | ---: | ---: | --- | ---: | ---: | --- | --- |");
    for figure in &run.figures {
        println!(
            "| {} | {} | {:.2} | {:.2} | {} | **{:.2}** | {:.2} | {} | {} |",
            figure.bench,
            figure.case,
            figure.value(),
            figure.floor(),
            figure.unit,
            figure.ratio(),
            figure.spread(),
            figure.reach.text(),
            figure.verdict(),
        );
    }
    if !run.left_out.is_empty() {
        println!();
    }
    for (case, why) in &run.left_out {
        println!("* Left out: {case}: {why}.");
    }
}
