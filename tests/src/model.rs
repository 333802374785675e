//! A device model in a process of its own, and orders for it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::uhmm_exe;

/// `uhmm device-model nvme`. Ends with this value.
pub struct NvmeModel {
    child: Child,
    orders: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    socket: PathBuf,
}

impl NvmeModel {
    /// Powers one up with an empty namespace of `memory`, at `socket`.
    pub fn start(socket: &Path, memory: &str) -> Self {
        let mut command = Command::new(uhmm_exe());
        command.args(["device-model", "nvme", "--orders", "--memory", memory, "--socket"]).arg(socket);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("uhmm device-model starts");
        let stdin = child.stdin.take().expect("stdin is piped");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("the model says when it is ready");
        assert_eq!(line.trim(), "ready", "the model ended before it was ready");
        Self { child, orders: Mutex::new((stdin, stdout)), socket: socket.to_owned() }
    }

    /// For the manifest: `pci = ...`.
    pub fn pci(&self) -> String {
        format!("vfio-user:{}", self.socket.display())
    }

    fn order(&self, order: &str) -> Value {
        let mut ends = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(ends.0, "{order}").expect("the model takes orders");
        let mut line = String::new();
        ends.1.read_line(&mut line).expect("the model answers");
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
        let fds = PathBuf::from(format!("/proc/{}/fd", self.child.id()));
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
    pub fn kill(&mut self) {
        self.child.kill().expect("kill the model");
        self.child.wait().expect("reap the model");
    }
}

impl Drop for NvmeModel {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
