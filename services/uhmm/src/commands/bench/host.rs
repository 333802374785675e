//! The machine: what it is, how steady it is, and how much of its memory is free.

use std::collections::BTreeMap;

use anyhow::Context;

use super::figure::{Figure, Reach};
use super::floor::bare::Bare;
use super::floor::copies::Copies;
use super::place;
use super::run::Run;

/// Stays free for everything else.
const RESERVE: u64 = 1 << 30;

/// What the machine does with plain work now.
pub(super) struct Pulse {
    memcpy_gib_s: f64,
    fault_us: f64,
}

impl Pulse {
    pub fn take(run: &Run<'_>) -> anyhow::Result<Self> {
        let len = if run.short { 8 << 20 } else { 64 << 20 };
        let copies = Copies::new(len, false)?;
        let rates = (0..5).map(|_| copies.gib_s()).collect::<anyhow::Result<Vec<_>>>()?;
        let bare = Bare::start(run, super::place::Place::OneCpu, &[])?;
        let fault_us = bare.p50_us(1024)?;
        Ok(Self { memcpy_gib_s: super::figure::median(rates.into_iter()), fault_us })
    }

    /// The end beside the start.
    pub fn figures(&self, start: &Self) -> [Figure; 2] {
        let figure = |case: &str, unit, rounds| Figure {
            bench: "host",
            case: case.to_owned(),
            unit,
            reach: Reach::Shown,
            rounds: vec![rounds],
        };
        [
            figure("memcpy, end of the run : start", "GiB/s", (self.memcpy_gib_s, start.memcpy_gib_s)),
            figure("bare fault on one cpu, end : start", "us", (self.fault_us, start.fault_us)),
        ]
    }
}

fn line_of(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.get(key.len()..)?.trim_start_matches([' ', '\t', ':']).trim().to_owned())
}

/// One paragraph.
pub(super) fn statement() -> anyhow::Result<String> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = line_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown CPU".into());
    let cpus = place::allowed()?;
    let gib = line_of("/proc/meminfo", "MemTotal").and_then(|kib| kib.trim_end_matches(" kB").parse::<u64>().ok());
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    Ok(format!(
        "Linux {}, {model}, CPUs {cpus:?}, {} GiB of memory, {} GiB free, load {load} at the start; pages of 4 KiB, and of 2 MiB ({})",
        kernel.trim(),
        gib.map_or_else(|| "?".into(), |kib| (kib >> 20).to_string()),
        free_bytes()? >> 30,
        huge_pages().map_or_else(|why| why, |()| "transparent, on madvise".into()),
    ))
}

/// Whether private memory can have huge pages, or why not.
pub(super) fn huge_pages() -> Result<(), String> {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    if text.contains("[madvise]") || text.contains("[always]") {
        return Ok(());
    }
    Err(format!("this machine gives no huge pages: write `madvise` to {path}"))
}

fn free_bytes() -> anyhow::Result<u64> {
    uhmm_kernel_hook::process::memory_available_bytes().context("/proc/meminfo has no MemAvailable")
}

/// What is missing for so much memory.
pub(super) fn room_for(bytes: u64) -> anyhow::Result<Result<(), String>> {
    let free = free_bytes()?;
    if free >= bytes + RESERVE {
        return Ok(Ok(()));
    }
    let mib = |bytes: u64| bytes >> 20;
    Ok(Err(format!(
        "it needs {} MiB of memory and {} MiB are free, of which {} MiB stay for others",
        mib(bytes),
        mib(free),
        mib(RESERVE)
    )))
}

/// Private memory of these processes, and what their memory files hold but for device memory. Each file counts once.
pub(super) fn own_bytes(pids: &[u32]) -> anyhow::Result<u64> {
    let mut files: BTreeMap<String, u64> = BTreeMap::new();
    let mut private = 0;
    for pid in pids {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps"));
        let maps = maps.with_context(|| format!("/proc/{pid}/smaps tells how much memory a service takes"))?;
        let mut file = None;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Rss:") => {
                    let bytes = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
                    if let Some(most) = file.as_ref().and_then(|file| files.get_mut(file)) {
                        *most += bytes;
                    }
                }
                Some("Private_Dirty:") if file.is_none() => {
                    private += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10;
                }
                // The line that begins a mapping: its range, rights, offset, device, inode, and what it shows.
                Some(word) if word.contains('-') => file = memory_file(pid, line, &mut files),
                _ => {}
            }
        }
    }
    Ok(private + files.values().sum::<u64>())
}

/// The name of a mapping's memory file, unless it is a device's memory or was seen in another process.
fn memory_file(pid: &u32, line: &str, files: &mut BTreeMap<String, u64>) -> Option<String> {
    let (name, inode) = (line.split("/memfd:").nth(1)?, line.split_whitespace().nth(4)?);
    // Of software devices, and of programs.
    if name.starts_with("uhmm-vram") || name.starts_with("uhmm-region") {
        return Some(String::new());
    }
    let owner = format!("{inode} ");
    if files.keys().any(|key| key.starts_with(&owner) && !key.ends_with(&format!(" {pid}"))) {
        return Some(String::new());
    }
    let key = format!("{owner}{name} {pid}");
    files.entry(key.clone()).or_insert(0);
    Some(key)
}

/// CPU time of all threads of a process, in nanoseconds.
pub(super) fn cpu_ns(pid: u32) -> anyhow::Result<u64> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(total)
}
