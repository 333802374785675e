//! Two things about the shared library: the agent runs in its code for as long as the program's memory lives, also after a dlclose; and its
//! name for programs is `libuhmm.so.0`, so that one with another interface can lie beside it.

use std::path::{Path, PathBuf};

/// The first number of what the header promises; packages install the file under this name.
const SONAME: &str = "libuhmm.so.0";

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
    println!("cargo::rerun-if-changed=build.rs");
    // So that what was linked here also runs here: cargo writes `libuhmm.so` alone.
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo says where"));
    let profile = out.ancestors().nth(3).expect("OUT_DIR is PROFILE/build/NAME/out");
    for dir in [profile.to_owned(), profile.join("deps")] {
        link(&dir.join(SONAME));
    }
}

fn link(at: &Path) {
    if at.symlink_metadata().is_err()
        && let Err(error) = std::os::unix::fs::symlink("libuhmm.so", at)
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        println!(
            "cargo::warning={} cannot be made ({error}): programs linked here will not find the library",
            at.display()
        );
    }
}
