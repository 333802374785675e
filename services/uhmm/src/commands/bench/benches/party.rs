//! Some client processes of one side, which do their rounds together.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

/// How a side's clients find what serves them.
#[derive(Clone, Copy)]
pub(super) enum Side<'a> {
    /// The run directory of a system, and its device.
    Uhmm(&'a Path, &'a str),
    /// The socket of the bare handler.
    Floor(&'a Path),
}

/// How many clients, and what each has.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub clients: u64,
    pub regions: u64,
    pub pages: u64,
}

/// What a round of all clients took.
pub(super) struct Round {
    pub took: Duration,
    /// The p50 of a touch, of each client.
    pub p50_ns: Vec<u64>,
}

/// Children that nothing else ends, for whoever must end them when the run is interrupted.
pub(in super::super) static KILLED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// A child that ends with its input.
pub(in super::super) struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    /// It listens to nobody.
    killed: bool,
}

impl Helper {
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).spawn().context("A process of the bench cannot be started")?;
        Ok(Self { input: child.stdin.take(), child, killed: false })
    }

    /// It does not end with its input: it is killed.
    pub fn killed(mut self) -> Self {
        self.killed = true;
        KILLED.lock().unwrap_or_else(PoisonError::into_inner).insert(self.child.id());
        self
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says.
    pub fn output(&mut self) -> anyhow::Result<ChildStdout> {
        self.child.stdout.take().context("A process of the bench has no output")
    }

    /// Waits for the line that says that it is there.
    pub fn ready(mut self) -> anyhow::Result<Self> {
        let mut line = String::new();
        BufReader::new(self.output()?).read_line(&mut line)?;
        anyhow::ensure!(
            line.trim() == "ready",
            "A process of the bench ended before it was ready: see its message above"
        );
        Ok(self)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.input.take());
        if self.killed {
            let killed = self.child.kill();
            tracing::debug!(?killed, "A process of the bench ends");
            KILLED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.child.id());
        }
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "A process of the bench cannot be waited for");
        }
    }
}

struct Client {
    helper: Helper,
    output: BufReader<ChildStdout>,
}

impl Client {
    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        let input = self.helper.input.as_mut().context("A client of the bench has no input")?;
        input.write_all(line.as_bytes()).context("A client of the bench has ended: see its message above")
    }

    fn hear(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        anyhow::ensure!(!line.is_empty(), "A client of the bench has ended: see its message above");
        Ok(line.trim_end().to_owned())
    }
}

/// The clients of one side.
pub(super) struct Party(Vec<Client>);

impl Party {
    pub fn start(side: Side<'_>, shape: Shape) -> anyhow::Result<Self> {
        let exe = std::env::current_exe()?;
        let client = |_| {
            let mut command = Command::new(&exe);
            command.arg("bench-client").stdout(Stdio::piped());
            match side {
                Side::Uhmm(run_dir, device) => command.arg("--system").arg(run_dir).args(["--device", device]),
                Side::Floor(socket) => command.arg("--floor").arg(socket),
            };
            command.args(["--regions", &shape.regions.to_string(), "--pages", &shape.pages.to_string()]);
            let mut helper = Helper::start(&mut command)?;
            let output = BufReader::new(helper.output()?);
            Ok(Client { helper, output })
        };
        (0..shape.clients).map(client).collect::<anyhow::Result<_>>().map(Self)
    }

    /// All pages of all clients leave, then all are touched by all clients at once.
    pub fn round(&mut self) -> anyhow::Result<Round> {
        for client in &mut self.0 {
            client.say("away\n")?;
        }
        for client in &mut self.0 {
            client.hear()?;
        }
        let begun = Instant::now();
        for client in &mut self.0 {
            client.say("go\n")?;
        }
        let answers = self.0.iter_mut().map(Client::hear).collect::<anyhow::Result<Vec<_>>>()?;
        let took = begun.elapsed();
        let p50_ns = answers.iter().map(|answer| answer.parse()).collect::<Result<_, _>>()?;
        Ok(Round { took, p50_ns })
    }
}
