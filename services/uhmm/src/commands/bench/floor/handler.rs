//! The floor of faults: one handler that answers every bare client's fault with UFFDIO_COPY of one page. It waits as the pager waits: it
//! looks again for as long after a fault before it sleeps, so that what differs is work.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use uhmm_kernel_hook::{CopyMode, PAGE_SIZE, SeqListener, SeqPacket, UffdEvent, Userfaultfd, Window};

const LISTENER: u64 = 0;
const INPUT: u64 = 1;
/// Connections by their number from here on, until they have sent their userfaultfd: then it has that number.
const CLIENTS: u64 = 2;
const EVENTS: usize = 128;

/// `uhmm bench-floor`
#[derive(clap::Args)]
pub struct BenchFloorArgs {
    /// Where to listen
    socket: PathBuf,
    /// For so long after a fault it looks again before it sleeps
    #[arg(long, default_value_t = 60)]
    hot_us: u64,
    /// Asks a `bench-echo` there before it answers a fault: one message each way
    #[arg(long)]
    hop: Option<PathBuf>,
}

struct Handler {
    epoll: OwnedFd,
    listener: SeqListener,
    greeting: HashMap<u64, SeqPacket>,
    /// The connection is open as long as somebody serves here.
    serving: HashMap<u64, (Userfaultfd, SeqPacket)>,
    next: u64,
    source: Window,
    faults: Vec<UffdEvent>,
    hop: Option<SeqPacket>,
}

/// Serves until its input ends.
pub fn bench_floor(args: &BenchFloorArgs) -> anyhow::Result<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let listener = SeqListener::bind(&args.socket)?;
    epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
    epoll::add(&epoll, std::io::stdin(), EventData::new_u64(INPUT), EventFlags::IN)?;
    let source = Window::anonymous(PAGE_SIZE)?;
    source.fill(0, PAGE_SIZE, 0x5a)?;
    let hop = args.hop.as_deref().map(SeqPacket::connect).transpose()?;
    let hop = hop.map(super::echo::waiting).transpose()?;
    let (greeting, serving) = Default::default();
    let mut handler = Handler { epoll, listener, greeting, serving, next: CLIENTS, source, faults: Vec::new(), hop };
    let hot = Duration::from_micros(args.hot_us);
    uhmm_kit::say("ready");
    let mut events = Vec::with_capacity(EVENTS);
    let mut hot_until = Instant::now();
    loop {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = (Instant::now() < hot_until).then_some(&zero);
        events.clear();
        match epoll::wait(&handler.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("epoll_wait"),
        }
        for event in &events {
            match event.data.u64() {
                INPUT => return Ok(()),
                LISTENER => handler.accept()?,
                id => {
                    if handler.serve(id)? {
                        hot_until = Instant::now() + hot;
                    }
                }
            }
        }
    }
}

impl Handler {
    fn accept(&mut self) -> anyhow::Result<()> {
        while let Some(socket) = self.listener.accept()? {
            epoll::add(&self.epoll, &socket, EventData::new_u64(self.next), EventFlags::IN)?;
            self.greeting.insert(self.next, socket);
            self.next += 1;
        }
        Ok(())
    }

    /// Whether it was a fault.
    fn serve(&mut self, id: u64) -> anyhow::Result<bool> {
        if let Some(socket) = self.greeting.remove(&id) {
            epoll::delete(&self.epoll, &socket)?;
            let mut fds = Vec::new();
            let status = socket.recv(&mut [0; 8], &mut fds, 1)?;
            let fd = fds.pop().with_context(|| format!("A bare client has sent no userfaultfd: {status:?}"))?;
            let uffd = Userfaultfd::from_fd(fd)?;
            epoll::add(&self.epoll, &uffd, EventData::new_u64(id), EventFlags::IN)?;
            self.serving.insert(id, (uffd, socket));
            return Ok(false);
        }
        let Some((uffd, _)) = self.serving.get(&id) else { return Ok(false) };
        self.faults.clear();
        uffd.read_events(&mut self.faults)?;
        for fault in &self.faults {
            if let Some(hop) = &self.hop {
                super::echo::ask(hop)?;
            }
            if let UffdEvent::Fault { addr, .. } = fault {
                let outcome = uffd.copy(addr & !(PAGE_SIZE - 1), &self.source, 0, PAGE_SIZE, CopyMode::default())?;
                anyhow::ensure!(outcome.done_bytes == PAGE_SIZE, "A page could not be filled: {:?}", outcome.stop);
            }
        }
        Ok(!self.faults.is_empty())
    }
}
