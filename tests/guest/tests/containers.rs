//! The driver `nvme` in a container that has its VFIO group and nothing else: the bundle of `services/deploy/bundle`, run by runc. It joins the core,
//! serves a program, is killed and replaced in the middle; a program in its place finds everything else shut.
//!
//! ```text
//!   root of the guest: core (uhmm up) <--RUN/join/nvme0-- container: uid 61003, no capability, /dev/vfio/vfio, /dev/vfio/N
//!                      program (this test) --RUN/clients-->
//! ```
//! The guest's root is the initramfs, which no process can leave by pivot_root(2): hence `--no-pivot`.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use uhmm_guest::devices::{NVME, vfio_devices};
use uhmm_guest::running::System;
use uhmm_guest::wait::wait_or_kill;
use uhmm_sdk::{Session, Target};
use uhmm_tests::pattern::word;

const DRIVER: u32 = 61_003;
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const LEN: u64 = 4 << 20;
/// Software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A container; ended when this is dropped.
struct Container {
    id: String,
    log: PathBuf,
    runc: Child,
}

fn runc() -> Command {
    let mut command = Command::new("/usr/sbin/runc");
    command.args(["--root", "/tmp/runc"]);
    command
}

impl Container {
    /// The driver's, by the tool; with `program` that one in its place.
    fn start(id: &str, system: &System, manifest: &Path, program: &[String]) -> Self {
        let bundle = format!("/tmp/bundle-{id}");
        let mut tool = Command::new("/usr/bin/python3");
        tool.args(["-I", "-S", "/services/deploy/bundle", &bundle, "driver", "nvme0", "--programs", "/helpers"]);
        tool.args(["--token", "/tmp/nvme0.token", "--uid", &DRIVER.to_string(), "--manifest"]).arg(manifest);
        tool.arg("--run-dir").arg(system.run_dir());
        if !program.is_empty() {
            tool.arg("--").args(program);
        }
        let made = tool.output().expect("the guest has Python");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let log = PathBuf::from(format!("/tmp/{id}.log"));
        let out = File::create(&log).expect("a log");
        let errors = out.try_clone().expect("the same log");
        let mut run = runc();
        run.args(["run", "--no-pivot", "--bundle", &bundle, id]).stdin(Stdio::null()).stdout(out).stderr(errors);
        Self { id: id.to_owned(), log, runc: run.spawn().expect("the guest has runc") }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait_log(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(self.runc.try_wait().expect("wait").is_none(), "{} ended:\n{}", self.id, self.log());
            assert!(Instant::now() < deadline, "{} has not said {text:?}:\n{}", self.id, self.log());
            std::thread::yield_now();
        }
    }

    /// kill -9 of its first process, from outside.
    fn kill(&mut self) {
        let output = runc().args(["kill", &self.id, "KILL"]).output().expect("runc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        wait_or_kill(&mut self.runc, PATIENCE).expect("wait").expect("it ends");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(runc().args(["delete", "--force", &self.id]).output());
        let _ = self.runc.wait();
        println!("-- {}:\n{}", self.id, self.log());
    }
}

fn core(name: &str) -> (System, PathBuf, String) {
    let devices = vfio_devices(NVME);
    let [address] = devices.as_slice() else { panic!("{devices:?}") };
    fs::write("/tmp/nvme0.token", TOKEN).expect("a token");
    fs::set_permissions("/tmp/nvme0.token", fs::Permissions::from_mode(0o440)).expect("chmod");
    chown("/tmp/nvme0.token", Some(0), Some(DRIVER)).expect("chown");
    let text = format!(
        "[supervisor]\nheartbeat_ms = 1000\nmissed_limit = 30\n\
         [[service]]\nname = \"pager\"\nkind = \"pager\"\n[[service]]\nname = \"mirror\"\nkind = \"mirror\"\n\
         [[service]]\nname = \"nvme0\"\nkind = \"driver\"\ndriver = \"nvme\"\n\
         join = {{ token_file = \"/tmp/nvme0.token\", uid = {DRIVER} }}\n\
         restart = {{ backoff_min_ms = 1, max_deaths = 50 }}\n\
         [[device]]\nname = \"nvme0\"\nservice = \"nvme0\"\npci = \"{address}\"\nformat = true\n\
         memory_bytes = \"32MiB\"\nstaging_bytes = \"4MiB\"\n"
    );
    let manifest = PathBuf::from(format!("/tmp/{name}.toml"));
    fs::write(&manifest, text).expect("a manifest");
    (System::up(name, &manifest), manifest, address.clone())
}

fn group_of(address: &str) -> String {
    let link = fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group")).expect("a group");
    link.file_name().expect("a number").to_string_lossy().into_owned()
}

#[test]
#[ignore = "runs in the guest: tests/guest/run containers"]
fn nvme_driver_in_a_container_is_killed_and_replaced_and_no_byte_is_wrong() {
    let (system, manifest, _) = core("replaced");
    let mut driver = Container::start("nvme0-first", &system, &manifest, &[]);
    driver.wait_log("Let in");
    let session = Session::connect(Some(&system.run_dir().join("clients"))).expect("a session");
    let device = session.device("nvme0").expect("device");
    let region = session.allocate(LEN).expect("region");
    let fill = |seed| (0..LEN / 8).for_each(|index| region.write_u64(index * 8, word(seed, index)).expect("inside"));
    let compare = |seed, from: u64, to: u64| {
        for index in from / 8..to / 8 {
            assert_eq!(region.read_u64(index * 8).expect("inside"), word(seed, index), "seed {seed}, word {index}");
        }
    };
    let out = || {
        let report = session.migrate(region.addr(), LEN, &device).expect("migrate");
        println!("{report:?}");
    };
    for turn in 1..=3 {
        fill(turn);
        out();
        let mut bytes = vec![0; LEN as usize];
        device.read(region.addr(), &mut bytes).expect("the device reads");
        let found = bytes.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().expect("8 bytes")));
        (0..).zip(found).for_each(|(index, found)| assert_eq!(found, word(turn, index), "turn {turn}, word {index}"));
        // Half of it is on the controller when its driver dies, and the program asks for it while nobody is there.
        compare(turn, 0, LEN / 2);
        driver.kill();
        driver = std::thread::scope(|scope| {
            let reader = scope.spawn(|| compare(turn, 0, LEN));
            let mut next = Container::start(&format!("nvme0-{turn}"), &system, &manifest, &[]);
            next.wait_log("Let in");
            reader.join().expect("every byte is right");
            next
        });
        driver.wait_log("Taken over from the vault");
        session.migrate(region.addr(), LEN, Target::Home).expect("home");
        compare(turn, 0, LEN);
    }
    system.uhmm(&["status"]);
}

#[test]
#[ignore = "runs in the guest: tests/guest/run containers"]
fn nvme_driver_in_a_container_has_its_group_and_reaches_nothing_else() {
    let (system, manifest, address) = core("probe");
    let group = group_of(&address);
    fs::write("/tmp/secret", "x").expect("a file");
    let mut words: Vec<String> = ["/helpers/guest-probe", &address, &group, "/tmp/secret"].map(str::to_owned).to_vec();
    for entry in fs::read_dir("/dev/vfio").expect("/dev/vfio") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if name != group && name.parse::<u32>().is_ok() {
            let device = fs::metadata(&path).expect("a node").rdev();
            words.push(format!("{name}={}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
        }
    }
    let mut probe = Container::start("probe", &system, &manifest, &words);
    let status = wait_or_kill(&mut probe.runc, PATIENCE).expect("wait").expect("it ends");
    assert!(status.success() && probe.log().contains("all denied"), "{status}: {}", probe.log());
}
