//! What shows a running system: `metrics`, `top`, `events`, `trace`, `post-mortem`. All of it is in `uhmm_watch`; here are the words.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use uhmm_kernel_hook::PidFd;
use uhmm_watch::follow;
use uhmm_watch::http::Server;
use uhmm_watch::sample::Sampler;
use uhmm_watch::trace::{self, Wanted};
use uhmm_watch::{post_mortem::PostMortem, screen};

/// An exporter that ends sooner than this is started again after a pause as long.
const EXPORTER_PAUSE: Duration = Duration::from_secs(1);

#[derive(Args)]
pub struct MetricsArgs {
    /// Also on this loopback address, e.g. 127.0.0.1:9464 [default: metrics.sock in the run directory only]
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Print one exposition and end
    #[arg(long)]
    once: bool,
    /// (internal) End with this process
    #[arg(long, hide = true)]
    with: Option<u32>,
}

#[derive(Args)]
pub struct TopArgs {
    /// Print one sample as text and end
    #[arg(long)]
    once: bool,
    /// Write every sample to a file, too
    #[arg(long)]
    record: Option<PathBuf>,
    /// Show what was recorded
    #[arg(long, conflicts_with = "record")]
    replay: Option<PathBuf>,
    /// Seconds between two samples
    #[arg(long, default_value_t = 1.0)]
    period: f64,
}

#[derive(Args)]
pub struct EventsArgs {
    /// Go on with what happens
    #[arg(long, short)]
    follow: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// So many of each service's last events first
    #[arg(long, default_value_t = 50)]
    past: u64,
    /// Of this service only
    #[arg(long)]
    service: Option<String>,
}

#[derive(Args)]
pub struct TraceArgs {
    /// Number of the request (in brackets in `uhmm events`), or how it begins [default: the last one that ended]
    id: Option<String>,
    /// The one that took longest
    #[arg(long)]
    slowest: bool,
    /// One with such an event
    #[arg(long, value_parser = ["request", "cpu-fault", "device-fault", "job"])]
    kind: Option<String>,
    /// Write a file for ui.perfetto.dev or chrome://tracing, too
    #[arg(long)]
    perfetto: Option<PathBuf>,
    /// All that is recorded, in that file
    #[arg(long, requires = "perfetto")]
    all: bool,
}

#[derive(Args)]
pub struct PostMortemArgs {
    /// Service name
    service: String,
    /// Of this incarnation [default: the last one that died]
    #[arg(long)]
    incarnation: Option<u32>,
    /// So many of its last events
    #[arg(long, default_value_t = 40)]
    last: usize,
}

/// `uhmm metrics`.
pub fn metrics(run_dir: &Path, args: &MetricsArgs) -> anyhow::Result<()> {
    if args.once {
        let sample = Sampler::connect(Some(run_dir))?.sample()?;
        return print(&uhmm_watch::metrics::exposition(&sample));
    }
    if !run_dir.is_dir() {
        bail!("There is no run directory {}: start `uhmm up` first", run_dir.display());
    }
    let master = args.with.map(PidFd::open).transpose().context("The process to end with is gone")?;
    let server = Server::bind(run_dir, args.listen)?;
    if let Some(address) = server.address() {
        uhmm_kit::say(&format!("http://{address}/metrics"));
    }
    let stop = master.as_ref().map(|master| master as &dyn std::os::fd::AsFd);
    server.run(stop).context("Metrics cannot be served any more")
}

/// `uhmm up --metrics`: a process of its own, started again when it dies, that ends with this one. The supervisor does not know it.
pub fn export_beside(run_dir: &Path, address: SocketAddr) -> anyhow::Result<()> {
    if !address.ip().is_loopback() {
        bail!(uhmm_watch::http::ServeError::NotLoopback { address });
    }
    let exe = std::env::current_exe().context("The path of this program is unknown")?;
    let run_dir = run_dir.to_owned();
    // The supervisor's own thread takes this process's signals.
    let watch = move || {
        loop {
            let mut command = Command::new(&exe);
            command.arg("--run-dir").arg(&run_dir).args(["metrics", "--listen", &address.to_string()]);
            command.args(["--with", &std::process::id().to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            let started = Instant::now();
            match command.spawn().and_then(|mut child| child.wait()) {
                Ok(status) => tracing::warn!(%status, "The exporter of metrics ended: it is started again"),
                Err(error) => tracing::warn!(%error, "The exporter of metrics cannot be started"),
            }
            std::thread::sleep(EXPORTER_PAUSE.saturating_sub(started.elapsed()));
        }
    };
    uhmm_kernel_hook::signal::with_all_blocked(|| std::thread::spawn(watch))?;
    Ok(())
}

/// `uhmm top`.
pub fn top(run_dir: &Path, args: TopArgs) -> anyhow::Result<()> {
    if !(0.05..=3600.0).contains(&args.period) {
        bail!("A period of {} s is not allowed: use 0.05 to 3600", args.period);
    }
    let TopArgs { once, record, replay, period } = args;
    let period = Duration::from_secs_f64(period);
    Ok(screen::run(run_dir, &screen::Options { once, record, replay, period })?)
}

/// `uhmm events`.
pub fn events(run_dir: &Path, args: EventsArgs) -> anyhow::Result<()> {
    let EventsArgs { follow, json, past, service } = args;
    let options = follow::Options { follow, json, past, service };
    Ok(follow::run(run_dir, &options, &mut std::io::stdout().lock())?)
}

/// `uhmm trace`.
pub fn trace(run_dir: &Path, args: TraceArgs) -> anyhow::Result<()> {
    let mut sampler = Sampler::connect(Some(run_dir))?.with_events(u64::MAX)?;
    sampler.learn_names();
    let (lines, _) = sampler.read_events();
    if args.all {
        let path = args.perfetto.unwrap_or_default();
        return write_perfetto(&path, &trace::perfetto(&lines), lines.len());
    }
    let wanted = Wanted { id: args.id, kind: args.kind, slowest: args.slowest };
    let Some(id) = trace::choose(&lines, &wanted) else {
        bail!("No such request is recorded: `uhmm events` shows those that are, their numbers in brackets");
    };
    let mine = trace::of(&lines, &id);
    print(&trace::text(&mine))?;
    match args.perfetto {
        Some(path) => {
            let mine: Vec<_> = mine.into_iter().cloned().collect();
            write_perfetto(&path, &trace::perfetto(&mine), mine.len())
        }
        None => Ok(()),
    }
}

fn write_perfetto(path: &Path, file: &serde_json::Value, count: usize) -> anyhow::Result<()> {
    std::fs::write(path, file.to_string()).with_context(|| format!("{} cannot be written", path.display()))?;
    print(&format!("{count} events are in {}: open it in ui.perfetto.dev\n", path.display()))
}

/// `uhmm post-mortem`.
pub fn post_mortem(run_dir: &Path, args: &PostMortemArgs) -> anyhow::Result<()> {
    let mut sampler = Sampler::connect(Some(run_dir))?.with_events(u64::MAX)?;
    let mut sample = sampler.sample()?;
    let Some(service) = sample.services.iter().find(|service| service.name == args.service).cloned() else {
        bail!("There is no service {:?}: `uhmm status` lists those that there are", args.service);
    };
    sample.events.retain(|line| line.service == args.service);
    let oldest = service.events_written.saturating_sub(sample.events.len() as u64);
    let dead = PostMortem { service, lines: sample.events, lost: oldest };
    let incarnation = args.incarnation.unwrap_or_else(|| dead.incarnation());
    print(&dead.text(incarnation, args.last))
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes()).context("Nobody reads what is written")
}
