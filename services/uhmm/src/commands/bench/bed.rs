//! The system that is measured: its own processes in a folder of the run, with devices of the driver that was asked for.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use uhmm_sdk::{Operator, Session};

use super::benches::party::Helper;
use super::host;
use super::place::{self, Place};
use super::run::Run;
use crate::demo::System;

/// Where running systems are, for whoever must end them when the run is interrupted.
pub(super) static RUNNING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Drivers whose devices can be made here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    Soft,
    File,
    Nvme,
    Accel,
}

impl Device {
    const ALL: [(&'static str, Self); 4] =
        [("soft", Self::Soft), ("file", Self::File), ("nvme", Self::Nvme), ("accel", Self::Accel)];

    pub fn named(name: &str) -> anyhow::Result<Self> {
        let known = Self::ALL.iter().find(|(known, _)| *known == name);
        if let Some((_, device)) = known {
            return Ok(*device);
        }
        let names = Self::ALL.map(|(name, _)| name).join(", ");
        if ["edu", "bar"].contains(&name) {
            bail!("Driver {name:?} needs a PCI device, and none is made here: take one of {names}");
        }
        bail!("There is no driver {name:?} to measure: take one of {names}")
    }

    pub fn name(self) -> &'static str {
        let named = Self::ALL.iter().find(|(_, device)| *device == self);
        named.map_or("", |(name, _)| name)
    }

    /// The CPU sees device memory; only software devices can be had either way.
    fn can_have(self, aperture: bool) -> bool {
        match self {
            Self::Soft => true,
            Self::Accel => aperture,
            Self::File | Self::Nvme => !aperture,
        }
    }
}

/// What is wanted.
#[derive(Clone, Copy)]
pub(super) struct Spec {
    /// Of each device.
    pub memory: u64,
    pub devices: usize,
    /// Whether the CPU sees it; `None`: as the driver likes it best.
    pub aperture: Option<bool>,
    /// Software devices without a page table that the pager can change, beside the others.
    pub slow: usize,
    /// Kernels that jobs need.
    pub kernel: Option<&'static str>,
    pub place: Place,
    /// System memory that the bench fills, device memory included.
    pub needs: u64,
}

impl Spec {
    pub fn of(memory: u64) -> Self {
        Self { memory, devices: 1, aperture: None, slow: 0, kernel: None, place: Place::Free, needs: 2 * memory }
    }
}

/// See the module head.
pub(super) struct Bed {
    system: System,
    models: Vec<Helper>,
    names: Vec<String>,
    place: Place,
}

const HEAD: &str = r#"
[supervisor]
heartbeat_ms = 1000
missed_limit = 30

[[service]]
name = "pager"
kind = "pager"
restart = { backoff_min_ms = 1, backoff_max_ms = 1, max_deaths = 100000 }

[[service]]
name = "mirror"
kind = "mirror"
restart = { backoff_min_ms = 1, backoff_max_ms = 1, max_deaths = 100000 }
"#;

fn device_text(name: &str, driver: &str, memory: u64, options: &str) -> String {
    format!(
        "\n[[service]]\nname = \"{name}\"\nkind = \"driver\"\ndriver = \"{driver}\"\n\
         restart = {{ backoff_min_ms = 1, backoff_max_ms = 1, max_deaths = 100000 }}\n\n\
         [[device]]\nname = \"{name}\"\nservice = \"{name}\"\nmemory_bytes = {memory}\n{options}\n"
    )
}

impl Bed {
    /// The inner error: why there is no such system here.
    pub fn start(run: &Run<'_>, spec: Spec) -> anyhow::Result<Result<Self, String>> {
        let driver = run.driver;
        if let Some(aperture) = spec.aperture.filter(|aperture| !driver.can_have(*aperture)) {
            let kind = if aperture { "without" } else { "with" };
            return Ok(Err(format!("devices of driver {} are {kind} an aperture", driver.name())));
        }
        if spec.devices + spec.slow > 1 && driver != Device::Soft {
            return Ok(Err("it takes several devices, of driver soft only".to_owned()));
        }
        if spec.place == Place::OtherCpu && place::allowed()?.len() < 2 {
            return Ok(Err("there is only one CPU".to_owned()));
        }
        if let Err(why) = host::room_for(spec.needs)? {
            return Ok(Err(why));
        }
        let bed = place::on(&spec.place.services()?, || Self::start_there(run, spec))?;
        let lacking = bed.lacking(spec)?;
        Ok(lacking.map_or(Ok(bed), Err))
    }

    fn start_there(run: &Run<'_>, spec: Spec) -> anyhow::Result<Self> {
        let driver = run.driver.name();
        let (mut text, mut models, mut names) = (HEAD.to_owned(), Vec::new(), Vec::new());
        for index in 0..spec.devices + spec.slow {
            let name = format!("{driver}{index}");
            let aperture = spec.aperture.unwrap_or(true) && index < spec.devices;
            let options = match run.driver {
                Device::Soft => format!("aperture = {aperture}"),
                Device::File => format!("path = {:?}", run.path("far")),
                Device::Nvme | Device::Accel => {
                    let socket = run.path("model");
                    models.push(model(driver, spec.memory, &socket)?);
                    format!("pci = {:?}", format!("vfio-user:{}", socket.display()))
                }
            };
            text += &device_text(&name, driver, spec.memory, &options);
            names.push(name);
        }
        let run_dir = run.path("system");
        let system = System::start(run_dir.clone(), &text).context("The system to measure cannot be started")?;
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).insert(run_dir);
        Ok(Self { system, models, names, place: spec.place })
    }

    fn lacking(&self, spec: Spec) -> anyhow::Result<Option<String>> {
        let Some(kernel) = spec.kernel else { return Ok(None) };
        let info = self.session()?.device(self.device(0))?.info().clone();
        let has = info.kernels.iter().any(|line| line.starts_with(&format!("{kernel}(")));
        Ok((!has).then(|| format!("devices of driver {} have no kernel {kernel}", info.driver)))
    }

    pub fn run_dir(&self) -> &Path {
        self.system.run_dir()
    }

    /// A session of this process; its threads are where the program is.
    pub fn session(&self) -> anyhow::Result<Session> {
        place::on(&self.place.program()?, || Ok(Session::connect(Some(self.run_dir()))?))
    }

    /// The name of a device.
    pub fn device(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// The name of a service, by its part: pager, mirror, driver.
    pub fn service(&self, part: &str) -> String {
        if part == "driver" { self.device(0).to_owned() } else { part.to_owned() }
    }

    pub fn operator(&self) -> anyhow::Result<Operator> {
        Ok(Operator::connect(Some(self.run_dir()))?)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(self.run_dir());
        // Their drivers go with the system, which is dropped first: a device that is pulled out would be a drill of its own.
        tracing::debug!(models = self.models.len(), "A system ends");
    }
}

/// A device model, ready.
fn model(driver: &str, memory: u64, socket: &Path) -> anyhow::Result<Helper> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["device-model", driver, "--memory", &memory.to_string()]).arg("--socket").arg(socket);
    command.env("UHMM_LOG", "error").stdout(Stdio::piped());
    let mut helper = Helper::start(&mut command)?.killed();
    let mut line = String::new();
    BufReader::new(helper.output()?).read_line(&mut line)?;
    anyhow::ensure!(line.trim() == "ready", "The device model ended before it was ready: see its messages above");
    Ok(helper)
}
