//! The system under test: one of our own with two devices of the driver, or the one in `--run-dir`.
//!
//! Devices are small, so that pressure and eviction are reached quickly; test hooks are on.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uhmm_sdk::{Operator, ServiceStatus};

use crate::error::ConformanceError;

/// Memory of each device: sixteen huge pages.
const DEVICE_MEMORY: &str = "32MiB";
/// Devices of a system of our own.
const DEVICE_COUNT: usize = 2;
/// Longest wait for services that have been killed.
const READY_PATIENCE: Duration = Duration::from_secs(30);
/// Between two questions about a state that has no event.
const POLL: Duration = Duration::from_millis(5);

/// A running system.
pub(crate) struct System {
    run_dir: PathBuf,
    own: Option<Own>,
}

/// A system that we have started.
struct Own {
    supervisor: Child,
    servers: Option<Servers>,
    exe: PathBuf,
    driver: String,
    coherent: bool,
}

/// `folder`: for what devices need of their own.
fn manifest(driver: &str, coherent: bool, folder: &Path) -> String {
    // Drills kill often: short waits, never held.
    let restart = "restart = { backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 100000 }";
    let mut text = format!(
        "fault_injection = true\n\n[supervisor]\nheartbeat_ms = 1000\nmissed_limit = 20\n\n\
         [[service]]\nname = \"pager\"\nkind = \"pager\"\n{restart}\n\n[[service]]\nname = \"mirror\"\nkind = \"mirror\"\n{restart}\n"
    );
    for index in 0..DEVICE_COUNT {
        text += &format!(
            "\n[[service]]\nname = \"{driver}{index}\"\nkind = \"driver\"\ndriver = \"{driver}\"\n{restart}\n\n\
             [[device]]\nname = \"{driver}{index}\"\nservice = \"{driver}{index}\"\nmemory_bytes = \"{DEVICE_MEMORY}\"\n\
             coherent = {coherent}\n"
        );
        match driver {
            "file" => text += &format!("path = {:?}\n", folder.join(format!("far{index}"))),
            "nbd" => {
                let socket = Servers::folder(folder).join(format!("far{index}"));
                // Servers on this machine are done at once with what a killed driver has left.
                text += &format!("url = \"nbd+unix:///?socket={}\"\nsettle_s = 1\n", socket.display());
            }
            _ => {}
        }
    }
    text
}

/// Block servers of a system of our own: the devices of driver "nbd". They live as long as the run.
struct Servers {
    folder: PathBuf,
    children: Vec<Child>,
}

impl Servers {
    /// Where they listen: not in the run directory, of which services see a part only.
    fn folder(run_dir: &Path) -> PathBuf {
        run_dir.with_extension("servers")
    }

    fn start(exe: &Path, run_dir: &Path) -> Result<Self, ConformanceError> {
        let folder = Self::folder(run_dir);
        std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(ConformanceError::path(&folder))?;
        let mut servers = Self { folder, children: Vec::new() };
        for index in 0..DEVICE_COUNT {
            let mut command = Command::new(exe);
            command.args(["device-model", "block", "--memory", "128MiB", "--socket"]);
            command.arg(servers.folder.join(format!("far{index}"))).process_group(0);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
            let mut child = command.spawn().map_err(ConformanceError::process("Starting a block server"))?;
            let mut line = String::new();
            if let Some(stdout) = child.stdout.take() {
                let read = BufReader::new(stdout).read_line(&mut line);
                read.map_err(ConformanceError::process("Reading a block server's answer"))?;
            }
            servers.children.push(child);
            if line.trim() != "ready" {
                return Err(ConformanceError::NotReady { log: "A block server has ended".to_owned() });
            }
        }
        Ok(servers)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                tracing::warn!(%error, "A block server could not be ended");
            }
        }
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, folder = %self.folder.display(), "Block servers' sockets could not be removed");
        }
    }
}

impl System {
    /// Starts a system of our own.
    pub(crate) fn start(exe: &Path, driver: &str, coherent: bool) -> Result<Self, ConformanceError> {
        let run_dir = std::env::temp_dir().join(format!("uhmm-conformance-{}", std::process::id()));
        // Not recursive and private: a folder that somebody else has put there must not be used.
        std::fs::DirBuilder::new().mode(0o700).create(&run_dir).map_err(ConformanceError::path(&run_dir))?;
        let mut system = Self { run_dir, own: None };
        let servers = (driver == "nbd").then(|| Servers::start(exe, &system.run_dir)).transpose();
        let servers = servers.inspect_err(|_| system.remove_run_dir())?;
        let supervisor = system.spawn(exe, driver, coherent);
        let supervisor = supervisor.inspect_err(|_| system.remove_run_dir())?;
        system.own = Some(Own { supervisor, servers, exe: exe.to_owned(), driver: driver.to_owned(), coherent });
        system.wait_started()?;
        Ok(system)
    }

    fn spawn(&self, exe: &Path, driver: &str, coherent: bool) -> Result<Child, ConformanceError> {
        let manifest_path = self.run_dir.join("manifest.toml");
        std::fs::write(&manifest_path, manifest(driver, coherent, &self.run_dir))
            .map_err(ConformanceError::path(&manifest_path))?;
        let log_path = self.log_path();
        let log = File::options().append(true).create(true).open(&log_path);
        let log = log.map_err(ConformanceError::path(&log_path))?;
        let mut command = Command::new(exe);
        command.arg("--run-dir").arg(&self.run_dir).arg("up").arg("--manifest").arg(&manifest_path);
        // A process group of its own: Ctrl-C ends the runner, and the runner's end ends the system in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0);
        command.spawn().map_err(ConformanceError::process("Starting the supervisor"))
    }

    fn log_path(&self) -> PathBuf {
        self.run_dir.join("services.log")
    }

    fn wait_started(&mut self) -> Result<(), ConformanceError> {
        let mut line = String::new();
        if let Some(stdout) = self.own.as_mut().and_then(|own| own.supervisor.stdout.take()) {
            let read = BufReader::new(stdout).read_line(&mut line);
            read.map_err(ConformanceError::process("Reading the supervisor's answer"))?;
        }
        if line.trim() == "ready" {
            return Ok(());
        }
        let log = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        Err(ConformanceError::NotReady { log: log.trim().to_owned() })
    }

    /// Uses a system that runs already.
    pub(crate) fn existing(run_dir: PathBuf) -> Self {
        Self { run_dir, own: None }
    }

    /// A fresh system in the place of the old one, where it is ours: what a failed case did to it is no other case's fault.
    /// False when the system is somebody else's.
    pub(crate) fn restart(&mut self) -> Result<bool, ConformanceError> {
        let Some(Own { exe, driver, supervisor, servers, coherent }) = self.own.take() else { return Ok(false) };
        self.stop(supervisor);
        let supervisor = self.spawn(&exe, &driver, coherent)?;
        self.own = Some(Own { supervisor, servers, exe, driver, coherent });
        self.wait_started()?;
        Ok(true)
    }

    pub(crate) fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The supervisor's process, where it is ours.
    pub(crate) fn supervisor_pid(&self) -> Option<u32> {
        self.own.as_ref().map(|own| own.supervisor.id())
    }

    /// Copies the services' log out of the run directory, which goes away. Returns where it is.
    pub(crate) fn save_log(&self) -> Option<PathBuf> {
        self.own.as_ref()?;
        let to = std::env::temp_dir().join(format!("uhmm-conformance-{}.log", std::process::id()));
        std::fs::copy(self.log_path(), &to).ok()?;
        Some(to)
    }

    fn stop(&self, mut supervisor: Child) {
        let ended = matches!(supervisor.try_wait(), Ok(Some(_)));
        if !ended && Operator::connect(Some(&self.run_dir)).and_then(Operator::shutdown).is_err() {
            // It does not answer: end it hard.
            let killed = supervisor.kill();
            tracing::warn!(?killed, "The supervisor did not answer and was killed");
        }
        if let Err(error) = supervisor.wait() {
            tracing::warn!(%error, "The supervisor could not be waited for");
        }
    }

    fn remove_run_dir(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.run_dir) {
            eprintln!("{} could not be removed: {error}", self.run_dir.display());
        }
    }

    pub(crate) fn operator(&self) -> Result<Operator, ConformanceError> {
        Ok(Operator::connect(Some(&self.run_dir))?)
    }
}

/// Waits until every service of the plan is ready.
pub(crate) fn wait_ready(operator: &mut Operator) -> Result<Vec<ServiceStatus>, ConformanceError> {
    let end = Instant::now() + READY_PATIENCE;
    loop {
        let services = operator.status()?;
        if services.iter().all(|service| service.state == "ready") {
            return Ok(services);
        }
        if Instant::now() > end {
            let state = services.iter().map(|service| format!("{} {}", service.name, service.state));
            let state = state.collect::<Vec<_>>().join(", ");
            return Err(ConformanceError::NeverReady { seconds: READY_PATIENCE.as_secs(), state });
        }
        // The supervisor tells states to whoever asks, and nobody when they change.
        std::thread::sleep(POLL);
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if let Some(own) = self.own.take() {
            self.stop(own.supervisor);
            drop(own.servers);
            self.remove_run_dir();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_has_two_devices_of_the_driver_and_test_hooks() {
        let folder = Path::new("/run/here");
        let text = manifest("nvme", true, folder);
        assert!(text.starts_with("fault_injection = true"));
        assert_eq!(text.matches("driver = \"nvme\"").count(), 2);
        assert_eq!(
            (text.matches("coherent = true").count(), manifest("nvme", false, folder).matches("= true").count()),
            (2, 1)
        );
        assert!(text.contains("name = \"nvme0\"") && text.contains("name = \"nvme1\""));
        let remote = manifest("nbd", false, folder);
        assert!(remote.contains("socket=/run/here.servers/far1\""), "{remote}");
        let files = manifest("file", false, folder);
        assert!(files.contains("path = \"/run/here/far0\"") && files.contains("path = \"/run/here/far1\""), "{files}");
    }
}
