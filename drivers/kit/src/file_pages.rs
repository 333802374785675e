//! Pages of a file that devices use in place by reading and writing it. Linux keeps a shared mapping and the file's reads and writes
//! coherent, so the client sees what a device writes at once. Mapping it here would let the client end the driver with SIGBUS, by
//! truncating the file. Files of huge pages (hugetlbfs) cannot be written: the kernel writes to a mapping of theirs for us ([`HugeFile`]).

use std::io::{Error, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::HookError;
use uhmm_kernel_hook::huge_file::HugeFile;

use crate::device::PAGE_BYTES;

/// A file and where the region begins in it.
#[derive(Clone, Debug)]
pub struct FilePages {
    file: Fd,
    offset_bytes: u64,
    /// Of huge pages, and open for writing.
    huge: Option<Arc<HugeFile>>,
}

impl FilePages {
    /// Of a region of this length that begins at this offset.
    ///
    /// # Errors
    /// The descriptor is of no file; a file of huge pages cannot be mapped (ENOMEM: too many mappings).
    pub fn new(file: Fd, offset_bytes: u64, len_bytes: u64) -> Result<Self, HookError> {
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| HookError::Call {
            call: "fcntl(F_GETFL)",
            range: None,
            source: error.into(),
            hint: "",
        })?;
        let writable = flags & OFlags::RWMODE == OFlags::RDWR;
        let huge = if writable { HugeFile::open(file.as_fd(), offset_bytes, len_bytes)? } else { None };
        Ok(Self { file, offset_bytes, huge: huge.map(Arc::new) })
    }

    /// Reads bytes at an offset of the region. The rest of the file's last page reads as zero, as in a mapping.
    ///
    /// # Errors
    /// Those of pread; `UnexpectedEof` for a page behind the end of the file, where a mapping would raise SIGBUS.
    pub fn read(&self, offset: u64, mut into: &mut [u8]) -> std::io::Result<()> {
        let mut at = self.offset_bytes + offset;
        while !into.is_empty() {
            let count = rustix::io::retry_on_intr(|| rustix::io::pread(&self.file, &mut *into, at))?;
            if count == 0 {
                let last_page_end = self.len_bytes()?.next_multiple_of(PAGE_BYTES);
                if at >= last_page_end {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                let rest = (last_page_end - at).min(into.len() as u64) as usize;
                into[..rest].fill(0);
                at += rest as u64;
                into = &mut into[rest..];
                continue;
            }
            at += count as u64;
            into = &mut into[count..];
        }
        Ok(())
    }

    /// Writes bytes at an offset of the region; never lengthens the file, as a mapping does not.
    ///
    /// # Errors
    /// Those of pwrite; `UnexpectedEof` for a page behind the end of the file; `StorageFull` for a hole that no huge page is left for.
    pub fn write(&self, offset: u64, mut from: &[u8]) -> std::io::Result<()> {
        let mut at = self.offset_bytes + offset;
        let end = self.len_bytes()?;
        if at + from.len() as u64 > end.next_multiple_of(PAGE_BYTES) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        // What a mapping keeps behind the end of the file in its last page goes nowhere.
        from = &from[..from.len().min(end.saturating_sub(at) as usize)];
        if let Some(huge) = &self.huge {
            return huge.write(offset, from).map_err(|error| self.refused(at + from.len() as u64, &error));
        }
        while !from.is_empty() {
            let count = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.file, from, at))?;
            if count == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            at += count as u64;
            from = &from[count..];
        }
        Ok(())
    }

    /// Why the kernel did not write up to here: somebody has cut the file meanwhile, or there is no page for it.
    fn refused(&self, end: u64, error: &HookError) -> Error {
        match (self.len_bytes(), error) {
            (Ok(len), _) if len < end => ErrorKind::UnexpectedEof.into(),
            (Ok(_), HookError::Call { source, .. }) if is_no_page(source) => {
                Error::new(ErrorKind::StorageFull, "no huge page is left: raise vm.nr_hugepages")
            }
            (Ok(_), HookError::Call { source, .. }) => Error::new(source.kind(), error.to_string()),
            _ => Error::other(error.to_string()),
        }
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }
}

/// EFAULT; ENOMEM when the kernel has none for itself.
fn is_no_page(source: &Error) -> bool {
    [rustix::io::Errno::FAULT, rustix::io::Errno::NOMEM]
        .iter()
        .any(|no| source.raw_os_error() == Some(no.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use uhmm_kernel_hook::huge_pool::{HUGE_BYTES, HugePool, huge_memfd};
    use uhmm_kernel_hook::memfd;
    use uhmm_kernel_hook::program::ProgramMemory;

    use super::*;

    #[test]
    fn bytes_go_to_the_right_place_and_the_end_reads_as_zero() {
        let file = Arc::new(memfd::create_sealed("uhmm-file-pages", 8192).unwrap());
        let pages = FilePages::new(file.clone(), 4096, 4096).unwrap();
        pages.write(10, &[7; 20]).unwrap();
        let mut bytes = [1; 24];
        FilePages::new(file, 0, 8192).unwrap().read(4096 + 8, &mut bytes).unwrap();
        assert_eq!((&bytes[..2], bytes[2], bytes[21], bytes[22]), (&[0, 0][..], 7, 7, 0));
        assert!(pages.read(4090, &mut bytes).is_err() && pages.write(4096, &bytes).is_err(), "behind the end");
        pages.write(4096 - 24, &bytes).unwrap();
    }

    #[test]
    fn integration_huge_pages_are_written_where_there_are_some_and_read_as_zero_elsewhere() {
        let pool = match HugePool::reserve(3) {
            Ok(pool) => pool,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let file: Fd = Arc::new(huge_memfd(3 * HUGE_BYTES).unwrap());
        let begin = HUGE_BYTES - 4 * PAGE_BYTES;
        let pages = FilePages::new(file.clone(), begin, HUGE_BYTES + 4 * PAGE_BYTES).unwrap();
        let (mut back, bytes) = (vec![1; 5000], vec![7; 5000]);
        pages.read(3 * PAGE_BYTES, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == 0), "a hole reads as zero");
        assert_eq!(memfd::populated_bytes(file.as_fd()).unwrap(), 0, "and stays one");
        pages.write(3 * PAGE_BYTES, &bytes).unwrap();
        pages.read(3 * PAGE_BYTES, &mut back).unwrap();
        assert_eq!(back, bytes);
        let seen = ProgramMemory::file_shared(file.as_fd(), 0, 3 * HUGE_BYTES, true).unwrap();
        seen.read(begin + 3 * PAGE_BYTES, &mut back).unwrap();
        assert_eq!(back, bytes, "the program sees it");
        // The mapping was promised a page for each part of the file, and keeps those that are there.
        drop(seen);
        let punch = || memfd::punch_hole(file.as_fd(), HUGE_BYTES, HUGE_BYTES).unwrap();
        punch();
        let mut hog = pool.hog().unwrap();
        let error = hog.starve(|| pages.write(4 * PAGE_BYTES, &[1; 8]), punch).unwrap();
        assert!(error.kind() == ErrorKind::StorageFull && error.to_string().contains("nr_hugepages"), "{error}");
        drop(hog);
        pages.write(4 * PAGE_BYTES, &[1; 8]).unwrap();
        memfd::to_file(file.as_fd()).unwrap().set_len(HUGE_BYTES).unwrap();
        let cut =
            pages.refused(HUGE_BYTES + 8, &pages.huge.as_ref().unwrap().write(4 * PAGE_BYTES, &[1; 8]).unwrap_err());
        assert_eq!(cut.kind(), ErrorKind::UnexpectedEof, "cut while it is written");
        assert_eq!(pages.write(4 * PAGE_BYTES, &[1; 8]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(pages.read(4 * PAGE_BYTES, &mut back).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(memfd::len(file.as_fd()).unwrap(), HUGE_BYTES, "the file did not get longer");
    }

    #[test]
    fn integration_huge_pages_that_were_opened_for_reading_are_only_read() {
        let _pool = match HugePool::reserve(1) {
            Ok(pool) => pool,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let file: Fd = Arc::new(huge_memfd(HUGE_BYTES).unwrap());
        let pages = FilePages::new(file.clone(), 0, HUGE_BYTES).unwrap();
        pages.write(8, &[9; 8]).unwrap();
        let read_only = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let read_only = FilePages::new(Arc::new(read_only.into()), 0, HUGE_BYTES).unwrap();
        let mut back = [0; 8];
        read_only.read(8, &mut back).unwrap();
        assert_eq!(back, [9; 8]);
        assert!(read_only.write(8, &[1; 8]).is_err());
    }
}
