//! Policies that answer as no policy should: for tests, and for whoever wants to know what the worst one costs. None of them loses a byte.

use std::time::Duration;

use uhmm_kernel_hook::AddrRange;

use super::policy::{Block, MOVE_BYTES, Policy, Verdict, piece_at};
use crate::rng::Rng;

/// How it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adverse {
    /// Anything sensible, by chance.
    Random,
    /// Everything leaves, whatever is used.
    Always,
    /// Nothing leaves.
    Never,
    /// Ranges that are somewhere else, empty, without end; rests that do not end.
    Nonsense,
}

/// See [`Adverse`].
#[derive(Debug)]
pub struct Adversary {
    how: Adverse,
    rng: Rng,
}

impl Adversary {
    pub fn new(how: Adverse) -> Self {
        Self { how, rng: Rng::new(1) }
    }

    fn nonsense(&mut self) -> Verdict {
        let (start, len) = (self.rng.next(), self.rng.next());
        let range = match len % 4 {
            0 => AddrRange { start, len },
            1 => AddrRange { start: start % (1 << 47), len: 0 },
            2 => AddrRange { start: 0, len: u64::MAX },
            _ => AddrRange { start: start % (1 << 47), len: len % (1 << 40) },
        };
        Verdict::Send { range, rest: start.is_multiple_of(2).then_some(Duration::MAX) }
    }
}

impl Policy for Adversary {
    fn judge(&mut self, block: &Block) -> Verdict {
        let all = Verdict::Send { range: piece_at(block.place.addr, MOVE_BYTES), rest: None };
        match self.how {
            Adverse::Never => Verdict::Keep,
            Adverse::Always => all,
            Adverse::Nonsense => self.nonsense(),
            Adverse::Random => match self.rng.next() % 4 {
                0 => Verdict::Keep,
                1 => all,
                dice => Verdict::Send {
                    range: piece_at(block.place.addr, MOVE_BYTES >> (dice % 7)),
                    rest: Some(Duration::from_millis(self.rng.next() % 20)),
                },
            },
        }
    }

    fn touched(&mut self, _pid: u32, _range: AddrRange) {}

    fn ended(&mut self, _pid: u32) {}
}
