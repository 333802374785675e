//! One process of a bench: memory in some regions, all of it away before each round; a round touches every page once, in an order that
//! nobody can guess, so that each touch is a fault.
//!
//! ```text
//!   line in     what                                  line out
//!   away        pages leave (device; bare: dropped)   away
//!   go          every page is touched                 the p50 of a touch in nanoseconds
//! ```

use std::io::BufRead;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use uhmm_kernel_hook::{Features, ManagedMapping, PAGE_SIZE, RegisterMode, SendStatus, SeqPacket, Userfaultfd, memfd};
use uhmm_sdk::{Device, Region, Session};

/// The handler of bare clients may be busy with others that connect.
const CONNECT_TRIES: u32 = 1000;

/// `uhmm bench-client`
#[derive(clap::Args)]
pub struct BenchClientArgs {
    /// Run directory of the system
    #[arg(long)]
    system: Option<PathBuf>,
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
    Bare { regions: Vec<(ManagedMapping, std::os::fd::OwnedFd)> },
}

impl Memory {
    fn new(args: &BenchClientArgs) -> anyhow::Result<Self> {
        let len_bytes = args.pages * PAGE_SIZE;
        if let Some(run_dir) = &args.system {
            let session = Session::connect(Some(run_dir))?;
            let device = session.device("soft0")?;
            let regions = (0..args.regions).map(|_| session.allocate(len_bytes));
            let regions = regions.collect::<Result<_, _>>()?;
            return Ok(Self::Managed { session, device, regions });
        }
        let path = args.floor.as_ref().context("Give --system or --floor")?;
        let (uffd, _) = Userfaultfd::create(None)?;
        uffd.api(Features::MISSING_SHMEM)?;
        let region = |_| {
            let memory = memfd::create_sealed("uhmm-bench-floor", len_bytes)?;
            let mapping = ManagedMapping::map(memory.as_fd(), len_bytes, None)?;
            uffd.register(mapping.range(), RegisterMode::MISSING)?;
            anyhow::Ok((mapping, memory))
        };
        let regions = (0..args.regions).map(region).collect::<Result<_, _>>()?;
        let handler = connect(path)?;
        let sent = handler.send(b"u", &[uffd.as_fd()])?;
        anyhow::ensure!(sent == SendStatus::Sent, "The handler of bare clients is gone");
        Ok(Self::Bare { regions })
    }

    fn send_away(&self) -> anyhow::Result<()> {
        match self {
            Self::Managed { session, device, regions } => {
                for region in regions {
                    let report = session.migrate(region.addr(), region.len_bytes(), device)?;
                    anyhow::ensure!(report.complete(), "Not every page went to the device: {:?}", report.runs);
                }
            }
            Self::Bare { regions, .. } => {
                for (mapping, memory) in regions {
                    memfd::punch_hole(memory.as_fd(), 0, mapping.len())?;
                }
            }
        }
        Ok(())
    }

    fn touch(&self, region: u64, page: u64) -> anyhow::Result<()> {
        let offset = page * PAGE_SIZE;
        match self {
            Self::Managed { regions, .. } => regions[region as usize].read_u64(offset).map(drop)?,
            Self::Bare { regions, .. } => regions[region as usize].0.load_u64(offset).map(drop)?,
        }
        Ok(())
    }
}

fn connect(path: &std::path::Path) -> anyhow::Result<SeqPacket> {
    for _ in 0..CONNECT_TRIES {
        match SeqPacket::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    bail!("The handler of bare clients does not answer at {}", path.display())
}

/// Every number below `count` once, the same each time.
fn shuffled(count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for last in (1..order.len()).rev() {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        order.swap(last, (seed % (last as u64 + 1)) as usize);
    }
    order
}

/// Does rounds until its input ends.
pub fn bench_client(args: &BenchClientArgs) -> anyhow::Result<()> {
    let memory = Memory::new(args)?;
    let order = shuffled(args.regions * args.pages);
    let mut touches = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 2)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_touched_once_and_no_walk_is_seen() {
        let order = shuffled(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        let walks = order.windows(2).filter(|two| two[0] + 1 == two[1]).count();
        assert!(walks < 10, "{walks} pages are met just after the one before them");
    }
}
