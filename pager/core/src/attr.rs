//! What a client has advised for a page: 8 bytes a page, beside the directory entry in the same memfd of the vault.
//!
//! ```text
//!  63        48 47        40 39     32 31     24 23         16 15          8 7      0
//!  | (zero)    | granularity | flags   | no access| in place    | prefetched  | preferred |
//! ```
//!
//! The pager's shell writes it when the client advises; the core only reads it. Zero is the default of everything, so a new
//! directory needs no initialisation. A word survives every crash, and a range can be split without any work.

use crate::event::{DeviceId, Target};

const PREFETCHED_SHIFT: u32 = 8;
const IN_PLACE_SHIFT: u32 = 16;
const NO_ACCESS_SHIFT: u32 = 24;
const FLAGS_SHIFT: u32 = 32;
const GRANULARITY_SHIFT: u32 = 40;
const READ_MOSTLY: u64 = 1 << FLAGS_SHIFT;
const READ_ONLY: u64 = 1 << (FLAGS_SHIFT + 1);

/// See the module head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attr(pub u64);

fn encode(target: Option<Target>) -> u64 {
    match target {
        None => 0,
        Some(Target::Home) => 1,
        Some(Target::Device(device)) => 2 + u64::from(device.0),
    }
}

fn decode(code: u8) -> Option<Target> {
    match code {
        0 => None,
        1 => Some(Target::Home),
        device => Some(Target::Device(DeviceId(device - 2))),
    }
}

impl Attr {
    fn byte(self, shift: u32) -> u8 {
        (self.0 >> shift) as u8
    }

    fn with_byte(self, shift: u32, value: u64) -> Self {
        Self(self.0 & !(0xff << shift) | (value & 0xff) << shift)
    }

    fn with_flag(self, flag: u64, on: bool) -> Self {
        Self(if on { self.0 | flag } else { self.0 & !flag })
    }

    /// Where the page shall live if nobody has a better claim.
    pub fn preferred(self) -> Option<Target> {
        decode(self.byte(0))
    }

    /// With another one.
    #[must_use]
    pub fn with_preferred(self, target: Option<Target>) -> Self {
        self.with_byte(0, encode(target))
    }

    /// Where it was prefetched to last.
    pub fn prefetched(self) -> Option<Target> {
        decode(self.byte(PREFETCHED_SHIFT))
    }

    /// With another one.
    #[must_use]
    pub fn with_prefetched(self, target: Option<Target>) -> Self {
        self.with_byte(PREFETCHED_SHIFT, encode(target))
    }

    /// Bit d: device d maps it in place.
    pub fn in_place_mask(self) -> u8 {
        self.byte(IN_PLACE_SHIFT)
    }

    /// With another one.
    #[must_use]
    pub fn with_in_place_mask(self, mask: u8) -> Self {
        self.with_byte(IN_PLACE_SHIFT, mask.into())
    }

    /// Bit d: device d may not use it.
    pub fn no_access_mask(self) -> u8 {
        self.byte(NO_ACCESS_SHIFT)
    }

    /// With another one.
    #[must_use]
    pub fn with_no_access_mask(self, mask: u8) -> Self {
        self.with_byte(NO_ACCESS_SHIFT, mask.into())
    }

    /// Reading devices get copies.
    pub fn read_mostly(self) -> bool {
        self.0 & READ_MOSTLY != 0
    }

    /// With or without.
    #[must_use]
    pub fn with_read_mostly(self, on: bool) -> Self {
        self.with_flag(READ_MOSTLY, on)
    }

    /// Devices may not write.
    pub fn read_only(self) -> bool {
        self.0 & READ_ONLY != 0
    }

    /// With or without.
    #[must_use]
    pub fn with_read_only(self, on: bool) -> Self {
        self.with_flag(READ_ONLY, on)
    }

    /// A CPU fault brings home an aligned block of 2^n pages; `None`: policy decides.
    pub fn granularity_log2_pages(self) -> Option<u8> {
        self.byte(GRANULARITY_SHIFT).checked_sub(1)
    }

    /// With another one; at most 63.
    #[must_use]
    pub fn with_granularity(self, log2_pages: Option<u8>) -> Self {
        self.with_byte(GRANULARITY_SHIFT, log2_pages.map_or(0, |log2| u64::from(log2.min(63)) + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attribute_is_independent_of_the_others() {
        let all = Attr::default()
            .with_preferred(Some(Target::Device(DeviceId(7))))
            .with_prefetched(Some(Target::Home))
            .with_in_place_mask(0xa5)
            .with_no_access_mask(0x5a)
            .with_read_mostly(true)
            .with_read_only(true)
            .with_granularity(Some(63));
        assert_eq!(all.preferred(), Some(Target::Device(DeviceId(7))));
        assert_eq!(all.prefetched(), Some(Target::Home));
        assert_eq!((all.in_place_mask(), all.no_access_mask()), (0xa5, 0x5a));
        assert!(all.read_mostly() && all.read_only());
        assert_eq!(all.granularity_log2_pages(), Some(63));
        let none = all
            .with_preferred(None)
            .with_prefetched(None)
            .with_in_place_mask(0)
            .with_no_access_mask(0)
            .with_read_mostly(false)
            .with_read_only(false)
            .with_granularity(None);
        assert_eq!(none, Attr::default());
    }
}
