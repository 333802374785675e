//! `uhmm top` on a terminal: samples and keys in, pictures out. What an operator orders runs beside it: a migration takes the time that it
//! takes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind};
use uhmm_sdk::{Error, Operator};

use crate::sample::{Sample, Sampler};
use crate::top::picture;
use crate::top::state::{Action, Key, Top};
use crate::top::view::draw;

/// Cells of a strip: as wide as it ever is.
const STRIP_CELLS: u16 = 128;
/// Events of each service in the log at the beginning.
const PAST: u64 = 20;
/// Size of a picture that nobody's terminal gives a size.
const ONCE_SIZE: (u16, u16) = (100, 40);

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// One sample as text.
    pub once: bool,
    /// Samples go there too.
    pub record: Option<PathBuf>,
    /// Samples come from there.
    pub replay: Option<PathBuf>,
    /// Between two samples.
    pub period: Duration,
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Nobody to ask.
    #[error(transparent)]
    Sdk(#[from] Error),
    /// The terminal.
    #[error("The terminal cannot be used: `uhmm top --once` needs none")]
    Terminal(#[source] io::Error),
    /// A recording.
    #[error("Recording {path} cannot be used: {problem}", path = path.display())]
    Recording {
        /// Where.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// Where samples come from.
enum Source {
    Live(Box<Sampler>),
    Recorded { samples: std::vec::IntoIter<Sample>, last_ns: u64 },
}

impl Source {
    fn open(run_dir: &Path, options: &Options) -> Result<Self, TopError> {
        match &options.replay {
            Some(path) => Ok(Self::Recorded { samples: read_recording(path)?.into_iter(), last_ns: 0 }),
            None => {
                let sampler = Sampler::connect(Some(run_dir))?.with_strips(STRIP_CELLS).with_events(PAST)?;
                Ok(Self::Live(Box::new(sampler)))
            }
        }
    }

    /// The next one, and how long after the one before it comes; `None`: there is none.
    fn next(&mut self, period: Duration) -> Result<Option<(Sample, Duration)>, Error> {
        match self {
            Self::Live(sampler) => Ok(Some((sampler.sample()?, period))),
            Self::Recorded { samples, last_ns } => {
                let Some(sample) = samples.next() else { return Ok(None) };
                let since = if *last_ns == 0 { 0 } else { sample.time_ns.saturating_sub(*last_ns) };
                *last_ns = sample.time_ns;
                Ok(Some((sample, Duration::from_nanos(since))))
            }
        }
    }
}

/// A sample a line.
pub fn read_recording(path: &Path) -> Result<Vec<Sample>, TopError> {
    let failed = |problem: String| TopError::Recording { path: path.to_owned(), problem };
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let mut samples = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|error| failed(error.to_string()))?;
        let sample = serde_json::from_str(&line);
        // One that was being written when its writer ended.
        let sample = sample.map_err(|error| failed(format!("line {} is no sample ({error})", number + 1)))?;
        samples.push(sample);
    }
    if samples.is_empty() { Err(failed("there is no sample in it".to_owned())) } else { Ok(samples) }
}

/// See the module head.
///
/// # Errors
/// See [`TopError`].
pub fn run(run_dir: &Path, options: &Options) -> Result<(), TopError> {
    let mut source = Source::open(run_dir, options)?;
    let mut recording = match &options.record {
        None => None,
        Some(path) => {
            let failed = |error: io::Error| TopError::Recording { path: path.clone(), problem: error.to_string() };
            Some((path.clone(), BufWriter::new(File::create(path).map_err(failed)?)))
        }
    };
    let mut top = Top { replayed: options.replay.is_some(), ..Top::default() };
    if options.once {
        // Of a recording the last one.
        while let Some((sample, _)) = source.next(options.period)? {
            record(&mut recording, &sample)?;
            top.take(sample);
            if matches!(source, Source::Live(_)) {
                break;
            }
        }
        let lines = top.now.services.len() + top.now.devices.len() + top.now.regions.len() + 30;
        let height = (lines as u16).max(ONCE_SIZE.1);
        let text = picture::text(&picture::render(&top, ONCE_SIZE.0, height));
        return io::stdout().write_all(text.as_bytes()).map_err(TopError::Terminal);
    }
    let mut terminal = ratatui::try_init().map_err(TopError::Terminal)?;
    let outcome = converse(&mut terminal, &mut top, &mut source, &mut recording, run_dir, options);
    ratatui::restore();
    outcome
}

type Recording = Option<(PathBuf, BufWriter<File>)>;

fn record(recording: &mut Recording, sample: &Sample) -> Result<(), TopError> {
    let Some((path, file)) = recording else { return Ok(()) };
    let failed = |problem: String| TopError::Recording { path: path.clone(), problem };
    let line = serde_json::to_string(sample).map_err(|error| failed(error.to_string()))?;
    writeln!(file, "{line}").and_then(|()| file.flush()).map_err(|error| failed(error.to_string()))
}

fn converse(
    terminal: &mut ratatui::DefaultTerminal,
    top: &mut Top,
    source: &mut Source,
    recording: &mut Recording,
    run_dir: &Path,
    options: &Options,
) -> Result<(), TopError> {
    let (told, tells) = mpsc::channel::<String>();
    let mut due = Instant::now();
    let mut waiting: Option<Sample> = None;
    while !top.quit {
        if Instant::now() >= due {
            if let Some(sample) = waiting.take() {
                top.take(sample);
            }
            match source.next(options.period) {
                Ok(Some((sample, after))) => {
                    record(recording, &sample)?;
                    match source {
                        Source::Live(_) => top.take(sample),
                        Source::Recorded { .. } => waiting = Some(sample),
                    }
                    due = Instant::now() + after;
                }
                Ok(None) => {
                    "That was the last sample".clone_into(&mut top.message);
                    due = Instant::now() + Duration::from_secs(3600);
                }
                Err(error) => {
                    top.message = format!("{error}");
                    due = Instant::now() + options.period;
                }
            }
        }
        top.message = tells.try_recv().unwrap_or(std::mem::take(&mut top.message));
        terminal.draw(|frame| draw(top, frame)).map_err(TopError::Terminal)?;
        if !event::poll(due.saturating_duration_since(Instant::now())).map_err(TopError::Terminal)? {
            continue;
        }
        let read = event::read().map_err(TopError::Terminal)?;
        if let Some(action) = key_of(&read).and_then(|key| top.key(key)) {
            top.message = format!("Asked to {} ...", top.words(&action));
            order(action, run_dir, told.clone());
        }
    }
    Ok(())
}

fn key_of(event: &Event) -> Option<Key> {
    let Event::Key(key) = event else { return None };
    if key.kind == KeyEventKind::Release {
        return None;
    }
    match key.code {
        KeyCode::Up => Some(Key::Up),
        KeyCode::Down => Some(Key::Down),
        KeyCode::Tab => Some(Key::Tab),
        KeyCode::Esc => Some(Key::Escape),
        KeyCode::Char('c') if key.modifiers.contains(event::KeyModifiers::CONTROL) => Some(Key::Char('q')),
        KeyCode::Char(letter) => Some(Key::Char(letter)),
        _ => None,
    }
}

/// Beside the screen; it tells how it went.
fn order(action: Action, run_dir: &Path, told: mpsc::Sender<String>) {
    let run_dir = run_dir.to_owned();
    std::thread::spawn(move || {
        let text = carry_out(&action, &run_dir).unwrap_or_else(|error| format!("{error}"));
        // The screen may be gone.
        let _ = told.send(text);
    });
}

fn carry_out(action: &Action, run_dir: &Path) -> Result<String, Error> {
    let mut operator = Operator::connect(Some(run_dir))?;
    Ok(match action {
        Action::Restart(service) => {
            let killed = operator.kill(service)?;
            format!("Killed {service}: pid {}, incarnation {}", killed.pid, killed.incarnation)
        }
        Action::Drain(device) => {
            let id = operator.device_id(device)?;
            format!(
                "{} pages came home from {device}; it takes none until `uhmm undrain {device}`",
                operator.drain(id)?
            )
        }
        Action::Evict { region } => format!("{} pages came home", operator.move_region(*region, None)?),
        Action::Migrate { region, device } => {
            format!("{} pages moved", operator.move_region(*region, Some(*device))?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_is_read_back_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recording");
        let samples = [1, 2].map(|time_ns| Sample { time_ns, problems: vec!["x".to_owned()], ..Sample::default() });
        let mut recording = Some((path.clone(), BufWriter::new(File::create(&path).unwrap())));
        samples.iter().for_each(|sample| record(&mut recording, sample).unwrap());
        assert_eq!(read_recording(&path).unwrap(), samples);
        std::fs::write(&path, "{\"time_ns\":1").unwrap();
        let error = read_recording(&path).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("recording"), "{error}");
        assert!(read_recording(&dir.path().join("none")).is_err());
    }
}
