//! One thread, no privilege, files in a temporary folder of their own.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::memfd;

/// A fresh folder, removed with its content.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-hook-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open_fd_count() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn messages_keep_their_bounds_and_bring_descriptors() {
    let (one, other) = SeqPacket::pair().unwrap();
    let file = memfd::create_sealed("uhmm-sent", 4096).unwrap();
    assert_eq!(one.send(b"first", &[file.as_fd()]).unwrap(), SendStatus::Sent);
    assert_eq!(one.send(b"second message", &[]).unwrap(), SendStatus::Sent);
    let (mut buf, mut fds) = ([0u8; 64], Vec::new());
    let first = other.recv(&mut buf, &mut fds, 4).unwrap();
    assert_eq!(first, RecvStatus::Message { len: 5, truncated: false, fds_truncated: false });
    assert_eq!(&buf[..5], b"first");
    assert_eq!(memfd::identity(fds[0].as_fd()).unwrap(), memfd::identity(file.as_fd()).unwrap());
    assert!(rustix::io::fcntl_getfd(&fds[0]).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    let second = other.recv(&mut buf, &mut fds, 4).unwrap();
    assert_eq!(second, RecvStatus::Message { len: 14, truncated: false, fds_truncated: false });
    assert_eq!(fds.len(), 1);
    assert_eq!(other.recv(&mut buf, &mut fds, 4).unwrap(), RecvStatus::WouldBlock);
}

#[test]
fn a_message_that_is_too_long_is_reported_as_cut() {
    let (one, other) = SeqPacket::pair().unwrap();
    assert_eq!(one.send(&[7; 100], &[]).unwrap(), SendStatus::Sent);
    let mut buf = [0u8; 10];
    let got = other.recv(&mut buf, &mut Vec::new(), 0).unwrap();
    assert_eq!(got, RecvStatus::Message { len: 10, truncated: true, fds_truncated: false });
}

#[test]
fn surplus_descriptors_are_closed_and_reported() {
    let (one, other) = SeqPacket::pair().unwrap();
    let file = memfd::create_sealed("uhmm-sent", 4096).unwrap();
    for (sent, wanted) in [(5, 2), (4, 3), (1, 0), (2, 1), (MAX_FDS, 1)] {
        assert_eq!(one.send(b"x", &vec![file.as_fd(); sent]).unwrap(), SendStatus::Sent);
        let before = open_fd_count();
        let mut fds = Vec::new();
        let got = other.recv(&mut [0; 8], &mut fds, wanted).unwrap();
        assert_eq!(got, RecvStatus::Message { len: 1, truncated: false, fds_truncated: true }, "{sent} for {wanted}");
        assert_eq!(fds.len(), wanted);
        assert_eq!(open_fd_count(), before + wanted, "{sent} for {wanted}: a descriptor leaked");
    }
    assert_eq!(one.send(b"x", &vec![file.as_fd(); MAX_FDS]).unwrap(), SendStatus::Sent);
    let mut fds = Vec::new();
    let got = other.recv(&mut [0; 8], &mut fds, MAX_FDS).unwrap();
    assert_eq!(got, RecvStatus::Message { len: 1, truncated: false, fds_truncated: false });
    assert_eq!(fds.len(), MAX_FDS);
}

#[test]
fn bad_messages_are_refused_before_they_leave() {
    let (one, _other) = SeqPacket::pair().unwrap();
    assert!(matches!(one.send(b"", &[]), Err(HookError::BadMessage(_))));
    assert!(matches!(one.send(b"x", &vec![one.as_fd(); MAX_FDS + 1]), Err(HookError::BadMessage(_))));
}

#[test]
fn a_full_queue_and_a_closed_peer_are_told_apart() {
    let (one, other) = SeqPacket::pair().unwrap();
    let mut sent = 0;
    let end = loop {
        match one.send(&[0; 4096], &[]).unwrap() {
            SendStatus::Sent => sent += 1,
            end => break end,
        }
        assert!(sent < 100_000, "the queue never fills");
    };
    assert_eq!(end, SendStatus::WouldBlock);
    drop(other);
    assert_eq!(one.send(b"x", &[]).unwrap(), SendStatus::PeerGone);
    assert_eq!(one.recv(&mut [0; 8], &mut Vec::new(), 0).unwrap(), RecvStatus::Closed);
}

#[test]
fn listener_is_private_and_accepts_what_connected() {
    let folder = Folder::new("listen");
    let path = folder.0.join("service.sock");
    let listener = SeqListener::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(listener.accept().unwrap().is_none());
    let client = SeqPacket::connect(&path).unwrap();
    let server = listener.accept().unwrap().unwrap();
    assert_eq!(client.send(b"hello", &[]).unwrap(), SendStatus::Sent);
    let mut buf = [0; 16];
    let got = server.recv(&mut buf, &mut Vec::new(), 0).unwrap();
    assert_eq!(got, RecvStatus::Message { len: 5, truncated: false, fds_truncated: false });
    let cred = crate::process::peer_cred(server.as_fd()).unwrap();
    assert_eq!(cred.pid, std::process::id());
    assert_eq!(crate::PidFd::of_peer(server.as_fd()).unwrap().pid().unwrap(), Some(std::process::id()));
}

#[test]
fn a_live_listener_is_left_alone_and_a_stale_file_is_replaced() {
    let folder = Folder::new("stale");
    let path = folder.0.join("service.sock");
    let first = SeqListener::bind(&path).unwrap();
    let error = SeqListener::bind(&path).unwrap_err();
    assert!(matches!(&error, HookError::AddrInUse { path: named } if *named == path));
    assert!(error.to_string().contains("service.sock"), "{error}");
    let vault_copy = first.try_clone().unwrap();
    drop(first);
    assert!(SeqListener::bind(&path).is_err(), "the copy in the vault still listens");
    drop(vault_copy);
    assert_eq!(SeqPacket::connect(&path).unwrap_err().errno(), Some(libc::ECONNREFUSED));
    let second = SeqListener::bind(&path).unwrap();
    let _client = SeqPacket::connect(&path).unwrap();
    assert!(second.accept().unwrap().is_some());
}

#[test]
fn bind_never_removes_a_plain_file() {
    let folder = Folder::new("plain");
    let path = folder.0.join("service.sock");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(SeqListener::bind(&path), Err(HookError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let long = folder.0.join("x".repeat(120));
    assert_eq!(SeqListener::bind(&long).unwrap_err().errno(), Some(libc::ENAMETOOLONG));
}
