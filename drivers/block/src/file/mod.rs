//! The backend `file`: a file on a local disk, or a partition, without the kernel's page cache.
//!
//! [`open`]: who may have it and how much room it has. Here: requests as transfers of the kernel hook's disk.
//!
//! A successor must find a medium on which nothing of its killed predecessor lands any more. Threads are not reaped before their calls have
//! ended. Requests of io_uring may outlive their process, so it is used where a successor can wait for them ([`open`]): on ext4 and xfs.

pub mod open;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use uhmm_driver_kit::PAGE_BYTES;
use uhmm_kernel_hook::disk::{Disk, DiskMode, Finished, Transfer};
use uhmm_kernel_hook::{HookError, Window};

use crate::backend::{Answer, Backend, BlockRequest, Buffers, Clock};
use crate::header::HEADER_BYTES;
use crate::machine::Fault;

/// See the module head.
#[derive(Debug)]
pub struct FileBackend {
    disk: Disk,
    file: Arc<OwnedFd>,
    buffers: Buffers,
    /// A file of this many bytes when nobody has shrunk it; a partition cannot be.
    len_bytes: Option<u64>,
    refused: Vec<(u64, Answer)>,
    clock: Clock,
}

impl FileBackend {
    /// Up to `depth` requests at once, to and from `buffers`.
    ///
    /// # Errors
    /// Neither io_uring nor threads.
    pub fn new(medium: &open::Medium, depth: u32, buffers: Buffers, mode: DiskMode) -> Result<Self, HookError> {
        let mode = if medium.settles { mode } else { DiskMode::Threads };
        let disk = Disk::open(medium.file.clone(), depth, std::slice::from_ref(&buffers.window), mode)?;
        let len_bytes = medium.regular.then_some(HEADER_BYTES + u64::from(medium.blocks) * PAGE_BYTES);
        let (file, refused, clock) = (medium.file.clone(), Vec::new(), Clock::default());
        Ok(Self { disk, file, buffers, len_bytes, refused, clock })
    }

    /// How requests are made, for logs.
    pub fn describe(&self) -> &'static str {
        self.disk.describe()
    }

    /// A write behind the end of a file that somebody has shrunk would make it long again, with zeroes where pages were.
    fn shrunk(&self) -> Option<Fault> {
        let expected = self.len_bytes?;
        match rustix::fs::fstat(&self.file) {
            Ok(stat) if stat.st_size as u64 >= expected => None,
            Ok(stat) => Some(Fault::Refused(format!(
                "somebody has shrunk the file to {} bytes: bring what is left home and start uhmm anew",
                stat.st_size
            ))),
            Err(error) => Some(Fault::Refused(format!("the file's size is unknown: {error}"))),
        }
    }
}

impl Backend for FileBackend {
    fn submit(&mut self, request: BlockRequest) {
        let BlockRequest { id, write, blocks, slot, .. } = request;
        if let Some(fault) = write.then(|| self.shrunk()).flatten() {
            return self.refused.push((id, Answer::Failed(fault)));
        }
        let transfer = Transfer {
            token: id,
            write,
            offset: HEADER_BYTES + u64::from(blocks.first) * PAGE_BYTES,
            window: self.buffers.window.clone(),
            at: self.buffers.at(slot, 0),
            len: blocks.count * PAGE_BYTES as u32,
        };
        if let Err(error) = self.disk.submit(transfer) {
            self.refused.push((id, Answer::Failed(error.into())));
        }
    }

    fn wait(&mut self, patience: Duration, answers: &mut Vec<(u64, Answer)>) {
        if !self.refused.is_empty() {
            return answers.append(&mut self.refused);
        }
        let mut done = Vec::new();
        if let Err(error) = self.disk.wait(patience, &mut done) {
            tracing::error!(%error, "Waiting for the disk failed");
        }
        answers.extend(done.into_iter().map(|Finished { token, outcome }| {
            let answer = outcome.map_or_else(|error| Answer::Failed(explain(&error)), |()| Answer::Done);
            (token, answer)
        }));
    }

    fn now_us(&self) -> u64 {
        self.clock.now_us()
    }
}

fn explain(error: &io::Error) -> Fault {
    Fault::Refused(match error.kind() {
        io::ErrorKind::UnexpectedEof => "the file ends before this page: somebody has shrunk it".to_owned(),
        io::ErrorKind::StorageFull => {
            format!("the disk is full ({error}), though its space was reserved: the file system copies what is written")
        }
        _ => format!("the disk failed: {error}"),
    })
}

/// One transfer of the header's bytes from start to end.
fn transfer(medium: &Arc<OwnedFd>, write: bool, window: &Arc<Window>, len: u32) -> Result<(), io::Error> {
    let mut disk = Disk::open(medium.clone(), 1, &[], DiskMode::Threads).map_err(io::Error::other)?;
    let transfer = Transfer { token: 0, write, offset: 0, window: window.clone(), at: 0, len };
    disk.submit(transfer).map_err(io::Error::other)?;
    let mut done = Vec::new();
    while done.is_empty() {
        disk.wait(Duration::from_secs(60), &mut done).map_err(io::Error::other)?;
    }
    done.remove(0).outcome
}
