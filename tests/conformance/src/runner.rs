//! The runner: picks cases, runs each in a process of its own, looks for what it left behind, counts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use regex::Regex;
use serde::{Deserialize, Serialize};
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_sdk::Operator;

use crate::case::{Case, CaseArgs, Needs, Outcome, OutcomeStatus, guarded};
use crate::chaos::Killer;
use crate::ctx::Ctx;
use crate::error::ConformanceError;
use crate::leaks::{Inventory, wait_clean};
use crate::pattern::hash;
use crate::report::{CaseReport, Report, Status};
use crate::system::System;
use crate::{cases, child};

/// Hidden case that finds the devices and their kind of memory, and makes the services do everything once before stock is taken.
pub(crate) const WARM_UP: &str = "warm-up";
/// Last case: all of device memory can still be filled, so no frame was lost on the way.
const LAST: &str = "Z01_device_memory_is_whole";
/// Deadline of the first contact.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(30);
/// A disturbed case may take so many times longer.
const DISTURBED_FACTOR: u32 = 6;
/// Under chaos a case is run until so many services have died,
const CHAOS_KILLS: u64 = 3;
/// or so often.
const CHAOS_ROUNDS: u64 = 40;
/// How long the last traces of a case may take to go away.
const CLEAN_PATIENCE: Duration = Duration::from_secs(5);
/// Held against the suite when none is named.
const DEFAULT_DRIVER: &str = "soft";

/// What `uhmm conformance` was asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Driver; `soft` when not named.
    pub driver: Option<String>,
    /// The devices of a system of our own are coherent.
    pub coherent: bool,
    /// Regular expression over case names.
    pub filter: Option<String>,
    /// Machines read the output: no table.
    pub json: bool,
    /// Kill services at random moments, seeded.
    pub chaos: Option<u64>,
    /// Stop the cases' agent threads now and then.
    pub pause_agent: bool,
    /// Cases may take so many times longer; 0 is 1.
    pub patience: u32,
    /// System to use instead of one of our own.
    pub run_dir: Option<PathBuf>,
}

/// What the first contact has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) devices: Vec<String>,
    pub(crate) other_devices: Vec<String>,
    pub(crate) coherent: bool,
    /// Pages that fit on the first device at once.
    pub(crate) capacity_pages: u64,
}

fn chosen(filter: Option<&str>) -> Result<Vec<Case>, ConformanceError> {
    let mut all = cases::all();
    let Some(filter) = filter else { return Ok(all) };
    let expression = Regex::new(filter)?;
    all.retain(|case| expression.is_match(&case.name));
    if all.is_empty() {
        return Err(ConformanceError::NoSuchCase { filter: filter.to_owned() });
    }
    Ok(all)
}

/// Names of the cases that a filter picks, in order (`--list`).
///
/// # Errors
/// [`ConformanceError::BadFilter`], [`ConformanceError::NoSuchCase`].
pub fn case_names(filter: Option<&str>) -> Result<Vec<String>, ConformanceError> {
    Ok(chosen(filter)?.into_iter().map(|case| case.name).collect())
}

/// Runs the suite; `exe` is the program that has the `conformance-case` and service commands. Prints the table as it grows, or
/// the JSON object at the end.
///
/// # Errors
/// Only what keeps the suite from running; failed cases are in the report.
pub fn run(exe: &Path, options: &Options) -> Result<Report, ConformanceError> {
    let cases = chosen(options.filter.as_deref())?;
    // Before the first child and thread, so that a signal can never end the suite without ending its system.
    let stop = StopSignals::block()?;
    let driver = options.driver.as_deref().unwrap_or(DEFAULT_DRIVER);
    let system = match &options.run_dir {
        Some(run_dir) => System::existing(run_dir.clone()),
        None => System::start(exe, driver, options.coherent)?,
    };
    let mut runner = Runner::new(exe, options, system, driver, stop)?;
    let report = runner.run(&cases)?;
    let log = if report.failed > 0 { runner.system.save_log() } else { None };
    drop(runner);
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{}", report.totals());
    }
    if let Some(log) = log {
        eprintln!("The services' log is in {}", log.display());
    }
    Ok(report)
}

struct Runner<'a> {
    exe: &'a Path,
    options: &'a Options,
    system: System,
    driver: &'a str,
    operator: Operator,
    found: Found,
    rest: Inventory,
    stop: StopSignals,
}

impl<'a> Runner<'a> {
    fn new(
        exe: &'a Path,
        options: &'a Options,
        system: System,
        driver: &'a str,
        stop: StopSignals,
    ) -> Result<Self, ConformanceError> {
        let mut operator = system.operator()?;
        let found = first_contact(exe, &system, &mut operator, (driver, options.patience.max(1)), &stop)?;
        let mut runner = Self { exe, options, system, driver, operator, found, rest: Inventory::default(), stop };
        runner.rest = runner.settle()?;
        Ok(runner)
    }

    /// After a failure the next case shall find a system as good as new.
    fn start_afresh(&mut self) -> Result<(), ConformanceError> {
        if self.system.restart()? {
            self.operator = self.system.operator()?;
            self.found = first_contact(
                self.exe,
                &self.system,
                &mut self.operator,
                (self.driver, self.options.patience.max(1)),
                &self.stop,
            )?;
        }
        // In a system that is not ours the next case is measured by what there is now: one leak is one failure.
        self.rest = self.settle()?;
        Ok(())
    }

    /// Stock of the system when the first contact's client is gone for good: the same twice in a row.
    fn settle(&mut self) -> Result<Inventory, ConformanceError> {
        let supervisor = self.system.supervisor_pid();
        let end = Instant::now() + CLEAN_PATIENCE;
        let mut last = Inventory::take(&mut self.operator, supervisor)?;
        loop {
            // No event: that nothing changes for a while is what is looked for.
            std::thread::sleep(Duration::from_millis(50));
            let now = Inventory::take(&mut self.operator, supervisor)?;
            if now == last || Instant::now() > end {
                return Ok(now);
            }
            last = now;
        }
    }

    fn disturbed(&self) -> bool {
        self.options.chaos.is_some() || self.options.pause_agent
    }

    fn run(&mut self, cases: &[Case]) -> Result<Report, ConformanceError> {
        let mut report = Report::default();
        for case in cases {
            let started = Instant::now();
            let outcome = self.run_one(case)?;
            let status = match outcome.status {
                OutcomeStatus::Passed => Status::Passed,
                OutcomeStatus::Failed => Status::Failed,
                OutcomeStatus::NotApplicable => Status::NotApplicable,
            };
            let time_ms = started.elapsed().as_millis() as u64;
            let result = CaseReport { name: case.name.clone(), status, why: outcome.why, time_ms };
            if !self.options.json {
                println!("{}", result.line());
            }
            report.add(result);
            if outcome.status == OutcomeStatus::Failed {
                self.start_afresh()?;
            }
        }
        Ok(report)
    }

    fn run_one(&mut self, case: &Case) -> Result<Outcome, ConformanceError> {
        if let Some(why) = self.excluded(case) {
            return Ok(Outcome { status: OutcomeStatus::NotApplicable, why });
        }
        let seed = self.options.chaos.unwrap_or(0) ^ hash(&case.name);
        let coherent = case.needs == Needs::Coherent;
        let args = CaseArgs { chaos: self.options.chaos.is_some(), coherent, ..self.args(&case.name, seed) };
        let factor = if self.disturbed() { DISTURBED_FACTOR } else { 1 } * self.options.patience.max(1);
        let outcome = match self.options.chaos {
            Some(_) => self.run_under_chaos(&args, case.deadline * factor)?,
            None => child::run(self.exe, &args, case.deadline * factor, &self.stop)?,
        };
        let supervisor = self.system.supervisor_pid();
        let left = wait_clean(&mut self.operator, supervisor, &self.rest, CLEAN_PATIENCE * factor)?;
        if let Some(left) = left {
            let why = if outcome.why.is_empty() { left } else { format!("{}; {left}", outcome.why) };
            return Ok(Outcome { status: OutcomeStatus::Failed, why });
        }
        Ok(outcome)
    }

    /// A case is shorter than the time between two kills: it is run again until services have died during it.
    fn run_under_chaos(&self, args: &CaseArgs, deadline: Duration) -> Result<Outcome, ConformanceError> {
        let killer = Killer::start(self.system.run_dir().to_owned(), args.seed);
        let mut rounds = 0;
        loop {
            let round = CaseArgs { seed: args.seed.wrapping_add(rounds), ..args.clone() };
            let outcome = child::run(self.exe, &round, deadline, &self.stop)?;
            rounds += 1;
            let disturbed = killer.kills() >= CHAOS_KILLS || rounds == CHAOS_ROUNDS;
            if disturbed || outcome.status != OutcomeStatus::Passed {
                tracing::debug!(case = args.name, rounds, kills = killer.kills(), "Case ended");
                return Ok(outcome);
            }
        }
    }

    fn args(&self, name: &str, seed: u64) -> CaseArgs {
        CaseArgs {
            name: name.to_owned(),
            run_dir: self.system.run_dir().to_owned(),
            devices: self.found.devices.clone(),
            coherent: false,
            chaos: false,
            pause_agent: self.options.pause_agent,
            seed,
            role: if name == LAST { vec![self.found.capacity_pages.to_string()] } else { Vec::new() },
        }
    }

    /// Why a case means nothing with these devices.
    fn excluded(&self, case: &Case) -> Option<String> {
        let have = self.found.devices.len();
        match case.needs {
            Needs::Coherent if !self.found.coherent => {
                Some("The device's memory is not CPU-coherent: a CPU access brings a page home".into())
            }
            _ if case.device_count > have => {
                Some(format!("Needs {} devices of one driver; the plan has {have}", case.device_count))
            }
            _ => None,
        }
    }
}

fn first_contact(
    exe: &Path,
    system: &System,
    operator: &mut Operator,
    (driver, patience): (&str, u32),
    stop: &StopSignals,
) -> Result<Found, ConformanceError> {
    let services = crate::system::wait_ready(operator)?;
    let names = services
        .into_iter()
        .map(|service| service.name)
        .filter(|name| !["pager", "mirror", "holder"].contains(&name.as_str()));
    let args = CaseArgs {
        name: WARM_UP.into(),
        run_dir: system.run_dir().to_owned(),
        devices: names.collect(),
        coherent: false,
        chaos: false,
        pause_agent: false,
        seed: 0,
        role: vec![driver.to_owned()],
    };
    let outcome = child::run(exe, &args, WARM_UP_DEADLINE * patience, stop)?;
    let found = match outcome.status {
        OutcomeStatus::Passed => serde_json::from_str::<Found>(&outcome.why).ok(),
        _ => None,
    };
    let found = found.ok_or(ConformanceError::Unusable { why: outcome.why })?;
    if found.devices.is_empty() {
        let have = found.other_devices.join(", ");
        return Err(ConformanceError::NoDevice { driver: driver.to_owned(), have });
    }
    Ok(found)
}

/// The process of one case (`uhmm conformance-case`): prints its outcome as its last line.
///
/// # Errors
/// Only when the outcome cannot be printed.
pub fn run_case(args: CaseArgs) -> Result<(), ConformanceError> {
    let outcome = if args.name == WARM_UP { cases::warm_up(&args) } else { run_named(args) };
    println!("{}{}", child::OUTCOME_MARK, serde_json::to_string(&outcome)?);
    Ok(())
}

fn run_named(args: CaseArgs) -> Outcome {
    let Some(case) = cases::all().into_iter().find(|case| case.name == args.name) else {
        return Outcome { status: OutcomeStatus::Failed, why: format!("There is no case {}", args.name) };
    };
    let mut notes = String::new();
    let result = guarded(|| {
        let ctx = Ctx::open(args)?;
        (case.run)(&ctx)?;
        notes = ctx.notes();
        Ok(())
    });
    let mut outcome = Outcome::from(result);
    if outcome.status == OutcomeStatus::Passed {
        outcome.why = notes;
    }
    outcome
}
