//! IGT's matrix: shapes of execution x kinds of memory. A step of every execution:
//!
//! ```text
//!   CPU writes --> device reads, compares --> device writes --> CPU (and a forked child) reads, compares --> perhaps mremap
//! ```

mod buffer;
mod step;

use crate::case::{CaseResult, During, Registry, ensure};
use crate::ctx::Ctx;
use crate::mem::PAGE;

use buffer::{Source, make};
use step::{Step, run_step};

/// How a mapping is moved between executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moves {
    /// MREMAP_DONTUNMAP.
    keep_old: bool,
    /// The device finds the moved mapping read-only once.
    read_only: bool,
    /// Only every other execution.
    every_other: bool,
}

/// One kind of memory and what is done with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    name: &'static str,
    source: Source,
    prefetch: bool,
    multi_fault: bool,
    fork_read: bool,
    lock: bool,
    race: bool,
    busy: bool,
    moves: Option<Moves>,
    fresh: bool,
    no_memset: bool,
    advise: bool,
}

const PLAIN: Kind = Kind {
    name: "malloc",
    source: Source::Heap,
    prefetch: false,
    multi_fault: false,
    fork_read: false,
    lock: false,
    race: false,
    busy: false,
    moves: None,
    fresh: false,
    no_memset: false,
    advise: false,
};

const MMAP: Kind = Kind { name: "mmap", source: Source::Mmap, ..PLAIN };
const MOVED: Moves = Moves { keep_old: false, read_only: false, every_other: false };

const KINDS: [Kind; 32] = [
    PLAIN,
    Kind { name: "malloc-nomemset", no_memset: true, ..PLAIN },
    Kind { name: "malloc-madvise", advise: true, ..PLAIN },
    Kind { name: "malloc-prefetch", prefetch: true, ..PLAIN },
    Kind { name: "malloc-prefetch-madvise", prefetch: true, advise: true, ..PLAIN },
    Kind { name: "malloc-multi-fault", multi_fault: true, ..PLAIN },
    Kind { name: "malloc-fork-read", fork_read: true, ..PLAIN },
    Kind { name: "malloc-mlock", lock: true, ..PLAIN },
    Kind { name: "malloc-mlock-nomemset", lock: true, no_memset: true, ..PLAIN },
    Kind { name: "malloc-race", race: true, ..PLAIN },
    Kind { name: "malloc-race-nomemset", race: true, no_memset: true, ..PLAIN },
    Kind { name: "malloc-busy", busy: true, ..PLAIN },
    Kind { name: "new", fresh: true, ..PLAIN },
    Kind { name: "new-nomemset", fresh: true, no_memset: true, ..PLAIN },
    Kind { name: "new-race", fresh: true, race: true, ..PLAIN },
    MMAP,
    Kind { name: "mmap-nomemset", no_memset: true, ..MMAP },
    Kind { name: "mmap-new", fresh: true, ..MMAP },
    Kind { name: "mmap-new-race-nomemset", fresh: true, race: true, no_memset: true, ..MMAP },
    Kind { name: "mmap-mlock", lock: true, ..MMAP },
    Kind { name: "mmap-remap", moves: Some(MOVED), ..MMAP },
    Kind { name: "mmap-remap-eocheck", moves: Some(Moves { every_other: true, ..MOVED }), ..MMAP },
    Kind { name: "mmap-remap-dontunmap", moves: Some(Moves { keep_old: true, ..MOVED }), ..MMAP },
    Kind { name: "mmap-remap-ro", moves: Some(Moves { read_only: true, ..MOVED }), ..MMAP },
    Kind {
        name: "mmap-remap-ro-dontunmap-eocheck",
        moves: Some(Moves { keep_old: true, read_only: true, every_other: true }),
        ..MMAP
    },
    Kind { name: "mmap-huge", source: Source::Huge, ..PLAIN },
    Kind { name: "mmap-huge-nomemset", source: Source::Huge, no_memset: true, ..PLAIN },
    Kind { name: "mmap-shared", source: Source::Shared, ..PLAIN },
    Kind { name: "mmap-shared-remap", source: Source::Shared, moves: Some(MOVED), ..PLAIN },
    Kind { name: "mmap-file", source: Source::File, ..PLAIN },
    Kind { name: "mmap-file-mlock", source: Source::File, lock: true, ..PLAIN },
    Kind { name: "region", source: Source::Region, ..PLAIN },
];

/// How executions follow each other.
#[derive(Clone, Copy, Debug)]
struct Shape {
    name: &'static str,
    execs: u64,
    len: u64,
    stride: bool,
    all_devices: bool,
    threads: u64,
    shared: bool,
    processes: u64,
}

const ONCE: Shape = Shape {
    name: "once",
    execs: 1,
    len: PAGE,
    stride: false,
    all_devices: false,
    threads: 1,
    shared: true,
    processes: 1,
};

const SHAPES: [Shape; 10] = [
    ONCE,
    Shape { name: "twice", execs: 2, ..ONCE },
    Shape { name: "many", execs: 32, ..ONCE },
    Shape { name: "many-stride", execs: 32, stride: true, ..ONCE },
    Shape { name: "many-execqueues", execs: 16, all_devices: true, ..ONCE },
    Shape { name: "many-64k", execs: 8, len: 16 * PAGE, ..ONCE },
    Shape { name: "many-large", execs: 3, len: 600 * PAGE, ..ONCE },
    Shape { name: "threads-many", execs: 8, threads: 4, shared: false, ..ONCE },
    Shape { name: "threads-shared-vm-many-stride", execs: 8, stride: true, threads: 4, ..ONCE },
    Shape { name: "process-many", execs: 8, processes: 3, ..ONCE },
];

pub(super) fn register(list: &mut Registry) {
    for shape in SHAPES {
        for kind in KINDS {
            // Threads that share one buffer cannot each move or replace it.
            if shape.threads > 1 && shape.shared && (kind.moves.is_some() || kind.fresh || kind.busy) {
                continue;
            }
            list.one(format!("IGT.{}.{}", shape.name, kind.name), move |ctx| run(ctx, shape, kind));
        }
    }
}

fn run(ctx: &Ctx, shape: Shape, kind: Kind) -> CaseResult {
    if kind.fork_read {
        ctx.needs_fork()?;
    }
    // Each thread of each process has a command of its own on its way.
    ctx.fits(shape.processes * shape.threads * shape.len)?;
    if shape.processes > 1 && ctx.role().is_none() {
        let role = ["process".to_owned()];
        let helpers = (0..shape.processes).map(|_| ctx.spawn(&role)).collect::<CaseResult<Vec<_>>>()?;
        return helpers.into_iter().try_for_each(|helper| helper.join());
    }
    if shape.threads == 1 {
        return run_thread(ctx, shape, kind, 0);
    }
    if shape.shared {
        return run_shared(ctx, shape, kind);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..shape.threads).map(|index| scope.spawn(move || run_thread(ctx, shape, kind, index))).collect();
        threads.into_iter().try_for_each(super::joined)
    })
}

fn step_of(ctx: &Ctx, shape: Shape, index: u64) -> Step {
    let devices = if shape.all_devices { ctx.device_count() as u64 } else { 1 };
    Step {
        index,
        device: (index % devices) as usize,
        off: if shape.stride { index * shape.len } else { 0 },
        len: shape.len,
        first_touch: shape.stride || index == 0,
    }
}

fn run_thread(ctx: &Ctx, shape: Shape, kind: Kind, thread: u64) -> CaseResult {
    let len = shape.len * if shape.stride { shape.execs } else { 1 };
    let mut buffer = make(ctx, &kind, len)?;
    for index in 0..shape.execs {
        let mut step = step_of(ctx, shape, index);
        if kind.fresh && index > 0 {
            buffer.give_back(ctx)?;
            buffer = make(ctx, &kind, len)?;
            step.first_touch = true;
        }
        buffer = run_step(ctx, &kind, buffer, step, thread).during(&format!("execution {index}"))?;
    }
    buffer.give_back(ctx)
}

/// Threads share a buffer; each has its own pages of it.
fn run_shared(ctx: &Ctx, shape: Shape, kind: Kind) -> CaseResult {
    let len = shape.len * shape.execs * shape.threads;
    let buffer = make(ctx, &kind, len)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..shape.threads)
            .map(|thread| {
                let buffer = &buffer;
                scope.spawn(move || -> CaseResult {
                    for index in 0..shape.execs {
                        let mut step = step_of(ctx, shape, index);
                        step.off = (index * shape.threads + thread) * shape.len;
                        step::exec(ctx, &kind, buffer, step, thread).during(&format!("execution {index}"))?;
                    }
                    Ok(())
                })
            })
            .collect();
        ensure!(!threads.is_empty(), "A shape without threads");
        threads.into_iter().try_for_each(super::joined)
    })?;
    buffer.give_back(ctx)
}
