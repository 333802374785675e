//! The programs that serve: each is started in a place, loaded, asked by clients outside, told to save, asked whether all its data is right, and ended.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Outcome;
use super::arrange::{Place, ends_within};
use crate::pattern::{Rng, word};

const VALUE_BYTES: usize = 1000;
const SERVER_PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// The fixed load on memcached: little enough that one busy core serves it.
const LOAD_PER_S: u64 = 2000;
const LOAD_S: u64 = 6;
const CLIENTS: u64 = 4;

type Answer<T> = Result<T, String>;

/// A server that was started.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(place: &Place, words: &[String], port: u16) -> Answer<Self> {
        let log = File::create(place.folder().join("server.log")).map_err(text)?;
        let mut command = place.command(words);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(text)?).stderr(log);
        let mut server = Self { child: command.spawn().map_err(text)?, port };
        let deadline = Instant::now() + SERVER_PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = server.child.try_wait().map_err(text)?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(place.folder().join("server.log")).unwrap_or_default();
                return Err(format!("the server does not serve ({ended:?}): {}", crate::process::tail(&log)));
            }
            std::thread::sleep(POLL);
        }
        Ok(server)
    }

    fn connect(&self, patience: Duration) -> Answer<BufReader<TcpStream>> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).map_err(text)?;
        stream.set_read_timeout(Some(patience)).and_then(|()| stream.set_nodelay(true)).map_err(text)?;
        Ok(BufReader::new(stream))
    }

    /// As its owner would; the program gets the signal from `uhmm run`.
    fn end(mut self, signal: Signal) -> Answer<()> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, signal).map_err(text)?;
        }
        ends_within(&mut self.child, SERVER_PATIENCE).map(drop)
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A port that was free a moment ago.
fn free_port() -> Answer<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(text)?;
    listener.local_addr().map(|address| address.port()).map_err(text)
}

/// The value of a key in one of its versions: letters. `noise`: hardly anything of it compresses.
fn value(key: u64, version: u64, noise: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(VALUE_BYTES + 16);
    for index in 0.. {
        if bytes.len() >= VALUE_BYTES {
            break;
        }
        let seed = if noise { word(key, index) ^ word(version, key) } else { word(key, version) };
        bytes.extend(seed.to_le_bytes().map(|byte| byte % 94 + 33));
    }
    bytes.truncate(VALUE_BYTES);
    bytes
}

pub(super) fn redis_noise(place: &Place, mib: u64, patience: Duration) -> Answer<Outcome> {
    redis(place, mib, patience, true)
}

pub(super) fn redis_text(place: &Place, mib: u64, patience: Duration) -> Answer<Outcome> {
    redis(place, mib, patience, false)
}

fn redis(place: &Place, mib: u64, patience: Duration, noise: bool) -> Answer<Outcome> {
    let (port, folder, keys) = (free_port()?, place.folder().display().to_string(), mib * 800);
    let line = format!(
        "/usr/bin/redis-server --port {port} --bind 127.0.0.1 --save --dir {folder} --enable-debug-command yes"
    );
    let server = Server::start(place, &words(&line.split(' ').collect::<Vec<_>>()), port)?;
    let mut link = server.connect(patience)?;
    redis_set(&mut link, 0..keys, 0, noise)?;
    let loaded = redis_ask(&mut link, "DEBUG DIGEST")?;
    // The forked child saves while the clients ask, so its parent's memory is shared meanwhile.
    redis_ask(&mut link, "BGSAVE")?;
    let (requests_per_s, p99_us) = redis_benchmark(port, keys, patience)?;
    let deadline = Instant::now() + patience;
    loop {
        let info = redis_ask(&mut link, "INFO persistence")?;
        if info.contains("rdb_bgsave_in_progress:0") {
            let saved = info.contains("rdb_last_bgsave_status:ok") && place.folder().join("dump.rdb").exists();
            saved.then_some(()).ok_or_else(|| format!("it was not saved: {info}"))?;
            break;
        }
        (Instant::now() < deadline).then_some(()).ok_or("BGSAVE does not end")?;
        std::thread::sleep(POLL);
    }
    redis_set(&mut link, 0..keys / 8, 1, noise)?;
    let changed = redis_ask(&mut link, "DEBUG DIGEST")?;
    let check = Command::new("/usr/bin/redis-check-rdb").arg(place.folder().join("dump.rdb")).output().map_err(text)?;
    if !check.status.success() {
        return Err(format!("what was saved is broken: {}", String::from_utf8_lossy(&check.stdout)));
    }
    server.end(Signal::TERM)?;
    Ok(Outcome { result: format!("{loaded} {changed}"), seconds: keys as f64 / requests_per_s, p99_us: Some(p99_us) })
}

/// In pipelines of 500.
fn redis_set(link: &mut BufReader<TcpStream>, keys: std::ops::Range<u64>, version: u64, noise: bool) -> Answer<()> {
    let keys: Vec<u64> = keys.collect();
    for some in keys.chunks(500) {
        let mut sent = Vec::new();
        for key in some {
            let value = value(*key, version, noise);
            write!(sent, "*3\r\n$3\r\nSET\r\n$16\r\nkey:{key:012}\r\n${}\r\n", value.len()).map_err(text)?;
            sent.extend(value);
            sent.extend(b"\r\n");
        }
        link.get_mut().write_all(&sent).map_err(text)?;
        for _ in some {
            let line = line(link)?;
            (line == "+OK").then_some(()).ok_or_else(|| format!("SET was answered with {line}"))?;
        }
    }
    Ok(())
}

fn line(link: &mut BufReader<TcpStream>) -> Answer<String> {
    let mut line = String::new();
    let count = link.read_line(&mut line).map_err(|error| format!("no answer: {error}"))?;
    if count == 0 {
        return Err("the server has ended".into());
    }
    Ok(line.trim_end().to_owned())
}

/// One command with a short answer, or one of several lines.
fn redis_ask(link: &mut BufReader<TcpStream>, command: &str) -> Answer<String> {
    link.get_mut().write_all(format!("{command}\r\n").as_bytes()).map_err(text)?;
    let first = line(link)?;
    if let Some(bytes) = first.strip_prefix('$').and_then(|count| count.parse::<usize>().ok()) {
        let mut body = vec![0; bytes + 2];
        std::io::Read::read_exact(link, &mut body).map_err(text)?;
        return Ok(String::from_utf8_lossy(&body).into_owned());
    }
    if first.starts_with('+') { Ok(first) } else { Err(format!("{command} was answered with {first}")) }
}

/// GETs of all keys at random, about as many as there are. Requests a second, and the 99th percentile.
fn redis_benchmark(port: u16, keys: u64, patience: Duration) -> Answer<(f64, f64)> {
    let line = format!("-h 127.0.0.1 -p {port} -t get -n {keys} -r {keys} -c 8 --csv");
    let mut command = Command::new("/usr/bin/redis-benchmark");
    let mut child = command.args(line.split(' ')).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map_err(text)?;
    let ended = ends_within(&mut child, patience);
    if ended.is_err() {
        child.kill().and_then(|()| child.wait()).map_err(text)?;
    }
    ended?;
    let said = std::io::read_to_string(child.stdout.take().expect("stdout is piped")).map_err(text)?;
    let numbers: Vec<f64> = said
        .lines()
        .last()
        .unwrap_or_default()
        .split(',')
        .filter_map(|cell| cell.trim_matches('"').parse().ok())
        .collect();
    match numbers[..] {
        // requests a second; average, least, 50, 95, 99 %, most, in ms
        [per_s, _, _, _, _, p99_ms, _] => Ok((per_s, p99_ms * 1000.0)),
        _ => Err(format!("redis-benchmark said {said}")),
    }
}

/// A client of ours that sends at fixed times, and takes each answer's time from when it should have been sent: a server that stands still is
/// seen by all who would have asked meanwhile.
pub(super) fn memcached(place: &Place, mib: u64, patience: Duration) -> Answer<Outcome> {
    let (port, keys) = (free_port()?, mib * 800);
    let line = format!("/usr/bin/memcached -u root -l 127.0.0.1 -p {port} -t 2 -m {}", mib * 2);
    let server = Server::start(place, &words(&line.split(' ').collect::<Vec<_>>()), port)?;
    let mut links: Vec<_> = (0..CLIENTS).map(|_| server.connect(patience)).collect::<Answer<_>>()?;
    for key in 0..keys {
        memcached_set(&mut links[(key % CLIENTS) as usize], key, 0)?;
    }
    let begun = Instant::now();
    let results: Vec<Answer<Vec<u64>>> = std::thread::scope(|scope| {
        let clients = links.iter_mut().zip(0..);
        let threads: Vec<_> =
            clients.map(|(link, client)| scope.spawn(move || memcached_client(link, client, CLIENTS, keys))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a client failed".into()))).collect()
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut times: Vec<u64> = results.into_iter().collect::<Answer<Vec<_>>>()?.concat();
    times.sort_unstable();
    let p99_us = times[times.len() * 99 / 100] as f64 / 1e3;
    drop(links);
    server.end(Signal::TERM)?;
    // Every answer was compared with what it must be.
    Ok(Outcome { result: format!("{} right answers", times.len()), seconds, p99_us: Some(p99_us) })
}

fn memcached_set(link: &mut BufReader<TcpStream>, key: u64, version: u64) -> Answer<()> {
    let value = value(key, version, true);
    let mut sent = format!("set k{key} 0 0 {}\r\n", value.len()).into_bytes();
    sent.extend(value);
    sent.extend(b"\r\n");
    link.get_mut().write_all(&sent).map_err(text)?;
    let answer = line(link)?;
    if answer == "STORED" { Ok(()) } else { Err(format!("set k{key} was answered with {answer}")) }
}

fn memcached_get(link: &mut BufReader<TcpStream>, key: u64, version: u64) -> Answer<()> {
    link.get_mut().write_all(format!("get k{key}\r\n").as_bytes()).map_err(text)?;
    let (head, body, end) = (line(link)?, line(link), line(link));
    let right = head.starts_with("VALUE ") && body?.as_bytes() == value(key, version, true) && end? == "END";
    if right { Ok(()) } else { Err(format!("get k{key}: not what was set ({head})")) }
}

/// Its share of the load on its own keys: how long each answer took, in ns.
fn memcached_client(link: &mut BufReader<TcpStream>, client: u64, clients: u64, keys: u64) -> Answer<Vec<u64>> {
    let (mut rng, own, count) = (Rng::new(client + 11), keys / clients, LOAD_PER_S * LOAD_S / clients);
    let (mut versions, mut times) = (vec![0; own as usize], Vec::new());
    let begun = Instant::now();
    for step in 0..count {
        let due = begun + Duration::from_nanos(step * clients * 1_000_000_000 / LOAD_PER_S);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let index = if rng.below(5) < 4 { rng.below(own / 5) } else { rng.below(own) };
        let (key, version) = (index * clients + client, &mut versions[index as usize]);
        if rng.below(10) == 0 {
            *version += 1;
            memcached_set(link, key, *version)?;
        } else {
            memcached_get(link, key, *version)?;
        }
        times.push(u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    Ok(times)
}

/// Hashes, sorts and aggregates whose memory is the backend's own.
const QUERIES: &str = "SET work_mem = '2GB'; SET hash_mem_multiplier = 4; SET max_parallel_workers_per_gather = 0; SET jit = off;
SELECT count(*), sum(n), md5(string_agg(t, '')) FROM (SELECT n, t FROM (SELECT n, md5(n::text) AS t FROM generate_series(1, ROWS) AS n) AS s ORDER BY t) AS o;
SELECT sum(c), max(t) FROM (SELECT md5((n % (ROWS / 2))::text) AS t, count(*) AS c FROM generate_series(1, ROWS) AS n GROUP BY 1) AS g;
SELECT sum(abalance) - (SELECT sum(delta) FROM pgbench_history), (SELECT sum(tbalance) FROM pgbench_tellers) - (SELECT sum(bbalance) FROM pgbench_branches) FROM pgbench_accounts;
";

/// `initdb` and the server run as the user `postgres`, as they insist to.
pub(super) fn postgres(place: &Place, mib: u64, patience: Duration) -> Answer<Outcome> {
    let bin = postgres_bin()?;
    let (port, data) = (free_port()?, place.folder().join("data"));
    fs::create_dir(&data).map_err(text)?;
    fs::set_permissions(&data, PermissionsExt::from_mode(0o700)).map_err(text)?;
    let (user, group) = postgres_user()?;
    chown(&data, Some(user), Some(group)).map_err(text)?;
    let as_user = |line: &str| -> Vec<String> {
        let setpriv =
            format!("/usr/bin/setpriv --reuid={user} --regid={group} --clear-groups {}/{line}", bin.display());
        words(&setpriv.split(' ').collect::<Vec<_>>())
    };
    let data = data.display();
    let begun = Instant::now();
    let mut initdb = place.command(&as_user(&format!("initdb --no-sync -A trust -D {data}")));
    finish(initdb.stdin(Stdio::null()), place, patience)?;
    let line = format!(
        "postgres -D {data} -p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=16MB"
    );
    let server = Server::start(place, &as_user(&line), port)?;
    let client = |program: &str, arguments: &str| {
        let mut command = Command::new(bin.join(program));
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres"]).args(arguments.split(' '));
        command
    };
    finish(&mut client("pgbench", "-i -q -s 1 postgres"), place, patience)?;
    finish(&mut client("pgbench", "-n -c 4 -t 100 postgres"), place, patience)?;
    let mut psql = client("psql", "-q -A -t -d postgres -f -");
    let queries = place.folder().join("queries");
    fs::write(&queries, QUERIES.replace("ROWS", &(mib * 6000).to_string())).map_err(text)?;
    let result = finish(psql.stdin(File::open(&queries).map_err(text)?), place, patience)?;
    let seconds = begun.elapsed().as_secs_f64();
    server.end(Signal::INT)?;
    Ok(Outcome { result, seconds, p99_us: None })
}

/// What it says, when it has succeeded.
fn finish(command: &mut Command, place: &Place, patience: Duration) -> Answer<String> {
    let errors = place.folder().join("client.errors");
    let output = place.folder().join("client.output");
    command.stdout(File::create(&output).map_err(text)?).stderr(File::create(&errors).map_err(text)?);
    let mut child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
    let ended = ends_within(&mut child, patience);
    if ended.is_err() {
        child.kill().and_then(|()| child.wait()).map_err(text)?;
    }
    if ended.is_ok_and(|status| status.success()) {
        return fs::read_to_string(&output).map_err(text);
    }
    let said = fs::read_to_string(&errors).unwrap_or_default();
    Err(format!("{:?} failed or hangs: {}", command.get_program(), crate::process::tail(&said)))
}

fn postgres_bin() -> Answer<std::path::PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").exists());
    found.ok_or_else(|| "PostgreSQL is not installed: apt-get install -y --no-install-recommends postgresql".into())
}

fn postgres_user() -> Answer<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").map_err(text)?;
    let cells = users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|cells| cells[0] == "postgres");
    let number = |cells: &[&str], at: usize| cells.get(at).and_then(|cell| cell.parse().ok());
    let found = cells.and_then(|cells| Some((number(&cells, 2)?, number(&cells, 3)?)));
    found.ok_or_else(|| "There is no user postgres: apt-get install -y --no-install-recommends postgresql".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_key_and_version_and_are_letters() {
        for noise in [false, true] {
            let values = [value(1, 0, noise), value(2, 0, noise), value(1, 1, noise)];
            assert!(values.iter().all(|value| value.len() == VALUE_BYTES && value.iter().all(u8::is_ascii_graphic)));
            assert!(values[0] != values[1] && values[0] != values[2] && values[1] != values[2]);
        }
    }
}
