//! What an operator sees is what clients did: metrics, events, traces and post-mortems, over deaths too. Prometheus itself scrapes, with the
//! alert rules and the dashboard that we deliver.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use uhmm_kernel_hook::{Prot, Window, memfd};
use uhmm_sdk::{Device, Job, Region, Session, Target};
use uhmm_tests::{PATIENCE, TestBed, manifest, uhmm_exe};

/// Metrics of the driver nbd alone (`integration_nbd` looks at them).
const OF_BLOCK_SERVERS: [&str; 2] = ["uhmm_driver_servers_away", "uhmm_driver_behind_pages"];

const MIB: u64 = 1 << 20;
const LEN: u64 = 4 * MIB;

/// Ends what it started.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait().map(drop)).expect("it is ours and was not reaped");
    }
}

fn uhmm(bed: &TestBed, words: &[&str]) -> Output {
    let mut command = Command::new(uhmm_exe());
    command.arg("--run-dir").arg(bed.run_dir()).args(words);
    command.output().expect("the program runs")
}

fn said(bed: &TestBed, words: &[&str]) -> String {
    let output = uhmm(bed, words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Serves metrics; where.
fn exporter(bed: &TestBed) -> (Process, String) {
    let mut command = Command::new(uhmm_exe());
    command.arg("--run-dir").arg(bed.run_dir()).args(["metrics", "--listen", "127.0.0.1:0"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the exporter starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("it says where");
    let address = line.trim().strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics"));
    (Process(child), address.expect("an address").to_owned())
}

fn exchange(mut stream: impl Read + Write, path: &str) -> String {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn get(address: &str, path: &str) -> (String, String) {
    let answer = exchange(TcpStream::connect(address).expect("it listens"), path);
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), body.to_owned())
}

fn scrape(address: &str) -> BTreeMap<String, f64> {
    let (head, body) = get(address, "/metrics");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"), "it was cut: {body}");
    let samples = body.lines().filter(|line| !line.starts_with('#'));
    samples
        .filter_map(|line| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.parse().unwrap())))
        .collect()
}

/// The value of a sample when it is that, or as it was at last.
fn awaited(address: &str, name: &str, wanted: f64) -> f64 {
    let until = Instant::now() + PATIENCE;
    loop {
        let value = scrape(address).get(name).copied().unwrap_or(f64::NAN);
        if value == wanted || Instant::now() > until {
            return value;
        }
    }
}

struct Scene {
    region: Region,
    device: Device,
    session: Session,
    bed: TestBed,
}

fn scene(options: &str) -> Scene {
    let bed = TestBed::with_manifest(&manifest("16MiB", options));
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let region = session.allocate(LEN).expect("region");
    Scene { region, device, session, bed }
}

impl Scene {
    fn write(&self) {
        (0..LEN / 8).for_each(|word| self.region.write_u64(word * 8, word).expect("write"));
    }

    fn out(&self) {
        assert!(self.session.migrate(self.region.addr(), LEN, &self.device).expect("migrate").complete());
    }

    fn home(&self) {
        assert!(self.session.migrate(self.region.addr(), LEN, Target::Home).expect("home").complete());
    }

    fn sum(&self) {
        let job = Job::new("sum", [self.region.addr(), LEN]).idempotent();
        let words = LEN / 8;
        assert_eq!(self.device.run(job).expect("sum").results, [words * (words - 1) / 2]);
    }
}

#[test]
fn integration_counters_add_up_to_what_the_client_did_over_kills_of_pager_and_driver() {
    let scene = scene("");
    let (_exporter, address) = exporter(&scene.bed);
    let out = "uhmm_pager_migrated_bytes_total{service=\"pager\",cause=\"user\",way=\"out\"}";
    let home = "uhmm_pager_migrated_bytes_total{service=\"pager\",cause=\"user\",way=\"home\"}";
    let jobs = "uhmm_driver_jobs_total{service=\"soft0\"}";
    let requests = "uhmm_pager_request_seconds_count{service=\"pager\"}";
    scene.write();
    for round in 1..=4u32 {
        scene.out();
        scene.sum();
        scene.home();
        let moved = f64::from(round) * LEN as f64;
        assert_eq!(awaited(&address, out, moved), moved, "round {round}");
        assert_eq!(awaited(&address, home, moved), moved, "round {round}");
        assert_eq!(awaited(&address, jobs, f64::from(round)), f64::from(round), "round {round}");
        assert_eq!(awaited(&address, requests, f64::from(2 * round)), f64::from(2 * round), "round {round}");
        let victim = ["pager", "soft0", "mirror"][round as usize % 3];
        let killed = scene.bed.status(victim).incarnation;
        scene.bed.kill(victim);
        scene.bed.wait_ready(victim, killed);
    }
    // Touched on the device, one by one: each is a fault that was timed, and no touch is counted twice.
    scene.out();
    let count = "uhmm_pager_fault_seconds_count{service=\"pager\",kind=\"device\"}";
    let before = scrape(&address)[count];
    for page in [0, 300, 600, 900] {
        scene.region.read_u64(page * 4096).expect("read");
    }
    assert_eq!(awaited(&address, count, before + 4.0), before + 4.0);
    let all = scrape(&address);
    assert_eq!(
        all["uhmm_service_restarts_total{service=\"pager\"}"] + all["uhmm_service_restarts_total{service=\"mirror\"}"],
        2.0
    );
    assert!(
        all["uhmm_service_recovery_seconds{service=\"pager\"}"] > 0.0
            && all["uhmm_service_up{service=\"pager\"}"] == 1.0
    );
    let places: f64 =
        all.iter().filter(|(name, _)| name.starts_with("uhmm_resident_bytes")).map(|(_, bytes)| bytes).sum();
    assert_eq!(places, LEN as f64, "every page is somewhere, once");
}

#[test]
fn integration_health_is_told_on_both_sockets_and_nothing_else_is() {
    let scene = scene("");
    let (_exporter, address) = exporter(&scene.bed);
    assert!(get(&address, "/healthz").0.starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/readyz").0.starts_with("HTTP/1.1 200"));
    assert!(get(&address, "/etc/passwd").0.starts_with("HTTP/1.1 404"));
    let unix = UnixStream::connect(scene.bed.run_dir().join("metrics.sock")).expect("the Unix socket");
    assert!(exchange(unix, "/metrics").contains("uhmm_service_up{service=\"pager\"} 1.0"));
    // A stopped driver is no reason not to answer, and is seen.
    let stopped = scene.bed.process("soft0");
    stopped.pause();
    assert!(
        scrape(&address).contains_key("uhmm_driver_jobs_total{service=\"soft0\"}"),
        "its record is there all the same"
    );
    stopped.resume();
    let refused = uhmm(&scene.bed, &["metrics", "--listen", "0.0.0.0:0"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("loopback"), "{refused:?}");
}

#[test]
fn integration_a_record_is_given_out_for_reading_only() {
    let scene = scene("");
    let fd = scene.bed.operator().record("pager").expect("record");
    let len = memfd::len(std::os::fd::AsFd::as_fd(&fd)).expect("len");
    let map = |prot| Window::map(std::os::fd::AsFd::as_fd(&fd), 0, len, prot).map(drop);
    map(Prot::ReadOnly).expect("it can be read");
    map(Prot::ReadWrite).expect_err("and not written");
    let error = scene.bed.operator().record("nobody").unwrap_err().to_string();
    assert!(error.contains("nobody"), "{error}");
}

#[test]
fn integration_events_name_causes_deaths_and_refusals() {
    let scene = scene("");
    scene.write();
    scene.out();
    scene.region.read_u64(0).expect("read");
    // The program goes on before the pager has written down what it has done for it.
    let until = Instant::now() + PATIENCE;
    while !said(&scene.bed, &["events", "--json", "--past", "10000"]).contains("cpu-fault-done") {
        assert!(Instant::now() < until, "no CPU fault is told of");
    }
    let killed = scene.bed.status("pager").incarnation;
    scene.bed.kill("pager");
    scene.bed.wait_ready("pager", killed);
    scene.session.allocate(1 << 60).map(drop).expect_err("more than there is");
    let until = Instant::now() + PATIENCE;
    let events = loop {
        let text = said(&scene.bed, &["events", "--json", "--past", "10000"]);
        let events: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("json")).collect();
        if events.iter().any(|event| event["what"] == "service-back") || Instant::now() > until {
            break events;
        }
    };
    let has = |fields: &[(&str, &str)]| {
        events.iter().any(|event| fields.iter().all(|(key, value)| event[*key].as_str() == Some(*value)))
    };
    assert!(has(&[("what", "migrate-end"), ("why", "user"), ("from", "home"), ("to", "soft0")]));
    assert!(has(&[("what", "migrate-end"), ("why", "cpu-fault"), ("from", "soft0"), ("to", "home")]));
    assert!(has(&[("what", "cpu-fault-done"), ("why", "device")]));
    assert!(has(&[("service", "supervisor"), ("what", "service-died"), ("name", "pager")]));
    assert!(has(&[("service", "supervisor"), ("what", "service-back"), ("name", "pager")]));
    let mine = u64::from(std::process::id());
    assert!(events.iter().any(|event| event["what"] == "migrate-end" && event["pid"].as_u64() == Some(mine)));
    assert!(events.iter().is_sorted_by_key(|event| event["time_ns"].as_u64()));
}

#[test]
fn integration_a_device_fault_is_traced_through_driver_mirror_and_pager() {
    let scene = scene("");
    scene.write();
    scene.sum();
    let text = said(&scene.bed, &["trace", "--kind", "job"]);
    let at = |service: &str, what: &str| {
        // time, unit, service, event
        let is = |line: &str| line.split_whitespace().skip(2).take(2).eq([service, what]);
        let found = text.lines().position(is);
        found.unwrap_or_else(|| panic!("{service} {what} is missing in:\n{text}"))
    };
    assert!(at("soft0", "job") < at("soft0", "device-fault"));
    assert!(at("soft0", "device-fault") < at("mirror", "device-fault"));
    assert!(at("mirror", "device-fault") < at("pager", "device-fault"));
    assert!(at("pager", "device-fault-done") < at("mirror", "device-fault-done"));
    assert!(at("mirror", "device-fault-done") < at("soft0", "device-fault-done"));
    let file = scene.bed.run_dir().join("trace.json");
    said(&scene.bed, &["trace", "--kind", "job", "--perfetto", file.to_str().expect("text")]);
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).expect("written")).expect("json");
    let spans = trace["traceEvents"].as_array().expect("events").iter().filter(|event| event["ph"] == "X");
    assert!(spans.clone().count() >= 4 && spans.into_iter().all(|span| span["dur"].as_f64() > Some(0.0)));
    let error = uhmm(&scene.bed, &["trace", "ffffffffffffffffff"]);
    assert!(!error.status.success() && String::from_utf8_lossy(&error.stderr).contains("uhmm events"));
}

#[test]
fn integration_a_dead_service_is_looked_at_after_its_death() {
    let scene = scene("");
    scene.write();
    scene.out();
    let dead = scene.bed.process("pager");
    let (pid, incarnation) = (scene.bed.status("pager").pid, dead.incarnation());
    dead.kill();
    scene.bed.wait_ready("pager", incarnation);
    let text = said(&scene.bed, &["post-mortem", "pager"]);
    for part in [&format!("incarnation {incarnation}, pid {pid}"), "SIGKILL", "migrate-end", "pages_out"] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
    let living = said(&scene.bed, &["post-mortem", "soft0"]);
    assert!(living.contains("nothing of it has died"), "{living}");
    let error = uhmm(&scene.bed, &["post-mortem", "nobody"]);
    assert!(String::from_utf8_lossy(&error.stderr).contains("uhmm status"));
}

#[test]
fn integration_top_shows_the_system_once_and_what_was_recorded() {
    let scene = scene("");
    scene.write();
    scene.out();
    let file = scene.bed.run_dir().join("recording");
    let file = file.to_str().expect("text");
    let live = said(&scene.bed, &["top", "--once", "--record", file]);
    let mine = std::process::id().to_string();
    for part in ["pager", "soft0", "4 MiB of 16 MiB", &mine, "00000000"] {
        assert!(live.contains(part), "{part} is missing in:\n{live}");
    }
    let replayed = said(&scene.bed, &["top", "--once", "--replay", file]);
    assert!(replayed.contains("replay") && replayed.contains("4 MiB of 16 MiB"), "{replayed}");
}

#[test]
fn integration_an_operator_moves_a_region_and_sees_where_it_is() {
    let scene = scene("");
    scene.write();
    let mut operator = scene.bed.operator();
    let region = operator.regions().expect("regions")[0].region;
    let device = operator.device_id("soft0").expect("device");
    assert_eq!(operator.move_region(region, Some(device)).expect("move"), LEN / 4096);
    assert_eq!(operator.strip(region, 8).expect("strip"), vec![16 + device; 8]);
    assert_eq!(operator.move_region(region, None).expect("home"), LEN / 4096);
    assert_eq!(operator.strip(region, 8).expect("strip"), vec![1; 8]);
    operator.move_region(region, Some(7)).map(drop).expect_err("there is no such device");
    operator.move_region(region + 1, None).map(drop).expect_err("nor such a region");
}

/// Our own folder, from the repository's root.
fn delivered(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../services/deploy/monitoring").join(file)
}

fn tool(name: &str) -> Command {
    let found = Command::new(name).arg("--version").output();
    assert!(
        found.is_ok_and(|output| output.status.success()),
        "{name} is missing: apt-get install prometheus, or tests/run"
    );
    Command::new(name)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

fn query(address: &str, expression: &str) -> serde_json::Value {
    let escaped: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let answer =
        exchange(TcpStream::connect(address).expect("prometheus listens"), &format!("/api/v1/query?query={escaped}"));
    let body = &answer[answer.find('{').expect("json")..=answer.rfind('}').expect("json")];
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{expression}: {error}: {answer}"))
}

/// Strings under a key, wherever they are.
fn strings_of(value: &serde_json::Value, key: &str, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Object(fields) => fields.iter().for_each(|(name, value)| match value.as_str() {
            Some(text) if name == key => found.push(text.to_owned()),
            _ => strings_of(value, key, found),
        }),
        serde_json::Value::Array(values) => values.iter().for_each(|value| strings_of(value, key, found)),
        _ => {}
    }
}

fn metrics_in(expression: &str) -> impl Iterator<Item = &str> {
    expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| word.starts_with("uhmm_"))
}

#[test]
fn integration_prometheus_takes_the_exposition_the_rules_and_the_dashboard() {
    let checked = tool("promtool").args(["check", "rules"]).arg(delivered("alerts.yml")).output().expect("promtool");
    assert!(checked.status.success(), "{checked:?}");
    let scene = scene("");
    scene.write();
    scene.out();
    scene.sum();
    scene.region.read_u64(0).expect("read");
    let (_exporter, address) = exporter(&scene.bed);
    let folder = tempfile::tempdir().expect("a folder");
    let config = std::fs::read_to_string(delivered("prometheus.yml")).expect("config");
    let config = config.replace("127.0.0.1:9464", &address).replace("10s", "1s");
    let config = config.replace("alerts.yml", delivered("alerts.yml").to_str().expect("text"));
    std::fs::write(folder.path().join("prometheus.yml"), config).expect("config");
    let listens = format!("127.0.0.1:{}", free_port());
    let mut prometheus = tool("prometheus");
    prometheus.arg("--config.file").arg(folder.path().join("prometheus.yml"));
    prometheus.arg("--storage.tsdb.path").arg(folder.path().join("data")).arg("--web.listen-address").arg(&listens);
    let _prometheus =
        Process(prometheus.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("prometheus starts"));
    let until = Instant::now() + PATIENCE;
    let value =
        |expression: &str| query(&listens, expression)["data"]["result"][0]["value"][1].as_str().map(str::to_owned);
    while TcpStream::connect(&listens).is_err() || value("up").as_deref() != Some("1") {
        assert!(Instant::now() < until, "Prometheus does not take the exposition");
        std::thread::sleep(Duration::from_millis(100));
    }
    let moved = "uhmm_pager_migrated_bytes_total{cause=\"user\",way=\"out\"}";
    assert_eq!(value(moved).as_deref(), Some(LEN.to_string().as_str()));
    let dashboard = std::fs::read(delivered("grafana-dashboard.json")).expect("dashboard");
    let mut expressions = Vec::new();
    strings_of(&serde_json::from_slice(&dashboard).expect("json"), "expr", &mut expressions);
    assert!(expressions.len() > 20);
    let rules = std::fs::read_to_string(delivered("alerts.yml")).expect("rules");
    expressions.extend(rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned));
    for expression in &expressions {
        assert_eq!(query(&listens, expression)["status"], "success", "{expression}");
        for name in metrics_in(expression) {
            let is_there = value(name).is_some() || OF_BLOCK_SERVERS.contains(&name);
            assert!(is_there, "{name} of {expression} is not there");
        }
    }
}
