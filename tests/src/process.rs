//! Programs that a test talks to line by line, with a deadline for every answer: a program that hangs is told apart from one that is
//! slow, says where each of its threads waits, and is killed.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use uhmm_kernel_hook::PidFd;

/// Lines that a failure shows.
const SHOWN: usize = 30;

/// A program that has not answered for so long hangs.
pub const HANGS: Duration = Duration::from_secs(120);

/// A program with its standard input and output. Killed when it is dropped.
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    last: Arc<Mutex<VecDeque<String>>>,
    errors: PathBuf,
    patience: Duration,
}

impl Process {
    /// Starts it. `folder`: gets a file of what it says on standard error.
    pub fn start(name: &str, command: &mut Command, folder: &Path) -> Self {
        let errors = folder.join(format!("{name}.errors"));
        let file = File::create(&errors).expect("a file for what it says");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (sender, lines) = sync_channel(1 << 16);
        let last = Arc::new(Mutex::new(VecDeque::new()));
        let (stdout, kept) = (child.stdout.take().expect("stdout is piped"), Arc::clone(&last));
        std::thread::spawn(move || read_lines(stdout, &sender, &kept));
        Self { name: name.to_owned(), stdin: child.stdin.take(), child, lines, last, errors, patience: HANGS }
    }

    /// It hangs when it does not answer for so long.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Says something to it, then waits for the lines that it answers, up to one that `is_last`. `Err`: it has ended, or it hangs.
    pub fn ask(&mut self, text: &str, is_last: impl Fn(&str) -> bool) -> Result<String, String> {
        if self.stdin.as_mut().expect("it is not told to end yet").write_all(text.as_bytes()).is_err() {
            return Err(self.describe("does not listen"));
        }
        let (mut answer, deadline) = (String::new(), Instant::now() + self.patience);
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    answer += &line;
                    answer.push('\n');
                    if is_last(&line) {
                        return Ok(answer);
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Err(self.describe("hangs")),
                Err(RecvTimeoutError::Disconnected) => return Err(self.describe("ended before it had answered")),
            }
        }
    }

    /// Ends its input and waits for its end. `Err`: it failed, or it hangs.
    pub fn end(&mut self) -> Result<(), String> {
        self.stdin = None;
        let ended = self.wait_end();
        if ended.is_some_and(|success| success) { Ok(()) } else { Err(self.describe("did not end as it should")) }
    }

    /// Whether it ended with success; `None` while it has not ended in time.
    fn wait_end(&mut self) -> Option<bool> {
        let pidfd = PidFd::open(self.child.id()).expect("a child that was not reaped");
        let timeout = Timespec { tv_sec: self.patience.as_secs().cast_signed(), tv_nsec: 0 };
        let count = rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)).expect("poll");
        (count > 0).then(|| self.child.wait().expect("reap it").success())
    }

    /// What a failure says about it: its state, its threads, its last words.
    pub fn describe(&mut self, what: &str) -> String {
        let state = match self.child.try_wait() {
            Ok(Some(status)) => format!("it ended: {status}"),
            _ => format!("it runs as process {}", self.child.id()),
        };
        let mut text = format!("{} {what}; {state}\n", self.name);
        text += &threads(self.child.id());
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(text, "-- the last lines of its output:");
        last.iter().for_each(|line| text = format!("{text}{line}\n"));
        text + "-- the last lines of its errors:\n" + &tail(&fs::read_to_string(&self.errors).unwrap_or_default())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(stdout: ChildStdout, sender: &SyncSender<String>, last: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stdout).split(b'\n') {
        let Ok(line) = line else { return };
        let line = String::from_utf8_lossy(&line).into_owned();
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.push_back(line.clone());
        if last.len() > SHOWN {
            last.pop_front();
        }
        drop(last);
        // A log that nobody waits for any more is kept in `last` alone.
        let _ = sender.try_send(line);
    }
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].iter().flat_map(|line| [line, "\n"]).collect()
}

/// Where each thread of a process waits, as far as the kernel tells this account.
pub fn threads(pid: u32) -> String {
    let mut text = String::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let stack: Vec<String> =
            read("stack").lines().filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned)).collect();
        let id = task.file_name();
        let (name, call, wchan) = (read("comm"), read("syscall"), read("wchan"));
        let call = call.split_whitespace().next().unwrap_or_default();
        let _ = writeln!(
            text,
            "thread {} {}: system call {call}, {wchan}, {}",
            id.display(),
            name.trim(),
            stack.join(" < ")
        );
    }
    text
}
