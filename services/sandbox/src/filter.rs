//! From the table to a filter.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use uhmm_kernel_hook::confine::{Filter, Instruction, OWN_PROCESS, calls};

/// The compiler knows no action that asks a listener: it compiles this one, which nothing else uses, and that is exchanged.
const STAND_IN: u32 = 0x5548;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const AF_UNIX: u64 = 1;
const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
const SOCK_STREAM: u64 = 1;
/// What of the second argument is no flag.
const SOCKET_KIND: u64 = 0xf;
const CLONE_VM_AND_THREAD: u64 = 0x0001_0100;
const IOCTL_FAMILY: u64 = 0xff00;

/// A call that is allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// As the kernel has it.
    pub name: String,
    /// Not in every form.
    pub only: Option<Only>,
}

/// Which form of a call.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Only {
    /// Unix sockets.
    Unix,
    /// Unix sockets, and streams of TCP: no datagrams, which no port limits.
    UnixAndTcp,
    /// Threads of the same process; no processes.
    Threads,
    /// The first argument is the own process, or 0.
    Own,
    /// First arguments.
    Options(Vec<u32>),
    /// Second arguments.
    Second(Vec<u32>),
    /// ioctl numbers, and families of them.
    Ioctls {
        /// One by one.
        numbers: Vec<u32>,
        /// All of a family (the second byte).
        families: Vec<u32>,
    },
}

impl Only {
    /// Any of these.
    fn rules(&self) -> seccompiler::Result<Vec<SeccompRule>> {
        let when = |index: u8, op: Op, value: u64| {
            Ok(SeccompRule::new(vec![SeccompCondition::new(index, ArgLen::Dword, op, value)?])?)
        };
        match self {
            Self::Unix => Ok(vec![when(0, Op::Eq, AF_UNIX)?]),
            Self::UnixAndTcp => {
                let condition = |index, op, value| SeccompCondition::new(index, ArgLen::Dword, op, value);
                let stream = |family| -> seccompiler::Result<SeccompRule> {
                    Ok(SeccompRule::new(vec![
                        condition(0, Op::Eq, family)?,
                        condition(1, Op::MaskedEq(SOCKET_KIND), SOCK_STREAM)?,
                        condition(2, Op::Eq, 0)?,
                    ])?)
                };
                Ok(vec![when(0, Op::Eq, AF_UNIX)?, stream(AF_INET)?, stream(AF_INET6)?])
            }
            Self::Threads => Ok(vec![when(0, Op::MaskedEq(CLONE_VM_AND_THREAD), CLONE_VM_AND_THREAD)?]),
            Self::Own => Ok(vec![when(0, Op::Eq, 0)?, when(0, Op::Eq, u64::from(OWN_PROCESS))?]),
            Self::Options(options) => options.iter().map(|option| when(0, Op::Eq, u64::from(*option))).collect(),
            Self::Second(options) => options.iter().map(|option| when(1, Op::Eq, u64::from(*option))).collect(),
            Self::Ioctls { numbers, families } => {
                let numbers = numbers.iter().map(|number| when(1, Op::Eq, u64::from(*number)));
                let families = families.iter().map(|family| when(1, Op::MaskedEq(IOCTL_FAMILY), u64::from(*family)));
                numbers.chain(families).collect()
            }
        }
    }
}

/// The filter of a list of calls. A call that this architecture does not have needs no rule.
pub(crate) fn compile(allowed: &[Call]) -> Result<Filter, String> {
    let text = |error: seccompiler::Error| error.to_string();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in allowed {
        let Some(number) = calls::number(&call.name) else { continue };
        let of_call = call.only.as_ref().map_or(Ok(vec![]), Only::rules).map_err(text)?;
        rules.insert(number, of_call);
    }
    let program = |rules, otherwise, then| -> Result<Vec<Instruction>, String> {
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| error.to_string())?;
        let filter = SeccompFilter::new(rules, otherwise, then, arch).map_err(|error| error.to_string())?;
        let program: BpfProgram = filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
        Ok(program.iter().map(instruction).collect())
    };
    // Its arguments lie in memory, where no filter looks: the C library takes this answer for an older kernel's, and calls clone.
    let clone3 = calls::number("clone3").map(|number| (number, vec![])).into_iter().collect();
    Ok(Filter {
        special: program(clone3, SeccompAction::Allow, SeccompAction::Errno(ENOSYS))?,
        telling: program(rules.clone(), SeccompAction::Trace(STAND_IN), SeccompAction::Allow)?,
        silent: program(rules, SeccompAction::Errno(EPERM), SeccompAction::Allow)?,
    })
}

fn instruction(compiled: &seccompiler::sock_filter) -> Instruction {
    let asks = compiled.k == RET_TRACE | STAND_IN;
    let number = if asks { RET_USER_NOTIF } else { compiled.k };
    Instruction { code: compiled.code, jump_true: compiled.jt, jump_false: compiled.jf, number }
}
