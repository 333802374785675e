//! Transfers by io_uring. One thread at a time uses a ring; it may be handed on.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{Finished, Transfer, check, full};
use crate::error::HookError;
use crate::window::Window;

/// Longest wait for what is under way when a ring is dropped.
const DROP_PATIENCE: Duration = Duration::from_secs(5);

/// A transfer that the kernel has, and how much of it is done.
#[derive(Debug)]
struct UnderWay {
    transfer: Transfer,
    done: u32,
}

/// See the module head.
pub(super) struct Ring {
    // Dropped first: the kernel lets go of everything below.
    ring: IoUring,
    _file: Arc<OwnedFd>,
    /// Registered memory, by its number.
    registered: Vec<Arc<Window>>,
    slots: Vec<Option<UnderWay>>,
    under_way: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("under_way", &self.under_way).finish_non_exhaustive()
    }
}

fn failed(error: io::Error) -> HookError {
    HookError::failed("io_uring", error)
}

impl Ring {
    pub(super) fn open(file: Arc<OwnedFd>, depth: u32, memory: &[Arc<Window>]) -> Result<Self, HookError> {
        let depth = depth.clamp(1, 4096);
        let ring = IoUring::builder().setup_clamp().setup_coop_taskrun().build(depth.next_power_of_two());
        let ring = ring.map_err(|error| HookError::failed("io_uring_setup", error))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOSYS)));
        }
        ring.submitter().register_files(&[file.as_raw_fd()]).map_err(failed)?;
        let vectors: Vec<libc::iovec> = memory
            .iter()
            .map(|window| libc::iovec { iov_base: window.base().as_ptr().cast(), iov_len: window.len() as usize })
            .collect();
        // SAFETY: the windows are whole mappings of that length, and are kept until the ring is gone.
        let registered = !vectors.is_empty() && unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
        let registered = if registered { memory.to_vec() } else { Vec::new() };
        let slots = (0..depth).map(|_| None).collect();
        Ok(Self { ring, _file: file, registered, slots, under_way: 0 })
    }

    pub(super) fn describe(&self) -> &'static str {
        if self.registered.is_empty() {
            "io_uring, no buffers registered (ulimit -l allows none)"
        } else {
            "io_uring with registered buffers"
        }
    }

    pub(super) fn submit(&mut self, transfer: Transfer) -> Result<(), HookError> {
        check(&transfer)?;
        let slot = self.slots.iter().position(Option::is_none).ok_or_else(full)?;
        self.slots[slot] = Some(UnderWay { transfer, done: 0 });
        if let Err(error) = self.push(slot) {
            self.slots[slot] = None;
            return Err(error);
        }
        self.under_way += 1;
        // What the kernel does not take now it takes when somebody waits.
        drop(self.ring.submit());
        Ok(())
    }

    /// The rest of a slot's transfer into the queue.
    fn push(&mut self, slot: usize) -> Result<(), HookError> {
        let Some(UnderWay { transfer, done }) = &self.slots[slot] else { return Ok(()) };
        let place = check(transfer)?.wrapping_add(*done as usize);
        let (len, offset) = (transfer.len - done, transfer.offset + u64::from(*done));
        let number = self.registered.iter().position(|window| Arc::ptr_eq(window, &transfer.window));
        let file = Fixed(0);
        let entry: squeue::Entry = match (transfer.write, number) {
            (true, Some(at)) => opcode::WriteFixed::new(file, place, len, at as u16).offset(offset).build(),
            (false, Some(at)) => opcode::ReadFixed::new(file, place, len, at as u16).offset(offset).build(),
            (true, None) => opcode::Write::new(file, place, len).offset(offset).build(),
            (false, None) => opcode::Read::new(file, place, len).offset(offset).build(),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the memory was checked against its window, and the slot holds the window until the completion is taken.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| full())
    }

    pub(super) fn wait(&mut self, patience: Duration, done: &mut Vec<Finished>) -> Result<(), HookError> {
        let end = Instant::now() + patience;
        let had = done.len();
        loop {
            self.reap(done);
            let left = end.saturating_duration_since(Instant::now());
            if done.len() > had || self.under_way == 0 || left.is_zero() {
                return Ok(());
            }
            let time = Timespec::new().sec(left.as_secs()).nsec(left.subsec_nanos());
            let args = SubmitArgs::new().timespec(&time);
            match self.ring.submitter().submit_with_args(1, &args) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(failed(error)),
                },
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Finished>) {
        let ended: Vec<(usize, i32)> =
            self.ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect();
        for (slot, result) in ended {
            let Some(Some(under_way)) = self.slots.get_mut(slot) else { continue };
            let moved = u32::try_from(result).unwrap_or(0);
            under_way.done += moved;
            let again = matches!(-result, libc::EINTR | libc::EAGAIN);
            let left = under_way.done < under_way.transfer.len;
            if left && (moved > 0 || again) && self.push(slot).is_ok() {
                drop(self.ring.submit());
                continue;
            }
            let Some(UnderWay { transfer, .. }) = self.slots[slot].take() else { continue };
            self.under_way -= 1;
            let outcome = match result {
                _ if !left => Ok(()),
                0.. => Err(io::ErrorKind::UnexpectedEof.into()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
            done.push(Finished { token: transfer.token, outcome });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let end = Instant::now() + DROP_PATIENCE;
        while self.under_way > 0 && Instant::now() < end {
            if self.wait(end.saturating_duration_since(Instant::now()), &mut Vec::new()).is_err() {
                break;
            }
        }
        // The kernel may use the memory still: it is never given back.
        for under_way in self.slots.iter_mut().filter_map(Option::take) {
            std::mem::forget(under_way.transfer.window);
        }
    }
}
