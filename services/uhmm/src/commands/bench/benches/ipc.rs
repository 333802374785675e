//! A request and its answer, 128 bytes each way: over uhmm's stubs, and over a bare SOCK_SEQPACKET socket in the same place.

use std::time::Instant;

use uhmm_kernel_hook::SeqPacket;

use super::super::figure::Reach;
use super::super::floor::echo::{Echo, Stubs, ask, waiting};
use super::super::place::{self, Place};
use super::super::run::Run;
use super::touch::histogram;

/// p50 and p99 in microseconds.
fn quantiles(count: u32, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<(f64, f64)> {
    let mut took = histogram()?;
    for _ in 0..count {
        let begun = Instant::now();
        work()?;
        took.saturating_record(u64::try_from(begun.elapsed().as_nanos())?);
    }
    let us = |quantile| took.value_at_quantile(quantile) as f64 / 1000.0;
    Ok((us(0.5), us(0.99)))
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let count = if run.short { 200 } else { 4000 };
    for place in [Place::OneCpu, Place::OtherCpu] {
        if place::allowed()?.len() < 2 && place == Place::OtherCpu {
            run.leave_out(place.name(), "there is only one CPU");
            continue;
        }
        let stubs = Echo::start(run, place, true)?;
        let bare = Echo::start(run, place, false)?;
        let mut rounds = Vec::new();
        place::on(&place.program()?, || {
            let mut link = Stubs::connect(stubs.socket())?;
            let socket = waiting(SeqPacket::connect(bare.socket())?)?;
            for round in run.rounds(9) {
                let ours = quantiles(count, || link.ask())?;
                let its = quantiles(count, || ask(&socket))?;
                if round > 0 {
                    rounds.push((ours, its));
                }
            }
            Ok(())
        })?;
        let p50 = rounds.iter().map(|(ours, its)| (ours.0, its.0)).collect();
        let p99 = rounds.iter().map(|(ours, its)| (ours.1, its.1)).collect();
        run.figure(format!("{}, p50", place.name()), "us", Reach::AtMost(1.25), p50);
        run.figure(format!("{}, p99", place.name()), "us", Reach::Shown, p99);
    }
    Ok(())
}
