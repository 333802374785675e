//! What can be wrong with a manifest: each error names what was wrong and what to do.

/// See the module head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not TOML, an unknown key, or a value of the wrong type. The text names line and key.
    #[error("Manifest is not valid: {0}")]
    Syntax(String),
    /// Names are used in socket paths and logs.
    #[error("Name {name:?} is not allowed: use 1 to 32 of a-z, 0-9 and -, and neither supervisor nor holder")]
    Name {
        /// What was given.
        name: String,
    },
    /// Two of one name.
    #[error("{what} {name:?} is defined twice: rename one of them")]
    Duplicate {
        /// `Service` or `Device`.
        what: &'static str,
        /// Name.
        name: String,
    },
    /// A reference to nothing.
    #[error("{from} refers to service {to:?}, which is not defined: add a [[service]] of that name")]
    Dangling {
        /// Who refers.
        from: String,
        /// To what.
        to: String,
    },
    /// `needs` in a circle.
    #[error("Services need each other in a circle: {}: remove one of these needs", path.join(" -> "))]
    Cycle {
        /// The circle, first name repeated at the end.
        path: Vec<String>,
    },
    /// There must be exactly one pager and one mirror.
    #[error("There must be exactly one service of kind {kind}, found {count}")]
    Count {
        /// `pager` or `mirror`.
        kind: &'static str,
        /// Found.
        count: usize,
    },
    /// A driver without program, with two, or with an unknown built-in.
    #[error("Service {service:?}: {problem}")]
    Program {
        /// Service.
        service: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A program that is not there.
    #[error("Service {service:?}: program {path} cannot be executed: {problem}")]
    MissingBinary {
        /// Service.
        service: String,
        /// Path.
        path: String,
        /// What the system said.
        problem: String,
    },
    /// A user or group that this system does not have.
    #[error("{from}: {what} {name:?} is not in {file}: create it, or give another name or a number")]
    Account {
        /// Service or rule.
        from: String,
        /// `user` or `group`.
        what: &'static str,
        /// As given.
        name: String,
        /// Where it was looked for.
        file: String,
    },
    /// A rule about clients that cannot hold.
    #[error("[[client]] {rule:?}: {problem}")]
    Client {
        /// Its name.
        rule: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A sandbox that cannot be made.
    #[error("Service {service:?}, sandbox: {problem}")]
    Sandbox {
        /// Service.
        service: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A device with impossible values.
    #[error("Device {device:?}: {problem}")]
    Device {
        /// Device.
        device: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A number that makes no sense.
    #[error("{key} = {value} is out of range: {allowed}")]
    Range {
        /// Key.
        key: String,
        /// Value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Calls go one way: driver -> mirror -> pager -> supervisor.
    #[error("Channel {from:?} -> {to:?} goes uphill: calls go driver -> mirror -> pager only")]
    Channel {
        /// Caller.
        from: String,
        /// Callee.
        to: String,
    },
}
