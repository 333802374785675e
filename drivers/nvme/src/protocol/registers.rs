//! Registers of BAR 0.

use std::time::Duration;

/// Capabilities, 64 bits.
pub const CAP: u64 = 0x00;
/// Controller configuration.
pub const CC: u64 = 0x14;
/// Controller status.
pub const CSTS: u64 = 0x1c;
/// Sizes of the admin queues.
pub const AQA: u64 = 0x24;
/// Where the admin submission queue is, 64 bits.
pub const ASQ: u64 = 0x28;
/// Where the admin completion queue is, 64 bits.
pub const ACQ: u64 = 0x30;
/// Where the controller's memory buffer is.
pub const CMBLOC: u64 = 0x38;
/// How large it is, and what it is for.
pub const CMBSZ: u64 = 0x3c;
/// Switches it on, 64 bits.
pub const CMBMSC: u64 = 0x50;
/// First doorbell.
pub const DOORBELLS: u64 = 0x1000;

/// Every read of a device that is gone.
pub const GONE: u32 = u32::MAX;

/// CAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Entries that a queue may have.
    pub fn queue_entries_max(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }

    /// How long enabling and disabling may take. A device that says zero gets one unit.
    pub fn timeout(self) -> Duration {
        Duration::from_millis((self.0 >> 24 & 0xff).max(1) * 500)
    }

    /// Bytes between two doorbells.
    pub fn doorbell_stride(self) -> u64 {
        4 << (self.0 >> 32 & 0xf)
    }

    /// The NVM command set can be chosen.
    pub fn has_nvm_commands(self) -> bool {
        self.0 >> 37 & 1 != 0
    }

    /// Pages of 4 KiB can be chosen.
    pub fn has_small_pages(self) -> bool {
        self.0 >> 48 & 0xf == 0
    }

    /// CMBMSC is there.
    pub fn has_cmb_control(self) -> bool {
        self.0 >> 57 & 1 != 0
    }

    /// Doorbell of a submission queue's tail.
    pub fn tail_doorbell(self, queue: u16) -> u64 {
        DOORBELLS + 2 * u64::from(queue) * self.doorbell_stride()
    }

    /// Doorbell of a completion queue's head.
    pub fn head_doorbell(self, queue: u16) -> u64 {
        self.tail_doorbell(queue) + self.doorbell_stride()
    }
}

/// CC of a controller in use: NVM commands, pages of 4 KiB, round robin, entries of 64 and 16 bytes.
pub const CC_ENABLED: u32 = 1 | 6 << 16 | 4 << 20;
/// CC of a controller that is not.
pub const CC_DISABLED: u32 = 0;

/// CSTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// Takes commands.
    pub fn is_ready(self) -> bool {
        self.0 & 1 != 0
    }

    /// Will do nothing more before a reset.
    pub fn is_fatal(self) -> bool {
        self.0 & 2 != 0
    }

    /// Nobody is there.
    pub fn is_gone(self) -> bool {
        self.0 == GONE
    }
}

/// The controller's memory buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmbInfo {
    /// Which BAR.
    pub bar: u8,
    /// Where in it.
    pub offset_bytes: u64,
    /// Size.
    pub len_bytes: u64,
    /// Commands may read their data from it, and write it there.
    pub takes_data: bool,
}

impl CmbInfo {
    /// From CMBLOC and CMBSZ; `None`: there is none.
    pub fn decode(location: u32, size: u32) -> Option<Self> {
        let unit = 4096_u64.checked_shl(4 * (size >> 8 & 0xf)).filter(|_| size >> 8 & 0xf <= 6)?;
        let len_bytes = u64::from(size >> 12) * unit;
        let found = Self {
            bar: (location & 7) as u8,
            offset_bytes: u64::from(location >> 12) * unit,
            len_bytes,
            takes_data: size >> 3 & 3 == 3,
        };
        (len_bytes > 0).then_some(found)
    }

    /// CMBMSC: registers on, memory on, seen by the device at `address` (4 KiB aligned).
    pub fn control(address: u64) -> u64 {
        address & !0xfff | 3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_of_a_known_controller() {
        // QEMU 7.2's nvme: 2048 entries, contiguous queues, 15 * 500 ms, stride 4, NVM, pages up to 64 KiB.
        let cap = Capabilities(2047 | 1 << 16 | 0xf << 24 | 1 << 37 | 4 << 52);
        assert_eq!((cap.queue_entries_max(), cap.timeout()), (2048, Duration::from_millis(7500)));
        assert!(cap.has_nvm_commands() && cap.has_small_pages() && !cap.has_cmb_control());
        assert_eq!((cap.tail_doorbell(0), cap.head_doorbell(0), cap.tail_doorbell(3)), (0x1000, 0x1004, 0x1018));
        let wide = Capabilities(2 << 32);
        assert_eq!((wide.tail_doorbell(1), wide.head_doorbell(1)), (0x1020, 0x1030));
        assert_eq!(wide.timeout(), Duration::from_millis(500));
    }

    #[test]
    fn a_buffer_of_64_mib_behind_bar_2() {
        let cmb = CmbInfo::decode(0x62, 0x4021d);
        assert_eq!(cmb, Some(CmbInfo { bar: 2, offset_bytes: 0, len_bytes: 64 << 20, takes_data: true }));
        assert_eq!(CmbInfo::decode(0, 0), None);
        assert_eq!(CmbInfo::decode(2, 1 << 12 | 9 << 8), None, "a unit that is reserved");
    }

    #[test]
    fn a_removed_device_is_not_taken_for_a_ready_one() {
        assert!(Status(GONE).is_gone() && !Status(1).is_gone());
        assert!(Status(1).is_ready() && !Status(1).is_fatal() && Status(3).is_fatal());
    }
}
