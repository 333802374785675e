//! What can be wrong with a message.

/// A message of ours that cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EncodeError {
    #[error("The message has {len_bytes} bytes, the peer takes {max_bytes}: split the request")]
    TooLarge { len_bytes: usize, max_bytes: usize },
    #[error("The message carries {fd_count} descriptors, the peer takes {max_fds}: split the request")]
    TooManyFds { fd_count: usize, max_fds: usize },
    #[error("The field {field} has {len} elements or bytes, the protocol allows {max}: shorten it")]
    TooLong { field: &'static str, len: usize, max: usize },
    #[error("The field {field} cannot have the value {value}: correct it")]
    Value { field: &'static str, value: u64 },
    #[error("The message cannot be built")]
    Capnp(#[from] capnp::Error),
}

/// A message of a peer that cannot be believed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("The bytes are no message of this protocol")]
    Capnp(#[from] capnp::Error),
    #[error("The message holds a member of number {0} that this version does not know")]
    Unknown(#[from] capnp::NotInSchema),
    #[error("{len_bytes} bytes follow the end of the message")]
    Trailing { len_bytes: usize },
    #[error("The message was cut off: it is larger than the agreed limit")]
    Truncated,
    #[error("More descriptors came than agreed")]
    FdsTruncated,
    #[error("{came} descriptors came with a message that announces {announced}")]
    FdCount { came: usize, announced: usize },
    #[error("The field {field} names descriptor {index} where descriptor {next} is due ({came} came)")]
    FdIndex { field: &'static str, index: u16, next: usize, came: usize },
    #[error("{surplus} descriptors came that no field names")]
    SurplusFds { surplus: usize },
    #[error("The field {field} has {len} elements or bytes, the protocol allows {max}")]
    TooLong { field: &'static str, len: usize, max: usize },
    #[error("The field {field} is not UTF-8")]
    Text { field: &'static str },
    #[error("The field {field} is missing")]
    Missing { field: &'static str },
    #[error("The field {field} has the impossible value {value}")]
    Value { field: &'static str, value: u64 },
    #[error("A {kind} of the interface {interface} does not exist")]
    NoSuchBody { kind: &'static str, interface: &'static str },
}

impl DecodeError {
    /// The whole chain in one line, for the log and for the peer.
    pub(crate) fn text(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

impl EncodeError {
    /// The whole chain in one line.
    pub(crate) fn text(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}
