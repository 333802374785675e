//! How an agent begins.

use core::arch::asm;

use crate::orders::Agent;
use crate::{Config, End, sys};

const SYS_CLONE: u64 = 56;
const CLONE_VM: u64 = 0x100;
const CLONE_PIDFD: u64 = 0x1000;
/// A debugger of the program does not take it for a thread.
const CLONE_UNTRACED: u64 = 0x0080_0000;
/// No FILES, FS, SIGHAND, THREAD; exit signal 0: `wait` does not see it.
const FLAGS: u64 = CLONE_VM | CLONE_PIDFD | CLONE_UNTRACED;

/// An agent that runs.
#[derive(Clone, Copy, Debug)]
pub struct Spawned {
    /// Its number. It is a child of the calling process, to be reaped with `__WCLONE`.
    pub pid: i32,
    /// A pidfd of it, close-on-exec.
    pub pidfd: i32,
}

/// Makes the process. It goes on when the calling thread has gone, until it is told to end or is alone.
///
/// # Errors
/// The error number of clone: EAGAIN, ENOMEM; EPERM and ENOSYS where a seccomp filter forbids it.
///
/// # Safety
/// `config` and everything that it names, and the stack below `stack_top` (a multiple of 16, some 16 KiB), stay mapped until the agent
/// has ended, and nobody else uses the stack. The code of this crate stays mapped too: no dlclose.
pub unsafe fn spawn(config: *const Config, stack_top: u64) -> Result<Spawned, i64> {
    let before = sys::block_signals();
    let mut pidfd = -1i32;
    // SAFETY: the caller's promise.
    let pid = unsafe { clone_onto(stack_top, &raw mut pidfd, config) };
    sys::restore_signals(before);
    if pid < 0 { Err(-pid) } else { Ok(Spawned { pid: pid as i32, pidfd }) }
}

/// # Safety
/// See [`spawn`].
unsafe fn clone_onto(stack_top: u64, pidfd: *mut i32, config: *const Config) -> i64 {
    let answer: i64;
    // SAFETY: the new process begins behind the system call with a stack of its own, on which lie its entry and its argument, and never
    // returns. In the calling process this is a system call like any other.
    unsafe {
        let stack = (stack_top - 16) as *mut u64;
        stack.write(config as u64);
        stack.add(1).write(begin as extern "C-unwind" fn(*const Config) -> ! as usize as u64);
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "pop rdi",
            "pop rax",
            "call rax",
            "ud2",
            "2:",
            inlateout("rax") SYS_CLONE as i64 => answer,
            in("rdi") FLAGS, in("rsi") stack, in("rdx") pidfd, in("r10") 0u64, in("r8") 0u64,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    answer
}

/// Nothing unwinds here; the name of the calling convention spares the code that would end the program if something did.
extern "C-unwind" fn begin(config: *const Config) -> ! {
    // SAFETY: see `spawn`.
    let config = unsafe { &*config };
    let Config { uffd, pagemap, maps, mem, done_event, .. } = *config;
    sys::become_a_process([uffd, pagemap, maps, mem, done_event]);
    // SAFETY: see `spawn`.
    let end = unsafe { Agent::new(config) }.run();
    sys::exit(end as i32)
}

/// The same work on the calling thread, where a process cannot be made. Ends when it is told to.
///
/// # Safety
/// See [`spawn`]. All signals of the thread are blocked.
pub unsafe fn run_as_thread(config: *const Config) -> End {
    // SAFETY: the caller's promise.
    unsafe { Agent::new(&*config) }.run()
}
