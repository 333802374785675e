//! A PCI device in this process, whose BARs are memfds, and what becomes of it between two incarnations.

use uhmm_kernel_hook::EventFd;
use uhmm_pci::{DmaMemory, DmaRight, InterruptKind, IovaRange, PciBackend, RegionIndex, RegionInfo};

use super::*;

/// Registers in BAR 0, memory in the others.
#[derive(Debug)]
struct Fake {
    config: Fd,
    bars: [Option<(Fd, u64)>; 6],
}

impl Fake {
    fn new(lens: [u64; 6]) -> Result<Self, DeviceError> {
        let memory = |len| -> Result<Fd, DeviceError> { Ok(Arc::new(memfd::create_sealed("uhmm-test-bar", len)?)) };
        let mut bars = [const { None }; 6];
        for (bar, len) in bars.iter_mut().zip(lens).filter(|(_, len)| *len > 0) {
            *bar = Some((memory(len)?, len));
        }
        Ok(Self { config: memory(PAGE_BYTES)?, bars })
    }

    fn device(&self) -> Result<PciDevice, DeviceError> {
        Ok(PciDevice::new(Arc::new(Self { config: self.config.clone(), bars: self.bars.clone() }))?)
    }

    fn config(&self) -> Window {
        Window::map(self.config.as_fd(), 0, PAGE_BYTES, Prot::ReadWrite).expect("config space maps")
    }
}

impl PciBackend for Fake {
    fn describe(&self) -> String {
        "fake".into()
    }

    fn is_adopted(&self) -> bool {
        false
    }

    fn region(&self, region: RegionIndex) -> Option<RegionInfo> {
        let RegionIndex::Bar(number) = region else { return None };
        let (fd, len_bytes) = self.bars[usize::from(number)].clone()?;
        Some(RegionInfo { len_bytes, mappable: (number != 0).then_some((fd, 0)) })
    }

    fn read(&self, _: RegionIndex, offset: u64, bytes: &mut [u8]) -> Result<(), PciError> {
        Ok(self.config().read(offset, bytes)?)
    }

    fn write(&self, _: RegionIndex, offset: u64, bytes: &[u8]) -> Result<(), PciError> {
        Ok(self.config().write(offset, bytes)?)
    }

    fn iova_ranges(&self) -> Vec<IovaRange> {
        Vec::new()
    }

    fn dma_map(&self, iova: u64, memory: &DmaMemory, _: DmaRight) -> Result<(), PciError> {
        Err(PciError::IovaTaken { iova, len: memory.len_bytes() })
    }

    fn dma_unmap(&self, _: u64, _: u64) -> Result<(), PciError> {
        Ok(())
    }

    fn interrupt_count(&self, _: InterruptKind) -> u32 {
        0
    }

    fn set_interrupts(&self, _: InterruptKind, _: &[EventFd]) -> Result<(), PciError> {
        Ok(())
    }

    fn reset(&self) -> Result<(), PciError> {
        Ok(())
    }

    fn kept(&self) -> Vec<(String, Fd)> {
        vec![("driver/pci-device".into(), self.config.clone())]
    }
}

const MIB: u64 = 1 << 20;
const LENS: [u64; 6] = [16 * MIB, 0, 4 * MIB, 0, MIB, 0];

fn open(fake: &Fake, kept: &[(String, Fd)]) -> Result<(BarMemory, MemoryOrigin), DeviceError> {
    BarMemory::open(fake.device()?, kept, None, u64::MAX)
}

#[test]
fn the_largest_bar_that_can_be_mapped_is_the_memory_and_the_manifest_may_say_otherwise() -> Result<(), DeviceError> {
    let fake = Fake::new(LENS)?;
    let (memory, origin) = open(&fake, &[])?;
    assert_eq!((memory.frame_count(), origin), (1023, MemoryOrigin::Created), "BAR 2, without the mark's page");
    let (small, _) = BarMemory::open(fake.device()?, &[], Some(4), u64::MAX)?;
    assert_eq!(small.frame_count(), 255);
    let (limited, _) = BarMemory::open(fake.device()?, &[], None, MIB)?;
    assert_eq!(limited.frame_count(), 256);
    let said = |number, lens| -> Result<String, DeviceError> {
        let outcome = BarMemory::open(Fake::new(lens)?.device()?, &[], number, u64::MAX);
        Ok(outcome.map(|(memory, _)| memory.frame_count()).expect_err("no memory").to_string())
    };
    assert!(said(Some(0), LENS)?.contains("BAR 0 of fake cannot be mapped"));
    assert!(said(Some(1), LENS)?.contains("BAR 1 of fake cannot be mapped"));
    assert!(
        said(None, [MIB, 0, 0, PAGE_BYTES, 0, 0])?.contains("no BAR"),
        "registers, and one page for the mark alone"
    );
    Ok(())
}

#[test]
fn the_next_incarnation_adopts_the_bytes() -> Result<(), DeviceError> {
    let fake = Fake::new(LENS)?;
    let (first, _) = open(&fake, &[])?;
    first.window().store_u64(1022 * PAGE_BYTES, 4711)?;
    let kept = first.kept();
    assert!(kept.iter().any(|(name, _)| name == "driver/pci-device"), "the open device is kept too");
    drop(first);
    let (second, origin) = open(&fake, &kept)?;
    assert_eq!((origin, second.window().load_u64(1022 * PAGE_BYTES)?), (MemoryOrigin::Adopted, 4711));
    assert_eq!(second.kept().len(), 2);
    Ok(())
}

#[test]
fn bytes_that_are_not_proven_are_given_up_and_zeroed() -> Result<(), DeviceError> {
    let fake = Fake::new(LENS)?;
    let (first, _) = open(&fake, &[])?;
    let kept = first.kept();
    first.window().store_u64(0, 1)?;
    // Another manager had the device meanwhile.
    let (other, origin) = open(&fake, &[])?;
    assert_eq!((origin, other.window().load_u64(0)?), (MemoryOrigin::Created, 0));
    other.window().store_u64(0, 2)?;
    let (again, origin) = open(&fake, &kept)?;
    assert_eq!((origin, again.window().load_u64(0)?), (MemoryOrigin::Created, 0));
    // Or it is another device, or it was switched off.
    let (_, origin) = open(&Fake::new(LENS)?, &again.kept())?;
    assert_eq!(origin, MemoryOrigin::Created);
    Ok(())
}

#[test]
fn everybody_who_is_shown_the_bar_sees_the_same_bytes() -> Result<(), DeviceError> {
    let (memory, _) = open(&Fake::new(LENS)?, &[])?;
    let Aperture { fd, offset_bytes } = memory.aperture().ok_or("the CPU sees it")?;
    let seen = Window::map(fd.as_fd(), offset_bytes, u64::from(memory.frame_count()) * PAGE_BYTES, Prot::ReadWrite)?;
    memory.window().store_u64(5 * PAGE_BYTES, 99)?;
    assert_eq!(seen.load_u64(5 * PAGE_BYTES)?, 99);
    Ok(())
}
