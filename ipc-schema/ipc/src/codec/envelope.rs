//! The envelope: one datagram, one message.

use std::os::fd::OwnedFd;

use capnp::any_pointer;
use capnp::message::{Builder, ReaderOptions, ScratchSpaceHeapAllocator};
use capnp::serialize;
use uhmm_schema::common_capnp::{self as common_schema, Interface as Scope, Kind, envelope};
use uhmm_schema::{driver_capnp, mirror_capnp, pager_capnp, supervisor_capnp};

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::{common, driver, mirror, pager, supervisor};
use crate::message::{Call, Event, Fd, Hello, Reply, TraceId, Welcome, WireError};

/// A message of a driver fits; larger ones take a second segment from the heap.
const SCRATCH_WORDS: usize = 256;
/// Envelope, body, method, list, element, text: nobody needs more.
const NESTING_LIMIT: i32 = 10;
/// Words that may be visited beyond twice the message itself.
const TRAVERSAL_SLACK_WORDS: usize = 64;

/// What every message carries beside its body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// Call that is made or answered, else 0.
    pub(crate) call_id: u64,
    pub(crate) trace: TraceId,
    /// Negotiated minor version.
    pub(crate) minor: u16,
    /// The sender's.
    pub(crate) incarnation: u32,
    /// 0: none.
    pub(crate) deadline_ms: u32,
}

/// A received message.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) body: FrameBody,
}

/// Its body.
#[derive(Debug)]
pub(crate) enum FrameBody {
    Hello(Hello),
    Welcome(Welcome),
    Call(Call),
    Reply(Reply),
    Error(WireError),
    Event(Event),
}

impl FrameBody {
    /// For logs.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            FrameBody::Hello(_) => "hello",
            FrameBody::Welcome(_) => "welcome",
            FrameBody::Call(_) => "call",
            FrameBody::Reply(_) => "reply",
            FrameBody::Error(_) => "error",
            FrameBody::Event(_) => "event",
        }
    }
}

/// A body to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BodyRef<'a> {
    Hello(&'a Hello),
    Welcome(&'a Welcome),
    Call(&'a Call),
    Reply(&'a Reply),
    Error(&'a WireError),
    Event(&'a Event),
}

/// A message that could not be read, and the call it was about if that much was readable (0 otherwise).
#[derive(Debug)]
pub(crate) struct Rejected {
    pub(crate) call_id: u64,
    pub(crate) why: DecodeError,
}

impl<E: Into<DecodeError>> From<E> for Rejected {
    fn from(why: E) -> Self {
        Self { call_id: 0, why: why.into() }
    }
}

/// Writes messages; owns every buffer that this needs.
pub(crate) struct Encoder {
    scratch: Vec<capnp::Word>,
    bytes: Vec<u8>,
    sink: FdSink,
}

impl Encoder {
    pub(crate) fn new() -> Self {
        Self { scratch: capnp::Word::allocate_zeroed_vec(SCRATCH_WORDS), bytes: Vec::new(), sink: FdSink::default() }
    }

    /// The message as bytes and descriptors, valid until the next call.
    pub(crate) fn encode(
        &mut self,
        header: Header,
        body: BodyRef<'_>,
        max_bytes: usize,
        max_fds: usize,
    ) -> Result<(&[u8], &[Fd]), EncodeError> {
        self.bytes.clear();
        self.sink.fds.clear();
        let mut allocator = ScratchSpaceHeapAllocator::new(capnp::Word::words_to_bytes_mut(&mut self.scratch));
        let mut message = Builder::new(&mut allocator);
        let mut root: envelope::Builder<'_> = message.init_root();
        root.set_call_id(header.call_id);
        root.set_trace_id(header.trace.0);
        root.set_interface_version(header.minor);
        root.set_incarnation(header.incarnation);
        root.set_deadline_ms(header.deadline_ms);
        let (kind, scope) = labels(body);
        root.set_kind(kind);
        root.set_interface(scope);
        write_body(body, root.reborrow().init_body(), &mut self.sink)?;
        let fd_count = self.sink.fds.len();
        if fd_count > max_fds {
            return Err(EncodeError::TooManyFds { fd_count, max_fds });
        }
        root.set_fd_count(fd_count as u16);
        serialize::write_message(&mut self.bytes, &message)?;
        if self.bytes.len() > max_bytes {
            return Err(EncodeError::TooLarge { len_bytes: self.bytes.len(), max_bytes });
        }
        Ok((&self.bytes, &self.sink.fds))
    }
}

fn labels(body: BodyRef<'_>) -> (Kind, Scope) {
    match body {
        BodyRef::Hello(_) => (Kind::Hello, Scope::Common),
        BodyRef::Welcome(_) => (Kind::Welcome, Scope::Common),
        BodyRef::Error(_) => (Kind::Error, Scope::Common),
        BodyRef::Call(call) => (
            Kind::Call,
            match call {
                Call::Common(_) => Scope::Common,
                Call::Supervisor(_) => Scope::Supervisor,
                Call::Pager(_) => Scope::Pager,
                Call::Mirror(_) => Scope::Mirror,
                Call::Driver(_) => Scope::Driver,
            },
        ),
        BodyRef::Reply(reply) => (
            Kind::Reply,
            match reply {
                Reply::Common(_) => Scope::Common,
                Reply::Supervisor(_) => Scope::Supervisor,
                Reply::Pager(_) => Scope::Pager,
                Reply::Mirror(_) => Scope::Mirror,
                Reply::Driver(_) => Scope::Driver,
            },
        ),
        BodyRef::Event(event) => (
            Kind::Event,
            match event {
                Event::Supervisor(_) => Scope::Supervisor,
                Event::Pager(_) => Scope::Pager,
                Event::Mirror(_) => Scope::Mirror,
            },
        ),
    }
}

fn write_body(body: BodyRef<'_>, to: any_pointer::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match body {
        BodyRef::Hello(hello) => common::write_hello(hello, to.init_as()),
        BodyRef::Welcome(welcome) => common::write_welcome(welcome, to.init_as()),
        BodyRef::Error(error) => common::write_error(error, to.init_as()),
        BodyRef::Call(Call::Common(call)) => common::write_call(call, to.init_as()),
        BodyRef::Call(Call::Supervisor(call)) => supervisor::write_call(call, to.init_as(), fds),
        BodyRef::Call(Call::Pager(call)) => pager::write_call(call, to.init_as(), fds),
        BodyRef::Call(Call::Mirror(call)) => mirror::write_call(call, to.init_as()),
        BodyRef::Call(Call::Driver(call)) => driver::write_call(call, to.init_as(), fds),
        BodyRef::Reply(Reply::Common(reply)) => common::write_reply(reply, to.init_as()),
        BodyRef::Reply(Reply::Supervisor(reply)) => supervisor::write_reply(reply, to.init_as(), fds),
        BodyRef::Reply(Reply::Pager(reply)) => pager::write_reply(reply, to.init_as(), fds),
        BodyRef::Reply(Reply::Mirror(reply)) => mirror::write_reply(reply, to.init_as(), fds),
        BodyRef::Reply(Reply::Driver(reply)) => driver::write_reply(reply, to.init_as(), fds),
        BodyRef::Event(Event::Supervisor(event)) => supervisor::write_event(event, to.init_as()),
        BodyRef::Event(Event::Pager(event)) => pager::write_event(event, to.init_as()),
        BodyRef::Event(Event::Mirror(event)) => mirror::write_event(event, to.init_as()),
    }
}

/// Reads one datagram. `bytes` begin at an 8-byte boundary; `fds` came with them and are closed if anything is wrong.
pub(crate) fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Frame, Rejected> {
    let mut options = ReaderOptions::new();
    options.traversal_limit_in_words(Some(bytes.len() / 8 * 2 + TRAVERSAL_SLACK_WORDS)).nesting_limit(NESTING_LIMIT);
    let mut rest = bytes;
    let message = serialize::read_message_from_flat_slice_no_alloc(&mut rest, options)?;
    if !rest.is_empty() {
        return Err(DecodeError::Trailing { len_bytes: rest.len() }.into());
    }
    let root: envelope::Reader<'_> = message.get_root()?;
    let header = Header {
        call_id: root.get_call_id(),
        trace: TraceId(root.get_trace_id()),
        minor: root.get_interface_version(),
        incarnation: root.get_incarnation(),
        deadline_ms: root.get_deadline_ms(),
    };
    match read_body(root, fds) {
        Ok(body) => Ok(Frame { header, body }),
        Err(why) => Err(Rejected { call_id: header.call_id, why }),
    }
}

fn read_body(root: envelope::Reader<'_>, fds: Vec<OwnedFd>) -> Result<FrameBody, DecodeError> {
    let (kind, scope) = (root.get_kind()?, root.get_interface()?);
    let mut fds = FdSource::new(fds);
    let announced = usize::from(root.get_fd_count());
    if fds.came() != announced {
        return Err(DecodeError::FdCount { came: fds.came(), announced });
    }
    super::limits::present("body", root.has_body())?;
    let body = root.get_body();
    let body = match kind {
        Kind::Hello => FrameBody::Hello(common::read_hello(body.get_as()?)?),
        Kind::Welcome => FrameBody::Welcome(common::read_welcome(body.get_as()?)?),
        Kind::Error => FrameBody::Error(common::read_error(body.get_as()?)?),
        Kind::Call => FrameBody::Call(read_call(scope, body, &mut fds)?),
        Kind::Reply => FrameBody::Reply(read_reply(scope, body, &mut fds)?),
        Kind::Event => FrameBody::Event(read_event(scope, body)?),
    };
    fds.finish()?;
    Ok(body)
}

fn read_call(scope: Scope, body: any_pointer::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    Ok(match scope {
        Scope::Common => Call::Common(common::read_call(body.get_as::<common_schema::call::Reader<'_>>()?)?),
        Scope::Supervisor => {
            Call::Supervisor(supervisor::read_call(body.get_as::<supervisor_capnp::call::Reader<'_>>()?, fds)?)
        }
        Scope::Pager => Call::Pager(pager::read_call(body.get_as::<pager_capnp::call::Reader<'_>>()?, fds)?),
        Scope::Mirror => Call::Mirror(mirror::read_call(body.get_as::<mirror_capnp::call::Reader<'_>>()?)?),
        Scope::Driver => Call::Driver(driver::read_call(body.get_as::<driver_capnp::call::Reader<'_>>()?, fds)?),
    })
}

fn read_reply(scope: Scope, body: any_pointer::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    Ok(match scope {
        Scope::Common => Reply::Common(common::read_reply(body.get_as()?)?),
        Scope::Supervisor => Reply::Supervisor(supervisor::read_reply(body.get_as()?, fds)?),
        Scope::Pager => Reply::Pager(pager::read_reply(body.get_as()?, fds)?),
        Scope::Mirror => Reply::Mirror(mirror::read_reply(body.get_as()?, fds)?),
        Scope::Driver => Reply::Driver(driver::read_reply(body.get_as()?, fds)?),
    })
}

fn read_event(scope: Scope, body: any_pointer::Reader<'_>) -> Result<Event, DecodeError> {
    Ok(match scope {
        Scope::Supervisor => Event::Supervisor(supervisor::read_event(body.get_as()?)?),
        Scope::Pager => Event::Pager(pager::read_event(body.get_as()?)?),
        Scope::Mirror => Event::Mirror(mirror::read_event(body.get_as()?)?),
        Scope::Common => return Err(DecodeError::NoSuchBody { kind: "event", interface: "common" }),
        Scope::Driver => return Err(DecodeError::NoSuchBody { kind: "event", interface: "driver" }),
    })
}
