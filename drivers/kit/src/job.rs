//! Who runs what, as a pure book: clients' queues and the jobs in flight.
//!
//! ```text
//!   OpenQueue --token accepted by the pager--> queue --Submit--> job --finished | cancelled--> one reply
//!                                                |                 ^
//!                                                +-- client gone --+  SpaceGone, deadline passed: cancelled
//! ```
//! A job's answer goes to the connection that submitted it; if that is gone, the job is cancelled and its answer dropped.
//! The book is generic over the connection and call names, so that it can be tested without sockets.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::Hash;

use uhmm_ipc::message::{ErrorCode, TraceId, WireError};

use crate::device::{Job, JobId, KernelSpec};

/// A submitted job's origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin<Conn, Call> {
    pub(crate) conn: Conn,
    pub(crate) call: Call,
    pub(crate) space: u64,
    pub(crate) trace: TraceId,
}

/// What a client asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) space: u64,
    pub(crate) kernel: String,
    pub(crate) args: Vec<u64>,
    pub(crate) idempotent: bool,
    pub(crate) trace: TraceId,
}

/// Queues and jobs.
#[derive(Debug)]
pub(crate) struct JobBook<Conn, Call> {
    kernels: Vec<KernelSpec>,
    queues: HashMap<Conn, HashSet<u64>>,
    jobs: BTreeMap<JobId, Origin<Conn, Call>>,
    next_job: u64,
}

impl<Conn: Copy + Eq + Hash, Call: Copy> JobBook<Conn, Call> {
    pub(crate) fn new(kernels: Vec<KernelSpec>) -> Self {
        Self { kernels, queues: HashMap::new(), jobs: BTreeMap::new(), next_job: 0 }
    }

    /// What `Info` shows.
    pub(crate) fn usage_lines(&self) -> Vec<String> {
        self.kernels.iter().map(|kernel| kernel.usage.to_owned()).collect()
    }

    pub(crate) fn running(&self) -> usize {
        self.jobs.len()
    }

    /// The pager accepted the client's token.
    pub(crate) fn queue_opened(&mut self, conn: Conn, space: u64) {
        self.queues.entry(conn).or_default().insert(space);
    }

    /// Somebody still has a queue on the space.
    pub(crate) fn space_in_use(&self, space: u64) -> bool {
        self.queues.values().any(|spaces| spaces.contains(&space))
    }

    /// Checks a request and names its job.
    pub(crate) fn submit(&mut self, conn: Conn, call: Call, request: Request) -> Result<Job, WireError> {
        let Request { space, kernel, args, idempotent, trace } = request;
        self.check_queue(conn, space)?;
        let Some((index, spec)) = self.kernels.iter().enumerate().find(|(_, spec)| spec.name == kernel) else {
            let names: Vec<&str> = self.kernels.iter().map(|spec| spec.name).collect();
            let text = format!("Kernel {kernel:?} is not one of this driver's: it has {}", names.join(", "));
            return Err(WireError::new(ErrorCode::NotFound, text));
        };
        if args.len() != spec.argument_count {
            let text = format!("Kernel {kernel} was given {} arguments, it is {}", args.len(), spec.usage);
            return Err(WireError::new(ErrorCode::Invalid, text));
        }
        if idempotent && !spec.idempotent {
            let text = format!("Kernel {kernel} must not run twice: submit it as not idempotent");
            return Err(WireError::new(ErrorCode::Invalid, text));
        }
        let id = self.name(Origin { conn, call, space, trace });
        Ok(Job { id, space, kernel: index, args })
    }

    /// Names a direct access of a client as a job, so that it ends with its client.
    pub(crate) fn open_access(
        &mut self,
        conn: Conn,
        call: Call,
        space: u64,
        trace: TraceId,
    ) -> Result<JobId, WireError> {
        self.check_queue(conn, space)?;
        Ok(self.name(Origin { conn, call, space, trace }))
    }

    /// The client may use the space.
    pub(crate) fn check_queue(&self, conn: Conn, space: u64) -> Result<(), WireError> {
        if self.queues.get(&conn).is_some_and(|spaces| spaces.contains(&space)) {
            return Ok(());
        }
        let text = format!("Space {space} has no queue on this connection: send OpenQueue with its token first");
        Err(WireError::new(ErrorCode::Permission, text))
    }

    fn name(&mut self, origin: Origin<Conn, Call>) -> JobId {
        self.next_job += 1;
        let id = JobId(self.next_job);
        self.jobs.insert(id, origin);
        id
    }

    /// A job ended: whom to tell. `None` for one that nobody waits for.
    pub(crate) fn finished(&mut self, job: JobId) -> Option<Origin<Conn, Call>> {
        self.jobs.remove(&job)
    }

    /// The job is still in flight.
    pub(crate) fn is_running(&self, job: JobId) -> bool {
        self.jobs.contains_key(&job)
    }

    /// Jobs and accesses in flight of a space.
    pub(crate) fn of_space(&self, space: u64) -> impl Iterator<Item = JobId> {
        self.jobs.iter().filter(move |(_, origin)| origin.space == space).map(|(id, _)| *id)
    }

    /// Trace of the request behind a job.
    pub(crate) fn trace(&self, job: JobId) -> TraceId {
        self.jobs.get(&job).map_or(TraceId::default(), |origin| origin.trace)
    }

    /// The client is gone: jobs to cancel, and spaces that nobody has a queue on any more.
    pub(crate) fn closed(&mut self, conn: Conn) -> (Vec<JobId>, Vec<u64>) {
        let spaces = self.queues.remove(&conn).unwrap_or_default();
        let jobs = self.jobs.iter().filter(|(_, origin)| origin.conn == conn).map(|(id, _)| *id).collect();
        let unused = spaces.into_iter().filter(|space| !self.space_in_use(*space)).collect();
        (jobs, unused)
    }

    /// The space is gone: its jobs are to be cancelled, its queues are closed.
    pub(crate) fn space_gone(&mut self, space: u64) -> Vec<JobId> {
        for spaces in self.queues.values_mut() {
            spaces.remove(&space);
        }
        self.of_space(space).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book() -> JobBook<u32, u32> {
        let spec = |name, argument_count, idempotent| KernelSpec { name, usage: name, argument_count, idempotent };
        JobBook::new(vec![spec("sum", 2, true), spec("add", 1, false)])
    }

    fn request(space: u64, kernel: &str, args: &[u64], idempotent: bool) -> Request {
        Request { space, kernel: kernel.to_owned(), args: args.to_vec(), idempotent, trace: TraceId(5) }
    }

    fn code(result: Result<Job, WireError>) -> Option<ErrorCode> {
        result.err().map(|error| error.code)
    }

    #[test]
    fn a_job_needs_a_queue_opened_on_its_own_connection() {
        let mut book = book();
        book.queue_opened(1, 7);
        assert_eq!(code(book.submit(2, 0, request(7, "sum", &[0, 0], true))), Some(ErrorCode::Permission));
        assert_eq!(code(book.submit(1, 0, request(8, "sum", &[0, 0], true))), Some(ErrorCode::Permission));
        assert_eq!(code(book.submit(1, 0, request(7, "sum", &[0, 0], true))), None);
    }

    #[test]
    fn wrong_names_counts_and_idempotence_claims_are_refused() {
        let mut book = book();
        book.queue_opened(1, 7);
        assert_eq!(code(book.submit(1, 0, request(7, "sun", &[0, 0], true))), Some(ErrorCode::NotFound));
        assert_eq!(code(book.submit(1, 0, request(7, "sum", &[0], true))), Some(ErrorCode::Invalid));
        assert_eq!(code(book.submit(1, 0, request(7, "add", &[0], true))), Some(ErrorCode::Invalid));
        assert_eq!(code(book.submit(1, 0, request(7, "add", &[0], false))), None);
        assert_eq!(book.running(), 1);
    }

    #[test]
    fn a_lost_client_takes_its_own_jobs_and_only_unused_spaces_along() -> Result<(), WireError> {
        let mut book = book();
        book.queue_opened(1, 7);
        book.queue_opened(1, 8);
        book.queue_opened(2, 8);
        let mine = book.submit(1, 10, request(8, "sum", &[0, 0], true))?.id;
        let theirs = book.submit(2, 11, request(8, "sum", &[0, 0], true))?.id;
        assert_eq!(book.closed(1), (vec![mine], vec![7]));
        assert_eq!(book.finished(theirs), Some(Origin { conn: 2, call: 11, space: 8, trace: TraceId(5) }));
        assert!(book.is_running(mine));
        Ok(())
    }

    #[test]
    fn a_lost_space_closes_its_queues_and_answers_its_jobs_once() -> Result<(), WireError> {
        let mut book = book();
        book.queue_opened(1, 7);
        let job = book.submit(1, 10, request(7, "sum", &[0, 0], true))?.id;
        assert_eq!(book.space_gone(7), vec![job]);
        assert_eq!(code(book.submit(1, 0, request(7, "sum", &[0, 0], true))), Some(ErrorCode::Permission));
        assert!(book.finished(job).is_some());
        assert!(book.finished(job).is_none());
        Ok(())
    }
}
