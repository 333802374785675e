//! Whether memory of this process is registered with a userfaultfd. The kernel says so in smaps only, which walks every page table; this
//! asks for one address in about a microsecond, and changes nothing.

use std::os::fd::AsFd;

use super::Userfaultfd;
use crate::abi;
use crate::bytes::Advice;
use crate::error::HookError;
use crate::own_memory;
use crate::range::{AddrRange, PAGE_SIZE};
use crate::sys::errno_of;
use crate::window::Window;

/// Two pages that nobody ever touches, one of them locked. UFFDIO_MOVE of such a hole moves nothing: it ends with ENOENT or EEXIST where the
/// destination is registered, with EINVAL where it is not. It wants source and destination both locked or both not, hence two.
#[derive(Debug)]
pub struct RegistrationProbe {
    plain: Window,
    /// None where this process may lock nothing: locked memory then passes for not registered.
    locked: Option<Window>,
}

impl RegistrationProbe {
    /// Makes the pages. Children do not inherit them.
    ///
    /// # Errors
    /// `Call` (ENOMEM).
    pub fn new() -> Result<Self, HookError> {
        let hole = |locked: bool| {
            let page = Window::anonymous(PAGE_SIZE)?;
            page.advise(0, PAGE_SIZE, Advice::DontFork)?;
            // After mlockall(MCL_FUTURE) new memory is locked and there.
            own_memory::lock(page.range(), false)?;
            page.advise(0, PAGE_SIZE, Advice::DontNeed)?;
            if locked {
                own_memory::lock(page.range(), true)?;
            }
            Ok::<_, HookError>(page)
        };
        Ok(Self { plain: hole(false)?, locked: hole(true).ok() })
    }

    /// The pages, which must never be registered or touched.
    pub fn ranges(&self) -> impl Iterator<Item = AddrRange> {
        [Some(&self.plain), self.locked.as_ref()].into_iter().flatten().map(|page| page.range())
    }

    /// Whether the readable and writable private memory of this process at `addr` is registered with `uffd`; `None` while an event of the
    /// userfaultfd is unread. Memory of other rights passes for not registered.
    ///
    /// # Errors
    /// `Call` on a kernel without UFFDIO_MOVE (before 6.8).
    pub fn ask(&self, uffd: &Userfaultfd, addr: u64) -> Result<Option<bool>, HookError> {
        let dst = addr / PAGE_SIZE * PAGE_SIZE;
        for hole in self.ranges() {
            let mut request = abi::UffdioMove { dst, src: hole.start, len: PAGE_SIZE, mode: 0, moved: 0 };
            // SAFETY: the source is a page of ours that is not there, and holes are not moved (mode 0): no byte of any page changes.
            let Err(error) = (unsafe { abi::UFFDIO_MOVE.call(uffd.fd.as_fd(), &mut request) }) else {
                return Err(HookError::Strange { call: "UFFDIO_MOVE(hole)", detail: "a hole was moved".into() });
            };
            match errno_of(&error) {
                libc::ENOENT if !is_mapped(dst)? => return Ok(Some(false)),
                libc::ENOENT | libc::EEXIST => return Ok(Some(true)),
                libc::EAGAIN | libc::EBUSY => return Ok(None),
                // Of another kind, or locked otherwise.
                libc::EINVAL => {}
                _ => return Err(HookError::on("UFFDIO_MOVE(hole)", hole, error, "uhmm needs Linux 6.8")),
            }
        }
        Ok(Some(false))
    }
}

/// ENOENT is also what a hole in the address space gives.
fn is_mapped(addr: u64) -> Result<bool, HookError> {
    Ok(!own_memory::mappings(AddrRange { start: addr, len: PAGE_SIZE })?.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uffd::{Features, RegisterMode};

    #[test]
    fn what_is_registered_is_told_from_what_is_not_and_nothing_moves() {
        let (uffd, _) = Userfaultfd::create(None).unwrap();
        uffd.api(Features::MOVE).unwrap();
        let probe = RegistrationProbe::new().unwrap();
        let window = Window::anonymous(8 * PAGE_SIZE).unwrap();
        window.store_u8(0, 7).unwrap();
        let at = |page: u64| probe.ask(&uffd, window.addr() + page * PAGE_SIZE).unwrap();
        assert_eq!((at(0), at(1)), (Some(false), Some(false)));
        uffd.register(window.range().sub_pages(0, 4).unwrap(), RegisterMode::MISSING | RegisterMode::WP).unwrap();
        assert_eq!([at(0), at(1), at(3), at(4)], [Some(true), Some(true), Some(true), Some(false)]);
        own_memory::lock(window.range().sub_pages(2, 4).unwrap(), true).unwrap();
        assert_eq!([at(2), at(3), at(4), at(5)], [Some(true), Some(true), Some(false), Some(false)], "locked");
        assert_eq!(probe.ask(&uffd, PAGE_SIZE).unwrap(), Some(false), "nothing is mapped there");
        assert_eq!((window.load_u8(0).unwrap(), at(1)), (7, Some(true)));
        uffd.unregister(window.range()).unwrap();
        assert_eq!((at(0), at(1)), (Some(false), Some(false)));
        assert_eq!(window.load_u8(5000).unwrap(), 0, "a hole is still a hole");
    }
}
