//! A typed arena in managed memory: ordinary Rust structures, linked by plain references or raw pointers.

use std::ops::Deref;
use std::sync::Arc;

use uhmm_kernel_hook::{Bump, ManagedMapping};

use crate::Error;

/// Allocates values in a region, one after the other; nothing is freed before the region is. Values may not need `Drop`.
///
/// All the allocation methods are [`Bump`]'s: `alloc`, `alloc_slice_copy`, `alloc_slice_fill`, `alloc_str`. References live as long
/// as the arena; a device follows the same addresses. What devices write while the program looks must be a `Cell` or an atomic.
pub struct Arena {
    bump: Bump,
}

impl Arena {
    pub(crate) fn new(mapping: Arc<ManagedMapping>) -> Result<Self, Error> {
        let bump =
            Bump::new(mapping).map_err(Error::kernel("Making an arena in a region that may have one already"))?;
        Ok(Self { bump })
    }
}

impl Deref for Arena {
    type Target = Bump;

    fn deref(&self) -> &Bump {
        &self.bump
    }
}
