//! A process that answers what it is told: over a bare SOCK_SEQPACKET socket, or over uhmm's stubs (schema, codec, reactor).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use uhmm_ipc::message::{Call, ErrorCode, Interface, Reply, Role, TraceId, WireError, driver};
use uhmm_ipc::{Endpoint, Identity, Limits, LinkId, Reactor, Wake};
use uhmm_kernel_hook::{SeqListener, SeqPacket};

use super::super::benches::party::Helper;
use super::super::place::{self, Place};
use super::super::run::Run;

/// Bytes each way.
const PAYLOAD: usize = 128;

/// `uhmm bench-echo`
#[derive(clap::Args)]
pub struct BenchEchoArgs {
    /// Where to listen
    socket: PathBuf,
    /// Speak uhmm's protocol
    #[arg(long)]
    stubs: bool,
}

/// Serves until its input ends.
pub fn bench_echo(args: &BenchEchoArgs) -> anyhow::Result<()> {
    let listener = SeqListener::bind(&args.socket)?;
    // Whoever has started it is there as long as its input is open.
    std::thread::spawn(|| {
        let read = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(i32::from(read.is_err()))
    });
    if args.stubs {
        return serve_stubs(listener);
    }
    uhmm_kit::say("ready");
    loop {
        poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).context("poll")?;
        while let Some(socket) = listener.accept()? {
            let socket = waiting(socket)?;
            std::thread::spawn(move || serve_bare(&socket));
        }
    }
}

/// From now on its calls wait. The hook's sockets never do, since event loops use them.
pub(in super::super) fn waiting(socket: SeqPacket) -> anyhow::Result<SeqPacket> {
    rustix::io::ioctl_fionbio(&socket, false).context("FIONBIO")?;
    Ok(socket)
}

fn serve_bare(socket: &SeqPacket) {
    let mut bytes = [0; PAYLOAD];
    while matches!(recv(socket, &mut bytes[..], RecvFlags::empty()), Ok((_, len)) if len > 0) {
        if send(socket, &bytes, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

/// One message each way.
pub(in super::super) fn ask(socket: &SeqPacket) -> anyhow::Result<()> {
    let mut bytes = [7; PAYLOAD];
    send(socket, &bytes, SendFlags::NOSIGNAL).context("send")?;
    let (_, len) = recv(socket, &mut bytes[..], RecvFlags::empty()).context("recv")?;
    anyhow::ensure!(len == PAYLOAD, "The echo has ended");
    Ok(())
}

fn identity(name: &str, role: Role, interface: Option<Interface>) -> Identity {
    Identity { name: name.into(), role, incarnation: 1, interface, limits: Limits::default() }
}

fn serve_stubs(listener: SeqListener) -> anyhow::Result<()> {
    let mut reactor = Reactor::new(identity("echo", Role::Driver, Some(Interface::Driver)))?;
    reactor.listen(listener)?;
    uhmm_kit::say("ready");
    let mut wakes = Vec::new();
    loop {
        reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            let Wake::Call { conn, call, body, .. } = wake else { continue };
            let answer = match body {
                Call::Driver(driver::Call::Submit { args, .. }) => {
                    Ok(Reply::Driver(driver::Reply::Finished { results: args, fault_count: 0, run_time_ns: 0 }))
                }
                other => Err(WireError::new(ErrorCode::Invalid, format!("{other:?}"))),
            };
            reactor.reply(conn, call, answer);
        }
    }
}

/// The calling side of the stubs.
pub(in super::super) struct Stubs {
    reactor: Reactor,
    link: LinkId,
    wakes: Vec<Wake>,
}

impl Stubs {
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let mut reactor = Reactor::new(identity("bench", Role::Client, None))?;
        let endpoint = Endpoint { path: path.to_owned(), interface: Interface::Driver, key: Vec::new() };
        let link = reactor.link(endpoint);
        Ok(Self { reactor, link, wakes: Vec::new() })
    }

    /// A call with a payload of 128 bytes (sixteen words), and its answer with the same.
    pub fn ask(&mut self) -> anyhow::Result<()> {
        let args = vec![7; PAYLOAD / 8];
        let call = driver::Call::Submit { space: 1, kernel: "k".into(), args, idempotent: true, ranges: Vec::new() };
        let id = self.reactor.call(self.link, Call::Driver(call), TraceId::fresh(), None);
        loop {
            self.reactor.poll(None, &mut self.wakes)?;
            for wake in self.wakes.drain(..) {
                match wake {
                    Wake::Done { call, result, .. } if call == id => {
                        result.context("The echo answers")?;
                        return Ok(());
                    }
                    _ => {}
                }
            }
        }
    }
}

/// An echo process, and where it listens.
pub(in super::super) struct Echo {
    _process: Helper,
    socket: PathBuf,
}

impl Echo {
    pub fn start(run: &Run<'_>, place: Place, stubs: bool) -> anyhow::Result<Self> {
        let socket = run.path("echo");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-echo").arg(&socket).args(stubs.then_some("--stubs")).stdout(Stdio::piped());
        let process = place::on(&place.services()?, || Helper::start(&mut command)?.ready())?;
        Ok(Self { _process: process, socket })
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
