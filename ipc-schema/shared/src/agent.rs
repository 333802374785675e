//! The pager's orders to a client's agent, the agent's answers, and where both lie: one memfd, made by the client's SDK, kept in the
//! vault, so that a pager that dies and comes back finds it, and an agent too.
//!
//! ```text
//!   pager:  order -> lane 0, ring the bell (futex) --> agent: peek -> do it -> statuses -> area -> answer -> lane 1 -> advance
//!   pager:  answer <- lane 1, statuses <- area     <-- eventfd
//!
//!   words      0 ring of 64 + 64 descriptors | 1088 fill gate | 1096 diary | 1120 bell | 1128 control | 1152 blocks
//!              1280 changed | 1536 areas
//! ```
//! **An order is taken out of lane 0 after its answer is in lane 1.** An agent that is killed in between is followed by one that looks
//! whether the last answer is that order's, and else does it again: every order is absolute and can be repeated.
//!
//! An area is 512 bytes, the status of each page of one order; an order's area is its place in lane 0 (index modulo 64). The pager has
//! at most [`IN_FLIGHT_MAX`] orders unanswered, so no area is written before it was read, and lane 1 has room for every answer.
//!
//! The program can write anything here. The pager checks what it reads (`pager/service/src/agent.rs`), and a program that lies loses
//! its own pages at worst.

use crate::ring;
use crate::words::Words;
use core::sync::atomic::Ordering::Relaxed;

/// Descriptors in a lane.
pub const ENTRIES: u64 = 64;
/// Orders that may be unanswered at a time; the rest of the ring is for answers that an agent gives twice because it was killed.
pub const IN_FLIGHT_MAX: u64 = 48;
/// Pages of an order, at most: those of a staging slot, and of a scratch block.
pub const ORDER_PAGES: u64 = 512;
/// Staging slots of [`ORDER_PAGES`] pages, and as many scratch blocks: what slot n got lies in block n until it is dropped.
pub const SLOTS: u64 = 16;
/// Scratch blocks in which huge pages are made for arrivals.
pub const HUGE_BLOCKS: u64 = 2;
/// First word of the [`FillGate`](crate::fill_gate::FillGate).
pub const GATE: usize = 1088;
/// Orders up to the one in this word are a dead pager's: they are answered `Failed`, and nothing is done.
pub const DEAD_PAGERS: usize = 1091;
/// First word of the diary: the ranges that the agent last began to drop with madvise, first byte and end. The event of that names no
/// author, and a new pager must not take it for the program's.
pub const DIARY: usize = 1096;
/// The agent is never more than one ahead of the event that is being dealt with: madvise returns when its event is read.
pub const DIARY_ENTRIES: u64 = 8;
/// The low half changes with each ring of the bell: the futex on which the agent sleeps.
pub const BELL: usize = 1120;
/// Not zero: the agent shall end.
pub const STOP: usize = 1128;
/// Test hook: until when (CLOCK_MONOTONIC, ns) the agent shall do nothing.
pub const PAUSE_UNTIL_NS: usize = 1129;
/// Ranges that were ever written into the diary.
pub const DROPS: usize = 1130;
/// Changes whenever the pager allows a device anything: who has looked at the program's mappings before looks again.
pub const GRANTS: usize = 1131;
/// First word of the blocks' records.
pub const BLOCKS: usize = 1152;
/// Words of a block's record.
pub const BLOCK_WORDS: usize = 8;
/// First word of those, one for each place in lane 0, that name an order whose addresses may show other memory by now: nothing is taken
/// from there, nor dropped.
pub const CHANGED: usize = 1280;
/// First word of the areas.
pub const AREAS: usize = 1536;
/// Words of an area.
pub const AREA_WORDS: usize = ORDER_PAGES as usize / 8;
/// Words of the whole.
pub const WORDS: usize = AREAS + ENTRIES as usize * AREA_WORDS;

const _: () = {
    assert!(ring::SLOTS + 2 * ENTRIES as usize * ring::DESCRIPTOR_WORDS <= GATE);
    assert!(BLOCKS + SLOTS as usize * BLOCK_WORDS <= CHANGED);
    assert!(CHANGED + ENTRIES as usize <= AREAS);
};

/// What the agent is asked to do: what Linux lets only a process of that address space do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Take private pages out of the address space (UFFDIO_MOVE to the scratch block of the slot's number) and copy them to the staging
    /// slot, page i to offset i. Pages that cannot be taken stay; so do all pages of a mapping without write permission (`ReadOnly`).
    MoveOut {
        /// Below [`SLOTS`]; its block is empty.
        slot: u32,
    },
    /// Copy pages to the staging slot and leave them where they are: the pager has write-protected them.
    CopyOut {
        /// Below [`SLOTS`].
        slot: u32,
    },
    /// The copies are valid elsewhere: give back the scratch pages of `MoveOut`, and with `in_place` the pages that are in the address
    /// space (MADV_DONTNEED).
    Drop {
        /// See above.
        in_place: bool,
    },
    /// Put the scratch pages of `MoveOut` where they belong. Pages that are not in scratch are there.
    MoveBack,
    /// Bring 512 pages home as one huge page: fresh huge page in scratch, copy from the staging slot, UFFDIO_MOVE. Answer `MovedHuge`,
    /// or `Failed` when there is no huge page or the range is not one (the pager then fills small pages).
    FillHuge {
        /// Below [`SLOTS`].
        slot: u32,
    },
}

/// One thing to do, on consecutive pages at consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Grows with every new order, also from one pager to the next.
    pub id: u64,
    /// Region, by the pager's number.
    pub region: u64,
    /// First page of the region.
    pub first_page: u64,
    /// Its address; 0 when it has none any more.
    pub addr: u64,
    /// Pages, 1 to [`ORDER_PAGES`].
    pub page_count: u64,
    /// What.
    pub op: Op,
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done; for `MoveOut` and `CopyOut` the bytes are in the staging slot.
    Moved = 1,
    /// As `Moved`, and part of a page that was mapped huge.
    MovedHuge = 2,
    /// Nothing but zeros (a hole or the zero page): taken out, nothing in the staging slot.
    Zero = 3,
    /// Pinned, or shared copy-on-write and not separable: stays where it is.
    Busy = 4,
    /// No mapping there.
    Gone = 5,
    /// The mapping may not be written: nothing was done, ask for `CopyOut` under write protection.
    ReadOnly = 6,
    /// It failed for another reason; pages are where they were.
    Failed = 7,
    /// Locked memory, and RLIMIT_MEMLOCK has no room for it in scratch too. Stays where it is.
    LockLimit = 8,
    /// vm.max_map_count is reached. Stays where it is.
    MapLimit = 9,
    /// The kernel has no memory (or the control group). Stays where it is.
    NoMemory = 10,
    /// A guard (MADV_GUARD_INSTALL): there is no content, and nothing may take its place.
    Guard = 11,
}

impl Status {
    /// As it lies in an area.
    #[inline]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// `None`: no status.
    #[inline]
    pub fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Moved,
            2 => Self::MovedHuge,
            3 => Self::Zero,
            4 => Self::Busy,
            5 => Self::Gone,
            6 => Self::ReadOnly,
            7 => Self::Failed,
            8 => Self::LockLimit,
            9 => Self::MapLimit,
            10 => Self::NoMemory,
            11 => Self::Guard,
            _ => return None,
        })
    }
}

const OP_MOVE_OUT: u64 = 1;
const OP_COPY_OUT: u64 = 2;
const OP_DROP: u64 = 3;
const OP_MOVE_BACK: u64 = 4;
const OP_FILL_HUGE: u64 = 5;

impl Order {
    /// As a descriptor of lane 0: id, region, first page, address, pages, operation with its argument in the upper half.
    #[inline]
    pub fn encode(&self) -> ring::Descriptor {
        let (op, argument) = match self.op {
            Op::MoveOut { slot } => (OP_MOVE_OUT, u64::from(slot)),
            Op::CopyOut { slot } => (OP_COPY_OUT, u64::from(slot)),
            Op::Drop { in_place } => (OP_DROP, u64::from(in_place)),
            Op::MoveBack => (OP_MOVE_BACK, 0),
            Op::FillHuge { slot } => (OP_FILL_HUGE, u64::from(slot)),
        };
        [self.id, self.region, self.first_page, self.addr, self.page_count, op | argument << 32, 0, 0]
    }

    /// Reads a descriptor. `None`: unknown operation, no such slot, more pages than a slot has, or addresses beyond the last one.
    #[inline]
    pub fn decode(from: &ring::Descriptor) -> Option<Self> {
        let [id, region, first_page, addr, page_count, op, ..] = *from;
        let (op, argument) = (op & 0xffff_ffff, op >> 32);
        let slot = u32::try_from(argument).ok().filter(|_| argument < SLOTS);
        let op = match op {
            OP_MOVE_OUT => Op::MoveOut { slot: slot? },
            OP_COPY_OUT => Op::CopyOut { slot: slot? },
            OP_DROP => Op::Drop { in_place: argument != 0 },
            OP_MOVE_BACK => Op::MoveBack,
            OP_FILL_HUGE => Op::FillHuge { slot: slot? },
            _ => return None,
        };
        let len_bytes = page_count.checked_mul(4096)?;
        let fits = addr.checked_add(len_bytes).is_some() && first_page.checked_add(page_count).is_some();
        let legal = (1..=ORDER_PAGES).contains(&page_count) && addr & 4095 == 0 && fits;
        legal.then_some(Self { id, region, first_page, addr, page_count, op })
    }
}

/// The answer to an order; the statuses are in the area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The order's.
    pub id: u64,
    /// Below [`ENTRIES`].
    pub area: u64,
}

impl Done {
    /// As a descriptor of lane 1.
    #[inline]
    pub fn encode(&self) -> ring::Descriptor {
        [self.id, self.area, 0, 0, 0, 0, 0, 0]
    }

    /// Reads a descriptor. `None`: no such area.
    #[inline]
    pub fn decode(from: &ring::Descriptor) -> Option<Self> {
        let [id, area, ..] = *from;
        (area < ENTRIES).then_some(Self { id, area })
    }
}

/// Whether the last answer is the one to this order: the agent that gave it was killed before it took the order out of the ring.
#[inline]
pub fn was_answered<W: Words>(answers: &ring::Producer<W>, done: &Done) -> bool {
    answers.last().is_some_and(|last| Done::decode(&last) == Some(*done))
}

/// The word that tells that the place of an order has changed. `at`: its index in lane 0.
#[inline]
pub fn changed_word(at: u64) -> usize {
    CHANGED + (at & (ENTRIES - 1)) as usize
}

/// First word of an area.
#[inline]
pub fn area_word(area: u64) -> usize {
    AREAS + (area & (ENTRIES - 1)) as usize * AREA_WORDS
}

/// Status of a page in an area, as it is there.
#[inline]
pub fn status_byte<W: Words>(words: &W, area: u64, page: u64) -> u8 {
    (words.load(area_word(area) + (page as usize / 8) % AREA_WORDS, Relaxed) >> (page % 8 * 8)) as u8
}

/// Stores the status of a page. One writer.
#[inline]
pub fn set_status<W: Words>(words: &W, area: u64, page: u64, status: Status) {
    let (word, shift) = (area_word(area) + (page as usize / 8) % AREA_WORDS, page % 8 * 8);
    let value = words.load(word, Relaxed) & !(0xff << shift) | u64::from(status.byte()) << shift;
    words.store(word, value, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(op: Op) -> Order {
        Order { id: 7, region: 1 << 33, first_page: 5, addr: 0x7000, page_count: 512, op }
    }

    #[test]
    fn an_order_survives_the_ring() {
        let ops = [
            Op::MoveOut { slot: 15 },
            Op::CopyOut { slot: 0 },
            Op::Drop { in_place: true },
            Op::Drop { in_place: false },
            Op::MoveBack,
            Op::FillHuge { slot: 3 },
        ];
        for op in ops {
            assert_eq!(Order::decode(&order(op).encode()), Some(order(op)));
        }
        let done = Done { id: 9, area: 63 };
        assert_eq!(Done::decode(&done.encode()), Some(done));
    }

    #[test]
    fn what_no_honest_pager_writes_is_no_order() {
        let good = order(Op::MoveOut { slot: 1 }).encode();
        for (word, value) in [
            (3, 0x7001),
            (3, u64::MAX - 4095),
            (4, 0),
            (4, 513),
            (4, u64::MAX),
            (5, 0),
            (5, 6),
            (5, 1 | 16 << 32),
            (2, u64::MAX),
        ] {
            let mut bad = good;
            bad[word] = value;
            assert_eq!(Order::decode(&bad), None, "word {word} is {value:#x}");
        }
        assert_eq!(Done::decode(&[1, 64, 0, 0, 0, 0, 0, 0]), None);
    }

    proptest! {
        #[test]
        fn whatever_lies_in_a_slot_decodes_to_something_legal_or_to_nothing(words in any::<[u64; 8]>(), op in 0u64..8, pages in 0u64..600) {
            let mut descriptor = words;
            descriptor[4] = pages;
            descriptor[5] = op | (words[5] & 31) << 32;
            if let Some(order) = Order::decode(&descriptor) {
                prop_assert!(order.page_count >= 1 && order.page_count <= ORDER_PAGES);
                prop_assert!(order.addr.checked_add(order.page_count * 4096).is_some());
                prop_assert_eq!(Order::decode(&order.encode()), Some(order));
            }
        }
    }

    #[test]
    fn statuses_of_neighbours_do_not_touch_each_other() {
        struct Plain(Vec<core::sync::atomic::AtomicU64>);
        use core::sync::atomic::{AtomicU64, Ordering};
        impl Words for Plain {
            fn word_count(&self) -> usize {
                self.0.len()
            }
            fn load(&self, index: usize, order: Ordering) -> u64 {
                self.0[index].load(order)
            }
            fn store(&self, index: usize, value: u64, order: Ordering) {
                self.0[index].store(value, order);
            }
            fn swap(&self, index: usize, value: u64, order: Ordering) -> u64 {
                self.0[index].swap(value, order)
            }
            fn compare_exchange(&self, i: usize, c: u64, n: u64, s: Ordering, f: Ordering) -> Result<u64, u64> {
                self.0[i].compare_exchange(c, n, s, f)
            }
            fn fence(&self, _order: Ordering) {}
        }
        let words = Plain((0..WORDS).map(|_| AtomicU64::new(0)).collect());
        set_status(&words, 63, 510, Status::Busy);
        set_status(&words, 63, 511, Status::NoMemory);
        set_status(&words, 63, 511, Status::Gone);
        let found: Vec<_> = (508..512).map(|page| Status::of(status_byte(&words, 63, page))).collect();
        assert_eq!(found, [None, None, Some(Status::Busy), Some(Status::Gone)]);
        assert!((0..=255).filter_map(Status::of).all(|status| Status::of(status.byte()) == Some(status)));
    }
}
