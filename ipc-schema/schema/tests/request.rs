//! The committed CodeGeneratorRequest belongs to the committed schemas.

use std::fs;
use std::path::Path;
use std::process::Command;

const FILES: [&str; 6] =
    ["common.capnp", "sdk.capnp", "supervisor.capnp", "pager.capnp", "mirror.capnp", "driver.capnp"];

/// Bindings made from a request, file by file, without the line that names the version of the `capnp` program.
fn bindings(request: &[u8]) -> Vec<String> {
    let out = tempfile::tempdir().expect("temporary directory");
    capnpc::codegen::CodeGenerationCommand::new()
        .output_directory(out.path())
        .run(request)
        .expect("a readable CodeGeneratorRequest");
    FILES
        .iter()
        .map(|file| {
            let text = fs::read_to_string(out.path().join(file.replace(".capnp", "_capnp.rs"))).expect("bindings");
            text.lines().filter(|line| !line.starts_with("// capnp binary version")).collect::<Vec<_>>().join("\n")
        })
        .collect()
}

#[test]
fn schema_request_is_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiled = Command::new("capnp").current_dir(folder).args(["compile", "-o-"]).args(FILES).output();
    let fresh = match compiled {
        Ok(output) => {
            assert!(output.status.success(), "capnp refused a schema: {}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        }
        Err(error) if std::env::var("CI").as_deref() == Ok("true") => {
            panic!("The `capnp` program cannot run ({error}), and CI must compare: apt-get install capnproto")
        }
        Err(error) => {
            println!("Not compared, `capnp` cannot run ({error}): apt-get install capnproto");
            return;
        }
    };
    let committed = fs::read(folder.join("request.bin")).expect("request.bin");
    for (file, (committed, fresh)) in FILES.iter().zip(bindings(&committed).iter().zip(bindings(&fresh))) {
        assert!(*committed == fresh, "request.bin does not belong to {file}: run ipc-schema/schema/regenerate");
    }
}
