//! Where the sockets are.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use uhmm_ipc::message::Interface;

use crate::Error;

/// The run directory: `explicit`, else `$UHMM_RUN_DIR`, else `$XDG_RUNTIME_DIR/uhmm`, else `/tmp/uhmm-UID`. Nothing is created.
pub fn run_dir(explicit: Option<&Path>) -> PathBuf {
    choose(explicit, std::env::var_os("UHMM_RUN_DIR"), std::env::var_os("XDG_RUNTIME_DIR"))
}

fn choose(explicit: Option<&Path>, own: Option<std::ffi::OsString>, runtime: Option<std::ffi::OsString>) -> PathBuf {
    let set = |value: Option<std::ffi::OsString>| value.filter(|text| !text.is_empty()).map(PathBuf::from);
    match (explicit, set(own), set(runtime)) {
        (Some(path), _, _) => path.to_owned(),
        (None, Some(path), _) => path,
        (None, None, Some(path)) => path.join("uhmm"),
        (None, None, None) => PathBuf::from(format!("/tmp/uhmm-{}", rustix::process::getuid().as_raw())),
    }
}

/// Token of the claim that this program was given with its container, as `UHMM_CLAIM` has it; empty: none.
///
/// # Errors
/// [`Error::BadClaim`]
pub(crate) fn claim() -> Result<Vec<u8>, Error> {
    std::env::var_os("UHMM_CLAIM").map_or(Ok(Vec::new()), |text| claim_of(&text.to_string_lossy()))
}

fn claim_of(text: &str) -> Result<Vec<u8>, Error> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Error::BadClaim);
    }
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| Error::BadClaim);
    (0..64).step_by(2).map(byte).collect()
}

/// Socket and interface of a service, by its name in the plan.
pub(crate) fn service(run_dir: &Path, name: &str) -> (PathBuf, Interface) {
    match name {
        "supervisor" => (run_dir.join("supervisor.sock"), Interface::Supervisor),
        "holder" => (run_dir.join("holder.sock"), Interface::Supervisor),
        "pager" => (run_dir.join("pager.sock"), Interface::Pager),
        "mirror" => (run_dir.join("mirror.sock"), Interface::Mirror),
        driver => (run_dir.join(format!("driver-{driver}.sock")), Interface::Driver),
    }
}

/// Whether a service has its socket there.
///
/// # Errors
/// [`Error::Forbidden`] where this account cannot even look.
pub(crate) fn has_service(run_dir: &Path, name: &str) -> Result<bool, Error> {
    match service(run_dir, name).0.try_exists() {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(Error::Forbidden { run_dir: run_dir.to_owned() })
        }
        found => Ok(found.unwrap_or(false)),
    }
}

/// Device names are parts of socket names: nothing that could leave the run directory.
pub(crate) fn valid_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_64_digits_or_none() {
        assert_eq!(claim_of(&"0aF".repeat(22)[..64]).expect("a claim")[..3], [0x0a, 0xf0, 0xaf]);
        assert_eq!(claim_of("").expect("none"), [0u8; 0]);
        for wrong in ["0", &"g".repeat(64), &"a".repeat(66), &"\u{e4}".repeat(32)] {
            assert!(matches!(claim_of(wrong), Err(Error::BadClaim)), "{wrong}");
        }
    }

    #[test]
    fn the_nearest_setting_wins() {
        let (own, runtime) = (Some("/own".into()), Some("/run/user/5".into()));
        assert_eq!(choose(Some(Path::new("/x")), own.clone(), runtime.clone()), Path::new("/x"));
        assert_eq!(choose(None, own, runtime.clone()), Path::new("/own"));
        assert_eq!(choose(None, Some("".into()), runtime), Path::new("/run/user/5/uhmm"));
        assert!(choose(None, None, None).to_string_lossy().starts_with("/tmp/uhmm-"));
    }

    #[test]
    fn names_cannot_leave_the_run_directory() {
        assert!(valid_name("soft0") && valid_name("nvme-0.1"));
        for name in ["", "..", "../pager", "a/b", ".hidden", "ü"] {
            assert!(!valid_name(name), "{name}");
        }
        assert!(!valid_name(&"x".repeat(65)));
    }

    #[test]
    fn every_service_has_its_socket() {
        let dir = Path::new("/r");
        assert_eq!(service(dir, "mirror"), (PathBuf::from("/r/mirror.sock"), Interface::Mirror));
        assert_eq!(service(dir, "soft0"), (PathBuf::from("/r/driver-soft0.sock"), Interface::Driver));
    }
}
