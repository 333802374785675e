//! The kit's parts: device memory without an aperture, its copy engine, and the compute units' way to a frame. Each has a lane of its own.

use std::ops::Range;
use std::time::Duration;

use uhmm_compute::{FramePort, Late};
use uhmm_driver_kit::{
    CopyEngine, CopyOp, CopyWork, DeviceError, DeviceMemory, Each, Frames, LostFrames, PAGE_BYTES, StagedCopy, Staging,
};
use uhmm_ipc::message::{Aperture, Fd};
use uhmm_kernel_hook::{HookError, Window};

use crate::lane::Lane;
use crate::machine::{Ask, Failure, Fault, Limits, Op};
use crate::table::Life;

/// Copies in the machine at once: enough that no slot of [`COPY_LIMITS`] waits for the pager.
const COPIES_MAX: usize = 8;

/// The copy engine's lane. It waits long: a disk that does not answer has nobody who could do better.
pub const COPY_LIMITS: Limits =
    Limits { depth: 32, writes: 24, deadline_us: 60_000_000, write_deadline_us: 60_000_000, tries: 3, pause_us: 1000 };

/// A unit's lane: a page at a time. It works inside the gate, and the pager waits two seconds for that; then it comes again ([`Late`]).
pub const UNIT_LIMITS: Limits =
    Limits { depth: 4, writes: 3, deadline_us: 1_500_000, write_deadline_us: 1_500_000, tries: 2, pause_us: 1000 };

/// A job waits for a disk as long as the copy engine.
pub const UNIT_PATIENCE: Duration = Duration::from_micros(COPY_LIMITS.deadline_us);

/// What blocks lie on, as the kit's loop sees it.
pub trait Hold: std::fmt::Debug {
    /// What the vault keeps beside the table.
    fn kept(&self) -> Vec<(String, Fd)>;

    /// The system ends in order.
    ///
    /// # Errors
    /// It cannot be told to the medium.
    fn give_back(&mut self, life: Life) -> Result<(), DeviceError>;

    /// As [`DeviceMemory::tell`].
    fn tell(&self, _each: &mut Each<'_>) {}
}

/// What the frames are.
#[derive(Debug)]
pub struct BlockMemory {
    medium: Box<dyn Hold>,
    frames: u32,
    table: Fd,
    life: Life,
}

/// Vault name of the block table.
pub const TABLE_NAME: &str = "driver/block-table";
/// Vault name of the open file.
pub const FILE_NAME: &str = "driver/block-file";

impl BlockMemory {
    /// A medium and the table of what lies on it.
    pub fn new(medium: Box<dyn Hold>, frames: u32, table: Fd, life: Life) -> Self {
        Self { medium, frames, table, life }
    }
}

impl DeviceMemory for BlockMemory {
    fn frame_count(&self) -> u32 {
        self.frames
    }

    fn aperture(&self) -> Option<Aperture> {
        None
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        let table = (TABLE_NAME.to_owned(), self.table.clone());
        self.medium.kept().into_iter().chain([table]).collect()
    }

    fn give_back(&mut self) -> Result<(), DeviceError> {
        self.medium.give_back(self.life)
    }

    fn tell(&self, each: &mut Each<'_>) {
        self.medium.tell(each);
    }
}

/// What the kit is told of a copy that failed: of one that reads, which frames are lost for good.
fn told(op: CopyOp, failure: Failure) -> DeviceError {
    let Failure { fault, pages } = failure;
    let reason = format!("{} of its pages were not moved: {fault}", pages.len());
    let (CopyOp::CopyOut, Some(good)) = (op, pages.first().copied()) else { return reason.into() };
    let lost = pages.iter().zip(good..).take_while(|(page, expected)| *page == expected).count() as u32;
    Box::new(LostFrames { good, lost, reason: fault.to_string() })
}

/// See the module head.
#[derive(Debug)]
pub struct BlockEngine {
    lane: Lane,
}

impl BlockEngine {
    /// Works on this lane.
    pub fn new(lane: Lane) -> Self {
        Self { lane }
    }

    fn run(&mut self, staging: &Staging, op: CopyOp, frames: Frames, place: u32) -> Result<(), DeviceError> {
        // No copy of the pager's is open now.
        let ask = Ask { ticket: 0, op: operation(op), frames, place: u64::from(place) };
        self.lane.run(&staging.window, ask).map_err(|failure| told(op, failure))
    }
}

fn operation(op: CopyOp) -> Op {
    match op {
        CopyOp::CopyIn => Op::Write,
        CopyOp::CopyOut => Op::Read,
        CopyOp::Scrub => Op::Zero,
    }
}

impl CopyEngine for BlockEngine {
    /// The processor reaches it as it is.
    fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, staging_page: u32, frames: Frames) -> Result<(), DeviceError> {
        self.run(staging, CopyOp::CopyIn, frames, staging_page)
    }

    fn copy_out(&mut self, frames: Frames, staging: &Staging, staging_page: u32) -> Result<(), DeviceError> {
        self.run(staging, CopyOp::CopyOut, frames, staging_page)
    }

    fn scrub(&mut self, frames: Frames) -> Result<(), DeviceError> {
        // Moves no byte: its memory is nobody's.
        let nothing = Window::anonymous(PAGE_BYTES)?;
        let ask = Ask { ticket: 0, op: Op::Zero, frames, place: 0 };
        self.lane.run(&nothing, ask).map_err(|failure| told(CopyOp::Scrub, failure))
    }

    /// The next copies are under way before the first one has ended.
    fn serve(&mut self, staging: &Staging, work: &mut dyn CopyWork) {
        let mut open: Vec<StagedCopy> = Vec::new();
        loop {
            while open.len() < COPIES_MAX
                && let Some(copy) = work.next()
            {
                open.push(copy);
                let StagedCopy { ticket, op, frames, staging_page } = copy;
                // A scrub's staging page means nothing.
                let place = if op == CopyOp::Scrub { 0 } else { u64::from(staging_page) };
                self.lane
                    .ask(&staging.window, Ask { ticket: ticket.wrapping_add(1), op: operation(op), frames, place });
            }
            for (ticket, result) in self.lane.ended() {
                let Some(at) = open.iter().position(|copy| copy.ticket.wrapping_add(1) == ticket) else { continue };
                let copy = open.swap_remove(at);
                work.done(copy, result.map_err(|failure| told(copy.op, failure)));
            }
            if open.is_empty() {
                return;
            }
            self.lane.step(&staging.window);
        }
    }
}

/// A compute unit's page.
#[derive(Debug)]
pub struct BlockPort {
    lane: Lane,
    page: Window,
    patience: Duration,
}

impl BlockPort {
    /// With a new page. A job waits for the medium as long as the copy engine would, though never inside the gate.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(lane: Lane, patience: Duration) -> Result<Self, HookError> {
        Ok(Self { lane, page: Window::anonymous(PAGE_BYTES)?, patience })
    }

    fn run(&mut self, op: Op, frame: u32) -> Result<(), DeviceError> {
        let ask = Ask { ticket: 0, op, frames: Frames { first: frame, count: 1 }, place: 0 };
        let patience = self.patience;
        self.lane.run(&self.page, ask).map_err(|failure| match failure.fault {
            fault @ Fault::Late(_) => Late { patience, reason: fault.to_string() }.into(),
            fault => fault.into(),
        })
    }
}

/// Whole frames always: that is what a seal is for.
impl FramePort for BlockPort {
    fn page(&self) -> &Window {
        &self.page
    }

    fn load(&mut self, frame: u32, _: Range<u64>) -> Result<(), DeviceError> {
        self.run(Op::Read, frame)
    }

    fn store(&mut self, frame: u32, _: Range<u64>) -> Result<(), DeviceError> {
        self.run(Op::Write, frame)
    }
}
