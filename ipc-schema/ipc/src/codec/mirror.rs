//! Mirror interface.

use uhmm_schema::mirror_capnp::{call, event, reply};
use uhmm_schema::sdk_capnp::MAX_TOKEN_BYTES;

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::limits::{in_data, out_data};
use super::pager::{read_map_runs, read_region, write_map_runs, write_region};
use crate::message::mirror::{Call, Event, Reply};

pub(super) fn write_call(from: &Call, to: call::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Call::Login { device } => to.init_login().set_device(*device),
        Call::Open { space, token } => {
            let mut to = to.init_open();
            to.set_space(*space);
            to.set_token(out_data("open.token", token, MAX_TOKEN_BYTES)?);
        }
        Call::Close { space } => to.init_close().set_space(*space),
        Call::Lookup { space, addr } => {
            let mut to = to.init_lookup();
            to.set_space(*space);
            to.set_addr(*addr);
        }
        Call::Fault { space, region, first_page, page_count, fault_page, write, whole, exclusive } => {
            let mut to = to.init_fault();
            to.set_space(*space);
            to.set_region(*region);
            to.set_first_page(*first_page);
            to.set_page_count(*page_count);
            to.set_fault_page(*fault_page);
            to.set_write(*write);
            to.set_whole(*whole);
            to.set_exclusive(*exclusive);
        }
        Call::Ack { id } => to.init_ack().set_id(*id),
    }
    Ok(())
}

pub(super) fn read_call(from: call::Reader<'_>) -> Result<Call, DecodeError> {
    Ok(match from.which()? {
        call::Login(from) => Call::Login { device: from?.get_device() },
        call::Open(from) => {
            let from = from?;
            Call::Open { space: from.get_space(), token: in_data("open.token", from.get_token(), MAX_TOKEN_BYTES)? }
        }
        call::Close(from) => Call::Close { space: from?.get_space() },
        call::Lookup(from) => {
            let from = from?;
            Call::Lookup { space: from.get_space(), addr: from.get_addr() }
        }
        call::Fault(from) => {
            let from = from?;
            Call::Fault {
                space: from.get_space(),
                region: from.get_region(),
                first_page: from.get_first_page(),
                page_count: from.get_page_count(),
                fault_page: from.get_fault_page(),
                write: from.get_write(),
                whole: from.get_whole(),
                exclusive: from.get_exclusive(),
            }
        }
        call::Ack(from) => Call::Ack { id: from?.get_id() },
    })
}

pub(super) fn write_reply(from: &Reply, mut to: reply::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Reply::Done => to.set_done(()),
        Reply::Region { region, addr, len_bytes, device_read_only, memory } => {
            write_region(to.init_region(), (*region, *addr, *len_bytes, *device_read_only), memory, fds);
        }
        Reply::Mapped { sequence, runs } => {
            let mut to = to.init_mapped();
            to.set_sequence(*sequence);
            write_map_runs(runs, |count| to.init_runs(count))?;
        }
    }
    Ok(())
}

pub(super) fn read_reply(from: reply::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    Ok(match from.which()? {
        reply::Done(()) => Reply::Done,
        reply::Region(from) => {
            let (region, addr, len_bytes, device_read_only, memory) = read_region(from?, fds)?;
            Reply::Region { region, addr, len_bytes, device_read_only, memory }
        }
        reply::Mapped(from) => {
            let from = from?;
            Reply::Mapped { sequence: from.get_sequence(), runs: read_map_runs(from.get_runs()?)? }
        }
    })
}

pub(super) fn write_event(from: &Event, to: event::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Event::Invalidate { id, space, region, first_page, page_count, unmap, sequence } => {
            let mut to = to.init_invalidate();
            to.set_id(*id);
            to.set_space(*space);
            to.set_region(*region);
            to.set_first_page(*first_page);
            to.set_page_count(*page_count);
            to.set_unmap(*unmap);
            to.set_sequence(*sequence);
        }
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
                unmap: from.get_unmap(),
                sequence: from.get_sequence(),
            }
        }
        event::SpaceGone(from) => Event::SpaceGone { space: from?.get_space() },
    })
}
