//! Pager interface: calls and events. Answers, and the types that the mirror shares, are in [`runs`].

use uhmm_schema::pager_capnp::{call, driver_login, event, migrate, resolve};
use uhmm_schema::sdk_capnp::{self as sdk, MAX_TOKEN_BYTES, target};

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::limits::{in_data, out_data};
use crate::message::Fd;
use crate::message::pager::{Advice, Call, CopyRing, Event, Target};

mod runs;

pub(super) use runs::{read_map_runs, read_region, read_reply, write_map_runs, write_region, write_reply};

pub(super) fn write_call(from: &Call, mut to: call::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Call::OpenSpace { nonce, uffd, full } => {
            let mut to = to.init_open_space();
            to.set_nonce(*nonce);
            to.set_uffd_fd(fds.put(uffd));
            to.set_full(*full);
        }
        Call::AttachSpace { space, token } => {
            let mut to = to.init_attach_space();
            to.set_space(*space);
            to.set_token(out_data("attachSpace.token", token, MAX_TOKEN_BYTES)?);
        }
        Call::CloseSpace => to.set_close_space(()),
        Call::CreateRegion { addr, len_bytes, memory } => {
            let mut to = to.init_create_region();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_memory_fd(fds.put(memory));
        }
        Call::FreeRegion { region } => to.init_free_region().set_region(*region),
        Call::Migrate { addr, len_bytes, target } => write_migrate(*addr, *len_bytes, *target, to.init_migrate()),
        Call::Query { addr, len_bytes } => {
            let mut to = to.init_query();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
        }
        Call::Advise { addr, len_bytes, advice } => {
            let mut to = to.init_advise();
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_advice(advice_to_wire(*advice));
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
        Call::ListRegions => to.set_list_regions(()),
    }
    Ok(())
}

fn write_migrate(addr: u64, len_bytes: u64, target: Target, mut to: migrate::Builder<'_>) {
    to.set_addr(addr);
    to.set_len_bytes(len_bytes);
    let mut to = to.init_target();
    match target {
        Target::Home => to.set_home(()),
        Target::Device(device) => to.set_device(device),
    }
}

fn write_resolve(from: &Call, mut to: resolve::Builder<'_>) {
    if let Call::Resolve { space, region, first_page, page_count, fault_page, device, write } = from {
        to.set_space(*space);
        to.set_region(*region);
        to.set_first_page(*first_page);
        to.set_page_count(*page_count);
        to.set_fault_page(*fault_page);
        to.set_device(*device);
        to.set_write(*write);
    }
}

fn write_driver_memory(
    aperture: Option<&Fd>,
    gate: Option<&Fd>,
    copy_ring: Option<&CopyRing>,
    mut to: driver_login::Builder<'_>,
    fds: &mut FdSink,
) {
    to.set_aperture_fd(fds.put_optional(aperture));
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
            Call::OpenSpace { nonce: from.get_nonce(), uffd, full: from.get_full() }
        }
        call::AttachSpace(from) => {
            let from = from?;
            let token = in_data("attachSpace.token", from.get_token(), MAX_TOKEN_BYTES)?;
            Call::AttachSpace { space: from.get_space(), token }
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
            Call::Migrate { addr: from.get_addr(), len_bytes: from.get_len_bytes(), target }
        }
        call::Query(from) => {
            let from = from?;
            Call::Query { addr: from.get_addr(), len_bytes: from.get_len_bytes() }
        }
        call::Advise(from) => {
            let from = from?;
            let advice = advice_from_wire(from.get_advice()?);
            Call::Advise { addr: from.get_addr(), len_bytes: from.get_len_bytes(), advice }
        }
        call::DriverLogin(from) => read_driver_login(from?, fds)?,
        call::AttachTable(from) => {
            let from = from?;
            let table = fds.take("attachTable.tableFd", from.get_table_fd())?;
            Call::AttachTable { space: from.get_space(), region: from.get_region(), table }
        }
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
        call::ListRegions(()) => Call::ListRegions,
    })
}

fn read_target(from: target::Reader<'_>) -> Result<Target, DecodeError> {
    Ok(match from.which()? {
        target::Home(()) => Target::Home,
        target::Device(device) => Target::Device(device),
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
    }
}

fn read_driver_login(from: driver_login::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    let aperture = fds.take_optional("driverLogin.apertureFd", from.get_aperture_fd())?;
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

fn advice_to_wire(advice: Advice) -> sdk::Advice {
    match advice {
        Advice::Pin => sdk::Advice::Pin,
        Advice::Unpin => sdk::Advice::Unpin,
        Advice::InPlace => sdk::Advice::InPlace,
        Advice::MigrateOnFault => sdk::Advice::MigrateOnFault,
        Advice::DeviceReadOnly => sdk::Advice::DeviceReadOnly,
        Advice::DeviceReadWrite => sdk::Advice::DeviceReadWrite,
    }
}

fn advice_from_wire(advice: sdk::Advice) -> Advice {
    match advice {
        sdk::Advice::Pin => Advice::Pin,
        sdk::Advice::Unpin => Advice::Unpin,
        sdk::Advice::InPlace => Advice::InPlace,
        sdk::Advice::MigrateOnFault => Advice::MigrateOnFault,
        sdk::Advice::DeviceReadOnly => Advice::DeviceReadOnly,
        sdk::Advice::DeviceReadWrite => Advice::DeviceReadWrite,
    }
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
    })
}
