//! Far memory home from a block server, beside nbdcopy from the same server, in one run. Prints; fails only when something is badly wrong.
//!
//! `cargo nextest run --release -p uhmm-driver-block --test speed_nbd --no-capture` on an idle machine shows figures.

mod copies;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uhmm_driver_block::engine::{BlockEngine, COPY_LIMITS};
use uhmm_driver_block::nbd::medium::{Wanted, take};
use uhmm_driver_kit::{CopyOp, DevicePort};
use uhmm_manifest::{NbdPlace, NbdUrl, RemotePlan};

use copies::{LEN, MIB, copy_all, staging};

/// Ends with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(socket: &Path) -> Server {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--unix"]).arg(socket).args(["memory", &format!("{}M", 2 * LEN / MIB)]);
    let child = command.stdin(Stdio::null()).spawn().expect("nbdkit is needed: apt-get install nbdkit, or tests/run");
    let server = Server(child);
    let deadline = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < deadline, "nbdkit does not listen");
        std::thread::yield_now();
    }
    server
}

/// From the server to nowhere, and not holes: what lies there was written before.
fn nbdcopy(socket: &Path) -> f64 {
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let begin = Instant::now();
    let done = Command::new("nbdcopy").args([&url, "null:"]).status();
    assert!(done.expect("nbdcopy is needed: apt-get install libnbd-bin, or tests/run").success());
    (2 * LEN / MIB) as f64 / begin.elapsed().as_secs_f64()
}

fn far(socket: &Path, sealed: bool) -> (f64, f64) {
    let url = NbdUrl { place: NbdPlace::Unix(socket.to_owned()), export: String::new() };
    let plan = RemotePlan { urls: vec![url], connections: 4, patience_s: 60, settle_s: 1, durable: true };
    let port = DevicePort::new(|| {});
    let wanted = Wanted { plan: &plan, memory_bytes: LEN, format: true, sealed, kept: None, port };
    let exports = take(&wanted).expect("an export");
    let mut engine = BlockEngine::new(exports.lane(COPY_LIMITS, exports.pages).expect("a lane"));
    let staging = staging();
    copy_all(&mut engine, &staging, CopyOp::CopyIn);
    let speeds = (copy_all(&mut engine, &staging, CopyOp::CopyIn), copy_all(&mut engine, &staging, CopyOp::CopyOut));
    println!("sealed {sealed}: out {:.0} MiB/s, home {:.0} MiB/s", speeds.0, speeds.1);
    speeds
}

#[test]
fn home_beside_nbdcopy() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("socket");
    let _server = serve(&socket);
    let mut home = Vec::new();
    for _ in 0..3 {
        let (sealed, open) = (far(&socket, true), far(&socket, false));
        let copied = nbdcopy(&socket);
        println!("nbdcopy {copied:.0} MiB/s; home sealed {:.2}x, open {:.2}x", sealed.1 / copied, open.1 / copied);
        home.push(sealed.1 / copied);
    }
    assert!(home.iter().copied().fold(0.0, f64::max) > 0.1, "far below what nbdcopy does: {home:.2?}");
}
