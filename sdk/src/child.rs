//! What a forked child needs to find itself.

use std::sync::Arc;

use uhmm_kernel_hook::{AddrRange, Advice, PAGE_SIZE, Window};

use crate::Error;

const TOKEN_BYTES: usize = 16;

/// One page of private memory that this process never touches. It is registered with the userfaultfd; a forked child that reads
/// its copy is answered by the pager with who it is.
#[derive(Clone, Debug)]
pub(crate) struct Sentinel {
    page: Arc<Window>,
}

impl Sentinel {
    pub(crate) fn new() -> Result<Self, Error> {
        let page = Window::anonymous(PAGE_SIZE).map_err(Error::kernel("Making the sentinel page"))?;
        Ok(Self { page: Arc::new(page) })
    }

    pub(crate) fn range(&self) -> AddrRange {
        self.page.range()
    }

    /// Space and token of this process. The page is empty again afterwards, so that children of this process find theirs.
    pub(crate) fn identity(&self) -> Result<(u64, Vec<u8>), Error> {
        let failed = Error::kernel("Reading the sentinel page");
        let mut bytes = [0; 8 + TOKEN_BYTES];
        let read = self.page.read(0, &mut bytes).and_then(|()| self.page.advise(0, PAGE_SIZE, Advice::DontNeed));
        read.map_err(failed)?;
        let (space, token) = bytes.split_at(8);
        let space = space.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Ok((space, token.to_vec()))
    }
}
