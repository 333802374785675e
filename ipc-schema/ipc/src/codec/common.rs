//! Handshake, errors and what every service answers.

use uhmm_schema::common_capnp::{
    self as schema, Interface as Scope, MAX_KEY_BYTES, MAX_METRICS, MAX_NAME_BYTES, MAX_TEXT_BYTES, call, error, hello,
    reply, welcome,
};

use super::error::{DecodeError, EncodeError};
use super::limits::{in_data, in_len, in_text, out_data, out_len, out_text};
use crate::message::common::{Call, ErrorCode, Hello, Interface, Metric, Reply, Role, Welcome, WireError};

/// An error fits into the smallest message that can be negotiated.
const MAX_ERROR_BYTES: usize = 512;

pub(super) fn write_hello(from: &Hello, mut to: hello::Builder<'_>) -> Result<(), EncodeError> {
    to.set_major(from.major);
    to.set_minor(from.minor);
    to.set_interface(match from.interface {
        Interface::Supervisor => Scope::Supervisor,
        Interface::Pager => Scope::Pager,
        Interface::Mirror => Scope::Mirror,
        Interface::Driver => Scope::Driver,
    });
    to.set_role(match from.role {
        Role::Client => schema::Role::Client,
        Role::Operator => schema::Role::Operator,
        Role::Pager => schema::Role::Pager,
        Role::Mirror => schema::Role::Mirror,
        Role::Driver => schema::Role::Driver,
        Role::Supervisor => schema::Role::Supervisor,
    });
    to.set_name(out_text("hello.name", &from.name, MAX_NAME_BYTES)?);
    to.set_incarnation(from.incarnation);
    to.set_key(out_data("hello.key", &from.key, MAX_KEY_BYTES)?);
    to.set_max_message_bytes(from.max_message_bytes);
    to.set_max_fds(from.max_fds);
    Ok(())
}

pub(super) fn read_hello(from: hello::Reader<'_>) -> Result<Hello, DecodeError> {
    Ok(Hello {
        major: from.get_major(),
        minor: from.get_minor(),
        interface: match from.get_interface()? {
            Scope::Common => return Err(DecodeError::NoSuchBody { kind: "hello", interface: "common" }),
            Scope::Supervisor => Interface::Supervisor,
            Scope::Pager => Interface::Pager,
            Scope::Mirror => Interface::Mirror,
            Scope::Driver => Interface::Driver,
        },
        role: match from.get_role()? {
            schema::Role::Client => Role::Client,
            schema::Role::Operator => Role::Operator,
            schema::Role::Pager => Role::Pager,
            schema::Role::Mirror => Role::Mirror,
            schema::Role::Driver => Role::Driver,
            schema::Role::Supervisor => Role::Supervisor,
        },
        name: in_text("hello.name", from.get_name(), MAX_NAME_BYTES)?,
        incarnation: from.get_incarnation(),
        key: in_data("hello.key", from.get_key(), MAX_KEY_BYTES)?,
        max_message_bytes: from.get_max_message_bytes(),
        max_fds: from.get_max_fds(),
    })
}

pub(super) fn write_welcome(from: &Welcome, mut to: welcome::Builder<'_>) -> Result<(), EncodeError> {
    to.set_major(from.major);
    to.set_minor(from.minor);
    to.set_name(out_text("welcome.name", &from.name, MAX_NAME_BYTES)?);
    to.set_incarnation(from.incarnation);
    to.set_max_message_bytes(from.max_message_bytes);
    to.set_max_fds(from.max_fds);
    Ok(())
}

pub(super) fn read_welcome(from: welcome::Reader<'_>) -> Result<Welcome, DecodeError> {
    Ok(Welcome {
        major: from.get_major(),
        minor: from.get_minor(),
        name: in_text("welcome.name", from.get_name(), MAX_NAME_BYTES)?,
        incarnation: from.get_incarnation(),
        max_message_bytes: from.get_max_message_bytes(),
        max_fds: from.get_max_fds(),
    })
}

/// A text that is too long is cut: an error must always get through.
pub(super) fn write_error(from: &WireError, mut to: error::Builder<'_>) -> Result<(), EncodeError> {
    to.set_code(match from.code {
        ErrorCode::Fault => schema::ErrorCode::Fault,
        ErrorCode::Permission => schema::ErrorCode::Permission,
        ErrorCode::Invalid => schema::ErrorCode::Invalid,
        ErrorCode::NotFound => schema::ErrorCode::NotFound,
        ErrorCode::Busy => schema::ErrorCode::Busy,
        ErrorCode::NoMemory => schema::ErrorCode::NoMemory,
        ErrorCode::Io => schema::ErrorCode::Io,
        ErrorCode::Stale => schema::ErrorCode::Stale,
        ErrorCode::TimedOut => schema::ErrorCode::TimedOut,
        ErrorCode::Protocol => schema::ErrorCode::Protocol,
    });
    let mut cut = from.text.len().min(MAX_ERROR_BYTES);
    while !from.text.is_char_boundary(cut) {
        cut -= 1;
    }
    to.set_text(&from.text[..cut]);
    Ok(())
}

pub(super) fn read_error(from: error::Reader<'_>) -> Result<WireError, DecodeError> {
    let code = match from.get_code()? {
        schema::ErrorCode::Fault => ErrorCode::Fault,
        schema::ErrorCode::Permission => ErrorCode::Permission,
        schema::ErrorCode::Invalid => ErrorCode::Invalid,
        schema::ErrorCode::NotFound => ErrorCode::NotFound,
        schema::ErrorCode::Busy => ErrorCode::Busy,
        schema::ErrorCode::NoMemory => ErrorCode::NoMemory,
        schema::ErrorCode::Io => ErrorCode::Io,
        schema::ErrorCode::Stale => ErrorCode::Stale,
        schema::ErrorCode::TimedOut => ErrorCode::TimedOut,
        schema::ErrorCode::Protocol => ErrorCode::Protocol,
    };
    Ok(WireError { code, text: in_text("error.text", from.get_text(), MAX_TEXT_BYTES)? })
}

pub(super) fn write_call(from: &Call, mut to: call::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Call::Stats => to.set_stats(()),
    }
    Ok(())
}

pub(super) fn read_call(from: call::Reader<'_>) -> Result<Call, DecodeError> {
    match from.which()? {
        call::Stats(()) => Ok(Call::Stats),
        call::Reserved(()) => Err(DecodeError::NoSuchBody { kind: "reserved call", interface: "common" }),
    }
}

pub(super) fn write_reply(from: &Reply, to: reply::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Reply::Stats(metrics) => {
            let mut list = to.init_stats(out_len("stats", metrics.len(), MAX_METRICS)?);
            for (index, metric) in metrics.iter().enumerate() {
                let mut to = list.reborrow().get(index as u32);
                to.set_name(out_text("stats.name", &metric.name, MAX_NAME_BYTES)?);
                to.set_value(metric.value);
            }
        }
    }
    Ok(())
}

pub(super) fn read_reply(from: reply::Reader<'_>) -> Result<Reply, DecodeError> {
    match from.which()? {
        reply::Stats(list) => {
            let list = list?;
            in_len("stats", list.len(), MAX_METRICS)?;
            let metric = |from: schema::metric::Reader<'_>| -> Result<Metric, DecodeError> {
                Ok(Metric { name: in_text("stats.name", from.get_name(), MAX_NAME_BYTES)?, value: from.get_value() })
            };
            list.iter().map(metric).collect::<Result<_, _>>().map(Reply::Stats)
        }
        reply::Reserved(()) => Err(DecodeError::NoSuchBody { kind: "reserved reply", interface: "common" }),
    }
}
