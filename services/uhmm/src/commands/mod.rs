//! The operator's commands: each prints something a person can act on.

mod bench;
mod cdi;
mod conformance;
mod device_model;
mod doctor;
mod dra;
mod far_file;
mod manual;
mod model_orders;
mod new_driver;
mod renew;
mod run;
mod show;
mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use uhmm_ipc::message::supervisor::ServiceStatus;
use uhmm_kit::LogFormat;
use uhmm_manifest::Manifest;
use uhmm_sandbox::{Place, Profile};
use uhmm_sdk::Operator;
use uhmm_supervisor::SupervisorOptions;

pub use bench::{
    BenchArgs, BenchClientArgs, BenchEchoArgs, BenchFloorArgs, bench, bench_client, bench_echo, bench_floor,
};
pub use cdi::{CdiArgs, cdi};
pub use conformance::{ConformanceArgs, ConformanceCaseArgs, conformance, conformance_case};
pub use device_model::{Model, device_model};
pub use doctor::doctor;
pub use dra::dra;
pub use far_file::{FarFile, manifest_or_far};
pub use manual::{completions, man};
pub use new_driver::{NewDriverArgs, new_driver};
pub use renew::renew;
pub use run::{RunArgs, run};
pub use show::{stats, status};
pub use watch::{
    EventsArgs, MetricsArgs, PostMortemArgs, TopArgs, TraceArgs, events, export_beside, metrics, post_mortem, top,
    trace,
};

fn manifest(path: Option<&Path>) -> anyhow::Result<Manifest> {
    let Some(path) = path else { return Ok(Manifest::built_in()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("Manifest {} cannot be read", path.display()))?;
    Manifest::parse(&text).with_context(|| format!("Manifest {} is refused", path.display()))
}

/// `uhmm up`: runs until it is stopped.
pub fn up(
    manifest: Manifest,
    run_dir: PathBuf,
    (adopt, replaceable): (bool, bool),
    log: LogFormat,
) -> anyhow::Result<()> {
    if std::process::id() == 1 {
        // The first process of a container gets all orphans: somebody else than the supervisor buries them.
        uhmm_kernel_hook::guard::stand().context("The container's first process cannot do its work")?;
    }
    let exe = std::env::current_exe().context("The path of this program is unknown")?;
    let options = SupervisorOptions { run_dir, exe, adopt, replaceable, log };
    uhmm_supervisor::run(manifest, options, || uhmm_kit::say("ready"))?;
    Ok(())
}

/// Beside `uhmm up`: ends it when whoever has started it has closed its input (or has died), and no process has memory under management.
pub fn end_when_unused(run_dir: &Path) -> anyhow::Result<()> {
    /// Nobody is told when the last region has gone.
    const POLL: Duration = Duration::from_millis(100);
    let run_dir = run_dir.to_owned();
    let watch = move || {
        // Whatever is said there means nothing; only its end does.
        drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        let unused =
            || -> Result<bool, uhmm_sdk::Error> { Ok(Operator::connect(Some(&run_dir))?.regions()?.is_empty()) };
        // A pager that is being started again answers later.
        while !unused().unwrap_or(false) {
            std::thread::sleep(POLL);
        }
        if let Err(error) = Operator::connect(Some(&run_dir)).and_then(Operator::shutdown) {
            tracing::error!(%error, "A system that nobody uses does not end");
        }
    };
    // The supervisor's own thread takes this process's signals.
    uhmm_kernel_hook::signal::with_all_blocked(|| std::thread::spawn(watch))?;
    Ok(())
}

/// A folder with all that is in it; one that has gone already is no error.
pub fn remove(folder: impl AsRef<Path>) -> anyhow::Result<()> {
    let folder = folder.as_ref();
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Services that no pages are on.
const WITHOUT_PAGES: [&str; 4] = ["supervisor", "holder", "pager", "mirror"];

/// `uhmm down [--drain]`.
pub fn down(run_dir: &Path, drain: bool) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    if drain && let Err(error) = drain_all(&mut operator) {
        eprintln!("Not everything was brought home: {error:#}");
    }
    operator.shutdown()?;
    Ok(())
}

/// What cannot come home is named, and keeps nothing else from coming.
fn drain_all(operator: &mut Operator) -> anyhow::Result<()> {
    let serves = |service: &&ServiceStatus| service.state == "ready" && !WITHOUT_PAGES.contains(&service.name.as_str());
    for service in operator.status()?.iter().filter(serves) {
        let device = &service.name;
        match operator.device_id(device).and_then(|id| operator.drain(id)) {
            Ok(pages) => println!("{device} is drained: {pages} pages came home"),
            Err(error) => eprintln!("{device} is NOT drained: {:#}", anyhow::Error::from(error)),
        }
    }
    let pages: u64 = operator.regions()?.iter().flat_map(|region| &region.device_pages).sum();
    anyhow::ensure!(pages == 0, "{pages} pages of programs are on devices still, and end with them");
    Ok(())
}

/// `uhmm plan [--sandbox]`.
pub fn plan(path: Option<&Path>, run_dir: PathBuf, sandbox: bool) -> anyhow::Result<()> {
    let plan = manifest(path)?.resolve()?;
    let place = Place { run_dir, exe: std::env::current_exe().context("The path of this program is unknown")? };
    // Of all, also where only the usual plan is asked for: a sandbox that cannot be made is told before anything starts.
    let (joining, started): (Vec<_>, Vec<_>) = plan.services.iter().partition(|service| service.join.is_some());
    let profiles = started.iter().map(|service| Profile::of(&plan, service, &place));
    let profiles = profiles.collect::<Result<Vec<Profile>, _>>();
    if sandbox {
        profiles?.iter().chain([&Profile::of_holder(&place)]).for_each(|profile| println!("{}", profile.print()));
        for service in joining {
            println!("{} joins: its container or unit confines it, and the supervisor does not", service.name);
        }
        return Ok(());
    }
    println!("{}", plan.print());
    println!("{}", plan.draw());
    profiles?;
    Ok(())
}

/// `uhmm token`.
pub fn token() -> anyhow::Result<()> {
    let mut bytes = [0; 24];
    uhmm_kernel_hook::random_bytes(&mut bytes)?;
    println!("{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(())
}

/// `uhmm home [--release] PID`.
pub fn home(run_dir: &Path, pid: u32, stay: bool) -> anyhow::Result<()> {
    let pages = Operator::connect(Some(run_dir))?.home(pid, stay)?;
    if stay {
        println!("Process {pid} is at home ({pages} pages came) and stays there until `uhmm home --release {pid}`");
    } else {
        println!("Pages of process {pid} may leave again");
    }
    Ok(())
}

/// `uhmm empty DEVICE`.
pub fn empty(run_dir: &Path, device: &str) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    let id = operator.device_id(device)?;
    println!("{} pages came home from {device}", operator.empty_device(id)?);
    Ok(())
}

/// `uhmm drain DEVICE`.
pub fn drain(run_dir: &Path, device: &str) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    let id = operator.device_id(device)?;
    let pages = operator.drain(id)?;
    println!("{device} is drained: {pages} pages came home, and none leaves for it until `uhmm undrain {device}`");
    Ok(())
}

/// `uhmm undrain DEVICE`.
pub fn undrain(run_dir: &Path, device: &str) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    let id = operator.device_id(device)?;
    operator.undrain(id)?;
    println!("Pages may leave for {device} again");
    Ok(())
}

/// `uhmm kill SERVICE`.
pub fn kill(run_dir: &Path, service: &str) -> anyhow::Result<()> {
    let killed = Operator::connect(Some(run_dir))?.kill(service)?;
    println!("Killed {service}: pid {}, incarnation {}", killed.pid, killed.incarnation);
    Ok(())
}
