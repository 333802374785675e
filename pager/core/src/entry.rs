//! One directory entry: 8 bytes that say where the only valid copy of a page is.
//!
//! ```text
//!  63      56 55   54     53     52     51      44 43            12 11        10     4 3     0
//! | poison   |huge|  cpu |shared|pinned| mapped   | frame          | discarded | device | state |
//! ```
//!
//! `mapped` has one bit a device: it holds a device mapping of this page (of its own frame, or of the system page in place).
//! `cpu`: the program's page table may have the frame (coherent device memory, `coherent.rs`); in masks it is [`CPU`], a mapping like
//! that of a device, so that whoever takes the frame away revokes it first. `shared`: other entries may name the same frame (a fork); devices may then only read it. `huge`: one of 512 aligned pages in
//! 512 aligned frames; cleared in all of them when one goes its own way. `discarded`: the program gave the content up while the page was
//! on the way or in a frame. It stays set until nothing is left of the content ([`Entry::followed_by`]), so that a pager that finds it after
//! a crash brings nothing back.
//! The shell keeps entries in a memfd of the vault as atomic words; nothing else about a page survives a crash.

use crate::event::DeviceId;

/// Devices are few: the mapped mask has one bit each.
pub const DEVICE_COUNT_MAX: u8 = 8;

/// The program's own page table, beside the devices' bits of a mapped mask.
pub const CPU: u16 = 1 << 8;

const DEVICE_SHIFT: u32 = 4;
const DISCARDED: u64 = 1 << 11;
const FRAME_SHIFT: u32 = 12;
const MAPPED_SHIFT: u32 = 44;
const PINNED: u64 = 1 << 52;
const SHARED: u64 = 1 << 53;
const CPU_SHIFT: u32 = 54;
const HUGE: u64 = 1 << 55;
const POISON_SHIFT: u32 = 56;

/// Frame of a page that was on its way home when its device lost the memory: only a system page can be found any more.
/// Written to the directory, so that a pager that dies before it has looked does not read the new memory.
pub const LOST_FRAME: u32 = u32::MAX;

/// Where the valid copy of a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageState {
    /// Never touched: the system backing is the authority and holds nothing, which reads as zero.
    Absent,
    /// The system backing is the authority; a hole in it reads as zero.
    System,
    /// On its way out; the system backing is still the authority, write-protected.
    MovingOut,
    /// The device frame is the authority.
    Device,
    /// On its way home; the system page is the authority as soon as it exists, before that the frame.
    MovingHome,
    /// The device frame is the authority, and no CPU may look without asking (device atomics).
    Exclusive,
    /// System copy valid, read-only copies on devices.
    Duplicated,
    /// Lost; accesses get SIGBUS.
    Poisoned,
}

/// Why a page is poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PoisonReason {
    /// The device came back with other memory, or will not come back.
    DeviceLost = 1,
    /// The entry itself was not legal.
    BadEntry = 2,
    /// Two entries named one frame.
    FrameConflict = 3,
}

/// A bit pattern that no pager writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Directory entry {bits:#018x} is not legal: the directory was damaged")]
pub struct BadEntry {
    /// What was found.
    pub bits: u64,
}

/// See the module head.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry(u64);

impl Entry {
    /// Never touched.
    pub const ABSENT: Self = Self(0);
    /// In system memory.
    pub const SYSTEM: Self = Self(1);

    /// A forked child's page that was on its parent's way out. Pages on their own way out are not shared.
    pub const WAITS_FOR_PARENT: Self = Self(2 | SHARED);

    /// Checks a raw word.
    pub fn decode(bits: u64) -> Result<Self, BadEntry> {
        let entry = Self(bits);
        let state_ok = bits & 0xf <= 7;
        let device_ok = entry.device().0 < DEVICE_COUNT_MAX;
        let reason_ok = (entry.0 >> POISON_SHIFT == 0) == (bits & 0xf != 7);
        if state_ok && device_ok && reason_ok { Ok(entry) } else { Err(BadEntry { bits }) }
    }

    /// A page whose valid copy is a frame.
    pub fn on_device(device: DeviceId, frame: u32) -> Self {
        Self(3 | u64::from(device.0) << DEVICE_SHIFT | u64::from(frame) << FRAME_SHIFT)
    }

    /// A lost page.
    pub fn poisoned(reason: PoisonReason) -> Self {
        Self(7 | (reason as u64) << POISON_SHIFT)
    }

    /// The raw word.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Its state.
    pub fn state(self) -> PageState {
        match self.0 & 0xf {
            0 => PageState::Absent,
            1 => PageState::System,
            2 => PageState::MovingOut,
            3 => PageState::Device,
            4 => PageState::MovingHome,
            5 => PageState::Exclusive,
            6 => PageState::Duplicated,
            _ => PageState::Poisoned,
        }
    }

    /// The same page in another state.
    #[must_use]
    pub fn with_state(self, state: PageState) -> Self {
        let code = match state {
            PageState::Absent => 0,
            PageState::System => 1,
            PageState::MovingOut => 2,
            PageState::Device => 3,
            PageState::MovingHome => 4,
            PageState::Exclusive => 5,
            PageState::Duplicated => 6,
            PageState::Poisoned => 7,
        };
        Self(self.0 & !0xf | code)
    }

    /// Which device, when a frame is named.
    pub fn device(self) -> DeviceId {
        DeviceId((self.0 >> DEVICE_SHIFT) as u8 & 0x7f)
    }

    /// Which frame, when one is named.
    pub fn frame(self) -> u32 {
        (self.0 >> FRAME_SHIFT) as u32
    }

    /// Whether the entry names a device frame, which is in use therefore.
    pub fn owns_frame(self) -> bool {
        self.lives_on_device() || matches!(self.state(), PageState::MovingHome | PageState::Duplicated)
    }

    /// Whether the only valid copy is in a device frame and nothing is under way.
    pub fn lives_on_device(self) -> bool {
        matches!(self.state(), PageState::Device | PageState::Exclusive)
    }

    /// Whether the only valid copy is in the system backing and nothing is under way.
    pub fn is_settled_system(self) -> bool {
        matches!(self.state(), PageState::Absent | PageState::System)
    }

    /// Whether a transfer is under way.
    pub fn is_moving(self) -> bool {
        matches!(self.state(), PageState::MovingOut | PageState::MovingHome)
    }

    /// Who maps the page: bit d for device d, and [`CPU`].
    pub fn mapped_mask(self) -> u16 {
        let cpu = if self.cpu_mapped() { CPU } else { 0 };
        (self.0 >> MAPPED_SHIFT) as u16 & 0xff | cpu
    }

    /// The program may have the frame itself mapped.
    pub fn cpu_mapped(self) -> bool {
        self.0 >> CPU_SHIFT & 1 != 0
    }

    /// With another mask.
    #[must_use]
    pub fn with_mapped_mask(self, mask: u16) -> Self {
        let devices = u64::from(mask & 0xff) << MAPPED_SHIFT;
        let cpu = u64::from(mask & CPU != 0) << CPU_SHIFT;
        Self(self.0 & !(0xff << MAPPED_SHIFT | 1 << CPU_SHIFT) | devices | cpu)
    }

    /// Pinned pages stay in system memory.
    pub fn pinned(self) -> bool {
        self.0 & PINNED != 0
    }

    /// With or without the pin.
    #[must_use]
    pub fn with_pinned(self, on: bool) -> Self {
        Self(if on { self.0 | PINNED } else { self.0 & !PINNED })
    }

    /// The frame may be named by other entries too.
    pub fn shared(self) -> bool {
        self.0 & SHARED != 0
    }

    /// With or without.
    #[must_use]
    pub fn with_shared(self, on: bool) -> Self {
        Self(if on { self.0 | SHARED } else { self.0 & !SHARED })
    }

    /// Part of 512 aligned pages in 512 aligned frames.
    pub fn huge(self) -> bool {
        self.0 & HUGE != 0
    }

    /// With or without.
    #[must_use]
    pub fn with_huge(self, on: bool) -> Self {
        Self(if on { self.0 | HUGE } else { self.0 & !HUGE })
    }

    /// The program gave the content up.
    pub fn discarded(self) -> bool {
        self.0 & DISCARDED != 0
    }

    /// With or without.
    #[must_use]
    pub fn with_discarded(self, on: bool) -> Self {
        Self(if on { self.0 | DISCARDED } else { self.0 & !DISCARDED })
    }

    /// What the directory has to say when `next` is published for a page that is this: content that was given up stays so as long as
    /// there is any.
    #[must_use]
    pub fn followed_by(self, next: Self) -> Self {
        let any_left = next.is_moving() || next.owns_frame();
        next.with_discarded(next.discarded() || self.discarded() && any_left)
    }

    /// On its way home, and the frame is lost.
    #[must_use]
    pub(crate) fn without_frame(self) -> Self {
        Self(self.0 | u64::from(LOST_FRAME) << FRAME_SHIFT)
    }

    /// The entry of the page `count` further on when frames are consecutive.
    #[must_use]
    pub(crate) fn plus_frames(self, count: u32) -> Self {
        Self(self.0 + (u64::from(count) << FRAME_SHIFT))
    }

    /// The system-side entry that is left when the frame is given up; keeps the pin, drops frame and mappings.
    #[must_use]
    pub fn back_to_system(self) -> Self {
        Self::SYSTEM.with_pinned(self.pinned())
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.state())?;
        if self.owns_frame() {
            write!(f, "{{device {}, frame {}}}", self.device().0, self.frame())?;
        }
        if self.mapped_mask() != 0 {
            write!(f, " mapped {:#b}", self.mapped_mask())?;
        }
        let marks = [
            (self.pinned(), "pinned"),
            (self.shared(), "shared"),
            (self.huge(), "huge"),
            (self.discarded(), "discarded"),
        ];
        for (on, name) in marks {
            if on {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_disturb_each_other() {
        let entry = Entry::on_device(DeviceId(7), u32::MAX).with_mapped_mask(0xa5 | CPU).with_pinned(true);
        assert_eq!((entry.state(), entry.device(), entry.frame()), (PageState::Device, DeviceId(7), u32::MAX));
        assert_eq!((entry.mapped_mask(), entry.pinned()), (0xa5 | CPU, true));
        let moving = entry.with_state(PageState::MovingHome).with_mapped_mask(0);
        assert_eq!((moving.frame(), moving.mapped_mask(), moving.pinned()), (u32::MAX, 0, true));
        assert_eq!(Entry::decode(moving.bits()), Ok(moving));
        assert_eq!(entry.back_to_system(), Entry::SYSTEM.with_pinned(true));
    }

    #[test]
    fn the_cpu_is_one_more_that_maps_and_takes_no_other_bit() {
        let entry = Entry::on_device(DeviceId(1), 5).with_huge(true).with_shared(true);
        let mapped = entry.with_mapped_mask(CPU);
        assert_eq!(mapped.bits() ^ entry.bits(), 1 << 54);
        assert_eq!((mapped.cpu_mapped(), mapped.mapped_mask()), (true, CPU));
        assert_eq!(mapped.with_mapped_mask(0xff).mapped_mask(), 0xff);
        assert_eq!(mapped.with_mapped_mask(0), entry);
        assert_eq!(Entry::decode(mapped.bits()), Ok(mapped));
        assert!(!mapped.back_to_system().cpu_mapped());
    }

    #[test]
    fn what_was_given_up_stays_so_until_nothing_is_left_of_it() {
        let on_device = Entry::on_device(DeviceId(7), u32::MAX);
        let moving = Entry::SYSTEM.with_state(PageState::MovingOut).with_discarded(true);
        let arrived = moving.followed_by(on_device);
        assert_eq!(arrived.bits() ^ on_device.bits(), 1 << 11);
        assert_eq!((arrived.device(), arrived.frame()), (DeviceId(7), u32::MAX));
        assert_eq!(Entry::decode(arrived.bits()), Ok(arrived));
        assert!(arrived.followed_by(on_device.with_state(PageState::MovingHome)).discarded());
        for end in [Entry::ABSENT, Entry::SYSTEM, Entry::poisoned(PoisonReason::DeviceLost)] {
            assert_eq!(arrived.followed_by(end), end);
        }
        assert_eq!(Entry::SYSTEM.followed_by(on_device), on_device);
        assert!(!arrived.back_to_system().discarded());
    }

    #[test]
    fn illegal_bits_are_an_error_and_never_a_state() {
        for bits in [0x8, 0xf, 3 | 8 << 4, 7, 1 | 1 << 56] {
            assert_eq!(Entry::decode(bits), Err(BadEntry { bits }));
        }
        assert!(Entry::decode(Entry::poisoned(PoisonReason::BadEntry).bits()).is_ok());
    }
}
