//! A namespace as frames: which blocks a frame is, commands for ranges of them, and taking the namespace at the start.
//!
//! A namespace is memory here, not storage: after a power failure or a cold start its frames mean nothing (a new generation says so).
//! So frames are written without flush, through the controller's write cache if it has one. A controller reset keeps that
//! cache. Only the header is written through and flushed, because it must be what a cold start, or another host, finds.

use uhmm_driver_kit::{Frames, MemoryOrigin, PAGE_BYTES};
use uhmm_kernel_hook::random_bytes;
use uhmm_pci::{DmaMapping, DmaMemory, DmaRight};

use crate::book::{Book, Content};
use crate::error::NvmeError;
use crate::header::{Decision, Found, HEADER_BYTES, Header, HeaderError, State, decide};
use crate::layout::ZEROES_BYTES;
use crate::machine::{Identity, Request};
use crate::protocol::Opcode;
use crate::shell::{Controller, InFlight};

/// Commands of one batch while everything becomes zero.
const ZERO_BATCH: usize = 256;

/// See the module head. Clones are the same namespace.
#[derive(Clone, Debug)]
pub struct Namespace {
    controller: Controller,
    identity: Identity,
    frames: u32,
}

impl Namespace {
    /// Takes the namespace, or goes on with it. `memory_bytes`: use at most so much. `format`: whatever it holds now.
    ///
    /// # Errors
    /// `Header`: it holds anybody else's data.
    pub fn open(controller: Controller, memory_bytes: u64, format: bool) -> Result<(Self, MemoryOrigin), NvmeError> {
        let identity = controller.identity().ok_or(NvmeError::Bounds)?;
        let len_bytes = identity.namespace.len_bytes();
        let room = len_bytes.saturating_sub(HEADER_BYTES).min(memory_bytes) / PAGE_BYTES;
        let frames = u32::try_from(room).unwrap_or(u32::MAX - 1);
        if frames == 0 {
            return Err(HeaderError::TooSmall(len_bytes).into());
        }
        let namespace = Self { controller, identity, frames };
        let origin = namespace.take(format)?;
        Ok((namespace, origin))
    }

    fn take(&self, format: bool) -> Result<MemoryOrigin, NvmeError> {
        let area = self.map_begin(HEADER_BYTES)?;
        let found = self.read_begin(&area)?;
        let book = self.book();
        let known = book.content()?.map(|content| (content.owner, content.generation));
        let host = host_id();
        let decision = decide(found, known, u64::from(self.frames), host, format)?;
        if decision == Decision::Keep {
            return Ok(MemoryOrigin::Adopted);
        }
        if found != Found::Empty {
            tracing::warn!(?found, "What the namespace held is given up");
        }
        let [first, second, generation] = [draw()?, draw()?, draw()?.max(1)];
        let owner = [first, second];
        let frames = u64::from(self.frames);
        let header = Header { state: State::InUse, owner, generation, host, frames };
        self.write_begin(&area, &header)?;
        self.zero(Frames { first: 0, count: self.frames })?;
        // From here on the frames are worth something: a driver that dies before this takes the namespace anew.
        book.set_content(Content { owner, generation })?;
        Ok(MemoryOrigin::Created)
    }

    /// Nobody has the namespace any more: any host may take it. Frames are lost with that: whoever comes next, this host too, begins a
    /// new generation of zeroes. Nobody may use frames meanwhile or afterwards.
    ///
    /// # Errors
    /// `Header`: somebody else has written there, and it stays as it is. The device failed: the namespace looks as if this host had it.
    pub fn release(&self) -> Result<(), NvmeError> {
        let area = self.map_begin(PAGE_BYTES)?;
        let content = self.book().content()?;
        match self.read_begin(&area)? {
            Found::Header(Header { owner, generation, host, frames, .. })
                if content == Some(Content { owner, generation }) =>
            {
                self.write_begin(&area, &Header { state: State::Released, owner, generation, host, frames })?;
                tracing::info!("Namespace is given back");
                Ok(())
            }
            _ => Err(HeaderError::Changed.into()),
        }
    }

    /// Who has it, and which life it is in.
    ///
    /// # Errors
    /// The vault's memory.
    pub fn content(&self) -> Result<Option<Content>, NvmeError> {
        Ok(self.book().content()?)
    }

    /// What the vault's memory says of the frames.
    fn book(&self) -> Book<'_> {
        let (memory, layout) = self.controller.memory();
        Book::new(memory.window(), layout)
    }

    /// Memory for the namespace's first bytes.
    fn map_begin(&self, bytes: u64) -> Result<DmaMapping, NvmeError> {
        let area = DmaMemory::create("uhmm-nvme-header", bytes)?;
        Ok(self.controller.device().map_dma(&area, DmaRight::ReadWrite, u64::MAX)?)
    }

    /// What as many bytes hold as there is memory for.
    fn read_begin(&self, area: &DmaMapping) -> Result<Found, NvmeError> {
        let len = area.window().len();
        self.controller.run(self.pieces(Opcode::Read, 0, len, area.iova(0)))?;
        let mut bytes = vec![0; len as usize];
        area.window().read(0, &mut bytes)?;
        Ok(Found::decode(&bytes))
    }

    /// The header, then zeroes. Returns when it is on the medium.
    fn write_begin(&self, area: &DmaMapping, header: &Header) -> Result<(), NvmeError> {
        let len = area.window().len();
        area.window().fill(0, len, 0)?;
        area.window().write(0, &header.encode())?;
        self.controller.run(self.pieces(Opcode::WriteThrough, 0, len, area.iova(0)))?;
        self.controller.run([Request { opcode: Opcode::Flush, lba: 0, blocks: 1, iova: 0, bytes: 0 }])
    }

    /// Size.
    pub fn frame_count(&self) -> u32 {
        self.frames
    }

    /// The controller.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Commands that move `bytes` (whole blocks) between the namespace from byte `at` on and memory from `iova` (a page) on.
    fn pieces(&self, opcode: Opcode, at: u64, bytes: u64, iova: u64) -> impl Iterator<Item = Request> + use<> {
        let (shift, piece) = (self.identity.namespace.block_shift, self.identity.piece_bytes());
        (0..bytes).step_by(piece as usize).map(move |offset| {
            let len = piece.min(bytes - offset);
            let (lba, blocks) = ((at + offset) >> shift, (len >> shift) as u32);
            Request { opcode, lba, blocks, iova: iova + offset, bytes: len as u32 }
        })
    }

    fn range(&self, frames: Frames) -> Result<(u64, u64), NvmeError> {
        let inside = frames.first.checked_add(frames.count).is_some_and(|end| end <= self.frames);
        let byte = |count: u32| u64::from(count) * PAGE_BYTES;
        inside.then(|| (HEADER_BYTES + byte(frames.first), byte(frames.count))).ok_or(NvmeError::Bounds)
    }

    /// Frames to mapped memory.
    ///
    /// # Errors
    /// `Bounds`, `Request`: the memory holds anything then.
    pub fn read(&self, frames: Frames, iova: u64) -> Result<(), NvmeError> {
        self.start_read(frames, iova)?.finish()
    }

    /// The same, without waiting.
    ///
    /// # Errors
    /// `Bounds`; a register could not be reached.
    pub fn start_read(&self, frames: Frames, iova: u64) -> Result<InFlight, NvmeError> {
        let (at, bytes) = self.range(frames)?;
        self.controller.submit(self.pieces(Opcode::Read, at, bytes, iova))
    }

    /// Mapped memory to frames.
    ///
    /// # Errors
    /// `Bounds`, `Request`: the frames hold anything then.
    pub fn write(&self, frames: Frames, iova: u64) -> Result<(), NvmeError> {
        self.start_write(frames, iova)?.finish()
    }

    /// The same, without waiting.
    ///
    /// # Errors
    /// As [`Namespace::start_read`].
    pub fn start_write(&self, frames: Frames, iova: u64) -> Result<InFlight, NvmeError> {
        let (at, bytes) = self.range(frames)?;
        self.controller.submit(self.pieces(Opcode::Write, at, bytes, iova))
    }

    /// Frames become zero: by Write Zeroes, or by writing zeroes where the controller has none.
    ///
    /// # Errors
    /// As [`Namespace::write`].
    pub fn zero(&self, frames: Frames) -> Result<(), NvmeError> {
        let (at, bytes) = self.range(frames)?;
        let requests: Box<dyn Iterator<Item = Request>> = if self.identity.controller.write_zeroes {
            let shift = self.identity.namespace.block_shift;
            let step = self.identity.zero_blocks_max() << shift;
            Box::new((0..bytes).step_by(step as usize).map(move |offset| {
                let (lba, blocks) = ((at + offset) >> shift, (step.min(bytes - offset) >> shift) as u32);
                Request { opcode: Opcode::WriteZeroes, lba, blocks, iova: 0, bytes: 0 }
            }))
        } else {
            let (memory, layout) = self.controller.memory();
            let zeroes = memory.iova(layout.zeroes());
            let pieces = (0..bytes).step_by(ZEROES_BYTES as usize);
            let this = self.clone();
            Box::new(pieces.flat_map(move |offset| {
                this.pieces(Opcode::Write, at + offset, ZEROES_BYTES.min(bytes - offset), zeroes)
            }))
        };
        let mut requests = requests.peekable();
        while requests.peek().is_some() {
            self.controller.run(requests.by_ref().take(ZERO_BATCH))?;
        }
        Ok(())
    }
}

fn draw() -> Result<u64, NvmeError> {
    let mut bytes = [0; 8];
    random_bytes(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// This machine, or 0: FNV-1a of its machine id, which itself is nobody else's business.
fn host_id() -> u64 {
    let text = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let text = text.trim();
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    if text.is_empty() { 0 } else { hash }
}
