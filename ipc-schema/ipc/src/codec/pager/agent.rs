//! What the pager asks of a client's agent, and what comes back.

use uhmm_schema::pager_capnp::{
    self as schema, MAX_AGENT_RUNS, agent, agent_done, agent_memory, agent_run, memory_file, region,
};

use crate::codec::error::{DecodeError, EncodeError};
use crate::codec::fds::{FdSink, FdSource};
use crate::codec::limits::{in_len, out_len};
use crate::message::Fd;
use crate::message::pager::{AgentMemory, AgentOp, AgentRun, AgentStatus, Call, Event, Memory};

pub(super) fn write_agent_memory(from: &AgentMemory, mut to: agent_memory::Builder<'_>, fds: &mut FdSink) {
    to.set_maps_fd(fds.put(&from.maps));
    to.set_staging_fd(fds.put(&from.staging));
}

pub(super) fn read_agent_memory(
    from: agent_memory::Reader<'_>,
    fds: &mut FdSource,
) -> Result<AgentMemory, DecodeError> {
    let maps = fds.take("agent.mapsFd", from.get_maps_fd())?;
    let staging = fds.take("agent.stagingFd", from.get_staging_fd())?;
    Ok(AgentMemory { maps, staging })
}

pub(super) fn write_done(id: u64, runs: &[AgentRun], mut to: agent_done::Builder<'_>) -> Result<(), EncodeError> {
    to.set_id(id);
    let mut list = to.init_runs(out_len("agentDone.runs", runs.len(), MAX_AGENT_RUNS)?);
    for (index, run) in runs.iter().enumerate() {
        let mut to = list.reborrow().get(index as u32);
        to.set_page_count(run.page_count);
        to.set_status(match run.status {
            AgentStatus::Moved => schema::AgentStatus::Moved,
            AgentStatus::MovedHuge => schema::AgentStatus::MovedHuge,
            AgentStatus::Zero => schema::AgentStatus::Zero,
            AgentStatus::Busy => schema::AgentStatus::Busy,
            AgentStatus::Gone => schema::AgentStatus::Gone,
            AgentStatus::ReadOnly => schema::AgentStatus::ReadOnly,
            AgentStatus::Failed => schema::AgentStatus::Failed,
        });
    }
    Ok(())
}

pub(super) fn read_done(from: agent_done::Reader<'_>) -> Result<Call, DecodeError> {
    let list = from.get_runs()?;
    in_len("agentDone.runs", list.len(), MAX_AGENT_RUNS)?;
    let run = |from: agent_run::Reader<'_>| -> Result<AgentRun, DecodeError> {
        let status = match from.get_status()? {
            schema::AgentStatus::Moved => AgentStatus::Moved,
            schema::AgentStatus::MovedHuge => AgentStatus::MovedHuge,
            schema::AgentStatus::Zero => AgentStatus::Zero,
            schema::AgentStatus::Busy => AgentStatus::Busy,
            schema::AgentStatus::Gone => AgentStatus::Gone,
            schema::AgentStatus::ReadOnly => AgentStatus::ReadOnly,
            schema::AgentStatus::Failed => AgentStatus::Failed,
        };
        Ok(AgentRun { page_count: from.get_page_count(), status })
    };
    let runs = list.iter().map(run).collect::<Result<_, _>>()?;
    Ok(Call::AgentDone { id: from.get_id(), runs })
}

pub(super) fn write_order(from: &Event, mut to: agent::Builder<'_>) {
    let Event::Agent { id, region, first_page, addr, page_count, op } = from else { return };
    to.set_id(*id);
    to.set_region(*region);
    to.set_first_page(*first_page);
    to.set_addr(*addr);
    to.set_page_count(*page_count);
    let mut to = to.init_op();
    match op {
        AgentOp::MoveOut { slot } => to.set_move_out(*slot),
        AgentOp::CopyOut { slot } => to.set_copy_out(*slot),
        AgentOp::Drop { in_place } => to.set_drop(*in_place),
        AgentOp::MoveBack => to.set_move_back(()),
        AgentOp::FillHuge { slot } => to.set_fill_huge(*slot),
        AgentOp::Probe => to.set_probe(()),
        AgentOp::MapDevice { device, frame, generation } => {
            let mut to = to.init_map_device();
            to.set_device(*device);
            to.set_frame(*frame);
            to.set_generation(*generation);
        }
        AgentOp::UnmapDevice => to.set_unmap_device(()),
    }
}

pub(super) fn read_order(from: agent::Reader<'_>) -> Result<Event, DecodeError> {
    let op = match from.get_op().which()? {
        agent::op::MoveOut(slot) => AgentOp::MoveOut { slot },
        agent::op::CopyOut(slot) => AgentOp::CopyOut { slot },
        agent::op::Drop(in_place) => AgentOp::Drop { in_place },
        agent::op::MoveBack(()) => AgentOp::MoveBack,
        agent::op::FillHuge(slot) => AgentOp::FillHuge { slot },
        agent::op::Probe(()) => AgentOp::Probe,
        agent::op::MapDevice(from) => {
            let from = from?;
            let (device, frame, generation) = (from.get_device(), from.get_frame(), from.get_generation());
            AgentOp::MapDevice { device, frame, generation }
        }
        agent::op::UnmapDevice(()) => AgentOp::UnmapDevice,
    };
    Ok(Event::Agent {
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
