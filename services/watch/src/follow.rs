//! `uhmm events`: what happened, and what happens from now on.
//!
//! Records have no way to wake a reader, by design: whom a service does not know it cannot wait for. So the reader looks ten times a
//! second; in between nothing is lost that fits into a record, and what does not fit is counted.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::events::Line;
use crate::sample::Sampler;

const LOOK: Duration = Duration::from_millis(100);
/// How often it is looked whether services have other records.
const REFRESH: Duration = Duration::from_secs(1);

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Goes on until it is ended.
    pub follow: bool,
    /// One JSON object a line.
    pub json: bool,
    /// So many of each service's last events first.
    pub past: u64,
    /// Of this service only.
    pub service: Option<String>,
}

/// Why it ended.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// Nobody to ask.
    #[error(transparent)]
    Sdk(#[from] uhmm_sdk::Error),
    /// Nobody reads.
    #[error("Nobody reads what is written")]
    Output(#[from] io::Error),
}

/// See the module head.
///
/// # Errors
/// Without a system, or when nobody reads. A system that ends while it is followed ends this without an error.
pub fn run(run_dir: &Path, options: &Options, out: &mut impl Write) -> Result<(), FollowError> {
    let mut sampler = Sampler::connect(Some(run_dir))?.with_events(options.past)?;
    sampler.learn_names();
    let mut refreshed = Instant::now();
    loop {
        let (lines, lost) = sampler.read_events();
        write_lines(&lines, lost, options, out)?;
        if !options.follow {
            return Ok(());
        }
        std::thread::sleep(LOOK);
        if refreshed.elapsed() >= REFRESH {
            refreshed = Instant::now();
            if let Err(error) = sampler.refresh() {
                // It may come back: its services' records are there all the same.
                tracing::debug!(%error, "The supervisor does not answer");
                if !run_dir.exists() || matches!(error, uhmm_sdk::Error::NotRunning { .. }) {
                    return Ok(());
                }
            }
            sampler.learn_names();
        }
    }
}

fn write_lines(lines: &[Line], lost: u64, options: &Options, out: &mut impl Write) -> io::Result<()> {
    if lost > 0 {
        match options.json {
            true => writeln!(out, "{{\"lost\":{lost}}}")?,
            false => writeln!(out, "-- {lost} events were overwritten before they could be read --")?,
        }
    }
    for line in lines.iter().filter(|line| options.service.as_ref().is_none_or(|of| *of == line.service)) {
        match options.json {
            true => writeln!(out, "{}", serde_json::to_string(line).unwrap_or_default())?,
            false => writeln!(out, "{line}")?,
        }
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_is_told_and_others_are_left_out() {
        let line = |service: &str| Line { service: service.to_owned(), what: "ready".to_owned(), ..Line::default() };
        let text = |json| {
            let options = Options { json, service: Some("pager".to_owned()), ..Options::default() };
            let mut out = Vec::new();
            write_lines(&[line("pager"), line("mirror")], 3, &options, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert!(text(false).starts_with("-- 3 events") && text(false).lines().count() == 2, "{}", text(false));
        let json: Vec<serde_json::Value> = text(true).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((json[0]["lost"].as_u64(), json[1]["service"].as_str()), (Some(3), Some("pager")));
    }
}
