//! memcpy between two resident buffers of pages of one size, in pieces of 2 MiB, the size in which pages migrate.

use std::sync::atomic::Ordering;
use std::time::Instant;

use uhmm_kernel_hook::{Advice, Window};

pub(in super::super) const PIECE: u64 = 2 << 20;

/// See the module head.
pub(in super::super) struct Copies {
    from: Window,
    to: Window,
}

/// Memory that is there.
pub(in super::super) fn resident(len: u64, huge: bool) -> anyhow::Result<Window> {
    let window = Window::anonymous(len)?;
    window.advise(0, len, if huge { Advice::HugePage } else { Advice::NoHugePage })?;
    window.fill(0, len, 0x5a)?;
    Ok(window)
}

/// GiB a second.
pub(in super::super) fn rate(bytes: u64, begun: Instant) -> f64 {
    bytes as f64 / begun.elapsed().as_secs_f64() / (1u64 << 30) as f64
}

impl Copies {
    /// Buffers of `len` bytes, a multiple of 2 MiB.
    pub fn new(len: u64, huge: bool) -> anyhow::Result<Self> {
        Ok(Self { from: resident(len, huge)?, to: resident(len, huge)? })
    }

    /// How fast one copy of all of it is.
    pub fn gib_s(&self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        for off in (0..self.from.len()).step_by(PIECE as usize) {
            self.from.copy_to(off, &self.to, off, PIECE)?;
        }
        Ok(rate(self.from.len(), begun))
    }

    /// How fast a plain loop adds to each word of it: an atomic addition is many times slower than copying the word.
    pub fn adds_gib_s(&self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        for off in (0..self.to.len()).step_by(size_of::<u64>()) {
            self.to.atomic_u64(off)?.fetch_add(1, Ordering::AcqRel);
        }
        Ok(rate(self.to.len(), begun))
    }

    /// How long one piece takes, in microseconds: the middle of all of them.
    pub fn piece_us(&self) -> anyhow::Result<f64> {
        let mut took = Vec::new();
        for off in (0..self.from.len()).step_by(PIECE as usize) {
            let begun = Instant::now();
            self.from.copy_to(off, &self.to, off, PIECE)?;
            took.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        Ok(super::super::figure::median(took.into_iter()))
    }
}
