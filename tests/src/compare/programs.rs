//! The programs that read what they need and answer on standard output, scaled to a working set: everything but the servers.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Outcome;
use super::arrange::{Place, ends_within};
use super::servers;
use crate::c;
use crate::pattern::word;

/// Debian's own Python, for which Debian's numpy is made.
const PYTHON: &str = "/usr/bin/python3";

/// A program of the table.
pub struct Program {
    /// In tables and on the command line.
    pub name: &'static str,
    /// What it does, in a few words.
    pub what: &'static str,
    /// The Debian package that it is from, and a file of it.
    pub package: (&'static str, &'static str),
    /// Cannot run under uhmm yet: changes its user on the way (docs/run.md).
    pub only_when_named: bool,
    run: Run,
}

type Servers = fn(&Place, mib: u64, patience: Duration) -> Result<Outcome, String>;

/// Its arguments, and the file that is its standard input, if it has one.
type Started = (Vec<String>, Option<PathBuf>);

enum Run {
    /// Its arguments, and what it gets on standard input, made in a folder.
    Batch(fn(folder: &Path, mib: u64) -> Started),
    Server(Servers),
}

/// All of them.
pub fn all() -> Vec<Program> {
    let batch = |name, what, package, arguments| Program {
        name,
        what,
        package,
        only_when_named: false,
        run: Run::Batch(arguments),
    };
    let server = |name, what, package, run| Program {
        name,
        what,
        package,
        only_when_named: name == "postgres",
        run: Run::Server(run),
    };
    vec![
        batch("python3", "a dict of lists and a list, read and changed at random", ("python3", PYTHON), python),
        batch("numpy", "sort, gather and sums of random numbers", ("python3-numpy", PYTHON), numpy),
        batch("sqlite3", "insert, index, update, delete, join in memory", ("sqlite3", "/usr/bin/sqlite3"), sqlite),
        batch("sort", "sort -n of lines of text in memory", ("coreutils", "/usr/bin/sort"), sort),
        batch("gcc", "gcc -O2 of one large C file", ("gcc", "/usr/bin/gcc"), gcc),
        batch("node", "maps and arrays of objects, several collections", ("nodejs", "/usr/bin/node"), node),
        batch("pagerank", "PageRank over a graph with hubs, in C", ("gcc", "/usr/bin/gcc"), pagerank),
        server(
            "redis",
            "redis-benchmark's GETs of values of noise, with a BGSAVE",
            ("redis-server", "/usr/bin/redis-server"),
            servers::redis_noise,
        ),
        server(
            "redis-text",
            "the same with values that compress",
            ("redis-server", "/usr/bin/redis-server"),
            servers::redis_text,
        ),
        server(
            "memcached",
            "a fixed load, four fifths of it on a fifth of the keys",
            ("memcached", "/usr/bin/memcached"),
            servers::memcached,
        ),
        server(
            "postgres",
            "initdb, pgbench, sorts and hashes in private memory",
            ("postgresql", "/usr/bin/psql"),
            servers::postgres,
        ),
    ]
}

impl Program {
    /// Runs it to its end, in a place. `Err`: it failed, or it hangs.
    pub fn run(&self, place: &Place, mib: u64, patience: Duration) -> Result<Outcome, String> {
        let begun = Instant::now();
        match &self.run {
            Run::Batch(arguments) => {
                let (words, input) = arguments(place.folder().parent().expect("a run's folder lies in another"), mib);
                to_the_end(place, &words, input.as_deref(), patience)
            }
            Run::Server(run) => run(place, mib, patience),
        }
        .map_err(|error| {
            format!(
                "{} under {}, after {:.1} s: {error}",
                self.name,
                place.arrangement.name(),
                begun.elapsed().as_secs_f64()
            )
        })
    }

    /// Fails loudly where it is not installed.
    pub fn must_be_installed(&self) {
        let (package, file) = self.package;
        let there = Path::new(file).exists()
            && (package != "python3-numpy"
                || Command::new(PYTHON)
                    .args(["-I", "-c", "import numpy"])
                    .status()
                    .is_ok_and(|status| status.success()));
        assert!(there, "{} is not installed: apt-get install -y --no-install-recommends {package}", self.name);
    }
}

/// Its result is what it says on standard output, as a number.
fn to_the_end(place: &Place, words: &[String], input: Option<&Path>, patience: Duration) -> Result<Outcome, String> {
    let input = match input {
        Some(path) => Stdio::from(File::open(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => Stdio::null(),
    };
    let errors = place.folder().join("errors");
    let file = File::create(&errors).map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let mut command = place.command(words);
    let mut child =
        command.stdin(input).stdout(Stdio::piped()).stderr(file).spawn().map_err(|error| error.to_string())?;
    let mut output = child.stdout.take().expect("stdout is piped");
    let hashed = std::thread::spawn(move || {
        let (mut hasher, mut bytes, mut buffer) = (DefaultHasher::new(), 0, vec![0; 1 << 16]);
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            hasher.write(&buffer[..count]);
            bytes += count;
        }
        format!("{bytes} bytes, {:016x}", hasher.finish())
    });
    let ended = ends_within(&mut child, patience);
    let seconds = begun.elapsed().as_secs_f64();
    let said = || crate::process::tail(&fs::read_to_string(&errors).unwrap_or_default());
    if ended.is_err() {
        // `uhmm run` passes it on.
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
    }
    let status = ended.map_err(|why| format!("{why}\n{}", said()))?;
    if !status.success() {
        return Err(format!("it ended with {status}: {}", said()));
    }
    let result = hashed.join().map_err(|_| "its output was not read".to_owned())?;
    Ok(Outcome { result, seconds, p99_us: None })
}

/// A file for all runs, made once.
fn once(path: PathBuf, write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>) -> PathBuf {
    if !path.exists() {
        let mut file = BufWriter::new(File::create(&path).expect("a file in the harness's folder"));
        write(&mut file).and_then(|()| file.flush()).expect("the disk has room");
    }
    path
}

fn source(name: &str) -> String {
    c::top().join("tests/programs").join(name).display().to_string()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn python(_folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    (words(&[PYTHON, "-I", &source("compare_dict.py"), &(mib * 2900).to_string()]), None)
}

fn numpy(_folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    (words(&[PYTHON, "-I", &source("compare_numpy.py"), &(mib * 18_000).to_string()]), None)
}

fn node(_folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    (
        words(&["/usr/bin/node", "--max-old-space-size=4096", &source("compare_heap.js"), &(mib * 2600).to_string()]),
        None,
    )
}

fn sqlite(folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    let text = fs::read_to_string(source("compare.sql")).expect("the source is committed");
    let sql = text.replace("ROWS", &(mib * 9000).to_string());
    let input = once(folder.join(format!("sql-{mib}")), |file| file.write_all(sql.as_bytes()));
    (words(&["/usr/bin/sqlite3", ":memory:"]), Some(input))
}

fn sort(folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    let lines = mib * 10_000;
    let input = once(folder.join(format!("lines-{mib}")), |file| {
        (0..lines).try_for_each(|line| {
            let number = word(1, line) % lines;
            writeln!(file, "{number} {line} padding text of a line")
        })
    });
    (words(&["/usr/bin/sort", "-n", "--parallel=2", "-S", &format!("{}M", mib * 4)]), Some(input))
}

/// Functions that differ, with loops to unroll and switches.
fn gcc(folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    let input = once(folder.join(format!("large-{mib}.c")), |file| {
        let functions = mib * 8;
        for id in 0..functions {
            let (a, b) = (word(1, id) % 97 + 3, word(1, id) % 31 + 2);
            writeln!(
                file,
                "static long t{id}[{a}];\nlong f{id}(long x, const long *p) {{\n  long s = {id};\n  for (int i = 0; i < {a}; i++) {{ \
                 s += p[i] * x; t{id}[i % {a}] ^= s; }}\n  switch (x % {b}) {{ case 0: s ^= {a}; break; case 1: s *= {b}; break; default: \
                 s -= t{id}[x % {a}]; }}\n  for (int i = 0; i < {b}; i++) if (p[i] > s) s = p[i] / (x | 1); return s{};\n}}",
                if id == 0 { String::new() } else { format!(" + f{}(x - 1, p)", id - 1) }
            )?;
        }
        Ok(())
    });
    let input = input.display().to_string();
    (words(&["/usr/bin/gcc", "-O2", "-w", "-S", "-o", "-", &input]), None)
}

fn pagerank(folder: &Path, mib: u64) -> (Vec<String>, Option<PathBuf>) {
    let into = folder.join("pagerank");
    if !into.exists() {
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&into).arg(source("pagerank.c"));
        c::run(&mut cc);
    }
    (vec![into.display().to_string(), (mib * 11_000).to_string(), "40".to_owned()], None)
}
