//! Memory that exists already: adopting it, and everything that is said about ranges of it.

use uhmm_ipc::message::pager::{
    AttributeRun, Attributes, FaultPoint, HotRange, Residency, ResidencyRun, Target, TraceRecord,
};
use uhmm_ipc::message::{Call, ErrorCode, Reply, pager};
use uhmm_kernel_hook::own_memory::{self, RangeAdvice};
use uhmm_kernel_hook::pagemap::{self, Categories};
use uhmm_kernel_hook::procmap::Vma;
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE};

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::device::Device;
use crate::frames::rights_stay;
use crate::links::{Loop, Peer};
use crate::range::{PAGE_BYTES, check_range};
use crate::refused::{Facts, asks_kernel, check_kinds};
use crate::{Error, Session};

/// What adopting has made of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptedKind {
    /// Private anonymous memory: devices use it by moving it.
    Private,
    /// A shared mapping of a file, or shared anonymous memory, of huge pages too: devices use it in place, it never moves.
    Shared,
}

/// A range under management.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Number at the pager.
    pub region: u64,
    /// What it is.
    pub kind: AdoptedKind,
}

/// One value for all pages of a range, or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uniform<T> {
    /// All pages agree.
    Same(T),
    /// They do not.
    Mixed,
}

impl<T: Copy + PartialEq> Uniform<T> {
    fn of(runs: &[AttributeRun], value: impl Fn(&Attributes) -> T) -> Self {
        let mut values = runs.iter().map(|run| value(&run.attributes));
        match values.next() {
            Some(first) if values.all(|other| other == first) => Self::Same(first),
            _ => Self::Mixed,
        }
    }
}

/// What was advised for a range, and where it was prefetched to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeAttributes {
    /// See [`Advice::PreferredLocation`](crate::Advice::PreferredLocation).
    pub preferred: Uniform<Option<Target>>,
    /// Target of the last [`Session::prefetch`].
    pub prefetched: Uniform<Option<Target>>,
    /// Bit d: device d maps in place.
    pub in_place_mask: Uniform<u8>,
    /// Bit d: device d may not use the pages.
    pub no_access_mask: Uniform<u8>,
    /// See [`Advice::ReadMostly`](crate::Advice::ReadMostly).
    pub read_mostly: Uniform<bool>,
    /// See [`Advice::DeviceReadOnly`](crate::Advice::DeviceReadOnly).
    pub device_read_only: Uniform<bool>,
    /// See [`Advice::Granularity`](crate::Advice::Granularity).
    pub granularity_log2_pages: Uniform<Option<u8>>,
    /// See [`Session::pin`].
    pub pinned: Uniform<bool>,
}

/// One page as a device would find it, without a fault. The values are those of the kernel's HMM selftests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotPage(u8);

impl SnapshotPage {
    /// Not mapped, or may not be read.
    pub const ERROR: Self = Self(0xff);
    /// Nothing that this device could use now.
    pub const NONE: Self = Self(0);
    /// May be read.
    pub const READ: Self = Self(1);
    /// May be written (and read).
    pub const WRITE: Self = Self(2);
    /// Part of a 2 MiB page with these rights.
    pub const PMD: Self = Self(4);
    /// Reads as zero, and nothing has been written.
    pub const ZERO: Self = Self(0x10);
    /// In this device's memory.
    pub const DEVICE_LOCAL: Self = Self(0x20);
    /// In this device's memory, and the program reaches it there.
    pub const COHERENT_LOCAL: Self = Self(0x40);
    /// In another device's memory, and the program reaches it there.
    pub const COHERENT_REMOTE: Self = Self(0x50);

    /// The raw value.
    pub fn bits(self) -> u8 {
        self.0
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl Session {
    /// Puts memory that exists already under management, in place: nothing is copied, no address changes. Whole pages; round an
    /// allocation inwards, so that what the allocator keeps beside it stays out.
    ///
    /// Private anonymous memory (from any allocator, or mmap) can then move to devices. A shared mapping of a file, and shared
    /// anonymous memory, is used by devices where it is; so is shared memory of huge pages (MAP_HUGETLB, MFD_HUGETLB, hugetlbfs), of which
    /// any part of whole 4 KiB pages can be adopted. Private hugetlb memory cannot.
    ///
    /// # Errors
    /// `Fault` for a hole; `Invalid` for memory of a kind that cannot be managed: private memory of a file or of huge pages, executable or
    /// growing downwards, the kernel's; `Permission` for what must not be: uhmm's own mappings, what the kernel writes when a thread ends,
    /// and with a userfaultfd for user mode only the caller's alternate signal stack and uhmm's own objects. The text says
    /// which part it is and what else to do. After an error nothing is managed that was not before.
    pub fn adopt(&self, addr: u64, len_bytes: u64) -> Result<Adopted, Error> {
        check_range(addr, len_bytes).map_err(round_inwards)?;
        let range = AddrRange { start: addr, len: len_bytes };
        Facts::about(range, self.object_addr(), self.uffd_kind())?.check(range)?;
        let named = own_memory::named_mappings(range).map_err(Error::kernel("Looking at the mappings of a range"))?;
        check_kinds(range, &named, asks_kernel)?;
        let vmas: Vec<Vma> = named.into_iter().map(|(vma, _)| vma).collect();
        match adoptable(range, &vmas)? {
            Some(vma) => self.attach_file(range, vma),
            None => self.adopt_private(range),
        }
    }

    /// Where this session's own state lies in the program's heap.
    fn object_addr(&self) -> u64 {
        Arc::as_ptr(&self.inner).addr() as u64
    }

    fn adopt_private(&self, range: AddrRange) -> Result<Adopted, Error> {
        let call = pager::Call::AdoptRegion { addr: range.start, len_bytes: range.len };
        let region = self.region_made(move |_: &mut Loop| Ok(Call::Pager(call)))?;
        self.inner.note_adopted(range);
        if !self.fork_supported() {
            own_memory::advise(range, RangeAdvice::DontFork)
                .map_err(Error::kernel("Keeping a range out of children"))?;
        }
        Ok(Adopted { region, kind: AdoptedKind::Private })
    }

    fn attach_file(&self, range: AddrRange, vma: &Vma) -> Result<Adopted, Error> {
        let vma = *vma;
        let offset_bytes = vma.offset + (range.start - vma.start);
        let (addr, len_bytes) = (range.start, range.len);
        let attach = move |_: &mut Loop| {
            let file =
                own_memory::open_mapped_file(&vma).map_err(Error::kernel("Opening the file behind a mapping"))?;
            Ok(Call::Pager(pager::Call::AttachFile { addr, len_bytes, file: Arc::new(file), offset_bytes }))
        };
        self.region_made(attach).map(|region| Adopted { region, kind: AdoptedKind::Shared })
    }

    fn region_made(&self, make: impl FnOnce(&mut Loop) -> Result<Call, Error> + Send + 'static) -> Result<u64, Error> {
        self.inner.settle()?;
        let answer = self.inner.links.call_made(Peer::Pager, make, None, |reply| match reply {
            Reply::Pager(pager::Reply::RegionCreated { region }) => Ok(region),
            _ => Err(Error::StrangeReply { question: "AdoptRegion" }),
        });
        answer.wait()
    }

    /// Gives adopted memory back to the kernel alone: its pages come home first. The range may be a part of what was adopted.
    /// [`Session::adopt_all`] leaves it alone from then on, as long as it is mapped.
    ///
    /// # Errors
    /// The pager's own: nothing is managed there, or a device cannot give the pages back.
    pub fn release(&self, addr: u64, len_bytes: u64) -> Result<(), Error> {
        check_range(addr, len_bytes)?;
        self.inner.done("ReleaseRange", pager::Call::ReleaseRange { addr, len_bytes }, None).wait()?;
        let range = AddrRange { start: addr, len: len_bytes };
        self.inner.note_released(range);
        if !self.fork_supported() {
            let_children_have(range)?;
        }
        Ok(())
    }

    /// The content of a range is not needed any more: it reads as zero from now on, wherever it was.
    pub fn discard(&self, addr: u64, len_bytes: u64) -> Result<(), Error> {
        check_range(addr, len_bytes)?;
        let range = AddrRange { start: addr, len: len_bytes };
        let vmas = own_memory::mappings(range).map_err(Error::kernel("Looking at the mappings of a range"))?;
        if vmas.iter().any(|vma| vma.shared) {
            return self.inner.done("Discard", pager::Call::Discard { addr, len_bytes }, None).wait();
        }
        // The pager sees this and drops what is on devices.
        own_memory::advise(range, RangeAdvice::DontNeed).map_err(Error::kernel("Dropping the content of a range"))
    }

    /// mprotect, told to the devices: when this returns none of them uses the range under its old protection.
    pub fn protect(&self, addr: u64, len_bytes: u64, read: bool, write: bool) -> Result<(), Error> {
        check_range(addr, len_bytes)?;
        let range = AddrRange { start: addr, len: len_bytes };
        {
            // Frames of a coherent device may be about to take the place of a part of it.
            let _unchanged = rights_stay();
            own_memory::protect(range, read, write).map_err(Error::kernel("Changing the protection of a range"))?;
        }
        self.inner.done("ProtectionChanged", pager::Call::ProtectionChanged { addr, len_bytes }, None).wait()
    }

    /// What was advised for a range.
    pub fn attributes(&self, addr: u64, len_bytes: u64) -> Result<RangeAttributes, Error> {
        let page_count = check_range(addr, len_bytes)?;
        let mut runs: Vec<AttributeRun> = Vec::new();
        let mut done_pages = 0;
        while done_pages < page_count {
            let start = addr + done_pages * PAGE_BYTES;
            let call = pager::Call::QueryAttributes { addr: start, len_bytes: (page_count - done_pages) * PAGE_BYTES };
            let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
                Reply::Pager(pager::Reply::Attributes { runs }) => Ok(runs),
                _ => Err(Error::StrangeReply { question: "QueryAttributes" }),
            });
            let answer = answer.wait()?;
            let covered: u64 = answer.iter().map(|run| run.page_count).sum();
            if covered == 0 || covered > page_count - done_pages {
                return Err(Error::StrangeReply { question: "QueryAttributes" });
            }
            done_pages += covered;
            runs.extend(answer);
        }
        Ok(RangeAttributes {
            preferred: Uniform::of(&runs, |a| a.preferred),
            prefetched: Uniform::of(&runs, |a| a.prefetched),
            in_place_mask: Uniform::of(&runs, |a| a.in_place_mask),
            no_access_mask: Uniform::of(&runs, |a| a.no_access_mask),
            read_mostly: Uniform::of(&runs, |a| a.read_mostly),
            device_read_only: Uniform::of(&runs, |a| a.device_read_only),
            granularity_log2_pages: Uniform::of(&runs, |a| a.granularity_log2_pages),
            pinned: Uniform::of(&runs, |a| a.pinned),
        })
    }

    /// Test hook: the n-th allocation or copy of this process from now on fails (1: the next one; 0 disarms). Refused unless the
    /// manifest says `fault_injection = true`.
    pub fn inject(&self, point: FaultPoint, nth: u32) -> Result<(), Error> {
        self.inner.done("Inject", pager::Call::Inject { point, nth }, None).wait()
    }

    /// What happened to this process's pages, from a sequence number on; at most 256 records. Empty: nothing newer. Numbers start
    /// again after a restart of the pager.
    pub fn read_trace(&self, since: u64) -> Result<Vec<TraceRecord>, Error> {
        let call = pager::Call::ReadTrace { since };
        let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::Trace { records }) => Ok(records),
            _ => Err(Error::StrangeReply { question: "ReadTrace" }),
        });
        answer.wait()
    }

    /// Which 2 MiB ranges of this process's memory a device uses, hottest first, 2048 at most; what it has not used for two seconds is
    /// not among them. A page in place counts like one in the device's memory. The first call begins the watching and tells what was
    /// used up to now; it goes on until five seconds after the last call, so ask again to see how heat changes. A restart of
    /// the pager forgets the heat and nothing else.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`] for a device without an aperture: only its driver reads its page table.
    pub fn hot_ranges(&self, device: &Device) -> Result<Vec<HotRange>, Error> {
        let call = pager::Call::HotRanges { device: device.id() };
        let answer = self.inner.links.call(Peer::Pager, Call::Pager(call), None, |reply| match reply {
            Reply::Pager(pager::Reply::HotRanges { ranges }) => Ok(ranges),
            _ => Err(Error::StrangeReply { question: "HotRanges" }),
        });
        answer.wait()
    }

    /// # Errors
    /// [`ErrorCode::Permission`] while any page of the range is exclusive to a device.
    pub fn check_exclusive(&self, addr: u64, len_bytes: u64) -> Result<(), Error> {
        let runs = self.residency(addr, len_bytes)?;
        let exclusive = runs.iter().find(|run| matches!(run.residency, Residency::Exclusive(_)));
        let Some(run) = exclusive else { return Ok(()) };
        let text =
            format!("{} pages at {:#x} are a device's alone", run.page_count, addr + run.first_page * PAGE_BYTES);
        Err(Error::Service { code: ErrorCode::Permission, text })
    }

    /// How a device would find every page of a range, without any fault. Pages may move while it is taken.
    ///
    /// # Errors
    /// The range is not page aligned; a call to the kernel or the pager failed. Memory that is not managed is no error.
    pub fn snapshot(&self, device: &Device, addr: u64, len_bytes: u64) -> Result<Vec<SnapshotPage>, Error> {
        let page_count = check_range(addr, len_bytes)?;
        let whole = AddrRange { start: addr, len: len_bytes };
        let failed = || Error::kernel("Looking at the mappings of a range");
        let pagemap = pagemap::open_own_pagemap().map_err(failed())?;
        let guards = if pagemap::tells_guards() { Categories::GUARD } else { Categories::empty() };
        let any = Categories::PRESENT | Categories::PFNZERO | Categories::HUGE | Categories::FILE | guards;
        let mut pages = vec![SnapshotPage::ERROR; page_count as usize];
        let mut start = addr;
        while start < whole.end() {
            let vmas = own_memory::mappings(AddrRange { start, len: whole.end() - start }).map_err(failed())?;
            for vma in vmas.iter().filter(|vma| vma.read) {
                let (from, end) = (vma.start.max(start), vma.end.min(whole.end()));
                let piece = AddrRange { start: from, len: end - from };
                let kinds = pagemap::scan(pagemap.as_fd(), piece, any).map_err(failed())?;
                let alone = pagemap::mapped_alone(pagemap.as_fd(), piece).map_err(failed())?;
                let runs = self.managed_runs(piece)?;
                let first = ((from - addr) / PAGE_SIZE) as usize;
                for (at, page) in (0..piece.len / PAGE_SIZE).zip(&mut pages[first..]) {
                    let place = from + at * PAGE_SIZE;
                    let kind = kinds.iter().find(|run| run.start <= place && place < run.end).map(|run| run.categories);
                    let kind = kind.filter(|kind| *kind != Categories::FILE);
                    let alone = alone.get(at as usize).copied().unwrap_or(false);
                    let run = runs.iter().find(|run| run.first_page <= at && at < run.first_page + run.page_count);
                    *page = shown(device.id(), vma, kind, alone, run);
                }
            }
            // Behind the hole that ended the list, page by page.
            start = vmas.last().map_or(start, |vma| vma.end) + PAGE_SIZE;
        }
        Ok(pages)
    }

    /// Residency of the managed part of a range; nothing for memory that the pager does not know.
    fn managed_runs(&self, piece: AddrRange) -> Result<Vec<ResidencyRun>, Error> {
        let whole = self.residency(piece.start, piece.len);
        let unknown =
            |error: &Error| matches!(error.code(), ErrorCode::NotFound | ErrorCode::Invalid | ErrorCode::Fault);
        match whole {
            Err(error) if unknown(&error) && piece.len > PAGE_SIZE => {
                // Managed in part: both halves are asked for.
                let half = (piece.len / PAGE_SIZE).div_ceil(2) * PAGE_SIZE;
                let mut runs = self.managed_runs(AddrRange { start: piece.start, len: half })?;
                let rest = AddrRange { start: piece.start + half, len: piece.len - half };
                runs.extend(
                    self.managed_runs(rest)?
                        .into_iter()
                        .map(|run| ResidencyRun { first_page: run.first_page + half / PAGE_SIZE, ..run }),
                );
                Ok(runs)
            }
            Err(error) if unknown(&error) => Ok(Vec::new()),
            other => other,
        }
    }
}

/// Ends [`RangeAdvice::DontFork`] of what was adopted. Allocated memory stays out of children.
pub(crate) fn let_children_have(range: AddrRange) -> Result<(), Error> {
    let failed = || Error::kernel("Letting children have a range");
    let vmas = own_memory::mappings(range).map_err(failed())?;
    for part in vmas.iter().filter(|vma| !vma.shared).filter_map(|vma| vma.range().intersection(&range)) {
        own_memory::advise(part, RangeAdvice::DoFork).map_err(failed())?;
    }
    Ok(())
}

/// What whole pages an allocation has lies inside it, not around it.
fn round_inwards(error: Error) -> Error {
    match error {
        Error::UnalignedAddress { .. } | Error::UnalignedLength { .. } => {
            let text =
                format!("Only whole pages of {PAGE_BYTES} bytes can be adopted: round the start up and the end down");
            Error::Service { code: ErrorCode::Invalid, text }
        }
        other => other,
    }
}

/// Whether a range can be adopted: `None` as private memory, else the shared mapping that it lies in.
fn adoptable(range: AddrRange, vmas: &[Vma]) -> Result<Option<&Vma>, Error> {
    let refused = |code, text| Err(Error::Service { code, text });
    let end = vmas.last().map_or(range.start, |vma| vma.end);
    if end < range.end() {
        return refused(
            ErrorCode::Fault,
            format!("{range} has a hole at {end:#x}: adopt memory that is mapped as a whole"),
        );
    }
    if let Some(vma) = vmas.iter().find(|vma| vma.page_size_bytes != PAGE_SIZE && !vma.shared) {
        let text = format!(
            "{range} holds private hugetlb memory at {:#x}, whose pages Linux lets nobody move out nor use from outside: map it with MAP_SHARED, or use ordinary memory with madvise(MADV_HUGEPAGE)",
            vma.start
        );
        return refused(ErrorCode::Invalid, text);
    }
    match vmas {
        [vma] if vma.shared => Ok(Some(vma)),
        _ if vmas.iter().any(|vma| vma.shared) => {
            let text = format!("{range} spans several mappings, some of them shared: adopt each on its own");
            refused(ErrorCode::Invalid, text)
        }
        _ => match vmas.iter().find(|vma| vma.inode != 0) {
            Some(vma) => {
                let text = format!(
                    "{range} holds a private mapping of a file at {:#x}, whose pages Linux lets nobody take out: copy it to anonymous memory, or map it shared",
                    vma.start
                );
                refused(ErrorCode::Invalid, text)
            }
            None => Ok(None),
        },
    }
}

/// One page of a snapshot from what the pager and the kernel say.
fn shown(device_id: u8, vma: &Vma, kind: Option<Categories>, alone: bool, run: Option<&ResidencyRun>) -> SnapshotPage {
    if kind.is_some_and(|kind| kind.contains(Categories::GUARD)) {
        return SnapshotPage::ERROR;
    }
    let right = if vma.write { SnapshotPage::WRITE } else { SnapshotPage::READ };
    let huge = |page: SnapshotPage, huge: bool| if huge { page.with(SnapshotPage::PMD) } else { page };
    match run.map(|run| run.residency) {
        Some(Residency::Device(id)) if run.is_some_and(|run| run.coherent) => {
            let here = if id == device_id { SnapshotPage::COHERENT_LOCAL } else { SnapshotPage::COHERENT_REMOTE };
            huge(here.with(right), run.is_some_and(|run| run.huge))
        }
        Some(Residency::Device(id) | Residency::Exclusive(id)) if id == device_id => {
            huge(SnapshotPage::DEVICE_LOCAL.with(right), run.is_some_and(|run| run.huge))
        }
        Some(Residency::Device(_) | Residency::Exclusive(_) | Residency::Moving) => SnapshotPage::NONE,
        Some(Residency::Poisoned) => SnapshotPage::ERROR,
        Some(Residency::Duplicated(_)) => SnapshotPage::READ,
        Some(Residency::Absent) => SnapshotPage::NONE,
        Some(Residency::System) | None => match kind {
            None => SnapshotPage::NONE,
            Some(kind) if kind.contains(Categories::PFNZERO) => SnapshotPage::ZERO.with(SnapshotPage::READ),
            Some(kind) => {
                // A private page that is a file's, or shared with a forked child, is copied by the first write.
                let copied = !vma.shared && (kind.contains(Categories::FILE) || !alone);
                let right = if copied { SnapshotPage::READ } else { right };
                let large = kind.contains(Categories::HUGE) || vma.page_size_bytes > PAGE_SIZE;
                huge(right, large)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: AddrRange = AddrRange { start: 0x10000, len: 0x8000 };

    fn vma(start: u64, end: u64) -> Vma {
        let (read, write, exec, shared) = (true, true, false, false);
        Vma { start, end, read, write, exec, shared, page_size_bytes: PAGE_SIZE, offset: 0, device: (0, 0), inode: 0 }
    }

    fn refusal(vmas: &[Vma]) -> String {
        adoptable(RANGE, vmas).unwrap_err().to_string()
    }

    #[test]
    fn private_memory_of_several_mappings_is_one_adoption_and_shared_memory_lies_in_one_mapping() {
        let parts = [vma(0x8000, 0x12000), Vma { write: false, ..vma(0x12000, 0x18000) }];
        assert_eq!(adoptable(RANGE, &parts).unwrap(), None);
        let shared = Vma { shared: true, inode: 7, ..vma(0x10000, 0x18000) };
        assert_eq!(adoptable(RANGE, &[shared]).unwrap(), Some(&shared));
        let huge = Vma { shared: true, inode: 7, page_size_bytes: 2 << 20, ..vma(0, 0x200000) };
        assert_eq!(adoptable(RANGE, &[huge]).unwrap(), Some(&huge), "also a part of a huge page");
    }

    #[test]
    fn what_cannot_be_adopted_is_named() {
        assert!(refusal(&[]).contains("a hole at 0x10000"));
        assert!(refusal(&[vma(0x10000, 0x14000)]).contains("a hole at 0x14000"));
        let file = Vma { inode: 3, ..vma(0x14000, 0x18000) };
        let text = refusal(&[vma(0x10000, 0x14000), file]);
        assert!(text.contains("private mapping of a file at 0x14000"), "{text}");
        let huge = Vma { page_size_bytes: 2 << 20, inode: 5, ..vma(0, 0x200000) };
        assert!(refusal(&[huge]).contains("private hugetlb") && refusal(&[huge]).contains("MAP_SHARED"));
        let shared = Vma { shared: true, ..vma(0x14000, 0x18000) };
        assert!(refusal(&[vma(0x10000, 0x14000), shared]).contains("adopt each on its own"));
        let error = round_inwards(check_range(0x10010, 0x1000).unwrap_err());
        assert!(error.code() == ErrorCode::Invalid && error.to_string().contains("round the start up"), "{error}");
    }

    #[test]
    fn a_snapshot_shows_rights_place_and_level_of_a_page() {
        let run = |residency, huge| ResidencyRun {
            first_page: 0,
            page_count: 1,
            residency,
            pinned: false,
            mapped_mask: 0,
            huge,
            coherent: false,
        };
        let (rw, ro) = (vma(0, 0x1000), Vma { write: false, ..vma(0, 0x1000) });
        let present = Some(Categories::PRESENT);
        let zero = Some(Categories::PRESENT | Categories::PFNZERO);
        let page = |vma: &Vma, kind, run: Option<ResidencyRun>| shown(1, vma, kind, true, run.as_ref()).bits();
        assert_eq!(shown(1, &rw, present, false, None).bits(), 1, "a forked child has it too");
        assert_eq!(page(&rw, present.map(|kind| kind | Categories::FILE), None), 1, "not copied yet");
        let shared = Vma { shared: true, ..rw };
        assert_eq!(page(&shared, present.map(|kind| kind | Categories::FILE), None), 2);
        assert_eq!(page(&rw, Some(Categories::GUARD), None), 0xff);
        assert_eq!(page(&rw, present, None), 2);
        assert_eq!(page(&ro, present, Some(run(Residency::System, false))), 1);
        assert_eq!(page(&ro, zero, Some(run(Residency::System, false))), 0x11);
        assert_eq!(page(&rw, present.map(|kind| kind | Categories::HUGE), Some(run(Residency::System, false))), 6);
        assert_eq!(page(&rw, None, Some(run(Residency::Device(1), true))), 0x26);
        assert_eq!(page(&rw, None, Some(run(Residency::Device(0), false))), 0, "another device's");
        let coherent = |id| Some(ResidencyRun { coherent: true, ..run(Residency::Device(id), false) });
        assert_eq!((page(&rw, present, coherent(1)), page(&ro, None, coherent(0))), (0x42, 0x51));
        assert_eq!(page(&rw, None, Some(run(Residency::Absent, false))), 0);
        assert_eq!(page(&rw, None, Some(run(Residency::Poisoned, false))), 0xff);
    }

    #[test]
    fn attributes_are_uniform_only_if_every_page_agrees() {
        let attributes = |read_mostly| Attributes {
            preferred: None,
            prefetched: Some(Target::Home),
            in_place_mask: 0,
            no_access_mask: 0,
            read_mostly,
            device_read_only: false,
            granularity_log2_pages: None,
            pinned: false,
        };
        let run =
            |first_page, read_mostly| AttributeRun { first_page, page_count: 2, attributes: attributes(read_mostly) };
        let runs = [run(0, true), run(2, false)];
        assert_eq!(Uniform::of(&runs, |a| a.read_mostly), Uniform::Mixed);
        assert_eq!(Uniform::of(&runs, |a| a.prefetched), Uniform::Same(Some(Target::Home)));
    }
}
