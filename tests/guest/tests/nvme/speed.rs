//! The engine, and migration through the whole system, against a bare queue, in one boot. Only the ratios mean something: everything
//! here is emulated.

use std::time::{Duration, Instant};

use uhmm_driver_kit::{CopyEngine, Frames};
use uhmm_driver_nvme::namespace::Namespace;
use uhmm_driver_nvme::protocol::Opcode;
use uhmm_driver_nvme::shell::{Controller, Options};

use uhmm_sdk::Target;
use uhmm_tests::TestBed;

use crate::raw::Raw;
use crate::{device, engine, path};

const TOTAL_BYTES: u64 = 64 << 20;
const CHUNK_BYTES: u64 = 2 << 20;
const PIECE_BYTES: u64 = 128 << 10;
const SMALL_COUNT: u32 = 400;
/// Each figure is the best of so many, to see the code and not what else the machine did.
const TRIES: u32 = 5;

/// Out, in, one page.
#[derive(Clone, Copy, Debug)]
struct Times {
    write: Duration,
    read: Duration,
    small: Duration,
}

impl Times {
    const NONE: Self = Self { write: Duration::MAX, read: Duration::MAX, small: Duration::MAX };
}

fn timed(best: &mut Duration, act: impl FnOnce()) {
    let begun = Instant::now();
    act();
    *best = begun.elapsed().min(*best);
}

fn raw_times() -> Times {
    let device = device();
    let mut raw = Raw::start(&device, 4 << 20);
    let mut best = Times::NONE;
    for _ in 0..TRIES {
        let pieces = TOTAL_BYTES / PIECE_BYTES;
        timed(&mut best.write, || raw.transfer(Opcode::Write, pieces, PIECE_BYTES, 32));
        timed(&mut best.read, || raw.transfer(Opcode::Read, pieces, PIECE_BYTES, 32));
        timed(&mut best.small, || raw.transfer(Opcode::Read, u64::from(SMALL_COUNT), 4096, 1));
    }
    raw.stop();
    best
}

fn engine_times() -> Times {
    let controller = Controller::open(device(), None, Options::default()).unwrap();
    let (namespace, _) = Namespace::open(controller.clone(), u64::MAX, true).unwrap();
    let (mut engine, staging) = engine(&namespace, CHUNK_BYTES);
    let count = (CHUNK_BYTES >> 12) as u32;
    let mut best = Times::NONE;
    for _ in 0..TRIES {
        let chunks = 0..(TOTAL_BYTES / CHUNK_BYTES) as u32;
        let frames = |chunk: u32| Frames { first: chunk * count, count };
        timed(&mut best.write, || {
            chunks.clone().for_each(|chunk| engine.copy_in(&staging, 0, frames(chunk)).unwrap());
        });
        timed(&mut best.read, || {
            chunks.clone().for_each(|chunk| engine.copy_out(frames(chunk), &staging, 0).unwrap());
        });
        timed(&mut best.small, || {
            (0..SMALL_COUNT).for_each(|first| engine.copy_out(Frames { first, count: 1 }, &staging, 0).unwrap());
        });
    }
    println!("{:?}", controller.counters());
    best
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn the_engine_is_nearly_as_fast_as_a_bare_queue() {
    let (raw, engine) = (raw_times(), engine_times());
    let rate = |time: Duration| TOTAL_BYTES as f64 / time.as_secs_f64() / f64::from(1 << 20);
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(SMALL_COUNT);
    let ratio = |raw: Duration, engine: Duration| raw.as_secs_f64() / engine.as_secs_f64();
    let (write, read) = (ratio(raw.write, engine.write), ratio(raw.read, engine.read));
    let added = each(engine.small) / each(raw.small) - 1.0;
    println!("write: raw {:.0} MiB/s, engine {:.0} MiB/s, ratio {write:.2}", rate(raw.write), rate(engine.write));
    println!("read: raw {:.0} MiB/s, engine {:.0} MiB/s, ratio {read:.2}", rate(raw.read), rate(engine.read));
    println!(
        "4 KiB alone: raw {:.1} us, engine {:.1} us, {:+.0} %",
        each(raw.small),
        each(engine.small),
        added * 100.0
    );
    // The goals are 0.9 and 20 %; what is asserted leaves room for a busy machine and none for a wait that does not belong there.
    assert!(write >= 0.3 && read >= 0.3, "throughput at queue depth 32");
    assert!(added < 3.0, "latency at queue depth 1");
}

/// Shared memory there and back by `session.migrate`: pager, copy ring, driver.
fn system_times(driver: &str, device: &str) -> Times {
    let service =
        |name: &str, kind: &str, more: &str| format!("[[service]]\nname = \"{name}\"\nkind = \"{kind}\"\n{more}\n");
    let services = [
        service("pager", "pager", ""),
        service("mirror", "mirror", ""),
        service("d0", "driver", &format!("driver = \"{driver}\"\n")),
    ];
    let device = format!("[[device]]\nname = \"d0\"\nservice = \"d0\"\nstaging_bytes = \"6MiB\"\n{device}\n");
    let bed = TestBed::with_manifest(&(services.concat() + &device));
    let session = bed.session();
    let device = session.device("d0").unwrap();
    let region = session.allocate(TOTAL_BYTES).unwrap();
    for word in 0..TOTAL_BYTES / 8 {
        region.write_u64(word * 8, word ^ 0x5555).unwrap();
    }
    let mut best = Times::NONE;
    for _ in 0..TRIES {
        timed(&mut best.write, || drop(session.migrate(region.addr(), TOTAL_BYTES, &device).unwrap()));
        timed(&mut best.read, || drop(session.migrate(region.addr(), TOTAL_BYTES, Target::Home).unwrap()));
    }
    for word in 0..TOTAL_BYTES / 8 {
        assert_eq!(region.read_u64(word * 8).unwrap(), word ^ 0x5555);
    }
    best
}

#[test]
#[ignore = "runs in the guest: tests/guest/run nvme"]
fn migration_through_the_system_against_a_bare_queue() {
    let raw = raw_times();
    let system = system_times("nvme", &format!("pci = \"{}\"\nformat = true", path()));
    // The same way with a memcpy at its end: what of the time is not the disk's.
    let soft = system_times("soft", "memory_bytes = \"96MiB\"\naperture = false");
    let rate = |time: Duration| TOTAL_BYTES as f64 / time.as_secs_f64() / f64::from(1 << 20);
    let ratio = |raw: Duration, system: Duration| raw.as_secs_f64() / system.as_secs_f64();
    let (out, home) = (ratio(raw.write, system.write), ratio(raw.read, system.read));
    println!("out: raw {:.0} MiB/s, migration {:.0} MiB/s, ratio {out:.2}", rate(raw.write), rate(system.write));
    println!("home: raw {:.0} MiB/s, migration {:.0} MiB/s, ratio {home:.2}", rate(raw.read), rate(system.read));
    println!("a device of memory: out {:.0} MiB/s, home {:.0} MiB/s", rate(soft.write), rate(soft.read));
    // An emulated processor copies and maps pages far slower than the emulated disk, which is a memcpy of the host's, moves them: the
    // way costs what it costs with any device, and the disk must not add twice as much again.
    let (out, home) = (ratio(soft.write, system.write), ratio(soft.read, system.read));
    assert!(out > 0.3 && home > 0.3, "of a device of memory: out {out:.2}, home {home:.2}");
}
