//! A driver of an NVMe controller that a suite kills during transfers: `guest-tier PCI_ADDRESS ROUND`, a socket as standard input. See
//! `tier.rs` for what it says there.

use std::os::fd::AsFd;

use anyhow::{Context, Result, bail, ensure};
use uhmm_driver_kit::{CopyEngine, Frames, MemoryOrigin, Staging, StagingUse};
use uhmm_driver_nvme::engine::{NvmeEngine, NvmeMemory};
use uhmm_driver_nvme::namespace::Namespace;
use uhmm_driver_nvme::shell::{Controller, DMA_NAME, Options};
use uhmm_guest::tier::{PATTERN_AT, PATTERN_FRAMES, check, fill, receive, send};
use uhmm_kernel_hook::SeqPacket;
use uhmm_pci::PciPath;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(round)) = (args.next(), args.next()) else { bail!("Give PCI address and round") };
    let round: u64 = round.parse()?;
    let parent = SeqPacket::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?;
    let (_, kept) = receive(&parent)?;
    let device = uhmm_pci::open(&path.parse::<PciPath>()?, &kept)?;
    let memory = kept.into_iter().find(|(name, _)| name == DMA_NAME).map(|(_, fd)| fd);
    let controller = Controller::open(device, memory, Options::default())?;
    let adopted = controller.is_adopted();
    let (namespace, origin) = Namespace::open(controller, u64::MAX, true)?;
    let staging = Staging::create(StagingUse::Pager, 2 << 20)?;
    let mut engine = NvmeEngine::new(namespace.clone());
    let told = |error: uhmm_driver_kit::DeviceError| anyhow::anyhow!("{error}");
    engine.attach(&staging).map_err(told)?;
    let pattern = Frames { first: PATTERN_AT, count: PATTERN_FRAMES };
    if adopted {
        ensure!(origin == MemoryOrigin::Adopted, "An adopted controller with frames of nobody");
        engine.copy_out(pattern, &staging, 0).map_err(told)?;
        check(&staging.window, u64::from(PATTERN_FRAMES), round - 1)?;
    }
    fill(&staging.window, u64::from(PATTERN_FRAMES), round)?;
    engine.copy_in(&staging, 0, pattern).map_err(told)?;
    let kept = uhmm_driver_kit::DeviceMemory::kept(&NvmeMemory::new(namespace, None));
    send(&parent, if adopted { "adopted" } else { "created" }, &kept).context("Tell the suite")?;
    for n in (0..).map(|n: u32| n % 3) {
        engine.copy_in(&staging, 0, Frames { first: 4000 + n * 512, count: 512 }).map_err(told)?;
        engine.copy_out(Frames { first: 6000, count: 256 }, &staging, 256).map_err(told)?;
    }
    bail!("This process was to be killed")
}
