//! Landlock by its three system calls: the C library has no wrapper, and a crate's would allocate where it may not.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::FileType;

use super::{Report, Step};

const VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;
const RULE_PORT: u32 = 2;
const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const REMOVE_FILE: u64 = 1 << 5;
const MAKE_REG: u64 = 1 << 8;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
/// Rights that a rule about a file, not a folder, may give.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;
/// The first version's, up to making symbolic links.
const FIRST: u64 = (1 << 13) - 1;
const REFER: u64 = 1 << 13;
const TCP: u64 = 0b11;
const CONNECT: u64 = 0b10;
const ABSTRACT_SOCKETS_AND_SIGNALS: u64 = 0b11;

/// What may be done with a file, or with what is below a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileAccess {
    /// Read files and list folders.
    Read,
    /// Read and execute.
    Execute,
    /// Read and write files that exist.
    Write,
    /// Read, write, ioctl.
    Device,
    /// Of a folder: read, write, make and remove files.
    Create,
}

impl FileAccess {
    fn rights(self) -> u64 {
        let read = READ_FILE | READ_DIR;
        match self {
            Self::Read => read,
            Self::Execute => read | EXECUTE,
            Self::Write => read | WRITE_FILE | TRUNCATE,
            Self::Device => read | WRITE_FILE | TRUNCATE | IOCTL_DEV,
            Self::Create => read | WRITE_FILE | TRUNCATE | MAKE_REG | REMOVE_FILE,
        }
    }

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Execute => "execute",
            Self::Write => "write",
            Self::Device => "device",
            Self::Create => "create",
        }
    }
}

#[repr(C)]
struct Ruleset {
    files: u64,
    tcp: u64,
    scoped: u64,
}

#[repr(C)]
struct Port {
    allowed: u64,
    port: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

/// What this kernel's Landlock can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LandlockSupport {
    /// Its version; 0: there is none.
    pub version: u32,
}

impl LandlockSupport {
    /// Asks the kernel.
    #[must_use]
    pub fn probe() -> Self {
        // SAFETY: with this flag the call reads no memory.
        let answer =
            unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>(), 0usize, VERSION) };
        Self { version: u32::try_from(answer).unwrap_or(0) }
    }

    /// TCP can be refused.
    #[must_use]
    pub fn tcp(self) -> bool {
        self.version >= 4
    }

    /// Signals to processes outside can be refused.
    #[must_use]
    pub fn signals(self) -> bool {
        self.version >= 6
    }

    fn files(self) -> u64 {
        match self.version {
            0 => 0,
            1 => FIRST,
            2 => FIRST | REFER,
            3 | 4 => FIRST | REFER | TRUNCATE,
            _ => FIRST | REFER | TRUNCATE | IOCTL_DEV,
        }
    }
}

/// Rules with names that the child opens.
#[derive(Debug)]
pub(super) struct Prepared {
    pub support: LandlockSupport,
    pub rules: Vec<(CString, FileAccess)>,
    pub tcp: bool,
    /// Where it may connect to all the same.
    pub ports: Vec<u16>,
}

impl Prepared {
    /// From here on the process has what the rules allow, and what it has open.
    pub(super) fn restrict(&self, report: &mut Report) {
        let support = self.support;
        let answer = if support.version == 0 { Err(libc::EOPNOTSUPP) } else { self.enforce().map_err(errno) };
        let of = |offered: bool| if offered { answer.err().unwrap_or(0) } else { libc::EOPNOTSUPP };
        report.note(Step::Files, answer.err().unwrap_or(0));
        if !self.tcp {
            report.note(Step::Tcp, of(support.tcp()));
        }
        report.note(Step::Signals, of(support.signals()));
    }

    fn enforce(&self) -> io::Result<()> {
        let handled = self.support.files();
        let attributes = Ruleset {
            files: handled,
            tcp: if self.support.tcp() && !self.tcp { TCP } else { 0 },
            scoped: if self.support.signals() { ABSTRACT_SOCKETS_AND_SIGNALS } else { 0 },
        };
        // SAFETY: reads the structure; a kernel that knows a shorter one accepts zeroes behind it.
        let made =
            unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size_of::<Ruleset>(), 0) };
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let ruleset = unsafe { OwnedFd::from_raw_fd(made as i32) };
        for (path, access) in &self.rules {
            // SAFETY: a name that ends with a zero.
            let opened = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
            if opened < 0 {
                // What is not there needs no rule.
                continue;
            }
            // SAFETY: as above.
            let opened = unsafe { OwnedFd::from_raw_fd(opened) };
            allow(&ruleset, opened.as_raw_fd(), access.rights() & handled)?;
        }
        for port in self.ports.iter().filter(|_| attributes.tcp != 0) {
            let rule = Port { allowed: CONNECT, port: u64::from(*port) };
            // SAFETY: reads the rule.
            let added = unsafe {
                libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), RULE_PORT, &raw const rule, 0)
            };
            if added != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // A log that is a file or a terminal may be opened again, by its number. (Pipes may in any case.)
        // SAFETY: standard error, which no rule can outlive.
        let log = unsafe { BorrowedFd::borrow_raw(2) };
        let kind = rustix::fs::fstat(log).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if matches!(kind, Ok(FileType::RegularFile | FileType::CharacterDevice)) {
            allow(&ruleset, 2, WRITE_FILE)?;
        }
        // SAFETY: a call without pointers.
        match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn allow(ruleset: &OwnedFd, parent: i32, rights: u64) -> io::Result<()> {
    // SAFETY: a local that fstat fills.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let is_folder = unsafe { libc::fstat(parent, &mut stat) } == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    let allowed = if is_folder { rights } else { rights & OF_FILES };
    let rule = PathBeneath { allowed, parent };
    // SAFETY: reads the rule.
    let added = unsafe {
        libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), RULE_PATH_BENEATH, &raw const rule, 0)
    };
    if added == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
