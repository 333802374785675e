//! Config space of a modelled device: 256 bytes, of which the driver may change what PCI lets it change.
//!
//! ```text
//!   00 vendor, device   04 command, status   08 revision, class   10 BAR 0..5   2c subsystem   34 -> 40: MSI-X capability
//! ```

use crate::model::Identity;

/// Bytes of config space.
pub const CONFIG_BYTES: usize = 256;
/// Bits of the command register: memory accesses are answered, the device may do DMA.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// The device may read and write memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BARS: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const MSIX: usize = 0x40;
const MSIX_ID: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
/// INTx off, SERR, parity, bus master, memory: what models know of the command register.
const COMMAND_WRITABLE: u16 = 0x0546;

/// A base address register, as config space shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarShape {
    /// 0 to 5.
    pub number: u8,
    /// A power of two.
    pub len_bytes: u64,
    /// Takes the next register's place too.
    pub is_64_bit: bool,
    /// Reading has no side effects.
    pub prefetchable: bool,
}

/// Where the MSI-X table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// The BAR of table and pending bits.
    pub bar: u8,
    /// Where the pending bits begin; the table begins at 0.
    pub pending_offset: u32,
}

/// The bytes, and which of them can be written.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    /// As after power-up. `msix`: where the table is, if the device has vectors.
    pub fn new(identity: &Identity, bars: &[BarShape], msix: Option<MsixPlace>) -> Self {
        let mut space = Self { bytes: [0; CONFIG_BYTES], writable: [0; CONFIG_BYTES] };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(8, &(identity.class << 8).to_le_bytes());
        space.put(SUBSYSTEM, &identity.vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.device.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        for bar in bars {
            space.put_bar(bar);
        }
        if let Some(place) = msix {
            space.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            space.put(CAPABILITIES, &[MSIX as u8]);
            space.put(MSIX, &[MSIX_ID, 0]);
            space.put(MSIX + 2, &(identity.vectors - 1).to_le_bytes());
            space.put(MSIX + 4, &u32::from(place.bar).to_le_bytes());
            space.put(MSIX + 8, &(place.pending_offset | u32::from(place.bar)).to_le_bytes());
            space.allow(MSIX + 2, &(MSIX_ENABLE | 1 << 14).to_le_bytes());
        }
        space
    }

    /// Copies bytes out; what lies outside reads as ones.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let there = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or(&[]);
        let ones = std::iter::repeat(&0xff);
        for (byte, value) in bytes.iter_mut().zip(there.iter().chain(ones)) {
            *byte = *value;
        }
    }

    /// Changes the bits that can be changed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let (Some(there), Some(masks)) = (self.bytes.get_mut(offset..), self.writable.get(offset..)) else { return };
        for ((old, mask), byte) in there.iter_mut().zip(masks).zip(bytes) {
            *old = *old & !mask | byte & mask;
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// The device does no DMA until the driver allows it again.
    pub fn stop_bus_master(&mut self) {
        self.put(COMMAND, &(self.command() & !COMMAND_BUS_MASTER).to_le_bytes());
    }

    /// Function-level reset: command and MSI-X as after power-up; addresses stay, as VFIO restores them.
    pub fn reset(&mut self) {
        self.put(COMMAND, &[0, 0]);
        self.write(MSIX as u64 + 2, &[0, 0]);
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Address bits below the size are zero and stay so: writing ones and reading back tells the size.
    fn put_bar(&mut self, bar: &BarShape) {
        let place = BARS + 4 * usize::from(bar.number);
        let mask = !(bar.len_bytes - 1) & !0xf;
        let kind = (u32::from(bar.is_64_bit) << 2) | (u32::from(bar.prefetchable) << 3);
        self.put(place, &kind.to_le_bytes());
        self.allow(place, &(mask as u32).to_le_bytes());
        if bar.is_64_bit {
            self.allow(place + 4, &((mask >> 32) as u32).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity { vendor: 0x1234, device: 0xabcd, class: 0x01_08_02, vectors: 33 };
        let bars = [
            BarShape { number: 0, len_bytes: 0x4000, is_64_bit: false, prefetchable: false },
            BarShape { number: 2, len_bytes: 8 << 30, is_64_bit: true, prefetchable: true },
        ];
        ConfigSpace::new(&identity, &bars, Some(MsixPlace { bar: 4, pending_offset: 0x1000 }))
    }

    fn u32_at(space: &ConfigSpace, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_device_introduces_itself() {
        let space = space();
        assert_eq!(u32_at(&space, 0), 0xabcd_1234);
        assert_eq!(u32_at(&space, 8), 0x0108_0200);
        assert_eq!(u32_at(&space, 0x2c), 0xabcd_1234);
        assert_eq!(u32_at(&space, 0x34) & 0xff, 0x40);
        assert_eq!(u32_at(&space, 0x40), 32 << 16 | 0x11);
        assert_eq!((u32_at(&space, 0x44), u32_at(&space, 0x48)), (4, 0x1004));
        assert_eq!(u32_at(&space, 256), u32::MAX);
    }

    #[test]
    fn sizes_are_found_by_writing_ones() {
        let mut space = space();
        for bar in 0..6 {
            space.write(0x10 + 4 * bar, &[0xff; 4]);
        }
        assert_eq!(u32_at(&space, 0x10), !0x3fff);
        assert_eq!(u32_at(&space, 0x14), 0, "there is no BAR 1");
        assert_eq!((u32_at(&space, 0x18), u32_at(&space, 0x1c)), (0b1100, !1), "8 GiB, 64 bits, prefetchable");
    }

    #[test]
    fn only_what_pci_allows_can_be_written() {
        let mut space = space();
        space.write(0, &[0; 256]);
        assert_eq!(u32_at(&space, 0), 0xabcd_1234);
        space.write(4, &[0xff, 0xff]);
        assert_eq!(space.command(), COMMAND_WRITABLE);
        space.stop_bus_master();
        assert_eq!(space.command() & (COMMAND_MEMORY | COMMAND_BUS_MASTER), COMMAND_MEMORY);
        space.write(0x42, &[0xff, 0xff]);
        assert_eq!(u32_at(&space, 0x40) >> 16, 0xc000 | 32);
        space.write(u64::MAX - 1, &[0; 4]);
        space.reset();
        assert_eq!((space.command(), u32_at(&space, 0x40) >> 16), (0, 32));
    }
}
