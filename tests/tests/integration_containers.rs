//! Core, holder, driver and program each in a container of its own, as unprivileged as they can be: every one of them is killed and replaced
//! while the program works, and not one byte is wrong. What each container was not given it cannot reach. Wrong input is told by name.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_kernel_hook::{SeqPacket, UffdKind};
use uhmm_sdk::{Operator, Session, Target};
use uhmm_tests::PATIENCE;
use uhmm_tests::container::{CLIENT, CORE, Container, Containers, DRIVER, HOLDER};
use uhmm_tests::pattern::word;

const SHARED_LEN: u64 = 4 << 20;
const PRIVATE_LEN: u64 = 1 << 20;
const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// What runs in the program's container: its memory goes to the device and comes back, and is compared, until it is stopped.
#[test]
#[ignore = "the other tests run it in a container"]
fn program() {
    let session = Session::connect(None).expect("a session");
    let full = std::env::var_os("UHMM_TEST_ROOTLESS").is_none();
    assert_eq!(session.uffd_kind() == UffdKind::Full, full, "the core hands the device over if it has it");
    let device = session.device("soft0").expect("device");
    let shared = session.allocate(SHARED_LEN).expect("region");
    let private = ProgramMemory::private(PRIVATE_LEN).expect("memory");
    let _adopted = session.adopt(private.addr(), PRIVATE_LEN).expect("adopt");
    for turn in 1.. {
        for index in 0..SHARED_LEN / 8 {
            shared.write_u64(index * 8, word(turn, index)).expect("inside");
        }
        for index in 0..PRIVATE_LEN / 8 {
            private.store_u64(index * 8, word(turn + 1, index)).expect("inside");
        }
        for (addr, len, seed) in [(shared.addr(), SHARED_LEN, turn), (private.addr(), PRIVATE_LEN, turn + 1)] {
            session.migrate(addr, len, &device).expect("migrate");
            let mut bytes = vec![0; len as usize];
            device.read(addr, &mut bytes).expect("the device reads");
            let words = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
            (0..)
                .zip(words)
                .for_each(|(index, found)| assert_eq!(found, word(seed, index), "turn {turn}, device, word {index}"));
        }
        // A part comes home by faults, the rest by request.
        let read = |index: u64| shared.read_u64(index * 8).expect("inside");
        (0..SHARED_LEN / 16).for_each(|index| assert_eq!(read(index), word(turn, index), "turn {turn}, word {index}"));
        session.migrate(shared.addr(), SHARED_LEN, Target::Home).expect("home");
        (0..SHARED_LEN / 8).for_each(|index| assert_eq!(read(index), word(turn, index), "turn {turn}, word {index}"));
        for index in 0..PRIVATE_LEN / 8 {
            let found = private.load_u64(index * 8).expect("inside");
            assert_eq!(found, word(turn + 1, index), "turn {turn}, private word {index}");
        }
        say(&format!("turn {turn} is right"));
    }
}

/// To whoever reads the container's log.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("the log is written");
}

struct System {
    containers: Containers,
    manifest: String,
    tokens: [String; 2],
    core: Container,
    holder: Container,
    driver: Container,
    rootless: bool,
}

fn path(path: &Path) -> String {
    path.to_str().expect("text").to_owned()
}

fn manifest(tokens: &[String; 2]) -> String {
    let [holder, driver] = tokens;
    format!(
        r#"
[supervisor]
heartbeat_ms = 500
missed_limit = 20
[holder]
join = {{ token_file = "{holder}", uid = {HOLDER} }}
[[service]]
name = "pager"
kind = "pager"
[[service]]
name = "mirror"
kind = "mirror"
[[service]]
name = "soft0"
kind = "driver"
driver = "soft"
join = {{ token_file = "{driver}", uid = {DRIVER} }}
restart = {{ backoff_min_ms = 1, backoff_max_ms = 20, max_deaths = 1000 }}
[[device]]
name = "soft0"
service = "soft0"
memory_bytes = "32MiB"
"#
    )
}

fn start_core(containers: &mut Containers, manifest: &str, tokens: &[String; 2]) -> Container {
    let uid = CORE.to_string();
    let mut words = vec!["core", "--manifest", manifest, "--uid", &uid, "--env", "UHMM_LOG=info"];
    tokens.iter().for_each(|token| words.extend(["--secrets", token]));
    let mut core = containers.start(&words);
    core.wait_log("ready");
    core
}

fn start_holder(containers: &mut Containers, token: &str) -> Container {
    containers.start(&["holder", "--uid", &HOLDER.to_string(), "--token", token])
}

fn start_driver(containers: &mut Containers, manifest: &str, token: &str) -> Container {
    containers.start(&["driver", "soft0", "--manifest", manifest, "--uid", &DRIVER.to_string(), "--token", token])
}

impl System {
    fn start() -> Self {
        Self::over(Containers::new(), false)
    }

    /// All of an ordinary user.
    fn rootless() -> Self {
        Self::over(Containers::rootless(), true)
    }

    fn over(mut containers: Containers, rootless: bool) -> Self {
        let token = |name: &str, reader| path(&containers.file(name, TOKEN, reader));
        let tokens = [token("holder.token", HOLDER), token("soft0.token", DRIVER)];
        let mut text = manifest(&tokens);
        if rootless {
            // Everybody is the same user, which is root there.
            [HOLDER, DRIVER].iter().for_each(|uid| text = text.replace(&format!("uid = {uid}"), "uid = 0"));
        }
        let manifest = path(&containers.file("manifest.toml", &text, CORE));
        let core = start_core(&mut containers, &manifest, &tokens);
        let mut holder = start_holder(&mut containers, &tokens[0]);
        holder.wait_log("Let in");
        let mut driver = start_driver(&mut containers, &manifest, &tokens[1]);
        driver.wait_log("Let in");
        Self { containers, manifest, tokens, core, holder, driver, rootless }
    }

    fn new_core(&mut self) {
        self.core = start_core(&mut self.containers, &self.manifest, &self.tokens);
    }

    fn new_driver(&mut self) -> Container {
        start_driver(&mut self.containers, &self.manifest, &self.tokens[1])
    }

    /// Waits until the holder has all that the supervisor has, its own entries (state, mark) too.
    fn holder_is_full(&self) {
        let mut operator = Operator::connect(Some(&self.containers.run_dir())).expect("an operator");
        let mut entries = |service: &str| {
            let metrics = operator.stats(service).unwrap_or_default();
            metrics.iter().find(|metric| metric.name == "vault_entries").map_or(0, |metric| metric.value)
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (kept, held) = (entries("supervisor"), entries("holder"));
            if kept > 0 && held >= kept + 2 {
                return;
            }
            assert!(Instant::now() < deadline, "the holder has {held} entries, the supervisor {kept}");
            std::thread::yield_now();
        }
    }

    fn program(&mut self, test: &str) -> Container {
        let own = path(&std::env::current_exe().expect("this program"));
        let uid = CLIENT.to_string();
        let mut words = vec!["client", "--uid", &uid];
        words.extend(self.rootless.then_some(["--env", "UHMM_TEST_ROOTLESS=1"]).into_iter().flatten());
        words.extend(["--", &own, "--exact", test, "--ignored", "--nocapture"]);
        self.containers.start(&words)
    }
}

/// The program goes on: two whole turns from now, the second of which begins after this.
fn goes_on(program: &mut Container) {
    let turns = program.log().matches(" is right").count();
    program.wait_log_times(" is right", turns + 2);
}

#[test]
fn integration_every_container_is_killed_and_replaced_and_no_byte_is_wrong() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);

    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);

    // Another image is there before the old one is stopped: it waits for its turn.
    let mut next = system.new_driver();
    system.core.wait_log_times("A process asks to be this service", 4);
    goes_on(&mut program);
    assert!(!next.log().contains("Let in"), "one driver at a time");
    system.driver.end("TERM");
    next.wait_log("Let in");
    system.driver = next;
    goes_on(&mut program);

    // An upgrade of the core, and its sudden death: pager, mirror and supervisor at once.
    system.holder_is_full();
    for signal in ["TERM", "KILL"] {
        system.core.end(signal);
        system.new_core();
        goes_on(&mut program);
        assert!(!system.driver.has_ended(), "the driver outlives the core");
    }

    system.holder.end("KILL");
    system.holder = start_holder(&mut system.containers, &system.tokens[0]);
    system.holder.wait_log("Let in");
    goes_on(&mut program);
    system.holder_is_full();
    system.core.end("KILL");
    system.new_core();
    goes_on(&mut program);

    // A driver that is asleep while the core is replaced is no dead driver.
    system.driver.pause();
    system.core.end("KILL");
    system.new_core();
    system.driver.resume();
    goes_on(&mut program);
    program.end("KILL");
}

#[test]
fn integration_containers_of_an_ordinary_user_are_killed_and_replaced_too() {
    let mut system = System::rootless();
    let mut program = system.program("program");
    goes_on(&mut program);
    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);
    system.holder_is_full();
    for signal in ["TERM", "KILL"] {
        system.core.end(signal);
        system.new_core();
        goes_on(&mut program);
    }
    assert!(!system.driver.has_ended() && !system.holder.has_ended());
}

#[test]
#[ignore = "the other tests run it in a driver's container"]
fn probe() {
    let denied = |what: &str, problem: Option<String>| {
        let problem = problem.unwrap_or_else(|| panic!("{what} is possible"));
        say(&format!("denied {what}: {problem}"));
    };
    let io = |result: std::io::Result<()>| result.err().map(|error| error.to_string());
    let opens = |path: &str| io(std::fs::File::open(path).map(drop));
    let connects = |name: &str| {
        let socket = SeqPacket::connect(&Path::new("/run/uhmm").join(name));
        socket.err().map(|error| error.to_string())
    };
    let own = std::process::id().to_string();
    let numbers =
        std::fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let others: Vec<String> = numbers.filter(|name| name.parse::<u32>().is_ok() && *name != own).collect();
    denied("another process", others.is_empty().then(|| "none is seen".to_owned()));
    denied("a program's memory", opens("/proc/2/mem").or_else(|| opens("/proc/1/mem").filter(|_| own != "1")));
    for other in ["driver-soft0.sock", "../run/driver-soft0.sock", "../clients/pager.sock"] {
        denied(other, connects(other));
    }
    SeqPacket::connect(Path::new("/run/uhmm/pager.sock")).expect("what its channels lead to it may call");
    denied("the network", io(std::net::TcpStream::connect("1.1.1.1:53").map(drop)));
    denied("a listening port", io(std::net::TcpListener::bind("127.0.0.1:0").map(drop)));
    denied("userfaultfd", opens("/dev/userfaultfd"));
    denied("a disk", io(std::fs::write("/program", "x")));
    denied("a new file", io(std::fs::write("/tmp/x", "x")));
    denied("a socket of its own for others", io(std::fs::write("/run/uhmm/x", "x")));
    denied(
        "another user",
        rustix::thread::set_thread_uid(rustix::process::Uid::ROOT).err().map(|error| error.to_string()),
    );
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line:?} is missing in {status}");
    }
    say("all denied");
}

#[test]
fn integration_a_drivers_container_reaches_no_memory_no_other_socket_and_no_network() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);
    let own = path(&std::env::current_exe().expect("this program"));
    let (manifest, uid) = (system.manifest.clone(), DRIVER.to_string());
    let words = [
        "driver",
        "soft0",
        "--manifest",
        &manifest,
        "--uid",
        &uid,
        "--",
        &own,
        "--exact",
        "probe",
        "--ignored",
        "--nocapture",
    ];
    let mut probe = system.containers.start(&words);
    assert!(probe.wait(), "{}", probe.log());
    assert!(probe.log().contains("all denied"), "{}", probe.log());
    goes_on(&mut program);
}

#[test]
fn integration_what_is_wrong_with_a_container_is_told_by_name_and_costs_nobody_anything() {
    let mut system = System::start();
    let mut program = system.program("program");
    goes_on(&mut program);
    let (manifest, token) = (system.manifest.clone(), system.tokens[1].clone());
    let driver_uid = DRIVER.to_string();

    // Another token; another user; a token that is none.
    let other = path(&system.containers.file("other.token", "another token of 32 bytes, yes..", DRIVER));
    let short = path(&system.containers.file("short.token", "short", DRIVER));
    let stranger = (DRIVER + 100).to_string();
    let readable = path(&system.containers.file("readable.token", TOKEN, DRIVER + 100));
    for (uid, token, told) in [
        (&driver_uid, &other, "may not connect"),
        (&stranger, &readable, "must run as user"),
        (&driver_uid, &short, "16 to 64"),
    ] {
        let mut wrong =
            system.containers.start(&["driver", "soft0", "--manifest", &manifest, "--uid", uid, "--token", token]);
        assert!(!wrong.wait(), "{}", wrong.log());
        assert!(wrong.log().contains(told), "{told:?} is not in {}", wrong.log());
    }

    // A folder that others may write to.
    let folder = system.containers.run_dir().join("join/soft0");
    let chmod = |mode| std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).expect("chmod");
    chmod(0o777);
    let mut wrong = start_driver(&mut system.containers, &manifest, &token);
    assert!(!wrong.wait() && wrong.log().contains("chmod go-w"), "{}", wrong.log());
    chmod(0o755);

    // A second core.
    let uid = CORE.to_string();
    let mut words = vec!["core", "--manifest", &manifest, "--uid", &uid];
    system.tokens.iter().for_each(|token| words.extend(["--secrets", token]));
    let mut second = system.containers.start(&words);
    assert!(!second.wait() && second.log().contains("supervisor.sock"), "{}", second.log());
    // And one that may not use the folder.
    let plain = "[[service]]\nname = \"pager\"\nkind = \"pager\"\n[[service]]\nname = \"mirror\"\nkind = \"mirror\"\n";
    let plain = path(&system.containers.file("plain.toml", plain, DRIVER));
    let mut foreign = system.containers.start(&["core", "--manifest", &plain, "--uid", &driver_uid]);
    assert!(!foreign.wait() && foreign.log().contains("must be a folder of this user"), "{}", foreign.log());

    // What is not in the manifest has no bundle.
    let refused = system.containers.bundle(&["driver", "soft7", "--manifest", &manifest]).expect_err("no such driver");
    assert!(refused.contains("soft7") && refused.contains("join"), "{refused}");
    assert!(!system.driver.has_ended());
    goes_on(&mut program);
}
