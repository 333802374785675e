//! How a process that the supervisor has not started becomes a service: from a container, a unit of systemd, or by hand.
//!
//! ```text
//!   guard --fork--> this process --hello "join:NAME", token--> supervisor.sock
//!                                --Join{guard}------------------>  waits while another process is that service
//!                                <-------Joined{incarnation, key}--  then everything goes as for one that was started
//! ```
//! All that it is given of the system is a folder with the sockets that it may use, and the token. Errors that an operator must mend end the
//! process with their text; a supervisor that is not there (yet) is waited for.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use uhmm_ipc::message::supervisor::{self, KEY_OF_USER, join_name};
use uhmm_ipc::message::{Call, Fd, Interface, Reply, Role, TraceId};
use uhmm_ipc::{Endpoint, Identity, Limits, Reactor, Wake};
use uhmm_kernel_hook::guard;

use crate::{KitError, ServiceArgs};

/// Tokens are text of so many bytes.
pub const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 16..=64;

/// What a process that was let in begins with.
#[derive(Debug)]
pub struct Joined {
    /// Times the service was started.
    pub incarnation: u32,
    /// Key of the channel to the supervisor.
    pub key: Vec<u8>,
    /// Of a holder: its listening socket.
    pub listener: Option<Fd>,
    /// Of a holder: keys by name, as TOML.
    pub keys_toml: String,
}

/// Reads a token: one line, blanks around it do not count.
///
/// # Errors
/// `Token`.
pub fn read_token(path: &Path) -> Result<Vec<u8>, KitError> {
    let wrong = |problem: String| KitError::Token { path: path.to_owned(), problem };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let token = text.trim();
    if !TOKEN_BYTES.contains(&token.len()) {
        let problem = format!("it has {} bytes, a token has 16 to 64 (`uhmm token > FILE` makes one)", token.len());
        return Err(wrong(problem));
    }
    Ok(token.as_bytes().to_vec())
}

/// Becomes a guarded child of itself and waits until the supervisor lets it in.
///
/// # Errors
/// `Folder`, `Token`, `NotLetIn`: an operator must do something.
pub fn join(args: &ServiceArgs, role: Role) -> Result<Joined, KitError> {
    check_folder(&args.run_dir)?;
    let key = args.token_file.as_deref().map_or_else(|| Ok(KEY_OF_USER.to_vec()), read_token)?;
    // Before there is any other thread, and before anything is opened that the guard would keep open.
    let far: Fd = Arc::new(guard::stand()?.into_fd());
    let mut reactor = Reactor::new(Identity {
        name: join_name(&args.name),
        role,
        incarnation: 0,
        interface: None,
        limits: Limits::default(),
    })?;
    let path = args.run_dir.join("supervisor.sock");
    if !path.exists() {
        tracing::info!(path = %path.display(), "Waiting for the supervisor");
    }
    let supervisor = reactor.link(Endpoint { path, interface: Interface::Supervisor, key });
    let ask = Call::Supervisor(supervisor::Call::Join { guard: Some(far) });
    let asked = reactor.call(supervisor, ask, TraceId::default(), None);
    let mut wakes = Vec::new();
    loop {
        reactor.poll(None, &mut wakes)?;
        for wake in wakes.drain(..) {
            let Wake::Done { call, result, .. } = wake else { continue };
            if call != asked {
                continue;
            }
            return match result {
                Ok(Reply::Supervisor(supervisor::Reply::Joined { incarnation, key, listener, keys_toml })) => {
                    tracing::info!(incarnation, "Let in");
                    Ok(Joined { incarnation, key, listener, keys_toml })
                }
                Ok(_) => Err(KitError::StrangeReply { question: "Join" }),
                Err(error) => Err(KitError::NotLetIn { error }),
            };
        }
    }
}

/// Whoever could put a socket there would be shown the token.
fn check_folder(path: &Path) -> Result<(), KitError> {
    let wrong = |problem: String| KitError::Folder { path: path.to_owned(), problem };
    let meta = std::fs::metadata(path).map_err(|error| wrong(format!("{error}: mount it there")))?;
    if !meta.is_dir() {
        return Err(wrong("it is no folder".to_owned()));
    }
    if meta.mode() & 0o022 != 0 {
        let problem = format!(
            "its mode is {:o}, so others than its owner may put sockets there: chmod go-w",
            meta.mode() & 0o7777
        );
        return Err(wrong(problem));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_token_is_one_line_of_text_and_anything_else_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("token");
        assert!(read_token(&path).expect_err("none").to_string().contains(path.to_str().expect("text")));
        for (text, right) in [("0123456789abcdef\n", true), ("short", false), (&"x".repeat(65), false), ("", false)] {
            std::fs::write(&path, text).expect("written");
            let token = read_token(&path);
            assert_eq!(token.is_ok(), right, "{text:?}: {token:?}");
        }
        std::fs::write(&path, "  0123456789abcdef  \n").expect("written");
        assert_eq!(read_token(&path).expect("a token"), b"0123456789abcdef");
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let mode = |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).expect("chmod");
        for (bits, right) in [(0o755, true), (0o700, true), (0o775, false), (0o757, false), (0o1777, false)] {
            mode(bits);
            assert_eq!(check_folder(dir.path()).is_ok(), right, "{bits:o}");
        }
        mode(0o700);
        let missing = check_folder(&dir.path().join("none")).expect_err("missing").to_string();
        assert!(missing.contains("mount it there"), "{missing}");
    }
}
