//! What the integration tests share: a whole uhmm of separate processes in a private run directory.
//!
//! A [`TestBed`] starts `uhmm up` with a manifest, waits for every service to be ready, and ends the processes it started
//! (by pid) when it is dropped, also when the test fails.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::Signal;
use uhmm_kernel_hook::{PidFd, SeqPacket};
use uhmm_sdk::{Metric, Operator, ServiceStatus, Session};

pub mod block;
pub mod c;
pub mod compare;
pub mod container;
pub mod far;
pub mod manager;
pub mod model;
pub mod network;
pub mod pattern;
pub mod process;

/// Longest wait for anything in a test; only ever reached by a failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running system.
pub struct TestBed {
    supervisor: Child,
    dir: tempfile::TempDir,
    logged: bool,
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
pub const RESTART: &str = "restart = { backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 1000 }";

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

/// Manifest text of a PCI device and its driver.
pub fn pci_device(name: &str, driver: &str, model: &model::DeviceModel, device_options: &str) -> String {
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

/// Manifest text with `soft0` of 16 MiB and `nvme0`, driven by the built-in driver. `restart`: of `nvme0`.
pub fn manifest_nvme(pci: &str, device_options: &str, restart: &str) -> String {
    let soft = manifest_of(1, "16MiB", "");
    format!(
        r#"{soft}
[[service]]
name = "nvme0"
kind = "driver"
driver = "nvme"
{restart}

[[device]]
name = "nvme0"
service = "nvme0"
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

    /// SIGSTOP, until [`Self::resume`].
    pub fn pause(&self) {
        assert!(self.pidfd.signal(Signal::STOP).expect("stop"), "the service was dead already");
    }

    /// SIGCONT.
    pub fn resume(&self) {
        assert!(self.pidfd.signal(Signal::CONT).expect("go on"), "the service has died");
    }
}

impl TestBed {
    /// One software device of `memory`.
    pub fn start(memory: &str) -> Self {
        Self::with_manifest(&manifest(memory, ""))
    }

    /// Any manifest.
    pub fn with_manifest(manifest: &str) -> Self {
        Self::begin(manifest, false)
    }

    /// The same; what the services say goes to a file: see [`TestBed::log`].
    pub fn with_log(manifest: &str) -> Self {
        Self::begin(manifest, true)
    }

    /// The same, but does not wait until every service is ready: one never will be.
    pub fn without_waiting(manifest: &str) -> Self {
        Self::begin_waiting(manifest, true, false)
    }

    fn begin(manifest: &str, logged: bool) -> Self {
        Self::begin_waiting(manifest, logged, true)
    }

    fn begin_waiting(manifest: &str, logged: bool, wait: bool) -> Self {
        let private = std::fs::Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix("uhmm-test-").permissions(private).tempdir();
        let dir = dir.expect("a temporary directory");
        let mut supervisor = spawn_up(dir.path(), &write_manifest(dir.path(), manifest), false, logged);
        if wait {
            wait_for_ready(&mut supervisor);
        }
        Self { supervisor, dir, logged }
    }

    /// What the services have said so far. Only for [`TestBed::with_log`].
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join(LOG)).expect("the log is read")
    }

    /// Waits until the services have said this. Only for [`TestBed::with_log`].
    pub fn wait_log(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} was never logged:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    /// kill -9 of everything, the supervisor first so that nobody is restarted: a power failure, but for the devices.
    pub fn kill_all(&mut self) {
        let services = self.operator().status().expect("status");
        let open = |service: &ServiceStatus| PidFd::open(service.pid).expect("the service runs");
        let services: Vec<PidFd> = services.iter().filter(|service| service.pid != 0).map(open).collect();
        self.kill_supervisor();
        for service in &services {
            service.signal(Signal::KILL).expect("kill");
        }
        // What held descriptors for the pager ends a moment later by itself, and with it the last listening socket.
        let deadline = Instant::now() + PATIENCE;
        // (A full backlog, which these attempts fill, is no refusal.)
        let refused = [Errno::CONNREFUSED, Errno::NOENT].map(|errno| Some(errno.raw_os_error()));
        let socket = self.run_dir().join("pager.sock");
        while !SeqPacket::connect(&socket).is_err_and(|error| refused.contains(&error.errno())) {
            assert!(Instant::now() < deadline, "something of the dead system holds its sockets");
            std::thread::yield_now();
        }
        for service in &services {
            rustix::event::poll(&mut [PollFd::new(service, PollFlags::IN)], None).expect("the service ends");
        }
    }

    /// Stops everything in order.
    pub fn stop(&mut self) {
        self.operator().shutdown().expect("shutdown");
        self.supervisor.wait().expect("reap the supervisor");
    }

    /// Another system in the same place, after [`TestBed::kill_all`] or [`TestBed::stop`].
    pub fn start_again(&mut self, manifest: &str) {
        let path = write_manifest(self.dir.path(), manifest);
        self.supervisor = spawn_up(self.dir.path(), &path, false, self.logged);
        let (line, _) = first_line(&mut self.supervisor);
        assert_eq!(
            line,
            "ready",
            "uhmm ended before it was ready: {}",
            if self.logged { self.log() } else { line.clone() }
        );
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
        let found = self.status(service);
        let pidfd = PidFd::open(found.pid).expect("the service runs");
        Target { pidfd, incarnation: found.incarnation }
    }

    /// State of a service.
    pub fn status(&self, service: &str) -> ServiceStatus {
        let services = self.operator().status().expect("status");
        services.into_iter().find(|status| status.name == service).expect("the service is in the plan")
    }

    /// kill -9 one service; returns the incarnation that was killed.
    pub fn kill(&self, service: &str) -> u32 {
        self.operator().kill(service).unwrap_or_else(|error| panic!("kill {service}: {error}")).incarnation
    }

    /// kill -9 of a service in the middle of `work`, which must go on to its end all the same. `moment` returns when it is to be: it runs
    /// once the work has begun, and is told how to see that the work has ended. True: the work was still under way when the service
    /// was dead. Returns when the next incarnation is ready.
    pub fn kill_during(&self, victim: &str, moment: impl FnOnce(&AtomicBool), work: impl FnOnce() + Send) -> bool {
        let (begun, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let target = self.process(victim);
        let (killed, in_the_middle) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                begun.store(true, Ordering::Release);
                work();
                ended.store(true, Ordering::Release);
            });
            while !begun.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            moment(&ended);
            let killed = target.kill();
            let in_the_middle = !ended.load(Ordering::Acquire);
            worker.join().expect("the work survives the kill");
            (killed, in_the_middle)
        });
        self.wait_ready(victim, killed);
        in_the_middle
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
        self.supervisor = spawn_up(self.dir.path(), &path, true, self.logged);
        wait_for_ready(&mut self.supervisor);
    }
}

impl Drop for TestBed {
    fn drop(&mut self) {
        if self.supervisor.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        let asked = Operator::connect(Some(self.dir.path())).and_then(Operator::shutdown);
        if asked.is_err() {
            // The supervisor does not answer: end it hard; its services end with their run directory's supervisor gone.
            let _ = self.supervisor.kill();
        }
        let _ = self.supervisor.wait();
    }
}

const LOG: &str = "services.log";

fn write_manifest(run_dir: &Path, text: &str) -> PathBuf {
    let path = run_dir.join("manifest.toml");
    std::fs::write(&path, text).expect("the manifest is written");
    path
}

fn spawn_up(run_dir: &Path, manifest: &Path, adopt: bool, logged: bool) -> Child {
    let mut command = Command::new(uhmm_exe());
    command.arg("--run-dir").arg(run_dir).arg("up").args(adopt.then_some("--adopt")).arg("--manifest").arg(manifest);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    if logged {
        let log = std::fs::File::options().append(true).create(true).open(run_dir.join(LOG));
        command.stderr(log.expect("the log opens")).env("UHMM_LOG", "info");
    }
    command.spawn().expect("uhmm up starts")
}

/// Returns what it says afterwards.
fn wait_for_ready(child: &mut Child) -> BufReader<ChildStdout> {
    let (line, rest) = first_line(child);
    assert_eq!(line, "ready", "uhmm ended before it was ready");
    rest
}

fn first_line(child: &mut Child) -> (String, BufReader<ChildStdout>) {
    let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("uhmm says when it is ready");
    (line.trim().to_owned(), stdout)
}
