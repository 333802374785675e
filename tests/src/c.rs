//! C sources of the tests: compiled with warnings as errors, linked with the `libuhmm.so` that lies beside the test (building the
//! workspace's tests builds it too, because `uhmm-capi` has a test of its own).

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The top folder of the repository.
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").to_owned()
}

/// Where cargo left `libuhmm.so`.
fn library_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its own path");
    let deps = test.parent().expect("tests lie in target/PROFILE/deps").to_owned();
    assert!(deps.join("libuhmm.so").exists(), "{} has no libuhmm.so: run `cargo build -p uhmm-capi`", deps.display());
    deps
}

/// Runs a command to its end; panics with what it said when it fails.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    output
}

/// Compiles `sources` to `into`; `options` go to the compiler, in front of them.
pub fn compile(sources: &[PathBuf], options: &[&str], into: PathBuf) -> PathBuf {
    let library = library_dir();
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]).args(options);
    cc.arg("-I").arg(top().join("sdk/capi/include")).args(sources).arg("-o").arg(&into);
    cc.arg("-L").arg(&library).arg("-luhmm").arg(format!("-Wl,-rpath,{}", library.display()));
    run(&mut cc);
    into
}
