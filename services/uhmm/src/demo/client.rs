//! The client: one function a step of the demo, in order.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use uhmm_kernel_hook::process;
use uhmm_sdk::{Arena, Device, Job, JobResult, Operator, Pending, Region, Session, UffdKind};

use super::DemoArgs;
use super::drill::drill;
use super::index::Index;
use super::measure::{Floor, Latency, Memcpy, median};
use super::reference::Reference;
use super::report::{Drill, Report, mib};
use super::text::{default_roots, for_each_text};
use crate::rng::Rng;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const ROUNDS: u64 = 3;
const FAULTS_A_ROUND: u64 = 500;
const TOP: u64 = 20;
const QUERIES: usize = 4000;
/// Counters of the pager that the report shows: (counter, name in the report).
const COUNTERS: [(&str, &str); 8] = [
    ("pages_out", "pages to the device"),
    ("pages_home", "pages home"),
    ("cpu_faults", "CPU faults"),
    ("device_faults", "device fault requests"),
    ("revokes_direct", "invalidations, direct"),
    ("revokes_by_message", "invalidations, message"),
    ("scrubbed", "frames scrubbed"),
    ("poisoned", "pages poisoned"),
];

/// What all steps use.
pub struct Client<'a> {
    pub session: &'a Session,
    pub device: Device,
    pub region: &'a Region,
    pub run_dir: &'a Path,
    /// Pager, mirror, the device's driver.
    services: Vec<String>,
    index: Index<'a>,
    reference: &'a Reference,
    /// Truth about the `count` of each node: step 4 changes some.
    counts: Vec<u32>,
    /// Truth about every byte of the index, in ordinary memory: taken before anything moved, changed by what step 4 changes.
    image: Vec<u8>,
    answers: (u64, u64),
    counters: BTreeMap<&'static str, u64>,
}

/// All steps.
pub fn run(run_dir: &Path, args: &DemoArgs, services: Vec<String>) -> anyhow::Result<Report> {
    let reference = read_text(args)?;
    let session = Session::connect(Some(run_dir))?;
    if session.uffd_kind() == UffdKind::UserModeOnly {
        println!("  note: this account gets user-mode faults only: system calls on migrated memory fail with EFAULT.");
        println!(
            "        To enable them: give this account access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1"
        );
    }
    let region_bytes = (reference.index_bytes(reference.bucket_count()) + 8 * MIB).next_multiple_of(2 * MIB);
    let region = session.allocate(region_bytes)?;
    let arena = region.arena()?;
    let mut client = build(run_dir, (&session, session.device(&args.device)?), &region, &arena, &reference)?;
    client.services = services;
    let mut report = client.migrate_and_measure()?;
    let (answers, asked) = (client.scratch(&session)?, Instant::now());
    println!("\n== 3. Device jobs on the same pointers");
    client.jobs(&answers)?;
    println!("  device jobs took {:.2} s", asked.elapsed().as_secs_f64());
    client.syscall_on_migrated_memory(&arena)?;
    client.change_on_the_cpu(&answers)?;
    report.drills = client.drills(&answers)?;
    client.final_comparison(&mut report)?;
    Ok(report)
}

/// A bar on a terminal, nothing otherwise.
fn bar(len: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("  {msg:<22} [{bar:40}] {percent:>3} %  {eta}") {
        bar.set_style(style.progress_chars("##-"));
    }
    bar.with_message(what)
}

fn read_text(args: &DemoArgs) -> anyhow::Result<Reference> {
    println!("\n== 1. Reading text");
    let roots: Vec<PathBuf> = args.path.clone().map_or_else(default_roots, |path| vec![path]);
    for root in &roots {
        println!("  {}", root.display());
    }
    let wanted = args.index_mib * MIB;
    let bar = bar(wanted, "reading");
    let mut reference = Reference::default();
    let found = for_each_text(&roots, |_, text, _| {
        reference.add(text.as_bytes());
        let have = reference.index_bytes(reference.bucket_count());
        bar.set_position(have.min(wanted));
        have < wanted
    });
    bar.finish_and_clear();
    anyhow::ensure!(reference.posting_count() > 0, "There is no text below these paths: give another PATH");
    println!(
        "  {} files, {:.1} MiB of text; left out: {} not text, {} not readable",
        found.file_count,
        mib(found.text_bytes),
        found.binary_count,
        found.unreadable_count
    );
    println!("  {} different words, {} occurrences", reference.words().len(), reference.posting_count());
    Ok(reference)
}

fn build<'a>(
    run_dir: &'a Path,
    (session, device): (&'a Session, Device),
    region: &'a Region,
    arena: &'a Arena,
    reference: &'a Reference,
) -> anyhow::Result<Client<'a>> {
    let bar = bar(reference.posting_count(), "building the index");
    let begun = Instant::now();
    let index = Index::build(arena, reference, &bar)?;
    bar.finish_and_clear();
    println!(
        "  index of {:.1} MiB in managed memory at {:#x}, built in {:.2} s: buckets, chains, postings, texts, plain pointers",
        mib(arena.used_bytes()),
        region.addr(),
        begun.elapsed().as_secs_f64()
    );
    let counts = reference.words().iter().map(|word| word.count() as u32).collect();
    let mut image = vec![0; arena.used_bytes() as usize];
    region.bytes().read(0, &mut image)?;
    Ok(Client {
        session,
        device,
        region,
        run_dir,
        services: Vec::new(),
        index,
        reference,
        counts,
        image,
        answers: (0, 0),
        counters: BTreeMap::new(),
    })
}

/// A second region that nobody migrates: the queries and the place for their answers. Device faults bring it in.
pub struct Scratch {
    region: Region,
    arena: Arena,
    queries_addr: u64,
    results_addr: u64,
    texts: Vec<Vec<u8>>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Query {
    text: u64,
    len: u64,
}

impl Client<'_> {
    pub fn compared(&mut self, answers: u64, differing: u64) {
        self.answers.0 += answers;
        self.answers.1 += differing;
    }

    /// Adds what a service has counted so far; call it just before the service dies, and at the end.
    pub fn collect_counters(&mut self, service: &str) -> anyhow::Result<()> {
        let metrics = Operator::connect(Some(self.run_dir))?.stats(service)?;
        for (counter, name) in
            COUNTERS.into_iter().filter(|_| self.services.first().is_some_and(|pager| pager == service))
        {
            let value = metrics.iter().find(|metric| metric.name == counter);
            *self.counters.entry(name).or_default() += value.map_or(0, |metric| metric.value);
        }
        Ok(())
    }

    fn show_memory(&self, when: &str) -> anyhow::Result<()> {
        let rss = process::rss(std::process::id())?;
        let memcg = process::memcg_usage_bytes().map_or("-".to_owned(), |bytes| format!("{:.1} MiB", mib(bytes)));
        println!(
            "  {when:<18} RSS of shared memory {:>8.1} MiB, region's system pages {:>8.1} MiB, memory cgroup {memcg}",
            mib(rss.shmem),
            mib(self.region.populated_bytes()?)
        );
        Ok(())
    }

    fn migrate_and_measure(&mut self) -> anyhow::Result<Report> {
        println!("\n== 2. Migrating the index to the device, by virtual address");
        let memcpy = Memcpy::new()?;
        self.show_memory("before")?;
        let mut floor = Floor::new(ROUNDS * FAULTS_A_ROUND)?;
        let (mut copy_rates, mut out_rates, mut home_rates) = (Vec::new(), Vec::new(), Vec::new());
        let (mut faults, mut bare) = (Latency::new(), Latency::new());
        let mut rng = Rng::new(1);
        let (addr, len_bytes) = (self.region.addr(), self.region.len_bytes());
        for round in 0..ROUNDS {
            copy_rates.push(memcpy.round()?);
            let begun = Instant::now();
            let report = self.session.migrate(addr, len_bytes, &self.device)?;
            out_rates.push((report.moved_pages * PAGE) as f64 / begun.elapsed().as_secs_f64());
            anyhow::ensure!(report.complete(), "Not every page went to the device: {:?}", report.runs);
            if round == 0 {
                self.show_memory("after")?;
            }
            self.fault_round(&mut rng, &mut faults)?;
            floor.round(FAULTS_A_ROUND, &mut bare)?;
            let begun = Instant::now();
            let report = self.session.migrate(addr, len_bytes, uhmm_sdk::Target::Home)?;
            home_rates.push((report.moved_pages * PAGE) as f64 / begun.elapsed().as_secs_f64());
        }
        self.session.migrate(addr, len_bytes, &self.device)?;
        Ok(Report {
            index_bytes: len_bytes,
            memcpy_rate: median(copy_rates),
            out_rate: median(out_rates),
            home_rate: median(home_rates),
            faults,
            floor: bare,
            counters: Vec::new(),
            drills: Vec::new(),
            answers: (0, 0),
            bytes: (0, 0),
        })
    }

    /// Single pages at random: no neighbour rides along.
    fn fault_round(&self, rng: &mut Rng, faults: &mut Latency) -> anyhow::Result<()> {
        let pages = self.region.len_bytes() / PAGE;
        for _ in 0..FAULTS_A_ROUND {
            let offset = rng.below(pages) * PAGE;
            let begun = Instant::now();
            self.region.bytes().load_u64(offset)?;
            let took = begun.elapsed();
            // A page that is home already does not fault; a fault cannot be faster than this.
            if took > Duration::from_micros(2) {
                faults.record(took);
            }
        }
        Ok(())
    }

    fn scratch(&self, session: &Session) -> anyhow::Result<Scratch> {
        let region = session.allocate(4 * MIB)?;
        let arena = region.arena()?;
        let words = self.reference.words();
        let mut rng = Rng::new(7);
        let texts: Vec<Vec<u8>> = (0..QUERIES)
            .map(|query| match query % 10 {
                0 => format!("no-such-word-{query}").into_bytes(),
                _ => words[rng.below(words.len() as u64) as usize].text.to_vec(),
            })
            .collect();
        let mut queries = Vec::with_capacity(QUERIES);
        for text in &texts {
            let text = arena.alloc_slice_copy(text)?;
            queries.push(Query { text: text.as_ptr().addr() as u64, len: text.len() as u64 });
        }
        let queries_addr = arena.alloc_slice_copy(&queries)?.as_ptr().addr() as u64;
        let results_addr = arena.alloc_slice_fill(QUERIES, 0u64)?.as_ptr().addr() as u64;
        Ok(Scratch { region, arena, queries_addr, results_addr, texts })
    }

    fn job(&self, kernel: &str, more: &[u64]) -> Job {
        let args = [self.index.buckets_addr(), self.index.bucket_count()];
        Job::new(kernel, [&args[..], more].concat()).idempotent()
    }

    /// A walk over the whole index on the device.
    pub fn submit(&self, kernel: &str) -> Pending<JobResult> {
        self.device.submit(self.job(kernel, &[]))
    }

    /// What `postings_walk` must answer; never changes.
    pub fn expected_postings(&self) -> [u64; 2] {
        let (postings, checksum) = self.reference.postings_checksum();
        [postings, checksum]
    }

    /// Count, postings, top words and look-ups on the device, each compared with the plain computation.
    fn jobs(&mut self, scratch: &Scratch) -> anyhow::Result<()> {
        let chains = self.reference.counts(self.index.bucket_count()).longest_chain;
        let occurrences: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        let counted = self.device.run(self.job("index_count", &[]))?;
        self.check("index_count", &counted, counted.results == [self.counts.len() as u64, occurrences, chains]);
        let walked = self.device.run(self.job("postings_walk", &[]))?;
        self.check("postings_walk", &walked, walked.results == self.expected_postings());
        let top = self.device.run(self.job("top_k", &[TOP]))?;
        self.check("top_k", &top, top.results == self.expected_top());
        let lookup = [scratch.queries_addr, QUERIES as u64, scratch.results_addr];
        let found = self.device.run(self.job("hash_lookup", &lookup))?;
        let right = self.right_lookups(scratch)?;
        self.check("hash_lookup", &found, right);
        Ok(())
    }

    fn check(&mut self, name: &str, result: &JobResult, right: bool) {
        let verdict = if right { "as computed" } else { "DIFFERENT" };
        println!(
            "  {name:<14} {verdict:<12} {:>9.1} ms, {:>5} device faults",
            result.run_time_ns as f64 / 1e6,
            result.fault_count
        );
        self.compared(1, u64::from(!right));
    }

    fn expected_top(&self) -> Vec<u64> {
        let mut ids: Vec<usize> = (0..self.counts.len()).collect();
        ids.sort_unstable_by_key(|id| (std::cmp::Reverse(self.counts[*id]), self.reference.words()[*id].hash));
        let pair = |id: &usize| {
            let node: *const _ = self.index.nodes[*id];
            [node.addr() as u64, u64::from(self.counts[*id])]
        };
        ids.iter().take(TOP as usize).flat_map(pair).collect()
    }

    /// Reads the device's answers on the CPU: the result pages come home by a fault.
    fn right_lookups(&self, scratch: &Scratch) -> anyhow::Result<bool> {
        let by_text: std::collections::HashMap<&[u8], u32> =
            self.reference.words().iter().map(|word| &*word.text).zip(self.counts.iter().copied()).collect();
        let offset = scratch.results_addr - scratch.region.addr();
        for (query, text) in scratch.texts.iter().enumerate() {
            let answer = scratch.region.bytes().load_u64(offset + query as u64 * 8)?;
            if answer != by_text.get(text.as_slice()).copied().map_or(0, u64::from) {
                return Ok(false);
            }
        }
        Ok(scratch.arena.used_bytes() > 0)
    }

    /// write(2) from migrated memory: works when the kernel may wait for the pager.
    fn syscall_on_migrated_memory(&self, arena: &Arena) -> anyhow::Result<()> {
        let text: &[u8] = arena.alloc_slice_fill(PAGE as usize, b'x')?;
        let at = text.as_ptr().addr() as u64 & !(PAGE - 1);
        self.session.migrate(at, PAGE, &self.device)?;
        let (mut reader, mut writer) = std::io::pipe()?;
        let written = writer.write(&text[..16]);
        match (written, self.session.uffd_kind()) {
            (Ok(count), _) => {
                let mut echo = [0u8; 16];
                reader.read_exact(&mut echo[..count])?;
                anyhow::ensure!(echo[..count].iter().all(|byte| *byte == b'x'), "The pipe carried other bytes");
                println!("  write(2) straight from migrated memory: works");
            }
            (Err(error), UffdKind::UserModeOnly) => {
                println!("  write(2) straight from migrated memory: {error} (see the note above)")
            }
            (Err(error), UffdKind::Full) => return Err(error).context("write(2) from migrated memory"),
        }
        Ok(())
    }

    fn change_on_the_cpu(&mut self, scratch: &Scratch) -> anyhow::Result<()> {
        println!("\n== 4. Changing part of the index on the CPU, then the same jobs again");
        let changed: Vec<usize> = (0..self.counts.len()).step_by(97).collect();
        for id in &changed {
            let count = &self.index.nodes[*id].count;
            count.set(count.get() + 1000);
            self.counts[*id] += 1000;
            let at = (std::ptr::from_ref(count).addr() as u64 - self.region.addr()) as usize;
            self.image[at..at + 4].copy_from_slice(&self.counts[*id].to_ne_bytes());
        }
        // A sequential walk: neighbours ride along, twice as many at each fault.
        let quarter = self.region.len_bytes() / 4;
        for offset in (0..quarter).step_by(PAGE as usize) {
            self.region.bytes().load_u64(offset)?;
        }
        let summary = self.session.residency_summary(self.region.addr(), self.region.len_bytes())?;
        println!(
            "  {} counts changed, {:.1} MiB read in order: {} pages came home, {} are still on the device",
            changed.len(),
            mib(quarter),
            summary.system_pages,
            summary.all_device_pages()
        );
        self.jobs(scratch)
    }

    fn drills(&mut self, scratch: &Scratch) -> anyhow::Result<Vec<Drill>> {
        println!("\n== 5. kill -9 of each service in the middle of work");
        let mut drills = Vec::new();
        for round in 0..2 {
            for service in self.services.clone() {
                let one = drill(self, &service, round * 100 + drills.len() as u64)?;
                println!(
                    "  {service:<8} killed in: {}; first operation through all services after {:.1} ms",
                    one.during, one.first_operation_ms
                );
                drills.push(one);
            }
        }
        self.jobs(scratch)?;
        Ok(drills)
    }

    /// Bytes of the index that are not what they should be; every page comes home by faults.
    fn lost_bytes(&self) -> anyhow::Result<u64> {
        let mut found = vec![0; MIB as usize];
        let mut lost = 0;
        for (offset, expected) in (0..).step_by(found.len()).zip(self.image.chunks(found.len())) {
            let found = &mut found[..expected.len()];
            self.region.bytes().read(offset, found)?;
            lost += found.iter().zip(expected).filter(|(found, expected)| found != expected).count() as u64;
        }
        Ok(lost)
    }

    fn final_comparison(&mut self, report: &mut Report) -> anyhow::Result<()> {
        println!("\n== 6. Comparing everything");
        self.session.migrate(self.region.addr(), self.region.len_bytes(), &self.device)?;
        let mut lost = self.lost_bytes()?;
        if lost == 0 {
            // Every pointer is what it was, so all of it can be followed: it must still be the index of this text.
            lost = self.index.wrong_bytes(self.region, self.reference, &self.counts)?;
        }
        for service in self.services.clone() {
            self.collect_counters(&service)?;
        }
        let restarts = report.drills.len() as u64;
        report.counters = self.counters.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        report.counters.push(("restarts".to_owned(), restarts));
        report.answers = self.answers;
        report.bytes = (self.image.len() as u64, lost);
        Ok(())
    }
}
