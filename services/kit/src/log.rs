//! Logs: text for people, JSON for machines; every line says which service and incarnation.
//!
//! Nothing that a service does depends on its log. A full disk, a reader that is gone and one that has stopped reading cost lines and
//! nothing else: no write of the log fails or waits.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::net::SendFlags;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Environment variable with the filter, e.g. `debug` or `uhmm_pager=debug`.
const FILTER_VARIABLE: &str = "UHMM_LOG";

/// The crate that opens PCI devices complains when it lets go of one that the vault goes on holding. Its errors come back to us anyway.
/// By which of VFIO's two interfaces a device was opened is one line a start; that a process waits to be let in, and is, another two.
const DEFAULT_FILTER: &str = "warn,uhmm_pci::vfio=info,uhmm_kit::join=info,vfio_ioctls=off";

/// Format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines: one object a line.
    Json,
}

/// Logs to stderr from here on. A second call in one process changes nothing.
pub fn init(format: LogFormat, service: &str, incarnation: u32) {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let writer = LogWriter::of_stderr();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || writer.clone())
        .with_span_events(FmtSpan::NONE)
        .with_ansi(false);
    let installed = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).try_init(),
    };
    if installed.is_ok() {
        // The span is the process's: it is entered once and never left.
        let span = tracing::error_span!("process", service, incarnation);
        std::mem::forget(span.entered());
    }
}

/// See the module head.
#[derive(Clone, Debug)]
enum LogWriter {
    /// A file: a write of it may fail and never waits for anybody.
    Stderr,
    /// A pipe or terminal, opened once more so that it does not wait; others go on as they were.
    Opened(Arc<File>),
    /// The system's log.
    Socket,
}

impl LogWriter {
    fn of_stderr() -> Self {
        let kind = rustix::fs::fstat(std::io::stderr()).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            Ok(FileType::Fifo | FileType::CharacterDevice) => {
                let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
                let opened = OpenOptions::new().write(true).custom_flags(flags).open("/proc/self/fd/2");
                opened.map_or(Self::Stderr, |file| Self::Opened(Arc::new(file)))
            }
            Ok(FileType::Socket) => Self::Socket,
            _ => Self::Stderr,
        }
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        // Whatever is wrong with the log, there is nobody to tell.
        let _ = match self {
            Self::Stderr => std::io::stderr().write_all(line),
            Self::Opened(file) => file.as_ref().write_all(line),
            Self::Socket => {
                rustix::net::send(std::io::stderr().as_fd(), line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                    .map(drop)
                    .map_err(Into::into)
            }
        };
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Says on standard output that a program is ready, if anybody listens there.
pub fn say(what: &str) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "{what}").and_then(|()| stdout.flush()) {
        tracing::warn!(%error, what, "Nobody could be told");
    }
}
