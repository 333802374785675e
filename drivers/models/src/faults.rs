//! What goes wrong in a model, and when: `drop-completion@17` is the 17th command that the device takes from now on.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One kind of misfortune. What it looks like is the model's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The command is refused with an error of the device.
    CommandError,
    /// It is carried out, and nobody is told.
    DropCompletion,
    /// This command and all later ones of its queue stay where they are, until a reset.
    StuckQueue,
    /// It is carried out, and the completion names another command.
    CorruptId,
    /// The device is pulled out.
    Removal,
    /// The device uses addresses that nobody gave it.
    StrayDma,
}

const NAMES: [(Fault, &str); 6] = [
    (Fault::CommandError, "command-error"),
    (Fault::DropCompletion, "drop-completion"),
    (Fault::StuckQueue, "stuck-queue"),
    (Fault::CorruptId, "corrupt-id"),
    (Fault::Removal, "removal"),
    (Fault::StrayDma, "stray-dma"),
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(fault, _)| fault == self).map_or("", |(_, name)| name))
    }
}

/// A fault and the number of the command that it hits, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedFault {
    /// What happens.
    pub fault: Fault,
    /// To which command.
    pub at_command: u64,
}

/// The text is no planned fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no fault: write one of command-error, drop-completion, stuck-queue, corrupt-id, removal, stray-dma, then @ and a command's number from 1 on"
)]
pub struct NoFault {
    text: String,
}

impl FromStr for PlannedFault {
    type Err = NoFault;

    fn from_str(text: &str) -> Result<Self, NoFault> {
        let parsed = || {
            let (name, number) = text.split_once('@')?;
            let (fault, _) = NAMES.iter().find(|(_, known)| *known == name)?;
            let at_command = number.parse().ok().filter(|number| *number > 0)?;
            Some(Self { fault: *fault, at_command })
        };
        parsed().ok_or_else(|| NoFault { text: text.to_owned() })
    }
}

/// What goes wrong with which of the commands to come, for any kind of misfortune. Cheap to clone; all clones are one plan, so that
/// whoever holds one adds to it while the model runs.
#[derive(Debug)]
pub struct FaultPlan<F = Fault> {
    /// In so many commands: this.
    planned: Arc<Mutex<Vec<(u64, F)>>>,
}

impl<F> Clone for FaultPlan<F> {
    fn clone(&self) -> Self {
        Self { planned: Arc::clone(&self.planned) }
    }
}

impl<F> Default for FaultPlan<F> {
    fn default() -> Self {
        Self { planned: Arc::default() }
    }
}

impl FaultPlan {
    /// These, in any order.
    pub fn new(planned: Vec<PlannedFault>) -> Self {
        let plan = Self::default();
        planned.into_iter().for_each(|planned| plan.inject(planned.at_command, planned.fault));
        plan
    }
}

impl<F: fmt::Debug> FaultPlan<F> {
    /// The `nth` command from now on (1: the next one) meets this fault, once. Of several for one command the first hits it and the others
    /// those behind it.
    pub fn inject(&self, nth: u64, fault: F) {
        self.planned().push((nth.max(1), fault));
    }

    /// The device takes a command: what goes wrong with it.
    pub fn next_command(&self) -> Option<F> {
        let mut planned = self.planned();
        planned.iter_mut().for_each(|(left, _)| *left = left.saturating_sub(1));
        let due = planned.iter().position(|(left, _)| *left == 0)?;
        let (_, fault) = planned.remove(due);
        tracing::warn!(?fault, "Injected");
        Some(fault)
    }

    fn planned(&self) -> MutexGuard<'_, Vec<(u64, F)>> {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_as_they_are_written() {
        for (fault, name) in NAMES {
            let planned: PlannedFault = format!("{fault}@12").parse().unwrap();
            assert_eq!((planned, fault.to_string().as_str()), (PlannedFault { fault, at_command: 12 }, name));
        }
        for bad in ["", "removal", "removal@0", "removal@x", "remove@1", "removal@-1"] {
            assert!(
                bad.parse::<PlannedFault>().is_err_and(|error| error.to_string().contains("drop-completion")),
                "{bad}"
            );
        }
    }

    #[test]
    fn each_hits_its_command_once_and_two_at_one_command_hit_two() {
        let planned = ["stuck-queue@3", "corrupt-id@1", "removal@3"].map(|text| text.parse().unwrap());
        let plan = FaultPlan::new(planned.to_vec());
        let hits: Vec<_> = (0..5).map(|_| plan.next_command()).collect();
        assert_eq!(hits, [Some(Fault::CorruptId), None, Some(Fault::StuckQueue), Some(Fault::Removal), None]);
        plan.clone().inject(2, Fault::DropCompletion);
        assert_eq!(
            [plan.next_command(), plan.next_command()],
            [None, Some(Fault::DropCompletion)],
            "counted from now on"
        );
    }
}
