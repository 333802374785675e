//! A typed arena in a managed region: ordinary Rust structs with plain pointers live in memory that migrates.
//!
//! Values are laid out one after another from the start of the mapping; nothing is freed before the whole mapping is. A device
//! that has the region mapped sees the same bytes at the same offsets. Let it change only `Cell`s of an idle program or atomics:
//! its writes are those of another thread.

use std::alloc::Layout;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::HookError;
use crate::managed::ManagedMapping;

/// The arena has no room for a value. Nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The region's arena is full: {wanted_bytes} bytes wanted, {remaining_bytes} left. Make the region larger")]
pub struct Full {
    /// Bytes the value needs, without padding.
    pub wanted_bytes: u64,
    /// Bytes left before the allocation.
    pub remaining_bytes: u64,
}

/// A bump allocator over a whole mapping. Thread-safe: the only state is one counter, advanced by compare-and-swap.
///
/// No destructor of a value ever runs, so types that need one are refused at compile time (use `&'a T`, `Cell`, numbers).
/// References are tied to the arena, which keeps the mapping alive; they may point to each other.
#[derive(Debug)]
pub struct Bump {
    mapping: Arc<ManagedMapping>,
    used_bytes: AtomicU64,
}

impl Bump {
    /// Takes the whole mapping for typed values: from now on its raw writes and atomics answer `Claimed`. Call it before other
    /// threads write into the mapping. The claim lasts as long as the mapping: a second arena would hand the same bytes out.
    ///
    /// # Errors
    /// `Claimed` when the mapping has an arena or gave atomics out.
    pub fn new(mapping: Arc<ManagedMapping>) -> Result<Self, HookError> {
        mapping.claim_typed()?;
        Ok(Self { mapping, used_bytes: AtomicU64::new(0) })
    }

    /// The mapping below.
    #[must_use]
    pub fn mapping(&self) -> &Arc<ManagedMapping> {
        &self.mapping
    }

    /// Moves a value into the region.
    ///
    /// # Errors
    /// [`Full`].
    #[allow(clippy::mut_from_ref)] // Reason: every call returns bytes that no other call has returned.
    pub fn alloc<T>(&self, value: T) -> Result<&mut T, Full> {
        self.alloc_with_align(value, align_of::<T>() as u64)
    }

    /// As [`Self::alloc`], at a multiple of `align_bytes` (a power of two; at least the type's own alignment is used). Page
    /// alignment keeps values of different owners on different pages.
    ///
    /// # Errors
    /// [`Full`].
    #[allow(clippy::mut_from_ref)] // Reason: as in `alloc`.
    pub fn alloc_with_align<T>(&self, value: T, align_bytes: u64) -> Result<&mut T, Full> {
        const { assert!(!std::mem::needs_drop::<T>(), "values in a region are never dropped") };
        let place = self.reserve(Layout::new::<T>(), align_bytes)?.cast::<T>();
        // SAFETY: `reserve` returned fresh, aligned bytes of the mapping, which the arena keeps alive and nobody else may write.
        unsafe {
            place.write(value);
            Ok(&mut *place)
        }
    }

    /// Copies a slice into the region.
    ///
    /// # Errors
    /// [`Full`].
    #[allow(clippy::mut_from_ref)] // Reason: as in `alloc`.
    pub fn alloc_slice_copy<T: Copy>(&self, values: &[T]) -> Result<&mut [T], Full> {
        let place = self.reserve(Layout::for_value(values), 1)?.cast::<T>();
        // SAFETY: as in `alloc_with_align`, for `values.len()` elements; fresh bytes cannot overlap the source.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), place, values.len());
            Ok(std::slice::from_raw_parts_mut(place, values.len()))
        }
    }

    /// A slice of `count` copies of `value`.
    ///
    /// # Errors
    /// [`Full`].
    #[allow(clippy::mut_from_ref)] // Reason: as in `alloc`.
    pub fn alloc_slice_fill<T: Copy>(&self, count: usize, value: T) -> Result<&mut [T], Full> {
        let layout = Layout::array::<T>(count).map_err(|_| self.full(u64::MAX))?;
        let place = self.reserve(layout, 1)?.cast::<T>();
        // SAFETY: as in `alloc_with_align`; every element is written before the slice is formed.
        unsafe {
            for index in 0..count {
                place.add(index).write(value);
            }
            Ok(std::slice::from_raw_parts_mut(place, count))
        }
    }

    /// Copies a string into the region.
    ///
    /// # Errors
    /// [`Full`].
    pub fn alloc_str(&self, text: &str) -> Result<&str, Full> {
        let bytes = self.alloc_slice_copy(text.as_bytes())?;
        // SAFETY: an exact copy of a str.
        Ok(unsafe { std::str::from_utf8_unchecked(bytes) })
    }

    /// Where a value lies, as offset into the region: what a device job is told. None when it is not of this arena.
    #[must_use]
    pub fn offset_of<T: ?Sized>(&self, value: &T) -> Option<u64> {
        let addr = std::ptr::from_ref(value).cast::<u8>().addr() as u64;
        let off = addr.checked_sub(self.mapping.addr())?;
        off.checked_add(size_of_val(value) as u64).filter(|end| *end <= self.used_bytes())?;
        Some(off)
    }

    /// Bytes handed out, padding included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Acquire)
    }

    /// Bytes left.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        self.mapping.len() - self.used_bytes()
    }

    fn full(&self, wanted_bytes: u64) -> Full {
        Full { wanted_bytes, remaining_bytes: self.remaining_bytes() }
    }

    fn reserve(&self, layout: Layout, align_bytes: u64) -> Result<*mut u8, Full> {
        let align = align_bytes.max(layout.align() as u64).checked_next_power_of_two().unwrap_or(u64::MAX);
        let base = self.mapping.addr();
        let fit = |used: u64| {
            let start = (base + used).checked_next_multiple_of(align)? - base;
            let end = start.checked_add(layout.size() as u64)?;
            (end <= self.mapping.len()).then_some((start, end))
        };
        let mut used = self.used_bytes();
        loop {
            let (start, end) = fit(used).ok_or_else(|| self.full(layout.size() as u64))?;
            match self.used_bytes.compare_exchange_weak(used, end, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: start <= end <= the mapping's length.
                Ok(_) => return Ok(unsafe { self.mapping.base().as_ptr().add(start as usize) }),
                Err(now) => used = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::fd::AsFd;

    use super::*;
    use crate::memfd;

    fn arena(len: u64) -> Bump {
        let fd = memfd::create_sealed("uhmm-bump-test", len).unwrap();
        Bump::new(Arc::new(ManagedMapping::map(fd.as_fd(), len, None).unwrap())).unwrap()
    }

    struct Node<'a> {
        value: u64,
        next: Cell<Option<&'a Node<'a>>>,
    }

    #[test]
    fn a_linked_list_with_plain_pointers_lives_in_the_region() {
        let bump = arena(64 * 4096);
        let mut head: Option<&Node<'_>> = None;
        for value in 0..1000 {
            head = Some(bump.alloc(Node { value, next: Cell::new(head) }).unwrap());
        }
        let first = head.unwrap();
        first.next.get().unwrap().next.set(None); // A pointer changed in place.
        let values: Vec<u64> = std::iter::successors(head, |node| node.next.get()).map(|node| node.value).collect();
        assert_eq!(values, [999, 998]);
        assert!(bump.offset_of(first).is_some_and(|off| off < bump.used_bytes()));
        assert_eq!(bump.offset_of(&values[0]), None);
    }

    #[test]
    fn values_are_aligned_disjoint_and_counted() {
        let bump = arena(4 * 4096);
        let byte = bump.alloc(1u8).unwrap();
        let word = bump.alloc(2u64).unwrap();
        let page = bump.alloc_with_align([7u32; 4], 4096).unwrap();
        assert_eq!(std::ptr::from_ref(word).addr() % 8, 0);
        assert_eq!(std::ptr::from_ref(page).addr() % 4096, 0);
        let text = bump.alloc_str("migrated").unwrap();
        let filled = bump.alloc_slice_fill(3, 9u16).unwrap();
        let copied = bump.alloc_slice_copy(&[1u32, 2, 3]).unwrap();
        copied[0] = 5;
        assert_eq!((*byte, *word, page[3], text), (1, 2, 7, "migrated"));
        assert_eq!((&filled[..], &copied[..]), (&[9u16, 9, 9][..], &[5u32, 2, 3][..]));
        assert_eq!(bump.used_bytes() + bump.remaining_bytes(), 4 * 4096);
    }

    #[test]
    fn full_says_how_much_is_left_and_allocates_nothing() {
        let bump = arena(4096);
        bump.alloc([0u8; 4000]).unwrap();
        assert_eq!(bump.alloc([0u8; 97]), Err(Full { wanted_bytes: 97, remaining_bytes: 96 }));
        assert!(bump.alloc_slice_fill(usize::MAX, 1u64).is_err());
        assert_eq!(bump.alloc([1u8; 96]).unwrap(), &[1u8; 96]);
        assert_eq!(bump.remaining_bytes(), 0);
    }

    #[test]
    fn a_mapping_has_one_arena_and_then_refuses_raw_writes() {
        let bump = arena(4096);
        let mapping = Arc::clone(bump.mapping());
        assert!(matches!(Bump::new(Arc::clone(&mapping)), Err(HookError::Claimed { .. })));
        assert!(matches!(mapping.write(0, &[1]), Err(HookError::Claimed { .. })));
        assert!(matches!(mapping.atomic_u64(0), Err(HookError::Claimed { .. })));
        bump.alloc(0x55u8).unwrap();
        assert_eq!(mapping.load_u8(0).unwrap(), 0x55);
    }
}
