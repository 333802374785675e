//! Processes of services: started, watched, killed, reaped; and those that an older supervisor has left.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use uhmm_ipc::{ConnId, FdToken};
use uhmm_kernel_hook::PidFd;
use uhmm_kit::record::What;
use uhmm_kit::{KEY_VARIABLE, LISTENER_NAME, LogFormat};

use crate::joining::Outside;
use crate::manager::not_for_children;
use crate::service::{Supervisor, SupervisorError, listen};
use crate::state::{Fate, hex};

impl<F: FnOnce()> Supervisor<F> {
    /// The listening socket outlives every incarnation: it is made once and lies in the vault.
    pub(crate) fn make_listener(&mut self, name: &str) -> Result<(), SupervisorError> {
        if self.vault.get(name, LISTENER_NAME).is_some() {
            return Ok(());
        }
        listen(&self.options.run_dir, &self.plan, name, &mut self.vault)?;
        self.open_doors()
    }

    pub(crate) fn spawn(&mut self, service: usize) -> Result<(), SupervisorError> {
        let plan = self.plan.services[service].clone();
        self.make_listener(&plan.name)?;
        let incarnation = self.core.services()[service].incarnation;
        self.saved.incarnations.insert(plan.name.clone(), incarnation);
        self.save_state();
        self.restarts += u64::from(incarnation > 1);
        let (program, words) = match (plan.external, plan.command.split_first()) {
            (true, Some((program, words))) => (PathBuf::from(program), words),
            _ => (self.options.exe.clone(), plan.command.as_slice()),
        };
        let mut command = Command::new(program);
        command.args(words).arg("--run-dir").arg(&self.options.run_dir);
        command.args(["--name", &plan.name, "--incarnation", &incarnation.to_string(), "--log", self.log_name()]);
        command.env(KEY_VARIABLE, hex(&self.saved.key(&plan.name, "supervisor")));
        not_for_children(&mut command);
        // Its own group: Ctrl-C reaches the supervisor alone, which stops the services in order.
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let pending = self.confine(service, &mut command)?;
        let now_ms = self.now_ms();
        let spawned = command.spawn();
        let confined = self.confined_now(service, pending);
        match spawned {
            Ok(child) => {
                let pid = child.id();
                self.core.spawned(service, pid, now_ms);
                self.children.insert(service, child);
                self.note(What::ServiceStarted, &plan.name, incarnation.into());
                self.saved.started(&plan.name, pid);
                self.save_state();
                self.watch(service, PidFd::open(pid)?)?;
                confined?;
            }
            Err(error) => self.core.exited(service, &format!("cannot be started: {error}"), now_ms, &mut self.actions),
        }
        Ok(())
    }

    pub(crate) fn kill(&mut self, service: usize) {
        let Some(pidfd) = self.pidfds.get(&service) else { return };
        let Err(error) = pidfd.signal(Signal::KILL) else { return };
        let name = &self.plan.services[service].name;
        if !self.joins.inside.get(name).is_some_and(Outside::end) {
            tracing::error!(%error, service = %name, "It cannot be ended from here: end its container or unit");
        }
    }

    /// Hears of its end from now on.
    pub(crate) fn watch(&mut self, service: usize, pidfd: PidFd) -> Result<(), SupervisorError> {
        self.reactor.add_fd(&pidfd, FdToken(service as u64))?;
        self.pidfds.insert(service, pidfd);
        Ok(())
    }

    /// A pidfd became readable: reap, read what the dead process had still said, and only then tell anybody. A reaped process has no
    /// thread that could touch memory.
    pub(crate) fn check_exit(&mut self, service: usize) -> Result<(), SupervisorError> {
        let Some(pidfd) = self.pidfds.get(&service) else { return Ok(()) };
        if !pidfd.exited()? {
            return Ok(());
        }
        self.reactor.remove_fd(pidfd)?;
        self.pidfds.remove(&service);
        self.stop_listening(service);
        let how = match self.children.remove(&service).map(|mut child| child.wait()) {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => format!("cannot be reaped: {error}"),
            None if self.plan.services[service].join.is_some() => "ended (its container or unit knows how)".to_owned(),
            None => "ended (adopted process)".to_owned(),
        };
        match self.registered.get(&service) {
            Some(conn) => {
                self.ending.insert(service, how);
                self.reactor.close_after_last_words(*conn);
                Ok(())
            }
            None => self.ended(service, &how),
        }
    }

    /// A connection is gone, and all that came through it was dealt with.
    pub(crate) fn closed(&mut self, conn: ConnId) -> Result<(), SupervisorError> {
        self.sessions.remove(&conn);
        self.asks_no_more(conn);
        let of = self.registered.iter().find(|(_, registered)| **registered == conn).map(|(service, _)| *service);
        let Some(service) = of else { return Ok(()) };
        self.registered.remove(&service);
        self.vault.owner_gone(&self.plan.services[service].name);
        match self.ending.remove(&service) {
            Some(how) => self.ended(service, &how),
            None => Ok(()),
        }
    }

    fn ended(&mut self, service: usize, how: &str) -> Result<(), SupervisorError> {
        let now_ms = self.now_ms();
        self.core.exited(service, how, now_ms, &mut self.actions);
        self.act()
    }

    /// What an older supervisor has started: it goes on, or it has died and nobody was told.
    pub(crate) fn find_processes(&mut self) -> Result<(), SupervisorError> {
        let now_ms = self.now_ms();
        for service in 0..self.plan.services.len() {
            if self.core.services()[service].incarnation == 0 {
                continue;
            }
            match self.fate(service) {
                Fate::Alive(pid, pidfd) => {
                    self.core.found_alive(service, pid, now_ms);
                    self.confined_before(service);
                    self.watch(service, pidfd)?;
                }
                Fate::Dead => self.core.found_dead(service, now_ms, &mut self.actions),
                Fate::Unknown => {}
            }
        }
        self.act()
    }

    /// What became of the process of a service. Of one that joined, the holder knows.
    fn fate(&self, service: usize) -> Fate {
        let plan = &self.plan.services[service];
        if plan.join.is_none() {
            return self.saved.fate(&plan.name);
        }
        let Some(inside) = self.joins.inside.get(&plan.name) else { return Fate::Unknown };
        match (inside.pidfd.exited(), inside.pidfd.try_clone()) {
            (Ok(true), _) => Fate::Dead,
            (Ok(false), Ok(pidfd)) => Fate::Alive(pidfd.pid().ok().flatten().unwrap_or(u32::MAX), pidfd),
            _ => Fate::Unknown,
        }
    }

    /// For the next supervisor. One that cannot be written is no reason to serve nobody: the holder has it too.
    pub(crate) fn save_state(&mut self) {
        if let Err(error) = self.saved.save() {
            tracing::error!(%error, "The state is not saved: if holder and supervisor die now, services are started beside those that run");
        }
        self.keep_state();
    }

    pub(crate) fn log_name(&self) -> &'static str {
        match self.options.log {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}
