//! Parts of uhmm in containers of their own: bundles by `services/deploy/bundle`, run by runc, ended when this is dropped.

pub mod system;

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use crate::{PATIENCE, uhmm_exe};

/// Users of the parts; nobody else has these here.
pub const CORE: u32 = 61_001;
/// Of the holder.
pub const HOLDER: u32 = 61_002;
/// Of the first driver.
pub const DRIVER: u32 = 61_003;
/// Of programs.
pub const CLIENT: u32 = 61_004;

/// Containers over one run directory. Needs root for the users and control groups, as the engines that operators use have it.
pub struct Containers {
    dir: Arc<tempfile::TempDir>,
    made: usize,
    rootless: bool,
    /// What `services/deploy/build` has made; otherwise everything is the program of this build.
    programs: Option<PathBuf>,
    /// A file system of its own for the run directory.
    small: Option<Small>,
}

/// Mounted there until it is dropped.
struct Small(PathBuf);

impl Drop for Small {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

/// One that was started.
pub struct Container {
    id: String,
    state: PathBuf,
    log: PathBuf,
    runc: Child,
    rootless: bool,
    /// runc finds it by what lies there.
    _dir: Arc<tempfile::TempDir>,
}

/// An ordinary user.
const NOBODY: u32 = 65_534;

/// As root, or as an ordinary user.
fn runc(state: &Path, rootless: bool) -> Command {
    let found = |dir: PathBuf| dir.join("runc").exists();
    let there = std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(found));
    assert!(there, "runc is missing: apt-get install runc (tests/run does)");
    let mut command = Command::new(if rootless { "setpriv" } else { "runc" });
    if rootless {
        let nobody = NOBODY.to_string();
        command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups", "runc"]).current_dir("/");
    }
    command.arg("--root").arg(state).stdin(Stdio::null());
    command
}

impl Container {
    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has said that so many times.
    pub fn wait_log_times(&mut self, text: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.log().matches(text).count() < times {
            let ended = self.runc.try_wait().expect("wait");
            assert!(ended.is_none() || self.log().contains(text), "{} ended before {text:?}:\n{}", self.id, self.log());
            assert!(Instant::now() < deadline, "{} has not said {text:?} {times} times:\n{}", self.id, self.log());
            std::thread::yield_now();
        }
    }

    /// Waits until it has said that.
    pub fn wait_log(&mut self, text: &str) {
        self.wait_log_times(text, 1);
    }

    fn runc(&self) -> Command {
        runc(&self.state, self.rootless)
    }

    fn tell(&self, words: &[&str]) {
        let output = self.runc().args(words).arg(&self.id).output().expect("runc");
        assert!(output.status.success(), "runc {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Its first process gets that signal; returns when it has ended.
    pub fn end(&mut self, signal: &str) {
        let output = self.runc().args(["kill", &self.id, signal]).output().expect("runc");
        assert!(output.status.success(), "runc kill: {}", String::from_utf8_lossy(&output.stderr));
        self.wait();
    }

    /// Waits for its end; `true`: it succeeded.
    pub fn wait(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.runc.try_wait().expect("wait") {
                return status.success();
            }
            assert!(Instant::now() < deadline, "{} does not end:\n{}", self.id, self.log());
            std::thread::yield_now();
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.runc.try_wait().expect("wait").is_some()
    }

    /// None of its processes runs.
    pub fn pause(&self) {
        self.tell(&["pause"]);
    }

    /// They go on.
    pub fn resume(&self) {
        self.tell(&["resume"]);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- {}:\n{}", self.id, crate::process::tail(&self.log()));
        }
        // What is asleep does not die.
        drop(self.runc().args(["resume", &self.id]).output());
        drop(self.runc().args(["delete", "--force", &self.id]).output());
        let _ = self.runc.wait();
    }
}

impl Containers {
    /// Over an empty run directory, which is the core's. Each part is another user.
    pub fn new() -> Self {
        Self::of(false)
    }

    /// The same, of an ordinary user, who is root in each container's own user namespace and nowhere else.
    pub fn rootless() -> Self {
        Self::of(true)
    }

    /// As [`Containers::new`], of the programs that images hold.
    pub fn of_images(programs: &Path) -> Self {
        Self { programs: Some(programs.to_owned()), ..Self::of(false) }
    }

    /// As [`Containers::new`]; the run directory is a file system of so many KiB.
    pub fn in_small_space(kib: u32) -> Self {
        let mut containers = Self::of(false);
        let run_dir = containers.run_dir();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &format!("size={kib}k,mode=700,uid={CORE},gid={CORE}"), "tmpfs"])
            .arg(&run_dir);
        assert!(mount.status().expect("mount").success(), "{mount:?}: run the container tests as root");
        containers.small = Some(Small(run_dir));
        containers
    }

    fn of(rootless: bool) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the container tests make users and control groups: run them as root"
        );
        let open = fs::Permissions::from_mode(0o755);
        let dir =
            tempfile::Builder::new().prefix("uhmm-oci-").permissions(open).tempdir().expect("a temporary directory");
        let run_dir = dir.path().join("run");
        fs::create_dir(&run_dir).expect("a folder");
        fs::set_permissions(&run_dir, fs::Permissions::from_mode(0o700)).expect("chmod");
        let core = if rootless { NOBODY } else { CORE };
        chown(&run_dir, Some(core), Some(core)).expect("chown");
        if rootless {
            chown(dir.path(), Some(core), Some(core)).expect("chown");
        }
        Self { dir: Arc::new(dir), made: 0, rootless, programs: None, small: None }
    }

    /// The core's run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// A file that the core and `reader` can read.
    pub fn file(&self, name: &str, text: &str, reader: u32) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o440)).expect("chmod");
        let (core, reader) = if self.rootless { (NOBODY, NOBODY) } else { (CORE, reader) };
        chown(&path, Some(core), Some(reader)).expect("chown");
        path
    }

    /// Makes a bundle; what the tool says if it refuses.
    pub fn bundle(&mut self, words: &[&str]) -> Result<PathBuf, String> {
        self.made += 1;
        let out = self.dir.path().join(format!("bundle-{}", self.made));
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../services/deploy/bundle");
        let mut command = Command::new(tool);
        command.arg(&out).args(words.iter().take_while(|word| **word != "--"));
        command.arg("--run-dir").arg(self.run_dir());
        match &self.programs {
            Some(programs) => command.arg("--programs").arg(programs),
            None => command.arg("--uhmm").arg(uhmm_exe()),
        };
        if self.rootless {
            command.arg(format!("--rootless={NOBODY}"));
        }
        command.args(words.iter().skip_while(|word| **word != "--"));
        let output = command.output().expect("python3 is missing: apt-get install python3");
        if output.status.success() { Ok(out) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    /// Makes a bundle and runs it.
    pub fn start(&mut self, words: &[&str]) -> Container {
        let bundle = self.bundle(words).expect("a bundle");
        self.run(&bundle)
    }

    /// Runs a bundle.
    pub fn run(&mut self, bundle: &Path) -> Container {
        self.made += 1;
        let state = self.dir.path().join("runc");
        let id = format!("{}-{}-{}", words_of(bundle), std::process::id(), self.made);
        let log = self.dir.path().join(format!("{id}.log"));
        let (out, errors) =
            (File::create(&log).expect("a log"), File::options().append(true).open(&log).expect("a log"));
        drop(out);
        let out = File::options().append(true).open(&log).expect("a log");
        let mut command = runc(&state, self.rootless);
        command.args(["run", "--bundle"]).arg(bundle).arg(&id);
        let runc = command.stdout(out).stderr(errors).spawn().expect("runc");
        Container { id, state, log, runc, rootless: self.rootless, _dir: Arc::clone(&self.dir) }
    }
}

impl Default for Containers {
    fn default() -> Self {
        Self::new()
    }
}

fn words_of(bundle: &Path) -> String {
    bundle.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
