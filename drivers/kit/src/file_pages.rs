//! Pages of a file that devices use in place by reading and writing it. Linux keeps a shared mapping and the file's reads and writes
//! coherent, so the client sees what a device writes at once. Mapping it here would let the client end the driver with SIGBUS, by
//! truncating the file.

use uhmm_ipc::message::Fd;

use crate::device::PAGE_BYTES;

/// A file and where the region begins in it.
#[derive(Clone, Debug)]
pub struct FilePages {
    file: Fd,
    offset_bytes: u64,
}

impl FilePages {
    /// Of a region that begins at this offset.
    pub fn new(file: Fd, offset_bytes: u64) -> Self {
        Self { file, offset_bytes }
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
    /// Those of pwrite; `UnexpectedEof` for a page behind the end of the file.
    pub fn write(&self, offset: u64, mut from: &[u8]) -> std::io::Result<()> {
        let mut at = self.offset_bytes + offset;
        let end = self.len_bytes()?;
        if at + from.len() as u64 > end.next_multiple_of(PAGE_BYTES) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        // What a mapping keeps behind the end of the file in its last page goes nowhere.
        from = &from[..from.len().min(end.saturating_sub(at) as usize)];
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

    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uhmm_kernel_hook::memfd;

    use super::*;

    #[test]
    fn bytes_go_to_the_right_place_and_the_end_reads_as_zero() {
        let file = Arc::new(memfd::create_sealed("uhmm-file-pages", 8192).unwrap());
        let pages = FilePages::new(file.clone(), 4096);
        pages.write(10, &[7; 20]).unwrap();
        let mut bytes = [1; 24];
        FilePages::new(file, 0).read(4096 + 8, &mut bytes).unwrap();
        assert_eq!((&bytes[..2], bytes[2], bytes[21], bytes[22]), (&[0, 0][..], 7, 7, 0));
        assert!(pages.read(4090, &mut bytes).is_err() && pages.write(4096, &bytes).is_err(), "behind the end");
        pages.write(4096 - 24, &bytes).unwrap();
    }
}
