//! Turns the committed CodeGeneratorRequest into Rust bindings. The C++ `capnp` program is not needed for a build; after a
//! change of a `*.capnp` file run `./regenerate` (the test `schema_request_is_current` insists on it).

use std::error::Error;
use std::fs::File;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=request.bin");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    capnpc::codegen::CodeGenerationCommand::new()
        .output_directory(out)
        .default_parent_module(vec!["generated".into()])
        .run(File::open("request.bin")?)?;
    Ok(())
}
