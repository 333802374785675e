//! The host's side: fetches, builds, boots, reports. See the library's head for the whole picture.

mod build;
mod containers;
mod initramfs;
mod iommufd;
mod kernel;
mod qemu;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

#[derive(Parser)]
#[command(
    about = "Run suites in a QEMU guest with VFIO; everything is left in TARGET/guest (with --iommufd in TARGET/guest/iommufd)"
)]
struct Cli {
    /// Suites (files of tests/guest/tests); all without it
    suites: Vec<String>,
    /// Seconds that the guest may take, boot included [default: 1200, or 28800 with --full]
    #[arg(long)]
    limit: Option<u64>,
    /// Every conformance case for every device instead of a selection: 4 to 11 minutes a driver
    #[arg(long)]
    full: bool,
    /// Only tests with this in their names
    #[arg(long, value_parser = part_of_a_name)]
    only: Option<String>,
    /// A kernel with iommufd and device files, which the drivers then take instead of groups. The first time this downloads
    /// 170 MB (kernel source and headers) and builds five modules: 25 to 85 s. Suites boot, vfio, edu and nvme take 2 to 3
    /// minutes with that and are part of tests/run; all suites take 4 to 8 and are not
    #[arg(long)]
    iommufd: bool,
}

/// The guest gets it on its kernel's command line.
fn part_of_a_name(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    if !text.is_empty() && text.chars().all(legal) {
        Ok(text.to_owned())
    } else {
        Err("names of tests have letters, digits, `_` and `:`".to_owned())
    }
}

/// QEMU without KVM now and then runs half of an instruction that another processor is patching; the kernel then panics ("Oops: int3"), while it
/// boots or later.
const BOOTS_MAX: u32 = 3;

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let base = out_dir()?;
    // Results of each kind beside each other; kernel and modules are for both.
    let out = if cli.iommufd { base.join("iommufd") } else { base.clone() };
    std::fs::create_dir_all(&out).with_context(|| format!("Create {}", out.display()))?;
    let mut kernel = kernel::fetch(&base)?;
    if cli.iommufd {
        if !iommufd::can_have_modules(&base, &kernel) {
            eprintln!("== the archive has no headers of {} any more: taking today's kernel", kernel.release);
            kernel = kernel::fetch_again(&base)?;
        }
        kernel.modules = iommufd::modules(&base, &kernel)?;
    }
    let suites = build::suites(&cli.suites, &base)?;
    let initramfs = out.join("initramfs.cpio");
    initramfs::write(&initramfs, &kernel, &suites)?;
    let started = Instant::now();
    let limit = cli.limit.unwrap_or(if cli.full { 28_800 } else { 1200 });
    let words = [(cli.full, " uhmm.full"), (cli.iommufd, " uhmm.iommufd")];
    let mut words: String = words.into_iter().filter_map(|(wanted, word)| wanted.then_some(word)).collect();
    words.extend(cli.only.iter().map(|text| format!(" uhmm.only={text}")));
    let boot = || qemu::boot(&kernel, &initramfs, &out, Duration::from_secs(limit), &words);
    let mut ended = boot()?;
    for _ in 1..BOOTS_MAX {
        if !report::emulators_fault(&out)? {
            break;
        }
        eprintln!("== the guest's kernel panicked by no fault of ours (see console.log): booting again");
        ended = boot()?;
    }
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
