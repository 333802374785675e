//! Logs: text for people, JSON for machines; every line says which service and incarnation.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Environment variable with the filter, e.g. `debug` or `uhmm_pager=debug`.
const FILTER_VARIABLE: &str = "UHMM_LOG";

/// The crate that opens PCI devices complains when it lets go of one that the vault goes on holding. Its errors come back to us anyway.
/// By which of VFIO's two interfaces a device was opened is one line a start.
const DEFAULT_FILTER: &str = "warn,uhmm_pci::vfio=info,vfio_ioctls=off";

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
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
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
