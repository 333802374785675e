//! All of a device out or home, as the pager does it: chunks of 2 MiB, as many as staging has room for.

use std::time::{Duration, Instant};

use uhmm_driver_block::engine::BlockEngine;
use uhmm_driver_kit::{CopyEngine, CopyOp, CopyWork, DeviceError, Frames, PAGE_BYTES, StagedCopy, Staging, StagingUse};

/// For people.
pub const MIB: u64 = 1 << 20;
/// All of it.
pub const LEN: u64 = 256 * MIB;
/// Frames of a copy of the pager's.
const CHUNK: u32 = 512;
const CHUNKS: u32 = (LEN / PAGE_BYTES) as u32 / CHUNK;
/// Staging areas of the pager's usual size have room for so many.
const STAGED: u32 = 8;

/// As many copies as staging has room for, over and over.
struct Copies {
    op: CopyOp,
    next: u32,
    room: Vec<u32>,
    failed: Option<String>,
}

impl CopyWork for Copies {
    fn next(&mut self) -> Option<StagedCopy> {
        if self.next == CHUNKS {
            return None;
        }
        let staging_page = self.room.pop()?;
        let frames = Frames { first: self.next * CHUNK, count: CHUNK };
        self.next += 1;
        Some(StagedCopy { ticket: u64::from(self.next), op: self.op, frames, staging_page })
    }

    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>) {
        self.room.push(copy.staging_page);
        self.failed = self.failed.take().or(outcome.err().map(|error| error.to_string()));
    }
}

fn mib_per_s(time: Duration) -> f64 {
    LEN as f64 / MIB as f64 / time.as_secs_f64()
}

/// MiB a second.
pub fn copy_all(engine: &mut BlockEngine, staging: &Staging, op: CopyOp) -> f64 {
    let mut work = Copies { op, next: 0, room: (0..STAGED).map(|at| at * CHUNK).collect(), failed: None };
    let begin = Instant::now();
    while work.next < CHUNKS {
        engine.serve(staging, &mut work);
    }
    assert_eq!(work.failed, None);
    mib_per_s(begin.elapsed())
}

/// A staging area of the pager's, with something in it.
pub fn staging() -> Staging {
    let staging = Staging::create(StagingUse::Pager, u64::from(STAGED * CHUNK) * PAGE_BYTES).expect("memory");
    staging.window.fill(0, staging.window.len(), 0x5a).expect("filled");
    staging
}
