//! A whole system of containers: core, holder, driver `soft0` and a program.

use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use uhmm_kernel_hook::UffdKind;
use uhmm_kernel_hook::program::ProgramMemory;
use uhmm_sdk::{Operator, Session, Target};

use super::{CLIENT, CORE, Container, Containers, DRIVER, HOLDER};
use crate::PATIENCE;
use crate::pattern::word;

const SHARED_LEN: u64 = 4 << 20;
const PRIVATE_LEN: u64 = 1 << 20;
/// What holder and driver show.
pub const TOKEN: &str = "0123456789abcdef0123456789abcdef";

/// What runs in the program's container: its memory goes to the device and comes back, and is compared, until it is stopped.
pub fn work_until_killed() {
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
pub fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("the log is written");
}

/// See the module head; everything ends when it is dropped.
pub struct System {
    /// All there are.
    pub containers: Containers,
    /// Path of the manifest.
    pub manifest: String,
    /// Paths of the tokens of holder and driver.
    pub tokens: [String; 2],
    /// Supervisor, pager, mirror.
    pub core: Container,
    /// See `uhmm holder`.
    pub holder: Container,
    /// `soft0`.
    pub driver: Container,
    rootless: bool,
}

/// A path as text.
pub fn path(path: &Path) -> String {
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

/// A core that need not come up.
pub fn try_core(containers: &mut Containers, manifest: &str, tokens: &[String; 2]) -> Container {
    let uid = CORE.to_string();
    let mut words = vec!["core", "--manifest", manifest, "--uid", &uid, "--env", "UHMM_LOG=info"];
    tokens.iter().for_each(|token| words.extend(["--secrets", token]));
    containers.start(&words)
}

fn start_core(containers: &mut Containers, manifest: &str, tokens: &[String; 2]) -> Container {
    let mut core = try_core(containers, manifest, tokens);
    core.wait_log("ready");
    core
}

/// Holder of the token in that file.
pub fn start_holder(containers: &mut Containers, token: &str) -> Container {
    containers.start(&["holder", "--uid", &HOLDER.to_string(), "--token", token])
}

/// Driver `soft0` with the token in that file.
pub fn start_driver(containers: &mut Containers, manifest: &str, token: &str) -> Container {
    containers.start(&["driver", "soft0", "--manifest", manifest, "--uid", &DRIVER.to_string(), "--token", token])
}

impl System {
    /// Every part runs the one program of this build.
    pub fn start() -> Self {
        Self::over(Containers::new(), false)
    }

    /// All of an ordinary user.
    pub fn rootless() -> Self {
        Self::over(Containers::rootless(), true)
    }

    /// Over these.
    pub fn over(mut containers: Containers, rootless: bool) -> Self {
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

    /// Another core.
    pub fn new_core(&mut self) {
        self.core = start_core(&mut self.containers, &self.manifest, &self.tokens);
    }

    /// Another driver.
    pub fn new_driver(&mut self) -> Container {
        start_driver(&mut self.containers, &self.manifest, &self.tokens[1])
    }

    /// Waits until the holder has all that the supervisor has, its own entries (state, mark) too.
    pub fn holder_is_full(&self) {
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

    /// That (ignored) test of the calling program, in a program's container.
    pub fn program(&mut self, test: &str) -> Container {
        let own = path(&std::env::current_exe().expect("this program"));
        let uid = CLIENT.to_string();
        let mut words = vec!["client", "--uid", &uid];
        words.extend(self.rootless.then_some(["--env", "UHMM_TEST_ROOTLESS=1"]).into_iter().flatten());
        words.extend(["--", &own, "--exact", test, "--ignored", "--nocapture"]);
        self.containers.start(&words)
    }
}

impl System {
    /// That (ignored) test of the calling program, in the driver's container.
    pub fn in_drivers_place(&mut self, test: &str) -> Container {
        let own = path(&std::env::current_exe().expect("this program"));
        let (manifest, uid) = (self.manifest.clone(), DRIVER.to_string());
        let words = ["driver", "soft0", "--manifest", &manifest, "--uid", &uid];
        let program = ["--", &own, "--exact", test, "--ignored", "--nocapture"];
        self.containers.start(&[&words[..], &program].concat())
    }
}

/// The program goes on: two whole turns from now, the second of which begins after this.
pub fn goes_on(program: &mut Container) {
    let turns = program.log().matches(" is right").count();
    program.wait_log_times(" is right", turns + 2);
}
