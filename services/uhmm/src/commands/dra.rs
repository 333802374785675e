//! `uhmm dra`: becomes the program `uhmm-dra`, which is one of its own because of what it is built of (an HTTP stack).

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::anyhow;
use uhmm_dra_args::DraArgs;

const PROGRAM: &str = "uhmm-dra";

/// Returns only when it cannot be started.
pub fn dra(args: &DraArgs, run_dir: &Path) -> anyhow::Result<()> {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(PROGRAM)).filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| PathBuf::from(PROGRAM));
    let error = Command::new(&program).arg("--run-dir").arg(run_dir).args(args.to_words()).exec();
    Err(anyhow!(
        "{} cannot be started ({error}): it is a program of its own, beside uhmm or in PATH (`cargo build --release -p uhmm-dra`, or \
         the image uhmm-dra)",
        program.display()
    ))
}
