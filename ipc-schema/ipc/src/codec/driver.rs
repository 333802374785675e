//! Driver interface.

use capnp::{primitive_list, struct_list};
use uhmm_schema::common_capnp::{MAX_NAME_BYTES, MAX_TEXT_BYTES};
use uhmm_schema::driver_capnp::{access, call, job_range, reply};
use uhmm_schema::sdk_capnp::{MAX_JOB_RANGES, MAX_JOB_WORDS, MAX_KERNELS, MAX_TOKEN_BYTES};

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::limits::{in_data, in_len, in_text, out_data, out_len, out_text};
use crate::message::Aperture;
use crate::message::driver::{AccessOp, Call, CoherentMemory, JobRange, Reply};

pub(super) fn write_call(from: &Call, mut to: call::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Call::Info => to.set_info(()),
        Call::OpenQueue { space, token } => {
            let mut to = to.init_open_queue();
            to.set_space(*space);
            to.set_token(out_data("openQueue.token", token, MAX_TOKEN_BYTES)?);
        }
        Call::Submit { space, kernel, args, idempotent, ranges } => {
            let mut to = to.init_submit();
            to.set_space(*space);
            to.set_kernel(out_text("submit.kernel", kernel, MAX_NAME_BYTES)?);
            to.set_idempotent(*idempotent);
            write_words(args, to.reborrow().init_args(out_len("submit.args", args.len(), MAX_JOB_WORDS)?));
            let mut list = to.init_ranges(out_len("submit.ranges", ranges.len(), MAX_JOB_RANGES)?);
            for (index, range) in ranges.iter().enumerate() {
                let mut to = list.reborrow().get(index as u32);
                to.set_addr(range.addr);
                to.set_len_bytes(range.len_bytes);
                to.set_write(range.write);
            }
        }
        Call::Access { space, addr, len_bytes, op, buffer } => {
            let mut to = to.init_access();
            to.set_space(*space);
            to.set_addr(*addr);
            to.set_len_bytes(*len_bytes);
            to.set_buffer_fd(fds.put_optional(buffer.as_ref()));
            let mut to = to.init_op();
            match op {
                AccessOp::Read => to.set_read(()),
                AccessOp::Write => to.set_write(()),
                AccessOp::FetchAdd(value) => to.set_fetch_add(*value),
                AccessOp::MakeExclusive => to.set_make_exclusive(()),
                AccessOp::Map => to.set_map(()),
                AccessOp::Peek => to.set_peek(()),
                AccessOp::MapForWrite => to.set_map_for_write(()),
            }
        }
    }
    Ok(())
}

pub(super) fn read_call(from: call::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    Ok(match from.which()? {
        call::Info(()) => Call::Info,
        call::OpenQueue(from) => {
            let from = from?;
            Call::OpenQueue {
                space: from.get_space(),
                token: in_data("openQueue.token", from.get_token(), MAX_TOKEN_BYTES)?,
            }
        }
        call::Submit(from) => {
            let from = from?;
            Call::Submit {
                space: from.get_space(),
                kernel: in_text("submit.kernel", from.get_kernel(), MAX_NAME_BYTES)?,
                args: read_words("submit.args", from.get_args()?)?,
                idempotent: from.get_idempotent(),
                ranges: read_ranges(from.get_ranges()?)?,
            }
        }
        call::Access(from) => {
            let from = from?;
            let op = match from.get_op().which()? {
                access::op::Read(()) => AccessOp::Read,
                access::op::Write(()) => AccessOp::Write,
                access::op::FetchAdd(value) => AccessOp::FetchAdd(value),
                access::op::MakeExclusive(()) => AccessOp::MakeExclusive,
                access::op::Map(()) => AccessOp::Map,
                access::op::Peek(()) => AccessOp::Peek,
                access::op::MapForWrite(()) => AccessOp::MapForWrite,
            };
            let buffer = fds.take_optional("access.bufferFd", from.get_buffer_fd())?;
            let (space, addr, len_bytes) = (from.get_space(), from.get_addr(), from.get_len_bytes());
            Call::Access { space, addr, len_bytes, op, buffer }
        }
    })
}

pub(super) fn write_reply(from: &Reply, to: reply::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Reply::Info { driver, device, memory_bytes, aperture, coherent, kernels } => {
            let mut to = to.init_info();
            to.set_driver(out_text("info.driver", driver, MAX_NAME_BYTES)?);
            to.set_device(*device);
            to.set_memory_bytes(*memory_bytes);
            to.set_aperture(*aperture);
            to.set_coherent(*coherent);
            let mut list = to.init_kernels(out_len("info.kernels", kernels.len(), MAX_KERNELS)?);
            for (index, kernel) in kernels.iter().enumerate() {
                list.set(index as u32, out_text("info.kernels", kernel, MAX_TEXT_BYTES)?);
            }
        }
        Reply::Accessed { page_count, fault_count } => {
            let mut to = to.init_accessed();
            to.set_page_count(*page_count);
            to.set_fault_count(*fault_count);
        }
        Reply::QueueOpened { coherent } => {
            let mut to = to.init_queue_opened();
            to.set_memory_fd(fds.put_optional(coherent.as_ref().map(|coherent| &coherent.memory.fd)));
            if let Some(CoherentMemory { device, generation, memory }) = coherent {
                to.set_memory_offset(memory.offset_bytes);
                to.set_device(*device);
                to.set_generation(*generation);
            }
        }
        Reply::Finished { results, fault_count, run_time_ns } => {
            let mut to = to.init_finished();
            to.set_fault_count(*fault_count);
            to.set_run_time_ns(*run_time_ns);
            write_words(results, to.init_results(out_len("finished.results", results.len(), MAX_JOB_WORDS)?));
        }
    }
    Ok(())
}

pub(super) fn read_reply(from: reply::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    Ok(match from.which()? {
        reply::Info(from) => {
            let from = from?;
            let list = from.get_kernels()?;
            in_len("info.kernels", list.len(), MAX_KERNELS)?;
            Reply::Info {
                driver: in_text("info.driver", from.get_driver(), MAX_NAME_BYTES)?,
                device: from.get_device(),
                memory_bytes: from.get_memory_bytes(),
                aperture: from.get_aperture(),
                coherent: from.get_coherent(),
                kernels: list
                    .iter()
                    .map(|kernel| in_text("info.kernels", kernel, MAX_TEXT_BYTES))
                    .collect::<Result<_, _>>()?,
            }
        }
        reply::Accessed(from) => {
            let from = from?;
            Reply::Accessed { page_count: from.get_page_count(), fault_count: from.get_fault_count() }
        }
        reply::QueueOpened(from) => {
            let from = from?;
            let memory = fds.take_optional("queueOpened.memoryFd", from.get_memory_fd())?;
            let memory = memory.map(|fd| Aperture { fd, offset_bytes: from.get_memory_offset() });
            let (device, generation) = (from.get_device(), from.get_generation());
            Reply::QueueOpened { coherent: memory.map(|memory| CoherentMemory { device, generation, memory }) }
        }
        reply::Finished(from) => {
            let from = from?;
            Reply::Finished {
                results: read_words("finished.results", from.get_results()?)?,
                fault_count: from.get_fault_count(),
                run_time_ns: from.get_run_time_ns(),
            }
        }
    })
}

fn read_ranges(from: struct_list::Reader<'_, job_range::Owned>) -> Result<Vec<JobRange>, DecodeError> {
    in_len("submit.ranges", from.len(), MAX_JOB_RANGES)?;
    let range = |from: job_range::Reader<'_>| {
        let (addr, len_bytes, write) = (from.get_addr(), from.get_len_bytes(), from.get_write());
        JobRange { addr, len_bytes, write }
    };
    Ok(from.iter().map(range).collect())
}

fn write_words(from: &[u64], mut to: primitive_list::Builder<'_, u64>) {
    for (index, word) in from.iter().enumerate() {
        to.set(index as u32, *word);
    }
}

fn read_words(field: &'static str, from: primitive_list::Reader<'_, u64>) -> Result<Vec<u64>, DecodeError> {
    in_len(field, from.len(), MAX_JOB_WORDS)?;
    Ok(from.iter().collect())
}
