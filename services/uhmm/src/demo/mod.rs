//! The main job, on real input, with every service in a process of its own and killed in the middle of it.
//!
//! ```text
//!   uhmm demo --+-- uhmm up (supervisor) --+-- uhmm pager
//!               |                          +-- uhmm mirror
//!               |                          `-- uhmm driver soft (or those of --manifest)
//!               `-- uhmm demo-client: `client` reads text, builds the index in managed memory, migrates, computes, is disturbed, compares
//! ```

mod client;
mod drill;
mod index;
mod measure;
mod reference;
mod report;
mod text;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_manifest::{Kind, Manifest};
use uhmm_sdk::Operator;

/// Exit status of a program that Ctrl-C has ended, as shells have it.
const INTERRUPTED: u8 = 130;

/// Between two looks whether a system will ever be ready.
const STARTING: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// What runs under the demo: one software device whose memory is there from the start, as hardware has it, so that
/// what the migration releases can be seen in the memory cgroup. Drills kill often and are not held against anybody.
const MANIFEST: &str = r#"
[[service]]
name = "pager"
kind = "pager"
restart = { backoff_min_ms = 1, max_deaths = 1000 }

[[service]]
name = "mirror"
kind = "mirror"
restart = { backoff_min_ms = 1, max_deaths = 1000 }

[[service]]
name = "soft0"
kind = "driver"
driver = "soft"
restart = { backoff_min_ms = 1, max_deaths = 1000 }

[[device]]
name = "soft0"
service = "soft0"
memory_bytes = "1GiB"
populate = true
"#;

/// `uhmm demo`
#[derive(clap::Args, Clone)]
pub struct DemoArgs {
    /// Text to index [default: documentation and sources that this machine has]
    path: Option<PathBuf>,
    /// Stop reading text when the index has this size
    #[arg(long, default_value_t = 288)]
    index_mib: u64,
    /// Manifest (TOML) of the system to start; without it one with a software device `soft0` of 1 GiB
    #[arg(long)]
    manifest: Option<PathBuf>,
    /// Device to work on
    #[arg(long, default_value = "soft0")]
    device: String,
}

/// `uhmm demo-client`
#[derive(clap::Args, Clone)]
pub struct ClientArgs {
    #[command(flatten)]
    demo: DemoArgs,
    /// Run directory of the system
    #[arg(long)]
    system: PathBuf,
    /// Services that are killed in turn: pager, mirror, the device's driver
    #[arg(long, value_delimiter = ',')]
    services: Vec<String>,
}

/// The manifest's text, and the services that the demo kills.
fn plan(args: &DemoArgs) -> anyhow::Result<(String, Vec<String>)> {
    let text = match &args.manifest {
        None => MANIFEST.to_owned(),
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("Manifest {} cannot be read", path.display()))?
        }
    };
    let plan = Manifest::parse(&text)?.resolve()?;
    let Some(device) = plan.device_by_name(&args.device) else {
        let known: Vec<&str> = plan.devices.iter().map(|device| device.name.as_str()).collect();
        bail!("The manifest has no device {:?}: take one of {}", args.device, known.join(", "));
    };
    let of_kind = |kind| plan.service_of_kind(kind).map(|service| service.name.clone());
    let services = [of_kind(Kind::Pager), of_kind(Kind::Mirror), Some(device.service.clone())];
    Ok((text, services.into_iter().flatten().collect()))
}

/// Ends the system by asking its supervisor, or by its pid.
pub(crate) struct System {
    supervisor: Child,
    run_dir: PathBuf,
}

impl System {
    /// Makes its private run directory, and waits until every service of the manifest is ready.
    pub(crate) fn start(run_dir: PathBuf, text: &str) -> anyhow::Result<Self> {
        make_private(&run_dir)?;
        let manifest = run_dir.join("manifest.toml");
        std::fs::write(&manifest, text)?;
        Self::start_in(run_dir.clone(), &[OsStr::new("--manifest"), manifest.as_os_str()], &[&run_dir])
    }

    /// The same in a private folder that is there, with these arguments of `uhmm up`. `folders` are removed with it. Should this process die, the
    /// system ends when nobody has memory there any more.
    pub(crate) fn start_in(run_dir: PathBuf, up: &[&OsStr], folders: &[&Path]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--run-dir").arg(&run_dir).arg("up").args(up);
        for folder in folders {
            command.arg("--until-unused").arg(folder);
        }
        // A process group of its own: Ctrl-C reaches the demo and the client, and the demo stops the system in order.
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        if std::env::var_os("UHMM_LOG").is_none() {
            // Every kill is announced below; the services' own warnings about it would only be in the way.
            command.env("UHMM_LOG", "error");
        }
        let mut supervisor = command.spawn().context("The supervisor cannot be started")?;
        let stdout = supervisor.stdout.take().context("The supervisor has no output")?;
        let system = Self { supervisor, run_dir };
        // A service that cannot work is started again some times before it is held.
        while poll(&mut [PollFd::new(&stdout, PollFlags::IN)], Some(&STARTING))? == 0 {
            if let Some(service) = system.held() {
                bail!("{service} cannot be started: see its messages above");
            }
        }
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "ready" {
            bail!("The supervisor ended before its services were ready: see its messages above");
        }
        Ok(system)
    }

    /// A service that the supervisor does not start again.
    fn held(&self) -> Option<String> {
        let services = Operator::connect(Some(&self.run_dir)).and_then(|mut operator| operator.status()).ok()?;
        services.into_iter().find(|service| service.state == "held").map(|service| service.name)
    }

    /// Where its sockets are.
    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let ended = matches!(self.supervisor.try_wait(), Ok(Some(_)));
        if !ended
            && Operator::connect(Some(&self.run_dir)).and_then(Operator::shutdown).is_err()
            && let Err(error) = self.supervisor.kill()
        {
            tracing::debug!(%error, "The supervisor had ended");
        }
        // It removes its folders itself, unless it was killed.
        if let Err(error) =
            self.supervisor.wait().map_err(Into::into).and_then(|_| crate::commands::remove(&self.run_dir))
        {
            eprintln!("{error:#}");
        }
    }
}

/// Not recursive and private: a folder that somebody else has put there must not be used.
pub(crate) fn make_private(folder: &Path) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(folder);
    made.with_context(|| format!("{} cannot be made", folder.display()))
}

/// Starts system and client, waits for the client.
pub fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    if let Some(path) = args.path.as_deref().filter(|path| !path.exists()) {
        bail!("{} does not exist: give a file or folder with text", path.display());
    }
    let (text, services) = plan(&args)?;
    // Before the first child and thread, so that a signal can never end the demo without ending its system.
    let signals = StopSignals::block()?;
    let run_dir = std::env::temp_dir().join(format!("uhmm-demo-{}", std::process::id()));
    let system = System::start(run_dir, &text)?;
    show_processes(&system.run_dir)?;
    let mut client = Command::new(std::env::current_exe()?);
    client.arg("demo-client").arg("--system").arg(&system.run_dir);
    client.arg("--services").arg(services.join(",")).arg("--device").arg(&args.device);
    client.arg("--index-mib").arg(args.index_mib.to_string()).args(&args.path);
    let mut client = client.spawn().context("The client process cannot be started")?;
    let status = wait(&mut client, &signals);
    if !matches!(status, Ok(Some(_))) {
        // Without its system the client would wait for pages that nobody brings.
        client.kill().and_then(|()| client.wait()).context("The client process cannot be ended")?;
    }
    Ok(match status? {
        Some(true) => ExitCode::SUCCESS,
        Some(false) => ExitCode::FAILURE,
        None => ExitCode::from(INTERRUPTED),
    })
}

/// Waits for the client's end, and says whether it succeeded, or for SIGINT or SIGTERM (`None`).
fn wait(client: &mut Child, signals: &StopSignals) -> anyhow::Result<Option<bool>> {
    let ended = PidFd::open(client.id())?;
    loop {
        let mut sources = [PollFd::new(&ended, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut sources, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.context("poll")?,
        };
        if !sources[0].revents().is_empty() {
            return Ok(Some(client.wait()?.success()));
        }
        if !sources[1].revents().is_empty() {
            return Ok(None);
        }
    }
}

fn show_processes(run_dir: &Path) -> anyhow::Result<()> {
    println!("== Processes");
    for service in Operator::connect(Some(run_dir))?.status()? {
        println!("  {:<10} pid {:>7}  {}", service.name, service.pid, service.state);
    }
    Ok(())
}

/// The client process.
pub fn run_client(args: ClientArgs) -> anyhow::Result<ExitCode> {
    let report = client::run(&args.system, &args.demo, args.services)?;
    report.print();
    Ok(if report.held() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
