//! Regions are made: of a memfd, of private memory that exists already, or of a file that is used in place. Every lie that a client
//! can tell about one ends in an error that names it.

use std::os::fd::AsFd;

use uhmm_ipc::message::{ErrorCode, Fd, Reply, WireError, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::{AddrRange, PAGE_SIZE, memfd};
use uhmm_pager_core::{Backing, Pages, RegionId};

use crate::calls::Answer;
use crate::clients::io_error;
use crate::directory::{DirectoryFile, Header};
use crate::kernel_view::Ended;
use crate::registered::Registered;
use crate::service::{Pager, VaultWait};
use crate::space::{Memory, Phase, Region, Segment, Space};

/// What a client wants to have managed.
pub(crate) struct Wanted {
    pub addr: u64,
    pub len_bytes: u64,
    pub backing: Backing,
    /// Memfd or file; none for private memory.
    pub file: Option<Fd>,
    pub offset_bytes: u64,
}

/// What the vault keeps of a region, by name.
type Kept = Vec<(&'static str, Fd)>;

fn invalid(text: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::Invalid, text)
}

fn fault(text: impl Into<String>) -> WireError {
    WireError::new(ErrorCode::Fault, text)
}

impl Pager {
    pub(crate) fn make_region(&mut self, conn: ConnId, call: CallId, wanted: Wanted) -> Answer {
        let space_id = match self.space_of(conn) {
            Ok(id) => id,
            Err(error) => return Some(Err(error)),
        };
        let range = AddrRange { start: wanted.addr, len: wanted.len_bytes };
        if range.start.checked_add(range.len).is_some() && self.end_what_is_gone(space_id, range, true) == Ended::NotYet
        {
            self.waiting_makes.push((conn, call, wanted));
            return None;
        }
        if let Some(region) = self.same_region(space_id, &wanted) {
            return Some(Ok(pager::Reply::RegionCreated { region }));
        }
        if let Some(region) = self.managed_already(space_id, &wanted) {
            return Some(Ok(pager::Reply::RegionCreated { region }));
        }
        let (range, memory) = match self.check_region(space_id, &wanted) {
            Ok(checked) => checked,
            Err(error) => return Some(Err(error)),
        };
        let gaps = self.unmanaged(space_id, range);
        if gaps.iter().any(|gap| self.devices_see_an_earlier_region(space_id, *gap)) {
            self.waiting_makes.push((conn, call, wanted));
            return None;
        }
        let mut made = Vec::new();
        for gap in &gaps {
            match self.new_region(space_id, *gap, &wanted, memory.clone()) {
                Ok(region) => made.push(region),
                Err(error) => {
                    made.into_iter().for_each(|(id, _)| self.drop_region(RegionId(id)));
                    return Some(Err(error));
                }
            }
        }
        // Answered when the last one is kept.
        self.makings.insert((conn, call), made.len() as u32);
        for (id, entries) in made {
            let prefix = Space::region_prefix(space_id, id);
            self.put_in_vault(VaultWait::Region { region: id, conn, call }, &prefix, entries);
        }
        None
    }

    /// What was unmapped there is revoked by message, and the message is on its way: a device would take the new memory for the old.
    /// (Entries in shared tables are revoked already.)
    fn devices_see_an_earlier_region(&self, space_id: u64, range: AddrRange) -> bool {
        let seen = |segment: &Segment| {
            let revoked = (0..).zip(&segment.tables).filter(|(_, table)| table.is_some());
            let revoked_mask = revoked.fold(0u8, |mask, (device, _)| mask | 1 << device);
            segment.space == space_id && segment.granted_mask & !revoked_mask != 0 && segment.range().overlaps(&range)
        };
        self.regions.all_retired().any(seen)
    }

    /// A device has dropped something: regions that waited for it are made.
    pub(crate) fn make_waiting_regions(&mut self) {
        for (conn, call, wanted) in std::mem::take(&mut self.waiting_makes) {
            if let Some(answer) = self.make_region(conn, call, wanted) {
                self.service.reactor.reply(conn, call, answer.map(Reply::Pager));
            }
        }
    }

    /// The parts of a range that are not managed yet.
    fn unmanaged(&self, space_id: u64, range: AddrRange) -> Vec<AddrRange> {
        let mut gaps = Vec::new();
        let mut next = range.start;
        let shown = self.at_addresses(space_id, range.start, range.end());
        let mut managed: Vec<AddrRange> =
            shown.iter().filter_map(|id| self.regions.segment(*id).map(Segment::range)).collect();
        managed.push(AddrRange { start: range.end(), len: 0 });
        for other in managed {
            if other.start > next {
                gaps.push(AddrRange { start: next, len: other.start - next });
            }
            next = next.max(other.end());
        }
        gaps
    }

    /// Whoever adopts what is managed as a whole, in whatever way, has it managed.
    fn managed_already(&self, space_id: u64, wanted: &Wanted) -> Option<u64> {
        let range = AddrRange::new(wanted.addr, wanted.len_bytes).ok().filter(|_| wanted.backing != Backing::Shared)?;
        let whole = self.unmanaged(space_id, range).is_empty();
        self.segment_at(space_id, range.start).filter(|_| whole).map(|segment| segment.region)
    }

    /// Directory and segment of a region that is not kept yet.
    fn new_region(
        &mut self,
        space_id: u64,
        range: AddrRange,
        wanted: &Wanted,
        memory: Option<Memory>,
    ) -> Result<(u64, Kept), WireError> {
        let id = self.next_region;
        let (page_count, offset_bytes) = (range.len / PAGE_SIZE, wanted.offset_bytes);
        let header = Header { region: id, space: space_id, backing: wanted.backing, page_count, offset_bytes };
        let directory = DirectoryFile::create(header)
            .map_err(|error| WireError::new(ErrorCode::NoMemory, format!("No memory for the directory: {error}")))?;
        self.next_region += 1;
        let mut entries = vec![("dir", directory.fd())];
        entries.extend(memory.as_ref().map(|memory| ("mem", memory.fd.clone())));
        let registered = Registered::of(space_id, range);
        self.regions.insert(Region {
            id,
            space: space_id,
            backing: wanted.backing,
            page_count,
            memory,
            directory,
            phase: Phase::Creating,
            segments: Vec::new(),
            retired: Vec::new(),
            registered,
            cpu_home: (wanted.backing == Backing::Shared).then_some((space_id, range.start)),
        });
        if let Some(space) = self.spaces.get_mut(&space_id) {
            space.vacated.made(range);
        }
        self.show(space_id, id, range.start, Pages { first: 0, count: page_count });
        self.keep_segments(id);
        Ok((id, entries))
    }

    fn same_region(&self, space_id: u64, wanted: &Wanted) -> Option<u64> {
        let segment = self.segment_at(space_id, wanted.addr)?;
        let region = self.regions.get(segment.region)?;
        let same = segment.addr == wanted.addr
            && segment.page_count * PAGE_SIZE == wanted.len_bytes
            && segment.page_count == region.page_count
            && region.backing == wanted.backing;
        (same && region.phase == Phase::Live).then_some(region.id)
    }

    /// What the manifest allows one process.
    fn check_share(&mut self, space_id: u64, len_bytes: u64) -> Result<(), WireError> {
        let (max_regions, max_bytes, of) = self.region_limits(space_id);
        let regions = self.spaces.get(&space_id).map_or(0, |space| space.segments.len());
        let text = if len_bytes > max_bytes {
            format!("{len_bytes} bytes are more than max_region_bytes = {max_bytes} ({of} in the manifest)")
        } else if regions >= max_regions as usize {
            format!("{max_regions} regions are the most (max_regions_per_space, {of} in the manifest)")
        } else {
            return Ok(());
        };
        self.note_refusal(space_id, len_bytes / PAGE_SIZE);
        Err(WireError::new(ErrorCode::NoMemory, text))
    }

    /// In the order in which it is cheapest to find.
    fn check_region(&mut self, space_id: u64, wanted: &Wanted) -> Result<(AddrRange, Option<Memory>), WireError> {
        let Wanted { addr, len_bytes, backing, ref file, offset_bytes } = *wanted;
        let range = AddrRange::new(addr, len_bytes).map_err(|error| invalid(error.to_string()))?;
        self.check_share(space_id, len_bytes)?;
        if self.spaces.get(&space_id).is_none_or(|space| space.dying) {
            return Err(WireError::new(ErrorCode::NotFound, "The space is gone"));
        }
        // Private memory may be adopted in overlapping pieces: what is managed already stays as it is.
        let private = |region: u64| self.regions.get(region).is_some_and(|r| r.backing == Backing::Private);
        let shown = self.at_addresses(space_id, range.start, range.end());
        let in_the_way = |s: &&Segment| backing != Backing::Private || !private(s.region);
        if let Some(other) = shown.iter().filter_map(|id| self.regions.segment(*id)).find(in_the_way) {
            let text = format!("{range} overlaps region {}, which is managed already", other.range());
            return Err(invalid(text));
        }
        match (backing, file) {
            (Backing::Shared, Some(memory)) => {
                memfd::check_sealed(memory.as_fd(), len_bytes)
                    .map_err(|error| invalid(format!("The memfd is refused: {error}")))?;
                self.check_mapping(space_id, range, memory, 0, true)?;
                Ok((range, Some(Memory::new(memory.clone(), 0, true))))
            }
            (Backing::File, Some(file)) => {
                if !offset_bytes.is_multiple_of(PAGE_SIZE) {
                    return Err(invalid(format!("File offset {offset_bytes} is not a multiple of {PAGE_SIZE}")));
                }
                self.check_mapping(space_id, range, file, offset_bytes, false)?;
                let whole = offset_bytes.saturating_add(len_bytes);
                let file_len = memfd::len(file.as_fd()).unwrap_or(0);
                let sealed = file_len >= whole && memfd::check_sealed(file.as_fd(), file_len).is_ok();
                Ok((range, Some(Memory::new(file.clone(), offset_bytes, sealed))))
            }
            (Backing::Private, _) => self.check_private(space_id, range).map(|()| (range, None)),
            _ => Err(invalid("A region of a file needs the file")),
        }
    }

    /// The address range must be a shared mapping of this very file from the offset on.
    fn check_mapping(
        &self,
        space_id: u64,
        range: AddrRange,
        file: &Fd,
        offset_bytes: u64,
        writable: bool,
    ) -> Result<(), WireError> {
        let Some(vmas) = self.vmas(space_id, range) else { return Ok(()) };
        let Some(vma) = vmas.first().filter(|vma| vma.start <= range.start && vma.end >= range.end()) else {
            return Err(fault(format!("{range} is not one mapping of this process: map the memfd there first")));
        };
        if !vma.shared || writable && !(vma.read && vma.write) {
            return Err(fault(format!("{range} is not mapped shared, readable and writable")));
        }
        let inode = memfd::inode(file.as_fd()).map_err(|error| io_error("The memfd cannot be examined", &error))?;
        let offset = vma.offset + (range.start - vma.start);
        if vma.inode != inode || offset != offset_bytes {
            return Err(fault(format!("{range} maps another file or offset than the one that was sent")));
        }
        Ok(())
    }

    /// Private anonymous memory without holes.
    fn check_private(&self, space_id: u64, range: AddrRange) -> Result<(), WireError> {
        let Some(vmas) = self.vmas(space_id, range) else { return Ok(()) };
        let mut next = range.start;
        for vma in vmas {
            if vma.start > next {
                break;
            }
            let named = vma.range();
            // Of a file for the kernel, though no program has one.
            if vma.page_size_bytes != PAGE_SIZE {
                return Err(fault(format!(
                    "{named} consists of hugetlb pages, which cannot be taken out page by page: map them shared"
                )));
            }
            if vma.shared || vma.inode != 0 {
                let text =
                    format!("{named} is not private anonymous memory: attach a shared mapping of a file instead");
                return Err(fault(text));
            }
            next = vma.end;
        }
        if next < range.end() {
            return Err(fault(format!("{range} has a hole at {next:#x}: give a range that is mapped as a whole")));
        }
        Ok(())
    }
}
