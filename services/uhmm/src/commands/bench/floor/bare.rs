//! Memory of this process whose faults a bare handler in another process answers with UFFDIO_COPY.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use uhmm_kernel_hook::{
    AddrRange, Features, ManagedMapping, PAGE_SIZE, RecvStatus, RegisterMode, SendStatus, SeqPacket, Userfaultfd, memfd,
};

use super::super::benches::party::Helper;
use super::super::benches::touch::{Touch, shuffled};
use super::super::place::{self, Place};
use super::super::run::Run;

/// Shared memory, registered, and its handler's connection.
pub(in super::super) struct BareMemory {
    mapping: ManagedMapping,
    memory: OwnedFd,
    handler: SeqPacket,
}

impl BareMemory {
    pub fn new(len: u64, handler: &Path) -> anyhow::Result<Self> {
        let (uffd, _) = Userfaultfd::create(None)?;
        uffd.api(Features::MISSING_SHMEM)?;
        let memory = memfd::create_sealed("uhmm-bench-floor", len)?;
        let mapping = ManagedMapping::map(memory.as_fd(), len, None)?;
        uffd.register(mapping.range(), RegisterMode::MISSING)?;
        let handler = SeqPacket::connect(handler)?;
        let sent = handler.send(b"u", &[uffd.as_fd()])?;
        anyhow::ensure!(sent == SendStatus::Sent, "The handler of bare memory is gone");
        // The handler alone has the descriptor now: if it ends, nobody waits for it.
        Ok(Self { mapping, memory, handler })
    }

    pub fn mapping(&self) -> &ManagedMapping {
        &self.mapping
    }

    /// Every page is missing afterwards.
    pub fn empty(&self) -> anyhow::Result<()> {
        let status = self.handler.recv(&mut [0; 8], &mut Vec::new(), 0)?;
        anyhow::ensure!(status != RecvStatus::Closed, "The handler of bare memory has ended: see its message above");
        Ok(memfd::punch_hole(self.memory.as_fd(), 0, self.mapping.len())?)
    }
}

/// A handler process, and where it listens.
pub(in super::super) struct Bare {
    handler: Helper,
    socket: std::path::PathBuf,
    place: Place,
}

impl Bare {
    /// `options`: of `uhmm bench-floor`, beside those that the place asks for.
    pub fn start(run: &Run<'_>, place: Place, options: &[&str]) -> anyhow::Result<Self> {
        let socket = run.path("floor");
        // On its faulting thread's only CPU a handler that looks again takes that CPU from the thread.
        let hot_us = if place == Place::OneCpu { "0" } else { "60" };
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench-floor").arg(&socket).args(["--hot-us", hot_us]).args(options).stdout(Stdio::piped());
        let handler = place::on(&place.services()?, || Helper::start(&mut command)?.ready())?;
        Ok(Self { handler, socket, place })
    }

    pub fn pid(&self) -> u32 {
        self.handler.pid()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn memory(&self, len: u64) -> anyhow::Result<BareMemory> {
        BareMemory::new(len, &self.socket)
    }

    /// The handler is told when this range is unmapped, as long as the value lives.
    pub fn hear_of(&self, range: AddrRange) -> anyhow::Result<impl Sized + use<>> {
        let (uffd, _) = Userfaultfd::create(None)?;
        uffd.api(Features::EVENT_UNMAP)?;
        uffd.register(range, RegisterMode::MISSING)?;
        let socket = SeqPacket::connect(&self.socket)?;
        let sent = socket.send(b"u", &[uffd.as_fd()])?;
        anyhow::ensure!(sent == SendStatus::Sent, "The handler of bare memory is gone");
        Ok((uffd, socket))
    }

    /// The p50 of so many faults, one after the other.
    pub fn p50_us(&self, pages: u64) -> anyhow::Result<f64> {
        let memory = self.memory(pages * PAGE_SIZE)?;
        let order = shuffled(pages);
        let touch = Touch { order: &order, threads: 1, pause: None, cpus: self.place.program()? };
        Ok(touch.all(memory.mapping(), false)?.value_at_quantile(0.5) as f64 / 1000.0)
    }
}
