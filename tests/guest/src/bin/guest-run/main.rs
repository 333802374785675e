//! The host's side: fetches, builds, boots, reports. See the library's head for the whole picture.

mod build;
mod initramfs;
mod kernel;
mod qemu;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

#[derive(Parser)]
#[command(about = "Run suites in a QEMU guest with VFIO; everything is left in TARGET/guest")]
struct Cli {
    /// Suites (files of tests/guest/tests); all without it
    suites: Vec<String>,
    /// Seconds that the guest may take, boot included [default: 1200, or 28800 with --full]
    #[arg(long)]
    limit: Option<u64>,
    /// Every conformance case for every device instead of a selection: takes an hour or more
    #[arg(long)]
    full: bool,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let out = out_dir()?;
    std::fs::create_dir_all(&out).with_context(|| format!("Create {}", out.display()))?;
    let kernel = kernel::fetch(&out)?;
    let suites = build::suites(&cli.suites, &out)?;
    let initramfs = out.join("initramfs.cpio");
    initramfs::write(&initramfs, &kernel, &suites)?;
    let started = Instant::now();
    let limit = cli.limit.unwrap_or(if cli.full { 28_800 } else { 1200 });
    let ended = qemu::boot(&kernel, &initramfs, &out, Duration::from_secs(limit), cli.full)?;
    let report = report::Report::read(&out, ended)?;
    report.write_junit(&out.join("junit.xml"), started.elapsed())?;
    Ok(report.print(&out, started.elapsed()))
}

/// Beside everything else that cargo makes: outside of git, and kept from run to run.
fn out_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("Find this program")?;
    let target = program.ancestors().nth(2).context("This program is in TARGET/PROFILE")?;
    Ok(target.join("guest"))
}
