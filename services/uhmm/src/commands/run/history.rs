//! Where a program's memory was over time, for `--plot`: a picture with as many points as can be seen, however long it runs.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::commands::bench::plot::Plot;

/// Points that are kept at most: then every second one goes, and half as many come.
const POINTS_MAX: usize = 1024;
const EVERY_MIN: Duration = Duration::from_millis(10);
const MIB: f64 = (1 << 20) as f64;

/// A moment.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    at: Duration,
    resident_bytes: u64,
    away_bytes: u64,
}

/// All moments that are kept.
pub struct History {
    points: Vec<Point>,
    every: Duration,
}

impl Default for History {
    fn default() -> Self {
        Self { points: Vec::new(), every: EVERY_MIN }
    }
}

impl History {
    /// `at`: since the program began.
    pub fn add(&mut self, at: Duration, resident_bytes: u64, away_bytes: u64) {
        if self.points.last().is_some_and(|last| at < last.at + self.every) {
            return;
        }
        self.points.push(Point { at, resident_bytes, away_bytes });
        if self.points.len() > POINTS_MAX {
            let mut odd = false;
            self.points.retain(|_| {
                odd = !odd;
                odd
            });
            self.every *= 2;
        }
    }

    /// Writes the picture.
    pub fn draw(&self, title: &str, ram_bytes: Option<u64>, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, self.svg(title, ram_bytes))
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    fn svg(&self, title: &str, ram_bytes: Option<u64>) -> String {
        let curve = |bytes: &dyn Fn(&Point) -> u64| -> Vec<(f64, f64)> {
            self.points.iter().map(|point| (point.at.as_secs_f64(), bytes(point) as f64 / MIB)).collect()
        };
        let mut series = vec![
            ("in memory".to_owned(), curve(&|point| point.resident_bytes)),
            ("on the device".to_owned(), curve(&|point| point.away_bytes)),
        ];
        if let Some(ram) = ram_bytes {
            series.push(("--ram".to_owned(), curve(&|_| ram)));
        }
        let (x, y) = ("seconds".into(), "MiB".into());
        Plot { name: String::new(), title: title.to_owned(), x, y, log_x: false, series }.svg()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_has_no_more_points_and_still_its_whole_length() {
        let mut history = History::default();
        let end = Duration::from_secs(3600);
        for moment in 0..360_000 {
            history.add(Duration::from_millis(10) * moment, u64::from(moment), 0);
        }
        let count = history.points.len();
        assert!((POINTS_MAX / 2 - 1..=POINTS_MAX).contains(&count), "{count}");
        assert_eq!(history.points[0].at, Duration::ZERO);
        assert!(history.points[count - 1].at > end - end / 100, "{:?}", history.points[count - 1]);
        assert!(history.points.is_sorted_by(|a, b| a.at < b.at));
    }

    #[test]
    fn the_picture_has_what_is_in_memory_and_away_and_the_limit() {
        let mut history = History::default();
        history.add(Duration::ZERO, 1 << 20, 0);
        history.add(Duration::from_secs(1), 3 << 20, 2 << 20);
        let curves = |svg: &str| svg.matches("<polyline").count();
        let svg = history.svg("uhmm run -- a<b", Some(4 << 20));
        assert!(svg.contains("a&lt;b") && svg.contains("in memory") && svg.contains("--ram"), "{svg}");
        assert_eq!((curves(&svg), curves(&history.svg("", None))), (3, 2));
    }
}
