//! A driver of edu that a suite kills while its device writes memory: `guest-victim PCI_ADDRESS BYTE`, a socket as standard input.
//!
//! Fills the device's buffer with the byte, starts a DMA of 2 KiB from it to its queue, sends "started" with what the vault
//! would keep of the device and the descriptors of queue and stale page, and waits for its end.

use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use uhmm_driver_edu::hardware::{DMA_LIMIT, Direction, Edu};
use uhmm_guest::tier::send;
use uhmm_guest::victim::{KEPT_IOVA, QUEUE, SCRATCH, STALE, STALE_IOVA};
use uhmm_kernel_hook::SeqPacket;
use uhmm_pci::{DmaMemory, DmaRight, PciPath};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(byte)) = (args.next(), args.next()) else { bail!("Give PCI address and byte") };
    let parent = SeqPacket::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?;

    let device = uhmm_pci::open(&path.parse::<PciPath>()?, &[])?;
    let edu = Edu::new(&device)?;
    edu.set_scratch(SCRATCH)?;
    let (queue, stale) = (DmaMemory::create("queue", 4096)?, DmaMemory::create("stale", 4096)?);
    let _queue_mapping = device.map_dma_at(KEPT_IOVA, &queue, DmaRight::ReadWrite)?;
    let _stale_mapping = device.map_dma_at(STALE_IOVA, &stale, DmaRight::ReadWrite)?;
    let source = DmaMemory::create("source", 4096)?;
    source.window.fill(0, 4096, byte.parse()?)?;
    let source = device.map_dma(&source, DmaRight::Read, DMA_LIMIT)?;
    edu.transfer(Direction::FromMemory, source.iova(0), 0, 2048)?;

    let mut kept = device.kept();
    kept.extend([(QUEUE.to_owned(), Arc::clone(&queue.fd)), (STALE.to_owned(), Arc::clone(&stale.fd))]);
    edu.start(Direction::ToMemory, KEPT_IOVA, 0, 2048)?;
    send(&parent, "started", &kept).context("Tell the suite")?;
    poll(&mut [PollFd::new(&std::io::stdin(), PollFlags::IN)], None)?;
    bail!("This process was to be killed")
}
