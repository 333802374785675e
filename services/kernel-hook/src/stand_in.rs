//! A mapping that is prepared elsewhere and then takes the place of another one in a single step, so that no thread of the program
//! ever meets a hole there.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::error::HookError;
use crate::range::AddrRange;
use crate::window::{Placement, map_raw};

/// A shared mapping of a file at some address that nobody knows yet; unmapped when it is dropped before it was used.
#[derive(Debug)]
pub struct StandIn {
    base: NonNull<u8>,
    len: u64,
}

impl StandIn {
    /// Maps `len` bytes of `file` from the page-aligned `offset`, with these rights.
    ///
    /// # Errors
    /// `Call` when the kernel refuses (ENOMEM: too many mappings).
    pub fn map(file: BorrowedFd<'_>, offset: u64, len: u64, read: bool, write: bool) -> Result<Self, HookError> {
        let prot = if read { libc::PROT_READ } else { 0 } | if write { libc::PROT_READ | libc::PROT_WRITE } else { 0 };
        let base = map_raw(Placement::Anywhere, len, prot, libc::MAP_SHARED, Some((file, offset)))?;
        Ok(Self { base, len })
    }

    /// Where it is now.
    pub fn range(&self) -> AddrRange {
        AddrRange { start: self.base.addr().get() as u64, len: self.len }
    }

    /// Moves it to `addr`: what was mapped there is unmapped in the same instant, and an access there meets the one or the other.
    /// Registration with a userfaultfd, rights and MADV_DONTFORK come along. Returns when the userfaultfds of both places were told.
    ///
    /// The caller answers for the place: it is memory whose owner knows that it is exchanged behind its back, as regions of the SDK
    /// are. Afterwards the mapping belongs to whoever had the old one.
    ///
    /// # Errors
    /// `Call`: nothing has changed.
    pub fn take_place_at(self, addr: u64) -> Result<(), HookError> {
        let to = AddrRange::new(addr, self.len)?;
        let place = std::ptr::with_exposed_provenance_mut::<libc::c_void>(to.start as usize);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the source is this value's alone. At the destination there is, at every instant, a shared mapping of the same rights;
        // its caller answers for what it is of (see above).
        let moved =
            unsafe { libc::mremap(self.base.as_ptr().cast(), self.len as usize, self.len as usize, flags, place) };
        if moved == libc::MAP_FAILED {
            let hint = "Check vm.max_map_count";
            return Err(HookError::on("mremap(over a mapping)", to, io::Error::last_os_error(), hint));
        }
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody was told where it is.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::own_memory::{self, RangeAdvice};
    use crate::{ManagedMapping, memfd};

    const P: u64 = 4096;

    #[test]
    fn a_part_of_a_mapping_is_exchanged_and_given_back_while_its_owner_uses_it() {
        let (own, other) =
            (memfd::create_sealed("uhmm-own", 4 * P).unwrap(), memfd::create_sealed("uhmm-other", 8 * P).unwrap());
        let mapping = ManagedMapping::map(own.as_fd(), 4 * P, None).unwrap();
        mapping.store_u64(P, 1).unwrap();
        let stand_in = StandIn::map(other.as_fd(), 6 * P, 2 * P, true, true).unwrap();
        own_memory::advise(stand_in.range(), RangeAdvice::DontFork).unwrap();
        stand_in.take_place_at(mapping.addr() + P).unwrap();
        assert_eq!(mapping.load_u64(P).unwrap(), 0);
        mapping.store_u64(P, 2).unwrap();
        let back = StandIn::map(own.as_fd(), P, 2 * P, true, true).unwrap();
        back.take_place_at(mapping.addr() + P).unwrap();
        assert_eq!(mapping.load_u64(P).unwrap(), 1);
        let seen = StandIn::map(other.as_fd(), 6 * P, P, true, false).unwrap();
        assert_eq!(own_memory::mappings(seen.range()).unwrap()[0].offset % P, 0);
        let window = crate::Window::map(other.as_fd(), 6 * P, P, crate::Prot::ReadOnly).unwrap();
        assert_eq!(window.load_u64(0).unwrap(), 2, "what was written meanwhile is the other file's");
    }
}
