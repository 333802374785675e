//! Device models in processes of their own, on private sockets. They end with these values.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::{uhmm_exe, wait_for_ready};

/// `uhmm device-model`.
pub struct DeviceModel {
    child: Child,
    /// What it says after `ready`.
    answers: BufReader<ChildStdout>,
    dir: TempDir,
}

impl DeviceModel {
    /// Powers a device up: which one, and its options.
    pub fn start(args: &[&str]) -> Self {
        let private = Permissions::from_mode(0o700);
        let dir = tempfile::Builder::new().prefix("uhmm-model-").permissions(private).tempdir();
        Self::start_in(dir.expect("a temporary directory"), args)
    }

    fn start_in(dir: TempDir, args: &[&str]) -> Self {
        let mut command = Command::new(uhmm_exe());
        let log = File::create(dir.path().join("log")).expect("a log file");
        command.arg("device-model").args(args).arg("--socket").arg(dir.path().join("device.sock")).stderr(log);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("uhmm device-model starts");
        let answers = wait_for_ready(&mut child);
        Self { child, answers, dir }
    }

    /// What the manifest calls it: `pci = ...`.
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
        let elsewhere = TempDir::new().expect("a temporary directory");
        Self::start_in(std::mem::replace(&mut self.dir, elsewhere), args)
    }
}

impl Drop for DeviceModel {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `uhmm device-model nvme`, which takes orders.
pub struct NvmeModel {
    device: Mutex<DeviceModel>,
}

impl NvmeModel {
    /// Powers one up with an empty namespace of `memory`.
    pub fn start(memory: &str) -> Self {
        Self { device: Mutex::new(DeviceModel::start(&Self::args(memory))) }
    }

    fn args(memory: &str) -> [&str; 4] {
        ["nvme", "--orders", "--memory", memory]
    }

    fn device(&self) -> MutexGuard<'_, DeviceModel> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the manifest: `pci = ...`.
    pub fn pci(&self) -> String {
        self.device().pci()
    }

    fn order(&self, order: &str) -> Value {
        let mut device = self.device();
        let DeviceModel { child, answers, .. } = &mut *device;
        let orders = child.stdin.as_mut().expect("stdin is piped");
        writeln!(orders, "{order}").expect("the model takes orders");
        let mut line = String::new();
        answers.read_line(&mut line).expect("the model answers");
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{order}: {error}: {line:?}"));
        assert!(answer.get("error").is_none(), "{order}: {answer}");
        answer
    }

    /// The `nth` I/O command from now on meets `fault`, e.g. `drop-completion`.
    pub fn inject(&self, fault: &str, nth: u64) {
        self.order(&format!("fault {fault}@{nth}"));
    }

    /// I/O commands take at least so long.
    pub fn set_latency_us(&self, micros: u64) {
        self.order(&format!("latency-us {micros}"));
    }

    /// What it has seen since it was powered up, e.g. `enables`.
    pub fn counter(&self, name: &str) -> u64 {
        self.order("counters")[name].as_u64().unwrap_or_else(|| panic!("the model has no counter {name}"))
    }

    /// The bytes of its namespace, as somebody sees them who takes the medium out.
    pub fn medium(&self) -> File {
        let fds = PathBuf::from(format!("/proc/{}/fd", self.device().child.id()));
        let fds = fds.read_dir().expect("the model runs").filter_map(Result::ok).map(|entry| entry.path());
        let is_medium = |path: &PathBuf| {
            path.read_link().is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:uhmm-nvme-blocks"))
        };
        let path = fds.into_iter().find(is_medium).expect("the model holds its blocks in a memfd");
        File::options().read(true).write(true).open(path).expect("the medium opens")
    }

    /// How many of the medium's pages hold `word` in their first eight bytes, on the frames' side of the header.
    pub fn pages_with(&self, is: impl Fn(u64) -> bool) -> usize {
        let medium = self.medium();
        let len = medium.metadata().expect("its size").len();
        let mut word = [0; 8];
        let pages = (128 << 10..len).step_by(4096).filter(|at| {
            medium.read_exact_at(&mut word, *at).expect("the medium is read");
            is(u64::from_le_bytes(word))
        });
        pages.count()
    }

    /// kill -9: the device is pulled out.
    pub fn kill(&self) {
        self.device().kill();
    }

    /// Another one takes its place.
    pub fn replace(self, memory: &str) -> Self {
        let device = self.device.into_inner().unwrap_or_else(PoisonError::into_inner);
        Self { device: Mutex::new(device.replace(&Self::args(memory))) }
    }
}
