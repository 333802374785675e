//! What goes wrong in a model, and when: `drop-completion@17` is the 17th command that the device takes.

use std::fmt;
use std::str::FromStr;

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

/// Asked once a command.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    planned: Vec<PlannedFault>,
    commands: u64,
}

impl FaultPlan {
    /// These, in any order; of several for one command the first is taken.
    pub fn new(planned: Vec<PlannedFault>) -> Self {
        Self { planned, commands: 0 }
    }

    /// The device takes a command: what goes wrong with it.
    pub fn next_command(&mut self) -> Option<Fault> {
        self.commands += 1;
        let fault = self.planned.iter().find(|planned| planned.at_command == self.commands)?.fault;
        tracing::warn!(%fault, command = self.commands, "Injected");
        Some(fault)
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
    fn each_hits_its_command_once() {
        let planned = ["stuck-queue@3", "corrupt-id@1", "removal@3"].map(|text| text.parse().unwrap());
        let mut plan = FaultPlan::new(planned.to_vec());
        let hits: Vec<_> = (0..4).map(|_| plan.next_command()).collect();
        assert_eq!(hits, [Some(Fault::CorruptId), None, Some(Fault::StuckQueue), None]);
    }
}
