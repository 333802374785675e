//! Where a run of a program takes place: everything that it starts is in a control group of its own, which is emptied at its end.
//!
//! A harness that is killed leaves that group, a folder and perhaps a swap device; the next one finds them by the dead process's id and takes them away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, kill_process};
use uhmm_kernel_hook::PidFd;
use uhmm_kernel_hook::signal::StopSignals;
use uhmm_sdk::Operator;

use super::pages::{Swap, swapoff_below};

const GROUPS: &str = "/sys/fs/cgroup/memory";
const PREFIX: &str = "uhmm-compare-";
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Who gives the program its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arrangement {
    /// Nobody limits it.
    Plain,
    /// `uhmm run --ram`, with a file.
    Uhmm,
    /// A control group with compressed swap.
    Zram,
    /// A control group with swap on the same disk.
    SwapFile,
}

impl Arrangement {
    /// In tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Uhmm => "uhmm",
            Self::Zram => "zram",
            Self::SwapFile => "swap file",
        }
    }
}

/// Where all runs of one harness take place.
pub struct Ground {
    folder: tempfile::TempDir,
    uhmm: PathBuf,
    library: PathBuf,
    /// `None`: only plain runs and those with uhmm take place here, and nobody looks what plain ones cost.
    group: Option<PathBuf>,
    signals: Option<Arc<StopSignals>>,
    runs: AtomicU64,
}

impl Ground {
    /// `uhmm`: the program. On the disk of `/var/tmp`. `signals`: what is blocked here, and not for the programs.
    pub fn new(uhmm: &Path, library: &Path, signals: Option<Arc<StopSignals>>) -> Result<Self, String> {
        let name = format!("{PREFIX}{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&name).tempdir_in("/var/tmp");
        let folder = folder.map_err(|error| format!("/var/tmp: {error}"))?;
        // What others start on it, as another user, looks into it.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), open).map_err(|error| format!("/var/tmp: {error}"))?;
        let (uhmm, library, runs) = (uhmm.to_owned(), library.to_owned(), AtomicU64::new(0));
        Ok(Self { folder, uhmm, library, group: None, signals, runs })
    }

    /// With control groups.
    pub fn with_groups(mut self) -> Result<Self, String> {
        let group = Path::new(GROUPS).join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&group).map_err(|error| {
            format!("{}: {error}: this needs root and cgroup v1's memory controller", group.display())
        })?;
        self.group = Some(group);
        Ok(self)
    }

    /// Kills whatever runs here.
    pub fn end_all(&self) {
        for run in self.group.iter().flat_map(fs::read_dir).flatten().flatten() {
            kill_all(&pids_of(&run.path()));
        }
    }

    /// For files that programs read. Gone at the end.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A place for one run. `ram_bytes`: what it may have, if anything limits it.
    pub fn place(&self, arrangement: Arrangement, ram_bytes: u64, far_bytes: u64) -> Result<Place, String> {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let folder = self.folder().join(format!("run-{number}"));
        fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let swap = match arrangement {
            Arrangement::Zram => Some(Swap::zram(far_bytes)?),
            Arrangement::SwapFile => Some(Swap::file(folder.join("swap"), far_bytes)?),
            Arrangement::Plain | Arrangement::Uhmm => None,
        };
        let limit_bytes = swap.is_some().then_some(ram_bytes);
        let group = self.group.as_ref().map(|all| Group::new(all.join(format!("run-{number}")), limit_bytes));
        let group = group.transpose()?;
        let watch = group.as_ref().map(|group| Watch::start(&group.path));
        let (uhmm, library, signals) = (self.uhmm.clone(), self.library.clone(), self.signals.clone());
        Ok(Place { watch, group, _swap: swap, folder, arrangement, ram_bytes, far_bytes, uhmm, library, signals })
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = self.group.as_ref().map(fs::remove_dir);
    }
}

/// What harnesses that were killed have left.
pub fn clean_up_after_the_dead() {
    let names = |folder: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| owner(path).is_some_and(is_dead)).collect()
    };
    for group in names(GROUPS) {
        for run in fs::read_dir(&group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
            drop(Group { path: run.path() });
        }
        let _ = fs::remove_dir(&group);
    }
    for folder in names("/var/tmp") {
        swapoff_below(&folder);
        let _ = fs::remove_dir_all(&folder);
    }
}

fn owner(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn is_dead(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

/// A control group; whoever is in it at its end is killed.
struct Group {
    path: PathBuf,
}

impl Group {
    fn new(path: PathBuf, limit_bytes: Option<u64>) -> Result<Self, String> {
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let group = Self { path };
        if let Some(bytes) = limit_bytes {
            let file = group.path.join("memory.limit_in_bytes");
            fs::write(&file, bytes.to_string()).map_err(|error| format!("{}: {error}", file.display()))?;
        }
        Ok(group)
    }
}

fn pids_of(group: &Path) -> Vec<u32> {
    let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn kill_all(pids: &[u32]) {
    for pid in pids.iter().filter_map(|pid| Pid::from_raw(i32::try_from(*pid).ok()?)) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let pids = pids_of(&self.path);
            kill_all(&pids);
            if pids.is_empty() && fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        eprintln!("{} stays: processes {:?} do not end", self.path.display(), pids_of(&self.path));
    }
}

/// What a run has cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    /// In memory, at most.
    pub resident_bytes: u64,
    /// On the device or in swap, at most.
    pub away_bytes: u64,
    /// That waited for a page to come back.
    pub faults: u64,
}

/// Where one run takes place. Fields are dropped in this order: the processes before their swap.
pub struct Place {
    watch: Option<Watch>,
    group: Option<Group>,
    _swap: Option<Swap>,
    folder: PathBuf,
    /// Which.
    pub arrangement: Arrangement,
    ram_bytes: u64,
    far_bytes: u64,
    uhmm: PathBuf,
    library: PathBuf,
    signals: Option<Arc<StopSignals>>,
}

impl Place {
    /// For files of this run.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A command of this run's program.
    pub fn command(&self, program: &[String]) -> Command {
        let group = self.group.as_ref().map_or_else(|| "/dev/null".into(), |group| group.path.join("cgroup.procs"));
        let mut words = vec!["echo $$ >\"$0\" && exec \"$@\"".to_owned(), text(&group)];
        if self.arrangement == Arrangement::Uhmm {
            let far = format!("{}B:{}", self.far_bytes, self.folder.join("far0").display());
            let ram = format!("{}B", self.ram_bytes);
            words.push(text(&self.uhmm));
            words.extend(["run", "--ram", &ram, "--far", &far, "--stats", "--stats-json"].map(str::to_owned));
            words.extend([text(&self.stats()), "--".to_owned()]);
        }
        words.extend(program.iter().cloned());
        let mut command = Command::new("/bin/sh");
        command.arg("-c").args(words).env_remove("LD_PRELOAD").current_dir(&self.folder);
        command.env("TMPDIR", &self.folder).env("UHMM_RUN_DIR", self.folder.join("no system")).env("LC_ALL", "C");
        command.env("UHMM_RUN_LIBRARY", &self.library);
        if let Some(signals) = &self.signals {
            signals.not_for(&mut command);
        }
        command
    }

    fn stats(&self) -> PathBuf {
        self.folder.join("stats.json")
    }

    /// When its program has ended.
    pub fn costs(&self) -> Result<Costs, String> {
        let (resident_bytes, away_bytes, faults) = self.watch.as_ref().map_or((0, 0, 0), Watch::most);
        if self.arrangement != Arrangement::Uhmm {
            return Ok(Costs { resident_bytes, away_bytes, faults });
        }
        let said = fs::read_to_string(self.stats()).map_err(|error| format!("{}: {error}", self.stats().display()))?;
        let said: serde_json::Value = serde_json::from_str(&said).map_err(|error| format!("{said}: {error}"))?;
        let number = |name: &str| said[name].as_u64().ok_or_else(|| format!("{name} is missing in {said}"));
        Ok(Costs {
            resident_bytes: number("peak_resident_bytes")?,
            away_bytes: number("peak_away_bytes")?,
            faults: number("waits")?,
        })
    }

    /// The operator of the system that `uhmm run` has started here.
    pub fn operator(&self) -> Option<Operator> {
        let own = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("uhmm-run-"));
        let found = fs::read_dir(&self.folder).ok()?.flatten().map(|entry| entry.path()).find(own)?;
        Operator::connect(Some(&found.join("run"))).ok()
    }
    /// Kills pager and driver in turn, until the program has ended or so many were killed. Returns how often.
    pub fn kill_in_turn(&self, every: Duration, most: u64, ended: &AtomicBool) -> u64 {
        let (mut at, mut kills) = (Instant::now() + every, 0);
        while kills < most && !ended.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK_EVERY);
            if Instant::now() < at {
                continue;
            }
            at = Instant::now() + every;
            let victim = ["pager", "far0"][kills as usize % 2];
            // It may be on its way up, from the last time.
            kills += u64::from(self.operator().is_some_and(|mut operator| operator.kill(victim).is_ok()));
        }
        kills
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("paths of the harness are text").to_owned()
}

/// The group's memory, looked at while it is there.
struct Watch {
    most: Arc<Mutex<(u64, u64, u64)>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    fn start(group: &Path) -> Self {
        let (most, end) = (Arc::new(Mutex::new((0, 0, 0))), Arc::new(AtomicBool::new(false)));
        let (file, shared, ended) = (group.join("memory.stat"), Arc::clone(&most), Arc::clone(&end));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let stat = fs::read_to_string(&file).unwrap_or_default();
                let number = |name: &str| -> u64 {
                    let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
                    line.and_then(|number| number.parse().ok()).unwrap_or(0)
                };
                let now = (number("rss") + number("shmem"), number("swap"), number("pgmajfault"));
                let mut most = shared.lock().unwrap_or_else(PoisonError::into_inner);
                *most = (most.0.max(now.0), most.1.max(now.1), most.2.max(now.2));
                drop(most);
                std::thread::sleep(LOOK_EVERY);
            }
        });
        Self { most, end, thread: Some(thread) }
    }

    fn most(&self) -> (u64, u64, u64) {
        *self.most.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Whether a child has ended in time. Only then it is reaped.
pub fn ends_within(child: &mut Child, patience: Duration) -> Result<std::process::ExitStatus, String> {
    let handle = PidFd::open(child.id()).map_err(|error| error.to_string())?;
    let timeout = Timespec::try_from(patience).map_err(|error| error.to_string())?;
    let count = rustix::event::poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout));
    if count.map_err(|error| error.to_string())? == 0 {
        return Err(format!("it has not ended in {} s", patience.as_secs()));
    }
    child.wait().map_err(|error| error.to_string())
}
