//! A driver that is none: it tries what a hostile one would, and says what became of each attempt, a line each on standard error:
//! `ATTEMPT denied ERRNO` or `ATTEMPT allowed`. The last line is `end`.
//!
//! ```text
//! uhmm-hostile [--client PID:ADDRESS] [--neighbour PID] [--socket FILE]... [--abstract NAME] [--file PATH]... [--threads N]
//!              [--execute PROGRAM] [--run-dir DIR ...]
//! ```
//! `--socket`: a socket that is not for it, in the run directory unless its path is absolute. `--threads`: fewer than N can be had.
//! What is not given is not tried. The supervisor appends its own arguments; only `--run-dir` matters.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Interface, Role};
use uhmm_ipc::{Endpoint, Identity, Limits, Reactor, Wake};
use uhmm_kernel_hook::hostile::{ATTEMPTS, Victims, execute, threads};
use uhmm_kernel_hook::{HookError, SeqPacket};

/// A refusal comes at once; whoever is not answered is let in as little.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Args {
    victims: Victims,
    sockets: Vec<PathBuf>,
    abstract_name: Option<String>,
    files: Vec<PathBuf>,
    threads: usize,
    execute: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

fn args() -> Args {
    let (mut args, mut words) = (Args::default(), std::env::args().skip(1));
    while let (Some(option), Some(value)) = (words.next(), words.next()) {
        let number = |text: &str| text.parse().unwrap_or_default();
        match option.as_str() {
            "--client" => {
                let (pid, addr) = value.split_once(':').unwrap_or((&value, "0"));
                args.victims.client = (number(pid), addr.parse().unwrap_or_default());
            }
            "--neighbour" => args.victims.neighbour = number(&value),
            "--socket" => args.sockets.push(value.into()),
            "--abstract" => args.abstract_name = Some(value),
            "--file" => args.files.push(value.into()),
            "--threads" => args.threads = value.parse().unwrap_or_default(),
            "--execute" => args.execute = Some(value.into()),
            "--run-dir" => args.run_dir = Some(value.into()),
            _ => {}
        }
    }
    args
}

/// A line in one write: others write to the same pipe.
fn say(line: &str) {
    io::Write::write_all(&mut io::stderr(), format!("{line}\n").as_bytes()).expect("standard error");
}

fn report(name: &str, outcome: &io::Result<()>) {
    match outcome {
        Ok(()) => say(&format!("{name} allowed")),
        Err(error) => {
            let errno = error.raw_os_error().map_or_else(|| error.to_string(), errno);
            say(&format!("{name} denied {errno}"));
        }
    }
}

fn errno(number: i32) -> String {
    let known = [
        (1, "EPERM"),
        (2, "ENOENT"),
        (3, "ESRCH"),
        (11, "EAGAIN"),
        (13, "EACCES"),
        (38, "ENOSYS"),
        (111, "ECONNREFUSED"),
    ];
    known.iter().find(|(of, _)| *of == number).map_or_else(|| format!("errno {number}"), |(_, name)| (*name).to_owned())
}

fn hook(error: HookError) -> io::Error {
    error.errno().map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

/// Whether a service lets this process in, as somebody who needs no key.
fn let_in(socket: &Path, interface: Interface, role: Role) -> io::Result<()> {
    let identity =
        Identity { name: "hostile".to_owned(), role, incarnation: 0, interface: None, limits: Limits::default() };
    let other = |error: uhmm_ipc::IpcError| io::Error::other(error.to_string());
    let mut reactor = Reactor::new(identity).map_err(other)?;
    reactor.link(Endpoint { path: socket.to_owned(), interface, key: Vec::new() });
    let (until, mut wakes) = (Instant::now() + PATIENCE, Vec::new());
    while Instant::now() < until {
        reactor.poll(Some(until.saturating_duration_since(Instant::now())), &mut wakes).map_err(other)?;
        for wake in wakes.drain(..) {
            match wake {
                Wake::LinkUp { .. } => return Ok(()),
                Wake::Refused { .. } => return Err(io::Error::from(rustix::io::Errno::PERM)),
                _ => {}
            }
        }
    }
    Err(io::Error::from(rustix::io::Errno::TIMEDOUT))
}

fn try_sockets(args: &Args) {
    let Some(run_dir) = &args.run_dir else { return };
    for socket in &args.sockets {
        let outcome = SeqPacket::connect(&run_dir.join(socket)).map(drop).map_err(hook);
        report(&format!("socket {}", socket.display()), &outcome);
    }
    let pager = run_dir.join("pager.sock");
    report("client of the pager", &let_in(&pager, Interface::Pager, Role::Client));
    report("operator of the pager", &let_in(&pager, Interface::Pager, Role::Operator));
    report("pager's mirror without key", &let_in(&pager, Interface::Pager, Role::Mirror));
    let supervisor = run_dir.join("supervisor.sock");
    report("operator of the supervisor", &let_in(&supervisor, Interface::Supervisor, Role::Operator));
}

fn main() {
    let args = args();
    for (name, attempt) in ATTEMPTS {
        report(name, &attempt(&args.victims));
    }
    for path in &args.files {
        report(&format!("file {}", path.display()), &std::fs::File::open(path).map(drop));
    }
    if let Some(name) = &args.abstract_name {
        let connected = SocketAddr::from_abstract_name(name).and_then(|addr| UnixStream::connect_addr(&addr)).map(drop);
        report("an abstract socket", &connected);
    }
    try_sockets(&args);
    if args.threads > 0 {
        let few = threads(args.threads) < args.threads;
        let outcome = if few { Err(io::Error::from(rustix::io::Errno::AGAIN)) } else { Ok(()) };
        report("any number of threads", &outcome);
    }
    if let Some(program) = &args.execute {
        // Whatever runs then does not say `end`.
        report("another program", &Err(execute(program)));
    }
    say("end");
    // Ended from outside, so that it is not started again and again.
    loop {
        std::thread::park();
    }
}
