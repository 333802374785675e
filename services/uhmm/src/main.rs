//! `uhmm`: every service of the system and the operator's commands in one program.
//!
//! The supervisor starts this same program again for each service (`uhmm pager ...`), so one file is deployed; a third
//! party's driver is its own program, named in the manifest.

mod commands;
mod demo;
mod rng;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use uhmm_dra_args::DraArgs;
use uhmm_kit::{LogFormat, ServiceArgs};
use uhmm_supervisor::HolderOptions;

#[derive(Parser)]
#[command(name = "uhmm", version, about = "User-mode heterogeneous memory management", arg_required_else_help = true)]
struct Cli {
    /// Where the sockets are [default: $UHMM_RUN_DIR, $XDG_RUNTIME_DIR/uhmm or /tmp/uhmm-UID]
    #[arg(long, global = true)]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the main job on real text with the software device, kill every service meanwhile, and compare every byte
    Demo(demo::DemoArgs),
    /// Start the supervisor and every service of a manifest
    Up {
        /// Manifest (TOML); without it: pager, mirror and one software device `soft0`
        #[arg(long)]
        manifest: Option<PathBuf>,
        /// Without a manifest: far memory in a file instead of the software device, as in 64GiB or 64GiB:/var/lib/uhmm/far0
        #[arg(long, value_name = "SIZE[:PATH]", conflicts_with = "manifest")]
        file: Option<commands::FarFile>,
        /// Without a manifest: far memory on a block server, as in nbd://192.0.2.7/export 64GiB
        #[arg(long, value_names = ["URL", "SIZE"], num_args = 2, conflicts_with_all = ["manifest", "file"])]
        nbd: Option<Vec<String>>,
        /// Take over services that outlived an earlier supervisor
        #[arg(long)]
        adopt: bool,
        /// Another one will take over (its container is exchanged): begin with --adopt if there is anything, and when told to end (SIGTERM),
        /// leave what is kept. `uhmm down` ends everything all the same
        #[arg(long)]
        replaceable: bool,
        /// End when standard input has ended and no process has memory here any more, and remove these folders: for who starts a system for
        /// one program
        #[arg(long, hide = true, value_name = "FOLDER")]
        until_unused: Vec<PathBuf>,
        /// Log format
        #[arg(long, value_enum, default_value_t = Log::Text)]
        log: Log,
        /// Serve metrics on this loopback address too, e.g. 127.0.0.1:9464 (see `uhmm metrics`)
        #[arg(long)]
        metrics: Option<SocketAddr>,
    },
    /// Run a program that knows nothing of uhmm with its private memory managed: `uhmm run --ram 512MiB -- PROGRAM`
    Run(commands::RunArgs),
    /// Stop the supervisor and every service
    Down {
        /// Before, bring everybody's pages home from every device; what cannot come is named, and lost as without this
        #[arg(long)]
        drain: bool,
    },
    /// Make a token by which a service that joins proves itself
    Token,
    /// Resolve a manifest and print what it comes to
    Plan {
        /// Manifest (TOML); without it the built-in one
        manifest: Option<PathBuf>,
        /// What each service may call, open and keep
        #[arg(long)]
        sandbox: bool,
    },
    /// Print a Container Device Interface file: a container gets a device by its name (`uhmm cdi >/etc/cdi/uhmm.json`)
    Cdi(commands::CdiArgs),
    /// Far memory for pods: a Kubernetes DRA driver between this node's kubelet and the running system (docs/kubernetes.md)
    Dra(DraArgs),
    /// Services, incarnations, regions and where their pages are
    Status,
    /// Counters of every service
    Stats {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Services, devices, regions, rates and events on the screen, with keys to restart, drain, evict and migrate
    Top(commands::TopArgs),
    /// What happened, and why: faults and migrations with their causes, deaths and restarts, refusals
    Events(commands::EventsArgs),
    /// One migration, fault or job through all services, with times
    Trace(commands::TraceArgs),
    /// What a service did before it died: its last events, what it had begun, its counters
    PostMortem(commands::PostMortemArgs),
    /// Serve OpenMetrics, /healthz and /readyz on a Unix socket (metrics.sock) and a loopback address
    Metrics(commands::MetricsArgs),
    /// Kill -9 one service, as a drill
    Kill {
        /// Service name
        service: String,
    },
    /// Start every service again, one after the other, from this program as it is installed now; no program that uses them ends
    Renew,
    /// Bring every page of a process home and keep it there, for gcore, gdb and whatever else reads /proc/PID/mem
    Home {
        /// Process id
        pid: u32,
        /// Its pages may leave again
        #[arg(long)]
        release: bool,
    },
    /// Bring every page of every process home from a device, before it is taken away
    Empty {
        /// Device name
        device: String,
    },
    /// The same, refused if it does not fit into memory, and the device takes nothing more until `undrain`
    Drain {
        /// Device name
        device: String,
    },
    /// A drained device may be used again
    Undrain {
        /// Device name
        device: String,
    },
    /// Hold a driver against HMM's semantics: the acceptance test of a driver's author
    Conformance(commands::ConformanceArgs),
    /// Measure uhmm beside the floor of the same run
    Bench(commands::BenchArgs),
    /// Play a PCI device for drivers in other processes, over a vfio-user socket
    #[command(subcommand)]
    DeviceModel(commands::Model),
    /// What this kernel and account offer, what is missing, what follows, and what fixes it
    Doctor,
    /// Write the manual pages of this program and its commands (packages do)
    Man {
        /// Folder, which must exist; one file a command
        dir: PathBuf,
    },
    /// Print the completions of a shell: `source <(uhmm completions bash)`
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// (service) Answer CPU faults, keep directories, move pages
    #[command(hide = true)]
    Pager(ServiceFlags),
    /// (service) Carry device faults and invalidations
    #[command(hide = true)]
    Mirror(ServiceFlags),
    /// (service) Keep what the supervisor keeps, for its successor
    #[command(hide = true)]
    Holder(ServiceFlags),
    /// Begin a new driver. (The supervisor runs the built-in ones by their names)
    #[command(subcommand)]
    Driver(Driver),
    /// (internal) The demo's client process
    #[command(hide = true)]
    DemoClient(demo::ClientArgs),
    /// (internal) A client process of a bench
    #[command(hide = true)]
    BenchClient(commands::BenchClientArgs),
    /// (internal) What answers the faults of a bench's floor
    #[command(hide = true)]
    BenchFloor(commands::BenchFloorArgs),
    /// (internal) What answers a bench's messages
    #[command(hide = true)]
    BenchEcho(commands::BenchEchoArgs),
    /// (internal) One case of the conformance suite
    #[command(hide = true)]
    ConformanceCase(commands::ConformanceCaseArgs),
}

#[derive(Subcommand)]
enum Driver {
    /// Write a driver that works, to be changed into one for your device
    New(commands::NewDriverArgs),
    /// (service) The software device
    #[command(hide = true)]
    Soft(ServiceFlags),
    /// (service) PCI devices whose BAR is plain memory
    #[command(hide = true)]
    Bar(ServiceFlags),
    /// (service) Files on local disks, and partitions
    #[command(hide = true)]
    File(ServiceFlags),
    /// (service) Exports of block servers
    #[command(hide = true)]
    Nbd(ServiceFlags),
    /// (service) NVMe namespaces
    #[command(hide = true)]
    Nvme(ServiceFlags),
    /// (service) QEMU's educational PCI device
    #[command(hide = true)]
    Edu(ServiceFlags),
    /// (service) The accelerator of `uhmm device-model accel`, by its copy engine
    #[command(hide = true)]
    Accel(ServiceFlags),
}

impl Driver {
    /// The manifest knows the built-in drivers by the same names.
    fn run(self, run_dir: PathBuf) -> anyhow::Result<()> {
        match self {
            Self::New(args) => commands::new_driver(&args)?,
            Self::Soft(flags) => uhmm_driver_soft::run(flags.into_args(run_dir))?,
            Self::Bar(flags) => uhmm_driver_bar::run(flags.into_args(run_dir))?,
            Self::File(flags) => uhmm_driver_block::run(flags.into_args(run_dir))?,
            Self::Nbd(flags) => uhmm_driver_block::run_nbd(flags.into_args(run_dir))?,
            Self::Nvme(flags) => uhmm_driver_nvme::run(flags.into_args(run_dir))?,
            Self::Edu(flags) => uhmm_driver_edu::run(flags.into_args(run_dir))?,
            Self::Accel(flags) => uhmm_driver_accel::run(flags.into_args(run_dir))?,
        }
        Ok(())
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Log {
    /// For people
    Text,
    /// For machines
    Json,
}

impl From<Log> for LogFormat {
    fn from(log: Log) -> Self {
        match log {
            Log::Text => LogFormat::Text,
            Log::Json => LogFormat::Json,
        }
    }
}

/// What the supervisor passes to every service.
#[derive(Args)]
struct ServiceFlags {
    /// Name in the manifest
    #[arg(long)]
    name: String,
    /// How many times the supervisor has started it; without it, it joins a supervisor that has not
    #[arg(long)]
    incarnation: Option<u32>,
    /// Token that it shows when it joins; without it, it is known by its user
    #[arg(long, conflicts_with = "incarnation")]
    token_file: Option<PathBuf>,
    /// Log format
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
}

impl ServiceFlags {
    fn into_args(self, run_dir: PathBuf) -> ServiceArgs {
        let Self { name, incarnation, token_file, log } = self;
        ServiceArgs { name, incarnation, token_file, run_dir, log: log.into() }
    }
}

/// What went wrong, in one line. Where in this program it was found (RUST_BACKTRACE) says nothing to whoever asked.
fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        // Nobody reads it where it cannot be written.
        drop(writeln!(std::io::stderr(), "Error: {error:#}"));
        ExitCode::FAILURE
    })
}

fn run() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let run_dir = uhmm_sdk::run_dir(cli.run_dir.as_deref());
    if matches!(
        cli.command,
        Command::Plan { .. }
            | Command::Status
            | Command::Stats { .. }
            | Command::Doctor
            | Command::Events(_)
            | Command::Trace(_)
            | Command::PostMortem(_)
            | Command::Completions { .. }
    ) {
        uhmm_kernel_hook::signal::end_when_output_is_closed();
    }
    match cli.command {
        Command::Conformance(args) => return commands::conformance(args, cli.run_dir),
        Command::ConformanceCase(args) => commands::conformance_case(args, run_dir)?,
        Command::Bench(args) => return commands::bench(&args),
        Command::BenchClient(args) => commands::bench_client(&args)?,
        Command::BenchFloor(args) => commands::bench_floor(&args)?,
        Command::BenchEcho(args) => commands::bench_echo(&args)?,
        Command::Demo(args) => return demo::run(args),
        Command::DemoClient(args) => return demo::run_client(args),
        Command::Up { manifest, file, nbd, adopt, replaceable, until_unused, log, metrics } => {
            if !until_unused.is_empty() {
                commands::end_when_unused(&run_dir)?;
            }
            if let Some(address) = metrics {
                commands::export_beside(&run_dir, address)?;
            }
            let manifest = commands::manifest_or_far(manifest.as_deref(), file, nbd.as_deref())?;
            commands::up(manifest, run_dir, (adopt, replaceable), log.into())?;
            until_unused.iter().try_for_each(commands::remove)?;
        }
        Command::Run(args) => return commands::run(&args, cli.run_dir.as_deref()),
        Command::Down { drain } => commands::down(&run_dir, drain)?,
        Command::Token => commands::token()?,
        Command::Plan { manifest, sandbox } => commands::plan(manifest.as_deref(), run_dir, sandbox)?,
        Command::Cdi(args) => commands::cdi(&args, &run_dir)?,
        Command::Dra(args) => commands::dra(&args, &run_dir)?,
        Command::Status => commands::status(&run_dir)?,
        Command::Stats { json } => commands::stats(&run_dir, json)?,
        Command::Top(args) => commands::top(&run_dir, args)?,
        Command::Events(args) => commands::events(&run_dir, args)?,
        Command::Trace(args) => commands::trace(&run_dir, args)?,
        Command::PostMortem(args) => commands::post_mortem(&run_dir, &args)?,
        Command::Metrics(args) => commands::metrics(&run_dir, &args)?,
        Command::Kill { service } => commands::kill(&run_dir, &service)?,
        Command::Renew => commands::renew(&run_dir)?,
        Command::Home { pid, release } => commands::home(&run_dir, pid, !release)?,
        Command::Empty { device } => commands::empty(&run_dir, &device)?,
        Command::Drain { device } => commands::drain(&run_dir, &device)?,
        Command::Undrain { device } => commands::undrain(&run_dir, &device)?,
        Command::Doctor => return Ok(commands::doctor()),
        Command::Man { dir } => commands::man(Cli::command(), &dir)?,
        Command::Completions { shell } => commands::completions(Cli::command(), shell)?,
        Command::DeviceModel(model) => commands::device_model(model)?,
        Command::Pager(flags) => uhmm_pager::run(flags.into_args(run_dir))?,
        Command::Holder(ServiceFlags { incarnation, token_file, log, .. }) => {
            uhmm_supervisor::run_holder(HolderOptions { run_dir, incarnation, token_file, log: log.into() })?;
        }
        Command::Mirror(flags) => uhmm_mirror::run(flags.into_args(run_dir))?,
        Command::Driver(driver) => driver.run(run_dir)?,
    }
    Ok(ExitCode::SUCCESS)
}
