//! A region's directory: one page of header, then an 8-byte entry a page, then an 8-byte attribute word a page (both as `words.rs` keeps
//! them), then two banks of segments, in a sealed memfd that the vault keeps.
//!
//! ```text
//!  0        8          16      24        32       40        48          56        64         72
//!  | magic  | version  | live  | region  | space  | backing | pages     | offset  | bank     | (zero)
//!  4096     entries; then attributes
//!  then     two banks, each: | count | (segment: id, space, addr, first page, pages) ... |, rounded up to a page
//! ```
//!
//! The pager alone writes it, with atomic stores; the next incarnation reads it back. `live` is stored last when a region
//! is made, so a half-made region is recognised and dropped. What was never written is `Absent` in memory that was made for this, and
//! `System` in memory that was there before: nobody knows which of its pages were touched. Segments (which addresses show which pages) are written to the
//! bank that is not in use, then `bank` is switched: a crash leaves the old list or the new one. A bank has room for every segment
//! that the pages and the kernel's limit of mappings allow; it costs memory only as far as it is used.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::memfd;
use uhmm_kernel_hook::window::{Prot, Window};
use uhmm_kernel_hook::{HookError, PAGE_SIZE};
use uhmm_pager_core::{Attr, Backing, Entry, EntryRun, Pages};

use crate::words::Words;

const MAGIC: u64 = u64::from_le_bytes(*b"uhmm-dir");
const VERSION: u64 = 4;
const HEADER_BYTES: u64 = PAGE_SIZE;

const OFF_MAGIC: u64 = 0;
const OFF_VERSION: u64 = 8;
const OFF_LIVE: u64 = 16;
const OFF_REGION: u64 = 24;
const OFF_SPACE: u64 = 32;
const OFF_BACKING: u64 = 40;
const OFF_PAGES: u64 = 48;
const OFF_OFFSET: u64 = 56;
const OFF_BANK: u64 = 64;

const SEGMENT_BYTES: u64 = 40;
/// In a segment's page count.
const RETIRED: u64 = 1 << 63;
/// Room for the segments of small regions that many forked children show.
const SEGMENTS_MIN: u64 = 512;
/// As many mappings as a process can have (vm.max_map_count is 65530 by default).
const SEGMENTS_CAP: u64 = 1 << 16;

/// Why a directory of the vault cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The memory could not be made or mapped.
    #[error("Directory memory could not be mapped")]
    Hook(#[from] HookError),
    /// Not ours, or of another layout.
    #[error(
        "Directory has magic {magic:#x} version {version}, this pager reads {MAGIC:#x} version {VERSION}: stop the older uhmm first"
    )]
    Format {
        /// Found.
        magic: u64,
        /// Found.
        version: u64,
    },
    /// The pager died while it made the region.
    #[error("Directory of region {region} was never completed")]
    NotLive {
        /// Region.
        region: u64,
    },
    /// The page count does not fit the file.
    #[error("Directory names {page_count} pages but its file has {len_bytes} bytes")]
    Size {
        /// Pages by the header.
        page_count: u64,
        /// File size.
        len_bytes: u64,
    },
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Region id.
    pub region: u64,
    /// Space id.
    pub space: u64,
    /// What the system pages are.
    pub backing: Backing,
    /// Pages.
    pub page_count: u64,
    /// Offset of the first page in the file behind it, in bytes.
    pub offset_bytes: u64,
}

/// Which addresses show which pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRecord {
    /// Segment id.
    pub id: u64,
    /// Whose addresses.
    pub space: u64,
    /// First address.
    pub addr: u64,
    /// First page of the region.
    pub first_page: u64,
    /// Pages.
    pub page_count: u64,
    /// It shows nothing any more, but devices may not have dropped it yet.
    pub retired: bool,
}

fn backing_code(backing: Backing) -> u64 {
    match backing {
        Backing::Shared => 0,
        Backing::Private => 1,
        Backing::File => 2,
    }
}

fn backing_of(code: u64) -> Option<Backing> {
    [Backing::Shared, Backing::Private, Backing::File].into_iter().find(|backing| backing_code(*backing) == code)
}

/// See the module head.
#[derive(Debug)]
pub struct DirectoryFile {
    fd: Fd,
    window: Window,
    page_count: u64,
    entries: Words,
    attrs: Words,
}

/// Segments that a region's directory can list.
pub fn segments_max(page_count: u64) -> usize {
    page_count.clamp(SEGMENTS_MIN, SEGMENTS_CAP) as usize
}

fn bank_bytes(page_count: u64) -> u64 {
    (8 + segments_max(page_count) as u64 * SEGMENT_BYTES).next_multiple_of(PAGE_SIZE)
}

fn file_bytes(page_count: u64) -> u64 {
    HEADER_BYTES + 2 * Words::bytes(page_count) + 2 * bank_bytes(page_count)
}

impl DirectoryFile {
    /// A new directory, nothing written, not yet live.
    pub fn create(header: Header) -> Result<Self, DirectoryError> {
        let fd: OwnedFd = memfd::create_sealed("uhmm-directory", file_bytes(header.page_count))?;
        let window = Window::map(fd.as_fd(), 0, file_bytes(header.page_count), Prot::ReadWrite)?;
        window.store_u64(OFF_MAGIC, MAGIC)?;
        window.store_u64(OFF_VERSION, VERSION)?;
        window.store_u64(OFF_REGION, header.region)?;
        window.store_u64(OFF_SPACE, header.space)?;
        window.store_u64(OFF_BACKING, backing_code(header.backing))?;
        window.store_u64(OFF_PAGES, header.page_count)?;
        window.store_u64(OFF_OFFSET, header.offset_bytes)?;
        Ok(Self::over(Arc::new(fd), window, header.page_count, header.backing, true))
    }

    /// A directory out of the vault.
    pub fn adopt(fd: Fd) -> Result<(Self, Header), DirectoryError> {
        let len_bytes = memfd::len(fd.as_fd())?;
        let window = Window::map(fd.as_fd(), 0, len_bytes, Prot::ReadWrite)?;
        let (magic, version) = (window.load_u64(OFF_MAGIC)?, window.load_u64(OFF_VERSION)?);
        if magic != MAGIC || version != VERSION {
            return Err(DirectoryError::Format { magic, version });
        }
        let region = window.load_u64(OFF_REGION)?;
        let header = Header {
            region,
            space: window.load_u64(OFF_SPACE)?,
            backing: backing_of(window.load_u64(OFF_BACKING)?).ok_or(DirectoryError::NotLive { region })?,
            page_count: window.load_u64(OFF_PAGES)?,
            offset_bytes: window.load_u64(OFF_OFFSET)?,
        };
        if window.load_u64(OFF_LIVE)? != 1 {
            return Err(DirectoryError::NotLive { region: header.region });
        }
        if header.page_count > len_bytes / 8 || file_bytes(header.page_count) != len_bytes {
            return Err(DirectoryError::Size { page_count: header.page_count, len_bytes });
        }
        Ok((Self::over(fd, window, header.page_count, header.backing, false), header))
    }

    fn over(fd: Fd, window: Window, page_count: u64, backing: Backing, fresh: bool) -> Self {
        let untouched = if backing == Backing::Shared { Entry::ABSENT } else { Entry::SYSTEM };
        let entries = Words::at(HEADER_BYTES, page_count, untouched.bits(), fresh);
        let attrs = Words::at(HEADER_BYTES + Words::bytes(page_count), page_count, Attr::default().0, fresh);
        Self { fd, window, page_count, entries, attrs }
    }

    /// The memfd, for the vault.
    pub fn fd(&self) -> Fd {
        self.fd.clone()
    }

    /// The region is complete: from here on recovery keeps it.
    pub fn set_live(&self) -> Result<(), HookError> {
        self.window.store_u64(OFF_LIVE, 1)
    }

    /// The region is gone: nobody adopts it who finds it in a vault that did not hear of that any more.
    pub fn set_gone(&self) -> Result<(), HookError> {
        self.window.store_u64(OFF_LIVE, 0)
    }

    /// The region belongs to another space now (the one that made it is gone).
    pub fn set_space(&self, space: u64) -> Result<(), HookError> {
        self.window.store_u64(OFF_SPACE, space)
    }

    fn bank_offset(&self, bank: u64) -> u64 {
        HEADER_BYTES + 2 * Words::bytes(self.page_count) + bank * bank_bytes(self.page_count)
    }

    /// Replaces the list of segments; more than [`segments_max`] are not kept.
    pub fn set_segments(&self, segments: &[SegmentRecord]) -> Result<(), HookError> {
        let bank = 1 - self.window.load_u64(OFF_BANK)?.min(1);
        let base = self.bank_offset(bank);
        let kept = &segments[..segments.len().min(segments_max(self.page_count))];
        let words = |segment: &SegmentRecord| {
            let SegmentRecord { id, space, addr, first_page, page_count, retired } = *segment;
            [id, space, addr, first_page, page_count | if retired { RETIRED } else { 0 }]
        };
        let bytes: Vec<u8> = kept.iter().flat_map(words).flat_map(u64::to_ne_bytes).collect();
        self.window.write(base + 8, &bytes)?;
        self.window.store_u64(base, kept.len() as u64)?;
        self.window.store_u64(OFF_BANK, bank)
    }

    /// The list of segments.
    pub fn segments(&self) -> Result<Vec<SegmentRecord>, HookError> {
        let base = self.bank_offset(self.window.load_u64(OFF_BANK)?.min(1));
        let count = self.window.load_u64(base)?.min(segments_max(self.page_count) as u64);
        let word = |at: u64, word: u64| self.window.load_u64(at + word * 8);
        (0..count)
            .map(|index| base + 8 + index * SEGMENT_BYTES)
            .map(|at| {
                Ok(SegmentRecord {
                    id: word(at, 0)?,
                    space: word(at, 1)?,
                    addr: word(at, 2)?,
                    first_page: word(at, 3)?,
                    page_count: word(at, 4)? & !RETIRED,
                    retired: word(at, 4)? & RETIRED != 0,
                })
            })
            .collect()
    }

    /// What was advised for a page; a page outside the region has the defaults.
    pub fn attr(&self, page: u64) -> Attr {
        Attr(self.attrs.load(&self.window, page))
    }

    /// How many pages from this one on are known to have the same advice: at least one.
    pub fn attrs_alike(&self, page: u64) -> u64 {
        self.attrs.alike(&self.window, page)
    }

    /// Changes what is advised for some pages.
    pub fn change_attrs(&self, pages: Pages, change: impl Fn(Attr) -> Attr) -> Result<(), HookError> {
        self.attrs.update(&self.window, pages.first, pages.count, |word| change(Attr(word)).0)
    }

    /// The advice of another directory of as many pages; this one has none yet.
    pub fn inherit_attrs(&self, from: &Self) -> Result<(), HookError> {
        let mut page = 0;
        while page < self.page_count {
            let (count, attr) = (from.attrs_alike(page), from.attr(page));
            self.change_attrs(Pages { first: page, count }, |_| attr)?;
            page += count;
        }
        Ok(())
    }

    /// One entry; a page outside the region reads as `Absent`.
    pub fn load(&self, page: u64) -> u64 {
        if page < self.page_count { self.entries.load(&self.window, page) } else { 0 }
    }

    /// How many pages from this one on are known to have the same entry: at least one. If more, they name no frame.
    pub fn alike(&self, page: u64) -> u64 {
        self.entries.alike(&self.window, page)
    }

    /// Both at once: how many are known to have the same entry, and which.
    pub fn look(&self, page: u64) -> (u64, u64) {
        if page < self.page_count { self.entries.look(&self.window, page) } else { (1, 0) }
    }

    /// Whether any of some pages has such an entry; a damaged one counts as none.
    pub fn any(&self, pages: Pages, is: impl Fn(Entry) -> bool) -> bool {
        let mut page = pages.first;
        while page < pages.end() && !Entry::decode(self.load(page)).is_ok_and(&is) {
            page += self.alike(page);
        }
        page < pages.end()
    }

    /// Publishes entries.
    pub fn publish(&self, first: u64, entries: EntryRun) -> Result<(), HookError> {
        match entries {
            // Follows anything in the same way, see `Entry::followed_by`.
            EntryRun::Same { entry, count } if !entry.is_moving() && !entry.owns_frame() => {
                self.entries.fill(&self.window, first, count, entry.bits())
            }
            // One by one: words of many pages are settled ones.
            entries => entries.iter().zip(first..).try_for_each(|(entry, page)| {
                let before = Entry::decode(self.load(page)).unwrap_or(entry);
                self.entries.store(&self.window, page, before.followed_by(entry).bits())
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use uhmm_pager_core::{DeviceId, PageState};

    use super::*;

    fn made() -> DirectoryFile {
        let header = Header { region: 3, space: 4, backing: Backing::Private, page_count: 600, offset_bytes: 0 };
        DirectoryFile::create(header).unwrap()
    }

    fn put(directory: &DirectoryFile, page: u64, entry: Entry) {
        directory.publish(page, EntryRun::Same { entry, count: 1 }).unwrap();
    }

    fn advise(directory: &DirectoryFile, page: u64) {
        directory.change_attrs(Pages::one(page), |attr| attr.with_read_mostly(true)).unwrap();
    }

    #[test]
    fn what_was_given_up_is_followed_page_by_page() {
        let made = made();
        let moving = Entry::SYSTEM.with_state(PageState::MovingOut);
        made.publish(0, EntryRun::Same { entry: moving, count: 512 }).unwrap();
        put(&made, 7, moving.with_discarded(true));
        let arrived = Entry::on_device(DeviceId(0), 100);
        made.publish(0, EntryRun::Frames { entry_of_first: arrived, count: 512 }).unwrap();
        let discarded = |page| Entry::decode(made.load(page)).unwrap().discarded();
        assert_eq!((0..600).filter(|page| discarded(*page)).collect::<Vec<_>>(), [7]);
        assert!((0..512).all(|page| made.alike(page) == 1), "what names frames is never taken together");
        made.publish(0, EntryRun::Same { entry: Entry::SYSTEM, count: 600 }).unwrap();
        assert_eq!((made.alike(0), made.load(7)), (600, Entry::SYSTEM.bits()));
    }

    fn segment(id: u64) -> SegmentRecord {
        SegmentRecord { id, space: 4, addr: id << 21, first_page: id, page_count: 7, retired: id % 2 == 1 }
    }

    #[test]
    fn a_directory_is_read_back_as_it_was_written() {
        let made = made();
        put(&made, 599, Entry::on_device(DeviceId(1), 7));
        advise(&made, 599);
        assert!(matches!(DirectoryFile::adopt(made.fd()), Err(DirectoryError::NotLive { region: 3 })));
        made.set_live().unwrap();
        let (read, header) = DirectoryFile::adopt(made.fd()).unwrap();
        assert_eq!((header.backing, header.page_count, header.space), (Backing::Private, 600, 4));
        let words = [598, 599, 600].map(|page| read.load(page));
        assert_eq!(words, [Entry::SYSTEM.bits(), Entry::on_device(DeviceId(1), 7).bits(), 0]);
        assert!(read.attr(599).read_mostly() && read.attr(0) == Attr::default());
        read.set_gone().unwrap();
        assert!(matches!(DirectoryFile::adopt(made.fd()), Err(DirectoryError::NotLive { region: 3 })));
    }

    #[test]
    fn segments_are_replaced_as_a_whole() {
        let made = made();
        assert_eq!(made.segments().unwrap(), []);
        for count in [1, 3, 2, 600, 0] {
            let list: Vec<_> = (0..count).map(segment).collect();
            made.set_segments(&list).unwrap();
            assert_eq!(made.segments().unwrap(), list);
        }
    }

    #[test]
    fn a_region_in_as_many_pieces_as_it_has_pages_is_listed_and_its_entries_stay() {
        let made = made();
        let entry = |page: u64| Entry::on_device(DeviceId(0), page as u32);
        (0..600).for_each(|page| put(&made, page, entry(page)));
        advise(&made, 599);
        let list: Vec<_> = (0..segments_max(600) as u64).map(segment).collect();
        assert!(list.len() >= 600);
        made.set_segments(&list).unwrap();
        made.set_segments(&list).unwrap();
        made.set_live().unwrap();
        let (read, _) = DirectoryFile::adopt(made.fd()).unwrap();
        assert_eq!(read.segments().unwrap(), list);
        assert!((0..600).all(|page| read.load(page) == entry(page).bits()) && read.attr(599).read_mostly());
    }
}
