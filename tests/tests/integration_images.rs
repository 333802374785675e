//! What `services/deploy/build` and the Containerfile make: static programs, one image a part with nothing else in it, and a system that runs from
//! them while its containers are exchanged. (A faster profile than that of `deploy`: the guest's, whose crates CI has compiled by then.)

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use uhmm_tests::container::Containers;
use uhmm_tests::container::system::{System, goes_on, work_until_killed};
use uhmm_tests::{c, uhmm_exe};

const DRIVERS: [&str; 5] = ["soft", "nvme", "bar", "file", "nbd"];

/// What runs in the program's container.
#[test]
#[ignore = "the other tests run it in a container"]
fn program() {
    work_until_killed();
}

fn deploy(script: &str) -> Command {
    Command::new(c::top().join("services/deploy").join(script))
}

fn build(into: &Path) -> PathBuf {
    let target = uhmm_exe().ancestors().nth(2).expect("programs lie in TARGET/PROFILE").to_owned();
    let programs = into.join("programs");
    let mut build = deploy("build");
    build.env("PROFILE", "release").env("OUT", &programs).env("CARGO_TARGET_DIR", target);
    c::run(build.env("LIBUHMM", c::library_dir().join("libuhmm.so")).env("CARGO_NET_OFFLINE", "true"));
    programs
}

fn is_static(program: &Path) -> bool {
    let output = Command::new("ldd").arg(program).output().expect("ldd is part of the C library");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    said.contains("not a dynamic executable") || said.contains("statically linked")
}

/// A file of an OCI layout that something else names by its digest.
fn blob(image: &Path, named: &Value) -> PathBuf {
    let digest = named["digest"].as_str().expect("a digest").replace(':', "/");
    image.join("blobs").join(digest)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

/// Its command's first word, and its files; they are unpacked into `into`.
fn unpack(image: &Path, into: &Path) -> (String, Vec<String>) {
    let manifest = json(&blob(image, &json(&image.join("index.json"))["manifests"][0]));
    let config = json(&blob(image, &manifest["config"]));
    std::fs::create_dir(into).expect("a folder");
    let mut files = Vec::new();
    for layer in manifest["layers"].as_array().expect("layers") {
        let listed = c::run(Command::new("tar").args(["-xvzf"]).arg(blob(image, layer)).arg("-C").arg(into));
        files.extend(String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned));
    }
    (config["config"]["Entrypoint"][0].as_str().unwrap_or_default().to_owned(), files)
}

/// Each image is its one program, and that runs.
fn check_images(programs: &Path, dir: &Path) {
    let out = dir.join("images");
    c::run(deploy("images").arg(&out).env("PROGRAMS", programs));
    for name in ["core"].iter().chain(&DRIVERS) {
        let program = if *name == "core" { "uhmm".to_owned() } else { format!("uhmm-driver-{name}") };
        let root = dir.join(name);
        let (entry, files) = unpack(&out.join(name), &root);
        assert_eq!((entry, files), (format!("/{program}"), vec![program.clone()]), "image {name}");
        let bytes = std::fs::read(root.join(&program)).expect("the program");
        assert!(
            bytes == std::fs::read(programs.join(&program)).expect("the program"),
            "image {name} has another {program}"
        );
    }
    let (_, files) = unpack(&out.join("client"), &dir.join("client"));
    for file in ["usr/lib/libuhmm.so.0", "usr/include/uhmm.h", "usr/lib/pkgconfig/uhmm.pc"] {
        assert!(files.iter().any(|there| there == file), "{file} is not among {files:?}");
    }
}

#[test]
fn integration_images_hold_one_static_program_each_and_a_system_of_them_is_exchanged_part_by_part() {
    let dir = tempfile::tempdir().expect("a folder");
    let programs = build(dir.path());
    let len = |name: &str| std::fs::metadata(programs.join(name)).expect("the program").len();
    assert!(is_static(&programs.join("uhmm")));
    for driver in DRIVERS {
        let name = format!("uhmm-driver-{driver}");
        assert!(is_static(&programs.join(&name)), "{name}");
        assert!(len(&name) * 2 < len("uhmm"), "{name} holds more than its driver: {} bytes", len(&name));
        // Its one line for whoever starts it by hand.
        let output = Command::new(programs.join(&name)).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.starts_with("Error") && said.contains("--name"), "{said}");
    }
    check_images(&programs, dir.path());

    let mut system = System::over(Containers::of_images(&programs), false);
    let mut program = system.program("program");
    goes_on(&mut program);
    system.driver.end("KILL");
    system.driver = system.new_driver();
    goes_on(&mut program);
    system.holder_is_full();
    system.core.end("KILL");
    system.new_core();
    goes_on(&mut program);
}
