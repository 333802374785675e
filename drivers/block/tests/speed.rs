//! Far memory out and home beside fio on the same disk, in one run, and what the seal costs. Prints; fails only when something is badly wrong, since the
//! disk is everybody's.
//!
//! `cargo nextest run --release -p uhmm-driver-block --test speed --no-capture` on an idle machine shows figures.

mod copies;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use uhmm_driver_block::engine::{BlockEngine, COPY_LIMITS};
use uhmm_driver_block::machine::PIECE_PAGES;
use uhmm_driver_block::take;
use uhmm_driver_kit::seal::{Page, Seal, SealName};
use uhmm_driver_kit::{CopyOp, PAGE_BYTES};
use uhmm_kernel_hook::DiskMode;

use copies::{LEN, copy_all, staging};

/// fio as it is used to find out what a disk can do.
fn fio(folder: &Path, rw: &str) -> f64 {
    let mut command = Command::new("fio");
    let file = folder.join("fio.dat");
    command.args(["--name=x", "--ioengine=io_uring", "--direct=1", "--fixedbufs=1", "--registerfiles=1", "--minimal"]);
    command.args([format!("--filename={}", file.display()), format!("--rw={rw}"), format!("--size={LEN}")]);
    command.args([format!("--bs={}", u64::from(PIECE_PAGES) * PAGE_BYTES), format!("--iodepth={}", COPY_LIMITS.depth)]);
    let output = command.output().expect("fio is needed: apt-get install fio, or tests/run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let field = if rw == "write" { 47 } else { 6 };
    let line = text.lines().find(|line| line.starts_with("3;")).unwrap_or_else(|| panic!("fio said {text:?}"));
    line.split(';').nth(field).and_then(|kib| kib.parse::<f64>().ok()).expect("a number") / 1024.0
}

/// Out and home. The second time: a new file's first writes are slower, for everybody.
fn far(folder: &Path, sealed: bool) -> (f64, f64) {
    let path = folder.join(if sealed { "sealed" } else { "open" });
    let taken = take(&path, LEN, false, sealed, &[]).expect("a file");
    let (lane, way) = taken.lane(COPY_LIMITS, PIECE_PAGES, DiskMode::Auto).expect("a lane");
    let mut engine = BlockEngine::new(lane);
    let staging = staging();
    copy_all(&mut engine, &staging, CopyOp::CopyIn);
    copy_all(&mut engine, &staging, CopyOp::Scrub);
    let speeds = (copy_all(&mut engine, &staging, CopyOp::CopyIn), copy_all(&mut engine, &staging, CopyOp::CopyOut));
    drop(engine);
    drop(std::fs::remove_file(&path));
    println!("{way}, sealed {sealed}: out {:.0} MiB/s, home {:.0} MiB/s", speeds.0, speeds.1);
    speeds
}

#[test]
fn out_and_home_beside_fio() {
    let build = std::env::current_exe().expect("a path").parent().expect("a folder").to_owned();
    let folder = tempfile::Builder::new().prefix("uhmm-speed-").tempdir_in(build).expect("a folder");
    fio(folder.path(), "write");
    let (mut out, mut home) = (Vec::new(), Vec::new());
    // The disk's speed changes from second to second: each round has both.
    for _ in 0..3 {
        let (write, read) = (fio(folder.path(), "write"), fio(folder.path(), "read"));
        let (sealed, open) = (far(folder.path(), true), far(folder.path(), false));
        println!(
            "fio: write {write:.0}, read {read:.0} MiB/s; sealed out {:.2}x, home {:.2}x; open out {:.2}x, home {:.2}x",
            sealed.0 / write,
            sealed.1 / read,
            open.0 / write,
            open.1 / read
        );
        out.push(sealed.0 / write);
        home.push(sealed.1 / read);
    }
    let best = |ratios: &[f64]| ratios.iter().copied().fold(0.0, f64::max);
    assert!(best(&out) > 0.4 && best(&home) > 0.4, "far below what fio does: out {out:.2?}, home {home:.2?}");
}

#[test]
fn what_a_seal_costs() {
    let seal = Seal::new(&[3; 32]).expect("a seal");
    let mut page: Page = [1; PAGE_BYTES as usize];
    let pages = 65_536u64;
    let begin = Instant::now();
    let mut tags = Vec::new();
    for generation in 0..pages {
        let name = SealName { block: 1, generation, frame: 2, life: 3 };
        tags.push(seal.close(name, &mut page).expect("closed"));
    }
    let close = begin.elapsed();
    let begin = Instant::now();
    for (generation, tag) in tags.iter().enumerate().rev() {
        let name = SealName { block: 1, generation: generation as u64, frame: 2, life: 3 };
        seal.open(name, *tag, &mut page).expect("opened");
    }
    let open = begin.elapsed();
    assert_eq!(page, [1; PAGE_BYTES as usize]);
    let speed = |time: Duration| pages as f64 / 262_144.0 / time.as_secs_f64();
    let each = |time: Duration| time.as_secs_f64() * 1e6 / pages as f64;
    println!(
        "close {:.2} us a page ({:.1} GiB/s), open {:.2} us ({:.1} GiB/s)",
        each(close),
        speed(close),
        each(open),
        speed(open)
    );
}
