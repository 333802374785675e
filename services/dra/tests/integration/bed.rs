//! A node: uhmm, the driver, a kubelet, an API server, and programs of pods.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use uhmm_kernel_hook::PidFd;
use uhmm_tests::process::Process;
use uhmm_tests::{PATIENCE, TestBed, manifest_of, uhmm_exe};

use crate::api::{ApiServer, NODE, TOKEN};
use crate::kubelet::Kubelet;
use crate::wire::PreparedClaim;

pub const ROLE: &str = "UHMM_TEST_DRA_ROLE";
/// Whoever shows no claim may run, and use no device.
pub const ONLY_CLAIMS: &str = "[[client]]\nname = \"no-claim\"\ndevices = []\n";

/// See the module head.
pub struct Node {
    pub uhmm: TestBed,
    pub api: ApiServer,
    pub kubelet: Kubelet,
    pub dir: tempfile::TempDir,
    driver: Option<Process>,
    server: String,
}

impl Node {
    /// Two devices of 32 MiB.
    pub fn start(rules: &str) -> Self {
        let api = ApiServer::start();
        let server = format!("http://127.0.0.1:{}", api.port());
        Self::start_with(rules, api, server)
    }

    pub fn start_with(rules: &str, api: ApiServer, server: String) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(dir.path().join("token"), format!("{TOKEN}\n")).expect("a token");
        let uhmm = TestBed::with_log(&format!("{}\n{rules}", manifest_of(2, "32MiB", "")));
        let kubelet = Kubelet::new(&dir.path().join("kubelet"));
        let mut node = Self { uhmm, api, kubelet, dir, driver: None, server };
        node.start_driver();
        node
    }

    /// As a container would start it.
    pub fn command(&self) -> Command {
        let path = |name: &str| self.dir.path().join(name);
        let mut command = Command::new(uhmm_exe());
        command.arg("--run-dir").arg(self.uhmm.run_dir()).args(["dra", "--node-name", NODE, "--interval", "1"]);
        command.args(["--api-server", &self.server]).arg("--token-file").arg(path("token"));
        command.arg("--kubelet-dir").arg(path("kubelet")).arg("--cdi-dir").arg(path("cdi"));
        command.arg("--ca").arg(path("ca.crt")).env("UHMM_LOG", "info");
        command
    }

    /// Returns when the kubelet could find it.
    pub fn start_driver(&mut self) {
        let mut driver = Process::start("dra", &mut self.command(), self.dir.path());
        driver.ask("", |line| line == "ready").expect("the driver starts");
        self.driver = Some(driver);
    }

    /// Its process.
    pub fn driver_pid(&self) -> u32 {
        self.driver.as_ref().expect("it runs").id()
    }

    /// kill -9; its process is gone afterwards.
    pub fn kill_driver(&mut self) {
        let driver = self.driver.take().expect("it runs");
        let pidfd = PidFd::open(driver.id()).expect("it runs");
        assert!(pidfd.signal(Signal::KILL).expect("kill"), "it was dead already");
        drop(driver);
    }

    /// SIGTERM, and its end.
    pub fn stop_driver(&mut self) {
        let mut driver = self.driver.take().expect("it runs");
        PidFd::open(driver.id()).expect("it runs").signal(Signal::TERM).expect("a signal");
        driver.end().expect("it ends in order");
    }

    /// What it has said.
    pub fn driver_log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("dra.errors")).unwrap_or_default()
    }

    /// The files of the container runtime.
    pub fn cdi_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path().join("cdi")).into_iter().flatten();
        entries
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .collect()
    }

    /// Ids and bytes of the claims that the core has.
    pub fn core_claims(&self) -> Vec<(String, Vec<u64>)> {
        let claims = self.uhmm.operator().claims().expect("claims").claims;
        let bytes = |claim: &uhmm_sdk::Claim| claim.shares.iter().map(|share| share.bytes).collect();
        claims.iter().map(|claim| (claim.id.clone(), bytes(claim))).collect()
    }

    /// Waits until the core has these claims and no others.
    pub fn wait_core(&self, ids: &[&str]) {
        let until = Instant::now() + PATIENCE;
        let found = || self.core_claims().into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        while found() != ids {
            assert!(Instant::now() < until, "{:?}, not {ids:?}: {}", found(), self.driver_log());
            std::thread::yield_now();
        }
    }

    /// Waits until the driver has said this.
    pub fn wait_log(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.driver_log().contains(text) {
            assert!(Instant::now() < until, "{text:?} was never logged: {}", self.driver_log());
            std::thread::yield_now();
        }
    }

    /// A program in a container that the runtime has given the claim's devices.
    pub fn pod(&self, name: &str, prepared: &PreparedClaim) -> Pod {
        let ids: Vec<&str> =
            prepared.devices.iter().flat_map(|device| &device.cdi_device_ids).map(String::as_str).collect();
        Pod::start(name, &environment(&self.cdi_files(), &ids), self.dir.path())
    }

    /// A program that was shown the sockets, and whatever else is in `more`.
    pub fn stranger(&self, name: &str, more: &[(&str, &str)]) -> Pod {
        let run_dir = self.uhmm.run_dir().to_str().expect("UTF-8").to_owned();
        let mut environment = vec![("UHMM_RUN_DIR".to_owned(), run_dir)];
        environment.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Pod::start(name, &environment, self.dir.path())
    }
}

/// What a container runtime makes of CDI files. There is no container here: the mounted folder is where it is outside.
fn environment(files: &[PathBuf], ids: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for file in files {
        let spec: Value = serde_json::from_slice(&std::fs::read(file).expect("the file")).expect("JSON");
        let kind = spec["kind"].as_str().expect("a kind");
        let device =
            |device: &&Value| ids.contains(&format!("{kind}={}", device["name"].as_str().expect("text")).as_str());
        let devices: Vec<&Value> = spec["devices"].as_array().expect("a list").iter().filter(device).collect();
        if devices.is_empty() {
            continue;
        }
        let of = |edits: &Value| edits["env"].as_array().cloned().unwrap_or_default();
        let mut variables = of(&spec["containerEdits"]);
        devices.iter().for_each(|device| variables.extend(of(&device["containerEdits"])));
        let mount = &spec["containerEdits"]["mounts"][0];
        for variable in variables {
            let (name, value) = variable.as_str().expect("text").split_once('=').expect("NAME=value");
            let shown = mount["containerPath"] == value;
            let value = if shown { mount["hostPath"].as_str().expect("text") } else { value };
            found.push((name.to_owned(), value.to_owned()));
        }
    }
    assert!(ids.is_empty() || !found.is_empty(), "no file has {ids:?}");
    found
}

/// A program that migrates what it is told to (see `role`).
pub struct Pod(Process);

impl Pod {
    fn start(name: &str, environment: &[(String, String)], folder: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("exe"));
        command.args(["--exact", "integration_dra_pod_role", "--nocapture"]).env(ROLE, "pod");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        Self(Process::start(name, &mut command, folder).with_patience(Duration::from_secs(40)))
    }

    /// `MIGRATE DEVICE MIB`: pages that moved, and why others did not. Its bytes are compared.
    pub fn migrate(&mut self, device: &str, mib: u64) -> (u64, String) {
        let answer = self.say(&format!("migrate {device} {mib}"));
        let mut words = answer.splitn(3, ' ');
        assert_eq!(words.next(), Some("moved"), "{answer}");
        (words.next().expect("a number").parse().expect("a number"), words.next().unwrap_or_default().to_owned())
    }

    /// One order, one line.
    pub fn say(&mut self, text: &str) -> String {
        let is_last = |line: &str| ["moved ", "refused ", "ok"].iter().any(|word| line.starts_with(word));
        let answer = self.0.ask(&format!("{text}\n"), is_last).unwrap_or_else(|problem| panic!("{problem}"));
        answer.lines().last().unwrap_or_default().to_owned()
    }
}
