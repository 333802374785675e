//! The CPUs that the calling thread may use, and the one that another thread uses.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use rustix::thread::CpuSet;

use crate::error::HookError;
use crate::process::parse_stat_cpu;

/// A line of `/proc/PID/task/TID/stat`: a name of up to 64 bytes, and 51 numbers that are small but for a few.
const STAT_BYTES: usize = 1024;

/// A set of CPUs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cpus(CpuSet);

impl Cpus {
    /// What the calling thread may use now: what somebody has set, within its control group's.
    ///
    /// # Errors
    /// `Call`, on machines with more CPUs than this knows.
    pub fn own() -> Result<Self, HookError> {
        rustix::thread::sched_getaffinity(None).map(Self).map_err(|error| HookError::failed("sched_getaffinity", error))
    }

    /// One CPU.
    #[must_use]
    pub fn only(cpu: u32) -> Option<Self> {
        let mut set = CpuSet::new();
        if cpu as usize >= CpuSet::MAX_CPU {
            return None;
        }
        set.set(cpu as usize);
        Some(Self(set))
    }

    /// It is one of them.
    #[must_use]
    pub fn contains(&self, cpu: u32) -> bool {
        (cpu as usize) < CpuSet::MAX_CPU && self.0.is_set(cpu as usize)
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.count()
    }

    /// The calling thread uses these from now on, so far as its control group allows them.
    ///
    /// # Errors
    /// `Call`: EINVAL when none of them is allowed.
    pub fn stay(&self) -> Result<(), HookError> {
        rustix::thread::sched_setaffinity(None, &self.0).map_err(|error| HookError::failed("sched_setaffinity", error))
    }
}

impl fmt::Debug for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..CpuSet::MAX_CPU).filter(|cpu| self.0.is_set(*cpu))).finish()
    }
}

/// A thread of some process, to be asked where it runs as often as one likes: its file stays open.
#[derive(Debug)]
pub struct ThreadCpu(File);

impl ThreadCpu {
    /// Thread `tid` of process `pid`, both as numbered in this process's `/proc`.
    ///
    /// # Errors
    /// `Call` when there is no such thread, or `/proc` hides it.
    pub fn of(pid: u32, tid: u32) -> Result<Self, HookError> {
        let opened = File::open(format!("/proc/{pid}/task/{tid}/stat"));
        opened.map(Self).map_err(|error| HookError::failed("open(/proc/PID/task/TID/stat)", error))
    }

    /// The CPU that it runs on or last ran on.
    ///
    /// # Errors
    /// `Call` when it is gone.
    pub fn now(&self) -> Result<u32, HookError> {
        let failed = |error| HookError::failed("read(/proc/PID/task/TID/stat)", error);
        let mut text = [0_u8; STAT_BYTES];
        let len = self.0.read_at(&mut text, 0).map_err(failed)?;
        let cpu = std::str::from_utf8(&text[..len]).ok().and_then(parse_stat_cpu);
        cpu.ok_or_else(|| HookError::failed("read(/proc/PID/task/TID/stat)", Errno::SRCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_found_where_it_was_told_to_stay() {
        let before = Cpus::own().unwrap();
        let cpu = (0..1024).find(|cpu| before.contains(*cpu)).unwrap();
        let tid = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let thread = ThreadCpu::of(std::process::id(), tid).unwrap();
        let one = Cpus::only(cpu).unwrap();
        one.stay().unwrap();
        assert_eq!((Cpus::own().unwrap(), thread.now().unwrap(), one.count()), (one, cpu, 1));
        before.stay().unwrap();
        assert_eq!(Cpus::own().unwrap(), before);
        assert!(Cpus::only(1 << 20).is_none() && !before.contains(1 << 20));
    }

    #[test]
    fn a_thread_that_is_gone_is_an_error() {
        assert!(ThreadCpu::of(std::process::id(), u32::MAX).is_err());
        let (told, tid) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            told.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
            ended.recv().unwrap_err();
        });
        let cpu = ThreadCpu::of(std::process::id(), tid.recv().unwrap()).unwrap();
        cpu.now().unwrap();
        drop(end);
        thread.join().unwrap();
        // The kernel lets the joiner go a moment before the thread has left the process.
        while cpu.now().is_ok() {
            std::thread::yield_now();
        }
    }
}
