//! `uhmm bench`: what uhmm takes for its work, each figure beside the floor's of the same run: the same work done with the kernel hook and
//! nothing else. Rounds of both alternate, so that a machine that is slow for a while is slow for both. Only ratios mean anything.
//!
//! ```text
//!   uhmm bench --+-- uhmm up (a system of its own)                    bed.rs       what is measured: benches/, one file a bench
//!                +-- uhmm bench-floor, bench-echo: bare processes     floor/       how it is shown:  figure.rs, report.rs, plot.rs
//!                `-- uhmm bench-client: programs, where many are needed            where it ran:     host.rs, place.rs
//! ```

mod bed;
mod benches;
mod figure;
mod floor;
mod host;
mod place;
pub(super) mod plot;
mod report;
mod run;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::PoisonError;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_sdk::Operator;

pub use benches::client::{BenchClientArgs, bench_client};
pub use floor::echo::{BenchEchoArgs, bench_echo};
pub use floor::handler::{BenchFloorArgs, bench_floor};

use bed::Device;
use run::Run;

/// One kind of work.
struct Bench {
    name: &'static str,
    what: &'static str,
    floor: &'static str,
    reach: &'static str,
    run: fn(&mut Run<'_>) -> anyhow::Result<()>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "fault",
        what: "a CPU fault on a 4 KiB page that lives on the device, in random order",
        floor: "a bare handler in another process, in the same place; unpinned: the one of the same CPU",
        reach: "p50 <= 1.15, p99 <= 1.5; unpinned p50 <= 1.5",
        run: benches::fault::run,
    },
    Bench {
        name: "fault-mapped",
        what: "the same while devices map the page: they are revoked first",
        floor: "the bare handler, on one CPU",
        reach: "p50 <= 1.3",
        run: benches::fault_more::mapped,
    },
    Bench {
        name: "fault-hop",
        what: "the same for a device whose memory the CPU does not see",
        floor: "a bare handler that asks another process first, one message each way",
        reach: "p50 <= 1.2",
        run: benches::fault_more::hop,
    },
    Bench {
        name: "fault-huge",
        what: "a CPU fault that brings a huge page home",
        floor: "memcpy of 2 MiB between huge pages",
        reach: "<= 1.25: four fifths of the time are the copy",
        run: benches::fault_more::huge,
    },
    Bench {
        name: "scan",
        what: "the CPU reads a range that lives on the device",
        floor: "bare fill and map, one thread ahead of the reader; memcpy; the same without fault-around",
        reach: ">= 0.9 sequential; huge >= 0.6 of memcpy; no pattern below 0.95 of itself without fault-around",
        run: benches::scan::run,
    },
    Bench {
        name: "out",
        what: "a range is migrated to the device",
        floor: "the bare kernel's steps by one thread; memcpy",
        reach: ">= 0.9 of the bare steps",
        run: benches::ways::out,
    },
    Bench {
        name: "home",
        what: "a range is migrated home",
        floor: "the bare kernel's steps by one thread; memcpy",
        reach: ">= 0.9 of the bare steps",
        run: benches::ways::home,
    },
    Bench {
        name: "access",
        what: "a device reads, writes and adds by address",
        floor: "memcpy; migration in the same run",
        reach: "mapped >= 0.7 of memcpy; from home >= 0.8 of migrate; all mapped >= 10 GiB/s",
        run: benches::access::run,
    },
    Bench {
        name: "job",
        what: "a job sums memory at home",
        floor: "migrate, then sum",
        reach: ">= 0.9 with the ranges named, >= 0.6 by faults alone",
        run: benches::job::run,
    },
    Bench {
        name: "ping-pong",
        what: "CPU and device touch the same pages in turn",
        floor: "two bare faults",
        reach: "<= 1.3",
        run: benches::contended::ping_pong,
    },
    Bench {
        name: "over-commit",
        what: "a job streams over four times what the device holds",
        floor: "migrating out and home in the same run",
        reach: ">= 0.6",
        run: benches::contended::over_commit,
    },
    Bench {
        name: "invalidate",
        what: "a range that 1, 2, 4 and 8 devices map is discarded or unmapped; one of the 8 is slow",
        floor: "the slowest mirror alone; a bare userfaultfd event",
        reach: "<= 1.3 of the slowest",
        run: benches::invalidate::run,
    },
    Bench {
        name: "ipc",
        what: "a request of 128 bytes and its answer, over the stubs",
        floor: "a bare SOCK_SEQPACKET socket in the same place",
        reach: "p50 <= 1.25",
        run: benches::ipc::run,
    },
    Bench {
        name: "recover",
        what: "the first fault answered after kill -9 of pager, mirror or driver",
        floor: "this program started again until its first line; 100 ms; 8 GiB on the device beside 1 GiB",
        reach: "<= 3, longest <= 100 ms, flat <= 1.2",
        run: benches::recover::run,
    },
    Bench {
        name: "scale",
        what: "faults with many clients and regions",
        floor: "the bare handler with as many; uhmm with one",
        reach: "<= 1.2 of one",
        run: benches::scale::run,
    },
    Bench {
        name: "cost",
        what: "CPU time of each service for a page, a fault, a session: what one core can do",
        floor: "CPU time of a bare handler for a fault",
        reach: "none: docs/scaling.md reckons with it",
        run: benches::costs::run,
    },
    Bench {
        name: "footprint",
        what: "memory of the services a managed byte; CPU of the services while nobody asks for anything",
        floor: "0.3 % of managed bytes; 0.1 % of a core",
        reach: "<= 1",
        run: benches::footprint::run,
    },
];

/// `uhmm bench`
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Which ones [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Rounds of each case; the middle one is shown [default: each bench's own]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Print an array of JSON objects instead of the table
    #[arg(long)]
    json: bool,
    /// Print tables of Markdown, as in docs/performance.md
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Draw SVG files into this folder
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Whose devices: soft, file, nvme or accel (the last two by their models)
    #[arg(long, value_name = "NAME", default_value = "soft")]
    driver: String,
    /// Little memory, one round: shows that everything works, and no figure means anything
    #[arg(long)]
    short: bool,
    /// Only cases with this text in their names
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print what there is to measure, and measure nothing
    #[arg(long)]
    list: bool,
}

/// The run's private folder; systems that still run there are ended with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("uhmm-bench-{}", std::process::id()));
        // Not recursive and private: a folder that somebody else has put there must not be used.
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("{} cannot be made", path.display()))?;
        Ok(Self(path))
    }
}

fn clear(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder) {
        eprintln!("{} could not be removed: {error}", folder.display());
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        clear(&self.0);
    }
}

/// Ends the systems that run, and this process, when it is told to end.
fn end_in_order(signals: StopSignals, folder: PathBuf) {
    std::thread::spawn(move || {
        while poll(&mut [PollFd::new(&signals, PollFlags::IN)], None).is_err() {}
        for run_dir in bed::RUNNING.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Err(error) = Operator::connect(Some(run_dir)).and_then(Operator::shutdown) {
                eprintln!("The system in {} could not be ended: {error}", run_dir.display());
            }
        }
        for pid in benches::party::KILLED.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Children of this process that nobody has waited for: the number is theirs.
            let killed = PidFd::open(*pid).and_then(|child| child.signal(Signal::KILL));
            tracing::debug!(?killed, pid, "A device model ends");
        }
        clear(&folder);
        std::process::exit(130);
    });
}

fn asked(names: &[String]) -> anyhow::Result<Vec<&'static Bench>> {
    if let Some(unknown) = names.iter().find(|name| BENCHES.iter().all(|bench| bench.name != name.as_str())) {
        let known: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        bail!("There is no bench {unknown:?}: take some of {}", known.join(", "));
    }
    let wanted = |bench: &&Bench| names.is_empty() || names.iter().any(|name| name == bench.name);
    Ok(BENCHES.iter().filter(wanted).collect())
}

/// Runs them and prints their figures.
pub fn bench(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let benches = asked(&args.names)?;
    if args.list {
        benches.iter().for_each(|bench| report::describe(bench));
        return Ok(ExitCode::SUCCESS);
    }
    let driver = Device::named(&args.driver)?;
    if let Some(folder) = &args.plot {
        std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    // Before the first child and thread, so that a signal cannot end the run without ending its systems.
    let signals = StopSignals::block()?;
    let folder = Folder::new()?;
    end_in_order(signals, folder.0.clone());
    let mut run = Run::new(driver, args, folder.0.clone());
    let statement = host::statement()?;
    eprintln!("{statement}");
    let start = host::Pulse::take(&run)?;
    let mut failed = Vec::new();
    for bench in benches {
        eprintln!("{}: {}", bench.name, bench.what);
        run.bench = bench.name;
        // What the others find is not lost with it.
        if let Err(error) = (bench.run)(&mut run) {
            eprintln!("{} failed: {error:#}", bench.name);
            failed.push(bench.name);
        }
    }
    anyhow::ensure!(
        !run.figures.is_empty() || !failed.is_empty(),
        "Nothing was measured: no case has {:?} in its name",
        args.only
    );
    let host = host::Pulse::take(&run)?.figures(&start);
    run.figures.splice(0..0, host);
    report::print(&run, args, &statement);
    if let Some(folder) = &args.plot {
        plot::draw_all(&run, folder)?;
    }
    let unsound = run.figures.iter().find(|figure| !figure.is_sound());
    if let Some(figure) = unsound {
        bail!("{}, {}: a round gave no number: {:?}", figure.bench, figure.case, figure.rounds);
    }
    anyhow::ensure!(failed.is_empty(), "Failed: {}: see their messages above", failed.join(", "));
    Ok(ExitCode::SUCCESS)
}
