//! The agent runs in this library's code for as long as the program's memory lives, also after a dlclose.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
