//! kill -9 of a service in the middle of work, and what it costs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use uhmm_sdk::{Device, Job, JobResult, Operator, PAGE_BYTES, PageStatus, Pending, Region};

use super::client::Client;
use super::report::Drill;
use crate::rng::Rng;

/// The service must be ready again within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// One operation through all services, again and again with another value: a CPU write (the page comes home by a fault, the device
/// mapping is revoked), then a device job on it (a device fault, through driver, mirror and pager).
struct Probe {
    region: Region,
    value: u64,
}

impl Probe {
    /// Milliseconds, and whether the device saw the value.
    fn run(&mut self, device: &Device) -> anyhow::Result<(f64, bool)> {
        let begun = Instant::now();
        self.value += 1;
        self.region.write_u64(0, self.value)?;
        let sum = device.run(Job::new("sum", [self.region.addr(), 8]).idempotent())?;
        Ok((begun.elapsed().as_secs_f64() * 1e3, sum.results == [self.value]))
    }
}

/// Kills `service` while CPU threads fault, a device job runs and a migration is under way.
pub fn drill(client: &mut Client<'_>, service: &str, seed: u64) -> anyhow::Result<Drill> {
    client.collect_counters(service)?;
    let (stop, longest_ns) = (AtomicBool::new(false), AtomicU64::new(0));
    let shared = &*client;
    let (mut drill, differing) = std::thread::scope(|scope| -> anyhow::Result<_> {
        // Ends the storm on every way out, or the scope would wait for it for ever.
        let _stop = StopStorm(&stop);
        let threads: Vec<_> = (0..2)
            .map(|thread| {
                let (stop, longest_ns) = (&stop, &longest_ns);
                let bytes = shared.region.bytes();
                scope.spawn(move || storm(bytes, Rng::new(seed + thread), stop, longest_ns))
            })
            .collect();
        let outcome = kill_amid_work(shared, service)?;
        stop.store(true, Ordering::Release);
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("A storm thread panicked"))??;
        }
        // Only now: while the storm goes on, CPU and device take the same pages from each other all the time.
        let answer = outcome.job.wait()?;
        let different = u64::from(answer.results != shared.expected_postings());
        Ok((outcome.drill, outcome.differing + different))
    })?;
    client.compared(3, differing);
    drill.longest_pause_ms = longest_ns.load(Ordering::Acquire) as f64 / 1e6;
    Ok(drill)
}

struct Outcome {
    drill: Drill,
    job: Pending<JobResult>,
    differing: u64,
}

fn kill_amid_work(client: &Client<'_>, service: &str) -> anyhow::Result<Outcome> {
    let (addr, len_bytes) = (client.region.addr(), client.region.len_bytes());
    let mut probe = Probe { region: client.session.allocate(PAGE_BYTES)?, value: 0 };
    let mut operator = Operator::connect(Some(client.run_dir))?;
    client.session.migrate(addr, len_bytes, uhmm_sdk::Target::Home)?;
    let (usual_ms, usual_right) = probe.run(&client.device)?;
    let job = client.submit("postings_walk");
    let migration = client.session.migrate_async(addr, len_bytes, &client.device)?;
    // Pages have begun to leave: from here on the kill is in the middle of the migration.
    let full_bytes = client.region.populated_bytes()?;
    while !migration.is_ready() && client.region.populated_bytes()? > full_bytes - full_bytes / 8 {
        std::thread::yield_now();
    }
    let during = under_way(!migration.is_ready(), !job.is_ready());
    let begun = Instant::now();
    let killed = operator.kill(service)?;
    let (_, right) = probe.run(&client.device)?;
    let first_operation_ms = begun.elapsed().as_secs_f64() * 1e3;
    let recovery_ms = wait_ready(client, service, killed.incarnation)?;
    let lost = migration.wait()?.pages_with(PageStatus::Poisoned) > 0;
    let drill =
        Drill { service: service.to_owned(), during, recovery_ms, usual_ms, first_operation_ms, longest_pause_ms: 0.0 };
    Ok(Outcome { drill, job, differing: u64::from(!usual_right || !right) + u64::from(lost) })
}

/// What the kill really was in the middle of: with very little text the migration or the job may have ended before.
fn under_way(migration: bool, job: bool) -> &'static str {
    match (migration, job) {
        (true, true) => "migration, job, fault storm",
        (true, false) => "migration, fault storm",
        (false, true) => "job, fault storm",
        (false, false) => "fault storm",
    }
}

struct StopStorm<'a>(&'a AtomicBool);

impl Drop for StopStorm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
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
