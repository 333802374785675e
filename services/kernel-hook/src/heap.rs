//! A heap of its own for code that lives in somebody else's program: the library that `uhmm run` preloads.
//!
//! The program's allocator is the program's: its memory is managed, it may not like to be called from a thread that it does not know, and it may be
//! anything. So what the library allocates lies in one range that nobody else uses and that is never put under management ([`PrivateHeap::range`]).
//! The addresses are reserved with the first allocation; pages are used as far as the heap has grown.
//!
//! **Lock order**: the heap's lock is taken last and nothing is called under it but mmap and mprotect. It is held over fork
//! ([`PrivateHeap::hold_over_forks`]), so that a child never finds it taken by a thread that it does not have.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use dlmalloc::{Allocator, Dlmalloc};

use crate::error::HookError;
use crate::range::{AddrRange, PAGE_SIZE};

/// Addresses that are reserved: far more than uhmm's library ever needs.
const RESERVED: usize = 256 << 20;
/// The heap grows in such steps.
const STEP: usize = 64 << 10;

/// The range, and how much of it is in use.
struct Arena {
    base: AtomicPtr<u8>,
    used: AtomicUsize,
}

static ARENA: Arena = Arena { base: AtomicPtr::new(null_mut()), used: AtomicUsize::new(0) };

/// The one arena; only the heap's lock gives access to it.
struct TheArena;

impl TheArena {
    /// Null when the kernel gives no addresses.
    fn base() -> *mut u8 {
        let base = ARENA.base.load(Ordering::Acquire);
        if !base.is_null() {
            return base;
        }
        let (flags, prot) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, libc::PROT_NONE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let made = unsafe { libc::mmap(null_mut(), RESERVED, prot, flags, -1, 0) };
        if made == libc::MAP_FAILED {
            return null_mut();
        }
        ARENA.base.store(made.cast(), Ordering::Release);
        made.cast()
    }
}

// SAFETY: `alloc` gives out parts of one mapping of ours, each once; nothing is taken back.
unsafe impl Allocator for TheArena {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let nothing = (null_mut(), 0, 0);
        let (base, used) = (Self::base(), ARENA.used.load(Ordering::Relaxed));
        let Some(size) = size.checked_next_multiple_of(STEP).filter(|size| *size <= RESERVED - used) else {
            return nothing;
        };
        if base.is_null() {
            return nothing;
        }
        // SAFETY: inside the mapping, by the check above.
        let part = unsafe { base.add(used) };
        // SAFETY: pages of ours that nobody has been given yet.
        if unsafe { libc::mprotect(part.cast(), size, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return nothing;
        }
        ARENA.used.store(used + size, Ordering::Relaxed);
        (part, size, 0)
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE_SIZE as usize
    }
}

/// A lock that needs no allocation, no thread-local memory and no destructor, and that another function than the one that took it may give back.
/// 0: free, 1: taken, 2: taken and somebody may wait.
struct Lock(AtomicU32);

impl Lock {
    fn take(&self) {
        if self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            return;
        }
        while self.0.swap(2, Ordering::Acquire) != 0 {
            futex(&self.0, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, 2);
        }
    }

    fn give_back(&self) {
        if self.0.swap(0, Ordering::Release) == 2 {
            futex(&self.0, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, 1);
        }
    }
}

/// Every answer means: look again. `errno` belongs to the program and stays what it was.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32) {
    // SAFETY: errno is a word of the calling thread; the kernel reads `word`, which outlives the call, and nothing else.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, null_mut::<libc::timespec>());
        *errno = before;
    }
}

/// A global allocator over memory that is never managed. There is one in a process.
pub struct PrivateHeap {
    heap: UnsafeCell<Dlmalloc<TheArena>>,
}

static LOCK: Lock = Lock(AtomicU32::new(0));

/// Holds the lock.
struct Held;

impl Held {
    fn new() -> Self {
        LOCK.take();
        Self
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        LOCK.give_back();
    }
}

// SAFETY: the heap is only touched while `LOCK` is held.
unsafe impl Sync for PrivateHeap {}

extern "C" fn before_fork() {
    LOCK.take();
}

extern "C" fn after_fork() {
    LOCK.give_back();
}

impl PrivateHeap {
    /// For a `#[global_allocator]`.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "there is one, in a static")]
    pub const fn new() -> Self {
        Self { heap: UnsafeCell::new(Dlmalloc::new_with_allocator(TheArena)) }
    }

    /// From now on forks of this process (by the C library's `fork`) leave the child a heap that it can use.
    ///
    /// # Errors
    /// `Call`: ENOMEM.
    pub fn hold_over_forks(&self) -> Result<(), HookError> {
        // SAFETY: the functions only touch a static word and may be called at every fork.
        let rc = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
        if rc == 0 {
            return Ok(());
        }
        Err(HookError::call("pthread_atfork", None, std::io::Error::from_raw_os_error(rc)))
    }

    /// All addresses of the heap; `None` before its first allocation.
    #[must_use]
    pub fn range(&self) -> Option<AddrRange> {
        let base = ARENA.base.load(Ordering::Acquire);
        (!base.is_null()).then(|| AddrRange { start: base.expose_provenance() as u64, len: RESERVED as u64 })
    }
}

// SAFETY: dlmalloc keeps the contract of an allocator; `Held` makes its callers exclusive.
unsafe impl GlobalAlloc for PrivateHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _held = Held::new();
        // SAFETY: exclusive by the lock.
        unsafe { (*self.heap.get()).malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let _held = Held::new();
        // SAFETY: exclusive by the lock.
        unsafe { (*self.heap.get()).calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let _held = Held::new();
        // SAFETY: exclusive by the lock; the caller gives back what it got, with its layout.
        unsafe { (*self.heap.get()).free(block, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let _held = Held::new();
        // SAFETY: as above.
        unsafe { (*self.heap.get()).realloc(block, layout.size(), layout.align(), new_size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static HEAP: PrivateHeap = PrivateHeap::new();

    fn filled(block: *mut u8, size: usize, value: u8) -> bool {
        // SAFETY: the caller owns the block.
        unsafe { std::slice::from_raw_parts(block, size) }.iter().all(|byte| *byte == value)
    }

    #[test]
    fn blocks_are_apart_zeroed_where_asked_for_and_inside_the_range() {
        let layout = Layout::from_size_align(100_000, 64).unwrap();
        // SAFETY: the layout has a size; each block is written within it and given back once.
        unsafe {
            let first = HEAP.alloc(layout);
            first.write_bytes(7, layout.size());
            let second = HEAP.alloc_zeroed(layout);
            assert!(filled(second, layout.size(), 0) && filled(first, layout.size(), 7));
            let range = HEAP.range().unwrap();
            for block in [first, second] {
                assert_eq!(block.addr() % 64, 0);
                assert!(range.start <= block.addr() as u64 && (block.addr() + layout.size()) as u64 <= range.end());
            }
            let larger = HEAP.realloc(first, layout, 300_000);
            assert!(filled(larger, layout.size(), 7));
            HEAP.dealloc(larger, Layout::from_size_align(300_000, 64).unwrap());
            HEAP.dealloc(second, layout);
        }
    }

    #[test]
    fn what_is_too_large_is_refused_and_the_heap_goes_on() {
        // SAFETY: a null block is not used, the other one is given back.
        unsafe {
            assert!(HEAP.alloc(Layout::from_size_align(RESERVED + 1, 8).unwrap()).is_null());
            let layout = Layout::from_size_align(10, 1).unwrap();
            let small = HEAP.alloc(layout);
            assert!(!small.is_null());
            HEAP.dealloc(small, layout);
        }
    }

    #[test]
    fn many_threads_use_it_and_children_of_fork_find_it_free() {
        HEAP.hold_over_forks().unwrap();
        let layout = Layout::from_size_align(5000, 16).unwrap();
        let round = |value: u8| {
            // SAFETY: the block is used within its layout and given back once.
            unsafe {
                let block = HEAP.alloc(layout);
                block.write_bytes(value, layout.size());
                std::thread::yield_now();
                assert!(filled(block, layout.size(), value));
                HEAP.dealloc(block, layout);
            }
        };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || (0..2000).for_each(|_| round(thread)));
            }
            for _ in 0..50 {
                let child = crate::fork::fork_child(|| {
                    round(9);
                    0
                });
                assert_eq!(child.unwrap().wait().unwrap(), crate::fork::Ended::Code(0));
            }
        });
    }
}
