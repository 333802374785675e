//! kill -9 of a service in the middle of work, and what it costs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use uhmm_sdk::Operator;

use super::client::{Client, Rng};
use super::report::Drill;

/// The service must be ready again within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Kills `service` while CPU threads fault, a device job runs and a migration is under way.
pub fn drill(client: &mut Client<'_>, service: &str, during: &'static str, seed: u64) -> anyhow::Result<Drill> {
    client.collect_counters(service)?;
    let (stop, longest_ns) = (AtomicBool::new(false), AtomicU64::new(0));
    let shared = &*client;
    let (killed, differing) = std::thread::scope(|scope| -> anyhow::Result<_> {
        let threads: Vec<_> = (0..2)
            .map(|thread| {
                let (stop, longest_ns) = (&stop, &longest_ns);
                let bytes = shared.region.bytes();
                scope.spawn(move || storm(bytes, Rng::new(seed + thread), stop, longest_ns))
            })
            .collect();
        let job = shared.submit("postings_walk");
        let migration =
            shared.session.migrate_async(shared.region.addr(), shared.region.len_bytes(), &shared.device)?;
        let killed = Operator::connect(Some(shared.run_dir))?.kill(service)?;
        wait_ready(shared, service, killed.incarnation)?;
        let migrated = migration.wait()?;
        stop.store(true, Ordering::Release);
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("A storm thread panicked"))??;
        }
        // Only now: while the storm goes on, CPU and device take the same pages from each other all the time.
        let answer = job.wait()?;
        let lost = migrated.runs.iter().any(|run| run.status == uhmm_sdk::PageStatus::Poisoned);
        Ok((killed, u64::from(answer.results != shared.expected_postings()) + u64::from(lost)))
    })?;
    client.compared(1, differing);
    let recovery_ms = wait_ready(client, service, killed.incarnation)?;
    let longest_pause_ms = longest_ns.load(Ordering::Acquire) as f64 / 1e6;
    Ok(Drill { service: service.to_owned(), during, recovery_ms, longest_pause_ms })
}

/// Touches pages at random until told to stop; notes the longest time that one access stood still.
fn storm(
    bytes: &uhmm_kernel_hook::ManagedMapping,
    mut rng: Rng,
    stop: &AtomicBool,
    longest_ns: &AtomicU64,
) -> anyhow::Result<()> {
    let words = bytes.len() / 8;
    while !stop.load(Ordering::Acquire) {
        let begun = Instant::now();
        bytes.load_u64(rng.below(words) * 8)?;
        let took_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        longest_ns.fetch_max(took_ns, Ordering::AcqRel);
    }
    Ok(())
}

/// Milliseconds from death to ready, by the supervisor's own clock.
fn wait_ready(client: &Client<'_>, service: &str, killed: u32) -> anyhow::Result<u64> {
    let begun = Instant::now();
    let mut operator = Operator::connect(Some(client.run_dir))?;
    loop {
        let services = operator.status()?;
        let found = services.iter().find(|status| status.name == service).context("The service is not in the plan")?;
        if found.state == "ready" && found.incarnation > killed {
            return Ok(found.last_recovery_ms);
        }
        if begun.elapsed() > PATIENCE {
            bail!("{service} is not ready again after {PATIENCE:?}: it is {}", found.state);
        }
        std::thread::yield_now();
    }
}
