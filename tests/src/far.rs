//! A system whose far memory is on block servers, and a client with a region there.

use std::time::Instant;

use uhmm_sdk::{Device, Job, PageStatus, Region, Residency, Session, Target};

use crate::block::BlockServer;
use crate::pattern::word;
use crate::{PATIENCE, RESTART, TestBed, manifest_of};

/// Bytes.
pub const MIB: u64 = 1 << 20;
/// Bytes of the region.
pub const LEN: u64 = 4 * MIB;
/// Words in it.
pub const WORDS: u64 = LEN / 8;
/// Pages of it.
pub const PAGES: u64 = LEN / 4096;
/// In front of the blocks.
pub const HEADER_BYTES: u64 = MIB;
/// Of the device, for the manifest.
pub const SIZE: &str = "memory_bytes = \"16MiB\"";
/// Servers on this machine are done with what they had begun long before.
pub const QUICK: &str = "memory_bytes = \"16MiB\"\nsettle_s = 1";

/// So many as the environment says.
pub fn rounds(few: u64) -> u64 {
    std::env::var("UHMM_ROUNDS").map_or(few, |text| text.parse().expect("a number"))
}

/// Of a software device and one on these servers.
pub fn manifest(urls: &[String], options: &str) -> String {
    let soft = manifest_of(1, "16MiB", "");
    format!(
        r#"{soft}
[[service]]
name = "far0"
kind = "driver"
driver = "nbd"
{RESTART}

[[device]]
name = "far0"
service = "far0"
url = {urls:?}
{options}
"#
    )
}

/// A system, and a client with a region. Dropped from top to bottom.
pub struct Scene {
    /// Full of words.
    pub region: Region,
    /// `far0`.
    pub device: Device,
    /// The client.
    pub session: Session,
    /// The system.
    pub bed: TestBed,
}

impl Scene {
    /// These servers, and options of the device.
    pub fn over(servers: &[&BlockServer], options: &str) -> Self {
        let urls: Vec<String> = servers.iter().map(|server| server.url()).collect();
        Self::at(&urls, options)
    }

    /// As [`Scene::over`], by address.
    pub fn at(urls: &[String], options: &str) -> Self {
        let bed = TestBed::with_log(&manifest(urls, options));
        let session = bed.session();
        let device = session.device("far0").expect("device");
        let region = session.allocate(LEN).expect("region");
        let scene = Self { region, device, session, bed };
        scene.fill(1);
        scene
    }

    /// Writes all words.
    pub fn fill(&self, seed: u64) {
        for index in 0..WORDS {
            self.region.write_u64(index * 8, word(seed, index)).expect("write");
        }
    }

    /// Reads all words.
    pub fn compare(&self, seed: u64, what: &str) {
        for index in 0..WORDS {
            let found = self.region.read_u64(index * 8).expect("read");
            assert_eq!(found, word(seed, index), "{what}: word {index} differs");
        }
    }

    /// Except those of these pages.
    pub fn compare_all_but(&self, seed: u64, lost: &[u64]) {
        for index in (0..WORDS).filter(|index| !lost.contains(&(index / 512))) {
            assert_eq!(self.region.read_u64(index * 8).expect("read"), word(seed, index), "word {index} differs");
        }
    }

    /// By a job on the device.
    pub fn sum(&self, seed: u64) {
        let sum = (0..WORDS).fold(0u64, |sum, index| sum.wrapping_add(word(seed, index)));
        let job = Job::new("sum", [self.region.addr(), LEN]).idempotent();
        assert_eq!(self.device.run(job).expect("sum").results, [sum]);
    }

    /// To the device, all of it.
    pub fn out(&self) {
        let report = self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate");
        assert!(report.complete(), "{report:?}\n{}", self.bed.log());
    }

    /// As much of it as the device takes.
    pub fn try_out(&self) {
        drop(self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate"));
    }

    /// Brings everything home, and says which pages are lost.
    pub fn home(&self) -> Vec<u64> {
        let report = self.session.migrate(self.region.addr(), LEN, Target::Home).expect("migrate home");
        let mut lost = Vec::new();
        let mut page = 0;
        for run in self.session.residency(self.region.addr(), LEN).expect("residency") {
            if run.residency == Residency::Poisoned {
                lost.extend(page..page + run.page_count);
            }
            page += run.page_count;
        }
        assert_eq!(page, PAGES);
        let said = report.runs.iter().filter(|run| run.status == PageStatus::Poisoned);
        assert_eq!(said.map(|run| run.page_count).sum::<u64>(), lost.len() as u64, "{report:?}");
        lost
    }

    /// Pages there.
    pub fn on_device(&self) -> u64 {
        self.session.residency_summary(self.region.addr(), LEN).expect("residency").device_pages.iter().sum()
    }

    /// Until servers that are away, and pages that one server alone has, are as wanted.
    pub fn wait_metrics(&self, wanted: impl Fn(u64, u64) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (away, behind) = (self.bed.metric("far0", "servers_away"), self.bed.metric("far0", "behind_pages"));
            if wanted(away, behind) {
                return;
            }
            assert!(Instant::now() < deadline, "{away} servers are away, {behind} pages behind\n{}", self.bed.log());
            std::thread::yield_now();
        }
    }

    /// No page was poisoned.
    pub fn nothing_is_lost(&self) {
        assert_eq!(self.bed.metric("pager", "poisoned"), 0, "{}", self.bed.log());
    }
}

/// Out, a job, home, twice.
pub fn round_trips(scene: &Scene) {
    for seed in 2..4 {
        scene.fill(seed);
        scene.out();
        scene.sum(seed);
        scene.out();
        assert_eq!(scene.home(), Vec::<u64>::new());
        scene.compare(seed, "home again");
    }
}
