//! Frames behind a port: a device that moves blocks of 512 bytes and forgets the page in between.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use uhmm_driver_kit::StagingUse;

use super::*;

const BLOCK: u64 = 512;

/// Memory that only blocks come out of; counts what was moved.
#[derive(Debug)]
struct Disk {
    blocks: Mutex<Vec<u8>>,
    loaded_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    broken: bool,
}

impl Disk {
    fn new(frames: usize, broken: bool) -> Arc<Self> {
        let blocks = Mutex::new(vec![0; frames * PAGE_BYTES as usize]);
        Arc::new(Self { blocks, loaded_bytes: AtomicU64::new(0), stored_bytes: AtomicU64::new(0), broken })
    }

    fn word(&self, at: u64) -> u64 {
        let blocks = self.blocks.lock().expect("no test panics under it");
        let bytes = blocks[at as usize..at as usize + 8].try_into().expect("eight bytes");
        u64::from_ne_bytes(bytes)
    }

    fn moved(&self) -> (u64, u64) {
        (self.loaded_bytes.swap(0, Ordering::Relaxed), self.stored_bytes.swap(0, Ordering::Relaxed))
    }
}

struct DiskPort {
    disk: Arc<Disk>,
    page: Window,
}

impl DiskPort {
    fn blocks(part: &Range<u64>) -> Range<u64> {
        part.start / BLOCK * BLOCK..part.end.next_multiple_of(BLOCK)
    }

    fn place(&self, frame: u32, blocks: &Range<u64>) -> Result<Range<usize>, DeviceError> {
        let at = u64::from(frame) * PAGE_BYTES;
        if self.disk.broken {
            return Err("Medium error".into());
        }
        Ok((at + blocks.start) as usize..(at + blocks.end) as usize)
    }
}

impl FramePort for DiskPort {
    fn page(&self) -> &Window {
        &self.page
    }

    fn load(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        let blocks = Self::blocks(&part);
        let place = self.place(frame, &blocks)?;
        // Whatever was there before is no help.
        self.page.fill(0, PAGE_BYTES, 0xee)?;
        self.disk.loaded_bytes.fetch_add(blocks.end - blocks.start, Ordering::Relaxed);
        Ok(self.page.write(blocks.start, &self.disk.blocks.lock().expect("no test panics under it")[place])?)
    }

    fn store(&mut self, frame: u32, part: Range<u64>) -> Result<(), DeviceError> {
        let blocks = Self::blocks(&part);
        let place = self.place(frame, &blocks)?;
        self.disk.stored_bytes.fetch_add(blocks.end - blocks.start, Ordering::Relaxed);
        let mut bytes = vec![0; place.len()];
        self.page.read(blocks.start, &mut bytes)?;
        // Other units come in here if nothing keeps them out.
        std::thread::yield_now();
        self.disk.blocks.lock().expect("no test panics under it")[place].copy_from_slice(&bytes);
        Ok(())
    }
}

fn unit(disk: &Arc<Disk>, locks: &Arc<FrameLocks>) -> Result<UnitFrames, DeviceError> {
    let port = DiskPort { disk: disk.clone(), page: Window::anonymous(PAGE_BYTES)? };
    Ok(UnitFrames::Port(Box::new(port), locks.clone()))
}

#[test]
fn a_port_moves_no_more_than_the_access_needs() -> Result<(), DeviceError> {
    let disk = Disk::new(3, false);
    let mut unit = unit(&disk, &Arc::default())?;
    unit.access(1, 1016, 8, Right::Write, &mut |bytes, at| bytes.store_u64(at, 77))?;
    assert_eq!((disk.word(PAGE_BYTES + 1016), disk.moved()), (77, (512, 512)));
    unit.access(1, 1020, 8, Right::Write, &mut |bytes, at| bytes.write(at, &[1; 8]))?;
    assert_eq!(disk.moved(), (1024, 1024), "two blocks");
    let word = unit.access(1, 1016, 8, Right::Read, &mut |bytes, at| bytes.load_u64(at))?;
    assert_eq!((word, disk.moved()), (0x0101_0101_0000_004d, (512, 0)), "the bytes beside it stayed");
    unit.access(2, 0, 4096, Right::Write, &mut |bytes, at| bytes.write(at, &[9; 4096]))?;
    assert_eq!(disk.moved(), (0, 4096), "a whole page needs nothing of the old one");
    let old =
        unit.access(2, 8, 8, Right::Atomic, &mut |bytes, at| Ok(bytes.atomic_u64(at)?.fetch_add(1, Ordering::SeqCst)))?;
    assert_eq!((old, disk.word(2 * PAGE_BYTES + 8)), (0x0909_0909_0909_0909, 0x0909_0909_0909_090a));
    assert_eq!(disk.word(PAGE_BYTES - 8), 0, "frame 0 is untouched");
    Ok(())
}

#[test]
fn units_and_engine_lose_nothing_of_each_other() -> Result<(), DeviceError> {
    const TIMES: u64 = 2_000;
    let (disk, locks) = (Disk::new(1, false), Arc::<FrameLocks>::default());
    let mut units = [unit(&disk, &locks)?, unit(&disk, &locks)?];
    let engine = LockedEngine::new(DiskEngine(unit(&disk, &Arc::default())?), locks);
    std::thread::scope(|scope| {
        let add = |unit: &mut UnitFrames| {
            for _ in 0..TIMES {
                let added = unit.access(0, 64, 8, Right::Atomic, &mut |bytes, at| {
                    Ok(bytes.atomic_u64(at)?.fetch_add(1, Ordering::SeqCst))
                });
                added.expect("the disk works");
            }
        };
        for unit in &mut units {
            scope.spawn(move || add(unit));
        }
        // The engine rewrites the frame; what units add in between is never undone by half.
        scope.spawn(move || {
            let (mut engine, staging) = (engine, Staging::create(StagingUse::Access, PAGE_BYTES).expect("memory"));
            for round in 0..100 {
                staging.window.store_u64(72, round).expect("inside");
                engine.copy_in(&staging, 0, Frames { first: 0, count: 1 }).expect("the disk works");
            }
        });
    });
    assert_eq!((disk.word(64), disk.word(72)), (2 * TIMES, 99));
    Ok(())
}

/// Writes the block's second word and keeps the rest, by reading first: the kind of engine that needs the locks.
struct DiskEngine(UnitFrames);

impl CopyEngine for DiskEngine {
    fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
        Ok(())
    }

    fn copy_in(&mut self, staging: &Staging, _: u32, frames: Frames) -> Result<(), DeviceError> {
        let value = staging.window.load_u64(72)?;
        Ok(self.0.access(frames.first, 72, 8, Right::Write, &mut |bytes, at| bytes.store_u64(at, value))?)
    }

    fn copy_out(&mut self, _: Frames, _: &Staging, _: u32) -> Result<(), DeviceError> {
        Err("Not used here".into())
    }

    fn scrub(&mut self, _: Frames) -> Result<(), DeviceError> {
        Err("Not used here".into())
    }
}

#[test]
fn a_device_that_fails_fails_the_access_and_says_what_it_was_doing() -> Result<(), DeviceError> {
    let mut unit = unit(&Disk::new(1, true), &Arc::default())?;
    let text = |outcome: Result<(), FrameError>| outcome.map_err(|error| error.to_string());
    let read = text(unit.access(7, 0, 8, Right::Read, &mut |_, _| Ok(())));
    assert_eq!(read, Err("The device could not read frame 7: Medium error".into()));
    let write = text(unit.access(7, 0, 4096, Right::Write, &mut |_, _| Ok(())));
    assert_eq!(write, Err("The device could not write frame 7: Medium error".into()));
    Ok(())
}

#[test]
fn more_frames_than_locks_are_locked_once_each() {
    let locks = FrameLocks::default();
    let all = locks.write_all(Frames { first: 100, count: 3 * LOCK_COUNT as u32 });
    assert_eq!(all.len(), LOCK_COUNT);
    drop(all);
    assert_eq!(locks.write_all(Frames { first: u32::MAX - 2, count: 50 }).len(), 2);
}

/// Has as much in flight as it is given, and ends the oldest first.
#[derive(Default)]
struct DeepEngine {
    most: usize,
    overlapped: bool,
}

impl CopyEngine for DeepEngine {
    fn attach(&mut self, _: &Staging) -> Result<(), DeviceError> {
        Ok(())
    }

    fn copy_in(&mut self, _: &Staging, _: u32, _: Frames) -> Result<(), DeviceError> {
        Ok(())
    }

    fn copy_out(&mut self, _: Frames, _: &Staging, _: u32) -> Result<(), DeviceError> {
        Ok(())
    }

    fn scrub(&mut self, _: Frames) -> Result<(), DeviceError> {
        Ok(())
    }

    fn serve(&mut self, _: &Staging, work: &mut dyn CopyWork) {
        let mut in_flight: VecDeque<StagedCopy> = VecDeque::new();
        loop {
            while let Some(copy) = work.next() {
                self.overlapped |= in_flight.iter().any(|other| {
                    copy.op != CopyOp::CopyOut && other.op != CopyOp::CopyOut && other.frames.first == copy.frames.first
                });
                in_flight.push_back(copy);
            }
            self.most = self.most.max(in_flight.len());
            let Some(copy) = in_flight.pop_front() else { return };
            work.done(copy, Ok(()));
        }
    }
}

struct Listed {
    asked: VecDeque<StagedCopy>,
    ended: Vec<u64>,
}

impl CopyWork for Listed {
    fn next(&mut self) -> Option<StagedCopy> {
        self.asked.pop_front()
    }

    fn done(&mut self, copy: StagedCopy, outcome: Result<(), DeviceError>) {
        outcome.expect("nothing fails");
        self.ended.push(copy.ticket);
    }
}

#[test]
fn copies_in_flight_never_wait_for_locks_of_their_own_thread() -> Result<(), DeviceError> {
    let copy = |ticket, op, first, count| StagedCopy { ticket, op, frames: Frames { first, count }, staging_page: 0 };
    let other_with_that_lock = 5 + LOCK_COUNT as u32;
    let asked = [
        copy(0, CopyOp::CopyIn, 0, 4),
        copy(1, CopyOp::CopyIn, 5, 4),
        // Waits for the one before it, and the next for it.
        copy(2, CopyOp::Scrub, 5, 1),
        copy(3, CopyOp::CopyIn, other_with_that_lock, 1),
        copy(4, CopyOp::CopyOut, 5, 1),
    ];
    let mut work = Listed { asked: asked.into(), ended: Vec::new() };
    let locks = Arc::<FrameLocks>::default();
    let mut engine = LockedEngine::new(DeepEngine::default(), locks.clone());
    let staging = Staging::create(StagingUse::Pager, PAGE_BYTES)?;
    engine.serve(&staging, &mut work);
    work.ended.sort_unstable();
    assert_eq!(work.ended, [0, 1, 2, 3, 4]);
    assert!(engine.engine.most >= 2 && !engine.engine.overlapped);
    assert_eq!(
        locks.try_write_all(Frames { first: 0, count: LOCK_COUNT as u32 }).map(|all| all.len()),
        Some(LOCK_COUNT)
    );
    Ok(())
}
