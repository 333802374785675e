//! Taking a file or a partition: whose it is, that nobody else has it, that it is on a disk, and that its room is reserved.
//!
//! ```text
//!   open O_DIRECT -> lock -> is it a disk? -> whose header? -> room for all blocks, now -> header of a new life
//! ```
//! Everything that can be wrong is said here, before a page depends on it. A file made here is removed again when it is refused.
//!
//! The descriptor goes to the vault: so the lock outlives the driver, and a file that somebody removes lives as long as the system.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{self, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use uhmm_driver_kit::{Hint, PAGE_BYTES};
use uhmm_kernel_hook::{HookError, Window};

use super::transfer;
use crate::header::{Found, HEADER_BYTES, Header};
use crate::table::Life;

/// Blocks beside those that hold a full device's pages: 1 in so many.
const SPARE_PART: u32 = 64;
/// At least so many.
const SPARE_MIN: u32 = 512;
/// Enough for everything in flight.
const SPARE_MAX: u32 = 65_536;

/// File systems whose fallocate waits for direct I/O in flight, whoever began it.
const WAITING: [i64; 2] = [0xef53, 0x5846_5342];
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;
const HUGETLBFS: i64 = 0x9584_58f6;

/// Why a path is no device.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// No folder.
    #[error("{}: its folder is not there: make it, or name another path", .0.display())]
    NoFolder(PathBuf),
    /// Read-only or not ours.
    #[error("{} cannot be written: {reason}. Give this account the right to, or name another path", .path.display())]
    NotWritable {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        reason: Errno,
    },
    /// A folder, a pipe.
    #[error("{} is neither a file nor a partition: name one of these", .0.display())]
    NotAFile(PathBuf),
    /// Page cache only.
    #[error("{} lies on a file system without O_DIRECT: its pages would stay in memory. Name a path on a local disk (ext4, xfs, btrfs) or a partition", .0.display())]
    NoDirect(PathBuf),
    /// tmpfs.
    #[error("{} lies in memory (tmpfs or ramfs): it would save none. Name a path on a disk", .0.display())]
    InMemory(PathBuf),
    /// Sectors larger than pages.
    #[error("{} wants transfers in units of {unit} bytes, and pages have 4096: name another disk", .path.display())]
    Unit {
        /// Where.
        path: PathBuf,
        /// Bytes.
        unit: u32,
    },
    /// Locked.
    #[error("{} is in use by another uhmm: stop that one (uhmm down), or name another path", .0.display())]
    Locked(PathBuf),
    /// Mounted.
    #[error("{} is in use (mounted, or part of something else): unmount it, or name another partition", .0.display())]
    Busy(PathBuf),
    /// Somebody's data.
    #[error("{} holds data that is not uhmm's ({hint}): name another path, or destroy it with `format = true` in the manifest's [[device]]", .path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// What it looks like.
        hint: Hint,
    },
    /// No room.
    #[error("{} needs {needed} bytes, and there is room for {room}: free some, or give a smaller memory_bytes", .path.display())]
    NoRoom {
        /// Where.
        path: PathBuf,
        /// Bytes wanted.
        needed: u64,
        /// Bytes there are.
        room: u64,
    },
    /// No fallocate.
    #[error("{}: its file system cannot reserve room for it, and a disk that fills up later would be too late. Name a path on ext4, xfs or btrfs, or a partition", .0.display())]
    NoReserve(PathBuf),
    /// Anything else.
    #[error("{}: {what} failed: {reason}", .path.display())]
    Call {
        /// Where.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        reason: io::Error,
    },
    /// Memory for the header.
    #[error(transparent)]
    Memory(#[from] HookError),
}

/// An open medium.
#[derive(Clone, Debug)]
pub struct Medium {
    /// O_DIRECT, locked.
    pub file: Arc<OwnedFd>,
    /// A file, else a partition.
    pub regular: bool,
    /// Frames.
    pub frames: u32,
    /// Blocks.
    pub blocks: u32,
    path: PathBuf,
    found: Found,
    /// It was shorter than it should be, and is not any more.
    pub was_short: bool,
    /// io_uring may be used: a successor can wait for what it leaves in flight.
    pub settles: bool,
}

/// Frames of a device of that size, and blocks for them.
pub fn shape(memory_bytes: u64) -> (u32, u32) {
    let spare = |frames: u32| (frames / SPARE_PART).clamp(SPARE_MIN, SPARE_MAX);
    let frames = u32::try_from(memory_bytes / PAGE_BYTES).unwrap_or(u32::MAX).min(u32::MAX - 1 - SPARE_MAX);
    (frames, frames + spare(frames))
}

/// The most frames, and blocks for them, that fit into `room` blocks.
pub fn fitting(room: u64, wanted: u32) -> Option<(u32, u32)> {
    let (mut low, mut high) = (0, wanted);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        let blocks = shape(u64::from(middle) * PAGE_BYTES).1;
        if u64::from(blocks) <= room { low = middle } else { high = middle - 1 }
    }
    (low > 0).then(|| shape(u64::from(low) * PAGE_BYTES))
}

impl Medium {
    /// Opens and reserves. `kept`: the descriptor that the last incarnation had. `format`: whatever it holds now.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn open(path: &Path, memory_bytes: u64, format: bool, kept: Option<Arc<OwnedFd>>) -> Result<Self, FileError> {
        let Some(file) = kept else {
            let made = create(path)?;
            let opened = open_file(path).and_then(|file| Self::take(path, memory_bytes, format, file, false));
            return opened.inspect_err(|_| {
                if made {
                    drop(std::fs::remove_file(path));
                }
            });
        };
        Self::take(path, memory_bytes, format, file, true)
    }

    fn take(path: &Path, memory_bytes: u64, format: bool, file: Arc<OwnedFd>, kept: bool) -> Result<Self, FileError> {
        let stat = fs::fstat(&file).map_err(call(path, "fstat"))?;
        let regular = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => true,
            FileType::BlockDevice => false,
            _ => return Err(FileError::NotAFile(path.to_owned())),
        };
        // The vault's descriptor has the lock already: taking it again changes nothing.
        match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(FileError::Locked(path.to_owned())),
            Err(error) => return Err(call(path, "flock")(error)),
        }
        let settles = regular && check_place(path, &file)?;
        if settles && kept {
            settle(path, &file)?;
        }
        let len = fs::seek(&file, SeekFrom::End(0)).map_err(call(path, "lseek"))?;
        let found = read_begin(path, &file, len)?;
        if let Found::Foreign(hint) = found
            && !format
        {
            return Err(FileError::Foreign { path: path.to_owned(), hint });
        }
        let (mut frames, mut blocks) = shape(memory_bytes);
        let needed = HEADER_BYTES + u64::from(blocks) * PAGE_BYTES;
        if regular {
            reserve(path, &file, len, needed)?;
        } else if needed > len {
            let fitted = fitting(len.saturating_sub(HEADER_BYTES) / PAGE_BYTES, frames);
            (frames, blocks) = fitted.ok_or(FileError::NoRoom { path: path.to_owned(), needed, room: len })?;
        }
        Ok(Self {
            file,
            regular,
            frames,
            blocks,
            path: path.to_owned(),
            found,
            was_short: len < needed && regular,
            settles,
        })
    }

    /// The header says that the blocks are of this life.
    pub fn is_of(&self, life: Life) -> bool {
        matches!(self.found, Found::Header(Header { in_use: true, life: found, blocks }) if found == life && blocks == self.blocks)
    }

    /// A new life begins: what the blocks hold means nothing from now on.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn begin(&mut self, life: Life) -> Result<(), FileError> {
        self.write_header(Header { in_use: true, life, blocks: self.blocks })
    }

    /// The system ends in order. A file's room is given back to its file system, and with it what was in it.
    ///
    /// # Errors
    /// The header cannot be written.
    pub fn give_back(&mut self, life: Life) -> Result<(), FileError> {
        self.write_header(Header { in_use: false, life, blocks: self.blocks })?;
        if self.regular {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let len = u64::from(self.blocks) * PAGE_BYTES;
            fs::fallocate(&self.file, flags, HEADER_BYTES, len).map_err(call(&self.path, "giving its room back"))?;
        }
        Ok(())
    }

    fn write_header(&mut self, header: Header) -> Result<(), FileError> {
        let window = Arc::new(Window::anonymous(HEADER_BYTES)?);
        window.write(0, &header.encode())?;
        let written = transfer(&self.file, true, &window, HEADER_BYTES as u32);
        let synced = written.and_then(|()| fs::fdatasync(&self.file).map_err(io::Error::from));
        synced.map_err(|reason| FileError::Call { path: self.path.clone(), what: "writing its header", reason })?;
        self.found = Found::Header(header);
        Ok(())
    }
}

fn call<E: Into<io::Error>>(path: &Path, what: &'static str) -> impl FnOnce(E) -> FileError {
    let path = path.to_owned();
    move |error| FileError::Call { path, what, reason: error.into() }
}

/// True: it was not there.
fn create(path: &Path) -> Result<bool, FileError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    match fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
        Ok(_) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::NOENT | Errno::NOTDIR) => Err(FileError::NoFolder(path.to_owned())),
        Err(reason @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
            Err(FileError::NotWritable { path: path.to_owned(), reason })
        }
        Err(error) => Err(call(path, "making it")(error)),
    }
}

fn open_file(path: &Path) -> Result<Arc<OwnedFd>, FileError> {
    let kind = fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode)).map_err(call(path, "stat"))?;
    let mut flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY;
    match kind {
        FileType::RegularFile => {}
        // Refused while it is mounted.
        FileType::BlockDevice => flags |= OFlags::EXCL,
        _ => return Err(FileError::NotAFile(path.to_owned())),
    }
    match fs::open(path, flags, Mode::empty()) {
        Ok(file) => Ok(Arc::new(file)),
        Err(Errno::INVAL) => Err(FileError::NoDirect(path.to_owned())),
        Err(Errno::BUSY) => Err(FileError::Busy(path.to_owned())),
        Err(reason @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
            Err(FileError::NotWritable { path: path.to_owned(), reason })
        }
        Err(error) => Err(call(path, "opening it")(error)),
    }
}

/// The kernel reaps a killed process while writes of its io_uring are in flight still. One that landed after a successor has used the block for
/// something else would destroy that. So the successor waits for them: fallocate does, on the file systems where io_uring is used.
fn settle(path: &Path, file: &OwnedFd) -> Result<(), FileError> {
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    let waited = fs::fallocate(file, flags, HEADER_BYTES - PAGE_BYTES, PAGE_BYTES);
    waited.map_err(call(path, "waiting for an earlier driver's writes"))
}

/// On a disk, and in units that divide a page. True: see [`settle`].
fn check_place(path: &Path, file: &OwnedFd) -> Result<bool, FileError> {
    let system = fs::fstatfs(file).map_err(call(path, "fstatfs"))?;
    let kind = system.f_type as i64 & 0xffff_ffff;
    if [TMPFS, RAMFS, HUGETLBFS].contains(&kind) {
        return Err(FileError::InMemory(path.to_owned()));
    }
    let settles = WAITING.contains(&kind);
    let asked = fs::StatxFlags::from_bits_retain(0x2000); // STATX_DIOALIGN
    let told = fs::statx(file, c"", fs::AtFlags::EMPTY_PATH, asked).map_err(call(path, "statx"))?;
    if told.stx_mask & asked.bits() == 0 {
        return Ok(settles);
    }
    match told.stx_dio_mem_align.max(told.stx_dio_offset_align) {
        0 => Err(FileError::NoDirect(path.to_owned())),
        unit if u64::from(unit) > PAGE_BYTES => Err(FileError::Unit { path: path.to_owned(), unit }),
        _ => Ok(settles),
    }
}

fn read_begin(path: &Path, file: &Arc<OwnedFd>, len: u64) -> Result<Found, FileError> {
    let len = len.min(HEADER_BYTES);
    let whole = len - len % PAGE_BYTES;
    if whole == 0 {
        return Ok(if len == 0 { Found::Empty } else { Found::Foreign(Hint::Unknown) });
    }
    let window = Arc::new(Window::anonymous(whole)?);
    transfer(file, false, &window, whole as u32).map_err(call(path, "reading its header"))?;
    let mut begin = vec![0; whole as usize];
    window.read(0, &mut begin)?;
    Ok(Found::decode(&begin))
}

/// All of it, now. What cannot be had leaves the file as it was.
fn reserve(path: &Path, file: &OwnedFd, len: u64, needed: u64) -> Result<(), FileError> {
    let stat = fs::fstat(file).map_err(call(path, "fstat"))?;
    let system = fs::fstatvfs(file).map_err(call(path, "statvfs"))?;
    let room = system.f_bavail.saturating_mul(system.f_frsize).saturating_add(stat.st_blocks as u64 * 512);
    let no_room = |room| FileError::NoRoom { path: path.to_owned(), needed, room };
    if room < needed {
        return Err(no_room(room));
    }
    let reserved = fs::fallocate(file, FallocateFlags::empty(), 0, needed);
    if reserved.is_err()
        && len < needed
        && let Err(error) = fs::ftruncate(file, len)
    {
        tracing::warn!(%error, path = %path.display(), "Room that is not enough could not be given back");
    }
    match reserved {
        Ok(()) => Ok(()),
        Err(Errno::NOSPC | Errno::FBIG | Errno::DQUOT) => Err(no_room(room)),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(FileError::NoReserve(path.to_owned())),
        Err(error) => Err(call(path, "reserving its room")(error)),
    }
}

#[cfg(test)]
mod tests;
