//! Which CPUs work: the program's threads and the services' (or the bare handler's) are kept on CPUs by the scheduler's affinity, which
//! children inherit.

use anyhow::Context;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the program and who answers its faults run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// All of both on the same CPU, as in a container that has one.
    OneCpu,
    /// The program on one, everything else on another one.
    OtherCpu,
    /// Wherever the scheduler likes.
    Free,
}

impl Place {
    pub fn name(self) -> &'static str {
        match self {
            Self::OneCpu => "one cpu",
            Self::OtherCpu => "other cpu",
            Self::Free => "free",
        }
    }

    /// CPUs of the program.
    pub fn program(self) -> anyhow::Result<Vec<usize>> {
        let all = allowed()?;
        Ok(if self == Self::Free { all } else { all[..1].to_vec() })
    }

    /// CPUs of who answers.
    pub fn services(self) -> anyhow::Result<Vec<usize>> {
        let all = allowed()?;
        Ok(match self {
            Self::OneCpu => all[..1].to_vec(),
            Self::OtherCpu => vec![*all.get(1).context("There is only one CPU")?],
            Self::Free => all,
        })
    }
}

/// CPUs that this process may use: at least one.
pub(super) fn allowed() -> anyhow::Result<Vec<usize>> {
    static ALLOWED: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    if let Some(cpus) = ALLOWED.get() {
        return Ok(cpus.clone());
    }
    let set = sched_getaffinity(None).context("sched_getaffinity")?;
    let cpus = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect();
    Ok(ALLOWED.get_or_init(|| cpus).clone())
}

/// Keeps the calling thread on these CPUs.
pub(super) fn stay_on(cpus: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    sched_setaffinity(None, &set).with_context(|| format!("Staying on CPUs {cpus:?}"))
}

/// Does something on these CPUs; what it starts stays there.
pub(super) fn on<T>(cpus: &[usize], work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let before = allowed()?;
    stay_on(cpus)?;
    let done = work();
    stay_on(&before)?;
    done
}
