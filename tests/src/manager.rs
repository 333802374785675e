//! A service manager as systemd is one, as far as its services see it: a notification socket, a descriptor store, and what is in the store
//! handed to the next process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::{PATIENCE, uhmm_exe};

/// The first descriptor that a service is handed.
const FIRST_FD: usize = 3;
/// Above all that a process has by itself, so that none is overwritten while they are put in place.
const PARKED_FD: i32 = 2000;

/// See the module head.
pub struct Manager {
    dir: tempfile::TempDir,
    heard: Arc<(Mutex<Heard>, Condvar)>,
}

/// What has come so far.
#[derive(Default)]
pub struct Heard {
    /// The store: descriptors by name.
    pub kept: BTreeMap<String, OwnedFd>,
    /// Every other line, in order.
    pub lines: Vec<String>,
    /// How many descriptors were given.
    pub given: usize,
    datagrams: usize,
    read_lines: usize,
}

impl Default for Manager {
    /// Listens from now on: a manager is always there.
    fn default() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
        let heard = Arc::new((Mutex::new(Heard::default()), Condvar::new()));
        let to = Arc::clone(&heard);
        std::thread::spawn(move || listen(&socket, &to));
        Self { dir, heard }
    }
}

impl Manager {
    /// What has come so far; nothing comes while it is looked at.
    pub fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `uhmm up --adopt` as a unit's main process, with all that is in the store.
    pub fn start(&self, run_dir: &Path, manifest: &Path, watchdog: Duration) -> Child {
        let mut script = String::new();
        let mut parked = Vec::new();
        let heard = self.heard();
        for (index, fd) in heard.kept.values().enumerate() {
            let fd = rustix::io::fcntl_dupfd_cloexec(fd, PARKED_FD).expect("a descriptor");
            rustix::io::fcntl_setfd(&fd, FdFlags::empty()).expect("it is inherited");
            script += &format!("exec {}<&{raw} {raw}<&-\n", FIRST_FD + index, raw = fd.as_raw_fd());
            parked.push(fd);
        }
        script += "export LISTEN_PID=$$\nexec \"$@\"";
        let mut command = Command::new("bash");
        command.args(["-c", &script, "unit"]).arg(uhmm_exe()).arg("--run-dir").arg(run_dir);
        command.args(["up", "--adopt", "--manifest"]).arg(manifest);
        command.env("NOTIFY_SOCKET", self.dir.path().join("notify")).env("FDSTORE", "4096");
        command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        let names: Vec<&str> = heard.kept.keys().map(String::as_str).collect();
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("bash starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        // Nobody reads it; what is never read must not end the process that writes it.
        std::thread::spawn(move || BufReader::new(stdout).lines().for_each(drop));
        child
    }

    /// Waits for a line that begins so, among those that came after what was waited for last, and returns it.
    pub fn wait_for(&self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = self.heard();
        loop {
            let from = heard.read_lines;
            if let Some(at) = heard.lines[from..].iter().position(|line| line.starts_with(start)) {
                heard.read_lines = from + at + 1;
                return heard.lines[from + at].clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing begins with {start:?}: {:?}", &heard.lines[from..]);
            heard = self.heard.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until nothing has come for so long.
    pub fn wait_until_quiet(&self, quiet: Duration) {
        let mut heard = self.heard();
        loop {
            let before = heard.datagrams;
            let waited = self.heard.1.wait_timeout_while(heard, quiet, |heard| heard.datagrams == before);
            let (now, result) = waited.unwrap_or_else(PoisonError::into_inner);
            if result.timed_out() {
                return;
            }
            heard = now;
        }
    }
}

fn listen(socket: &UnixDatagram, to: &(Mutex<Heard>, Condvar)) {
    loop {
        let mut bytes = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
        let Ok(got) = got else { continue };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let text = String::from_utf8_lossy(&bytes[..got.bytes]);
        let mut heard = to.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.hear(&text, fd);
        to.1.notify_all();
    }
}

impl Heard {
    fn hear(&mut self, text: &str, fd: Option<OwnedFd>) {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        self.datagrams += 1;
        match (value("FDSTORE="), value("FDSTOREREMOVE="), value("FDNAME="), fd) {
            // (Without FDPOLL=0 it would be dropped when it hangs up.)
            (Some("1"), None, Some(name), Some(fd)) if value("FDPOLL=") == Some("0") => {
                self.given += 1;
                self.kept.insert(name.to_owned(), fd);
            }
            (None, Some("1"), Some(name), None) => drop(self.kept.remove(name)),
            _ => self.lines.extend(text.lines().map(str::to_owned)),
        }
    }
}
