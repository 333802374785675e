//! userfaultfd: make it, register ranges, answer faults, read events.
//!
//! ```text
//!   client: create -> sends the descriptor -> pager: api(wanted) -> register(range, mode)
//!                                                      |
//!          fault ---> read_events: Fault --------------+--> copy / zeropage / cont / poison --> thread goes on
//!          munmap, madvise, fork --> read_events: Unmap, Remove, Fork (fills answer Again until these are read)
//! ```
//! Read on until nothing is left before retrying a fill: the kernel hands out faults before older events.
//! Closing the last descriptor of a userfaultfd turns missing pages into zeros without a word, so the vault keeps one.
//! After a crash, faults that the dead process had read come again once their range gets [`Userfaultfd::wake`].

pub(crate) mod create;
mod journal;
mod outcome;
mod registered;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, FdFlags};

pub use self::create::{UffdKind, open_device};
pub use self::journal::{Change, EventJournal, KeptEvent, KeptFork};
pub use self::outcome::{FillOutcome, FillStop, WpOutcome};
pub use self::registered::RegistrationProbe;

use crate::abi;
use crate::bytes::MappedBytes;
use crate::error::HookError;
use crate::range::{AddrRange, PAGE_SIZE};
use crate::sys::errno_of;

bitflags::bitflags! {
    /// What a userfaultfd can be asked to do; the names are the kernel's (`UFFD_FEATURE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Faults say whether write protection caused them.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// Fork sends an event with the child's own userfaultfd. Needs privilege of whoever performs the handshake.
        const EVENT_FORK = 1 << 1;
        /// mremap sends an event.
        const EVENT_REMAP = 1 << 2;
        /// MADV_DONTNEED, MADV_FREE and MADV_REMOVE send an event.
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults on hugetlbfs.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults on shared memory.
        const MISSING_SHMEM = 1 << 5;
        /// munmap sends an event.
        const EVENT_UNMAP = 1 << 6;
        /// Faults raise SIGBUS instead of waiting.
        const SIGBUS = 1 << 7;
        /// Faults name the thread.
        const THREAD_ID = 1 << 8;
        /// Minor faults on hugetlbfs.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults on shared memory.
        const MINOR_SHMEM = 1 << 10;
        /// Fault addresses are not rounded to pages.
        const EXACT_ADDRESS = 1 << 11;
        /// Write protection of shared memory and hugetlbfs.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write protection of pages that are not there yet.
        const WP_UNPOPULATED = 1 << 13;
        /// Pages whose touch raises SIGBUS.
        const POISON = 1 << 14;
        /// Write protection resolved by the kernel, for dirty tracking.
        const WP_ASYNC = 1 << 15;
        /// Pages moved without copying.
        const MOVE = 1 << 16;
    }

    /// What a registered range reports.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegisterMode: u64 {
        /// Touches of holes.
        const MISSING = 1;
        /// Writes to protected pages.
        const WP = 2;
        /// Touches of pages that are in the page cache but not mapped.
        const MINOR = 4;
    }
}

/// How [`Userfaultfd::copy`] installs pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyMode {
    /// Install them write-protected.
    pub wp: bool,
    /// Do not wake waiting threads (fill first, wake once).
    pub dontwake: bool,
}

/// A message of a userfaultfd.
#[derive(Debug)]
pub enum UffdEvent {
    /// A thread waits at `addr`. Flags say what the kernel saw, not whose data is where: residency comes from the directory.
    Fault {
        /// Address, rounded to its page unless EXACT_ADDRESS was granted.
        addr: u64,
        /// A write.
        write: bool,
        /// Of a write-protected page.
        wp: bool,
        /// Of a page that is in the page cache.
        minor: bool,
        /// The thread, with THREAD_ID; else 0.
        thread_id: u32,
    },
    /// The process forked; the child's ranges are registered with this new descriptor.
    Fork {
        /// The child's.
        uffd: Userfaultfd,
    },
    /// A range moved (mremap).
    Remap {
        /// Old start.
        from: u64,
        /// New start.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// Pages were dropped; the range stays registered.
    Remove {
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
    /// A range is gone.
    Unmap {
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
    },
}

/// See [`Userfaultfd::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdState {
    /// Every event so far was read, and the thread that caused it has gone on.
    Quiet,
    /// A thread is inside fork, mremap, munmap or madvise, and its event is unread, or was read this instant.
    EventUnread,
    /// The process is gone.
    NoProcess,
}

/// Above what the kernel forbids to map and below where it puts anything, so there is no memory to continue.
const PROBE_ADDR: u64 = 1 << 20;

/// How many messages one `read` takes.
const READ_BATCH: usize = 64;

/// A userfaultfd of some process: this one's or a client's. Fills work from any process that holds it, except `move_pages`.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// Takes over a descriptor that came over a socket or from the vault, and makes it non-blocking (a blocking one, sent by a
    /// hostile client, would stop the reader's loop).
    ///
    /// # Errors
    /// `Call` when the flags cannot be set.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, HookError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| HookError::failed("FIONBIO(userfaultfd)", error))?;
        Ok(Self { fd })
    }

    /// A second handle; the kernel object lives until the last is closed.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, HookError> {
        Ok(Self { fd: self.try_clone_fd()? })
    }

    /// A second descriptor of it, to send.
    ///
    /// # Errors
    /// `Call` when the process is out of descriptors.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, HookError> {
        crate::memfd::try_clone(self.fd.as_fd())
    }

    /// Gives the descriptor away, to send or to keep in the vault.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The handshake, once in the life of a userfaultfd, by any process that holds it: all of `wanted`, or an error.
    ///
    /// # Errors
    /// `Call`: EINVAL when a feature is not supported or the handshake was done before, EPERM for EVENT_FORK without privilege.
    pub fn api(&self, wanted: Features) -> Result<Features, HookError> {
        let mut request = abi::UffdioApi { api: abi::UFFD_API, features: wanted.bits(), ioctls: 0 };
        // SAFETY: no addresses inside.
        match unsafe { abi::UFFDIO_API.call(self.fd.as_fd(), &mut request) } {
            Ok(_) => Ok(wanted),
            Err(source) => {
                let hint = match errno_of(&source) {
                    libc::EPERM => "EVENT_FORK needs CAP_SYS_PTRACE: let the pager do the handshake, or leave it out",
                    libc::EINVAL => "The kernel lacks a feature, or the handshake was done already: see `uhmm doctor`",
                    _ => "",
                };
                Err(HookError::hinted("UFFDIO_API", source, hint))
            }
        }
    }

    /// The handshake with as much of `wanted` as this kernel and account grant; returns what was granted.
    ///
    /// # Errors
    /// `Call` when not even the rest is granted.
    pub fn api_best(&self, wanted: Features) -> Result<Features, HookError> {
        let supported = wanted & Self::supported_features()?;
        match self.api(supported) {
            Err(error) if error.errno() == Some(libc::EPERM) && supported.contains(Features::EVENT_FORK) => {
                self.api(supported - Features::EVENT_FORK)
            }
            answer => answer,
        }
    }

    /// All features of this kernel, asked on a throw-away descriptor.
    ///
    /// # Errors
    /// `NoUserfaultfd`, `Call`.
    pub fn supported_features() -> Result<Features, HookError> {
        let (probe, _) = Self::create(None)?;
        let mut request = abi::UffdioApi { api: abi::UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: no addresses inside.
        unsafe { abi::UFFDIO_API.call(probe.fd.as_fd(), &mut request) }
            .map_err(|source| HookError::failed("UFFDIO_API", source))?;
        Ok(Features::from_bits_truncate(request.features))
    }

    /// Has the faults of a range of the creator's addresses reported here. Pages already there stay.
    ///
    /// # Errors
    /// `Call`: EINVAL for memory that cannot be registered (private file mappings, gaps), EBUSY when another userfaultfd has it.
    pub fn register(&self, range: AddrRange, mode: RegisterMode) -> Result<(), HookError> {
        let mut request = abi::UffdioRegister { range: raw(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: the address names a range of the creator's; registering changes no byte of it.
        unsafe { abi::UFFDIO_REGISTER.call(self.fd.as_fd(), &mut request) }.map(drop).map_err(|source| {
            let hint = match errno_of(&source) {
                libc::EINVAL => "Only anonymous, memfd and hugetlb memory can be registered, without gaps",
                libc::EBUSY => "Another userfaultfd has this range: unregister it there",
                _ => "",
            };
            HookError::on("UFFDIO_REGISTER", range, source, hint)
        })
    }

    /// Ends reporting; threads that wait there go on, and touch holes as the kernel's zero pages.
    ///
    /// # Errors
    /// `Call`.
    pub fn unregister(&self, range: AddrRange) -> Result<(), HookError> {
        let mut request = raw(range);
        // SAFETY: as in `register`.
        unsafe { abi::UFFDIO_UNREGISTER.call(self.fd.as_fd(), &mut request) }
            .map(drop)
            .map_err(|source| HookError::on("UFFDIO_UNREGISTER", range, source, ""))
    }

    /// Fills holes with `len` bytes of a mapping of this process. Never replaces a page.
    ///
    /// # Errors
    /// `OutOfWindow`, `Unaligned` and the like for wrong arguments; the kernel's answer is in the outcome.
    pub fn copy(
        &self,
        dst: u64,
        src: &MappedBytes,
        src_off: u64,
        len: u64,
        mode: CopyMode,
    ) -> Result<FillOutcome, HookError> {
        let range = AddrRange::new(dst, len)?;
        let src = src.at(src_off, len)?.expose_provenance() as u64;
        let bits = flag(mode.wp, abi::COPY_WP) | flag(mode.dontwake, abi::COPY_DONTWAKE);
        let mut request = abi::UffdioCopy { dst: range.start, src, len, mode: bits, copy: 0 };
        // SAFETY: `src..src+len` was checked to lie inside a live mapping, which the kernel only reads.
        let answer = unsafe { abi::UFFDIO_COPY.call(self.fd.as_fd(), &mut request) };
        Ok(FillOutcome::interpret(answer, request.copy, len, outcome::Kind::Copy))
    }

    /// Fills holes with zero pages. Not for memory registered with MINOR only.
    ///
    /// # Errors
    /// None beyond those of the range; see [`Self::copy`].
    pub fn zeropage(&self, range: AddrRange, dontwake: bool) -> Result<FillOutcome, HookError> {
        let mode = flag(dontwake, abi::ZEROPAGE_DONTWAKE);
        self.fill(&abi::UFFDIO_ZEROPAGE, range, mode, outcome::Kind::Other)
    }

    /// Maps pages that are in the page cache already. Needs a range registered with MINOR.
    ///
    /// # Errors
    /// See [`Self::copy`]. A hole in the page cache stops it with `NoPage`.
    pub fn cont(&self, range: AddrRange, wp: bool, dontwake: bool) -> Result<FillOutcome, HookError> {
        let mode = flag(wp, abi::CONTINUE_WP) | flag(dontwake, abi::CONTINUE_DONTWAKE);
        self.fill(&abi::UFFDIO_CONTINUE, range, mode, outcome::Kind::Continue)
    }

    /// Makes touches of these holes raise SIGBUS, for pages whose content is lost. MADV_DONTNEED or a punch lifts it.
    ///
    /// # Errors
    /// See [`Self::copy`].
    pub fn poison(&self, range: AddrRange) -> Result<FillOutcome, HookError> {
        self.fill(&abi::UFFDIO_POISON, range, 0, outcome::Kind::Other)
    }

    fn fill(
        &self,
        ioctl: &crate::sys::Ioctl<abi::UffdioFill>,
        range: AddrRange,
        mode: u64,
        kind: outcome::Kind,
    ) -> Result<FillOutcome, HookError> {
        let range = AddrRange::new(range.start, range.len)?;
        let mut request = abi::UffdioFill { range: raw(range), mode, done: 0 };
        // SAFETY: the range is the creator's; the kernel only installs pages where there are none.
        let answer = unsafe { ioctl.call(self.fd.as_fd(), &mut request) };
        Ok(FillOutcome::interpret(answer, request.done, range.len, kind))
    }

    /// Moves private pages from `src` to the holes at `dst` without copying. Only in the process that made the userfaultfd
    /// (the SDK's agent); the caller owns both ranges, and no Rust value lies in them. A pinned or shared page stops it (`Busy`).
    ///
    /// # Errors
    /// See [`Self::copy`].
    pub fn move_pages(&self, dst: u64, src: u64, len: u64, allow_holes: bool) -> Result<FillOutcome, HookError> {
        let (to, from) = (AddrRange::new(dst, len)?, AddrRange::new(src, len)?);
        let mode = flag(allow_holes, abi::MOVE_ALLOW_SRC_HOLES);
        let mut request = abi::UffdioMove { dst: to.start, src: from.start, len, mode, moved: 0 };
        // SAFETY: the caller owns both ranges, by this function's contract; see the crate's head.
        let answer = unsafe { abi::UFFDIO_MOVE.call(self.fd.as_fd(), &mut request) };
        Ok(FillOutcome::interpret(answer, request.moved, len, outcome::Kind::Other))
    }

    /// Protects a range against writes, or lifts that. Lifting wakes the writers that wait there, unless `dontwake`.
    ///
    /// # Errors
    /// `Call` for answers that [`WpOutcome`] has no word for.
    pub fn write_protect(&self, range: AddrRange, on: bool, dontwake: bool) -> Result<WpOutcome, HookError> {
        let range = AddrRange::new(range.start, range.len)?;
        // The kernel refuses DONTWAKE beside WP: protecting never wakes.
        let mode = flag(on, abi::WRITEPROTECT_WP) | flag(dontwake && !on, abi::WRITEPROTECT_DONTWAKE);
        let mut request = abi::UffdioWriteprotect { range: raw(range), mode };
        // SAFETY: the range is the creator's; protection changes no byte of it.
        match unsafe { abi::UFFDIO_WRITEPROTECT.call(self.fd.as_fd(), &mut request) } {
            Ok(_) => Ok(WpOutcome::Done),
            Err(source) => WpOutcome::of_errno(errno_of(&source))
                .ok_or_else(|| HookError::on("UFFDIO_WRITEPROTECT", range, source, "Register the range with WP")),
        }
    }

    /// What its process is doing, asked in a way that changes nothing.
    ///
    /// A range that another thread has unmapped or moved can be mapped anew before its event is read: whoever puts new memory
    /// under management must see `Quiet` first, or the older event is taken for the new memory's. For processes that no pidfd
    /// is held of, this tells their death.
    ///
    /// # Errors
    /// None beyond a kernel without UFFDIO_CONTINUE.
    pub fn state(&self) -> Result<UffdState, HookError> {
        let nowhere = AddrRange { start: PROBE_ADDR, len: PAGE_SIZE };
        Ok(match self.cont(nowhere, false, true)?.stop {
            Some(FillStop::Again) => UffdState::EventUnread,
            Some(FillStop::NoProcess) => UffdState::NoProcess,
            _ => UffdState::Quiet,
        })
    }

    /// Whether the private memory at `addr` is registered here: the place is still the one that was put under management. UFFDIO_CONTINUE
    /// is not for private memory, so it changes nothing, but the kernel looks for the registration first. `None`: an event is unread, or
    /// the process is gone.
    ///
    /// # Errors
    /// `Misaligned`.
    pub fn has_private(&self, addr: u64) -> Result<Option<bool>, HookError> {
        let page = AddrRange { start: addr, len: PAGE_SIZE };
        Ok(match self.cont(page, false, true)?.stop {
            Some(FillStop::Again | FillStop::NoProcess) => None,
            Some(FillStop::Gone) => Some(false),
            _ => Some(true),
        })
    }

    /// Wakes every thread that waits in a range; those whose page still is not there fault anew.
    ///
    /// # Errors
    /// `Call`.
    pub fn wake(&self, range: AddrRange) -> Result<(), HookError> {
        let mut request = raw(AddrRange::new(range.start, range.len)?);
        // SAFETY: no byte is changed.
        unsafe { abi::UFFDIO_WAKE.call(self.fd.as_fd(), &mut request) }
            .map(drop)
            .map_err(|source| HookError::on("UFFDIO_WAKE", range, source, ""))
    }

    /// Appends the waiting messages, at most 64, and returns how many; 0 when there are none. Call until it returns 0.
    ///
    /// # Errors
    /// `Call` (EINVAL before the handshake), `Strange` for a message of an unknown kind.
    pub fn read_events(&self, out: &mut Vec<UffdEvent>) -> Result<usize, HookError> {
        let mut messages = [abi::UffdMsg::default(); READ_BATCH];
        let read_bytes = loop {
            // SAFETY: the buffer is that many bytes of plain integers, for which any value is valid.
            let rc = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
            if rc >= 0 {
                break rc as usize;
            }
            match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::AGAIN) => return Ok(0),
                Some(Errno::INTR) => {}
                error => return Err(HookError::failed("read(userfaultfd)", error.unwrap_or(Errno::IO))),
            }
        };
        let count = read_bytes / size_of::<abi::UffdMsg>();
        let mut answer = Ok(count);
        for message in &messages[..count] {
            // SAFETY: the kernel wrote these messages for this process in this read, and each is decoded once.
            match unsafe { decode(message) } {
                Ok(event) => out.push(event),
                Err(error) => answer = Err(error),
            }
        }
        answer
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Turns a message into an event; an error for a kind that this code does not know.
///
/// # Safety
/// The message was just read from a userfaultfd by this process, and is decoded once: a fork message owns a descriptor.
unsafe fn decode(message: &abi::UffdMsg) -> Result<UffdEvent, HookError> {
    let [first, second, third] = message.arg;
    Ok(match message.event {
        abi::EVENT_PAGEFAULT => UffdEvent::Fault {
            addr: second,
            write: first & abi::PAGEFAULT_WRITE != 0,
            wp: first & abi::PAGEFAULT_WP != 0,
            minor: first & abi::PAGEFAULT_MINOR != 0,
            thread_id: third as u32,
        },
        abi::EVENT_FORK => {
            // SAFETY: the kernel installed this descriptor for us while we read the message (our contract).
            let fd = unsafe { OwnedFd::from_raw_fd(first as u32 as i32) };
            // It is blocking and survives exec if the client made its own so, whatever was set on ours since.
            rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
                .map_err(|error| HookError::failed("fcntl(FD_CLOEXEC of a child's userfaultfd)", error))?;
            UffdEvent::Fork { uffd: Userfaultfd::from_fd(fd)? }
        }
        abi::EVENT_REMAP => UffdEvent::Remap { from: first, to: second, len: third },
        abi::EVENT_REMOVE => UffdEvent::Remove { start: first, end: second },
        abi::EVENT_UNMAP => UffdEvent::Unmap { start: first, end: second },
        unknown => {
            return Err(HookError::Strange { call: "read(userfaultfd)", detail: format!("event {unknown:#x}") });
        }
    })
}

fn raw(range: AddrRange) -> abi::UffdioRange {
    abi::UffdioRange { start: range.start, len: range.len }
}

fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

impl UffdEvent {
    /// The page of a fault, as a range; None for other events.
    #[must_use]
    pub fn fault_page(&self) -> Option<AddrRange> {
        match self {
            Self::Fault { addr, .. } => Some(AddrRange { start: addr & !(PAGE_SIZE - 1), len: PAGE_SIZE }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_kernels_seventeen_bits() {
        assert_eq!(Features::all().bits(), (1 << 17) - 1);
    }

    #[test]
    fn messages_decode_by_kind() {
        let flags = abi::PAGEFAULT_WRITE | abi::PAGEFAULT_MINOR;
        let fault =
            abi::UffdMsg { event: 0x12, arg: [flags, 0x7000_1234, 0xffff_ffff_0000_0007], ..Default::default() };
        // SAFETY: no fork message, so nothing is owned.
        let event = unsafe { decode(&fault) }.unwrap();
        assert_eq!(event.fault_page(), Some(AddrRange { start: 0x7000_1000, len: PAGE_SIZE }));
        assert!(matches!(event, UffdEvent::Fault { write: true, wp: false, minor: true, thread_id: 7, .. }));
        let remap = abi::UffdMsg { event: 0x14, arg: [1, 2, 3], ..Default::default() };
        // SAFETY: as above.
        assert!(matches!(unsafe { decode(&remap) }, Ok(UffdEvent::Remap { from: 1, to: 2, len: 3 })));
        let unknown = abi::UffdMsg { event: 0x77, ..Default::default() };
        // SAFETY: as above.
        assert!(unsafe { decode(&unknown) }.is_err());
    }
}
