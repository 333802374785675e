//! The first fault that is answered after `kill -9` of a service, by what lives on the device, by regions and by clients. The floor: this
//! program started again until its first line is there.
//!
//! | killed | fault |
//! | --- | --- |
//! | pager | the CPU touches a page that lives on the device |
//! | mirror, driver | the device touches a page that it does not map |

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use uhmm_kernel_hook::PAGE_SIZE;
use uhmm_sdk::{Device, Operator, Region, Session};

use super::super::bed::{Bed, Spec};
use super::super::figure::{Reach, median};
use super::super::host;
use super::super::plot::Plot;
use super::super::run::Run;
use super::managed::all_go;
use super::party::{Party, Shape, Side};

const GIB: u64 = 1 << 30;
const SIZES: [u64; 3] = [1, 4, 8];
const SERVICES: [&str; 3] = ["pager", "mirror", "driver"];
/// Nobody shall wait longer for an answer.
const LONGEST_MS: f64 = 100.0;
/// Between two questions about a state that has no event.
const POLL: Duration = Duration::from_millis(1);

/// Milliseconds of each round: to the answer, and to the first line of the program.
type Pairs = Vec<(f64, f64)>;

/// What is there while services die.
struct Scene<'a> {
    bed: &'a Bed,
    operator: Operator,
    _session: Session,
    device: Device,
    /// On the device, by pages that nobody touches, and one region more: pages of it are touched one by one.
    _away: Vec<Region>,
    touched: Region,
    next: u64,
}

impl<'a> Scene<'a> {
    fn new(bed: &'a Bed, regions: u64, bytes: u64, kills: u64) -> anyhow::Result<Self> {
        let session = bed.session()?;
        let device = session.device(bed.device(0))?;
        let mut away = Vec::new();
        for _ in 0..regions {
            let region = session.allocate(bytes / regions / PAGE_SIZE * PAGE_SIZE)?;
            // Nothing was written, and yet the device's frames hold zeros and take memory.
            all_go(&session, (region.addr(), region.len_bytes()), device.target())?;
            away.push(region);
        }
        // Every second page: no neighbour comes along.
        let touched = session.allocate(4 * kills * PAGE_SIZE)?;
        touched.bytes().fill(0, touched.len_bytes(), 1)?;
        Ok(Self { bed, operator: bed.operator()?, _session: session, device, _away: away, touched, next: 0 })
    }

    /// Milliseconds from the kill to the answer.
    fn kill(&mut self, service: &str) -> anyhow::Result<f64> {
        let (name, page) = (self.bed.service(service), self.next);
        self.next += 2;
        let addr = self.touched.addr() + page * PAGE_SIZE;
        if service == "pager" {
            self.device.map(addr, PAGE_SIZE)?;
        }
        self.operator.kill(&name)?;
        let begun = Instant::now();
        if service == "pager" {
            self.touched.read_u64(page * PAGE_SIZE)?;
        } else {
            self.device.map(addr, PAGE_SIZE)?;
        }
        let took = begun.elapsed().as_secs_f64() * 1e3;
        // The supervisor tells states to whoever asks, and nobody when they change.
        while self.operator.status()?.iter().any(|service| service.state != "ready") {
            std::thread::sleep(POLL);
        }
        Ok(took)
    }
}

/// Milliseconds until this program, started again, has said a line.
fn start_ms() -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("No output")?).read_line(&mut line)?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    child.wait()?;
    anyhow::ensure!(line.starts_with("uhmm"), "This program, started again, says {line:?}");
    Ok(took)
}

pub(in super::super) fn run(run: &mut Run<'_>) -> anyhow::Result<()> {
    let gib = if run.short { 64 << 20 } else { run.bytes(GIB) };
    let memory = 9 * gib;
    let Some(bed) = run.bed(Spec { needs: 2 * gib, ..Spec::of(memory) }, "")? else { return Ok(()) };
    let mut by_size: Vec<(u64, Vec<Pairs>)> = Vec::new();
    for size in SIZES {
        let case = format!("{size} GiB on the device");
        if let Err(why) = host::room_for(size * gib + gib / 2)? {
            run.leave_out(case, why);
        } else if run.wants(&case) {
            by_size.push((size, case_of(run, &bed, &case, 1, size * gib)?));
        }
    }
    flat(run, &by_size);
    if run.wants("1000 regions") {
        case_of(run, &bed, "1 GiB in 1000 regions", if run.short { 50 } else { 1000 }, gib)?;
    }
    if run.wants("64 clients") {
        let clients = if run.short { 8 } else { 64 };
        let shape = Shape { clients, regions: 1, pages: 16 };
        let mut party = Party::start(Side::Uhmm(bed.run_dir(), bed.device(0)), shape)?;
        party.round()?;
        case_of(run, &bed, "1 GiB and 64 more clients", 1, gib)?;
    }
    Ok(())
}

/// Of each service: the rounds.
fn case_of(run: &mut Run<'_>, bed: &Bed, case: &str, regions: u64, bytes: u64) -> anyhow::Result<Vec<Pairs>> {
    let kills = run.most_rounds(9);
    let mut scene = Scene::new(bed, regions, bytes, u64::from(kills + 1) * 3)?;
    let mut all = vec![Vec::new(); SERVICES.len()];
    for round in run.rounds(9) {
        for (service, rounds) in SERVICES.iter().zip(&mut all) {
            let pair = (scene.kill(service)?, start_ms()?);
            if round > 0 {
                rounds.push(pair);
            }
        }
    }
    for (service, rounds) in SERVICES.iter().zip(&all) {
        run.figure(format!("{service}, {case} : start of the program"), "ms", Reach::AtMost(3.0), rounds.clone());
        let worst = rounds.iter().map(|(took, _)| *took).fold(0.0, f64::max);
        run.figure(format!("{service}, {case}, longest : 100 ms"), "ms", Reach::AtMost(1.0), vec![(worst, LONGEST_MS)]);
    }
    Ok(all)
}

/// The largest beside the smallest.
fn flat(run: &mut Run<'_>, by_size: &[(u64, Vec<Pairs>)]) {
    let (Some((least, first)), Some((most, last))) = (by_size.first(), by_size.last()) else { return };
    if least == most {
        return;
    }
    let mut series = Vec::new();
    for (index, service) in SERVICES.iter().enumerate() {
        let rounds = last[index].iter().zip(&first[index]).map(|(last, first)| (last.0, first.0)).collect();
        run.figure(format!("{service}, {most} GiB : {least} GiB"), "ms", Reach::AtMost(1.2), rounds);
        let middle = |all: &Vec<Pairs>| median(all[index].iter().map(|(took, _)| *took));
        series.push(((*service).to_owned(), by_size.iter().map(|(size, all)| (*size as f64, middle(all))).collect()));
    }
    run.plots.push(Plot {
        name: "recover".into(),
        title: "First fault answered after kill -9, by what lives on the device".into(),
        x: "GiB on the device".into(),
        y: "ms".into(),
        log_x: false,
        series,
    });
}
