//! What only /proc/PID/smaps says of mappings: their flags. It walks every page table on the way, which costs about what a fork costs, so it
//! is read for what can be learnt nowhere else.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::error::HookError;
use crate::memfd;
use crate::range::AddrRange;

const CHUNK_BYTES: usize = 64 << 10;

/// Opens this process's own smaps. See [`open_own_maps`](crate::procmap::open_own_maps) for the path.
///
/// # Errors
/// `Call`: ENOENT without /proc.
pub fn open_own_smaps() -> Result<OwnedFd, HookError> {
    let file = File::open("/proc/thread-self/smaps")
        .map_err(|error| HookError::hinted("open(/proc/thread-self/smaps)", error, "Mount /proc"))?;
    Ok(file.into())
}

/// Mappings that a forked child finds empty (MADV_WIPEONFORK).
pub const WIPED_ON_FORK: &str = "wf";
/// Mappings whose pages KSM may merge (MADV_MERGEABLE, PR_SET_MEMORY_MERGE).
pub const MERGEABLE: &str = "mg";

/// Mappings with a flag, in order; the names are the kernel's (`VmFlags`).
///
/// # Errors
/// `Call`: ESRCH when the process is gone.
pub fn with_flag(smaps: BorrowedFd<'_>, flag: &str) -> Result<Vec<AddrRange>, HookError> {
    let file = memfd::to_file(smaps)?;
    let mut parser = Parser::of(flag);
    let mut chunk = vec![0u8; CHUNK_BYTES];
    let mut offset = 0;
    loop {
        let count = file.read_at(&mut chunk, offset).map_err(|error| HookError::failed("read(smaps)", error))?;
        if count == 0 {
            return Ok(parser.found);
        }
        offset += count as u64;
        parser.read(&chunk[..count]);
    }
}

/// Goes through the text line by line; a line may come in several parts.
#[derive(Default)]
struct Parser {
    flag: String,
    line: Vec<u8>,
    mapping: Option<AddrRange>,
    found: Vec<AddrRange>,
}

impl Parser {
    fn of(flag: &str) -> Self {
        Self { flag: flag.to_owned(), ..Self::default() }
    }

    fn read(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.line_read(&String::from_utf8_lossy(&line));
            }
        }
    }

    fn line_read(&mut self, line: &str) {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { return };
        if first == "VmFlags:" {
            let found = self.mapping.filter(|_| words.any(|flag| flag == self.flag));
            self.found.extend(found);
        } else if let Some(range) = range_of(first) {
            self.mapping = Some(range);
        }
    }
}

/// `start-end`, in hexadecimal.
fn range_of(word: &str) -> Option<AddrRange> {
    let (start, end) = word.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    Some(AddrRange { start, len: end.checked_sub(start)? })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::window::Window;

    #[test]
    fn lines_in_parts_are_put_together() {
        let text =
            "1000-3000 rw-p 0 00:00 0\nSize: 8 kB\nVmFlags: rd wr wf\n3000-4000 rw-p 0 00:00 0 /a b-c\nVmFlags: rd\n";
        for size in [1, 7, 1000] {
            let mut parser = Parser::of(WIPED_ON_FORK);
            text.as_bytes().chunks(size).for_each(|part| parser.read(part));
            assert_eq!(parser.found, [AddrRange { start: 0x1000, len: 0x2000 }]);
        }
    }

    #[test]
    fn the_kernel_says_what_a_child_finds_empty() {
        const MADV_WIPEONFORK: libc::c_int = 18;
        let window = Window::anonymous(3 * 4096).unwrap();
        let middle = window.range().sub_pages(1, 1).unwrap();
        let place = std::ptr::with_exposed_provenance_mut(middle.start as usize);
        // SAFETY: a page of a mapping of our own; the flag concerns children only.
        assert_eq!(unsafe { libc::madvise(place, 4096, MADV_WIPEONFORK) }, 0);
        let smaps = open_own_smaps().unwrap();
        for _ in 0..2 {
            let found = with_flag(smaps.as_fd(), WIPED_ON_FORK).unwrap();
            assert!(found.contains(&middle), "{found:x?}");
        }
    }
}
