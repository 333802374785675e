//! Supervisor interface.

use uhmm_schema::common_capnp::{MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_TEXT_BYTES};
use uhmm_schema::supervisor_capnp::{
    MAX_CHANNEL_KEYS, MAX_PLAN_BYTES, MAX_SERVICES, MAX_VAULT_ENTRIES, call, event, registered, reply, service_status,
    vault,
};

use super::error::{DecodeError, EncodeError};
use super::fds::{FdSink, FdSource};
use super::limits::{in_data, in_len, in_text, out_data, out_len, out_text};
use crate::message::Fd;
use crate::message::supervisor::{Call, Event, Reply, ServiceStatus};

pub(super) fn write_call(from: &Call, mut to: call::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    let name = |field, value| out_text(field, value, MAX_NAME_BYTES);
    match from {
        Call::Register { service, incarnation } => {
            let mut to = to.init_register();
            to.set_service(name("register.service", service)?);
            to.set_incarnation(*incarnation);
        }
        Call::Ready => to.set_ready(()),
        Call::VaultPut { name: entry, fd } => {
            let mut to = to.init_vault_put();
            to.set_name(name("vaultPut.name", entry)?);
            to.set_entry_fd(fds.put(fd));
        }
        Call::VaultGet { prefix, after } => {
            let mut to = to.init_vault_get();
            to.set_prefix(name("vaultGet.prefix", prefix)?);
            to.set_after(name("vaultGet.after", after)?);
        }
        Call::VaultRemove { prefix } => to.init_vault_remove().set_prefix(name("vaultRemove.prefix", prefix)?),
        Call::Fence { service, incarnation, reason } => {
            let mut to = to.init_fence();
            to.set_service(name("fence.service", service)?);
            to.set_incarnation(*incarnation);
            to.set_reason(out_text("fence.reason", reason, MAX_TEXT_BYTES)?);
        }
        Call::Status => to.set_status(()),
        Call::Shutdown => to.set_shutdown(()),
        Call::Kill { service } => to.init_kill().set_service(name("kill.service", service)?),
        Call::Record { service } => to.init_record().set_service(name("record.service", service)?),
        Call::OperatorKey { socket } => to.set_operator_key(name("operatorKey", socket)?),
        Call::Pong { sequence } => to.init_pong().set_sequence(*sequence),
        Call::Join { guard } => to.init_join().set_guard_fd(fds.put_optional(guard.as_ref())),
    }
    Ok(())
}

pub(super) fn read_call(from: call::Reader<'_>, fds: &mut FdSource) -> Result<Call, DecodeError> {
    let name = |field, value| in_text(field, value, MAX_NAME_BYTES);
    Ok(match from.which()? {
        call::Register(from) => {
            let from = from?;
            Call::Register {
                service: name("register.service", from.get_service())?,
                incarnation: from.get_incarnation(),
            }
        }
        call::Ready(()) => Call::Ready,
        call::VaultPut(from) => {
            let from = from?;
            Call::VaultPut {
                name: name("vaultPut.name", from.get_name())?,
                fd: fds.take("vaultPut.entryFd", from.get_entry_fd())?,
            }
        }
        call::VaultGet(from) => {
            let from = from?;
            Call::VaultGet {
                prefix: name("vaultGet.prefix", from.get_prefix())?,
                after: name("vaultGet.after", from.get_after())?,
            }
        }
        call::VaultRemove(from) => Call::VaultRemove { prefix: name("vaultRemove.prefix", from?.get_prefix())? },
        call::Fence(from) => {
            let from = from?;
            Call::Fence {
                service: name("fence.service", from.get_service())?,
                incarnation: from.get_incarnation(),
                reason: in_text("fence.reason", from.get_reason(), MAX_TEXT_BYTES)?,
            }
        }
        call::Status(()) => Call::Status,
        call::Shutdown(()) => Call::Shutdown,
        call::Kill(from) => Call::Kill { service: name("kill.service", from?.get_service())? },
        call::Record(from) => Call::Record { service: name("record.service", from?.get_service())? },
        call::OperatorKey(socket) => Call::OperatorKey { socket: name("operatorKey", socket)? },
        call::Pong(from) => Call::Pong { sequence: from?.get_sequence() },
        call::Join(from) => Call::Join { guard: fds.take_optional("join.guardFd", from?.get_guard_fd())? },
    })
}

pub(super) fn write_reply(from: &Reply, mut to: reply::Builder<'_>, fds: &mut FdSink) -> Result<(), EncodeError> {
    match from {
        Reply::Done => to.set_done(()),
        Reply::Registered { plan_toml, listener, channel_keys } => {
            write_registered(plan_toml, listener.as_ref(), channel_keys, to.init_registered(), fds)?;
        }
        Reply::Vault { entries, more } => {
            let mut to = to.init_vault();
            to.set_more(*more);
            let mut list = to.init_entries(out_len("vault.entries", entries.len(), MAX_VAULT_ENTRIES)?);
            for (index, (name, fd)) in entries.iter().enumerate() {
                let mut to = list.reborrow().get(index as u32);
                to.set_name(out_text("vault.entries.name", name, MAX_NAME_BYTES)?);
                to.set_entry_fd(fds.put(fd));
            }
        }
        Reply::Status(services) => {
            let mut list = to.init_status(out_len("status", services.len(), MAX_SERVICES)?);
            for (index, service) in services.iter().enumerate() {
                write_status(service, list.reborrow().get(index as u32))?;
            }
        }
        Reply::Killed { incarnation, pid } => {
            let mut to = to.init_killed();
            to.set_incarnation(*incarnation);
            to.set_pid(*pid);
        }
        Reply::Joined { incarnation, key, listener, keys_toml } => {
            let mut to = to.init_joined();
            to.set_incarnation(*incarnation);
            to.set_key(out_data("joined.key", key, MAX_KEY_BYTES)?);
            to.set_listener_fd(fds.put_optional(listener.as_ref()));
            to.set_keys_toml(out_text("joined.keysToml", keys_toml, MAX_PLAN_BYTES)?);
        }
        Reply::Record(fd) => to.set_record(fds.put(fd)),
        Reply::Key(key) => to.set_key(out_data("key", key, MAX_KEY_BYTES)?),
    }
    Ok(())
}

fn write_registered(
    plan_toml: &str,
    listener: Option<&Fd>,
    channel_keys: &[(String, Vec<u8>)],
    mut to: registered::Builder<'_>,
    fds: &mut FdSink,
) -> Result<(), EncodeError> {
    to.set_plan_toml(out_text("registered.planToml", plan_toml, MAX_PLAN_BYTES)?);
    to.set_listener_fd(fds.put_optional(listener));
    let mut list = to.init_channel_keys(out_len("registered.channelKeys", channel_keys.len(), MAX_CHANNEL_KEYS)?);
    for (index, (peer, key)) in channel_keys.iter().enumerate() {
        let mut to = list.reborrow().get(index as u32);
        to.set_peer(out_text("registered.channelKeys.peer", peer, MAX_NAME_BYTES)?);
        to.set_key(out_data("registered.channelKeys.key", key, MAX_KEY_BYTES)?);
    }
    Ok(())
}

fn write_status(from: &ServiceStatus, mut to: service_status::Builder<'_>) -> Result<(), EncodeError> {
    to.set_name(out_text("status.name", &from.name, MAX_NAME_BYTES)?);
    to.set_pid(from.pid);
    to.set_incarnation(from.incarnation);
    to.set_state(out_text("status.state", &from.state, MAX_NAME_BYTES)?);
    to.set_last_exit(out_text("status.lastExit", &from.last_exit, MAX_TEXT_BYTES)?);
    to.set_uptime_ms(from.uptime_ms);
    to.set_missed_heartbeats(from.missed_heartbeats);
    to.set_last_recovery_ms(from.last_recovery_ms);
    to.set_vault_entries(from.vault_entries);
    Ok(())
}

pub(super) fn read_reply(from: reply::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    Ok(match from.which()? {
        reply::Done(()) => Reply::Done,
        reply::Registered(from) => read_registered(from?, fds)?,
        reply::Vault(from) => read_vault(from?, fds)?,
        reply::Status(list) => {
            let list = list?;
            in_len("status", list.len(), MAX_SERVICES)?;
            Reply::Status(list.iter().map(read_status).collect::<Result<_, _>>()?)
        }
        reply::Killed(from) => {
            let from = from?;
            Reply::Killed { incarnation: from.get_incarnation(), pid: from.get_pid() }
        }
        reply::Joined(from) => {
            let from = from?;
            Reply::Joined {
                incarnation: from.get_incarnation(),
                key: in_data("joined.key", from.get_key(), MAX_KEY_BYTES)?,
                listener: fds.take_optional("joined.listenerFd", from.get_listener_fd())?,
                keys_toml: in_text("joined.keysToml", from.get_keys_toml(), MAX_PLAN_BYTES)?,
            }
        }
        reply::Record(index) => Reply::Record(fds.take("record", index)?),
        reply::Key(key) => Reply::Key(in_data("key", key, MAX_KEY_BYTES)?),
    })
}

fn read_registered(from: registered::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    let plan_toml = in_text("registered.planToml", from.get_plan_toml(), MAX_PLAN_BYTES)?;
    let listener = fds.take_optional("registered.listenerFd", from.get_listener_fd())?;
    let list = from.get_channel_keys()?;
    let mut channel_keys = Vec::with_capacity(in_len("registered.channelKeys", list.len(), MAX_CHANNEL_KEYS)?);
    for from in list {
        channel_keys.push((
            in_text("registered.channelKeys.peer", from.get_peer(), MAX_NAME_BYTES)?,
            in_data("registered.channelKeys.key", from.get_key(), MAX_KEY_BYTES)?,
        ));
    }
    Ok(Reply::Registered { plan_toml, listener, channel_keys })
}

fn read_vault(from: vault::Reader<'_>, fds: &mut FdSource) -> Result<Reply, DecodeError> {
    let list = from.get_entries()?;
    let mut entries = Vec::with_capacity(in_len("vault.entries", list.len(), MAX_VAULT_ENTRIES)?);
    for from in list {
        entries.push((
            in_text("vault.entries.name", from.get_name(), MAX_NAME_BYTES)?,
            fds.take("vault.entries.entryFd", from.get_entry_fd())?,
        ));
    }
    Ok(Reply::Vault { entries, more: from.get_more() })
}

fn read_status(from: service_status::Reader<'_>) -> Result<ServiceStatus, DecodeError> {
    Ok(ServiceStatus {
        name: in_text("status.name", from.get_name(), MAX_NAME_BYTES)?,
        pid: from.get_pid(),
        incarnation: from.get_incarnation(),
        state: in_text("status.state", from.get_state(), MAX_NAME_BYTES)?,
        last_exit: in_text("status.lastExit", from.get_last_exit(), MAX_TEXT_BYTES)?,
        uptime_ms: from.get_uptime_ms(),
        missed_heartbeats: from.get_missed_heartbeats(),
        last_recovery_ms: from.get_last_recovery_ms(),
        vault_entries: from.get_vault_entries(),
    })
}

pub(super) fn write_event(from: &Event, mut to: event::Builder<'_>) -> Result<(), EncodeError> {
    match from {
        Event::Ping { sequence } => to.init_ping().set_sequence(*sequence),
        Event::ServiceDied { service, incarnation, held } => {
            let mut to = to.init_service_died();
            to.set_service(out_text("serviceDied.service", service, MAX_NAME_BYTES)?);
            to.set_incarnation(*incarnation);
            to.set_held(*held);
        }
        Event::Stop => to.set_stop(()),
    }
    Ok(())
}

pub(super) fn read_event(from: event::Reader<'_>) -> Result<Event, DecodeError> {
    Ok(match from.which()? {
        event::Ping(from) => Event::Ping { sequence: from?.get_sequence() },
        event::ServiceDied(from) => {
            let from = from?;
            Event::ServiceDied {
                service: in_text("serviceDied.service", from.get_service(), MAX_NAME_BYTES)?,
                incarnation: from.get_incarnation(),
                held: from.get_held(),
            }
        }
        event::Stop(()) => Event::Stop,
    })
}
