//! Descriptors of a message: numbered in the order in which the fields are written and read.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use uhmm_schema::common_capnp::NO_FD;

use super::error::DecodeError;
use crate::message::Fd;

/// Collects the descriptors of a message being written.
#[derive(Default)]
pub(super) struct FdSink {
    pub(super) fds: Vec<Fd>,
}

impl FdSink {
    /// Adds a descriptor, returns its index for the field. Counts beyond the limit are refused after the body is written.
    pub(super) fn put(&mut self, fd: &Fd) -> u16 {
        let index = self.fds.len();
        self.fds.push(fd.clone());
        index as u16
    }

    /// The same for an optional field.
    pub(super) fn put_optional(&mut self, fd: Option<&Fd>) -> u16 {
        fd.map_or(NO_FD, |fd| self.put(fd))
    }
}

/// Hands out the descriptors of a message being read.
pub(super) struct FdSource {
    fds: VecDeque<OwnedFd>,
    came: usize,
}

impl FdSource {
    pub(super) fn new(fds: Vec<OwnedFd>) -> Self {
        Self { came: fds.len(), fds: fds.into() }
    }

    pub(super) fn came(&self) -> usize {
        self.came
    }

    /// The descriptor of a field. It must be the next one, so none is named twice and none is skipped.
    pub(super) fn take(&mut self, field: &'static str, index: u16) -> Result<Fd, DecodeError> {
        let next = self.came - self.fds.len();
        if usize::from(index) == next
            && let Some(fd) = self.fds.pop_front()
        {
            return Ok(Arc::new(fd));
        }
        Err(DecodeError::FdIndex { field, index, next, came: self.came })
    }

    /// The same for an optional field.
    pub(super) fn take_optional(&mut self, field: &'static str, index: u16) -> Result<Option<Fd>, DecodeError> {
        if index == NO_FD { Ok(None) } else { self.take(field, index).map(Some) }
    }

    /// Every descriptor must have been named.
    pub(super) fn finish(self) -> Result<(), DecodeError> {
        match self.fds.len() {
            0 => Ok(()),
            surplus => Err(DecodeError::SurplusFds { surplus }),
        }
    }
}
