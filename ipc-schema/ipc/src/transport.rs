//! One connected socket with its bounded write queue.
//!
//! The kernel keeps message borders, so there is no framing: one `send` is one message with its descriptors. What the kernel
//! does not take at once waits here, in order, up to [`MAX_QUEUE_BYTES`]; then the peer is too slow and loses the connection.
//! The socket is registered for reading only while nothing waits: a writable registration would wake the loop every time the
//! peer takes a message.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use capnp::Word;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use uhmm_kernel_hook::error::chain;
use uhmm_kernel_hook::process::{PeerCred, peer_cred};
use uhmm_kernel_hook::{HookError, PidFd, RecvStatus, SendStatus, SeqPacket};

use crate::codec::DecodeError;
use crate::message::Fd;
use crate::wake::PeerProcess;

/// Bytes that may wait for a slow reader.
pub(crate) const MAX_QUEUE_BYTES: usize = 4 << 20;

/// What became of a message to be sent.
#[derive(Debug)]
pub(crate) enum Sent {
    /// The kernel has it, or it waits in the queue.
    Taken,
    /// The peer has gone; the connection is of no use.
    Gone(String),
}

/// What came.
#[derive(Debug)]
pub(crate) enum Received {
    /// A whole message; its bytes and descriptors are in the [`Inbox`].
    Message,
    /// Nothing now.
    Nothing,
    /// The peer closed, or the socket failed.
    Closed(String),
    /// A message that was cut off; its descriptors are closed already.
    Bad(DecodeError),
}

/// The one buffer into which messages are received, aligned as Cap'n Proto wants it.
pub(crate) struct Inbox {
    words: Vec<Word>,
    len_bytes: usize,
    fds: Vec<OwnedFd>,
}

impl Inbox {
    pub(crate) fn new(max_message_bytes: usize) -> Self {
        Self { words: Word::allocate_zeroed_vec(max_message_bytes.div_ceil(8)), len_bytes: 0, fds: Vec::new() }
    }

    /// The bytes of the last message.
    pub(crate) fn bytes(&self) -> &[u8] {
        &Word::words_to_bytes(&self.words)[..self.len_bytes]
    }

    /// Its descriptors, given away.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

struct Waiting {
    bytes: Box<[u8]>,
    fds: Vec<Fd>,
}

/// See the module.
pub(crate) struct Channel {
    socket: SeqPacket,
    token: Token,
    queue: VecDeque<Waiting>,
    queue_bytes: usize,
    /// Negotiated; our own limits before the handshake is done.
    pub(crate) max_message_bytes: usize,
    pub(crate) max_fds: usize,
}

impl Channel {
    /// Takes a socket into the event loop.
    pub(crate) fn new(
        socket: SeqPacket,
        registry: &Registry,
        token: Token,
        max_message_bytes: usize,
        max_fds: usize,
    ) -> std::io::Result<Self> {
        registry.register(&mut SourceFd(&socket.as_fd().as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self { socket, token, queue: VecDeque::new(), queue_bytes: 0, max_message_bytes, max_fds })
    }

    /// Takes it out again and closes it.
    pub(crate) fn close(self, registry: &Registry) {
        if let Err(error) = registry.deregister(&mut SourceFd(&self.socket.as_fd().as_raw_fd())) {
            tracing::warn!(%error, "A socket could not be taken out of the event loop");
        }
    }

    /// Who was at the other end when it connected; the pid is 0 when it cannot be seen from here.
    pub(crate) fn peer(&self) -> Result<PeerCred, String> {
        peer_cred(self.socket.as_fd()).map_err(|error| format!("its credentials cannot be read: {}", chain(&error)))
    }

    /// The process that connected.
    pub(crate) fn peer_process(&self) -> Result<PeerProcess, HookError> {
        let pidfd = PidFd::of_peer(self.socket.as_fd())?;
        let name = pidfd.name()?;
        Ok(PeerProcess { pidfd: Arc::new(pidfd), name })
    }

    /// Sends or queues one message.
    pub(crate) fn send(&mut self, registry: &Registry, bytes: &[u8], fds: &[Fd]) -> Sent {
        if self.queue.is_empty() {
            match send_now(&self.socket, bytes, fds) {
                Ok(SendStatus::Sent) => return Sent::Taken,
                Ok(SendStatus::PeerGone) => return Sent::Gone("the peer is gone".to_owned()),
                Err(error) => return Sent::Gone(chain(&error)),
                Ok(SendStatus::WouldBlock) => {}
            }
            if let Err(error) = self.register(registry, Interest::READABLE | Interest::WRITABLE) {
                return Sent::Gone(chain(&error));
            }
        }
        self.queue_bytes += bytes.len();
        if self.queue_bytes > MAX_QUEUE_BYTES {
            return Sent::Gone(format!("the peer does not read: {} bytes wait for it", self.queue_bytes));
        }
        self.queue.push_back(Waiting { bytes: bytes.into(), fds: fds.to_vec() });
        Sent::Taken
    }

    /// Sends what waits, as far as the kernel takes it.
    pub(crate) fn flush(&mut self, registry: &Registry) -> Sent {
        if self.queue.is_empty() {
            return Sent::Taken;
        }
        while let Some(first) = self.queue.front() {
            match send_now(&self.socket, &first.bytes, &first.fds) {
                Ok(SendStatus::Sent) => {
                    self.queue_bytes -= first.bytes.len();
                    self.queue.pop_front();
                }
                Ok(SendStatus::WouldBlock) => return Sent::Taken,
                Ok(SendStatus::PeerGone) => return Sent::Gone("the peer is gone".to_owned()),
                Err(error) => return Sent::Gone(chain(&error)),
            }
        }
        match self.register(registry, Interest::READABLE) {
            Ok(()) => Sent::Taken,
            Err(error) => Sent::Gone(chain(&error)),
        }
    }

    /// Takes one message out of the socket.
    pub(crate) fn receive(&mut self, inbox: &mut Inbox) -> Received {
        inbox.fds.clear();
        inbox.len_bytes = 0;
        let buffer = &mut Word::words_to_bytes_mut(&mut inbox.words)[..self.max_message_bytes];
        match self.socket.recv(buffer, &mut inbox.fds, self.max_fds) {
            Ok(RecvStatus::Message { len, truncated, fds_truncated }) => {
                let why = match (truncated, fds_truncated) {
                    (true, _) => DecodeError::Truncated,
                    (false, true) => DecodeError::FdsTruncated,
                    (false, false) => {
                        inbox.len_bytes = len;
                        return Received::Message;
                    }
                };
                inbox.fds.clear();
                Received::Bad(why)
            }
            Ok(RecvStatus::WouldBlock) => Received::Nothing,
            Ok(RecvStatus::Closed) => Received::Closed("the peer closed the connection".to_owned()),
            Err(error) => Received::Closed(chain(&error)),
        }
    }

    fn register(&self, registry: &Registry, interest: Interest) -> std::io::Result<()> {
        registry.reregister(&mut SourceFd(&self.socket.as_fd().as_raw_fd()), self.token, interest)
    }
}

fn send_now(socket: &SeqPacket, bytes: &[u8], fds: &[Fd]) -> Result<SendStatus, HookError> {
    if fds.is_empty() {
        return socket.send(bytes, &[]);
    }
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
    socket.send(bytes, &fds)
}
