//! The second half of bench `scale`: does a fault cost the same in a large region, and adopting, migrating and releasing the same a page?

use std::time::Instant;

use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_kernel_hook::program::ProgramMemory;

use super::super::bed::Bed;
use super::super::figure::{Reach, median};
use super::super::place;
use super::super::run::Run;
use super::managed::all_go;
use super::touch::{Touch, shuffled};

const GIB: u64 = 1 << 30;
const PAGES: u64 = 2048;
const MIB: u64 = 1 << 20;

/// A row beside the first one.
fn beside_first(rows: &[Vec<f64>], index: usize) -> Vec<(f64, f64)> {
    let first = median(rows[0].iter().copied());
    rows[index].iter().map(|value| (*value, first)).collect()
}

/// p50 of faults in the middle of regions of 1, 4 and 16 GiB, nearly all of which nobody has touched.
pub(super) fn large_regions(run: &mut Run<'_>, bed: &Bed) -> anyhow::Result<()> {
    let sizes = [1, 4, 16];
    let pages = if run.short { 256 } else { PAGES };
    let order = shuffled(pages);
    let touch = Touch { order: &order, threads: 1, pause: None, cpus: place::allowed()? };
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for size in sizes {
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let region = session.allocate(size * GIB)?;
        let off = region.len_bytes() / 2;
        let part = region.bytes();
        part.fill(off, pages * PAGE_SIZE, 1)?;
        let mut row = Vec::new();
        for round in run.rounds(7) {
            all_go(&session, (region.addr() + off, pages * PAGE_SIZE), device.target())?;
            let took = touch.at(part, off)?;
            if round > 0 {
                row.push(took.value_at_quantile(0.5) as f64 / 1000.0);
            }
        }
        rows.push(row);
    }
    for (index, size) in sizes.iter().enumerate().skip(1) {
        let case = format!("a region of {size} GiB : of 1 GiB");
        run.figure(case, "us, p50 of a fault", Reach::AtMost(1.2), beside_first(&rows, index));
    }
    Ok(())
}

/// Adopting, migrating and releasing: microseconds a page.
pub(super) fn cost_a_page(run: &mut Run<'_>, bed: &Bed) -> anyhow::Result<()> {
    let shapes: &[(u64, u64)] =
        if run.short { &[(1, MIB), (1, 8 * MIB), (16, MIB)] } else { &[(1, 4 * MIB), (1, 64 * MIB), (64, MIB)] };
    let mut rows: [Vec<Vec<f64>>; 3] = Default::default();
    for (count, len) in shapes {
        let mut all: [Vec<f64>; 3] = Default::default();
        for round in run.rounds(5) {
            let took = lives(bed, *count, *len)?;
            if round > 0 {
                all.iter_mut().zip(took).for_each(|(row, took)| row.push(took));
            }
        }
        rows.iter_mut().zip(all).for_each(|(rows, row)| rows.push(row));
    }
    for (what, rows) in ["adopt", "migrate", "release"].into_iter().zip(rows) {
        for (index, (count, len)) in shapes.iter().enumerate().skip(1) {
            let case = format!("{what}, {count} x {} MiB : 1 x {} MiB", len / MIB, shapes[0].1 / MIB);
            run.figure(case, "us a page", Reach::AtMost(1.2), beside_first(&rows, index));
        }
    }
    Ok(())
}

/// Adopts, migrates and releases so many pieces of private memory: microseconds a page of each.
fn lives(bed: &Bed, count: u64, len: u64) -> anyhow::Result<[f64; 3]> {
    let session = bed.session()?;
    let device = session.device(bed.device(0))?;
    let some = vec![1; len as usize];
    let mut pieces = Vec::new();
    for _ in 0..count {
        let memory = ProgramMemory::private_aligned(len)?;
        memory.write(0, &some)?;
        pieces.push(memory);
    }
    let pages = (count * len / PAGE_SIZE) as f64;
    let each = |work: &dyn Fn(&ProgramMemory) -> anyhow::Result<()>| {
        let begun = Instant::now();
        pieces.iter().try_for_each(work)?;
        anyhow::Ok(begun.elapsed().as_secs_f64() * 1e6 / pages)
    };
    let adopt = each(&|memory| Ok(session.adopt(memory.addr(), len).map(drop)?))?;
    let migrate = each(&|memory| all_go(&session, (memory.addr(), len), device.target()))?;
    // What is on the device comes home with it.
    let release = each(&|memory| Ok(session.release(memory.addr(), len)?))?;
    Ok([adopt, migrate, release])
}
