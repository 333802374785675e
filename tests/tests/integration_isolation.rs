//! Two clients at once never see each other's bytes, and what a client leaves behind is scrubbed.
//!
//! The second client is a process of its own: this test program started again with a role in its environment.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use uhmm_sdk::{Job, Session};
use uhmm_tests::TestBed;

const MIB: u64 = 1 << 20;
const SECRET: u64 = 0x5ec2_e75e_c2e7_0001;
const ROLE: &str = "UHMM_TEST_ISOLATION_RUN_DIR";

/// Not a test of its own: does nothing unless it is started as the other client.
#[test]
fn integration_isolation_other_client_role() {
    let Ok(run_dir) = std::env::var(ROLE) else { return };
    let session = Session::connect(Some(Path::new(&run_dir))).expect("session");
    let device = session.device("soft0").expect("device");
    let region = session.allocate(6 * MIB).expect("region");
    for offset in (0..region.len_bytes()).step_by(8) {
        region.write_u64(offset, SECRET).expect("write");
    }
    session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate");
    let home = session.migrate(region.addr(), 2 * MIB, uhmm_sdk::Target::Home).expect("evict");
    assert!(home.complete());
    println!("space {} region {}", session.space(), region.addr());
    std::io::stdout().flush().expect("flush");
    // Stays until it is killed: the parent decides when.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("stdin");
}

struct OtherClient {
    child: Child,
    addr: u64,
}

impl OtherClient {
    fn start(bed: &TestBed) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("exe"))
            .args(["--exact", "integration_isolation_other_client_role", "--nocapture"])
            .env(ROLE, bed.run_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("other client");
        let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let said = lines.map(|line| line.expect("line")).find(|line| line.contains("space ")).expect("it is set up");
        let addr = said.split_whitespace().last().and_then(|word| word.parse().ok()).expect("address");
        Self { child, addr }
    }
}

impl Drop for OtherClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Words equal to the other client's secret in everything this client can reach through the device.
fn secrets_seen(session: &Session, len_bytes: u64) -> u64 {
    let device = session.device("soft0").expect("device");
    let region = session.allocate(len_bytes).expect("region");
    let low = device.run(Job::new("scan", [region.addr(), len_bytes, SECRET & 0xff])).expect("scan").results[0];
    let sum = device.run(Job::new("sum", [region.addr(), len_bytes])).expect("sum").results[0];
    let on_cpu = (0..len_bytes).step_by(8).filter(|offset| region.read_u64(*offset).expect("read") != 0).count();
    low + u64::from(sum != 0) + on_cpu as u64
}

#[test]
fn integration_two_clients_never_see_each_others_bytes() {
    let bed = TestBed::start("8MiB");
    let other = OtherClient::start(&bed);
    let session = bed.session();
    // More than the device has left: frames of the other client are evicted and reused here.
    assert_eq!(secrets_seen(&session, 7 * MIB), 0, "the other client's bytes are visible");
    drop(other);
}

#[test]
fn integration_a_dead_clients_device_pages_are_scrubbed_and_reclaimed() {
    let bed = TestBed::start("8MiB");
    let mut other = OtherClient::start(&bed);
    other.child.kill().expect("kill");
    other.child.wait().expect("reap");
    let deadline = std::time::Instant::now() + uhmm_tests::PATIENCE;
    while bed.metric("pager", "spaces") != 0 {
        assert!(std::time::Instant::now() < deadline, "the dead client's space is still there");
        std::thread::yield_now();
    }
    assert_eq!(bed.metric("pager", "regions"), 0);
    assert_eq!(secrets_seen(&bed.session(), 8 * MIB), 0, "a dead client's bytes are visible");
}

#[test]
fn integration_a_job_cannot_reach_another_clients_addresses() {
    let bed = TestBed::start("16MiB");
    let other = OtherClient::start(&bed);
    let session = bed.session();
    let device = session.device("soft0").expect("device");
    let error = device.run(Job::new("sum", [other.addr, 4096])).expect_err("foreign address");
    assert_eq!(error.code(), uhmm_sdk::ErrorCode::Fault, "{error}");
}
