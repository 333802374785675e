//! `uhmm dra`: far memory for pods. A Kubernetes DRA driver (Dynamic Resource Allocation, with consumable capacity) between one node's kubelet and its uhmm.
//!
//! ```text
//!   scheduler --ResourceClaim, consumedCapacity--> API server <--ResourceSlices-- uhmm-dra --claims, what is free--> core (operator's door)
//!                                                      kubelet --Prepare, Unprepare-->  '--CDI file of the claim--> container runtime
//! ```
//! A program of its own (`uhmm dra` starts it), because it needs an HTTP stack that nothing else of uhmm does: it touches no client's memory, and the core
//! runs on without it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use uhmm_dra_args::DraArgs;
use uhmm_kit::LogFormat;

use crate::api::Api;
use crate::cdi::Cdi;
use crate::checkpoint::Checkpoint;
use crate::core::Core;
use crate::grpc::Door;
use crate::plugin::Plugin;
use crate::slices::Slices;

mod allocation;
mod api;
mod cdi;
mod checkpoint;
mod core;
mod grpc;
mod plugin;
mod quantity;
mod slices;
mod wire;

/// Far memory for pods: a DRA driver between the kubelet and uhmm
#[derive(Parser)]
#[command(name = "uhmm-dra", version)]
struct Cli {
    /// Folder of the sockets of uhmm [default: $UHMM_RUN_DIR, or $XDG_RUNTIME_DIR/uhmm, or /tmp/uhmm-UID]
    #[arg(long)]
    run_dir: Option<PathBuf>,
    #[command(flatten)]
    args: DraArgs,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody reads it where it cannot be written.
            drop(writeln!(std::io::stderr(), "Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { run_dir, args } = cli;
    let sockets = Sockets::of(&args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("No event loop")?;
    if args.probe {
        return runtime.block_on(sockets.probe());
    }
    uhmm_kit::init_log(if args.log == "json" { LogFormat::Json } else { LogFormat::Text }, "dra", 0);
    let checkpoint = Checkpoint::open(&sockets.folder)?;
    let run_dir = uhmm_sdk::run_dir(run_dir.as_deref());
    let clients = run_dir.join("clients");
    let shown = args.sockets.clone().unwrap_or_else(|| if clients.is_dir() { clients } else { run_dir.clone() });
    let cdi = Cdi { dir: args.cdi_dir, vendor: args.driver_name.clone(), sockets: std::path::absolute(&shown)? };
    let api = Api { server: args.api_server.or_else(api::in_cluster), token_file: args.token_file, ca: args.ca };
    let slices = Slices { driver: args.driver_name, node: args.node_name, node_uid: None };
    let plugin = Arc::new(Plugin::new(api, Core { run_dir }, cdi, slices, checkpoint));
    let served = runtime.block_on(serve(&sockets, &plugin, Duration::from_secs(args.interval)));
    // A thread that waits for an API server that does not answer is not waited for.
    runtime.shutdown_background();
    served
}

/// The two sockets of the kubelet's folders.
struct Sockets {
    driver: String,
    /// Ours: socket and checkpoint.
    folder: PathBuf,
    plugin: PathBuf,
    registration: PathBuf,
}

impl Sockets {
    fn of(args: &DraArgs) -> anyhow::Result<Self> {
        let driver = args.driver_name.clone();
        allocation::check_name("--driver-name", &driver, 63)?;
        allocation::check_name("--node-name", &args.node_name, 190)?;
        let kubelet = std::path::absolute(&args.kubelet_dir)?;
        if !kubelet.join("plugins_registry").is_dir() {
            bail!("{} has no folder plugins_registry: is --kubelet-dir the kubelet's?", kubelet.display());
        }
        let folder = kubelet.join("plugins").join(&driver);
        let registration = kubelet.join("plugins_registry").join(format!("{driver}-reg.sock"));
        Ok(Self { plugin: folder.join("dra.sock"), driver, folder, registration })
    }

    async fn probe(&self) -> anyhow::Result<()> {
        for socket in [&self.plugin, &self.registration] {
            let connected = tokio::time::timeout(Duration::from_secs(5), UnixStream::connect(socket)).await;
            connected
                .map_err(anyhow::Error::from)
                .and_then(|connected| Ok(connected?))
                .with_context(|| format!("Nobody answers on {}: look at the log of `uhmm dra`", socket.display()))?;
        }
        Ok(())
    }

    fn remove(&self) {
        for socket in [&self.registration, &self.plugin] {
            if let Err(error) = std::fs::remove_file(socket) {
                tracing::debug!(%error, socket = %socket.display(), "Was not there");
            }
        }
    }
}

/// In the place of what a dead driver left; the checkpoint's lock says that there is no living one.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let Some(folder) = path.parent().filter(|folder| folder.is_dir()) else {
        bail!("{} has no folder: is --kubelet-dir the kubelet's?", path.display());
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("{} cannot be taken over", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| format!("No socket can be made in {}", folder.display()))
}

async fn serve(sockets: &Sockets, plugin: &Arc<Plugin>, interval: Duration) -> anyhow::Result<()> {
    // The kubelet calls the one as soon as it has seen the other.
    let claims = bind(&sockets.plugin)?;
    let (name, endpoint) = (sockets.driver.clone(), sockets.plugin.clone());
    let registration = (bind(&sockets.registration)?, Door::Registration { name, endpoint });
    let looking = tokio::spawn(look(plugin.clone(), interval));
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("ready");
    loop {
        let (stream, door) = tokio::select! {
            accepted = claims.accept() => (accepted?.0, Door::Plugin(plugin.clone())),
            accepted = registration.0.accept() => (accepted?.0, registration.1.clone()),
            _ = term.recv() => break,
            _ = int.recv() => break,
        };
        tokio::spawn(door.serve(stream));
    }
    looking.abort();
    // The kubelet sees that it is gone, and withdraws the slices if it does not come back. What was prepared stays.
    sockets.remove();
    Ok(())
}

async fn look(plugin: Arc<Plugin>, interval: Duration) {
    let mut before = Vec::new();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let plugin = plugin.clone();
        let wrong = tokio::task::spawn_blocking(move || plugin.look()).await.unwrap_or_default();
        // Once each, not every time.
        for text in wrong.iter().filter(|text| !before.contains(*text)) {
            tracing::warn!("{text}");
        }
        if wrong.is_empty() && !before.is_empty() {
            tracing::warn!("All is well again");
        }
        before = wrong;
    }
}
