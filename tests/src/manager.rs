//! A service manager as systemd is one, as far as its services see it: a notification socket, a descriptor store, and what is in the store
//! handed to the next process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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
    socket: UnixDatagram,
    dir: tempfile::TempDir,
    /// The store: descriptors by name.
    pub kept: BTreeMap<String, OwnedFd>,
    /// Every other line, in order.
    pub lines: Vec<String>,
    /// How often each store name was given.
    pub given: usize,
}

impl Default for Manager {
    fn default() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
        Self { socket, dir, kept: BTreeMap::new(), lines: Vec::new(), given: 0 }
    }
}

impl Manager {
    /// `uhmm up --adopt` as a unit's main process, with all that is in the store.
    pub fn start(&self, run_dir: &Path, manifest: &Path, watchdog: Duration) -> Child {
        let mut script = String::new();
        let mut parked = Vec::new();
        for (index, fd) in self.kept.values().enumerate() {
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
        let names: Vec<&str> = self.kept.keys().map(String::as_str).collect();
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("bash starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        // Nobody reads it; what is never read must not end the process that writes it.
        std::thread::spawn(move || BufReader::new(stdout).lines().for_each(drop));
        child
    }

    /// Listens until a line begins so, and returns it.
    pub fn wait_for(&mut self, start: &str) -> String {
        let (from, deadline) = (self.lines.len(), Instant::now() + PATIENCE);
        loop {
            if let Some(line) = self.lines[from..].iter().find(|line| line.starts_with(start)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing begins with {start:?}: {:?}", self.lines);
            self.listen(left);
        }
    }

    /// Listens until nothing has come for so long; returns how many datagrams came.
    pub fn listen_until_quiet(&mut self, quiet: Duration) -> usize {
        (0..).take_while(|_| self.listen(quiet)).count()
    }

    /// One datagram; false: none came in time.
    fn listen(&mut self, timeout: Duration) -> bool {
        self.socket.set_read_timeout(Some(timeout)).expect("a timeout");
        let mut bytes = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(self.socket.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
        let Ok(got) = got else { return false };
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let text = std::str::from_utf8(&bytes[..got.bytes]).expect("text").to_owned();
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
        match (value("FDSTORE="), value("FDSTOREREMOVE="), value("FDNAME=")) {
            (Some("1"), None, Some(name)) => {
                assert_eq!(value("FDPOLL="), Some("0"), "the manager would drop what hangs up: {text}");
                self.given += 1;
                self.kept.insert(name.to_owned(), fd.expect("a descriptor to store"));
            }
            (None, Some("1"), Some(name)) => drop(self.kept.remove(name)),
            _ => self.lines.extend(text.lines().map(str::to_owned)),
        }
        true
    }
}
