//! Block servers in processes of their own: uhmm's, which does wrong on order, nbdkit, and qemu-nbd. They end with these values.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use crate::network::Network;
use crate::{PATIENCE, uhmm_exe, wait_for_ready};

/// Which server, and its options; `SOCKET` and `FILE` in them stand for its own.
#[derive(Clone, Debug)]
pub struct Kind {
    program: PathBuf,
    args: Vec<String>,
    ours: bool,
    /// In another network, by TCP instead of a socket in a folder.
    elsewhere: Option<(SocketAddr, Vec<String>)>,
}

impl Kind {
    /// `uhmm device-model block`, which takes orders.
    pub fn ours(args: &[&str]) -> Self {
        let own = ["device-model", "block", "--orders", "--socket", "SOCKET"];
        Self {
            program: uhmm_exe(),
            args: own.iter().chain(args).map(|word| (*word).to_owned()).collect(),
            ours: true,
            elsewhere: None,
        }
    }

    /// `nbdkit`: its filters, plugin and their options.
    pub fn nbdkit(args: &[&str]) -> Self {
        // One thread a connection: with more, 1.32 (Debian 12) fails an assertion when a client goes in the middle of requests.
        let own = ["--foreground", "--threads=1", "--unix", "SOCKET"];
        Self::packaged("nbdkit", "nbdkit", &own, args)
    }

    /// The same on the machine at the other end of this network.
    pub fn nbdkit_in(network: &Network, args: &[&str]) -> Self {
        let address = SocketAddr::from((network.address(), 10809));
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let own = ["--foreground", "--threads=1", "--ipaddr", &ip, "--port", &port];
        let elsewhere = Some((address, network.prefix()));
        Self { elsewhere, ..Self::packaged("nbdkit", "nbdkit", &own, args) }
    }

    /// `qemu-nbd`: its options.
    pub fn qemu(args: &[&str]) -> Self {
        Self::packaged("qemu-nbd", "qemu-utils", &["--persistent", "--socket=SOCKET"], args)
    }

    fn packaged(name: &str, package: &str, own: &[&str], args: &[&str]) -> Self {
        let found =
            ["/usr/sbin", "/usr/bin"].iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
        let program =
            found.unwrap_or_else(|| panic!("{name} is missing: run `apt-get install {package}`, or tests/run"));
        Self {
            program,
            args: own.iter().chain(args).map(|word| (*word).to_owned()).collect(),
            ours: false,
            elsewhere: None,
        }
    }
}

/// A block server.
pub struct BlockServer {
    kind: Kind,
    child: Mutex<Running>,
    dir: TempDir,
}

struct Running {
    child: Child,
    answers: Option<BufReader<ChildStdout>>,
}

impl BlockServer {
    /// With an empty medium of 64 MiB in a file of its own, if it uses that.
    pub fn start(kind: Kind) -> Self {
        // On the disk where the build is: /tmp may be memory.
        let build = uhmm_exe().parent().expect("a folder").to_owned();
        let dir = tempfile::Builder::new().prefix("uhmm-nbd-").tempdir_in(build).expect("a folder");
        File::create(dir.path().join("file")).expect("a file").set_len(64 << 20).expect("a size");
        let child = Mutex::new(run(&kind, dir.path()));
        Self { kind, child, dir }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// For the manifest: `url = ...`.
    pub fn url(&self) -> String {
        match &self.kind.elsewhere {
            Some((address, _)) => format!("nbd://{address}/"),
            None => format!("nbd+unix:///?socket={}", self.socket().display()),
        }
    }

    /// The medium, if it is in a file.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    /// What it has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).expect("a log")
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Running> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// kill -9.
    pub fn kill(&self) {
        let mut running = self.running();
        running.child.kill().expect("kill the server");
        running.child.wait().expect("reap the server");
    }

    /// Another one in its place, with the same medium if that is in a file.
    pub fn restart(&self) {
        *self.running() = run(&self.kind, self.dir.path());
    }

    /// Tells our own what to do.
    pub fn order(&self, order: &str) -> Value {
        let mut running = self.running();
        let Running { child, answers } = &mut *running;
        writeln!(child.stdin.as_mut().expect("stdin is piped"), "{order}").expect("the server takes orders");
        let mut line = String::new();
        answers.as_mut().expect("ours answers").read_line(&mut line).expect("the server answers");
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{order}: {error}: {line:?}"));
        assert!(answer.get("error").is_none(), "{order}: {answer}");
        answer
    }

    /// What our own has counted.
    pub fn counter(&self, name: &str) -> u64 {
        self.order("counters")[name].as_u64().unwrap_or_else(|| panic!("the server has no counter {name}"))
    }
}

type Started = std::io::Result<Child>;

/// By a thread that lives as long as the test: nbdkit ends with its parent, and for Linux that is the thread which has started it.
fn spawn(command: Command) -> Started {
    static SPAWNER: OnceLock<Sender<(Command, Sender<Started>)>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, taken) = channel::<(Command, Sender<Started>)>();
        std::thread::spawn(move || {
            // A test that does not wait for its server has failed already.
            taken.into_iter().for_each(|(mut command, tell)| drop(tell.send(command.spawn())));
        });
        orders
    });
    let (tell, told) = channel();
    spawner.send((command, tell)).expect("the thread lives");
    told.recv().expect("the thread lives")
}

fn run(kind: &Kind, dir: &Path) -> Running {
    let socket = dir.join("socket");
    // A server that was killed has left it, and some refuse to begin then.
    drop(std::fs::remove_file(&socket));
    let fill = |word: &String| {
        word.replace("SOCKET", &socket.display().to_string()).replace("FILE", &dir.join("file").display().to_string())
    };
    let log = File::options().create(true).append(true).open(dir.join("log")).expect("a log");
    let words = [kind.program.display().to_string()].into_iter().chain(kind.args.iter().map(fill));
    let prefix = kind.elsewhere.iter().flat_map(|(_, prefix)| prefix.clone());
    let mut words = prefix.chain(words);
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
    let shown = format!("{command:?}");
    let mut child = spawn(command).unwrap_or_else(|error| panic!("{shown}: {error}"));
    if kind.ours {
        let answers = Some(wait_for_ready(&mut child));
        return Running { child, answers };
    }
    // They do not say when they listen.
    let deadline = Instant::now() + PATIENCE;
    let listens = || match &kind.elsewhere {
        Some((address, _)) => TcpStream::connect(address).is_ok(),
        None => UnixStream::connect(&socket).is_ok(),
    };
    while !listens() {
        let ended = child.try_wait().expect("its state");
        let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
        assert!(ended.is_none() && Instant::now() < deadline, "{shown} does not listen: {ended:?} {log}");
        std::thread::yield_now();
    }
    Running { child, answers: None }
}

impl Drop for BlockServer {
    fn drop(&mut self) {
        let mut running = self.running();
        // It may be dead already, which is what is wanted.
        let _ = running.child.kill();
        let _ = running.child.wait();
    }
}
