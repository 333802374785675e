//! A driver that is hostile: whatever it tries is refused, and what else runs goes on. Started by the supervisor as any driver of a third
//! party (`command = [...]`), beside a driver and a client that work.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use uhmm_kernel_hook::confine::{LandlockSupport, effective_uid};
use uhmm_tests::TestBed;

const SECRET: u64 = 0x5ec2_e75e_c2e7_0007;

/// A process of the same user that does nothing.
struct Neighbour(Child);

impl Neighbour {
    fn start() -> Self {
        let mut command = Command::new("sleep");
        Self(command.arg("100000").stdin(Stdio::null()).spawn().expect("sleep starts"))
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().expect("look at it").is_none()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It may be dead already, which is what the test tells.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A copy of the program where any user may execute it.
fn program(dir: &Path) -> PathBuf {
    let copy = dir.join("uhmm-hostile");
    std::fs::copy(env!("CARGO_BIN_EXE_uhmm-hostile"), &copy).expect("a copy");
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).expect("a folder for everybody");
    copy
}

fn manifest(program: &Path, args: &str, more: &str) -> String {
    let soft = uhmm_tests::manifest_of(1, "16MiB", "");
    let program = program.display();
    format!(
        "{soft}\n[[service]]\nname = \"evil\"\nkind = \"driver\"\ncommand = [\"{program}\", {args}]\n{more}\n\
         [[device]]\nname = \"evil\"\nservice = \"evil\"\n"
    )
}

struct Attempts {
    bed: TestBed,
    log: String,
    neighbour: Neighbour,
    _sockets: (UnixListener, UnixListener),
    _dir: tempfile::TempDir,
    _secret: Box<u64>,
}

/// Everything that it tries, with `more` in its manifest.
fn attempts(more: &str, threads: usize) -> Attempts {
    let dir = tempfile::tempdir().expect("a folder");
    let secret = Box::new(SECRET);
    let neighbour = Neighbour::start();
    let name = format!("uhmm-hostile-{}", std::process::id());
    let quiet = SocketAddr::from_abstract_name(&name).expect("a name");
    let run_socket = PathBuf::from(format!("/run/{name}.sock"));
    let _ = std::fs::remove_file(&run_socket);
    let sockets =
        (UnixListener::bind_addr(&quiet).expect("bind"), UnixListener::bind(&run_socket).expect("bind in /run"));
    let own_file = dir.path().join("private");
    std::fs::write(&own_file, "a key").expect("a file");
    let words = [
        ("--client", format!("{}:{}", std::process::id(), std::ptr::from_ref(&*secret).addr())),
        ("--neighbour", neighbour.0.id().to_string()),
        ("--socket", "driver-soft0.sock".to_owned()),
        ("--socket", "view/pager/supervisor.sock".to_owned()),
        ("--socket", "inner/pager.sock".to_owned()),
        ("--socket", run_socket.display().to_string()),
        ("--file", own_file.display().to_string()),
        ("--abstract", name),
        ("--threads", threads.to_string()),
    ];
    // Nothing is said after one that was executed: the control has something to say to its end.
    let execute = (!more.contains("off")).then(|| ("--execute", "/bin/true".to_owned()));
    let words = words.into_iter().chain(execute);
    let args: Vec<String> = words.map(|(option, value)| format!("\"{option}\", \"{value}\"")).collect();
    let manifest = manifest(&program(dir.path()), &args.join(", "), more);
    let bed = TestBed::without_waiting(&manifest);
    bed.wait_log("\nend\n");
    let log = bed.log();
    std::fs::remove_file(&run_socket).expect("remove the socket");
    Attempts { bed, log, neighbour, _sockets: sockets, _dir: dir, _secret: secret }
}

/// What became of each attempt.
fn told(log: &str) -> Vec<(&str, &str)> {
    let denied = log.lines().filter_map(|line| line.split_once(" denied "));
    let allowed = log.lines().filter_map(|line| line.strip_suffix(" allowed")).map(|name| (name, "allowed"));
    denied.chain(allowed).filter(|(name, _)| !name.contains("service=")).collect()
}

/// Every attempt is refused, for the right reason, and nobody has noticed.
fn all_is_denied(run: &mut Attempts, expected: &[&str]) {
    let told = told(&run.log);
    let allowed: Vec<_> = told.iter().filter(|(_, how)| *how == "allowed").map(|(name, _)| *name).collect();
    assert!(allowed.is_empty(), "allowed: {allowed:?}\n{}", run.log);
    for (name, _) in uhmm_kernel_hook::hostile::ATTEMPTS {
        assert!(told.iter().any(|(found, _)| found == name), "{name} was not tried:\n{}", run.log);
    }
    for name in expected {
        assert!(told.iter().any(|(found, _)| found.starts_with(name)), "{name} was not tried:\n{}", run.log);
    }
    // Refused by the sandbox, and not because there was nothing to reach.
    for name in
        ["/dev/kvm", "/dev/kmsg", "/dev/loop0", "/etc/shadow", "a new file in /tmp", "/proc/PID/maps of a client"]
    {
        let path = name.split_once(' ').map_or(name, |(path, _)| path);
        let exists = !path.starts_with("/dev") || Path::new(path).exists();
        let how = told.iter().find(|(found, _)| *found == name).map(|(_, how)| *how);
        assert!(!exists || how == Some("EACCES"), "{name}: {how:?}");
    }
    for name in
        ["process_vm_readv of a client", "ptrace of a client", "kill of a neighbour", "bpf", "io_uring", "mount"]
    {
        assert!(told.contains(&(name, "EPERM")), "{name}:\n{}", run.log);
    }
    assert!(run.neighbour.lives(), "the neighbour was killed");
    // The others work on.
    let session = run.bed.session();
    let region = session.allocate(1 << 20).expect("region");
    region.write_u64(0, SECRET).expect("write");
    let device = session.device("soft0").expect("device");
    assert!(session.migrate(region.addr(), region.len_bytes(), &device).expect("migrate").complete());
    assert_eq!(region.read_u64(0).expect("read"), SECRET);
}

#[test]
fn integration_hostile_driver_is_denied_everything() {
    assert!(LandlockSupport::probe().signals(), "this test is for kernels with Landlock 6: see `uhmm doctor`");
    let mut run = attempts("", 0);
    let sockets =
        ["socket driver-soft0.sock", "socket view/pager", "socket inner/pager", "socket /run/", "an abstract socket"];
    let roles =
        ["client of the pager", "operator of the pager", "operator of the supervisor", "pager's mirror without key"];
    all_is_denied(&mut run, &[&sockets[..], &roles[..], &["file ", "another program"]].concat());
    // The operator learns what was refused, once each, by name.
    for call in ["process_vm_readv", "ptrace", "bpf", "kill"] {
        let lines =
            run.log.lines().filter(|line| line.contains("was refused") && line.contains(&format!("call=\"{call}\"")));
        assert_eq!(lines.count(), 1, "{call}:\n{}", run.log);
    }
    assert!(run.bed.metric("supervisor", "denied_calls") > 20);
    let whole = run.bed.metric("supervisor", "sandbox_soft0");
    assert_eq!(
        run.bed.metric("supervisor", "sandbox_evil"),
        whole,
        "a third party's driver is confined as a built-in one"
    );
}

#[test]
fn integration_hostile_driver_of_another_user_is_denied_threads_too() {
    if effective_uid() != 0 {
        let text = uhmm_manifest::Manifest::built_in().resolve().expect("plan").print();
        assert!(!text.contains("runs as"), "only root starts services as somebody else");
        return;
    }
    let mut run = attempts("user = \"nobody\"\nsandbox = { processes = 64 }", 256);
    all_is_denied(&mut run, &["any number of threads", "another program", "client of the pager"]);
    assert!(run.log.contains("any number of threads denied EAGAIN"), "{}", run.log);
}

/// The control: without sandbox the same program reaches what it wants, so the attempts are real.
#[test]
fn integration_hostile_driver_without_sandbox_gets_through() {
    let run = attempts("sandbox = { mode = \"off\" }", 0);
    let told = told(&run.log);
    for name in [
        "fork by fork",
        "a new file in /tmp",
        "client of the pager",
        "operator of the supervisor",
        "socket driver-soft0.sock",
    ] {
        assert!(told.contains(&(name, "allowed")), "{name}:\n{}", run.log);
    }
    if effective_uid() == 0 {
        assert!(told.contains(&("process_vm_readv of a client", "allowed")), "{}", run.log);
    }
    assert!(run.log.contains("without sandbox, as its manifest says"), "{}", run.log);
    for left in ["/tmp/uhmm-hostile-file", "/tmp/uhmm-hostile-mem"] {
        let _ = std::fs::remove_file(left);
    }
}
