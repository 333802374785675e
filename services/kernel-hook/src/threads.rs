//! This process's threads: what the kernel writes for one that ends, and where one takes its signals.

use std::io;

use crate::error::HookError;
use crate::range::{AddrRange, PAGE_SIZE};

/// A thread, and where the kernel looks when it ends. The C library has both words in `struct pthread`: the head of the list of
/// robust mutexes, and right before it the thread's number, which the kernel clears for pthread_join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadWords {
    /// The thread's number, as this process sees it.
    pub tid: u32,
    /// Address of the head of its robust list. Never 0.
    pub robust_list: u64,
}

/// Every thread of this process that has a robust list. Threads made by a bare clone have none and are left out, and so are those that
/// end or begin meanwhile.
///
/// # Errors
/// `Call` when /proc/self/task cannot be read.
pub fn thread_words() -> Result<Vec<ThreadWords>, HookError> {
    let failed = |error| HookError::hinted("read(/proc/self/task)", error, "Mount /proc");
    let foreign_numbers = std::fs::read_to_string("/proc/self/status").map_err(failed)?;
    let foreign_numbers = innermost_pid(&foreign_numbers).is_some_and(|(_, depth)| depth > 1);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/task").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(listed) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // /proc may be that of an outer PID namespace; then the numbers that it lists are other threads' in ours.
        let tid = if foreign_numbers { own_number(listed) } else { Some(listed) };
        found.extend(tid.and_then(|tid| robust_list(tid).map(|robust_list| ThreadWords { tid, robust_list })));
    }
    Ok(found)
}

/// A thread's number in this process's PID namespace.
fn own_number(listed: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{listed}/status")).ok()?;
    innermost_pid(&status).map(|(pid, _)| pid)
}

/// The last number of the line `NSpid`, and how many there are: one for each PID namespace from /proc's inwards.
fn innermost_pid(status: &str) -> Option<(u32, usize)> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let last = line.split_whitespace().next_back()?.parse().ok()?;
    Some((last, line.split_whitespace().count()))
}

/// `None` for a thread that has ended or has no robust list.
fn robust_list(tid: u32) -> Option<u64> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes one pointer and one size to two local words.
    let rc = unsafe { libc::syscall(libc::SYS_get_robust_list, tid as libc::pid_t, &raw mut head, &raw mut len) };
    (rc == 0 && head != 0).then_some(head)
}

/// The pages of the calling thread's alternate signal stack, `None` when it has none.
///
/// # Errors
/// `Call`.
pub fn alternate_stack() -> Result<Option<AddrRange>, HookError> {
    // SAFETY: all zeros is a valid stack_t, and the kernel writes one to the local.
    let (rc, stack) = unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        (libc::sigaltstack(std::ptr::null(), &mut stack), stack)
    };
    if rc != 0 {
        return Err(HookError::failed("sigaltstack", io::Error::last_os_error()));
    }
    if stack.ss_flags & libc::SS_DISABLE != 0 || stack.ss_size == 0 {
        return Ok(None);
    }
    let (first, len) = (stack.ss_sp.addr() as u64, stack.ss_size as u64);
    let start = first / PAGE_SIZE * PAGE_SIZE;
    Ok(Some(AddrRange { start, len: first.saturating_add(len).next_multiple_of(PAGE_SIZE) - start }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_a_robust_list_of_its_own() {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // A variable of the thread's stack, which lies in the same mapping as its robust list.
            let local = 0u8;
            ready
                .send((rustix::thread::gettid().as_raw_nonzero().get() as u32, (&raw const local).addr() as u64))
                .unwrap();
            ended.recv().unwrap_err();
        });
        let (tid, on_stack) = is_ready.recv().unwrap();
        let words = thread_words().unwrap();
        let theirs = words.iter().find(|words| words.tid == tid).unwrap().robust_list;
        assert!(theirs > on_stack && theirs - on_stack < 64 << 20, "{theirs:#x} {on_stack:#x}");
        let own = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        assert!(words.iter().any(|words| words.tid == own && words.robust_list != theirs));
        drop(end);
        thread.join().unwrap();
    }

    #[test]
    fn numbers_of_an_outer_namespace_are_told_apart() {
        assert_eq!(innermost_pid("Name:\tx\nNSpid:\t4711\t12\t3\nThreads:\t1\n"), Some((3, 3)));
        assert_eq!(innermost_pid("NSpid:\t4711\n"), Some((4711, 1)));
        assert_eq!(innermost_pid("Name:\tx\n"), None);
    }

    #[test]
    fn a_rust_thread_has_an_alternate_stack_in_whole_pages() {
        let stack = std::thread::spawn(alternate_stack).join().unwrap().unwrap().unwrap();
        assert!(stack.start.is_multiple_of(PAGE_SIZE) && stack.len.is_multiple_of(PAGE_SIZE) && stack.len > 0);
    }
}
