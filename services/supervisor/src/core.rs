//! When a service is started, restarted, killed or given up: pure, time comes in as milliseconds.
//!
//! ```text
//!            needs ready              Register, Ready            late heartbeat, Fence, Kill
//!   Waiting ------------> Starting ------------------> Ready ------------------------------> (SIGKILL)
//!                            ^  \__ start timeout: SIGKILL                                       |
//!                            |                                                                   v
//!                            +---- first death: at once; then 2^n back-off ------------- Exited: reaped, everybody is told
//!                                                                                  too many deaths in the window: Held
//! ```
//!
//! A service that is starting has a free pass: no heartbeat is asked of it.
//!
//! Nobody here starts a service that joins: where others are started, it is `Awaited`, and whoever has asked first is let in. The next ones
//! wait, so that a new image can be there before the old one is stopped.

use std::collections::VecDeque;

use uhmm_manifest::Plan;

/// How far a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// What it needs is not ready.
    Waiting,
    /// An older supervisor's process may register: nobody knows whether there is one.
    Adopting {
        /// Until then.
        until_ms: u64,
    },
    /// It joins, and its process has not come.
    Awaited,
    /// Spawned (or let in), not ready.
    Starting {
        /// Since then.
        since_ms: u64,
    },
    /// Serving.
    Ready {
        /// Since then.
        since_ms: u64,
    },
    /// Dead, to be started again.
    Backoff {
        /// Then.
        until_ms: u64,
    },
    /// Died too often.
    Held,
    /// Ended because it was told to.
    Stopped,
}

/// One service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Progress.
    pub state: State,
    /// Times started.
    pub incarnation: u32,
    /// Process, 0 when none.
    pub pid: u32,
    /// Heartbeats missed in a row.
    pub missed: u32,
    /// Why it last ended.
    pub last_exit: String,
    /// From the last death to ready again.
    pub last_recovery_ms: u64,
    died_at_ms: Option<u64>,
    deaths: VecDeque<u64>,
    next_ping_ms: u64,
    sequence: u64,
    answered: u64,
    reason: Option<String>,
    joins: bool,
    /// Processes that ask to be this service.
    asking: u32,
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start this incarnation.
    Spawn {
        /// Index of the service.
        service: usize,
    },
    /// Let the process in that has asked first: it is this incarnation.
    Admit {
        /// Index of the service.
        service: usize,
    },
    /// SIGKILL.
    Kill {
        /// Index of the service.
        service: usize,
    },
    /// Event `Ping`.
    Ping {
        /// Index of the service.
        service: usize,
        /// To be echoed.
        sequence: u64,
    },
    /// Event `Stop`.
    Stop {
        /// Index of the service.
        service: usize,
    },
    /// Tell everybody.
    Died {
        /// Index of the service.
        service: usize,
        /// Which incarnation.
        incarnation: u32,
        /// It will not come back.
        held: bool,
    },
    /// Every service that can be ready is: `uhmm up` reports it once.
    AllReady,
    /// Every process has ended: the supervisor may.
    AllStopped,
}

/// See the module head.
#[derive(Debug)]
pub struct Core {
    plan: Plan,
    services: Vec<Service>,
    stopping_since_ms: Option<u64>,
    killed_all: bool,
    reported_ready: bool,
}

impl Core {
    /// `incarnations`: how often each service was started before, in plan order. `adopt_until_ms`: running services may
    /// report until then instead of being started.
    pub fn new(plan: Plan, incarnations: &[u32], adopt_until_ms: Option<u64>) -> Self {
        let state = adopt_until_ms.map_or(State::Waiting, |until_ms| State::Adopting { until_ms });
        let services = plan.services.iter().enumerate().map(|(index, service)| Service {
            name: service.name.clone(),
            state,
            incarnation: incarnations.get(index).copied().unwrap_or(0),
            pid: 0,
            missed: 0,
            last_exit: String::new(),
            last_recovery_ms: 0,
            died_at_ms: None,
            deaths: VecDeque::new(),
            next_ping_ms: 0,
            sequence: 0,
            answered: 0,
            reason: None,
            joins: service.join.is_some(),
            asking: 0,
        });
        let services = services.collect();
        Self { plan, services, stopping_since_ms: None, killed_all: false, reported_ready: false }
    }

    /// In start order.
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// By name.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.services.iter().position(|service| service.name == name)
    }

    /// An older supervisor has started this process, and it lives: it shall register like one that was started now.
    pub fn found_alive(&mut self, service: usize, pid: u32, now_ms: u64) {
        self.services[service].pid = pid;
        self.services[service].state = State::Starting { since_ms: now_ms };
    }

    /// The process that an older supervisor has started has ended, and nobody was told.
    pub fn found_dead(&mut self, service: usize, now_ms: u64, out: &mut Vec<Action>) {
        let this = &mut self.services[service];
        this.last_exit = "ended while no supervisor was there".to_owned();
        this.died_at_ms = Some(now_ms);
        this.deaths.push_back(now_ms);
        this.state = State::Backoff { until_ms: now_ms };
        out.push(Action::Died { service, incarnation: this.incarnation, held: false });
    }

    /// Services that are known to be dead now, as they were told to those that were there: incarnation, and whether it is held.
    pub fn dead(&self) -> impl Iterator<Item = (usize, u32, bool)> + '_ {
        let dead = |(index, this): (usize, &Service)| match this.state {
            State::Backoff { .. } => Some((index, this.incarnation, false)),
            State::Held | State::Stopped => Some((index, this.incarnation, true)),
            State::Awaited => Some((index, this.incarnation, false)),
            State::Waiting | State::Adopting { .. } | State::Starting { .. } | State::Ready { .. } => None,
        };
        self.services.iter().enumerate().filter_map(dead).filter(|(_, incarnation, _)| *incarnation > 0)
    }

    /// A process asks to be this service.
    pub fn asks(&mut self, service: usize, now_ms: u64, out: &mut Vec<Action>) {
        let this = &mut self.services[service];
        this.asking += 1;
        if this.state == State::Awaited {
            begin(service, this, now_ms, out);
        }
    }

    /// One that has asked has gone.
    pub fn asks_no_more(&mut self, service: usize) {
        self.services[service].asking = self.services[service].asking.saturating_sub(1);
    }

    /// Nothing new is let in any more.
    pub fn is_stopping(&self) -> bool {
        self.stopping_since_ms.is_some()
    }

    /// The shell has started the process.
    pub fn spawned(&mut self, service: usize, pid: u32, now_ms: u64) {
        self.services[service].pid = pid;
        self.services[service].state = State::Starting { since_ms: now_ms };
    }

    /// A process says which service it is. `Ok(true)`: an older supervisor's, taken over now.
    pub fn registered(&mut self, service: usize, incarnation: u32, pid: u32, now_ms: u64) -> Result<bool, String> {
        let this = &mut self.services[service];
        if this.pid == pid && this.incarnation == incarnation {
            return Ok(false);
        }
        if matches!(this.state, State::Adopting { .. }) {
            this.pid = pid;
            this.incarnation = incarnation;
            this.state = State::Starting { since_ms: now_ms };
            return Ok(true);
        }
        let text = format!(
            "Process {pid} is not incarnation {incarnation} of {}: that is process {} incarnation {}",
            this.name, this.pid, this.incarnation
        );
        Err(text)
    }

    /// The service is up.
    pub fn ready(&mut self, service: usize, now_ms: u64, out: &mut Vec<Action>) {
        let heartbeat_ms = self.plan.supervisor.heartbeat_ms;
        let this = &mut self.services[service];
        if !matches!(this.state, State::Starting { .. }) {
            return;
        }
        this.state = State::Ready { since_ms: now_ms };
        this.missed = 0;
        this.answered = this.sequence;
        this.next_ping_ms = now_ms + heartbeat_ms;
        if let Some(died_at_ms) = this.died_at_ms.take() {
            this.last_recovery_ms = now_ms - died_at_ms;
        }
        self.start_waiting(out);
        // Of those that join nobody knows when they come.
        let all_ready = self.services.iter().all(|s| s.joins || matches!(s.state, State::Ready { .. } | State::Held));
        if all_ready && !std::mem::replace(&mut self.reported_ready, true) {
            out.push(Action::AllReady);
        }
    }

    /// A heartbeat came back.
    pub fn pong(&mut self, service: usize, sequence: u64) {
        let this = &mut self.services[service];
        if sequence <= this.sequence {
            this.answered = this.answered.max(sequence);
            this.missed = 0;
        }
    }

    /// Somebody wants it dead: its own incarnation only. False: that one is dead already.
    pub fn condemn(&mut self, service: usize, incarnation: u32, reason: &str, out: &mut Vec<Action>) -> bool {
        let this = &mut self.services[service];
        // Nobody knows yet whether it lives: that it has not registered is no proof of its death.
        let unknown = matches!(this.state, State::Adopting { .. });
        if this.incarnation != incarnation || this.pid == 0 && !unknown {
            return false;
        }
        this.reason = Some(reason.to_owned());
        if unknown {
            return true;
        }
        out.push(Action::Kill { service });
        true
    }

    /// Whether somebody wanted it dead before anybody knew that it lives.
    pub fn is_condemned(&self, service: usize) -> bool {
        self.services[service].reason.is_some()
    }

    /// The process was reaped.
    pub fn exited(&mut self, service: usize, how: &str, now_ms: u64, out: &mut Vec<Action>) {
        let restart = self.plan.services[service].restart.clone();
        let stopping = self.stopping_since_ms.is_some();
        let this = &mut self.services[service];
        let lived_long = match this.state {
            State::Ready { since_ms } => now_ms.saturating_sub(since_ms) > restart.window_s * 1000,
            _ => false,
        };
        this.pid = 0;
        this.missed = 0;
        this.last_exit = this.reason.take().map_or_else(|| how.to_owned(), |reason| format!("{how}: {reason}"));
        let incarnation = this.incarnation;
        if stopping {
            this.state = State::Stopped;
            out.push(Action::Died { service, incarnation, held: true });
            self.report_stopped(out);
            return;
        }
        this.died_at_ms = this.died_at_ms.or(Some(now_ms));
        if lived_long {
            this.deaths.clear();
        }
        this.deaths.push_back(now_ms);
        while this.deaths.front().is_some_and(|at_ms| now_ms - at_ms > restart.window_s * 1000) {
            this.deaths.pop_front();
        }
        let held = this.deaths.len() > restart.max_deaths as usize;
        this.state = if held { State::Held } else { State::Backoff { until_ms: now_ms + backoff_ms(this, &restart) } };
        out.push(Action::Died { service, incarnation, held });
        self.tick(now_ms, out);
    }

    /// Stop everything.
    pub fn shutdown(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.stopping_since_ms.is_some() {
            return;
        }
        self.stopping_since_ms = Some(now_ms);
        for (service, this) in self.services.iter_mut().enumerate().rev() {
            if this.pid == 0 {
                this.state = State::Stopped;
            } else {
                out.push(Action::Stop { service });
            }
        }
        self.report_stopped(out);
    }

    fn report_stopped(&self, out: &mut Vec<Action>) {
        if self.services.iter().all(|service| service.pid == 0) {
            out.push(Action::AllStopped);
        }
    }

    /// Time passes.
    pub fn tick(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if let Some(since_ms) = self.stopping_since_ms {
            self.kill_the_slow(since_ms, now_ms, out);
            return;
        }
        let limits = self.plan.supervisor.clone();
        for (service, this) in self.services.iter_mut().enumerate() {
            match this.state {
                State::Adopting { until_ms } if until_ms <= now_ms => {
                    this.state = State::Waiting;
                    if this.incarnation > 0 {
                        this.last_exit = "ended while no supervisor was there".to_owned();
                        this.reason = None;
                        out.push(Action::Died { service, incarnation: this.incarnation, held: false });
                    }
                }
                State::Backoff { until_ms } if until_ms <= now_ms => begin(service, this, now_ms, out),
                State::Starting { since_ms } if now_ms - since_ms > limits.start_timeout_ms => {
                    this.reason = Some(format!("not ready {} ms after its start", limits.start_timeout_ms));
                    this.state = State::Starting { since_ms: now_ms };
                    out.push(Action::Kill { service });
                }
                State::Ready { .. } if this.next_ping_ms <= now_ms => {
                    heartbeat(service, this, limits.missed_limit, out);
                    this.next_ping_ms = now_ms + limits.heartbeat_ms;
                }
                _ => {}
            }
        }
        self.start_waiting(out);
    }

    /// When [`Self::tick`] has something to do next.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        if let Some(since_ms) = self.stopping_since_ms {
            return (!self.killed_all).then_some(since_ms + self.plan.supervisor.stop_timeout_ms);
        }
        let deadline = |this: &Service| match this.state {
            State::Adopting { until_ms } | State::Backoff { until_ms } => Some(until_ms),
            State::Starting { since_ms } => Some(since_ms + self.plan.supervisor.start_timeout_ms + 1),
            State::Ready { .. } => Some(this.next_ping_ms),
            State::Waiting | State::Awaited | State::Held | State::Stopped => None,
        };
        self.services.iter().filter_map(deadline).min()
    }

    /// First start: in the plan's order, each when what it needs is ready.
    fn start_waiting(&mut self, out: &mut Vec<Action>) {
        for service in 0..self.services.len() {
            if self.services[service].state != State::Waiting || self.stopping_since_ms.is_some() {
                continue;
            }
            let needs = &self.plan.services[service].needs;
            let up = |name: &String| {
                let other = self.services.iter().find(|other| other.name == *name);
                other.is_some_and(|other| matches!(other.state, State::Ready { .. }))
            };
            if needs.iter().all(up) {
                begin(service, &mut self.services[service], 0, out);
            }
        }
    }

    fn kill_the_slow(&mut self, since_ms: u64, now_ms: u64, out: &mut Vec<Action>) {
        if self.killed_all || now_ms - since_ms < self.plan.supervisor.stop_timeout_ms {
            return;
        }
        self.killed_all = true;
        let alive = self.services.iter().enumerate().filter(|(_, this)| this.pid != 0);
        out.extend(alive.map(|(service, _)| Action::Kill { service }));
    }
}

fn begin(service: usize, this: &mut Service, now_ms: u64, out: &mut Vec<Action>) {
    if this.joins && this.asking == 0 {
        this.state = State::Awaited;
        return;
    }
    let action = if this.joins { Action::Admit { service } } else { Action::Spawn { service } };
    this.asking = this.asking.saturating_sub(1);
    this.incarnation += 1;
    this.sequence = 0;
    this.answered = 0;
    this.state = State::Starting { since_ms: now_ms };
    out.push(action);
}

/// First death: at once. Then the shortest wait, doubled each time, up to the longest.
fn backoff_ms(this: &Service, restart: &uhmm_manifest::Restart) -> u64 {
    match this.deaths.len() as u32 {
        0 | 1 => 0,
        deaths => restart.backoff_min_ms.checked_shl(deaths - 2).unwrap_or(u64::MAX).clamp(1, restart.backoff_max_ms),
    }
}

fn heartbeat(service: usize, this: &mut Service, missed_limit: u32, out: &mut Vec<Action>) {
    if this.answered < this.sequence {
        this.missed += 1;
        if this.missed == missed_limit {
            this.reason = Some(format!("{missed_limit} heartbeats missed"));
            out.push(Action::Kill { service });
        }
    }
    this.sequence += 1;
    out.push(Action::Ping { service, sequence: this.sequence });
}

#[cfg(test)]
mod tests;
