//! What is recorded of services: the supervisor's own record (who was started, died, came back), and the way to everybody's, the dead's too;
//! the key that makes somebody an operator of a service.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use uhmm_ipc::OPERATORS;
use uhmm_ipc::message::{ErrorCode, Fd, WireError, supervisor};
use uhmm_kernel_hook::memfd;
use uhmm_kit::Recorder;
use uhmm_kit::record::{self, Each, Event, Kind, RECORD_NAME, What};

use crate::service::Supervisor;

/// The supervisor's name where services are named.
const OWN_NAME: &str = "supervisor";

impl<F: FnOnce()> Supervisor<F> {
    /// Goes on in what the holder has of an older supervisor.
    pub(crate) fn begin_record(&mut self, kept: Option<Fd>) {
        if self.record.fd().is_none() {
            self.record = Recorder::open(kept, 1);
            self.record.define(record::names(|each| self.tell_metrics(each)));
        }
    }

    pub(crate) fn publish(&self) {
        self.record.publish(|each| self.tell_metrics(each));
    }

    pub(crate) fn tell_metrics(&self, each: &mut Each<'_>) {
        let vault: usize = self.plan.services.iter().map(|service| self.vault.count(&service.name)).sum();
        let denied_calls = self.confined.values().map(|confined| confined.denied_calls).sum();
        for (name, kind, value) in [
            ("services", Kind::Gauge, self.plan.services.len() as u64),
            ("restarts", Kind::Counter, self.restarts),
            ("vault_entries", Kind::Gauge, vault as u64),
            ("denied_calls", Kind::Gauge, denied_calls),
            ("uptime_ms", Kind::Gauge, self.now_ms()),
        ] {
            each(format_args!("{name}"), kind, value);
        }
    }

    /// Something about a service.
    pub(crate) fn note(&mut self, what: What, name: &str, value: u64) {
        self.record.event(&Event::named(what, record::now_ns(), name, value));
    }

    /// It serves, for the first time or again.
    pub(crate) fn note_ready(&mut self, service: usize) {
        let service = &self.core.services()[service];
        if service.incarnation > 1 {
            let (name, recovery_ms) = (service.name.clone(), service.last_recovery_ms);
            self.note(What::ServiceBack, &name, recovery_ms);
        }
    }

    /// For the operator, who may read it and no more.
    pub(crate) fn record_of(&self, name: &str) -> Result<supervisor::Reply, WireError> {
        let kept = if name == OWN_NAME { self.record.fd().cloned() } else { self.vault.get(name, RECORD_NAME) };
        let missing = || {
            let text = format!("Nothing is recorded of service {name:?}: `uhmm status` lists those that there are");
            WireError::new(ErrorCode::NotFound, text)
        };
        let fd = for_reading(&kept.ok_or_else(missing)?);
        let fd = fd.map_err(|error| WireError::new(ErrorCode::Io, format!("The record cannot be opened: {error}")))?;
        Ok(supervisor::Reply::Record(Arc::new(fd)))
    }

    /// What operators of a service show it.
    pub(crate) fn operator_key(&self, socket: &str) -> Result<supervisor::Reply, WireError> {
        let run_dir = &self.options.run_dir;
        let is_it = |name: &str| self.plan.endpoint_path(run_dir, name).file_name().is_some_and(|file| file == socket);
        let service = self.plan.services.iter().find(|service| is_it(&service.name));
        let missing =
            || WireError::new(ErrorCode::NotFound, format!("No service of the plan has the socket {socket:?}"));
        let service = service.ok_or_else(missing)?;
        Ok(supervisor::Reply::Key(self.saved.key(OPERATORS, &service.name)))
    }
}

/// Another descriptor of the same memory that can be neither written nor mapped for writing. A service may put anything into the vault:
/// what is no memory is not opened, because that could wait for somebody.
fn for_reading(fd: &Fd) -> std::io::Result<OwnedFd> {
    let sealed = memfd::len(fd.as_fd()).and_then(|len| memfd::check_sealed(fd.as_fd(), len));
    sealed.map_err(std::io::Error::other)?;
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(Into::into)
}
