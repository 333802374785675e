//! Clients' buffers that stay mapped: a client uses the same few again and again, and mapping one costs more than filling it.
//!
//! What is kept is a sealed memory file, known by its inode, which cannot be another one's while it is mapped here.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::os::fd::AsFd;
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{Advice, HookError, Prot, Window, memfd};

/// Of one client.
const KEPT: usize = 8;
/// Longer buffers are for one access; those of the SDK are as long.
const LONGEST_BYTES: u64 = 2 << 20;

#[derive(Debug)]
struct Kept {
    file: (u64, u64),
    window: Arc<Window>,
}

/// See the module head.
#[derive(Debug)]
pub(crate) struct Buffers<Conn> {
    of: HashMap<Conn, VecDeque<Kept>>,
}

impl<Conn> Default for Buffers<Conn> {
    fn default() -> Self {
        Self { of: HashMap::new() }
    }
}

impl<Conn: Copy + Eq + Hash> Buffers<Conn> {
    /// The buffer's first `len_bytes` bytes, at least, as a mapping that no access to can fail.
    pub(crate) fn map(&mut self, conn: Conn, buffer: &Fd, len_bytes: u64) -> Result<Arc<Window>, HookError> {
        let file = memfd::identity(buffer.as_fd())?;
        let kept = self.of.entry(conn).or_default();
        if let Some(known) = kept.iter().find(|known| known.file == file && known.window.len() >= len_bytes) {
            return Ok(known.window.clone());
        }
        let file_bytes = memfd::len(buffer.as_fd())?;
        memfd::check_sealed(buffer.as_fd(), file_bytes)?;
        if file_bytes < len_bytes {
            return Err(HookError::WrongSize { expected: len_bytes, found: file_bytes });
        }
        let stays = file_bytes <= LONGEST_BYTES;
        let mapped_bytes = if stays { file_bytes } else { len_bytes };
        let window = Arc::new(Window::map(buffer.as_fd(), 0, mapped_bytes, Prot::ReadWrite)?);
        if stays {
            // One call instead of a fault a page.
            window.advise(0, len_bytes, Advice::PopulateWrite)?;
            kept.truncate(KEPT - 1);
            kept.push_front(Kept { file, window: window.clone() });
        }
        Ok(window)
    }

    pub(crate) fn forget(&mut self, conn: Conn) {
        self.of.remove(&conn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(len: u64) -> Fd {
        Arc::new(memfd::create_sealed("uhmm-test", len).unwrap())
    }

    #[test]
    fn a_buffer_that_comes_again_is_the_mapping_that_there_is_and_only_its_clients() {
        let mut buffers = Buffers::default();
        let shared = buffer(3 * 4096);
        let first = buffers.map(1, &shared, 4096).unwrap();
        first.store_u64(8192, 7).unwrap();
        let duplicate: Fd = Arc::new(shared.try_clone().unwrap());
        assert!(Arc::ptr_eq(&first, &buffers.map(1, &duplicate, 3 * 4096).unwrap()), "known by its file");
        let others = buffers.map(2, &shared, 3 * 4096).unwrap();
        assert!(!Arc::ptr_eq(&first, &others) && others.load_u64(8192).unwrap() == 7);
        buffers.forget(1);
        assert!(!Arc::ptr_eq(&first, &buffers.map(1, &shared, 4096).unwrap()));
    }

    #[test]
    fn a_client_keeps_a_few_short_ones_mapped() {
        let mut buffers = Buffers::default();
        let all: Vec<Fd> = (0..2 * KEPT).map(|_| buffer(4096)).collect();
        let first = buffers.map(1, &all[0], 4096).unwrap();
        all.iter().for_each(|fd| drop(buffers.map(1, fd, 4096).unwrap()));
        assert_eq!((buffers.of[&1].len(), Arc::strong_count(&first)), (KEPT, 1));
        let long = buffers.map(1, &buffer(LONGEST_BYTES + 4096), 8192).unwrap();
        assert_eq!((long.len(), Arc::strong_count(&long), buffers.of[&1].len()), (8192, 1, KEPT));
    }

    #[test]
    fn a_buffer_that_is_too_short_or_may_shrink_is_refused() {
        let mut buffers = Buffers::default();
        let short = buffer(4096);
        assert!(matches!(buffers.map(1, &short, 8192), Err(HookError::WrongSize { .. })));
        let loose = rustix::fs::memfd_create("uhmm-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&loose, 8192).unwrap();
        assert!(matches!(buffers.map(1, &Arc::new(loose), 8192), Err(HookError::NotSealed { .. })));
        assert!(buffers.of[&1].is_empty());
    }
}
