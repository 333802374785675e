//! The pager's answers: runs of pages, regions.

use capnp::struct_list;
use uhmm_schema::pager_capnp::{MAX_REGIONS, MAX_STRIP_CELLS, MAX_WHY_BYTES, hot_range, map_run, range, region, reply};
use uhmm_schema::sdk_capnp::{
    self as sdk, MAX_DEVICES, MAX_RUNS, MAX_TOKEN_BYTES, MAX_TRACE_RECORDS, region_status, residency_run, status_run,
};

use super::agent::{read_memory, write_memory};
use super::claims::{read_claims, write_claims};
use super::places::{read_attribute_run, read_trace_record, write_attribute_run, write_trace_record};
use crate::codec::error::{DecodeError, EncodeError};
use crate::codec::fds::{FdSink, FdSource};
use crate::codec::limits::{in_data, in_len, in_text, out_data, out_len, out_text};
use crate::message::pager::{
    GrantedRange, HotRange, MapKind, MapRun, Memory, PageStatus, RegionStatus, Reply, Residency, ResidencyRun,
    StatusRun,
};

pub(in crate::codec) fn write_reply(
    from: &Reply,
    mut to: reply::Builder<'_>,
    fds: &mut FdSink,
) -> Result<(), EncodeError> {
    match from {
        Reply::Done => to.set_done(()),
        Reply::SpaceOpened { space, token, features } => {
            let mut to = to.init_space_opened();
            to.set_space(*space);
            to.set_token(out_data("spaceOpened.token", token, MAX_TOKEN_BYTES)?);
            to.set_features(*features);
        }
        Reply::ChildAttached { uffd, features } => {
            let mut to = to.init_child_attached();
            to.set_uffd_fd(fds.put(uffd));
            to.set_features(*features);
        }
        Reply::UserfaultfdDevice { device } => to.set_userfaultfd_device_fd(fds.put(device)),
        Reply::RegionCreated { region } => to.init_region_created().set_region(*region),
        Reply::Migrated { moved_pages, runs, why } => {
            let mut to = to.init_migrated();
            to.set_moved_pages(*moved_pages);
            to.set_why(out_text("migrated.why", why, MAX_WHY_BYTES)?);
            let mut list = to.init_runs(out_len("migrated.runs", runs.len(), MAX_RUNS)?);
            for (index, run) in runs.iter().enumerate() {
                write_status_run(run, list.reborrow().get(index as u32));
            }
        }
        Reply::Residency { runs } => {
            let mut list = to.init_residency(out_len("residency", runs.len(), MAX_RUNS)?);
            for (index, run) in runs.iter().enumerate() {
                write_residency_run(run, list.reborrow().get(index as u32));
            }
        }
        Reply::Region { region, addr, len_bytes, device_read_only, memory } => {
            write_region(to.init_region(), (*region, *addr, *len_bytes, *device_read_only), memory, fds);
        }
        Reply::Attributes { runs } => {
            let mut list = to.init_attributes(out_len("attributes", runs.len(), MAX_RUNS)?);
            for (index, run) in runs.iter().enumerate() {
                write_attribute_run(run, list.reborrow().get(index as u32))?;
            }
        }
        Reply::HotRanges { ranges } => {
            let mut list = to.init_hot_ranges(out_len("hotRanges", ranges.len(), MAX_RUNS)?);
            for (index, range) in ranges.iter().enumerate() {
                let mut to = list.reborrow().get(index as u32);
                to.set_addr(range.addr);
                to.set_heat_permille(range.heat_permille);
            }
        }
        Reply::Granted { ranges } => {
            let mut list = to.init_granted(out_len("granted", ranges.len(), MAX_RUNS)?);
            for (index, range) in ranges.iter().enumerate() {
                let mut to = list.reborrow().get(index as u32);
                to.set_addr(range.addr);
                to.set_len_bytes(range.len_bytes);
            }
        }
        Reply::Strip(cells) => to.set_strip(out_data("strip", cells, MAX_STRIP_CELLS)?),
        Reply::Trace { records } => {
            let mut list = to.init_trace(out_len("trace", records.len(), MAX_TRACE_RECORDS)?);
            for (index, record) in records.iter().enumerate() {
                write_trace_record(record, list.reborrow().get(index as u32));
            }
        }
        Reply::Evicted { page_count } => to.init_evicted().set_page_count(*page_count),
        Reply::Resolved { runs } => write_map_runs(runs, |count| to.init_resolved(count))?,
        Reply::Regions(regions) => {
            let mut list = to.init_regions(out_len("regions", regions.len(), MAX_REGIONS)?);
            for (index, region) in regions.iter().enumerate() {
                write_region_status(region, list.reborrow().get(index as u32))?;
            }
        }
        Reply::Claims(claims) => write_claims(claims, to.init_claims())?,
    }
    Ok(())
}

pub(in crate::codec) fn read_reply(from: reply::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    Ok(match from.which()? {
        reply::Done(()) => Reply::Done,
        reply::SpaceOpened(from) => {
            let from = from?;
            let token = in_data("spaceOpened.token", from.get_token(), MAX_TOKEN_BYTES)?;
            Reply::SpaceOpened { space: from.get_space(), token, features: from.get_features() }
        }
        reply::ChildAttached(from) => {
            let from = from?;
            let uffd = fds.take("childAttached.uffdFd", from.get_uffd_fd())?;
            Reply::ChildAttached { uffd, features: from.get_features() }
        }
        reply::UserfaultfdDeviceFd(device) => {
            Reply::UserfaultfdDevice { device: fds.take("userfaultfdDeviceFd", device)? }
        }
        reply::RegionCreated(from) => Reply::RegionCreated { region: from?.get_region() },
        reply::Migrated(from) => {
            let from = from?;
            let list = from.get_runs()?;
            in_len("migrated.runs", list.len(), MAX_RUNS)?;
            let runs = list.iter().map(read_status_run).collect::<Result<_, _>>()?;
            let why = in_text("migrated.why", from.get_why(), MAX_WHY_BYTES)?;
            Reply::Migrated { moved_pages: from.get_moved_pages(), runs, why }
        }
        reply::Residency(list) => {
            let list = list?;
            in_len("residency", list.len(), MAX_RUNS)?;
            Reply::Residency { runs: list.iter().map(read_residency_run).collect::<Result<_, _>>()? }
        }
        reply::Region(from) => {
            let (region, addr, len_bytes, device_read_only, memory) = read_region(from?, fds)?;
            Reply::Region { region, addr, len_bytes, device_read_only, memory }
        }
        reply::Attributes(list) => {
            let list = list?;
            in_len("attributes", list.len(), MAX_RUNS)?;
            Reply::Attributes { runs: list.iter().map(read_attribute_run).collect::<Result<_, _>>()? }
        }
        reply::HotRanges(list) => {
            let list = list?;
            in_len("hotRanges", list.len(), MAX_RUNS)?;
            let read = |from: hot_range::Reader<'_>| HotRange {
                addr: from.get_addr(),
                heat_permille: from.get_heat_permille(),
            };
            Reply::HotRanges { ranges: list.iter().map(read).collect() }
        }
        reply::Granted(list) => {
            let list = list?;
            in_len("granted", list.len(), MAX_RUNS)?;
            let read =
                |from: range::Reader<'_>| GrantedRange { addr: from.get_addr(), len_bytes: from.get_len_bytes() };
            Reply::Granted { ranges: list.iter().map(read).collect() }
        }
        reply::Strip(cells) => Reply::Strip(in_data("strip", cells, MAX_STRIP_CELLS)?),
        reply::Trace(list) => {
            let list = list?;
            in_len("trace", list.len(), MAX_TRACE_RECORDS)?;
            Reply::Trace { records: list.iter().map(read_trace_record).collect::<Result<_, _>>()? }
        }
        reply::Evicted(from) => Reply::Evicted { page_count: from?.get_page_count() },
        reply::Resolved(list) => Reply::Resolved { runs: read_map_runs(list?)? },
        reply::Regions(list) => {
            let list = list?;
            in_len("regions", list.len(), MAX_REGIONS)?;
            Reply::Regions(list.iter().map(read_region_status).collect::<Result<_, _>>()?)
        }
        reply::Claims(from) => Reply::Claims(read_claims(from?)?),
    })
}

pub(in crate::codec) fn write_region(
    mut to: region::Builder<'_>,
    (region, addr, len_bytes, device_read_only): (u64, u64, u64, bool),
    memory: &Memory,
    fds: &mut FdSink,
) {
    to.set_region(region);
    to.set_addr(addr);
    to.set_len_bytes(len_bytes);
    to.set_device_read_only(device_read_only);
    write_memory(memory, to.init_memory(), fds);
}

pub(in crate::codec) fn read_region(
    from: region::Reader<'_>,
    fds: &mut FdSource,
) -> Result<(u64, u64, u64, bool, Memory), DecodeError> {
    let memory = read_memory(from.get_memory(), fds)?;
    Ok((from.get_region(), from.get_addr(), from.get_len_bytes(), from.get_device_read_only(), memory))
}

pub(in crate::codec) fn write_map_runs<'a>(
    runs: &[MapRun],
    init: impl FnOnce(u32) -> struct_list::Builder<'a, map_run::Owned>,
) -> Result<(), EncodeError> {
    let mut list = init(out_len("mapRuns", runs.len(), MAX_RUNS)?);
    for (index, run) in runs.iter().enumerate() {
        let mut to = list.reborrow().get(index as u32);
        to.set_first_page(run.first_page);
        to.set_page_count(run.page_count);
        to.set_writable(run.writable);
        match run.kind {
            MapKind::Frame(frame) => to.set_frame(frame),
            MapKind::System => to.set_system(()),
        }
    }
    Ok(())
}

pub(in crate::codec) fn read_map_runs(
    list: struct_list::Reader<'_, map_run::Owned>,
) -> Result<Vec<MapRun>, DecodeError> {
    in_len("mapRuns", list.len(), MAX_RUNS)?;
    let run = |from: map_run::Reader<'_>| {
        let kind = match from.which()? {
            map_run::Frame(frame) => MapKind::Frame(frame),
            map_run::System(()) => MapKind::System,
        };
        Ok(MapRun {
            first_page: from.get_first_page(),
            page_count: from.get_page_count(),
            kind,
            writable: from.get_writable(),
        })
    };
    list.iter().map(run).collect()
}

fn write_status_run(from: &StatusRun, mut to: status_run::Builder<'_>) {
    to.set_first_page(from.first_page);
    to.set_page_count(from.page_count);
    to.set_status(match from.status {
        PageStatus::Moved => sdk::PageStatus::Moved,
        PageStatus::AlreadyThere => sdk::PageStatus::AlreadyThere,
        PageStatus::Busy => sdk::PageStatus::Busy,
        PageStatus::Pinned => sdk::PageStatus::Pinned,
        PageStatus::NoMemory => sdk::PageStatus::NoMemory,
        PageStatus::Io => sdk::PageStatus::Io,
        PageStatus::Poisoned => sdk::PageStatus::Poisoned,
        PageStatus::Gone => sdk::PageStatus::Gone,
        PageStatus::NotSelected => sdk::PageStatus::NotSelected,
    });
}

fn read_status_run(from: status_run::Reader<'_>) -> Result<StatusRun, DecodeError> {
    let status = match from.get_status()? {
        sdk::PageStatus::Moved => PageStatus::Moved,
        sdk::PageStatus::AlreadyThere => PageStatus::AlreadyThere,
        sdk::PageStatus::Busy => PageStatus::Busy,
        sdk::PageStatus::Pinned => PageStatus::Pinned,
        sdk::PageStatus::NoMemory => PageStatus::NoMemory,
        sdk::PageStatus::Io => PageStatus::Io,
        sdk::PageStatus::Poisoned => PageStatus::Poisoned,
        sdk::PageStatus::Gone => PageStatus::Gone,
        sdk::PageStatus::NotSelected => PageStatus::NotSelected,
    };
    Ok(StatusRun { first_page: from.get_first_page(), page_count: from.get_page_count(), status })
}

fn write_residency_run(from: &ResidencyRun, mut to: residency_run::Builder<'_>) {
    to.set_first_page(from.first_page);
    to.set_page_count(from.page_count);
    to.set_pinned(from.pinned);
    to.set_mapped_mask(from.mapped_mask);
    to.set_huge(from.huge);
    to.set_coherent(from.coherent);
    let (residency, device) = match from.residency {
        Residency::Absent => (sdk::Residency::Absent, 0),
        Residency::System => (sdk::Residency::System, 0),
        Residency::Device(device) => (sdk::Residency::Device, device),
        Residency::Exclusive(device) => (sdk::Residency::Exclusive, device),
        Residency::Duplicated(device) => (sdk::Residency::Duplicated, device),
        Residency::Moving => (sdk::Residency::Moving, 0),
        Residency::Poisoned => (sdk::Residency::Poisoned, 0),
    };
    to.set_residency(residency);
    to.set_device(device);
}

fn read_residency_run(from: residency_run::Reader<'_>) -> Result<ResidencyRun, DecodeError> {
    let device = from.get_device();
    let residency = match from.get_residency()? {
        sdk::Residency::Device => Residency::Device(device),
        sdk::Residency::Exclusive => Residency::Exclusive(device),
        sdk::Residency::Duplicated => Residency::Duplicated(device),
        _ if device != 0 => {
            return Err(DecodeError::Value { field: "residency.device", value: u64::from(device) });
        }
        sdk::Residency::Absent => Residency::Absent,
        sdk::Residency::System => Residency::System,
        sdk::Residency::Moving => Residency::Moving,
        sdk::Residency::Poisoned => Residency::Poisoned,
    };
    Ok(ResidencyRun {
        first_page: from.get_first_page(),
        page_count: from.get_page_count(),
        residency,
        pinned: from.get_pinned(),
        mapped_mask: from.get_mapped_mask(),
        huge: from.get_huge(),
        coherent: from.get_coherent(),
    })
}

fn write_region_status(from: &RegionStatus, mut to: region_status::Builder<'_>) -> Result<(), EncodeError> {
    to.set_space(from.space);
    to.set_pid(from.pid);
    to.set_region(from.region);
    to.set_addr(from.addr);
    to.set_page_count(from.page_count);
    to.set_system_pages(from.system_pages);
    to.set_absent_pages(from.absent_pages);
    to.set_moving_pages(from.moving_pages);
    to.set_poisoned_pages(from.poisoned_pages);
    let mut list = to.init_device_pages(out_len("regions.devicePages", from.device_pages.len(), MAX_DEVICES)?);
    for (index, pages) in from.device_pages.iter().enumerate() {
        list.set(index as u32, *pages);
    }
    Ok(())
}

fn read_region_status(from: region_status::Reader<'_>) -> Result<RegionStatus, DecodeError> {
    let device_pages = from.get_device_pages()?;
    in_len("regions.devicePages", device_pages.len(), MAX_DEVICES)?;
    Ok(RegionStatus {
        space: from.get_space(),
        pid: from.get_pid(),
        region: from.get_region(),
        addr: from.get_addr(),
        page_count: from.get_page_count(),
        system_pages: from.get_system_pages(),
        absent_pages: from.get_absent_pages(),
        moving_pages: from.get_moving_pages(),
        poisoned_pages: from.get_poisoned_pages(),
        device_pages: device_pages.iter().collect(),
    })
}
