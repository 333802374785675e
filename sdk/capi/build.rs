//! Names the shared object, so that programs linked by path find it by name too.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libuhmm.so");
}
