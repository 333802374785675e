//! `uhmm conformance`: holds a driver against HMM's semantics; `uhmm conformance-case`: one case of it, in its own process.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use uhmm_conformance::{CaseArgs, Options, case_names, run, run_case};

/// `uhmm conformance`
#[derive(clap::Args)]
pub struct ConformanceArgs {
    /// Driver whose devices are tested [default: soft]
    #[arg(long)]
    driver: Option<String>,
    /// The devices of its own system are coherent: run the `.coherent` cases too
    #[arg(long)]
    coherent: bool,
    /// Only cases whose name matches this regular expression
    #[arg(long, value_name = "RE")]
    filter: Option<String>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,
    /// Kill -9 services at random moments during every case
    #[arg(long, value_name = "SEED")]
    chaos: Option<u64>,
    /// Stop the cases' agents for a while at random moments
    #[arg(long)]
    pause_agent: bool,
    /// Cases may take so many times longer: for emulated, slow or busy machines and devices
    #[arg(long, value_name = "N", default_value_t = 1)]
    patience: u32,
    /// Print the names of the cases and run none
    #[arg(long)]
    list: bool,
}

/// `uhmm conformance-case`
#[derive(clap::Args)]
pub struct ConformanceCaseArgs {
    /// Which case
    name: String,
    /// Device names
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// The case is about memory that the CPU reaches on the device
    #[arg(long)]
    coherent: bool,
    /// Services are being killed meanwhile
    #[arg(long)]
    chaos: bool,
    /// Stop this process's agent for a while at random moments
    #[arg(long)]
    pause_agent: bool,
    /// For everything random
    #[arg(long)]
    seed: u64,
    /// The case's own words to a process that it has started
    #[arg(long)]
    role: Vec<String>,
}

/// Runs the suite; fails when a case failed. `run_dir`: the system to use instead of one of its own.
pub fn conformance(args: ConformanceArgs, run_dir: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    if args.list {
        for name in case_names(args.filter.as_deref())? {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let exe = std::env::current_exe().context("The path of this program is unknown")?;
    let ConformanceArgs { driver, coherent, filter, json, chaos, pause_agent, patience, list: _ } = args;
    let report = run(&exe, &Options { driver, coherent, filter, json, chaos, pause_agent, patience, run_dir })?;
    Ok(if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one case and prints its outcome.
pub fn conformance_case(args: ConformanceCaseArgs, run_dir: PathBuf) -> anyhow::Result<()> {
    let ConformanceCaseArgs { name, devices, coherent, chaos, pause_agent, seed, role } = args;
    run_case(CaseArgs { name, run_dir, devices, coherent, chaos, pause_agent, seed, role })?;
    Ok(())
}
