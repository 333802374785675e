//! What goes into the machine, and what comes out.

use crate::machine::Step;
use crate::protocol::{Command, Completion, ControllerStatus, IdentifyError, Opcode, QueueId, Status};
use crate::queue::{Placed, QueueFault};

/// Chosen by the shell, unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One I/O command to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub opcode: Opcode,
    /// First block.
    pub lba: u64,
    /// Blocks, 1 to 65536.
    pub blocks: u32,
    /// Where its memory begins for the device, a multiple of the page size.
    pub iova: u64,
    /// Bytes of that memory; 0 for commands without.
    pub bytes: u32,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The device said so.
    #[error("{:?} of {} blocks at block {} failed {attempts} times: {status}", request.opcode, request.blocks, request.lba)]
    Status {
        /// Which one.
        request: Request,
        /// The last answer.
        status: Status,
        /// How often it was sent.
        attempts: u8,
    },
    /// It was sent again and again, and the controller reset each time.
    #[error("{:?} of {} blocks at block {} was never answered ({attempts} attempts)", request.opcode, request.blocks, request.lba)]
    NoAnswer {
        /// Which one.
        request: Request,
        /// How often it was sent.
        attempts: u8,
    },
    /// The controller was given up.
    #[error("The controller does not work, see the log")]
    Dead,
    /// It was unplugged.
    #[error("The controller was removed")]
    Gone,
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Begin, or try again.
    Start,
    /// A request; it ends with one [`Action::Finish`].
    Submit {
        /// Its name.
        id: RequestId,
        /// What.
        request: Request,
    },
    /// Whether somebody looks for completions all the time: which pair requests go to.
    Pace {
        /// Somebody does.
        looking: bool,
    },
    /// CSTS was read.
    Status(ControllerStatus),
    /// The entry at [`crate::machine::Machine::next_completion`] has its phase.
    Completion {
        /// Queue.
        queue: QueueId,
        /// Entry.
        entry: Completion,
    },
    /// Answer to [`Action::ReadIdentify`].
    Identified {
        /// The page.
        page: &'a [u8],
    },
    /// Answer to [`Action::ResetFunction`].
    FunctionReset {
        /// The backend says that it worked.
        done: bool,
    },
    /// Time has passed.
    Tick,
}

/// What the shell does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A register of 32 bits.
    Store32 {
        /// Where.
        register: u64,
        /// What.
        value: u32,
    },
    /// A register of 64 bits.
    Store64 {
        /// Where.
        register: u64,
        /// What.
        value: u64,
    },
    /// Rings, counters and marks of all queues become zero.
    ClearQueues,
    /// A command into its slot; its list page, mark and counter before the doorbell rings.
    Place {
        /// Queue.
        queue: QueueId,
        /// Where.
        placed: Placed,
        /// What.
        command: Command,
        /// For the list page: this many addresses, beginning with this one, a page apart.
        list: Option<(u64, u64)>,
    },
    /// Doorbell of the submission queue.
    RingTail {
        /// Queue.
        queue: QueueId,
        /// Value.
        tail: u16,
    },
    /// A completion was taken: the mark of its place goes, then the counter.
    Taken {
        /// Queue.
        queue: QueueId,
        /// Whose mark; `None`: it is gone already.
        place: Option<u16>,
        /// The counter.
        completed: u64,
    },
    /// Doorbell of the completion queue. The last of several is enough.
    RingHead {
        /// Queue.
        queue: QueueId,
        /// Value.
        head: u16,
    },
    /// The identify page is there.
    ReadIdentify,
    /// Function-level reset.
    ResetFunction,
    /// From now on a next incarnation may take the controller over with this many pairs (0: it may not).
    Adoptable {
        /// Pairs of I/O queues.
        pairs: u16,
    },
    /// A request has ended.
    Finish {
        /// Which one.
        id: super::RequestId,
        /// How.
        result: Result<(), RequestError>,
    },
    /// For the log.
    Report(Report),
}

/// What an operator should know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Report {
    /// CSTS.CFS.
    #[error("Controller reports a fatal error: it is reset")]
    Fatal,
    /// CSTS.RDY went away.
    #[error("Controller stopped by itself: it is reset")]
    NotReady,
    /// More admin commands than slots.
    #[error("Admin queue is full: the controller is reset")]
    AdminFull,
    /// An admin command of the setup failed.
    #[error("Controller refuses its setup ({step:?}): {status}")]
    Setup {
        /// Which one.
        step: Step,
        /// What it said.
        status: Status,
    },
    /// Identify pages make no sense, or the namespace cannot be used.
    #[error("Controller or namespace cannot be used: {0}")]
    Identify(IdentifyError),
    /// After a reset it says that it is another one.
    #[error("Another controller or namespace is there now: the device was exchanged")]
    OtherDevice,
    /// Queues of the last incarnation do not work.
    #[error("Queues of the last incarnation do not answer: the controller is reset")]
    Adoption,
    /// A completion that cannot be true.
    #[error("{0}: the controller is reset and everything in flight is sent again")]
    Queue(QueueFault),
    /// The abort came too late or is not possible.
    #[error("Controller could not abort a command")]
    NotAborted,
    /// A request is sent again.
    #[error("{:?} at block {} failed ({status}): it is sent again", request.opcode, request.lba)]
    Retry {
        /// Which one.
        request: Request,
        /// What the device said.
        status: Status,
    },
    /// RDY stays 1.
    #[error("Controller cannot be disabled in the time that it promises")]
    Disable,
    /// RDY stays 0.
    #[error("Controller does not get ready in the time that it promises: it is reset")]
    Enable,
    /// An admin command is late.
    #[error("An admin command is not answered: the controller is reset")]
    AdminLate,
    /// An abort has not helped.
    #[error(
        "Command {id:#06x} of queue {queue} is not answered: the controller is reset and everything in flight is sent again"
    )]
    Late {
        /// Queue.
        queue: u16,
        /// Command.
        id: u16,
    },
    /// A command is late.
    #[error("Command {id:#06x} of queue {queue} is late: it is aborted")]
    Aborting {
        /// Queue.
        queue: u16,
        /// Command.
        id: u16,
    },
    /// No more.
    #[error("Resets do not help: the controller is given up")]
    ResetsUsedUp,
    /// All ones.
    #[error("Controller is gone: registers read as all ones")]
    Gone,
}
