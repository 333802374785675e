//! A job that sums memory at home, which it has never seen: by its faults alone, and with the range named so that it is brought before
//! (`Job::reads`), beside a migration of the whole range and the job then.

use std::time::Instant;

use uhmm_sdk::Job;

use super::super::bed::Spec;
use super::super::figure::Reach;
use super::super::floor::copies::rate;
use super::super::run::Run;
use super::managed::{Kind, Managed};

const BYTES: u64 = 256 << 20;

fn sum(memory: &Managed) -> anyhow::Result<()> {
    memory.device().run(Job::new("sum", [memory.addr(), memory.len()]).idempotent())?;
    Ok(())
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let bytes = run.bytes(BYTES);
    let spec = Spec { needs: 4 * bytes, kernel: Some("sum"), ..Spec::of(2 * bytes + (64 << 20)) };
    let Some(bed) = run.bed(spec, "")? else { return Ok(()) };
    for kind in Kind::ALL {
        if !run.wants(kind.name()) {
            continue;
        }
        if let Err(why) = kind.here() {
            run.leave_out(kind.name(), why);
            continue;
        }
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let memory = Managed::new(session, device, kind, bytes)?;
        let (mut first, mut again, mut named) = (Vec::new(), Vec::new(), Vec::new());
        for round in run.rounds(5) {
            memory.home()?;
            let begun = Instant::now();
            sum(&memory)?;
            let by_faults = rate(bytes, begun);
            let begun = Instant::now();
            sum(&memory)?;
            let mapped = rate(bytes, begun);
            memory.home()?;
            let begun = Instant::now();
            let job = Job::new("sum", [memory.addr(), bytes]).idempotent().reads(memory.addr(), bytes);
            memory.device().run(job)?;
            let by_name = rate(bytes, begun);
            memory.home()?;
            let begun = Instant::now();
            memory.out()?;
            sum(&memory)?;
            if round > 0 {
                let floor = rate(bytes, begun);
                named.push((by_name, floor));
                first.push((by_faults, floor));
                again.push((mapped, floor));
            }
        }
        let name = kind.name();
        run.figure(format!("{name}, sum by faults : migrate, then sum"), "GiB/s", Reach::AtLeast(0.6), first);
        run.figure(format!("{name}, sum, ranges named : migrate, then sum"), "GiB/s", Reach::AtLeast(0.9), named);
        run.figure(format!("{name}, sum of mapped pages : migrate, then sum"), "GiB/s", Reach::Shown, again);
    }
    Ok(())
}
