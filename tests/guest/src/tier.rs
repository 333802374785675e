//! What the suite `nvme` agrees on with `guest-tier`, a driver of an NVMe controller that is there to be killed.
//!
//! ```text
//!   suite (vault)                                          guest-tier (driver)
//!     | -- names and descriptors of the last incarnation -->  opens or adopts, compares the last round's pattern, writes this round's
//!     | <-------------- "adopted" or "created", its own ----  writes other frames for ever
//!     |  kill -9
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{RecvStatus, SendStatus, SeqPacket, Window};

/// Frames with the pattern.
pub const PATTERN_FRAMES: u32 = 512;
/// The first of them.
pub const PATTERN_AT: u32 = 2000;
/// The last word of a page.
const LAST_WORD: u64 = 4096 - 8;

/// Different in every page and round.
///
/// # Errors
/// The window is too short.
pub fn fill(window: &Window, pages: u64, round: u64) -> Result<()> {
    for page in 0..pages {
        for at in [page * 4096, page * 4096 + LAST_WORD] {
            window.store_u64(at, round << 32 | at | 1)?;
        }
    }
    Ok(())
}

/// Is it there?
///
/// # Errors
/// Where it is not.
pub fn check(window: &Window, pages: u64, round: u64) -> Result<()> {
    for page in 0..pages {
        for at in [page * 4096, page * 4096 + LAST_WORD] {
            let found = window.load_u64(at)?;
            ensure!(found == (round << 32 | at | 1), "Round {round}, byte {at:#x}: found {found:#x}");
        }
    }
    Ok(())
}

/// A word, and descriptors with their vault names.
///
/// # Errors
/// Nobody listens.
pub fn send(socket: &SeqPacket, word: &str, kept: &[(String, Fd)]) -> Result<()> {
    let names = kept.iter().map(|(name, _)| name.as_str());
    let text = std::iter::once(word).chain(names).collect::<Vec<_>>().join("\n");
    let fds: Vec<_> = kept.iter().map(|(_, fd)| fd.as_fd()).collect();
    match socket.send(text.as_bytes(), &fds)? {
        SendStatus::Sent => Ok(()),
        other => bail!("Not sent: {other:?}"),
    }
}

/// What [`send`] sent; waits for it.
///
/// # Errors
/// It does not come in 30 seconds.
pub fn receive(socket: &SeqPacket) -> Result<(String, Vec<(String, Fd)>)> {
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    ensure!(poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit))? == 1, "Nothing came");
    let mut bytes = [0; 1024];
    let mut fds: Vec<OwnedFd> = Vec::new();
    let RecvStatus::Message { len, .. } = socket.recv(&mut bytes, &mut fds, 8)? else { bail!("The other one ended") };
    let text = std::str::from_utf8(&bytes[..len])?;
    let mut lines = text.lines().map(str::to_owned);
    let word = lines.next().context("A word")?;
    Ok((word, lines.zip(fds.into_iter().map(Arc::new)).collect()))
}

/// Starts `program` (this driver) on a device in this round, and kills it while it transfers: what the vault has then, and whether it had
/// adopted the controller.
///
/// # Errors
/// It does not start, or fails before it transfers.
pub fn killed(program: &str, path: &str, round: u64, kept: &[(String, Fd)]) -> Result<(Vec<(String, Fd)>, bool)> {
    let (socket, theirs) = SeqPacket::pair()?;
    let mut child = Command::new(program)
        .args([path, &round.to_string()])
        .stdin(Stdio::from(theirs.into_fd()))
        .spawn()
        .with_context(|| format!("Start {program}"))?;
    send(&socket, "open", kept)?;
    let (word, kept) = receive(&socket)?;
    // The kill is to come anywhere in its transfers; there is no event to wait for.
    std::thread::sleep(Duration::from_micros(round * 7919 % 20_000));
    child.kill()?;
    child.wait()?;
    Ok((kept, word == "adopted"))
}
