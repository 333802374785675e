//! Pager interface: calls and events. Answers, and the types that the mirror shares, are in [`runs`].

use uhmm_schema::pager_capnp::{MAX_CLAIM_ID_BYTES, call, driver_login, event, range, resolve};
use uhmm_schema::sdk_capnp::MAX_TOKEN_BYTES;

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::limits::{in_data, in_text, out_data, out_text};
use crate::message::pager::{Call, CopyRing, Emptied, Event, Only, Rest};
use crate::message::{Aperture, Fd};

mod agent;
mod claims;
mod places;
mod runs;

use agent::{read_agent_memory, read_done, read_frames, read_started, write_agent_memory, write_frames};
use claims::{read_claim, write_claim};
use places::{
    point_from_wire, point_to_wire, read_advice, read_only, read_target, write_advice, write_only, write_target,
};

pub(super) use runs::{read_map_runs, read_region, read_reply, write_map_runs, write_region, write_reply};

pub(super) fn write_call(from: &Call, mut to: call::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Call::OpenSpace { nonce, uffd, full, sentinel_addr, agent, claim } => {
            let mut to = to.init_open_space();
            to.set_nonce(*nonce);
            to.set_uffd_fd(fds.put(uffd));
            to.set_full(*full);
            to.set_sentinel_addr(*sentinel_addr);
            to.set_claim(out_data("openSpace.claim", claim, MAX_TOKEN_BYTES)?);
            write_agent_memory(agent, to.init_agent(), fds);
        }
        Call::AttachSpace { space, token, agent } => {
            let mut to = to.init_attach_space();
            to.set_space(*space);
            to.set_token(out_data("attachSpace.token", token, MAX_TOKEN_BYTES)?);
            if let Some(agent) = agent {
                write_agent_memory(agent, to.init_agent(), fds);
            }
        }
        Call::CloseSpace => to.set_close_space(()),
        Call::CreateRegion { addr, len_bytes, memory } => {
            let mut to = to.init_create_region();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_memory_fd(fds.put(memory));
        }
        Call::FreeRegion { region } => to.init_free_region().set_region(*region),
        Call::Migrate { addr, len_bytes, target, prefetch, only } => {
            let mut to = to.init_migrate();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_prefetch(*prefetch);
            write_target(*target, to.reborrow().init_target());
            write_only(*only, to.init_only());
        }
        Call::Query { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_query()),
        Call::AdoptRegion { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_adopt_region()),
        Call::ReleaseRange { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_release_range()),
        Call::Discard { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_discard()),
        Call::ProtectionChanged { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_protection_changed()),
        Call::Revalidate { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_revalidate()),
        Call::QueryAttributes { addr, len_bytes } => write_range(*addr, *len_bytes, to.init_query_attributes()),
        Call::AttachFile { addr, len_bytes, file, offset_bytes } => {
            let mut to = to.init_attach_file();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_file_fd(fds.put(file));
            to.set_offset_bytes(*offset_bytes);
        }
        Call::HotRanges { device } => to.init_hot_ranges().set_device(*device),
        Call::Evict { device, page_count } => {
            let mut to = to.init_evict();
            to.set_device(*device);
            to.set_page_count(*page_count);
        }
        Call::ReadTrace { since } => to.init_read_trace().set_since(*since),
        Call::Inject { point, nth } => {
            let mut to = to.init_inject();
            to.set_point(point_to_wire(*point));
            to.set_nth(*nth);
        }
        Call::FramesDone { id, done } => {
            let mut to = to.init_frames_done();
            to.set_id(*id);
            to.set_done(*done);
        }
        Call::AgentStarted { agent } => to.init_agent_started().set_agent_fd(fds.put_optional(agent.as_ref())),
        Call::Advise { addr, len_bytes, advice } => {
            let mut to = to.init_advise();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            write_advice(*advice, to.init_advice())?;
        }
        Call::DriverLogin { device, generation, frame_count, aperture, gate, copy_ring } => {
            let mut to = to.init_driver_login();
            to.set_device(*device);
            to.set_generation(*generation);
            to.set_frame_count(*frame_count);
            write_driver_memory(aperture.as_ref(), gate.as_ref(), copy_ring.as_ref(), to, fds);
        }
        Call::AttachTable { space, region, table } => {
            let mut to = to.init_attach_table();
            to.set_space(*space);
            to.set_region(*region);
            to.set_table_fd(fds.put(table));
        }
        Call::DeviceLost { device } => to.set_device_lost(*device),
        Call::MirrorLogin => to.set_mirror_login(()),
        Call::OpenMirror { space, token, device } => {
            let mut to = to.init_open_mirror();
            to.set_space(*space);
            to.set_token(out_data("openMirror.token", token, MAX_TOKEN_BYTES)?);
            to.set_device(*device);
        }
        Call::CloseMirror { space, device } => {
            let mut to = to.init_close_mirror();
            to.set_space(*space);
            to.set_device(*device);
        }
        Call::Lookup { space, addr } => {
            let mut to = to.init_lookup();
            to.set_space(*space);
            to.set_addr(*addr);
        }
        Call::Resolve { .. } => write_resolve(from, to.init_resolve()),
        Call::InvalidateDone { id, late_mask } => {
            let mut to = to.init_invalidate_done();
            to.set_id(*id);
            to.set_late_mask(*late_mask);
        }
        Call::Home { pid, stay, process } => {
            let mut to = to.init_home();
            to.set_pid(*pid);
            to.set_stay(*stay);
            to.set_process(*process);
        }
        Call::UserfaultfdDevice => to.set_userfaultfd_device(()),
        Call::EmptyDevice { device, then } => to.set_empty_device(emptied_device(*device, *then)?),
        Call::ListRegions => to.set_list_regions(()),
        Call::Strip { region, cells } => {
            let mut to = to.init_strip();
            to.set_region(*region);
            to.set_cells(*cells);
        }
        Call::MoveRange { pid, process, addr, len_bytes, target, rest } => {
            let mut to = to.init_move_range();
            to.set_rest_ms(rest.map_or(0, |rest| rest.ms));
            to.set_stays(rest.is_some_and(|rest| rest.stays));
            to.set_pid(*pid);
            to.set_process(*process);
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            write_target(*target, to.init_target());
        }
        Call::MoveRegion { region, target } => {
            let mut to = to.init_move_region();
            to.set_region(*region);
            write_target(*target, to.init_target());
        }
        Call::SetClaim(claim) => write_claim(claim, to.init_set_claim())?,
        Call::RemoveClaim { id } => to.set_remove_claim(out_text("removeClaim", id, MAX_CLAIM_ID_BYTES)?),
        Call::ListClaims { after } => to.set_list_claims(out_text("listClaims", after, MAX_CLAIM_ID_BYTES)?),
    }
    Ok(())
}

/// Numbers of devices are below.
const CLOSED: u8 = 0x40;
const OPENED: u8 = 0x80;

fn emptied_device(device: u8, then: Emptied) -> Result<u8, EncodeError> {
    if device >= CLOSED {
        return Err(EncodeError::Value { field: "emptyDevice", value: u64::from(device) });
    }
    Ok(device
        | match then {
            Emptied::Unchanged => 0,
            Emptied::Closed => CLOSED,
            Emptied::Opened => OPENED,
        })
}

fn read_emptied(number: u8) -> Result<(u8, Emptied), DecodeError> {
    let then = match number & (CLOSED | OPENED) {
        0 => Emptied::Unchanged,
        CLOSED => Emptied::Closed,
        OPENED => Emptied::Opened,
        _ => return Err(DecodeError::Value { field: "emptyDevice", value: u64::from(number) }),
    };
    Ok((number & !(CLOSED | OPENED), then))
}

fn write_range(addr: u64, len_bytes: u64, mut to: range::Builder<'_>) {
    to.set_addr(addr);
    to.set_len_bytes(len_bytes);
}

fn read_range(from: range::Reader<'_>) -> (u64, u64) {
    (from.get_addr(), from.get_len_bytes())
}

fn write_resolve(from: &Call, mut to: resolve::Builder<'_>) {
    if let Call::Resolve { space, region, first_page, page_count, fault_page, device, write, whole, exclusive } = from {
        to.set_space(*space);
        to.set_region(*region);
        to.set_first_page(*first_page);
        to.set_page_count(*page_count);
        to.set_fault_page(*fault_page);
        to.set_device(*device);
        to.set_write(*write);
        to.set_whole(*whole);
        to.set_exclusive(*exclusive);
    }
}

fn write_driver_memory(
    aperture: Option<&Aperture>,
    gate: Option<&Fd>,
    copy_ring: Option<&CopyRing>,
    mut to: driver_login::Builder<'_>,
    fds: &mut FdSink,
) {
    to.set_aperture_fd(fds.put_optional(aperture.map(|aperture| &aperture.fd)));
    to.set_aperture_offset(aperture.map_or(0, |aperture| aperture.offset_bytes));
    to.set_gate_fd(fds.put_optional(gate));
    if let Some(CopyRing { ring, submit, complete, staging }) = copy_ring {
        let mut to = to.init_copy_ring();
        to.set_ring_fd(fds.put(ring));
        to.set_submit_fd(fds.put(submit));
        to.set_complete_fd(fds.put(complete));
        to.set_staging_fd(fds.put(staging));
    }
}

pub(super) fn read_call(from: call::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    Ok(match from.which()? {
        call::OpenSpace(from) => {
            let from = from?;
            let uffd = fds.take("openSpace.uffdFd", from.get_uffd_fd())?;
            let agent = read_agent_memory(from.get_agent()?, fds)?;
            let (nonce, full, sentinel_addr) = (from.get_nonce(), from.get_full(), from.get_sentinel_addr());
            let claim = in_data("openSpace.claim", from.get_claim(), MAX_TOKEN_BYTES)?;
            Call::OpenSpace { nonce, uffd, full, sentinel_addr, agent, claim }
        }
        call::AttachSpace(from) => {
            let from = from?;
            let token = in_data("attachSpace.token", from.get_token(), MAX_TOKEN_BYTES)?;
            let agent = from.has_agent().then(|| read_agent_memory(from.get_agent()?, fds)).transpose()?;
            Call::AttachSpace { space: from.get_space(), token, agent }
        }
        call::CloseSpace(()) => Call::CloseSpace,
        call::CreateRegion(from) => {
            let from = from?;
            let memory = fds.take("createRegion.memoryFd", from.get_memory_fd())?;
            Call::CreateRegion { addr: from.get_addr(), len_bytes: from.get_len_bytes(), memory }
        }
        call::FreeRegion(from) => Call::FreeRegion { region: from?.get_region() },
        call::Migrate(from) => {
            let from = from?;
            let target = read_target(from.get_target()?)?;
            let (addr, len_bytes, prefetch) = (from.get_addr(), from.get_len_bytes(), from.get_prefetch());
            let only = if from.has_only() { read_only(from.get_only()?)? } else { Only::All };
            Call::Migrate { addr, len_bytes, target, prefetch, only }
        }
        call::Query(_)
        | call::AdoptRegion(_)
        | call::ReleaseRange(_)
        | call::Discard(_)
        | call::ProtectionChanged(_)
        | call::Revalidate(_)
        | call::QueryAttributes(_) => read_ranged_call(from)?,
        call::AttachFile(from) => {
            let from = from?;
            let file = fds.take("attachFile.fileFd", from.get_file_fd())?;
            let (addr, len_bytes, offset_bytes) = (from.get_addr(), from.get_len_bytes(), from.get_offset_bytes());
            Call::AttachFile { addr, len_bytes, file, offset_bytes }
        }
        call::Evict(from) => {
            let from = from?;
            Call::Evict { device: from.get_device(), page_count: from.get_page_count() }
        }
        call::HotRanges(from) => Call::HotRanges { device: from?.get_device() },
        call::ReadTrace(from) => Call::ReadTrace { since: from?.get_since() },
        call::Inject(from) => {
            let from = from?;
            Call::Inject { point: point_from_wire(from.get_point()?), nth: from.get_nth() }
        }
        call::FramesDone(from) => read_done(from?),
        call::AgentStarted(from) => read_started(from?, fds)?,
        call::Advise(from) => {
            let from = from?;
            let advice = read_advice(from.get_advice()?)?;
            Call::Advise { addr: from.get_addr(), len_bytes: from.get_len_bytes(), advice }
        }
        call::DriverLogin(from) => read_driver_login(from?, fds)?,
        call::AttachTable(from) => {
            let from = from?;
            let table = fds.take("attachTable.tableFd", from.get_table_fd())?;
            Call::AttachTable { space: from.get_space(), region: from.get_region(), table }
        }
        call::DeviceLost(device) => Call::DeviceLost { device },
        call::MirrorLogin(()) => Call::MirrorLogin,
        call::OpenMirror(from) => {
            let from = from?;
            let token = in_data("openMirror.token", from.get_token(), MAX_TOKEN_BYTES)?;
            Call::OpenMirror { space: from.get_space(), token, device: from.get_device() }
        }
        call::CloseMirror(from) => {
            let from = from?;
            Call::CloseMirror { space: from.get_space(), device: from.get_device() }
        }
        call::Lookup(from) => {
            let from = from?;
            Call::Lookup { space: from.get_space(), addr: from.get_addr() }
        }
        call::Resolve(from) => read_resolve(from?),
        call::InvalidateDone(from) => {
            let from = from?;
            Call::InvalidateDone { id: from.get_id(), late_mask: from.get_late_mask() }
        }
        call::Home(from) => {
            let from = from?;
            Call::Home { pid: from.get_pid(), stay: from.get_stay(), process: from.get_process() }
        }
        call::UserfaultfdDevice(()) => Call::UserfaultfdDevice,
        call::EmptyDevice(number) => {
            let (device, then) = read_emptied(number)?;
            Call::EmptyDevice { device, then }
        }
        call::ListRegions(()) => Call::ListRegions,
        call::Strip(from) => {
            let from = from?;
            Call::Strip { region: from.get_region(), cells: from.get_cells() }
        }
        call::MoveRange(from) => {
            let from = from?;
            let (addr, len_bytes, target) = (from.get_addr(), from.get_len_bytes(), read_target(from.get_target()?)?);
            let (pid, process, ms) = (from.get_pid(), from.get_process(), from.get_rest_ms());
            let rest = (ms > 0).then_some(Rest { ms, stays: from.get_stays() });
            Call::MoveRange { pid, process, addr, len_bytes, target, rest }
        }
        call::MoveRegion(from) => {
            let from = from?;
            Call::MoveRegion { region: from.get_region(), target: read_target(from.get_target()?)? }
        }
        call::SetClaim(from) => Call::SetClaim(read_claim(from?)?),
        call::RemoveClaim(id) => Call::RemoveClaim { id: in_text("removeClaim", id, MAX_CLAIM_ID_BYTES)? },
        call::ListClaims(after) => Call::ListClaims { after: in_text("listClaims", after, MAX_CLAIM_ID_BYTES)? },
    })
}

/// Calls that are a range and nothing else.
fn read_ranged_call(from: call::Reader<'_>) -> Result<Call, DecodeError> {
    Ok(match from.which()? {
        call::AdoptRegion(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::AdoptRegion { addr, len_bytes }
        }
        call::ReleaseRange(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::ReleaseRange { addr, len_bytes }
        }
        call::Discard(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::Discard { addr, len_bytes }
        }
        call::ProtectionChanged(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::ProtectionChanged { addr, len_bytes }
        }
        call::Revalidate(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::Revalidate { addr, len_bytes }
        }
        call::QueryAttributes(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::QueryAttributes { addr, len_bytes }
        }
        call::Query(from) => {
            let (addr, len_bytes) = read_range(from?);
            Call::Query { addr, len_bytes }
        }
        _ => return Err(DecodeError::NoSuchBody { kind: "ranged call", interface: "pager" }),
    })
}

fn read_resolve(from: resolve::Reader<'_>) -> Call {
    Call::Resolve {
        space: from.get_space(),
        region: from.get_region(),
        first_page: from.get_first_page(),
        page_count: from.get_page_count(),
        fault_page: from.get_fault_page(),
        device: from.get_device(),
        write: from.get_write(),
        whole: from.get_whole(),
        exclusive: from.get_exclusive(),
    }
}

fn read_driver_login(from: driver_login::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    let aperture = fds.take_optional("driverLogin.apertureFd", from.get_aperture_fd())?;
    let aperture = aperture.map(|fd| Aperture { fd, offset_bytes: from.get_aperture_offset() });
    let gate = fds.take_optional("driverLogin.gateFd", from.get_gate_fd())?;
    let copy_ring = if from.has_copy_ring() {
        let from = from.get_copy_ring()?;
        Some(CopyRing {
            ring: fds.take("copyRing.ringFd", from.get_ring_fd())?,
            submit: fds.take("copyRing.submitFd", from.get_submit_fd())?,
            complete: fds.take("copyRing.completeFd", from.get_complete_fd())?,
            staging: fds.take("copyRing.stagingFd", from.get_staging_fd())?,
        })
    } else {
        None
    };
    Ok(Call::DriverLogin {
        device: from.get_device(),
        generation: from.get_generation(),
        frame_count: from.get_frame_count(),
        aperture,
        gate,
        copy_ring,
    })
}

pub(super) fn write_event(from: &Event, to: event::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Event::Invalidate { id, space, region, first_page, page_count, device_mask, unmap, deadline_ms } => {
            let mut to = to.init_invalidate();
            to.set_id(*id);
            to.set_space(*space);
            to.set_region(*region);
            to.set_first_page(*first_page);
            to.set_page_count(*page_count);
            to.set_device_mask(*device_mask);
            to.set_unmap(*unmap);
            to.set_deadline_ms(*deadline_ms);
        }
        Event::DeviceVoid { device } => to.init_device_void().set_device(*device),
        Event::SpaceGone { space } => to.init_space_gone().set_space(*space),
        Event::Frames { .. } => write_frames(from, to.init_frames()),
    }
    Ok(())
}

pub(super) fn read_event(from: event::Reader<'_>) -> Result<Event, DecodeError> {
    Ok(match from.which()? {
        event::Invalidate(from) => {
            let from = from?;
            Event::Invalidate {
                id: from.get_id(),
                space: from.get_space(),
                region: from.get_region(),
                first_page: from.get_first_page(),
                page_count: from.get_page_count(),
                device_mask: from.get_device_mask(),
                unmap: from.get_unmap(),
                deadline_ms: from.get_deadline_ms(),
            }
        }
        event::DeviceVoid(from) => Event::DeviceVoid { device: from?.get_device() },
        event::SpaceGone(from) => Event::SpaceGone { space: from?.get_space() },
        event::Frames(from) => read_frames(from?)?,
    })
}
