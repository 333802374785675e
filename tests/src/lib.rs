//! What the integration tests share: a whole uhmm of separate processes in a private run directory.
//!
//! A [`TestBed`] starts `uhmm up` with a manifest, waits for every service to be ready, and ends the processes it started
//! (by pid) when it is dropped, also when the test fails.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_sdk::{Metric, Operator, ServiceStatus, Session};

pub mod pattern;

/// Longest wait for anything in a test; only ever reached by a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running system.
pub struct TestBed {
    supervisor: Child,
    dir: tempfile::TempDir,
}

/// The `uhmm` program that was built beside the test, or the one that `UHMM_EXE` names (in the guest).
pub fn uhmm_exe() -> PathBuf {
    if let Some(given) = std::env::var_os("UHMM_EXE") {
        return given.into();
    }
    let test = std::env::current_exe().expect("the test knows its own path");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let exe = profile.join("uhmm");
    assert!(exe.exists(), "{} is missing: run `cargo build --bins` first, or tests/run", exe.display());
    exe
}

/// Drills kill often: short waits, never held.
const RESTART: &str = "restart = { backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 1000 }";

/// Manifest text with one software device of `memory` (`"64MiB"`).
pub fn manifest(memory: &str, device_options: &str) -> String {
    manifest_of(1, memory, device_options)
}

/// Manifest text with some software devices.
pub fn manifest_of(device_count: u8, memory: &str, device_options: &str) -> String {
    let device = |index: u8| {
        format!(
            r#"
[[service]]
name = "soft{index}"
kind = "driver"
driver = "soft"
{RESTART}

[[device]]
name = "soft{index}"
service = "soft{index}"
memory_bytes = "{memory}"
{device_options}
"#
        )
    };
    let devices: String = (0..device_count).map(device).collect();
    format!(
        r#"
fault_injection = true

[supervisor]
heartbeat_ms = 500
missed_limit = 10

[[service]]
name = "pager"
kind = "pager"
{RESTART}

[[service]]
name = "mirror"
kind = "mirror"
{RESTART}
{devices}"#
    )
}

/// `uhmm device-model` in a process of its own, on a private socket. Ends when it is dropped.
pub struct DeviceModel {
    child: Child,
    dir: tempfile::TempDir,
}

impl DeviceModel {
    /// Powers a device up: which one, and its options.
    pub fn start(args: &[&str]) -> Self {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix("uhmm-model-").permissions(private).tempdir();
        let dir = dir.expect("a temporary directory");
        Self { child: spawn_model(dir.path(), args), dir }
    }

    /// What the manifest calls it.
    pub fn pci(&self) -> String {
        format!("vfio-user:{}", self.dir.path().join("device.sock").display())
    }

    /// Planned faults that have happened so far, by the model's own log.
    pub fn injected(&self) -> usize {
        let log = std::fs::read_to_string(self.dir.path().join("log")).expect("the model's log");
        log.lines().filter(|line| line.contains("Injected")).count()
    }

    /// kill -9: the device is pulled out.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill the model");
        self.child.wait().expect("reap the model");
    }

    /// Pulls the device out and puts another one in its place.
    pub fn replace(mut self, args: &[&str]) -> Self {
        self.kill();
        self.child = spawn_model(self.dir.path(), args);
        self
    }
}

impl Drop for DeviceModel {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn_model(dir: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(uhmm_exe());
    let log = std::fs::File::create(dir.join("log")).expect("a log file");
    command.arg("device-model").args(args).arg("--socket").arg(dir.join("device.sock")).stderr(log);
    spawn_until_ready(command)
}

/// Manifest text of a PCI device and its driver.
pub fn pci_device(name: &str, driver: &str, model: &DeviceModel, device_options: &str) -> String {
    let pci = model.pci();
    format!(
        r#"
[[service]]
name = "{name}"
kind = "driver"
driver = "{driver}"
{RESTART}

[[device]]
name = "{name}"
service = "{name}"
pci = "{pci}"
{device_options}
"#
    )
}

/// See [`TestBed::process`].
pub struct Target {
    pidfd: PidFd,
    incarnation: u32,
}

impl Target {
    /// Which incarnation it is.
    pub fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// kill -9, now; returns the incarnation that was killed.
    pub fn kill(&self) -> u32 {
        assert!(self.pidfd.signal(Signal::KILL).expect("kill"), "the service was dead already");
        self.incarnation
    }
}

impl TestBed {
    /// One software device of `memory`.
    pub fn start(memory: &str) -> Self {
        Self::with_manifest(&manifest(memory, ""))
    }

    /// Any manifest.
    pub fn with_manifest(manifest: &str) -> Self {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix("uhmm-test-").permissions(private).tempdir();
        let dir = dir.expect("a temporary directory");
        let path = dir.path().join("manifest.toml");
        std::fs::write(&path, manifest).expect("the manifest is written");
        let supervisor = spawn_up(dir.path(), &["--manifest".as_ref(), path.as_os_str()]);
        Self { supervisor, dir }
    }

    /// The run directory.
    pub fn run_dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new client session of this process.
    pub fn session(&self) -> Session {
        Session::connect(Some(self.run_dir())).expect("a session")
    }

    /// The operator's connection.
    pub fn operator(&self) -> Operator {
        Operator::connect(Some(self.run_dir())).expect("an operator connection")
    }

    /// The supervisor's pid.
    pub fn supervisor_pid(&self) -> u32 {
        self.supervisor.id()
    }

    /// A running service, ready to be killed without any delay.
    pub fn process(&self, service: &str) -> Target {
        let services = self.operator().status().expect("status");
        let found = services.iter().find(|status| status.name == service).expect("the service is in the plan");
        let pidfd = PidFd::open(found.pid).expect("the service runs");
        Target { pidfd, incarnation: found.incarnation }
    }

    /// kill -9 one service; returns the incarnation that was killed.
    pub fn kill(&self, service: &str) -> u32 {
        self.operator().kill(service).unwrap_or_else(|error| panic!("kill {service}: {error}")).incarnation
    }

    /// Waits until `service` is ready in an incarnation above `incarnation`.
    pub fn wait_ready(&self, service: &str, incarnation: u32) -> ServiceStatus {
        let deadline = Instant::now() + PATIENCE;
        let mut operator = self.operator();
        loop {
            let services = operator.status().expect("status");
            let found = services.iter().find(|s| s.name == service).expect("the service is in the plan");
            if found.state == "ready" && found.incarnation > incarnation {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "{service} is not ready again: {services:#?}");
            std::thread::yield_now();
        }
    }

    /// One counter of a service.
    pub fn metric(&self, service: &str, name: &str) -> u64 {
        let metrics: Vec<Metric> = self.operator().stats(service).expect("stats");
        let found = metrics.iter().find(|metric| metric.name == name);
        found.unwrap_or_else(|| panic!("{service} has no counter {name}: {metrics:?}")).value
    }

    /// kill -9 the supervisor itself; its services go on.
    pub fn kill_supervisor(&mut self) {
        self.supervisor.kill().expect("kill the supervisor");
        self.supervisor.wait().expect("reap the supervisor");
    }

    /// `uhmm up` without `--adopt` where services still run: what it says when it refuses.
    pub fn try_up(&self) -> String {
        let output = Command::new(uhmm_exe()).arg("--run-dir").arg(self.run_dir()).arg("up").output().expect("uhmm up");
        assert!(!output.status.success(), "a second system was started beside the first");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A new supervisor takes over what runs.
    pub fn adopt(&mut self) {
        let path = self.dir.path().join("manifest.toml");
        self.supervisor = spawn_up(self.dir.path(), &["--adopt".as_ref(), "--manifest".as_ref(), path.as_os_str()]);
    }
}

impl Drop for TestBed {
    fn drop(&mut self) {
        let asked = Operator::connect(Some(self.dir.path())).and_then(Operator::shutdown);
        if asked.is_err() {
            // The supervisor does not answer: end it hard; its services end with their run directory's supervisor gone.
            let _ = self.supervisor.kill();
        }
        let _ = self.supervisor.wait();
    }
}

fn spawn_up(run_dir: &Path, args: &[&std::ffi::OsStr]) -> Child {
    let mut command = Command::new(uhmm_exe());
    command.arg("--run-dir").arg(run_dir).arg("up").args(args);
    spawn_until_ready(command)
}

/// Starts `uhmm` and waits until it prints `ready`.
fn spawn_until_ready(mut command: Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("uhmm starts");
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).expect("uhmm says when it is ready");
    assert_eq!(line.trim(), "ready", "{command:?} ended before it was ready");
    child
}
