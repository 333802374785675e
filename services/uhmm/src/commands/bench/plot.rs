//! Pictures of a run, as SVG: how far each figure is from its reach, and curves that benches have asked for.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::run::Run;

/// Curves over one axis.
pub(in crate::commands) struct Plot {
    /// Name of the file.
    pub name: String,
    pub title: String,
    pub x: String,
    pub y: String,
    pub log_x: bool,
    pub series: Vec<(String, Vec<(f64, f64)>)>,
}

const COLORS: [&str; 4] = ["#2a6f97", "#bc4b51", "#5b8e7d", "#8d6a9f"];
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 310.0;
const TOP: f64 = 40.0;
const RIGHT: f64 = 700.0;

/// Writes all of them.
pub(super) fn draw_all(run: &Run<'_>, folder: &Path) -> anyhow::Result<()> {
    let write = |name: &str, svg: String| {
        let path = folder.join(format!("{name}.svg"));
        std::fs::write(&path, svg).with_context(|| format!("{} cannot be written", path.display()))
    };
    for plot in &run.plots {
        write(&plot.name, plot.svg())?;
    }
    write("margins", margins(run))
}

fn head(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}",
        text(LEFT, 22.0, "start", title)
    )
}

fn text(x: f64, y: f64, anchor: &str, what: &str) -> String {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    format!("<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\" fill=\"#222222\">{what}</text>\n")
}

fn line((x1, y1): (f64, f64), (x2, y2): (f64, f64), color: &str) -> String {
    format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{color}\"/>\n")
}

/// Numbers that are easy to read, from below the least to above the greatest.
fn ticks(low: f64, high: f64, log: bool) -> Vec<f64> {
    if log {
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        return (first..=last).map(|power| 10f64.powi(power)).collect();
    }
    let rough = ((high - low) / 5.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|nice| nice * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (first..=last).map(|tick| tick as f64 * step).collect()
}

fn short(value: f64) -> String {
    if value.abs() >= 10.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}").trim_end_matches('0').trim_end_matches('.').into()
    }
}

/// From numbers to places on the picture.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let place = |value: f64| if self.log { value.max(1e-9).log10() } else { value };
        let (low, high) = (place(self.low), place(self.high));
        let part = if high > low { (place(value) - low) / (high - low) } else { 0.5 };
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }
}

impl Plot {
    pub(in crate::commands) fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let range = |pick: fn(&(f64, f64)) -> f64| {
            points().map(pick).fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)))
        };
        let (x, y) = (range(|point| point.0), range(|point| point.1));
        let (x_ticks, y_ticks) = (ticks(x.0, x.1, self.log_x), ticks(0.0, y.1, false));
        let ends = |ticks: &[f64]| (ticks.first().copied().unwrap_or(0.0), ticks.last().copied().unwrap_or(1.0));
        let (low, high) = ends(&x_ticks);
        let across = Axis { low, high, log: self.log_x, from: LEFT, to: RIGHT };
        let (low, high) = ends(&y_ticks);
        let up = Axis { low, high, log: false, from: BOTTOM, to: TOP };
        let mut svg = head(WIDTH, HEIGHT, &self.title);
        for tick in x_ticks {
            let at = across.at(tick);
            svg += &line((at, TOP), (at, BOTTOM), "#dddddd");
            svg += &text(at, BOTTOM + 16.0, "middle", &short(tick));
        }
        for tick in y_ticks {
            let at = up.at(tick);
            svg += &line((LEFT, at), (RIGHT, at), "#dddddd");
            svg += &text(LEFT - 6.0, at + 4.0, "end", &short(tick));
        }
        svg += &text(RIGHT, BOTTOM + 36.0, "end", &self.x);
        svg += &text(LEFT, BOTTOM + 36.0, "start", &self.y);
        for (index, (name, points)) in self.series.iter().enumerate() {
            let color = COLORS[index % COLORS.len()];
            let path = points.iter().fold(String::new(), |mut path, (x, y)| {
                // A String takes everything.
                let _ = write!(path, "{:.1},{:.1} ", across.at(*x), up.at(*y));
                path
            });
            let _ = writeln!(svg, "<polyline points=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>");
            let at = LEFT + 220.0 + 120.0 * index as f64;
            svg += &line((at, BOTTOM + 32.0), (at + 20.0, BOTTOM + 32.0), color);
            svg += &text(at + 26.0, BOTTOM + 36.0, "start", name);
        }
        svg + "</svg>\n"
    }
}

/// A bar a figure: how many times better than its reach, to the right of the line, or worse.
fn margins(run: &Run<'_>) -> String {
    const ROW: f64 = 16.0;
    const NAMES: f64 = 430.0;
    let rows: Vec<_> = run.figures.iter().filter_map(|figure| Some((figure, figure.margin()?))).collect();
    let height = TOP + ROW * rows.len() as f64 + 40.0;
    let axis = Axis { low: 0.1, high: 10.0, log: true, from: NAMES, to: 880.0 };
    let mut svg = head(900.0, height, "How far each figure is from its reach: right of 1 it is met, left of it missed");
    for tick in [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0] {
        let at = axis.at(tick);
        svg += &line((at, TOP), (at, height - 30.0), if tick == 1.0 { "#222222" } else { "#dddddd" });
        svg += &text(at, height - 14.0, "middle", &short(tick));
    }
    for (index, (figure, margin)) in rows.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let (from, to) = (axis.at(margin.min(1.0)), axis.at(margin.max(1.0)));
        let color = if *margin >= 1.0 { COLORS[2] } else { COLORS[1] };
        let wide = (to - from).max(1.0);
        svg += &text(NAMES - 6.0, y + 12.0, "end", &format!("{}: {}", figure.bench, figure.case));
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{:.0}\" width=\"{wide:.1}\" height=\"{}\" fill=\"{color}\"/>",
            y + 3.0,
            ROW - 5.0
        );
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_everything() {
        assert_eq!(ticks(0.0, 9.3, false), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(12.0, 430.0, true), [10.0, 100.0, 1000.0]);
        assert_eq!((short(0.5), short(2.0), short(120.4)), ("0.5".to_owned(), "2".to_owned(), "120".to_owned()));
    }

    #[test]
    fn a_plot_has_a_line_a_series_and_no_open_mark() {
        let points = vec![(1.0, 0.1), (10.0, 0.9)];
        let plot = Plot {
            name: "a".into(),
            title: "less < more & more".into(),
            x: "us".into(),
            y: "part".into(),
            log_x: true,
            series: vec![("uhmm".into(), points.clone()), ("floor".into(), points)],
        };
        let svg = plot.svg();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("less &lt; more &amp; more") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(!svg.contains("NaN"), "{svg}");
    }
}
