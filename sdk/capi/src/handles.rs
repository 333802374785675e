//! Handles: what a C program holds instead of pointers.
//!
//! ```text
//!   uhmm_session * = 0xdead_.... | number      never dereferenced, never reused; touching it is a SIGSEGV at once
//!        |
//!        v    table (one a process, behind a lock that is held across fork)
//!   number -> (Arc<object>, pid of the owner)
//! ```
//!
//! So a handle that is null, closed, of another kind or inherited through fork is an error with a text. Closing while another
//! thread is inside a call is safe: that call holds the object until it returns.
//!
//! A forked child finds its parent's handles in the table. They stay there for good: dropping a parent's session in the child
//! would talk to the parent's link thread, which the child does not have. The lock may be held by another thread at the moment of a
//! fork, so `pthread_atfork` takes it first: the child always finds it free and the table whole. It is held for a lookup, never
//! for a call.

use std::any::Any;
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use crate::error::Failure;

/// An address that no program can have: a handle that is dereferenced crashes where the mistake is.
const TAG: usize = 0xdead << 48;

/// A type of the header and what stands behind it.
pub(crate) trait Handle {
    /// What a handle of this type stands for.
    type Object: Send + Sync + 'static;
    /// Name in the header.
    const KIND: &'static str;
}

struct Entry {
    object: Arc<dyn Any + Send + Sync>,
    owner: u32,
}

struct Table {
    busy: AtomicBool,
    entries: UnsafeCell<BTreeMap<usize, Entry>>,
}

// SAFETY: `entries` is only reached through `with`, between `lock` and `unlock`.
unsafe impl Sync for Table {}

static TABLE: Table = Table { busy: AtomicBool::new(false), entries: UnsafeCell::new(BTreeMap::new()) };
static NEXT: AtomicUsize = AtomicUsize::new(1);

impl Table {
    fn lock(&self) {
        while self.busy.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// `look` must be short and must not drop objects.
    fn with<R>(&self, look: impl FnOnce(&mut BTreeMap<usize, Entry>) -> R) -> R {
        struct Unlock<'a>(&'a Table);
        impl Drop for Unlock<'_> {
            fn drop(&mut self) {
                self.0.unlock();
            }
        }
        self.lock();
        let _unlock = Unlock(self);
        // SAFETY: the lock is held until `_unlock` is dropped, so this is the only reference.
        look(unsafe { &mut *self.entries.get() })
    }
}

extern "C" fn before_fork() {
    TABLE.lock();
}

extern "C" fn after_fork() {
    TABLE.unlock();
}

/// Once a process, before the first handle exists.
fn survive_fork() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // SAFETY: the three functions only touch the table's lock and live as long as this library.
        let failed = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
        assert_eq!(failed, 0, "no memory for the fork handlers");
    });
}

/// A new handle.
pub(crate) fn open<H: Handle>(object: H::Object) -> *mut H {
    survive_fork();
    let number = TAG | NEXT.fetch_add(1, Ordering::Relaxed);
    let entry = Entry { object: Arc::new(object), owner: std::process::id() };
    TABLE.with(|entries| entries.insert(number, entry));
    std::ptr::without_provenance_mut(number)
}

/// What a handle of this process stands for.
pub(crate) fn get<H: Handle>(handle: *mut H) -> Result<Arc<H::Object>, Failure> {
    let (object, owner) = find(handle)?;
    if owner == std::process::id() { Ok(object) } else { Err(foreign::<H>(object, owner)) }
}

/// A handle of the process that forked this one, for taking its place.
pub(crate) fn get_inherited<H: Handle>(handle: *mut H) -> Result<Arc<H::Object>, Failure> {
    let (object, owner) = find(handle)?;
    if owner != std::process::id() {
        return Ok(object);
    }
    Err(Failure::BadValue {
        name: "session",
        value: i64::from(owner),
        expected: "it belongs to this very process; call this in a child, after fork()",
    })
}

/// Ends a handle. A parent's handle is not ended in a child: nothing is done there.
pub(crate) fn close<H: Handle>(handle: *mut H) -> Result<Option<Arc<H::Object>>, Failure> {
    let (object, owner) = find(handle)?;
    if owner != std::process::id() {
        return Ok(None);
    }
    let removed = TABLE.with(|entries| entries.remove(&handle.addr()));
    // Two threads may close at once: one of them comes second.
    if removed.is_none() { Err(Failure::NoHandle { kind: H::KIND }) } else { Ok(Some(object)) }
}

fn find<H: Handle>(handle: *mut H) -> Result<(Arc<H::Object>, u32), Failure> {
    if handle.is_null() {
        return Err(Failure::Null { name: H::KIND });
    }
    let found = TABLE.with(|entries| entries.get(&handle.addr()).map(|e| (Arc::clone(&e.object), e.owner)));
    let (object, owner) = found.ok_or(Failure::NoHandle { kind: H::KIND })?;
    match object.downcast::<H::Object>() {
        Ok(object) => Ok((object, owner)),
        Err(_) => Err(Failure::NoHandle { kind: H::KIND }),
    }
}

/// The table keeps its own reference to a parent's object, so dropping this one ends nothing.
fn foreign<H: Handle>(object: Arc<H::Object>, owner: u32) -> Failure {
    drop(object);
    Failure::OtherProcess { kind: H::KIND, owner }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Number;
    struct Text;

    impl Handle for Number {
        type Object = u64;
        const KIND: &'static str = "number";
    }

    impl Handle for Text {
        type Object = String;
        const KIND: &'static str = "text";
    }

    #[test]
    fn a_handle_gives_its_object_until_it_is_closed() {
        let handle = open::<Number>(7);
        assert_eq!(*get(handle).unwrap(), 7);
        assert_eq!(close(handle).unwrap().as_deref(), Some(&7));
        assert!(matches!(get(handle), Err(Failure::NoHandle { kind: "number" })));
        assert!(matches!(close(handle), Err(Failure::NoHandle { .. })), "closed twice");
    }

    #[test]
    fn null_strange_and_mistyped_handles_are_errors() {
        let handle = open::<Number>(7);
        assert!(matches!(get(std::ptr::null_mut::<Number>()), Err(Failure::Null { .. })));
        assert!(matches!(get(std::ptr::without_provenance_mut::<Number>(64)), Err(Failure::NoHandle { .. })));
        assert!(matches!(get(handle.cast::<Text>()), Err(Failure::NoHandle { kind: "text" })));
        assert!(matches!(close(handle.cast::<Text>()), Err(Failure::NoHandle { kind: "text" })));
        assert_eq!(*get(handle).unwrap(), 7, "the attempts above did no harm");
        assert!(matches!(get_inherited(handle), Err(Failure::BadValue { .. })), "not a child");
        close(handle).unwrap();
    }

    #[test]
    fn an_object_in_use_outlives_its_handle() {
        let handle = open::<Text>("kept".into());
        let used = get(handle).unwrap();
        drop(close(handle).unwrap());
        assert_eq!(*used, "kept");
    }

    #[test]
    fn handles_are_never_reused() {
        let first = open::<Number>(1);
        close(first).unwrap();
        let second = open::<Number>(2);
        assert_ne!(first, second);
        assert!(get(first).is_err());
        close(second).unwrap();
    }

    #[test]
    fn a_forked_child_finds_a_free_table_and_its_parents_handles_are_refused_there() {
        let handle = open::<Number>(7);
        let stop = Arc::new(AtomicBool::new(false));
        let opener = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    close(open::<Number>(1)).unwrap();
                }
            }
        });
        for _ in 0..50 {
            // SAFETY: the child only looks into the table, whose lock fork leaves free, and ends without unwinding.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let refused = matches!(get(handle), Err(Failure::OtherProcess { .. }));
                let inherited = get_inherited(handle).is_ok_and(|number| *number == 7);
                let kept = matches!(close(handle), Ok(None)) && get_inherited(handle).is_ok();
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(if refused && inherited && kept { 0 } else { 1 }) };
            }
            let mut status = -1;
            // SAFETY: `child` is this process's own and `status` a variable.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
        }
        stop.store(true, Ordering::Relaxed);
        opener.join().unwrap();
        assert_eq!(*get(handle).unwrap(), 7);
        close(handle).unwrap();
    }
}
