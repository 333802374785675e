//! One process of a bench: memory in some regions, all of it away before each round; a round touches every page once, in an order that
//! nobody can guess, so that each touch is a fault.
//!
//! ```text
//!   line in     what                                  line out
//!   away        pages leave (device; bare: dropped)   away
//!   go          every page is touched                 the p50 of a touch in nanoseconds
//! ```

use std::io::BufRead;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_sdk::{Device, Region, Session};

use super::super::floor::bare::BareMemory;
use super::managed::all_go;
use super::touch::{histogram, shuffled};

/// `uhmm bench-client`
#[derive(clap::Args)]
pub struct BenchClientArgs {
    /// Run directory of the system
    #[arg(long)]
    system: Option<PathBuf>,
    /// Its device
    #[arg(long, default_value = "soft0")]
    device: String,
    /// Socket of the handler of bare clients
    #[arg(long)]
    floor: Option<PathBuf>,
    /// Regions
    #[arg(long)]
    regions: u64,
    /// Pages of each
    #[arg(long)]
    pages: u64,
}

/// Whose pages are touched.
enum Memory {
    Managed { session: Session, device: Device, regions: Vec<Region> },
    Bare { regions: Vec<BareMemory> },
}

impl Memory {
    fn new(args: &BenchClientArgs) -> anyhow::Result<Self> {
        let len_bytes = args.pages * PAGE_SIZE;
        if let Some(run_dir) = &args.system {
            let session = Session::connect(Some(run_dir))?;
            let device = session.device(&args.device)?;
            let regions = (0..args.regions).map(|_| session.allocate(len_bytes));
            let regions = regions.collect::<Result<_, _>>()?;
            return Ok(Self::Managed { session, device, regions });
        }
        let path = args.floor.as_ref().context("Give --system or --floor")?;
        let regions = (0..args.regions).map(|_| BareMemory::new(len_bytes, path)).collect::<Result<_, _>>()?;
        Ok(Self::Bare { regions })
    }

    fn send_away(&self) -> anyhow::Result<()> {
        match self {
            Self::Managed { session, device, regions } => {
                for region in regions {
                    all_go(session, (region.addr(), region.len_bytes()), device.target())?;
                }
            }
            Self::Bare { regions } => {
                for region in regions {
                    region.empty()?;
                }
            }
        }
        Ok(())
    }

    fn touch(&self, region: u64, page: u64) -> anyhow::Result<()> {
        let offset = page * PAGE_SIZE;
        match self {
            Self::Managed { regions, .. } => regions[region as usize].read_u64(offset).map(drop)?,
            Self::Bare { regions, .. } => regions[region as usize].mapping().load_u64(offset).map(drop)?,
        }
        Ok(())
    }
}

/// Does rounds until its input ends.
pub fn bench_client(args: &BenchClientArgs) -> anyhow::Result<()> {
    let memory = Memory::new(args)?;
    let order = shuffled(args.regions * args.pages);
    let mut touches = histogram()?;
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "away" => {
                memory.send_away()?;
                println!("away");
            }
            "go" => {
                touches.reset();
                for at in &order {
                    let begun = Instant::now();
                    memory.touch(at % args.regions, at / args.regions)?;
                    touches.saturating_record(u64::try_from(begun.elapsed().as_nanos())?);
                }
                println!("{}", touches.value_at_quantile(0.5));
            }
            other => bail!("{other:?} is no order of a bench"),
        }
    }
    Ok(())
}
