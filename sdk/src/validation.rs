//! Calls to drivers that wait until the pager has taken back what devices may not do any more: mprotect and its like tell nobody.
//!
//! ```text
//!   access, kernel --> asked (Revalidate to the pager) --> answered --> next: sent to the driver, in the order of asking
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use uhmm_ipc::CallId;
use uhmm_ipc::message::{Reply, TraceId, WireError};

use crate::links::{Deliver, Make};

/// A call to a driver.
pub(crate) struct Validated {
    pub(crate) driver: String,
    pub(crate) make: Make,
    pub(crate) trace: TraceId,
    /// When its answer must be here.
    pub(crate) until: Option<Instant>,
    pub(crate) deliver: Deliver,
}

/// The pager's answer, once it is here.
type Answer = Option<Result<(), WireError>>;

/// See the module head.
#[derive(Default)]
pub(crate) struct Validations {
    /// By driver, in the order of asking.
    waiting: BTreeMap<String, VecDeque<(CallId, Answer, Validated)>>,
}

impl Validations {
    /// `id`: of the question to the pager.
    pub(crate) fn asked(&mut self, id: CallId, call: Validated) {
        self.waiting.entry(call.driver.clone()).or_default().push_back((id, None, call));
    }

    /// The pager has answered; false for an answer to something else.
    pub(crate) fn answered(&mut self, id: CallId, result: &Result<Reply, WireError>) -> bool {
        let mut all = self.waiting.values_mut().flatten();
        let Some((_, answer, _)) = all.find(|(known, _, _)| *known == id) else { return false };
        *answer = Some(result.as_ref().map(drop).map_err(Clone::clone));
        true
    }

    /// A call whose turn it is, and why it is refused, if it is.
    pub(crate) fn next(&mut self) -> Option<(Validated, Option<WireError>)> {
        let is_due = |lane: &&mut VecDeque<(CallId, Answer, Validated)>| {
            lane.front().is_some_and(|(_, answer, _)| answer.is_some())
        };
        let (_, answer, call) = self.waiting.values_mut().find(is_due)?.pop_front()?;
        self.waiting.retain(|_, lane| !lane.is_empty());
        Some((call, answer.and_then(Result::err)))
    }
}

#[cfg(test)]
mod tests {
    use uhmm_ipc::message::{ErrorCode, pager};

    use super::*;

    fn call(driver: &str, trace: u64) -> Validated {
        let make: Make = Box::new(|_| Err(crate::Error::AgentGone));
        Validated { driver: driver.into(), make, trace: TraceId(trace), until: None, deliver: Box::new(drop) }
    }

    #[test]
    fn calls_to_one_driver_keep_their_order_and_others_do_not_wait_for_them() {
        let mut validations = Validations::default();
        for (id, driver) in [(1, "a"), (2, "a"), (3, "b")] {
            validations.asked(CallId(id), call(driver, id));
        }
        let done = Ok(Reply::Pager(pager::Reply::Done));
        assert!(!validations.answered(CallId(9), &done));
        assert!(validations.answered(CallId(2), &done));
        assert!(validations.next().is_none(), "the first has no answer yet");
        assert!(validations.answered(CallId(3), &Err(WireError::new(ErrorCode::Io, "broken"))));
        let (b, refused) = validations.next().unwrap();
        assert_eq!((b.trace.0, refused.map(|error| error.code)), (3, Some(ErrorCode::Io)));
        assert!(validations.answered(CallId(1), &done));
        let order: Vec<u64> = std::iter::from_fn(|| validations.next()).map(|(call, _)| call.trace.0).collect();
        assert_eq!(order, [1, 2]);
    }
}
