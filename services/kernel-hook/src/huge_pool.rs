//! Reserved huge pages (hugetlb) for programs that test uhmm. The machine has one pool of them: whoever changes it holds a lock, and puts
//! it back.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, MemfdFlags, SealFlags};

use crate::error::HookError;
use crate::program::ProgramMemory;

/// Bytes of the pages that are reserved here, whatever the machine's default is.
pub const HUGE_BYTES: u64 = 2 << 20;
/// Longest wait for pages of an earlier holder.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const POLL: Duration = Duration::from_millis(2);
/// More often in a row nobody frees a page at the very moment.
const STARVE_TRIES: u32 = 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// More huge pages in the pool, for as long as it lives; then it is as large as it was.
#[derive(Debug)]
pub struct HugePool {
    before: u64,
    /// Holds the lock, which the kernel takes back from a process that dies.
    _lock: File,
}

fn failed(call: &'static str, path: &Path, source: std::io::Error) -> HookError {
    HookError::Path { call, path: path.to_owned(), source, hint: "Huge pages of 2 MiB can be reserved by root only" }
}

fn file(name: &str) -> PathBuf {
    Path::new(POOL).join(name)
}

fn count(name: &str) -> Result<u64, HookError> {
    let path = file(name);
    let text = std::fs::read_to_string(&path).map_err(|error| failed("read", &path, error))?;
    text.trim().parse().map_err(|_| HookError::Strange { call: "read(hugepages)", detail: format!("{name}: {text}") })
}

/// Pages that were in use when their holder put the pool back are "surplus" until they are free.
fn wait_for_the_rest() -> Result<(), HookError> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = count("surplus_hugepages")?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > end {
            let detail = format!("{left} pages that were reserved before are still in use");
            return Err(HookError::Strange { call: "reserve huge pages", detail });
        }
        // The kernel tells nobody when a page is free.
        std::thread::sleep(POLL);
    }
}

impl HugePool {
    /// Waits for the lock and for what an earlier holder has left in use (a service lets go of a file soon after its client), then
    /// reserves this many pages more than there are.
    ///
    /// # Errors
    /// `Path`: the kernel has no such pages, or does not let this account reserve any. `Strange`: memory is too fragmented, pages of an
    /// earlier holder stay in use, or the machine lets programs have more pages than are reserved (nr_overcommit_hugepages), so that
    /// they never run out.
    pub fn reserve(page_count: u64) -> Result<Self, HookError> {
        let path = file("nr_hugepages");
        let lock = File::open(&path).map_err(|error| failed("open", &path, error))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| failed("flock", &path, error.into()))?;
        if count("nr_overcommit_hugepages")? > 0 {
            let detail = "nr_overcommit_hugepages is not 0, so that huge pages never run out".into();
            return Err(HookError::Strange { call: "reserve huge pages", detail });
        }
        wait_for_the_rest()?;
        let before = count("nr_hugepages")?;
        let wanted = before + page_count;
        std::fs::write(&path, wanted.to_string()).map_err(|error| failed("write", &path, error))?;
        let pool = Self { before, _lock: lock };
        let found = count("nr_hugepages")?;
        if found < wanted {
            let detail = format!("{} of {page_count} were found in one piece", found.saturating_sub(before));
            return Err(HookError::Strange { call: "reserve huge pages", detail });
        }
        Ok(pool)
    }

    /// Pages that nobody has or was promised.
    ///
    /// # Errors
    /// `Path`, `Strange`.
    pub fn unclaimed(&self) -> Result<u64, HookError> {
        Ok(count("free_hugepages")?.saturating_sub(count("resv_hugepages")?))
    }
}

/// All huge pages that nobody else has. Other users of the pool take and free pages as they like.
#[derive(Debug)]
pub struct Hog<'a> {
    pool: &'a HugePool,
    taken: Vec<ProgramMemory>,
}

impl HugePool {
    /// Takes what is left.
    ///
    /// # Errors
    /// As [`HugePool::unclaimed`].
    pub fn hog(&self) -> Result<Hog<'_>, HookError> {
        let mut hog = Hog { pool: self, taken: Vec::new() };
        hog.take_rest()?;
        Ok(hog)
    }
}

impl Hog<'_> {
    /// Takes what others have freed, too.
    fn take_rest(&mut self) -> Result<(), HookError> {
        loop {
            match self.pool.unclaimed()? {
                0 => return Ok(()),
                // Somebody may be faster: then there are fewer at the next look.
                left => self.taken.extend(ProgramMemory::hugetlb(left * HUGE_BYTES)),
            }
        }
    }

    /// Does something that must find no page and gives its error. When it finds one that somebody has freed that moment, it is undone and done again.
    ///
    /// # Errors
    /// As [`HugePool::unclaimed`]; `Strange` when it found one again and again.
    pub fn starve<T, E>(
        &mut self,
        mut act: impl FnMut() -> Result<T, E>,
        mut undo: impl FnMut(),
    ) -> Result<E, HookError> {
        for _ in 0..STARVE_TRIES {
            self.take_rest()?;
            match act() {
                Err(error) => return Ok(error),
                Ok(_) => undo(),
            }
        }
        Err(HookError::Strange { call: "hog huge pages", detail: "there was a page every time".into() })
    }
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Pages that are in use still go when their last user does.
        drop(std::fs::write(file("nr_hugepages"), self.before.to_string()));
    }
}

/// A memfd of huge pages, `len` bytes long and empty. Nothing is reserved for it before it is mapped.
///
/// # Errors
/// `Call`: EINVAL where the kernel has none or `len` is not a multiple of 2 MiB.
pub fn huge_memfd(len: u64) -> Result<OwnedFd, HookError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("uhmm-huge", flags)
        .map_err(|error| HookError::failed("memfd_create(MFD_HUGETLB)", error))?;
    rustix::fs::ftruncate(&file, len).map_err(|error| HookError::failed("ftruncate(memfd)", error))?;
    Ok(file)
}

/// The same, of a size that nobody can change. An access can raise SIGBUS all the same, where no huge page is left for it.
///
/// # Errors
/// As [`huge_memfd`].
pub fn sealed_huge_memfd(len: u64) -> Result<OwnedFd, HookError> {
    let file = huge_memfd(len)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|error| HookError::failed("fcntl(F_ADD_SEALS)", error))?;
    Ok(file)
}
