//! C sources of the tests, compiled with warnings as errors and linked with `libuhmm.so`.
//!
//! `libuhmm.so` lies beside the test: building the workspace's tests builds it too, because `uhmm-capi` has a test of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The top of the repository.
pub fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository").to_owned()
}

/// Text of a file of `tests/c`.
pub fn source(name: &str) -> String {
    std::fs::read_to_string(top().join("tests/c").join(name)).expect("the program is there")
}

/// Where cargo left `libuhmm.so`.
pub fn library_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows its own path");
    let deps = test.parent().expect("tests lie in target/PROFILE/deps").to_owned();
    assert!(deps.join("libuhmm.so").exists(), "{} has no libuhmm.so: run `cargo build -p uhmm-capi`", deps.display());
    deps
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    output
}

/// The program of these files of `tests/c`, compiled into `dir`.
pub fn compile(sources: &[&str], dir: &Path) -> PathBuf {
    let sources: Vec<_> = sources.iter().map(|name| top().join("tests/c").join(name)).collect();
    compile_to(dir.join("program"), &sources, &[])
}

/// Compiles any sources. `options` go to the compiler, in front of them.
pub fn compile_to(into: PathBuf, sources: &[PathBuf], options: &[&str]) -> PathBuf {
    let library = library_dir();
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]).args(options);
    cc.arg("-I").arg(top().join("sdk/capi/include")).args(sources).arg("-o").arg(&into);
    cc.arg("-L").arg(&library).arg("-luhmm").arg(format!("-Wl,-rpath,{}", library.display()));
    run(&mut cc);
    into
}
