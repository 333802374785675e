//! `uhmm` as an operator of the guest uses it: by its command line.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const UHMM: &str = "/helpers/uhmm";
/// Each mechanism once: faults of both sides, migration, fork, exclusive access, atomics, advice, eviction, injected failures, kills.
const SELECTION: &str = "^(T01|T02|T04|T12|T14|T22|T25|T29|X03|K08|D02|C05|R03|R08|M01|M03|IGT.once.(malloc|region|mmap-remap)$\
                         |P16_one|P17_pager|S02|Z01)";
/// Software emulation, perhaps on a busy machine.
const PATIENCE: &str = "6";

/// Runs the program; what it says goes to the test's log as it comes, so that a deadline leaves it there.
///
/// # Panics
/// It fails.
pub fn uhmm(args: &[&str]) {
    println!("$ uhmm {}", args.join(" "));
    let status = Command::new(UHMM).args(args).status().expect("the guest has the program");
    assert!(status.success(), "uhmm {args:?} ended with {status}");
}

/// A running system; stopped in order when the test ends.
#[derive(Debug)]
pub struct System {
    supervisor: Child,
    run_dir: String,
}

impl System {
    /// `uhmm up`, and `status` when it is ready.
    ///
    /// # Panics
    /// It does not come up; its messages are in the log.
    pub fn up(name: &str, manifest: &Path) -> Self {
        let run_dir = format!("/tmp/run-{name}");
        let mut command = Command::new(UHMM);
        command.args(["--run-dir", &run_dir, "up", "--manifest"]).arg(manifest).stdout(Stdio::piped());
        let mut supervisor = command.spawn().expect("the guest has the program");
        let mut line = String::new();
        let stdout = supervisor.stdout.take().expect("its output is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says when it is ready");
        let system = Self { supervisor, run_dir };
        assert_eq!(line.trim(), "ready", "the services' messages are above");
        system.uhmm(&["status"]);
        system
    }

    /// A command to this system.
    ///
    /// # Panics
    /// It fails.
    pub fn uhmm(&self, args: &[&str]) {
        uhmm(&[&["--run-dir", &self.run_dir], args].concat());
    }

    /// Where its sockets are.
    pub fn run_dir(&self) -> &Path {
        Path::new(&self.run_dir)
    }

    /// The conformance cases for this driver: all with `--full`, otherwise a selection.
    ///
    /// # Panics
    /// One fails.
    pub fn conformance(&self, driver: &str) {
        let filter = if std::env::var_os("UHMM_FULL").is_some() { "" } else { SELECTION };
        self.cases(driver, filter);
    }

    /// Those whose names match.
    ///
    /// # Panics
    /// One fails.
    pub fn cases(&self, driver: &str, filter: &str) {
        self.uhmm(&["conformance", "--driver", driver, "--patience", PATIENCE, "--filter", filter]);
    }
}

/// `uhmm device-model block`, with an export in its memory. Ended when this is dropped.
#[derive(Debug)]
pub struct BlockServer {
    server: Child,
    socket: String,
}

impl BlockServer {
    /// Returns when it listens.
    ///
    /// # Panics
    /// It does not.
    pub fn start() -> Self {
        let socket = "/tmp/block-server".to_owned();
        let mut command = Command::new(UHMM);
        command.args(["device-model", "block", "--memory", "64MiB", "--socket", &socket]).stdout(Stdio::piped());
        let mut server = command.spawn().expect("the guest has the program");
        let mut line = String::new();
        let stdout = server.stdout.take().expect("its output is piped");
        BufReader::new(stdout).read_line(&mut line).expect("it says when it is ready");
        assert_eq!(line.trim(), "ready", "its messages are above");
        Self { server, socket }
    }

    /// Where it listens.
    pub fn socket(&self) -> &str {
        &self.socket
    }
}

impl Drop for BlockServer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let down = Command::new(UHMM).args(["--run-dir", &self.run_dir, "down"]).status();
        if !down.is_ok_and(|status| status.success()) {
            // It may have ended already.
            let _ = self.supervisor.kill();
        }
        let _ = self.supervisor.wait();
    }
}
