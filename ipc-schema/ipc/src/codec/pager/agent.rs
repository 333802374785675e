//! What the pager needs of a client's agent, and what it asks of the client about frames.

use uhmm_schema::pager_capnp::{agent_memory, agent_started, frames, frames_done, memory_file, region};

use crate::codec::error::DecodeError;
use crate::codec::fds::{FdSink, FdSource};
use crate::message::Fd;
use crate::message::pager::{AgentMemory, Call, Event, FramesOp, Memory};

pub(super) fn write_agent_memory(from: &AgentMemory, mut to: agent_memory::Builder<'_>, fds: &mut FdSink) {
    to.set_maps_fd(fds.put(&from.maps));
    to.set_pagemap_fd(fds.put(&from.pagemap));
    to.set_smaps_fd(fds.put(&from.smaps));
    to.set_staging_fd(fds.put(&from.staging));
    to.set_orders_fd(fds.put(&from.orders));
    to.set_done_fd(fds.put(&from.done));
    to.set_agent_fd(fds.put_optional(from.agent.as_ref()));
}

pub(super) fn read_agent_memory(
    from: agent_memory::Reader<'_>,
    fds: &mut FdSource,
) -> Result<AgentMemory, DecodeError> {
    Ok(AgentMemory {
        maps: fds.take("agent.mapsFd", from.get_maps_fd())?,
        pagemap: fds.take("agent.pagemapFd", from.get_pagemap_fd())?,
        smaps: fds.take("agent.smapsFd", from.get_smaps_fd())?,
        staging: fds.take("agent.stagingFd", from.get_staging_fd())?,
        orders: fds.take("agent.ordersFd", from.get_orders_fd())?,
        done: fds.take("agent.doneFd", from.get_done_fd())?,
        agent: fds.take_optional("agent.agentFd", from.get_agent_fd())?,
    })
}

pub(super) fn read_started(from: agent_started::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    Ok(Call::AgentStarted { agent: fds.take_optional("agentStarted.agentFd", from.get_agent_fd())? })
}

pub(super) fn read_done(from: frames_done::Reader<'_>) -> Call {
    Call::FramesDone { id: from.get_id(), done: from.get_done() }
}

pub(super) fn write_frames(from: &Event, mut to: frames::Builder<'_>) {
    let Event::Frames { id, region, first_page, addr, page_count, op } = from else { return };
    to.set_id(*id);
    to.set_region(*region);
    to.set_first_page(*first_page);
    to.set_addr(*addr);
    to.set_page_count(*page_count);
    let mut to = to.init_op();
    match op {
        FramesOp::MapDevice { device, frame, generation } => {
            let mut to = to.init_map_device();
            to.set_device(*device);
            to.set_frame(*frame);
            to.set_generation(*generation);
        }
        FramesOp::UnmapDevice => to.set_unmap_device(()),
    }
}

pub(super) fn read_frames(from: frames::Reader<'_>) -> Result<Event, DecodeError> {
    let op = match from.get_op().which()? {
        frames::op::MapDevice(from) => {
            let from = from?;
            let (device, frame, generation) = (from.get_device(), from.get_frame(), from.get_generation());
            FramesOp::MapDevice { device, frame, generation }
        }
        frames::op::UnmapDevice(()) => FramesOp::UnmapDevice,
    };
    Ok(Event::Frames {
        id: from.get_id(),
        region: from.get_region(),
        first_page: from.get_first_page(),
        addr: from.get_addr(),
        page_count: from.get_page_count(),
        op,
    })
}

pub(super) fn write_memory(from: &Memory, mut to: region::memory::Builder<'_>, fds: &mut FdSink) {
    let file = |mut to: memory_file::Builder<'_>, file: &Fd, offset_bytes: u64, fds: &mut FdSink| {
        to.set_file_fd(fds.put(file));
        to.set_offset_bytes(offset_bytes);
    };
    match from {
        Memory::Private => to.set_private(()),
        Memory::Sealed { memory, offset_bytes } => file(to.init_sealed(), memory, *offset_bytes, fds),
        Memory::File { file: of, offset_bytes } => file(to.init_file(), of, *offset_bytes, fds),
    }
}

pub(super) fn read_memory(from: region::memory::Reader<'_>, fds: &mut FdSource) -> Result<Memory, DecodeError> {
    Ok(match from.which()? {
        region::memory::Private(()) => Memory::Private,
        region::memory::Sealed(from) => {
            let from = from?;
            let memory = fds.take("region.memory.sealed", from.get_file_fd())?;
            Memory::Sealed { memory, offset_bytes: from.get_offset_bytes() }
        }
        region::memory::File(from) => {
            let from = from?;
            let file = fds.take("region.memory.file", from.get_file_fd())?;
            Memory::File { file, offset_bytes: from.get_offset_bytes() }
        }
    })
}
