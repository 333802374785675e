//! A simulated machine around the core: page cache, page tables, device memory, drivers, clients, and crashes of the pager.
//!
//! ```text
//!   Op (test) --> World: actors touch pages ----> faults, requests ---> events (FIFO, as in the shell)
//!                   ^                                                     |
//!                   |  check after every action                           v
//!                 execute <------------- actions ------------------- Core::handle
//!                   `-- pending (CopyOut, Fill, Revoke, MapCpu, Scrub, ZeroFrames): answered later, in any order
//! ```
//!
//! Every page has an expected value, the last one that anybody wrote. After every single action the copy that the directory calls valid
//! must hold it, so a lost write is seen at the step that loses it. A crash throws the core, its queue and every undelivered
//! completion away; the world stays. Everything random comes from one seed.
//!
//! What the world takes for granted, because the shell promises it: a copy that a dead pager asked for does not start after the next
//! pager has met its device; a copy asked of memory that was lost meanwhile fails and never touches the new memory; a mapping is
//! installed at the instant of the reply that grants it; a pager that comes after a dead one puts nothing in place, and poisons nothing, before
//! it has told the core what that one had read. Stray zero pages in holes (somebody reads a hole through a mapping that no
//! userfaultfd watches) are not injected.

mod check;
mod crash;
mod execute;
mod fork;
mod leftover;
mod machine;
mod private;
mod program;
mod simulator;

pub use check::Violation;
pub use machine::{DeviceModel, Grant, Mapping, PageModel, RegionModel, World};
pub use simulator::{Config, Op, Simulator};

/// Small deterministic generator (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Same seed, same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound` (zero when the bound is).
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next_u64() % bound }
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u8) -> bool {
        percent > 0 && self.below(100) < u64::from(percent)
    }
}

/// How often steps fail, in percent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// EAGAIN of write-protect and fills.
    pub again: u8,
    /// A copy from or to a device fails; a punch fails half-way.
    pub io: u8,
    /// A fill stops early.
    pub partial: u8,
}
