//! Clients' calls: what the device is, queues on spaces, jobs.

use std::time::Instant;

use uhmm_ipc::message::{Call, ErrorCode, Reply, TraceId, WireError, common, driver, mirror};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kit::record::{self, What, Why};

use crate::access::Wanted;
use crate::access::prepare::wanted;
use crate::device::{DeviceMemory, Driver, JobId, JobReport, PAGE_BYTES};
use crate::fault::FaultEvent;
use crate::job::Request;
use crate::run::{Asked, DriverLoop, Due, RELINK_PAUSE};

impl<D: Driver> DriverLoop<D> {
    pub(crate) fn on_call(
        &mut self,
        conn: ConnId,
        call: CallId,
        trace: TraceId,
        deadline: Option<Instant>,
        body: Call,
    ) {
        // A connection may be older than this loop: the service frame accepts clients while it starts.
        self.conns.insert(conn);
        let answer = match body {
            Call::Common(common::Call::Stats) => {
                let mut metrics = self.stats.metrics(self.suspended.len(), self.jobs.running());
                metrics.extend(record::metrics(|each| self.memory.tell(each)));
                Some(Ok(Reply::Common(common::Reply::Stats(metrics))))
            }
            Call::Driver(driver::Call::Info) => Some(Ok(Reply::Driver(self.info()))),
            Call::Driver(driver::Call::OpenQueue { space, token }) => {
                // Asked even for a space that is open: the token is what proves this client's right.
                self.open_space(space, token, Some((conn, call)), trace);
                None
            }
            Call::Driver(driver::Call::Submit { space, kernel, args, idempotent, ranges }) => {
                let request = Request { space, kernel, args, idempotent, trace };
                self.submit(conn, call, request, &ranges, deadline).err().map(Err)
            }
            Call::Driver(driver::Call::Access { space, addr, len_bytes, op, buffer }) => {
                let wanted = Wanted { space, addr, len_bytes, op, buffer };
                self.begin_access(conn, call, trace, deadline, wanted).err().map(Err)
            }
            _ => Some(Err(WireError::new(ErrorCode::Protocol, "Not a call of the driver interface"))),
        };
        if let Some(answer) = answer {
            self.service.reactor.reply(conn, call, answer);
        }
    }

    pub(crate) fn open_space(&mut self, space: u64, token: Vec<u8>, client: Option<(ConnId, CallId)>, trace: TraceId) {
        let open = mirror::Call::Open { space, token: token.clone() };
        self.ask_mirror(open, trace, Asked::Open { space, token, client });
    }

    fn info(&self) -> driver::Reply {
        driver::Reply::Info {
            driver: self.driver_name.to_owned(),
            device: self.plan.id,
            memory_bytes: u64::from(self.memory.frame_count()) * PAGE_BYTES,
            aperture: self.memory.aperture().is_some(),
            coherent: self.plan.coherent && self.memory.aperture().is_some(),
            kernels: self.jobs.usage_lines(),
        }
    }

    /// What a client that has proven itself maps.
    fn coherent_memory(&self) -> Option<driver::CoherentMemory> {
        let (device, generation) = (self.plan.id, self.generation);
        let memory = self.memory.aperture().filter(|_| self.plan.coherent);
        memory.map(|memory| driver::CoherentMemory { device, generation, memory })
    }

    fn submit(
        &mut self,
        conn: ConnId,
        call: CallId,
        request: Request,
        ranges: &[driver::JobRange],
        deadline: Option<Instant>,
    ) -> Result<(), WireError> {
        let trace = request.trace;
        let ranges = wanted(request.space, ranges)?;
        let job = self.jobs.submit(conn, call, request)?;
        tracing::debug!(request = trace.0, job = job.id.0, space = job.space, kernel = job.kernel, "Job submitted");
        let now = record::Event::new(What::Job, record::now_ns());
        self.service.record.event(&record::Event { trace: trace.0, space: job.space, ..now });
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let timer = self.after(left, Due::JobDeadline(job.id));
            self.job_timers.insert(job.id, timer);
        }
        self.prepare_job(job, ranges, trace);
        Ok(())
    }

    /// The mirror's answer to an `Open`.
    pub(crate) fn space_opened(
        &mut self,
        space: u64,
        token: Vec<u8>,
        client: Option<(ConnId, CallId)>,
        result: Result<Reply, WireError>,
    ) {
        let present = client.filter(|(conn, _)| self.conns.contains(conn));
        if let Err(error) = result {
            if error.code == ErrorCode::Stale {
                // Not an answer: the session was refused because of something else, and is begun anew.
                if self.reopen.is_empty() {
                    self.after(RELINK_PAUSE, Due::Reopen);
                }
                self.reopen.push((space, token, client));
                return;
            }
            match present {
                Some((conn, call)) => {
                    self.service.reactor.reply(conn, call, Err(error));
                }
                None if client.is_none() && error.code == ErrorCode::Permission => {
                    self.end_space(space, &error.text, true);
                }
                None => {}
            }
            return;
        }
        if let Some((conn, call)) = present {
            self.spaces.insert(space, token);
            self.jobs.queue_opened(conn, space);
            self.refresh_preambles();
            self.service.reactor.reply(
                conn,
                call,
                Ok(Reply::Driver(driver::Reply::QueueOpened { coherent: self.coherent_memory() })),
            );
        } else if !self.jobs.space_in_use(space) {
            // The client left while its token was checked.
            self.end_space(space, "Its client disconnected", true);
        }
    }

    /// A job ended: its client hears of it, unless it is gone.
    pub(crate) fn job_finished(&mut self, job: JobId, report: JobReport) {
        if let Some(timer) = self.job_timers.remove(&job) {
            self.cancel_timer(timer);
        }
        self.suspended.retain(|_, (of, _)| *of != job);
        self.step_faults(FaultEvent::JobGone { job });
        let Some(origin) = self.jobs.finished(job) else { return };
        let JobReport { result, fault_count, run_time_ns } = report;
        tracing::debug!(
            request = origin.trace.0,
            job = job.0,
            fault_count,
            run_time_ns,
            ok = result.is_ok(),
            "Job ended"
        );
        let now = record::Event::new(What::JobDone, record::now_ns());
        let why = if result.is_ok() { Why::None } else { Why::Failed };
        self.service.record.event(&record::Event { trace: origin.trace.0, why, value: run_time_ns, ..now });
        self.stats.jobs += 1;
        self.stats.failed_jobs += u64::from(result.is_err());
        let answer = result.map(|results| Reply::Driver(driver::Reply::Finished { results, fault_count, run_time_ns }));
        self.service.reactor.reply(origin.conn, origin.call, answer);
    }

    /// Nobody waits for the job any more.
    pub(crate) fn job_expired(&mut self, job: JobId) {
        self.job_timers.remove(&job);
        if self.jobs.is_running(job) {
            let text = "The deadline of the job or access passed: it was cancelled";
            self.cancel_job(job, WireError::new(ErrorCode::TimedOut, text));
        }
    }

    /// A client's connection is gone: its jobs end; a space that nobody else uses is given up.
    pub(crate) fn client_gone(&mut self, conn: ConnId) {
        self.conns.remove(&conn);
        self.accesses.buffers.forget(conn);
        let (jobs, unused_spaces) = self.jobs.closed(conn);
        for job in jobs {
            let why = WireError::new(ErrorCode::Stale, "The client disconnected: its job was cancelled");
            self.cancel_job(job, why);
        }
        for space in unused_spaces {
            self.end_space(space, "Its client disconnected", true);
        }
    }
}
